"""Hold a process at its next exec: the moment at which it is smallest and has nothing but its program.

arm -> wait -> a Frozen process, as `freeze` gives it, right before the new program's first instruction. Until then it
runs on, traced: signals go through to it, stops by job control stay stops. When the tracer dies, it runs on untraced.
"""

import os
import signal
import socket

from engine.freeze import Frozen, Thread
from engine.linux import procfs, ptrace
from engine.runner import Calls, ProcessGone
from engine.stream import Aborted

_LOOK_S = 0.25  # between looks at the control socket while nothing happens


class Armed:
    """A process that is seized and runs on to its next exec.

    Attributes:
        options: further ones of ptrace(2), for as long as it is held.
    """

    options = 0

    def __init__(self, pid: int) -> None:
        """Seize it.

        Raises:
            ProcessLookupError: there is none.
            PermissionError: it is traced already, or the caller may not.
            OSError: EOPNOTSUPP, it has several threads, and any of them might exec.
        """
        self.pid = pid
        if len(procfs.threads(pid)) > 1:
            raise OSError(95, f"process {pid} has several threads: any of them might exec")
        # Blocked, so that sigtimedwait takes what waitpid is about to see.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        ptrace.seize(pid, ptrace.O_TRACESYSGOOD | ptrace.O_TRACEEXEC | self.options)

    def wait(self, control: socket.socket) -> Frozen:
        """Wait for the exec, however long it takes.

        Raises:
            ProcessGone: it ended instead.
            Aborted: the control socket ended; the process runs on.
        """
        while True:
            status = ptrace.wait_nohang(self.pid)
            if status is None:
                if signal.sigtimedwait({signal.SIGCHLD}, _LOOK_S) is None and _has_ended(control):
                    raise Aborted
            elif not os.WIFSTOPPED(status):
                raise ProcessGone(self.pid)
            elif status >> 16 == ptrace.EVENT_EXEC:
                return self._stand_still()
            else:
                self._pass_on(status)

    def _pass_on(self, status: int) -> None:
        stopped_by, event = os.WSTOPSIG(status), status >> 16
        if event == ptrace.EVENT_STOP and stopped_by != signal.SIGTRAP:
            ptrace.ptrace(ptrace.LISTEN, self.pid)  # job control: it stays stopped
        else:
            ptrace.ptrace(ptrace.CONT, self.pid, 0, 0 if event else stopped_by)

    def _stand_still(self) -> Frozen:
        # One stop further: out of the system call, in front of the first instruction, like any other frozen process.
        ptrace.interrupt(self.pid)
        ptrace.ptrace(ptrace.CONT, self.pid)
        pending: list[int] = []
        while True:
            status = ptrace.wait(self.pid)
            if not os.WIFSTOPPED(status):
                raise ProcessGone(self.pid)
            if status >> 16 == ptrace.EVENT_STOP:
                break
            pending.append(os.WSTOPSIG(status))
            ptrace.ptrace(ptrace.CONT, self.pid)
        ptrace.ptrace(ptrace.SETOPTIONS, self.pid, 0, ptrace.O_TRACESYSGOOD | self.options)
        for number in pending:
            os.kill(self.pid, number)  # it has them still to get, wherever it runs
        frozen = Frozen(self.pid)
        frozen.threads = [Thread(self.pid, stopped=True)]
        frozen.fresh = True
        frozen.settle()
        return frozen


def end(frozen: Frozen, code: int, message: bytes) -> None:
    """End a process that was to run elsewhere and cannot: a line on its standard error, then exit with `code`."""
    calls = Calls(frozen.open_injection())
    calls.add("write", 2, calls.data(message), len(message), must=False)
    calls.run()
    try:
        frozen.open_injection().call("exit_group", code)
    except ProcessGone:
        frozen.close()


def _has_ended(control: socket.socket) -> bool:
    try:
        return not control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True

"""Forks engine workers in a millisecond or two, from a small single-threaded process with everything imported.

Start it before the daemon starts threads or an event loop. It survives its workers, reaps them, and cleans up after
one that
was killed: a process that such a worker left behind goes on by itself, but keeps a scratch mapping, which is taken
away here.
"""

import array
import gc
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass, field

from engine import guard, note
from engine.linux import process_vm
from engine.linux.libc import syscall
from engine.linux.x86_64 import NR
from engine.worker import serve

_PR_SET_NAME = 15
_IDLE_S = 20.0  # an idle worker keeps some 10 MB
_IDLE_MAX = 4
_SESSIONS_MAX = 500


class Zygote:
    """The daemon's handle of its zygote."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self._sock = sock
        self.pid = pid

    @classmethod
    def start(cls) -> "Zygote":
        """Fork the zygote. Call it while the process is single-threaded.

        Raises:
            OSError: no memory or descriptors.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                ours.close()
                _become_zygote(theirs, parent)
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        return cls(ours, pid)

    def worker(self) -> socket.socket:
        """A fresh worker's socket; closing it ends the worker (and undoes what it was about).

        Raises:
            OSError: the zygote is gone.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                fds = array.array("i", [theirs.fileno()])
                self._sock.sendmsg([b"w"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)], socket.MSG_NOSIGNAL)
            except OSError:
                ours.close()
                raise
        return ours

    def close(self) -> None:
        """End the zygote; workers end when their own sockets do."""
        self._sock.close()
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass


def become_helper(control: socket.socket, name: str) -> socket.socket:
    """Makes a fresh fork of a daemon a process of its own: it has nothing of the daemon's but standard error and this
    socket, whose end is the daemon's; signals are none. Returns the socket."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # the daemon's end is the end of the socket
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    keep = control.detach()
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.closerange(3, keep)
    os.closerange(keep + 1, 1 << 20)
    _name(name.encode())
    gc.collect()
    gc.freeze()
    return socket.socket(fileno=keep)


def _become_zygote(control: socket.socket, parent: int) -> None:
    control = become_helper(control, "bpfs-zygote")
    gc.disable()
    if os.getppid() != parent:
        return
    _Pool(control).run()


def _name(name: bytes) -> None:
    syscall(NR["prctl"], _PR_SET_NAME, name + b"\0")


@dataclass(slots=True)
class _Worker:
    """A worker as the zygote sees it."""

    pid: int
    pidfd: int
    link: socket.socket | None  # it says here that it is idle, and takes its next socket from here
    note: mmap.mmap
    idle_since: float | None = None  # time.monotonic(); None: busy
    held: list[int] = field(default_factory=list)  # descriptors that have to outlive it: engine/guard.py


class _Pool:
    """The zygote's loop.

    An idle worker is used again: it has its memory to itself already, which halves the time of a move.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._workers: list[_Worker] = []
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def run(self) -> None:
        """Serve until the daemon is gone."""
        while True:
            ready = {fd for fd, _ in self._poll.poll(None if not self._idle() else _IDLE_S * 1000 / 4)}
            for worker in list(self._workers):
                if worker.link is not None and worker.link.fileno() in ready:
                    self._listen(worker)
                if worker.pidfd in ready:
                    self._bury(worker)
            if self._control.fileno() in ready and not self._hand_out():
                return
            self._retire()

    def _idle(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.idle_since is not None]

    def _listen(self, worker: _Worker) -> None:
        assert worker.link is not None
        try:
            said, fds, _, _ = socket.recv_fds(worker.link, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError:  # killed with a socket of ours still to be read: ECONNRESET
            said, fds = b"", []
        worker.held += fds
        if not said:  # about to end
            self._close_link(worker)
        elif said == guard.RELEASE:
            _close_all(worker.held)
        elif said != guard.HOLD:
            worker.idle_since = time.monotonic()

    def _close_link(self, worker: _Worker) -> None:
        if worker.link is not None:
            self._poll.unregister(worker.link)
            worker.link.close()
            worker.link, worker.idle_since = None, None

    def _bury(self, worker: _Worker) -> None:
        self._close_link(worker)
        self._poll.unregister(worker.pidfd)
        self._workers.remove(worker)
        _reap(worker.pidfd, worker.pid, worker.note)
        _close_all(worker.held)  # the janitor, if there is one, has them until it is done

    def _retire(self) -> None:
        idle = sorted(self._idle(), key=lambda worker: worker.idle_since or 0.0)
        for worker in idle[:-_IDLE_MAX]:
            self._close_link(worker)
        for worker in idle[-_IDLE_MAX:]:
            if time.monotonic() - (worker.idle_since or 0.0) > _IDLE_S:
                self._close_link(worker)

    def _hand_out(self) -> bool:
        body, ancillary, _, _ = self._control.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        if not body:
            return False
        (fd,) = struct.unpack("i", ancillary[0][2][:4])
        try:
            idle = self._idle()
            if not (idle and self._reuse(idle[-1], fd)):
                self._fork(fd)
        except OSError as error:
            print(f"bpfs zygote: {error}", file=sys.stderr, flush=True)
        finally:
            os.close(fd)
        return True

    def _reuse(self, worker: _Worker, fd: int) -> bool:
        assert worker.link is not None
        try:
            socket.send_fds(worker.link, [b"w"], [fd], socket.MSG_NOSIGNAL)
        except OSError:  # it was killed a moment ago
            return False
        worker.idle_since = None
        return True

    def _fork(self, fd: int) -> None:
        shared = mmap.mmap(-1, note.SIZE)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            pid = os.fork()
            if pid == 0:
                # Nobody but the zygote may hold its ends: they tell its end.
                for one in [self._control, ours, *[w.link for w in self._workers if w.link is not None]]:
                    one.close()
                for other in self._workers:
                    _close_all(other.held)
                _run_worker(theirs, fd, shared)
        worker = _Worker(pid, process_vm.pidfd_open(pid), ours, shared)
        self._workers.append(worker)
        self._poll.register(worker.pidfd, select.POLLIN)
        self._poll.register(ours, select.POLLIN)


def _run_worker(link: socket.socket, fd: int, shared: mmap.mmap) -> None:
    status = 1
    try:
        _name(b"bpfs-worker")
        note.use(shared)
        guard.use(link)
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))  # engine.linux.ptrace.wait takes it from the queue
        _work(link, fd)
        status = 0
    finally:
        os._exit(status)


def _work(link: socket.socket, fd: int) -> None:
    baseline = len(os.listdir("/proc/self/fd"))
    for left in reversed(range(_SESSIONS_MAX)):
        with socket.socket(fileno=fd) as control:
            clean = serve(control)
        # Whatever went wrong, the next move gets a worker that knows nothing of it. Who says that it is idle has to
        # serve once more.
        if not clean or not left or len(os.listdir("/proc/self/fd")) > baseline:
            return
        try:
            link.send(b"i", socket.MSG_NOSIGNAL)
            body, fds, _, _ = socket.recv_fds(link, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return
        if not body:
            return
        fd = fds[0]


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _reap(pidfd: int, pid: int, shared: mmap.mmap) -> None:
    os.close(pidfd)
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:
        return
    if status and note.pending(shared):
        # In a process of its own: it may have to wait for the abandoned process.
        janitor = os.fork()
        if janitor == 0:
            try:
                if os.fork() == 0:
                    note.clean_up(shared)
            finally:
                os._exit(0)
        os.waitpid(janitor, 0)
    shared.close()

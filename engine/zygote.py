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

from engine import note
from engine.linux import process_vm
from engine.linux.libc import NR, syscall
from engine.worker import serve

_PR_SET_NAME = 15
_PR_SET_PDEATHSIG = 1


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


def _become_zygote(control: socket.socket, parent: int) -> None:
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
    _name(b"bpfs-zygote")
    gc.collect()
    gc.freeze()
    gc.disable()
    if os.getppid() != parent:
        return
    _loop(socket.socket(fileno=keep))


def _name(name: bytes) -> None:
    syscall(NR["prctl"], _PR_SET_NAME, name + b"\0")


def _loop(control: socket.socket) -> None:
    poll = select.poll()
    poll.register(control, select.POLLIN)
    workers: dict[int, tuple[int, mmap.mmap]] = {}  # pidfd -> (pid, note)
    while True:
        for fd, _ in poll.poll():
            if fd in workers:
                poll.unregister(fd)
                _reap(fd, *workers.pop(fd))
            elif not _spawn(control, poll, workers):
                return


def _spawn(control: socket.socket, poll: select.poll, workers: dict[int, tuple[int, mmap.mmap]]) -> bool:
    body, ancillary, _, _ = control.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    if not body:
        return False
    (fd,) = struct.unpack("i", ancillary[0][2][:4])
    shared = mmap.mmap(-1, 4096)
    try:
        pid = os.fork()
        if pid == 0:
            _run_worker(control, fd, shared)
        pidfd = process_vm.pidfd_open(pid)
        workers[pidfd] = (pid, shared)
        poll.register(pidfd, select.POLLIN)
    except OSError as error:
        print(f"bpfs zygote: {error}", file=sys.stderr, flush=True)
    finally:
        os.close(fd)
    return True


def _run_worker(control: socket.socket, fd: int, shared: mmap.mmap) -> None:
    status = 1
    try:
        control.close()
        _name(b"bpfs-worker")
        note.use(shared)
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))  # engine.linux.ptrace.wait takes it from the queue
        serve(socket.socket(fileno=fd))
        status = 0
    finally:
        os._exit(status)


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

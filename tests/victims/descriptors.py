"""Sets up descriptors of one kind from number 10 on, and checks that they are what they were.

usage: descriptors.py KIND FOLDER            sets up, stops itself, and checks when it is continued
       descriptors.py KIND FOLDER SOCKET     gets them from the test over a socket, and checks

Exit status 0: all right. The state between both halves is in the folder.
"""

import ctypes
import fcntl
import os
import pickle
import select
import signal
import socket
import struct
import sys
import termios
import time
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
F_GETPIPE_SZ, F_SETPIPE_SZ, F_OFD_SETLK = 1032, 1031, 37
CONTROL = 200


def place(fd: int, number: int, inheritable: bool = True) -> int:
    """Move a descriptor to a number."""
    os.dup2(fd, number, inheritable)
    if fd != number:
        os.close(fd)
    return number


def call(name: str, *arguments: object) -> int:
    result: int = getattr(LIBC, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def flags(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL)


def info(fd: int) -> str:
    with open(f"/proc/self/fdinfo/{fd}") as file:
        return file.read()


SETS: list[select.epoll] = []


def epoll(fd: int) -> select.epoll:
    SETS.append(select.epoll.fromfd(fd))  # its end would close the descriptor
    return SETS[-1]


def waiting(fd: int) -> int:
    return struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]


class File:
    def setup(self) -> None:
        with open("file", "w") as file:
            file.write("hello world")
        place(os.open("file", os.O_RDWR), 10, False)
        os.lseek(10, 3, os.SEEK_SET)
        place(os.open("file", os.O_WRONLY | os.O_APPEND), 11)
        os.dup2(10, 12)
        place(os.open("file", os.O_RDONLY), 13)

    def check(self) -> None:
        assert os.read(10, 100) == b"lo world"
        assert os.lseek(12, 0, os.SEEK_CUR) == 11 and os.lseek(13, 0, os.SEEK_CUR) == 0
        assert not os.get_inheritable(10) and os.get_inheritable(12)
        assert flags(11) & os.O_APPEND and flags(11) & os.O_ACCMODE == os.O_WRONLY
        os.write(11, b"!")
        assert os.read(13, 100) == b"hello world!"
        assert os.readlink("/proc/self/fd/10") == os.path.realpath("file")


class Directory:
    def setup(self) -> None:
        os.mkdir("dir")
        for name in "abc":
            open(f"dir/{name}", "w").close()
        place(os.open("dir", os.O_RDONLY | os.O_DIRECTORY), 10)
        place(os.open("dir/a", os.O_PATH), 11)
        os.symlink("nowhere", "dir/link")
        place(os.open("dir/link", os.O_PATH | os.O_NOFOLLOW), 12)

    def check(self) -> None:
        assert sorted(os.listdir(10)) == ["a", "b", "c", "link"]
        assert flags(11) & os.O_PATH and os.path.samestat(os.fstat(11), os.stat("dir/a"))
        assert os.path.samestat(os.fstat(12), os.lstat("dir/link"))


class Deleted:
    def setup(self) -> None:
        place(os.open("gone", os.O_RDWR | os.O_CREAT, 0o640), 10)
        os.write(10, b"abc")
        os.pwrite(10, b"xyz", 3 << 20)
        place(os.open("gone", os.O_RDONLY), 11)
        os.unlink("gone")
        place(os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600), 12)
        os.write(12, b"nameless")

    def check(self) -> None:
        status = os.fstat(10)
        assert status.st_nlink == 0 and status.st_size == (3 << 20) + 3 and status.st_mode & 0o777 == 0o640
        assert status.st_blocks * 512 < 1 << 20, "the hole was filled"
        assert os.read(11, 3) == b"abc" and os.pread(11, 9, 3 << 20) == b"xyz"
        assert os.lseek(10, 0, os.SEEK_CUR) == 3
        os.write(10, b"def")
        assert os.read(11, 3) == b"def"
        assert flags(11) & os.O_ACCMODE == os.O_RDONLY
        assert os.lseek(12, 0, os.SEEK_CUR) == 8 and os.pread(12, 100, 0) == b"nameless"


class Devices:
    NAMES = ("null", "zero", "full", "random", "urandom")

    def setup(self) -> None:
        for number, name in enumerate(self.NAMES, 10):
            place(os.open(f"/dev/{name}", os.O_RDWR | (os.O_NONBLOCK if name == "null" else 0)), number)

    def check(self) -> None:
        for number, name in enumerate(self.NAMES, 10):
            assert os.fstat(number).st_rdev == os.stat(f"/dev/{name}").st_rdev
        assert flags(10) & os.O_NONBLOCK and not flags(11) & os.O_NONBLOCK
        assert os.read(10, 1) == b"" and os.read(11, 2) == b"\0\0"


class Pipe:
    DATA = bytes(range(256)) * 1000

    def setup(self) -> None:
        out, into = os.pipe()
        fcntl.fcntl(into, F_SETPIPE_SZ, 1 << 20)
        os.write(into, self.DATA)
        place(out, 10)
        place(into, 11)
        os.set_blocking(11, False)
        place(os.open("/proc/self/fd/11", os.O_WRONLY), 12)

    def check(self) -> None:
        assert fcntl.fcntl(10, F_GETPIPE_SZ) == 1 << 20
        assert flags(11) & os.O_NONBLOCK and not flags(10) & os.O_NONBLOCK and not flags(12) & os.O_NONBLOCK
        data = b""
        while waiting(10):
            data += os.read(10, 1 << 20)
        assert data == self.DATA
        os.write(12, b"more")
        assert os.read(10, 9) == b"more"
        os.close(11)
        os.close(12)
        assert os.read(10, 1) == b""


class Fifo:
    def setup(self) -> None:
        os.mkfifo("fifo")
        place(os.open("fifo", os.O_RDWR), 10)
        place(os.open("fifo", os.O_WRONLY | os.O_NONBLOCK), 11)
        os.write(10, b"abc")

    def check(self) -> None:
        assert os.read(10, 10) == b"abc"
        assert flags(11) & os.O_NONBLOCK and not flags(10) & os.O_NONBLOCK
        os.write(11, b"d")
        assert os.read(10, 1) == b"d"


class Eventfd:
    def setup(self) -> None:
        place(os.eventfd(5), 10)
        place(os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK), 11)
        place(os.eventfd(0, os.EFD_NONBLOCK), 12)

    def check(self) -> None:
        assert os.eventfd_read(10) == 5
        assert [os.eventfd_read(11) for _ in range(3)] == [1, 1, 1]
        for empty in (11, 12):
            try:
                raise AssertionError(os.eventfd_read(empty))
            except BlockingIOError:
                pass


class Timerfd:
    def setup(self) -> None:
        def make(number: int, clock: int, how: int, value: float, interval: float) -> None:
            place(call("timerfd_create", clock, 0), number)
            spec = struct.pack("4q", int(interval), int(interval % 1 * 1e9), int(value), int(value % 1 * 1e9))
            call("timerfd_settime", number, how, spec, None)

        make(10, time.CLOCK_MONOTONIC, 0, 5000, 7)
        make(11, time.CLOCK_MONOTONIC, 0, 1e-6, 5000)
        make(12, time.CLOCK_REALTIME, 1, time.time() + 5000, 0)
        make(13, time.CLOCK_MONOTONIC, 0, 1e-6, 0)
        make(14, time.CLOCK_BOOTTIME, 0, 0, 0)
        select.select([11], [], [])
        select.select([13], [], [])

    def check(self) -> None:
        def left(fd: int) -> tuple[float, float]:
            spec = ctypes.create_string_buffer(32)
            call("timerfd_gettime", fd, spec)
            a, b, c, d = struct.unpack("4q", spec.raw)
            return c + d / 1e9, a + b / 1e9

        assert 4000 < left(10)[0] <= 5000 and left(10)[1] == 7
        assert 4000 < left(12)[0] <= 5000
        assert left(14) == (0, 0) and not select.select([10, 12, 14], [], [], 0)[0]
        select.select([11], [], [])
        assert struct.unpack("Q", os.read(11, 8))[0] == 1
        assert 4000 < left(11)[0] <= 5000 and left(11)[1] == 5000
        assert struct.unpack("Q", os.read(13, 8))[0] == 1 and left(13) == (0, 0)
        assert "clockid: 7" in info(14)


class Signalfd:
    def setup(self) -> None:
        place(call("signalfd", -1, struct.pack("Q", 1 << signal.SIGUSR1 - 1), 0), 10)
        place(call("epoll_create1", 0), 11)
        epoll(11).register(10, select.EPOLLIN)

    def check(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        os.kill(os.getpid(), signal.SIGUSR1)
        assert epoll(11).poll() == [(10, select.EPOLLIN)]
        assert struct.unpack_from("I", os.read(10, 128))[0] == signal.SIGUSR1


class Epoll:
    def setup(self) -> None:
        out, into = os.pipe()
        place(out, 10)
        place(into, 11)
        place(call("epoll_create1", 0), 12, False)
        place(call("epoll_create1", 0), 13)
        inner = epoll(12)
        inner.register(10, select.EPOLLIN | select.EPOLLET)
        inner.register(11, select.EPOLLOUT | select.EPOLLONESHOT)
        epoll(13).register(12, select.EPOLLIN)
        assert inner.poll(0) == [(11, select.EPOLLOUT)]

    def check(self) -> None:
        inner, outer = epoll(12), epoll(13)
        assert inner.poll(0) == [] and outer.poll(0) == []
        os.write(11, b"x")
        assert outer.poll() == [(12, select.EPOLLIN)]
        assert inner.poll() == [(10, select.EPOLLIN)]
        assert inner.poll(0) == [], "it was edge-triggered"


class Inotify:
    def setup(self) -> None:
        os.mkdir("watched")
        os.mkdir("other")
        place(call("inotify_init1", os.O_NONBLOCK), 10)
        for _ in range(3):
            call("inotify_rm_watch", 10, call("inotify_add_watch", 10, b"other", 0x100))
        os.read(10, 4096)  # IN_IGNORED
        assert call("inotify_add_watch", 10, b"watched", 0x100) == 4
        assert call("inotify_add_watch", 10, b"other", 0x200) == 5

    def check(self) -> None:
        open("watched/new", "w").close()
        wd, mask, _, length = struct.unpack_from("iIII", data := os.read(10, 4096))
        assert (wd, mask, data[16 : 16 + length].rstrip(b"\0")) == (4, 0x100, b"new")


class Memfd:
    F_ADD_SEALS, F_GET_SEALS, SEALS = 1033, 1034, 0xE

    def setup(self) -> None:
        place(os.memfd_create("some name", os.MFD_ALLOW_SEALING), 10)
        os.write(10, b"sealed")
        fcntl.fcntl(10, self.F_ADD_SEALS, self.SEALS)
        place(os.open("/proc/self/fd/10", os.O_RDONLY), 11)
        place(os.memfd_create("other"), 12)
        os.pwrite(12, b"data", 5 << 20)

    def check(self) -> None:
        assert os.readlink("/proc/self/fd/10") == "/memfd:some name (deleted)"
        assert os.lseek(10, 0, os.SEEK_CUR) == 6 and os.read(11, 10) == b"sealed"
        assert os.path.samestat(os.fstat(10), os.fstat(11))
        assert fcntl.fcntl(10, self.F_GET_SEALS) == self.SEALS
        assert os.fstat(12).st_size == (5 << 20) + 4 and os.fstat(12).st_blocks * 512 < 1 << 20
        assert os.pread(12, 4, 5 << 20) == b"data"


class Pidfd:
    def setup(self) -> None:
        place(os.pidfd_open(os.getpid()), 10)

    def check(self) -> None:
        assert f"Pid:\t{os.getpid()}\n" in info(10)


class Sockets:
    def setup(self) -> None:
        one, other = socket.socketpair()
        place(one.detach(), 10)
        place(other.detach(), 11)
        os.write(10, b"abc")
        os.write(10, b"def")
        os.write(11, b"back")
        os.set_blocking(11, False)
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        place(one.detach(), 12)
        place(other.detach(), 13)
        for message in (b"one", b"two!", b"three"):
            os.write(12, message)
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        place(one.detach(), 14)
        os.write(other.fileno(), b"end")
        other.close()
        one, other = socket.socketpair()
        one.send(b"last")
        one.shutdown(socket.SHUT_WR)
        place(one.detach(), 15)
        place(other.detach(), 16)

    def check(self) -> None:
        assert flags(11) & os.O_NONBLOCK and not flags(10) & os.O_NONBLOCK
        assert os.read(11, 100) == b"abcdef" and os.read(10, 100) == b"back"
        os.write(11, b"on")
        assert os.read(10, 100) == b"on"
        assert [os.read(13, 100) for _ in range(3)] == [b"one", b"two!", b"three"]
        os.write(13, b"answer")
        assert os.read(12, 100) == b"answer"
        assert os.read(14, 100) == b"end" and os.read(14, 100) == b""
        assert os.read(16, 100) == b"last" and os.read(16, 100) == b""
        os.write(16, b"yet")
        assert os.read(15, 100) == b"yet"


class Locks:
    def setup(self) -> None:
        for number, name in ((10, "flock"), (11, "posix"), (12, "ofd"), (13, "shared")):
            place(os.open(name, os.O_RDWR | os.O_CREAT), number)
        fcntl.flock(10, fcntl.LOCK_EX)
        fcntl.lockf(11, fcntl.LOCK_EX, 10, 20)
        fcntl.lockf(11, fcntl.LOCK_EX, 1, 500)
        fcntl.fcntl(12, F_OFD_SETLK, struct.pack("hh4xqqi4x", fcntl.F_WRLCK, 0, 5, 0, 0))
        fcntl.flock(13, fcntl.LOCK_SH)

    def check(self) -> None:
        def held(fd: int) -> list[list[str]]:
            lines = [line.split() for line in info(fd).splitlines() if line.startswith("lock:")]
            return sorted([words[2], words[4], words[-2], words[-1]] for words in lines)

        assert held(10) == [["FLOCK", "WRITE", "0", "EOF"]]
        assert held(11) == [["POSIX", "WRITE", "20", "29"], ["POSIX", "WRITE", "500", "500"]]
        assert held(12) == [["OFDLCK", "WRITE", "5", "EOF"]]
        assert held(13) == [["FLOCK", "READ", "0", "EOF"]]


class Owner:
    def setup(self) -> None:
        one, other = socket.socketpair()
        place(one.detach(), 10)
        place(other.detach(), 11)
        fcntl.fcntl(10, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(10, 10, signal.SIGUSR2)  # F_SETSIG
        fcntl.fcntl(10, fcntl.F_SETFL, os.O_ASYNC)

    def check(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        assert fcntl.fcntl(10, fcntl.F_GETOWN) == os.getpid()
        os.write(11, b"x")
        assert signal.sigwait([signal.SIGUSR2]) == signal.SIGUSR2


class Proc:
    """Its own files of /proc, and the machine's."""

    def setup(self) -> None:
        place(os.open("/proc/self/status", os.O_RDONLY), 10)
        place(os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY), 11)
        place(os.open(f"/proc/self/task/{os.getpid()}/comm", os.O_RDWR), 12)
        place(os.open("/proc/meminfo", os.O_RDONLY), 13)

    def check(self) -> None:
        assert f"\nPid:\t{os.getpid()}\n".encode() in os.pread(10, 4096, 0)
        assert {"fd", "task", "status"} <= set(os.listdir(11))
        assert os.readlink("exe", dir_fd=11) == os.readlink("/proc/self/exe")
        os.write(12, b"renamed")
        with open("/proc/self/comm") as file:
            assert file.read() == "renamed\n"
        assert os.pread(13, 8, 0) == b"MemTotal"


KINDS = {
    kind.__name__.lower(): kind
    for kind in (
        File, Directory, Deleted, Devices, Pipe, Fifo, Eventfd, Timerfd, Signalfd, Epoll, Inotify, Memfd, Pidfd,
        Sockets, Locks, Owner, Proc,
    )
}  # fmt: skip


def receive(control: socket.socket) -> None:
    """Take descriptors as a rebuilt process does, and make the calls that complete them."""
    packet, ancillary, _, _ = control.recvmsg(1 << 20, 8192)
    wanted, rows = pickle.loads(packet)
    numbers = struct.unpack(f"{len(ancillary[0][2]) // 4}i", ancillary[0][2])
    high = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, CONTROL + 1) for number in numbers]
    for number in numbers:
        os.close(number)
    for number, (target, cloexec) in zip(high, wanted, strict=True):
        os.dup2(number, target, not cloexec)
        os.close(number)
    make_calls(rows)


def make_calls(rows: list[tuple[int, tuple[int | bytes, ...], bool, str]]) -> None:
    for number, arguments, must, label in rows:
        values = [word if isinstance(word, bytes) else ctypes.c_long(word) for word in arguments]
        if LIBC.syscall(ctypes.c_long(number), *values) < 0 and must:
            raise OSError(ctypes.get_errno(), label)


def main() -> None:
    os.chdir(sys.argv[2])
    victim: Any = KINDS[sys.argv[1]]()
    if len(sys.argv) == 3:
        victim.setup()
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        # The numbers below are the test's to fill.
        control = socket.socket(fileno=place(int(sys.argv[3]), CONTROL))
        receive(control)
        make_calls(pickle.loads(control.recv(1 << 20)))
    victim.check()


main()

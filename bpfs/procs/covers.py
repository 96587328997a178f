# SPDX-License-Identifier: GPL-2.0-or-later
"""A small process that covers stat, status and statm of ghosts in /proc, so that every unmodified ps and top shows what
their processes do on the nodes.

The covers are files of a tmpfs, each bound over one file of /proc/PID, where the kernel takes it away with the process.
The first who opens any of them waits while the master asks the nodes, `PATIENCE` at most; then nobody waits, and
nothing is asked, until the figures are too old. So they cost nothing while nobody looks. That this is no part of the
master is for those who look: a master that hangs keeps them waiting no longer than a silent node does, and when it is
killed, the covers go at once.
"""

from __future__ import annotations

import enum
import os
import select
import signal
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgpack

from bpfs import fanotify, kernel
from bpfs.procs.pstext import FILES, guarded, merge_stat, merge_status
from engine.linux.procfs import own_file, read
from engine.zygote import become_helper

PATIENCE: Final = 0.3
"""Seconds that who looks waits for new figures at most."""

OLDEST: Final = 2.0
"""Seconds after which figures are asked for anew when somebody looks."""

_NEWEST: Final = 0.05  # seconds that figures are good for, however fast they came
_SHARE: Final = 20  # and as many times what it took to get them: who looks all the time costs a twentieth of a core
_PACKET: Final = 1 << 17


class Word(enum.IntEnum):
    """First item of every packet between the master and the process."""

    COVER = 1  # pid: a ghost has come
    SHOW = 2  # pid, stat, status, statm: what its node says
    BARE = 3  # pid: its ghost has gone, or is to be the process again; answered by BARE
    SHOWN = 4  # all that LOOK has asked for has come
    LOOK = 5  # to the master: somebody looks
    TROUBLE = 6  # to the master, text: it does not work on this machine


class Covers:
    """The master's handle of the process."""

    def __init__(self, sock: socket.socket, pid: int, folder: Path) -> None:
        self.socket = sock
        self.pid = pid
        self.folder = folder

    @classmethod
    def start(cls, folder: Path) -> Covers:
        """Forks it. `folder` is the mount point of its tmpfs, made when there is something to cover.

        Call it while the daemon is single-threaded. Raises OSError.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                ours.close()
                _Process(become_helper(theirs, "bpfs-psview"), folder).run()
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        return cls(ours, pid, folder)

    def close(self) -> None:
        """Takes all covers away; returns when that is done."""
        self.socket.close()
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def pack(word: Word, *items: object) -> bytes:
    """A packet."""
    return bytes(msgpack.packb((int(word), *items)))


def unpack(packet: bytes) -> tuple[Word, list[Any]]:
    """Its word and the rest."""
    word, *items = msgpack.unpackb(packet)
    return Word(word), items


def sweep(pids: Iterable[int], folder: Path) -> None:
    """Takes away what a process that was killed has left."""
    for pid in pids:
        for name in FILES:
            with suppress(OSError):
                kernel.umount(f"/proc/{pid}/{name}")
    unmount(folder)
    with suppress(OSError):
        folder.rmdir()


def unmount(folder: Path) -> None:
    """Takes away the tmpfs of a process that was killed; its covers go with their ghosts."""
    while os.path.ismount(folder):
        kernel.umount(str(folder))


class _State(enum.Enum):
    """What is known of who looks."""

    IDLE = "nothing is covered"
    ARMED = "who opens a cover has to wait for us"
    ASKED = "somebody waits, until the master says SHOWN or the time is up"
    FRESH = "nobody waits, until the figures are too old"


@dataclass(slots=True)
class _Ghost:
    """One ghost's covers."""

    folder: int  # its /proc/PID, O_PATH: the same process for ever, whoever has the pid next
    own: int  # its stat as the kernel fills it
    files: dict[str, int] = field(default_factory=dict)


class _Process:
    def __init__(self, control: socket.socket, folder: Path) -> None:
        self._control = control
        self._folder = folder
        self._mounted = False
        self._fan = -1
        self._state = _State.IDLE
        self._until = 0.0  # end of ASKED or FRESH, by time.monotonic()
        self._asked_at = 0.0
        self._waiting: list[int] = []
        self._ghosts: dict[int, _Ghost] = {}
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def run(self) -> None:
        """Serves until the master is gone."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            while True:
                ready = {fd for fd, _ in self._poll.poll(self._pause_ms())}
                if self._fan in ready:
                    self._looked()
                if self._control.fileno() in ready and not self._obey():
                    return
                if self._state in (_State.ASKED, _State.FRESH) and time.monotonic() >= self._until:
                    self._time_is_up()
        finally:
            self._end()

    def _pause_ms(self) -> int | None:
        if self._state in (_State.IDLE, _State.ARMED):
            return None
        return max(0, int((self._until - time.monotonic()) * 1000) + 1)

    # -- who looks -----------------------------------------------------------------------------------------------

    def _looked(self) -> None:
        files = fanotify.read(self._fan)
        if self._state is _State.ARMED and files:
            self._watch(False)
            self._state, self._asked_at = _State.ASKED, time.monotonic()
            self._until = self._asked_at + PATIENCE
            self._tell(Word.LOOK)
        self._waiting += files
        if self._state is not _State.ASKED:
            self._release()

    def _release(self) -> None:
        waiting, self._waiting = self._waiting, []
        for file in waiting:
            with suppress(OSError):  # who waited was killed
                fanotify.allow(self._fan, file)

    def _shown(self) -> None:
        took = time.monotonic() - self._asked_at
        if self._state is _State.ASKED:
            self._fresh(min(max(_NEWEST, _SHARE * took), OLDEST))

    def _fresh(self, seconds: float) -> None:
        self._state, self._until = _State.FRESH, time.monotonic() + seconds
        self._release()

    def _time_is_up(self) -> None:
        if self._state is _State.ASKED:
            self._fresh(OLDEST)
        elif self._ghosts:
            self._state = _State.ARMED
            self._watch(True)
        else:
            self._state = _State.IDLE

    def _watch(self, on: bool) -> None:
        fanotify.watch(self._fan, str(self._folder), on)

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        """Here files can be opened: otherwise we would wait for ourselves."""
        if self._state is not _State.ARMED:
            yield
            return
        self._watch(False)
        try:
            yield
        finally:
            self._watch(True)

    # -- the master's words --------------------------------------------------------------------------------------

    def _obey(self) -> bool:
        try:
            packet = self._control.recv(_PACKET)
        except OSError:
            return False
        if not packet:
            return False
        word, items = unpack(packet)
        match word:
            case Word.COVER:
                self._cover(*items)
            case Word.SHOW:
                self._show(*items)
            case Word.BARE:
                self._bare(*items)
            case Word.SHOWN:
                self._shown()
        return True

    def _tell(self, word: Word, *items: object) -> None:
        with suppress(OSError):  # a master that has gone or hangs asks nobody
            self._control.send(pack(word, *items), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def _prepare(self) -> None:
        if self._mounted:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        unmount(self._folder)
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        kernel.mount("bpfs", str(self._folder), "tmpfs", flags, "mode=0700,size=64m")
        self._mounted = True
        self._fan = fanotify.init()
        self._poll.register(self._fan, select.POLLIN)

    def _cover(self, pid: int) -> None:
        self._bare_now(pid)
        try:
            self._prepare()
        except OSError as error:
            self._tell(Word.TROUBLE, f"/proc cannot be covered here: {error}")
            return
        try:
            folder = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return  # it has ended already
        try:
            own = os.open(own_file(pid, "stat"), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(folder)
            return
        ghost = self._ghosts[pid] = _Ghost(folder, own)
        try:
            with self._unwatched():
                self._make(pid, ghost)
        except (OSError, ValueError) as error:
            self._bare_now(pid)
            if os.path.exists(own_file(pid, "stat")):
                self._tell(Word.TROUBLE, f"/proc/{pid} cannot be covered: {error}")
            return
        if self._state is _State.IDLE:
            self._state = _State.ARMED
            self._watch(True)

    def _make(self, pid: int, ghost: _Ghost) -> None:
        # Until somebody looks it is the ghost's own text.
        for name in FILES:
            text = read(own_file(pid, name))
            path = self._path(pid, name)
            ghost.files[name] = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o444)
            _write(ghost.files[name], guarded(text) if name == "stat" else text)
            kernel.mount(path, f"/proc/self/fd/{ghost.folder}/{name}", "", kernel.MS_BIND)

    def _show(self, pid: int, *texts: bytes) -> None:
        ghost = self._ghosts.get(pid)
        if ghost is None:
            return
        try:
            own = os.pread(ghost.own, 4096, 0)
            stat, status, statm = texts
            merged = merge_stat(stat, own), merge_status(status, own), statm
        except (OSError, ValueError, IndexError):
            return  # it has ended, on one side or the other: BARE comes
        for name, text in zip(FILES, merged, strict=True):
            _write(ghost.files[name], text)

    def _bare(self, pid: int) -> None:
        self._bare_now(pid)
        self._tell(Word.BARE, pid)

    def _bare_now(self, pid: int) -> None:
        ghost = self._ghosts.pop(pid, None)
        if ghost is None:
            return
        for name, fd in ghost.files.items():
            with suppress(OSError):  # with the process it has gone by itself
                kernel.umount(f"/proc/self/fd/{ghost.folder}/{name}")
            os.close(fd)
            os.unlink(self._path(pid, name))
        os.close(ghost.own)
        os.close(ghost.folder)

    def _path(self, pid: int, name: str) -> str:
        return f"{self._folder}/{pid}.{name}"

    def _end(self) -> None:
        if self._fan >= 0:
            os.close(self._fan)  # whoever waits goes on
        for pid in list(self._ghosts):
            self._bare_now(pid)
        if self._mounted:
            unmount(self._folder)
            with suppress(OSError):  # gone with the run directory, when that was faster
                self._folder.rmdir()


def _write(fd: int, text: bytes) -> None:
    # In this order a reader in between finds one whole text, with the end of the one before behind it at worst.
    os.pwrite(fd, text, 0)
    os.ftruncate(fd, len(text))

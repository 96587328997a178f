"""A node whose jobs have the master's files for a root: the view's mount and daemon, and the root made of them.

    CACHE/objects    contents by digest (bpfs.view.store); stays when the slave ends
    CACHE/journal    of this life's daemon
    CACHE/view       the view: all exports at their places
    CACHE/root       the jobs' root: a tmpfs that has each top directory of the view bound into it, with the node's own
                     /dev and /sys, the cluster's tree, and empty places to write: /tmp, /var/tmp, /run, /root, /home

This process holds the descriptor of /dev/fuse, so the view outlives its daemon, which is started again when it dies;
the supervisor has it as well, for the next life.
Nothing in here opens a file of the view but in a thread: whoever waits for the daemon cannot start it.

A node image turns it on with `bpslave --root empty --cache DIR`; it needs /dev/fuse, and of the image's own files only
what bpslave itself is made of. DIR may be on a tmpfs: pages are in memory once where the kernel can pass files through
(Linux 6.9), twice at most elsewhere.
"""

from __future__ import annotations

import itertools
import os
import socket
import stat
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EAGAIN, EIO, EOPNOTSUPP, EPIPE
from pathlib import Path

import msgpack
import trio

from bpfs import kernel, log
from bpfs.errors import BpfsError
from bpfs.slave.keeper import Keeper
from bpfs.slave.line import Line
from bpfs.slave.options import SlaveOptions
from bpfs.view import protocol
from bpfs.view.fuse import mount_data
from bpfs.view.start import start
from bpfs.wire.messages import CacheCall, CacheReply, ViewOpen, ViewOpened
from bpfs.wire.streams import open_stream
from engine import digests

_log = log.get("view")

TYPE = digests.VIEW
TIMEOUT = 10.0
"""Seconds after which a file of a silent master fails with EIO."""

PAUSE = 0.1
"""Seconds before a daemon that has died is started again."""

_PLACES = (("tmp", 0o1777), ("var", 0o755), ("var/tmp", 0o1777), ("run", 0o755), ("root", 0o700), ("home", 0o755))


class NodeView:
    """The view of a node.

    Attributes:
        root: the directory that is to be the jobs' root.
    """

    def __init__(self, options: SlaveOptions, link: Line, keeper: Keeper) -> None:
        self._options = options
        self._keeper = keeper
        self._link = link
        self._cache = options.cache
        self._view = self._cache / "view"
        self.root = self._cache / "root"
        self._fuse = -1
        self._limit = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._streams, self._streams_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control, self._control_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiter] = {}
        self._ended = False
        for sock in (self._streams, self._control):
            sock.setblocking(False)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be the node's view until cancelled; started once the root is there.

        Raises:
            BpfsError: it cannot be made.
        """
        try:
            tops = await self._ask_tops() if not self._take_up() else None
            if tops is not None:
                self._mount()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._bring_streams, name="view streams")
                nursery.start_soon(self._hear_answers, name="view answers")
                await nursery.start(self._keep_daemon)
                if tops is not None:
                    await trio.to_thread.run_sync(self._make_root, tops)
                    self._keeper.keep(("view", 0), self._limit, [self._fuse])
                else:
                    await trio.to_thread.run_sync(self._bind_tree)
                task_status.started()
        except OSError as error:
            if isinstance(error, BpfsError):
                raise
            where = f" ({error.filename})" if error.filename else ""
            raise BpfsError(EIO, f"no view of the master's files: {error.strerror or error}{where}") from None
        finally:
            self.close()

    # -- streams to the master ---------------------------------------------------------------------

    async def _stream(self) -> socket.socket:
        opened = await self._link.request(ViewOpen(), TIMEOUT)
        assert isinstance(opened, ViewOpened)
        self._limit = opened.cache_limit
        return await open_stream(self._options.host, self._options.port, opened.token)

    async def _ask_tops(self) -> list[tuple[str, str]]:
        sock = await self._stream()

        def ask() -> list[tuple[str, str]]:
            with sock:
                sock.settimeout(TIMEOUT)
                protocol.send(sock, ["tops", "/"])
                errno, *answer = protocol.receive(sock)
                if errno:
                    raise OSError(errno, os.strerror(errno), "/")
                return [(str(name), str(target)) for name, target in answer[0]]

        return await trio.to_thread.run_sync(ask)

    async def _bring_streams(self) -> None:
        """Answer the daemon's wishes for streams, in order."""
        while True:
            await trio.lowlevel.wait_readable(self._streams)
            if not self._streams.recv(64):
                return
            try:
                with await self._stream() as sock:
                    socket.send_fds(self._streams, [b"stream"], [sock.fileno()])
            except (OSError, trio.TooSlowError) as error:
                _log.warning("no stream to the master's files: %s", error)
                with suppress(OSError):
                    self._streams.send(b"none")

    # -- mount and daemon --------------------------------------------------------------------------

    def _take_up(self) -> bool:
        """Whether the life before has left its mount; then it is ours."""
        for _, kept in self._keeper.of("view"):
            self._fuse, self._limit = kept.fds[0], int(kept.value)
        return self._fuse >= 0

    def _mount(self) -> None:
        self._unmount()
        for path in (self._cache, self._view, self.root):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The objects' directory outlives us; the kernel's inodes do not.
        (self._cache / "journal").unlink(missing_ok=True)
        self._fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        kernel.mount("bpview", str(self._view), TYPE, kernel.MS_RDONLY | kernel.MS_NODEV, mount_data(self._fuse))

    async def _keep_daemon(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        while not self._is_ended():
            fds = [self._fuse, self._streams_theirs.fileno(), self._control_theirs.fileno()]
            process = self._process = start("daemon", fds, str(self._cache), str(self._limit), str(TIMEOUT))
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            handle = os.pidfd_open(process.pid)
            try:
                await trio.lowlevel.wait_readable(handle)
            finally:
                os.close(handle)
            how = process.wait()
            for number in list(self._waiting):  # it took the question with it
                self._answer(number, EAGAIN, "")
            if not self._is_ended():
                _log.error("the view's daemon ended (%s); starting it again", how)
                await trio.sleep(PAUSE)

    def _is_ended(self) -> bool:
        return self._ended  # a call, for the type checker: others set it meanwhile

    def abort(self) -> None:
        """Have everything that waits for a file fail, now and from now on: the jobs are to die."""
        self._ended = True
        with suppress(OSError):
            kernel.umount(str(self._view), kernel.MNT_FORCE)

    def close(self) -> None:
        """Undo everything."""
        self._ended = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for sock in (self._streams, self._streams_theirs, self._control, self._control_theirs):
            sock.close()
        if self._fuse >= 0:
            os.close(self._fuse)  # with the daemon's, the last: the kernel ends the connection
            self._fuse = -1
        self._unmount()

    def _unmount(self) -> None:
        for path in (self.root, self._view):
            while _is_mount(path):
                kernel.umount(str(path))

    # -- the jobs' root ----------------------------------------------------------------------------

    def _make_root(self, tops: list[tuple[str, str]]) -> None:
        root = self.root
        kernel.mount("bpfs-root", str(root), "tmpfs", kernel.MS_NODEV, "mode=755")
        # A group of its own, so that the jobs' copy gets what the next life mounts.
        kernel.mount("none", str(root), "", kernel.MS_PRIVATE)
        kernel.mount("none", str(root), "", kernel.MS_SHARED)
        (root / "proc").mkdir()
        for name in ("dev", "sys"):
            (root / name).mkdir()
            kernel.mount("/" + name, str(root / name), "", kernel.MS_BIND | kernel.MS_REC)
        for place, mode in _PLACES:
            (root / place).mkdir(mode=mode)
            (root / place).chmod(mode)
        for path, target in tops:
            self._place(path.lstrip("/"), target)
        self._bind_tree()

    def _bind_tree(self) -> None:
        mount = self._options.mount
        if mount is None:
            return
        point = self.root / mount.lstrip("/")
        while _is_mount(point):
            kernel.umount(str(point))
        with suppress(FileExistsError):
            point.mkdir(parents=True)
        kernel.mount(mount, str(point), "", kernel.MS_BIND)

    def _place(self, name: str, target: str) -> None:
        point, source = self.root / name, self._view / name
        point.parent.mkdir(parents=True, exist_ok=True)
        if target:
            point.symlink_to(target)
            return
        if stat.S_ISDIR(source.stat().st_mode):
            point.mkdir(exist_ok=True)
        else:
            point.touch()
        kernel.mount(str(source), str(point), "", kernel.MS_BIND)

    # -- what the master asks ----------------------------------------------------------------------

    async def call(self, message: CacheCall) -> CacheReply:
        """Handler: pass a verb to the daemon."""
        number = next(self._numbers)
        waiter = self._waiting[number] = _Waiter()
        try:
            packet = [number, message.verb, message.argument]
            self._control.send(msgpack.packb(packet, unicode_errors="surrogateescape"))
            await waiter.event.wait()
        except OSError as error:
            raise BpfsError(error.errno or EPIPE, "the view's daemon does not answer") from None
        finally:
            del self._waiting[number]
        if waiter.errno:
            raise BpfsError(waiter.errno, f"{message.argument or message.verb}: {os.strerror(waiter.errno)}")
        return CacheReply(waiter.text)

    async def _hear_answers(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._control)
            number, errno, text = msgpack.unpackb(self._control.recv(65536), unicode_errors="surrogateescape")
            self._answer(number, errno, text)

    def _answer(self, number: int, errno: int, text: str) -> None:
        waiter = self._waiting.get(number)
        if waiter is not None:  # else whoever asked has gone
            waiter.errno, waiter.text = errno, text
            waiter.event.set()


@dataclass(slots=True)
class _Waiter:
    event: trio.Event = field(default_factory=trio.Event)
    errno: int = 0
    text: str = ""


def no_cache(_message: CacheCall) -> CacheReply:
    """Handler of a node whose jobs have the node's own files."""
    raise BpfsError(EOPNOTSUPP, "this node has its own files, and no cache of the master's")


def _is_mount(path: Path) -> bool:
    # Not by stat: what is mounted there may be dead, or wait for us.
    marks = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split(" ")[4] == str(path) for line in marks)

"""The node's ends of its jobs' terminals, pipes and sockets, and the iorelay that pumps them.

For each channel of a job a pair is made: the job's end, for the engine to put into the process, and the relay's end. A
stream, a TCP connection between iorelay (bpfs/procs/csrc/iorelay.c) and the job's ghost, joins them to the originals on
the master.
"""

from __future__ import annotations

import array
import fcntl
import hmac
import os
import secrets
import signal
import socket
import termios
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from errno import EIO, ETIMEDOUT
from pathlib import Path
from typing import Any, Final

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.slave.keeper import Alone, Keeper
from bpfs.wire.mux import (
    MAX_PACKET,
    ChanKind,
    Channel,
    Ctl,
    Packet,
    channels_of,
    ghost_table,
    relay_table,
    tune_stream,
    unpack,
)

EXECUTABLE: Final = Path(__file__).resolve().parent.parent / "bin" / "iorelay"
TOKEN_BYTES: Final = 32
TOKEN_SECONDS: Final = 30.0  # a token that nobody used by then is worth nothing
DETACH_SECONDS: Final = 10.0  # iorelay answers at once, unless it is about to die
PIPE_BYTES: Final = 256 << 10  # more output at a turn of iorelay; input pipes keep the kernel's 64 kB
_TIOCGPTPEER: Final = 0x5441  # <asm-generic/ioctls.h>, Linux 4.13: opens the slave without a path
_ACCEPTED: Final = b"\x01"  # as bpfs.procs.ghost expects

_log = log.get("relay")


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The ghost took its leave, or `detach` was called: all of the stream is closed."""

    stream: int


@dataclass(frozen=True, slots=True)
class StreamBroke:
    """The connection broke; the job's ends stay open, and block, until `detach`."""

    stream: int


@dataclass(frozen=True, slots=True)
class Front:
    """This process group (0: the session leader's) is to be in the foreground of the stream's terminal; iorelay waits
    for `Relay.fronted`."""

    stream: int
    group: int
    order: int


@dataclass(frozen=True, slots=True)
class Listed:
    """Answers `list_streams`: number of each stream, and whether it is broken."""

    streams: dict[int, bool]


Event = StreamEnded | StreamBroke | Front | Listed


@dataclass(slots=True)
class Ends:
    """The pairs made for one job.

    Attributes:
        channels: the channels, numbered as the ghost does.
        job: the job's end of each external, by its key; for the engine.
        relay: iorelay's descriptors of each channel, in its order.
        master: a duplicate of the terminal's master side, -1 where there is none.
        terminal: path of the job's terminal, None where it has none. The session leader on the node makes it its
            controlling terminal (TIOCSCTTY), and closes it again.
    """

    channels: list[Channel] = field(default_factory=list)
    job: dict[int, int] = field(default_factory=dict)
    relay: list[list[int]] = field(default_factory=list)
    master: int = -1
    terminal: str | None = None

    def close_job(self) -> None:
        """Close our copies of the job's ends: needed once the engine has its own, or no end of file would ever come."""
        for fd in self.job.values():
            os.close(fd)
        self.job.clear()

    def close_relay(self) -> None:
        """Close our copies of the relay's ends."""
        for fds in self.relay:
            for fd in fds:
                os.close(fd)
        self.relay.clear()

    def close(self) -> None:
        """Close all."""
        self.close_job()
        self.close_relay()
        if self.master >= 0:
            os.close(self.master)
            self.master = -1

    @property
    def ghost_table(self) -> bytes:
        """The channel table for the ghost's STREAM packet."""
        return ghost_table(self.channels)


def make_ends(externals: Iterable[Mapping[str, Any]], uid: int = -1, gid: int = -1) -> Ends:
    """Makes the pairs for a job's externals (engine/descriptors/external.py), owned by its user.

    Raises:
        BpfsError: E2BIG.
        OSError: out of descriptors or terminals.
    """
    return make_channel_ends(channels_of(externals), uid, gid)


def make_channel_ends(
    channels: list[Channel], uid: int = -1, gid: int = -1, shared: int = -1, front: bool = False
) -> Ends:
    """The same for channels that have their numbers already.

    Args:
        channels: what there is.
        uid, gid: whose the ends are.
        shared: master side of the terminal, where other jobs of the session have brought it here; -1: it is new.
        front: the job is in the terminal's foreground at home: what it has set there counts here.

    Raises:
        OSError: out of descriptors or terminals.
    """
    ends = Ends(channels)
    try:
        for channel in ends.channels:
            if channel.kind is ChanKind.TTY:
                _make_terminal(ends, channel, shared, front)
            elif channel.two_way:
                _make_pair(ends, channel)
            else:
                _make_pipe(ends, channel)
            _share_end(ends, channel)
        if uid or shared < 0:  # a terminal stays its user's when root's job comes to it
            for fd in ends.job.values():
                os.fchown(fd, uid, gid)  # so that /dev/stdin and its like open for an ordinary user
    except BaseException:
        ends.close()
        raise
    return ends


def _make_pipe(ends: Ends, channel: Channel) -> None:
    read, write = os.pipe()
    theirs, ours = (read, write) if channel.access == os.O_RDONLY else (write, read)
    ends.relay.append([ours])
    _add_job_end(ends, channel.externals[0], theirs)
    if channel.access == os.O_WRONLY:
        try:
            fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            pass  # an unprivileged user's limit; slower, no more


def _make_pair(ends: Ends, channel: Channel) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    _add_job_end(ends, channel.externals[0], theirs.detach())
    ends.relay.append([ours.detach(), os.dup(ends.job[channel.externals[0]["key"]])])


def _share_end(ends: Ends, channel: Channel) -> None:
    # What a job opened anew by way of /dev/stdout is one more external on the same channel.
    for external in channel.externals[1:]:
        if external["key"] not in ends.job:
            ends.job[external["key"]] = os.dup(ends.job[channel.externals[0]["key"]])


def _add_job_end(ends: Ends, external: Mapping[str, Any], fd: int) -> None:
    ends.job[external["key"]] = fd
    if int(external.get("flags", 0)) & os.O_NONBLOCK:
        os.set_blocking(fd, False)


def _make_terminal(ends: Ends, channel: Channel, shared: int, front: bool) -> None:
    first = channel.externals[0]
    if shared < 0:
        master, slave = os.openpty()
        os.close(slave)
    else:
        master = os.dup(shared)
    fds = [master]
    ends.relay.append(fds)
    if shared < 0 or front:
        _set_up(master, first)
    # Its own open file: nonblocking, while the job's block.
    fds.append(fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    ends.terminal = os.ttyname(fds[1])
    ends.master = os.dup(master)
    for external in channel.externals:
        flags = int(external["access"]) | (int(external.get("flags", 0)) & (os.O_NONBLOCK | os.O_APPEND))
        # Not O_CLOEXEC: TIOCGPTPEER keeps it in the open file's own flags, and /proc shows it of each duplicate then.
        fd = fcntl.ioctl(master, _TIOCGPTPEER, flags | os.O_NOCTTY)
        os.set_inheritable(fd, False)
        ends.job[external["key"]] = fd
    fds.append(os.dup(ends.job[first["key"]]))


def _set_up(master: int, first: Mapping[str, Any]) -> None:
    if first.get("termios"):
        fcntl.ioctl(master, 0x5402, bytes(first["termios"]))  # TCSETS
    if first.get("winsize"):
        fcntl.ioctl(master, termios.TIOCSWINSZ, bytes(first["winsize"]))


@dataclass(slots=True)
class _Expected:
    stream: int
    token: bytes
    ends: Ends
    attached: trio.Event = field(default_factory=trio.Event)
    failed: bool = False


class Relay:
    """One a node; see `open_relay`."""

    def __init__(self, pid: int, control: socket.socket, listener: trio.SocketListener | None) -> None:
        self._pid = pid
        self._socket = trio.socket.from_stdlib_socket(control)
        self._listener = listener
        self._expected: dict[int, _Expected] = {}
        self._send_event, self.events = trio.open_memory_channel[Event](1024)
        self._detached: dict[int, trio.Event] = {}

    @property
    def pid(self) -> int:
        """Of iorelay."""
        return self._pid

    @property
    def port(self) -> int:
        """The TCP port that ghosts' streams come to; 0 without a listener."""
        return int(self._listener.socket.getsockname()[1]) if self._listener else 0

    async def attach(
        self, stream: int, connection: socket.socket, ends: Ends, session: bool = False, front: int = 0
    ) -> None:
        """Joins the pairs to a connection whose other end the job's ghost has or will have.

        Our copies of connection and relay ends are closed; the job's ends stay with `ends`.

        Args:
            stream, connection, ends: what is joined.
            session: the terminal is its session's controlling one.
            front: the job's group, where that is in the foreground at home.

        Raises:
            BpfsError: EIO where iorelay is dead.
        """
        fds = [connection.fileno(), *(fd for group in ends.relay for fd in group)]
        table = relay_table(zip(ends.channels, ends.relay, strict=True))
        try:
            tune_stream(connection)
            await self._send(Packet(Ctl.ATTACH, stream, int(session), front, text=table), fds)
        finally:
            connection.close()
            ends.close_relay()

    async def list_streams(self) -> None:
        """Have it tell which streams there are: `Listed` comes after all that was told before."""
        await self._send(Packet(Ctl.LIST))

    async def fronted(self, order: int) -> None:
        """A `Front` has been carried out, or cannot be."""
        await self._send(Packet(Ctl.FRONTED, order))

    async def detach(self, stream: int) -> None:
        """Closes everything of a stream: a job that still had its ends reads end of file and writes to a closed pipe.

        Unknown streams are no error. Returns when it is done.
        """
        done = self._detached.setdefault(stream, trio.Event())
        await self._send(Packet(Ctl.DETACH, stream))
        with trio.move_on_after(DETACH_SECONDS):
            await done.wait()
        self._detached.pop(stream, None)

    # -- the listener ----------------------------------------------------------------------------

    def expect(self, stream: int, ends: Ends) -> bytes:
        """Lets the first connection that shows the returned one-time token become the stream of these pairs."""
        token = secrets.token_bytes(TOKEN_BYTES)
        self._expected[stream] = _Expected(stream, token, ends)
        return token

    async def wait_attached(self, stream: int, timeout: float = TOKEN_SECONDS) -> None:
        """Waits for the connection that `expect` announced; afterwards it is no longer expected.

        Raises:
            BpfsError: ETIMEDOUT; the relay's ends are closed then.
        """
        expected = self._expected[stream]
        with trio.move_on_after(timeout):
            await expected.attached.wait()
        self._expected.pop(stream, None)
        if not expected.attached.is_set() or expected.failed:
            expected.ends.close_relay()
            raise BpfsError(ETIMEDOUT, f"no ghost came for stream {stream} within {timeout:g} s")

    async def _serve(self, connection: trio.SocketStream) -> None:
        shown = b""
        with trio.move_on_after(TOKEN_SECONDS):
            try:
                while len(shown) < TOKEN_BYTES:
                    part = await connection.receive_some(TOKEN_BYTES - len(shown))
                    if not part:
                        break
                    shown += part
            except trio.BrokenResourceError:
                pass
        found = [e for e in self._expected.values() if hmac.compare_digest(e.token, shown) and not e.attached.is_set()]
        if not found:
            _log.warning("dropped a connection that showed no valid token")
            await trio.aclose_forcefully(connection)
            return
        expected = found[0]
        plain = socket.socket(fileno=os.dup(connection.socket.fileno()))
        try:
            await connection.send_all(_ACCEPTED)
            await self.attach(expected.stream, plain, expected.ends)
        except (trio.BrokenResourceError, BpfsError) as error:
            expected.failed = True
            plain.close()
            _log.warning("stream %d: %s", expected.stream, error)
        finally:
            expected.attached.set()
            await trio.aclose_forcefully(connection)

    # -- iorelay ---------------------------------------------------------------------------------

    async def _send(self, packet: Packet, fds: Iterable[int] = ()) -> None:
        numbers = array.array("i", fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else []
        try:
            await self._socket.sendmsg([packet.pack()], ancillary)
        except BpfsError:
            raise
        except OSError as error:
            raise BpfsError(EIO, f"iorelay is dead: {error.strerror}") from None

    async def _read(self) -> None:
        listed: dict[int, bool] = {}
        while True:
            try:
                data = await self._socket.recv(MAX_PACKET)
            except OSError:
                data = b""
            if not data:
                raise BpfsError(EIO, "iorelay died")
            packet = unpack(data)
            if packet.type == Ctl.ENDED:
                if packet.a in self._detached:
                    self._detached[packet.a].set()
                await self._send_event.send(StreamEnded(packet.a))
            elif packet.type == Ctl.LOST:
                await self._send_event.send(StreamBroke(packet.a))
            elif packet.type == Ctl.FRONT:
                await self._send_event.send(Front(packet.a, packet.b, packet.c))
            elif packet.type == Ctl.HAS:
                listed[packet.a] = bool(packet.b)
            elif packet.type == Ctl.LISTED:
                await self._send_event.send(Listed(listed))
                listed = {}


@asynccontextmanager
async def open_relay(address: str | None = None, keeper: Keeper | None = None) -> AsyncIterator[Relay]:
    """Starts iorelay, or takes up that of the life before; it ends with the context, and with who has started it.

    Args:
        address: listen for ghosts there (`Relay.expect`); None: connections are made by others (`Relay.attach`).
        keeper: has it started, and kept; None: it ends with this process.

    Raises:
        BpfsError: EIO out of the context when iorelay dies, or has.
    """
    pid, ours = _adopt(keeper) or _start(keeper)
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        ours.close()
        raise BpfsError(EIO, "iorelay has ended") from None
    try:
        listener = (await trio.open_tcp_listeners(0, host=address))[0] if address is not None else None
        relay = Relay(pid, ours, listener)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay._read)
            if listener is not None:
                nursery.start_soon(trio.serve_listeners, relay._serve, [listener])
            yield relay
            nursery.cancel_scope.cancel()
    finally:
        ours.close()
        with trio.CancelScope(shield=True):
            if not await _ended(process, 2.0):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                await _ended(process, 10.0)
        os.close(process)


def _adopt(keeper: Keeper | None) -> tuple[int, socket.socket] | None:
    for _, kept in keeper.of("relay") if keeper is not None else ():
        return int(kept.value), socket.socket(fileno=kept.fds[0])
    return None


def _start(keeper: Keeper | None) -> tuple[int, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        pid = (keeper or Alone()).spawn([str(EXECUTABLE), "@0"], {}, [theirs.fileno()])
    if keeper is not None:
        keeper.keep(("relay", 0), pid, [ours.fileno()])
    return pid, ours


async def _ended(process: int, seconds: float) -> bool:
    with trio.move_on_after(seconds):
        await trio.lowlevel.wait_readable(process)
        return True
    return False

"""The master's handle of one ghost: control packets out, events in.

The ghost (csrc/ghost.c) is a program in the place of a process that runs on a node. The handle neither starts nor
reaps it; the engine turns the process into it, with the far end of `Ghost.pair()` as its control socket.
"""

from __future__ import annotations

import array
import math
import os
import signal
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from errno import EINVAL, EIO, ESRCH, ETIMEDOUT
from pathlib import Path
from types import TracebackType
from typing import Final

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.wire.mux import BIRTH, MAX_PACKET, MAX_TEXT, Ctl, Packet, tune_stream, unpack
from engine.linux import process_vm
from engine.linux.procfs import own_file

EXECUTABLE: Final = Path(__file__).resolve().parent.parent / "bin" / "ghost"
HEIR: Final = b"BPFS_HEIR="
ROOM_FOR_HEIR: Final = HEIR + b"0000000000"  # in a ghost's environment
ACCEPTED: Final = b"\x01"  # a node's answer to a valid token
BIRTH_SECONDS: Final = 2.0  # for BORN; nothing else waits for it but other births
STRIKE_SECONDS: Final = 2.0  # for STRUCK: the process that asked stands still
STRUCK_AT_ONCE: Final = 512
ANSWER_SECONDS: Final = 10.0  # for HELD and PUMPED; a ghost that runs answers in milliseconds

STATS_KEPT: Final = 1024
"""Stat files of ghosts that stay open; that of a ghost beyond is opened again at each look, for some 5 us more: where
10,000 ghosts are, and no more than 20,000 descriptors may be had, their control sockets need these."""

_log = log.get("ghost")


@dataclass(frozen=True, slots=True)
class Signal:
    """The ghost got a signal that the real process shall have. code, pid, uid, value as in siginfo_t (sigaction(2))."""

    signo: int
    code: int
    pid: int
    uid: int
    value: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """The ghost stops itself now, as `Ghost.stop` asked."""

    signo: int


@dataclass(frozen=True, slots=True)
class Continued:
    """The ghost runs again after `Stopped`. A SIGCONT of the user's comes as a Signal beside this."""


@dataclass(frozen=True, slots=True)
class Reborn:
    """The ghost program was started anew in the same process, after a return home that failed. It has no stream."""


@dataclass(frozen=True, slots=True)
class StreamLost:
    """The stream to the node broke (errno, or 0 at its plain end); the ghost waits for word."""

    errno: int


@dataclass(frozen=True, slots=True)
class Adopted:
    """The ghost of an earlier master has taken this one for its own.

    stream: the number of the one it has, or 0; held: it has been told to hold it, and not to go on.
    """

    stream: int
    held: bool


@dataclass(frozen=True, slots=True)
class Gone:
    """The control socket ended: the ghost is dead, has ended as told, or has become the process again."""


@dataclass(frozen=True, slots=True)
class Child:
    """A child that stayed at home ended, stopped or went on; code and status as waitid(2) gives them."""

    pid: int
    code: int
    status: int


@dataclass(frozen=True, slots=True)
class ChildStopped:
    """The ghost of a child, and maybe of more of them, is stopped; whoever did it."""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Something that is no signal has stopped the ghost for a moment, as a debugger does that attaches."""


Event = Adopted | Child | ChildStopped | Interrupted | Signal | Stopped | Continued | Reborn | StreamLost | Gone


@dataclass(frozen=True, slots=True)
class Held:
    """What a ghost holds back after `Ghost.hold`.

    pumps: channels that need `Ghost.pump` before the process comes home; kept: bytes of input that nobody has read yet.
    """

    pumps: int
    kept: int


@dataclass(frozen=True, slots=True)
class Birth:
    """What a child's ghost is to be.

    Attributes:
        orphan: a child of init, not of the ghost that makes it.
        terminal: the real process has a terminal on its node: signals of keys typed reach it there.
    """

    pid: int
    pgid: int
    sid: int
    uid: int
    gid: int
    orphan: bool
    terminal: bool
    comm: bytes
    cmdline: bytes


class Ghost:
    """One ghost. `run` must be running for events and answers to come."""

    _stats = 0  # stat files that are open, of all

    def __init__(self, pid: int, control: socket.socket) -> None:
        """`pid` is the ghost's; `control` our end of `pair()`, ours from now on."""
        self.pid = pid
        self._socket = trio.socket.from_stdlib_socket(control)
        self._send_event, self.events = trio.open_memory_channel[Event](1024)
        self._ready = trio.Event()
        self._gone = trio.Event()
        self._answers: dict[Ctl, Packet | None] = {}
        self._answered = trio.Condition()
        self._strikes = trio.Lock()
        self._births = trio.Lock()
        self._streams = 0  # given to this run of the program
        self._seen = 0  # events for which `seen` was called
        self._pidfd = -1
        self._stat = -1
        self.conts = 0
        """SIGCONTs of the user's that have been dealt with, of those that this run of the program has told."""
        self.continued = -math.inf
        """When it told of the user's last SIGCONT, by trio's clock."""

    @staticmethod
    def pair() -> tuple[socket.socket, socket.socket]:
        """A control socket: our end and the ghost's. Must be made by the master's daemon itself: the ghost knows its
        continue signals by the pid that made the socket."""
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    @classmethod
    async def adopt(cls, pid: int) -> Ghost:
        """The handle of a ghost whose master has died: takes our end of a control socket out of it.

        A stopped ghost hears of it when it goes on.

        Raises:
            BpfsError: ESRCH, it is gone; EINVAL, it is no ghost, or none that can be adopted.
        """
        ghost = cls(pid, take_heir(pid))
        ghost._ready.set()
        try:
            await ghost._send(Packet(Ctl.ADOPT))
        except BpfsError:
            ghost.close()
            raise
        return ghost

    # -- life ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Reads packets until the ghost is gone."""
        try:
            while data := await self._receive():
                await self._take(unpack(data))
        finally:
            self._socket.close()
            self._gone.set()
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1
            self._close_stat()
        async with self._answered:
            self._answered.notify_all()
        await self._send_event.send(Gone())
        self._send_event.close()

    async def _receive(self) -> bytes:
        try:
            return await self._socket.recv(MAX_PACKET)
        except (OSError, trio.ClosedResourceError):
            return b""

    async def _take(self, packet: Packet) -> None:
        a = packet.a
        match packet.type:
            case Ctl.READY:
                if self._ready.is_set():
                    self._streams = 0
                    await self._send_event.send(Reborn())
                self._ready.set()
            case Ctl.SIGNAL:
                if a == signal.SIGCONT:
                    self.continued = trio.current_time()
                await self._send_event.send(Signal(a, packet.b, packet.c, packet.d, packet.value))
            case Ctl.STOPPED:
                await self._send_event.send(Stopped(a))
            case Ctl.CONTINUED:
                await self._send_event.send(Continued())
            case Ctl.STREAM_LOST:
                # Not where the next stream is on its way to it: the old one may end before that comes.
                if packet.b == self._streams:
                    await self._answer(Ctl.HELD, None)
                    await self._send_event.send(StreamLost(a))
            case Ctl.INTERRUPTED:
                await self._send_event.send(Interrupted())
            case Ctl.CHILD_STOPPED:
                await self._send_event.send(ChildStopped())
            case Ctl.ADOPTED:
                await self._send_event.send(Adopted(a, bool(packet.b)))
            case Ctl.CHILD:
                await self._send_event.send(Child(a, packet.b, packet.c))
            case Ctl.HELD | Ctl.PUMPED | Ctl.BORN | Ctl.STRUCK:
                await self._answer(Ctl(packet.type), packet)
            case _:
                _log.warning("ghost %d sent a packet of type %d", self.pid, packet.type)

    async def wait_ready(self, timeout: float = ANSWER_SECONDS) -> None:
        """Waits until the ghost program runs.

        Raises:
            BpfsError: ETIMEDOUT.
        """
        with trio.move_on_after(timeout):
            await self._ready.wait()
        if not self._ready.is_set():
            raise BpfsError(ETIMEDOUT, f"the ghost of process {self.pid} did not start within {timeout:g} s")

    async def wait_gone(self) -> None:
        """Waits until the control socket has ended."""
        await self._gone.wait()

    @property
    def gone(self) -> bool:
        """Whether the control socket has ended."""
        return self._gone.is_set()

    def close(self) -> None:
        """Lets go of the ghost: it relays on for its lease, then dies."""
        self._socket.close()

    def __enter__(self) -> Ghost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def state(self) -> str:
        """The state letter of proc(5): T when it was stopped from outside, which no packet can tell; X when it is gone.

        Mostly one pread of a descriptor that stays open, some 6 us: cheap enough to poll.
        """
        if self.gone:
            return "X"
        try:
            if self._stat < 0:
                self._stat = os.open(own_file(self.pid, "stat"), os.O_RDONLY | os.O_CLOEXEC)
                Ghost._stats += 1
            text = os.pread(self._stat, 512, 0)
        except OSError:
            return "X"
        finally:
            if Ghost._stats > STATS_KEPT:
                self._close_stat()
        return text[text.rindex(b")") + 2 :][:1].decode() or "X"

    def _close_stat(self) -> None:
        if self._stat >= 0:
            os.close(self._stat)
            Ghost._stats -= 1
            self._stat = -1

    # -- commands --------------------------------------------------------------------------------

    async def name(self, comm: bytes) -> None:
        """Sets the name that ps shows (at most 15 bytes count)."""
        await self._send(Packet(Ctl.NAME, text=comm))

    async def arguments(self, cmdline: bytes) -> None:
        """Sets the command line that ps shows, as in /proc/PID/cmdline."""
        await self._send(Packet(Ctl.ARGUMENTS, text=cmdline[:MAX_TEXT]))

    async def ids(self, sid: int, pgid: int, uid: int, gid: int) -> None:
        """Has it take the session, process group and user of its process, as far as the kernel lets it."""
        await self._send(Packet(Ctl.IDS, sid, pgid, uid, gid))

    async def bear(self, birth: Birth, child: socket.socket) -> bool:
        """Has it make the ghost of a child; `child` is that one's end of its control socket.

        Returns:
            Whether somebody has continued this ghost, maybe its whole group, of which no `Signal` has told yet.

        Raises:
            BpfsError: the ghost's errno; ETIMEDOUT.
        """
        text = BIRTH.pack(birth.uid, birth.gid, birth.orphan, birth.terminal, birth.comm[:15])
        text += birth.cmdline[: MAX_TEXT - len(text)]
        packet = Packet(Ctl.FORK, birth.pid, birth.pgid, birth.sid, text=text)
        async with self._births:
            answer = await self._ask(packet, Ctl.BORN, BIRTH_SECONDS, child.fileno())
        if answer.b:
            raise BpfsError(answer.b, f"no ghost can be made for process {birth.pid}: {os.strerror(answer.b)}")
        return bool(answer.c)

    async def keep(self, children: Sequence[int], also: bool = False) -> None:
        """It tells of these children, real ones or ghosts, by `Child` events; of what happened already as well.

        Args:
            also: beside those that it tells of already.
        """
        await self._send(Packet(Ctl.KEEP, int(also), text=struct.pack(f"<{len(children)}i", *children)))

    async def send_signal(self, pid: int, signo: int, code: int, value: int) -> None:
        """Has it send a signal to another process here, in the name of its own. code, value as in siginfo_t."""
        await self._send(Packet(Ctl.SEND, pid, signo, code, value=value))

    async def strike(self, pids: Sequence[int], signo: int, code: int, value: int) -> tuple[int, int]:
        """As `send_signal`, to many processes.

        Returns:
            How many got it; the errno of those that did not, ESRCH where none had another.

        Raises:
            BpfsError: it is gone, or stopped.
        """
        sent, error = 0, ESRCH
        async with self._strikes:
            for first in range(0, len(pids), STRUCK_AT_ONCE):
                part = pids[first : first + STRUCK_AT_ONCE]
                packet = Packet(Ctl.STRIKE, signo, code, value=value, text=struct.pack(f"<{len(part)}i", *part))
                answer = await self._ask(packet, Ctl.STRUCK, STRIKE_SECONDS)
                sent, error = sent + answer.a, answer.b if answer.b != ESRCH else error
        return sent, error

    async def seen(self) -> None:
        """One more `Signal` or `Child` has been dealt with; what has not when we die, it tells the next master."""
        self._seen += 1
        await self._send(Packet(Ctl.SEEN, self._seen))

    async def reap(self, pid: int) -> None:
        """The child's ghost with this pid has been waited for."""
        await self._send(Packet(Ctl.REAP, pid))

    async def stream(self, connection: socket.socket, table: bytes, number: int = 0) -> None:
        """Gives it a connected TCP socket whose other end an iorelay has or will have; closes ours.

        Args:
            number: of the stream, which it tells its next master.
            table: `bpfs.wire.mux.ghost_table`. Channels of an earlier stream go on with what they hold.
        """
        try:
            tune_stream(connection)
            self._streams += 1
            await self._send(Packet(Ctl.STREAM, number, text=table), connection.fileno())
        finally:
            connection.close()

    async def hold(self, home: bool = False, timeout: float = ANSWER_SECONDS) -> Held:
        """Gets all output out of the node and all unread input back. The job must be frozen.

        Then `resume` undoes it, `stream` goes on elsewhere, `pump` prepares the return home.

        Raises:
            BpfsError: EIO where stream or ghost broke, ETIMEDOUT.
        """
        packet = await self._ask(Packet(Ctl.HOLD, int(home)), Ctl.HELD, timeout)
        return Held(packet.a, packet.value)

    async def resume(self) -> None:
        """Undoes `hold` on the same stream."""
        await self._send(Packet(Ctl.RESUME))

    async def pump(self, timeout: float = ANSWER_SECONDS) -> None:
        """Hands held bytes to processes that pass them, and what follows, through fresh pipes in the originals' place.

        Raises:
            BpfsError: the ghost's errno.
        """
        packet = await self._ask(Packet(Ctl.PUMP), Ctl.PUMPED, timeout)
        if packet.a:
            raise BpfsError(packet.a, f"the input of process {self.pid} could not be put back: {os.strerror(packet.a)}")

    async def exit(self, code: int) -> None:
        """Ends it with an exit code, once all output is written; a child goes on with what a slow reader is owed."""
        await self._send(Packet(Ctl.EXIT, code))

    async def killed(self, signo: int, core: bool = False) -> None:
        """Ends it by a signal, as `exit`."""
        await self._send(Packet(Ctl.KILLED, signo, int(core)))

    async def stop(self, signo: int) -> None:
        """Stops it, once output so far has been written: its parent sees WSTOPSIG signo. Void if continued since, be it
        that we have still to hear of that."""
        await self._send(Packet(Ctl.STOP, signo, self.conts))

    async def cont(self) -> None:
        """Continues it since the real process was continued; no Signal comes back."""
        if self._pidfd < 0:
            try:
                self._pidfd = os.pidfd_open(self.pid)
            except OSError:
                raise BpfsError(ESRCH, f"the ghost of process {self.pid} is gone") from None
        await self._send(Packet(Ctl.CONT))
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)
        except OSError:
            raise BpfsError(ESRCH, f"the ghost of process {self.pid} is gone") from None

    async def _send(self, packet: Packet, fd: int = -1) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        try:
            await self._socket.sendmsg([packet.pack()], ancillary)
        except BpfsError:
            raise
        except (OSError, trio.ClosedResourceError):
            raise BpfsError(ESRCH, f"the ghost of process {self.pid} is gone") from None

    async def _ask(self, packet: Packet, answer: Ctl, timeout: float, fd: int = -1) -> Packet:
        self._answers.pop(answer, None)
        await self._send(packet, fd)
        with trio.move_on_after(timeout):
            async with self._answered:
                while answer not in self._answers and not self._gone.is_set():
                    await self._answered.wait()
        if answer not in self._answers and not self._gone.is_set():
            raise BpfsError(ETIMEDOUT, f"the ghost of process {self.pid} did not answer within {timeout:g} s")
        got = self._answers.pop(answer, None)
        if got is None:
            raise BpfsError(EIO, f"the stream of process {self.pid} broke")
        return got

    async def _answer(self, kind: Ctl, packet: Packet | None) -> None:
        async with self._answered:
            self._answers[kind] = packet
            self._answered.notify_all()


def take_heir(pid: int) -> socket.socket:
    """The end of a control socket that a ghost keeps for its next master (csrc/ghost_heir.c).

    Raises:
        BpfsError: ESRCH, there is no such process; EINVAL, it keeps none.
    """
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        number = next((int(word[len(HEIR) :]) for word in words if word.startswith(HEIR)), 0)
        process = os.pidfd_open(pid)
        try:
            taken = socket.socket(fileno=process_vm.pidfd_getfd(process, number)) if number else None
        finally:
            os.close(process)
    except (FileNotFoundError, ProcessLookupError):
        raise BpfsError(ESRCH, f"process {pid} has ended") from None
    except (OSError, ValueError) as error:
        raise BpfsError(EINVAL, f"process {pid} is no ghost that can be adopted: {error}") from None
    if taken is None or (taken.family, taken.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        if taken is not None:
            taken.close()
        raise BpfsError(EINVAL, f"process {pid} is no ghost that can be adopted")
    return taken


class NoGhost(Ghost):
    """In the place of a ghost that could not be made: the process lives on its node, and here nothing shows it."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid, self.pair()[0])

    @property
    def gone(self) -> bool:
        """Never: there is nothing that could go."""
        return False

    def state(self) -> str:
        """Nobody can stop it here."""
        return "S"

    async def cont(self) -> None:
        """Nothing is to be continued."""

    async def _send(self, packet: Packet, fd: int = -1) -> None:
        pass

    async def _ask(self, packet: Packet, answer: Ctl, timeout: float, fd: int = -1) -> Packet:
        raise BpfsError(ESRCH, f"process {self.pid} has no ghost")


async def connect_stream(host: str, port: int, token: bytes, timeout: float = ANSWER_SECONDS) -> socket.socket:
    """Connects to a node that expects this token (bpfs.slave.relay); the socket is for `Ghost.stream`.

    Raises:
        BpfsError: ETIMEDOUT, EIO where the node refused.
        OSError: as connect(2) says.
    """
    with trio.move_on_after(timeout):
        stream = await trio.open_tcp_stream(host, port)
        try:
            await stream.send_all(token)
            answer = await stream.receive_some(1)
        except trio.BrokenResourceError:
            answer = b""
        if answer != ACCEPTED:
            await trio.aclose_forcefully(stream)
            raise BpfsError(EIO, f"{host} refused the stream")
        return socket.socket(fileno=stream.socket.detach())
    raise BpfsError(ETIMEDOUT, f"{host} did not answer within {timeout:g} s")

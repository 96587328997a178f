"""A worker's operations on the machine that a process leaves: engine/worker.py."""

import contextlib
import errno
import functools
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Final

import msgpack

from engine import dump, faults, kin, lending, note, packing, reserve, sysv, tracking
from engine import image as img
from engine.descriptors import look
from engine.descriptors.kin import Kin
from engine.descriptors.model import CONTENT_LIMIT
from engine.descriptors.relatives import outlast
from engine.freeze import Frozen, abandon, freeze
from engine.ghosting import LARGE, Exec, Passed, become_placeholder, ghost_exec
from engine.linux import procfs, ptrace, userfaultfd
from engine.mapped import mapped_files, send_ahead
from engine.obstacles import children_of
from engine.operation import NOT_LAZY, ORDER, Reply
from engine.owing import Owing
from engine.precopy import Rounds
from engine.runner import Calls, ProcessGone
from engine.stream import Stream, connect
from engine.tracking import Unwatchable

_HELD_TIMEOUT_S: Final = 60.0
_LESS_URGENT: Final = 10  # as for nice(1): gone within a third of a second on a busy machine, 1 GB
_WHERE: Final = ("host", "port", "token", "pack", "builds")  # of a request: where the image goes


@dataclass(slots=True)
class _OnItsWay:
    """An image that went before the daemon asked for it."""

    token: bytes
    stream: Stream
    sent: int = 0  # bytes of pages
    error: OSError | None = None


class Source:
    """Operations on the machine that the process leaves."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._frozen: Frozen | None = None
        self._frozen_at = 0.0  # by time.monotonic()
        self._settled = False
        self._pledged = False  # stands still even if we die
        self._inspection: dump.Inspection | None = None
        self._image: img.Image | None = None
        self._passed: Passed | None = None
        self._ready: Exec | None = None  # of the ghost
        self._opened: Stream | None = None  # to the worker that is going to make the copy
        self._ahead: _OnItsWay | None = None
        self._stream: Stream | None = None  # to the worker that holds the copy
        self._rounds: Rounds | None = None  # in which memory goes ahead
        self._owing: Owing | None = None  # memory that goes after the process
        self._left = False  # and the process has gone
        self._foreseen = b""  # smaps of the process, a moment ago
        self._shared: kin.Shared | None = None  # of a tree that moves
        self._segments: sysv.Segments | None = None  # likewise; they live on without us
        self.afterwards: Callable[[], object] | None = None
        self._look: Callable[..., dump.Inspection] | None = None  # as `inspect` did
        self._seen: tuple[Reply, Reply] = ({}, {})  # what `inspect` is going to be asked, and its answer

    def _held(self) -> Frozen:
        if self._frozen is None:
            raise OSError(22, f"{ORDER}: no process is frozen")
        return self._frozen

    def family(self, request: Reply, fds: list[int]) -> Reply:
        """Say which living children the frozen process has (`engine.obstacles.children_of`); it can have no more."""
        frozen = self._held()
        if not self._settled:
            frozen.settle()
            self._settled = True
        return {"children": children_of(frozen, living=True)}

    def find_kin(self, request: Reply, fds: list[int]) -> Reply:
        """Say what processes share that others like us hold: of a tree (`pids`), each after its parent. See `give_kin`.

        `bare`, `at_home`, `contents`: as for `inspect`.
        """
        self._drop_shared()
        self._drop_segments()
        pids, bare = [int(pid) for pid in request["pids"]], bool((request.get("unlike") or {}).get("bare"))
        self._shared = kin.gather(pids, contents_of(request), bare, bool(request.get("at_home")))
        self._segments = self._shared.segments
        return self._shared.told()

    def give_kin(self, request: Reply, fds: list[int]) -> Reply:
        """Stream what `find_kin` has found to the destination's `take_kin`; wait until it has all of it."""
        if self._shared is None:
            raise OSError(22, f"{ORDER}: find_kin first")
        total = self._give(request, self._shared.send)
        self._drop_shared()
        return {"bytes": total}

    def end_kin(self, request: Reply, fds: list[int]) -> Reply:
        """The processes of `find_kin` have gone: what they had of System V's goes as well."""
        segments, self._segments = self._segments, None
        if segments is not None:
            segments.remove()
            segments.close()
        return {}

    def give_files(self, request: Reply, fds: list[int]) -> Reply:
        """Stream what a process that runs maps of `files` to the destination's `take_files`; wait as `give_kin`."""
        pid, files = int(request["pid"]), [img.MappedFile(*file) for file in request["files"]]
        try:
            return {"bytes": self._give(request, lambda stream: send_ahead(stream, pid, files))}
        except FileNotFoundError:
            if procfs.has_ended(f"/proc/{pid}"):
                raise ProcessGone(pid) from None
            raise

    def _give(self, request: Reply, send: Callable[[Stream], int]) -> int:
        """Send something on a connection of its own; returns the bytes when all is there. Raises OSError."""
        stream = Stream(connect(request["host"], request["port"], self._control), self._control, _HELD_TIMEOUT_S)
        try:
            stream.send(request["token"])
            try:
                total = send(stream)
            except (BrokenPipeError, ConnectionResetError) as error:
                with contextlib.suppress(img.ImageError, ConnectionResetError):
                    _read_verdict(stream)  # it may have said why
                raise error from None
            _read_verdict(stream)
        finally:
            stream.close()
        return total

    def _drop_segments(self) -> None:
        segments, self._segments = self._segments, None
        if segments is not None:
            segments.close()

    def _drop_shared(self) -> None:
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.close()

    def look(self, request: Reply, fds: list[int]) -> Reply:
        """Say what of a process that runs will have to be relayed: a forecast. `own`: its bytes of memory.

        `outline`: and who it is, as `inspect` may be told to expect.
        `files`: and which files it maps, as `gather` wants to be told; `digests`: with those.
        """
        pid, bare = int(request["pid"]), bool((request.get("unlike") or {}).get("bare"))
        seen: Reply = {"externals": look(pid, bare, bool(request.get("at_home"))), "own": procfs.own_bytes(pid)}
        if request.get("outline"):
            seen["process"] = dump.outlook(pid)
        if request.get("files"):
            seen["files"] = [file.plain() for file in mapped_files(pid, bool(request.get("digests")))]
        return seen

    def obstacles(self, request: Reply, fds: list[int]) -> Reply:
        """Say why a process cannot move; it runs on."""
        family, at_home = bool(request.get("family")), bool(request.get("at_home"))
        return {"refusals": dump.obstacles_of(int(request["pid"]), family, at_home, contents_of(request))}

    def freeze(self, request: Reply, fds: list[int]) -> Reply:
        """Seize and stop, and `inspect` where that is asked for; `writing`: return before the stop.

        `unless`: leave it alone, and say so (`large`), where it has at least so many bytes of its own.
        `host`, `port`, `token`, `pack`, `builds`: where the image goes as soon as `inspect` has answered, unasked;
        `send` goes on from there.
        `children`: say also what `family` says.
        """
        if self._frozen is not None:
            raise OSError(16, f"{ORDER}: a process is frozen already")
        limit = request.get("unless")
        if limit is not None and (own := procfs.own_bytes(int(request["pid"]))) >= limit:
            return {"large": own}
        writing = bool(request.get("writing"))
        if "token" in request:
            self._opened = self._open_stream(request)  # while it runs
            faults.hold("ahead")
        self._frozen_at = time.monotonic()
        self._frozen = freeze(int(request["pid"]), wait=not writing)
        self._settled = not writing
        seen = self.inspect(request, fds) if request.get("inspect") else {}
        return seen | self.family(request, fds) if request.get("children") else seen

    def foresee(self, request: Reply, fds: list[int]) -> Reply:
        """Before the `freeze` of a process whose memory is to go after it: what takes the longer the larger it is."""
        self._foreseen = procfs.read(f"/proc/{int(request['pid'])}/smaps")
        return {}

    def watch(self, request: Reply, fds: list[int]) -> Reply:
        """Begin to send memory ahead, to a destination that is at its `stage`; `watched` tells whether that can be.

        Where not (`why`), the process is as before, and moves without.
        """
        if self._frozen is not None or self._rounds is not None:
            raise OSError(16, f"{ORDER}: a process is held already")
        pid = int(request["pid"])
        refusals = dump.forecast(pid, bool(request.get("close")), bool(request.get("at_home")), contents_of(request))
        if refusals:
            return {"watched": False, "why": refusals[0]}
        try:
            watch = tracking.begin(pid)
        except Unwatchable as error:
            return {"watched": False, "why": str(error.strerror)}
        try:
            stream = Stream(connect(request["host"], request["port"], self._control), self._control, _HELD_TIMEOUT_S)
            stream.send(request["token"])
            if request.get("pack"):
                _pack(stream)
            self._rounds = Rounds(pid, watch, stream)
        except BaseException:
            watch.close()
            raise
        return {"watched": True}

    def copy(self, request: Reply, fds: list[int]) -> Reply:
        """Send memory ahead for `seconds`. Returns how far the rounds are: engine/precopy.py, `Progress`."""
        if self._rounds is None:
            raise OSError(22, f"{ORDER}: nothing is watched")
        return asdict(self._rounds.advance(float(request["seconds"])))

    def unwatch(self, request: Reply, fds: list[int]) -> Reply:
        """Give up the rounds; the process runs on, and is as it was."""
        self._end_rounds()
        return {}

    def _end_rounds(self) -> bool:
        rounds, self._rounds = self._rounds, None
        if rounds is not None:
            rounds.close()
        return rounds is not None

    def inspect(self, request: Reply, fds: list[int]) -> Reply:
        """Wait for the stops; say what it is, what must be relayed and why it cannot move.

        `moving`: it is going to be sent, and what can be done towards that is done before the daemon's next word: all
        of it, where is known where the image goes (`freeze`, or `token` and the rest here).
        `close`: sockets that cannot move are closed on the way.
        `unlike`: of engine/facts.py, where the destination is another kind of machine.
        `family`: the daemon looks after the children that stay.
        `at_home`: it leaves the master.
        `contents`: bytes of open files without a name that may travel.
        `digests`: the destination knows files by their content.
        `lazy`: what can of its memory goes after it, from `become_ghost` or `vanish` on; `owed` tells.
        `kin`: its part of what the tree shares that it moves with (engine/descriptors/kin.py).
        `expected`: the daemon has made all ready for a process of these `externals` and this `process` (`look`). If it
        is that (`agreed`), the image goes; with `depart`, go on with `send`, whose arguments and descriptors have come
        as well, and reply as that does. Else the connection to the destination is closed.
        """
        frozen = self._held()
        if request.get("lazy") and not userfaultfd.answers():
            raise OSError(95, NOT_LAZY)
        (asked, answer), self._seen = self._seen, ({}, {})
        if answer and asked == question(request):
            return answer
        if not self._settled:
            frozen.settle()
            self._settled = True
        if request.get("moving") and request.get("family") and "kin" not in request and not request.get("at_home"):
            outlast(frozen.pid)
        self._look = functools.partial(
            dump.inspect, frozen, request.get("unlike"), bool(request.get("close")), bool(request.get("family")),
            bool(request.get("at_home")), self._rounds, contents_of(request), bool(request.get("digests")),
            bool(request.get("lazy")), kin=Kin.told(request["kin"]) if "kin" in request else None,
        )  # fmt: skip
        self._inspection = self._look(foreseen=self._rounds.smaps if self._rounds is not None else self._foreseen)
        agreed = "expected" in request and _is_expected(request["expected"], self._inspection)
        if "expected" in request and not agreed:
            self._close_opened()
            return self._told()
        if agreed and "depart" in request:
            self._go_ahead(request, "")
            return self.send(request, fds)
        if request.get("moving") and not self._inspection.refusals:
            self.afterwards = functools.partial(self._go_ahead, request, "send")
        return self._told() | {"agreed": agreed}

    def _told(self) -> Reply:
        assert self._inspection is not None
        return {
            "refusals": self._inspection.refusals, "process": self._inspection.summary(), "externals":
            self._inspection.externals,
        }  # fmt: skip

    def _go_ahead(self, request: Reply, word: str) -> None:
        assert self._inspection is not None
        stream, self._opened = self._opened, None
        if stream is None:
            with contextlib.suppress(OSError):  # `send` will meet it again, and say so
                self._image = dump.build(self._inspection)
            return
        stream.word = word
        self._ahead = _OnItsWay(request["token"], stream)
        try:
            self._ahead.sent = self._transmit(stream, request)
        except OSError as error:
            self._ahead.error, self._image = error, None

    def _transmit(self, stream: Stream, request: Reply) -> int:
        """The image but for the verdict. Returns the bytes of its pages; raises OSError."""
        self._look_again()
        assert self._inspection is not None
        image = self._image = self._image or dump.describe(self._inspection)
        ahead = bool(request.get("ahead"))
        self._inspection.pick(image, ahead)
        if request.get("pack") and not ahead and image.total >= packing.WHOLE:
            _pack(stream)
        if ahead and self._inspection.keep is not None:
            stream.send(img.frame(img.KEEP, self._inspection.keep.packed()))
        if self._inspection.later:
            stream.send(img.frame(img.OWED, msgpack.packb([self._inspection.later, self._inspection.owed])))
        try:
            first = bool(request.get("builds"))
            return dump.write(self._inspection, image, stream.send, stream.send_part, first)[0]
        except (BrokenPipeError, ConnectionResetError) as error:
            with contextlib.suppress(img.ImageError, ConnectionResetError):
                _read_verdict(stream)  # it may have said why
            raise error from None

    def _look_again(self) -> None:
        """Where `inspect` rested on what was not true any more. Raises OSError: it shows now that it cannot move."""
        seen, look = self._inspection, self._look
        if seen is None or look is None or seen.recheck is None or seen.recheck.agrees():
            return
        seen = self._inspection = look()
        self._image = None
        if seen.refusals:
            raise OSError(95, "; ".join(seen.refusals))

    def send(self, request: Reply, fds: list[int]) -> Reply:
        """Stream the image to the destination's worker; wait until it holds.

        fds: ghost program and control socket, where the process is going to become a ghost; `env` is the ghost's.
        `ahead`: to the destination that has the memory that was sent ahead; else that is of no use.
        `pack`: the destination takes packed pages, where that is faster. `builds`: it makes a process of what comes.
        What `freeze` was told of where the image goes, it is on its way there already.
        `depart`: go on at once with `become_ghost` or `vanish`, whose arguments have come as well.

        Returns:
            `bytes` of pages; `stood_for`: seconds that the process had been standing still when the copy was whole.
        """
        if self._inspection is None:
            raise OSError(22, f"{ORDER}: inspect first")
        if self._inspection.refusals:
            return {
                "ok": False,
                "errno": 95,
                "text": self._inspection.refusals[0],
                "refusals": self._inspection.refusals,
            }
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.token != request["token"]:
            ahead.stream.close()  # it goes somewhere else now
            ahead = None
        stream = ahead.stream if ahead is not None else self._open_stream(request)
        stream.word = ""
        try:
            if ahead is not None and ahead.error is not None:
                raise ahead.error
            total = ahead.sent if ahead is not None else self._transmit(stream, request)
            image = self._image
            assert image is not None
            if self._inspection.later:  # while the destination is still at work
                frozen, known = self._held(), self._inspection.survey.known
                self._owing = Owing.begin(frozen, self._inspection.later, known)
            if len(fds) == 2:
                self._make_ghost_ready(image, request, fds)
            total += self._await_verdict(stream, image)
            stood_for = time.monotonic() - self._frozen_at
        except BaseException:
            stream.close()
            self._end_owing()
            raise
        self._stream = stream
        sent: Reply = {"bytes": total, "stood_for": stood_for}
        faults.hold("held")
        match request.get("depart"):
            case "become_ghost":
                return sent | self.become_ghost(request, [])
            case "vanish":
                return sent | self.vanish(request, [])
        return sent

    def _await_verdict(self, stream: Stream, image: img.Image) -> int:
        """Until the copy is whole; gives what files it lacks. Returns the bytes of these."""
        lacks = _read_verdict(stream)
        if not lacks:
            return 0
        total = lending.send(stream, lacks, image, self._held().pid, self._held().live)
        if _read_verdict(stream):
            raise img.ImageError("it lacks files for a second time")
        return total

    def _make_ghost_ready(self, image: img.Image, request: Reply, fds: list[int]) -> None:
        assert self._inspection is not None
        frozen, closed = self._held(), self._inspection.descriptors.closed
        self._passed = self._passed or Passed(frozen, image, fds[0], fds[1])
        self._ready = ghost_exec(frozen, image, self._passed, list(request.get("env", [])), closed)

    def _open_stream(self, request: Reply) -> Stream:
        if self._rounds is not None and request.get("ahead"):
            stream, self._rounds.stream = self._rounds.stream, None
            if stream is not None:
                return stream
        stream = Stream(connect(request["host"], request["port"], self._control), self._control, _HELD_TIMEOUT_S)
        try:
            stream.send(request["token"])
        except BaseException:
            stream.close()
            raise
        return stream

    def pledge(self, request: Reply, fds: list[int]) -> Reply:
        """From now on the frozen process will not run on if we die: it stops (SIGSTOP), until somebody decides.

        `release` and `become_ghost` take that back. ESRCH: it has ended meanwhile.
        """
        frozen = self._held()
        if procfs.has_ended(frozen.live):
            raise ProcessGone(frozen.pid)
        if not frozen.group_stopped:
            os.kill(frozen.pid, signal.SIGSTOP)
            self._pledged = True
        faults.hold("pledge")
        return {}

    def _unpledge(self) -> None:
        """SIGCONT discards a SIGSTOP that has not been delivered; then it is discarded itself."""
        pledged, self._pledged = self._pledged, False
        if not pledged or self._frozen is None:
            return
        with contextlib.suppress(OSError):  # it has ended
            os.kill(self._frozen.pid, signal.SIGCONT)
            calls = Calls(self._frozen.open_injection())
            only = calls.data(struct.pack("<Q", 1 << (signal.SIGCONT - 1)))
            calls.add("rt_sigtimedwait", only, 0, calls.data(bytes(16)), 8, must=False)
            calls.run()

    def release(self, request: Reply, fds: list[int]) -> Reply:
        """Let it run on here, where it does not anyhow."""
        frozen = self._frozen
        if frozen is None:
            return {}
        if not self._settled:
            frozen.settle()
        self._unpledge()
        self._take_back()
        self._forget()
        frozen.release(int(request.get("errno", 0)))
        return {}

    def become_ghost(self, request: Reply, fds: list[int]) -> Reply:
        """Run the ghost in its place. fds and `env`, unless `send` had them: ghost program, control socket.

        `go`: tell the copy that it may run.
        """
        self._held()
        if self._inspection is None or (self._ready is None and len(fds) != 2):
            raise OSError(22, f"{ORDER}: become_ghost wants an inspected process and two descriptors")
        with self._last_word(request) as gone:
            self._unpledge()
            if self._ready is None:
                self._image = self._image or dump.build(self._inspection)
                self._make_ghost_ready(self._image, request, fds)
            assert self._ready is not None
            self._ready.make_ready()  # other calls may have been made since
            self._ready.run(gone)
        self._forget()
        note.erase()
        return {}

    def vanish(self, request: Reply, fds: list[int]) -> Reply:
        """Kill the frozen source: it lives elsewhere now. Where relatives stay, it becomes a placeholder instead.

        `go`: tell the copy that it may run. `init`: nodeinit's pid as we see it; without it nothing stands for it.
        `leaving`: job pids of others who leave as well.
        """
        frozen = self._held()
        init, leaving = int(request.get("init", 0)), request.get("leaving", ())
        with self._last_word(request) as gone:
            seen = self._inspection
            if init and seen is not None and self._image is not None and seen.is_needed(init, leaving):
                become_placeholder(frozen, self._image, init)
                seen.end_stand_ins(init)
            else:
                self._frozen = None
                self._kill(frozen, gone)
        if init and self._image is not None:
            with contextlib.suppress(OSError):  # the node is ending
                pids, uid = [self._image.pid], int(frozen.status["Uid"].split()[0])
                reserve.reserve(init, dict.fromkeys(reserve.own_pids(init, pids), uid))
        self._forget()
        note.erase()
        return {}

    def _kill(self, frozen: Frozen, gone: Callable[[], None]) -> None:
        with contextlib.suppress(ProcessLookupError):
            if procfs.own_bytes(frozen.pid) >= LARGE:
                for thread in frozen.threads:  # on its way out it is not to take a CPU from its own copy
                    os.setpriority(os.PRIO_PROCESS, thread.tid, _LESS_URGENT)
            os.kill(frozen.pid, signal.SIGKILL)
        faults.hold("vanish")
        # It will never run again. That its memory is given back, 30 ms a GB, need not be waited for.
        if self._inspection is not None and not any(e.get("locks") for e in self._inspection.descriptors.table):
            gone()
        for thread in reversed(frozen.threads):  # the leader's end is reported last
            with contextlib.suppress(OSError):
                while os.WIFSTOPPED(ptrace.wait(thread.tid)):
                    pass
        frozen.close()

    @contextlib.contextmanager
    def _last_word(self, request: Reply) -> Iterator[Callable[[], None]]:
        """The source ends in this context. Its copy, which must be there up to that moment, is told whether it did: by
        a word, or by the end of the connection alone.

        Gives what says the word as soon as the source is sure to run no more; else it is said at the end.
        """
        stream, self._stream = self._stream, None
        said: list[bool] = []

        def gone() -> None:
            if stream is not None and request.get("go") and not said:
                said.append(True)
                faults.hold("go")
                with contextlib.suppress(OSError):  # the daemon will tell it
                    stream.send(img.frame(img.GO, b""))

        try:
            if stream is not None and stream.has_ended():
                raise OSError(32, "the worker that holds the copy is gone")
            yield gone
            gone()
            if stream is not None and self._owing is not None:
                self._owing.stream, stream, self._left = stream, None, True
        finally:
            if stream is not None:
                stream.close()

    def _take_back(self) -> None:
        if self._passed is not None:
            with contextlib.suppress(OSError):  # killed meanwhile
                self._passed.take_back()

    def _forget(self) -> None:
        self._frozen, self._inspection, self._settled, self._pledged = None, None, False, False
        self._image = self._passed = self._ready = self.afterwards = None
        self._seen, self._foreseen, self._look = ({}, {}), b"", None
        self._end_rounds()
        if not self._left:
            self._end_owing()
        self._close_opened()
        ahead = self._ahead.stream if self._ahead is not None else None
        for stream in (self._stream, ahead):
            if stream is not None:
                stream.close()
        self._stream = self._ahead = None

    def _close_opened(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    @property
    def work(self) -> Owing | None:
        """What there is to do between two requests."""
        return self._owing if self._left and self._owing is not None and not self._owing.over else None

    def owing(self, request: Reply, fds: list[int]) -> Reply:
        """Whether memory that is to go after the process still does; where not, what ended that."""
        owing = self._owing
        return {"over": owing is None or owing.over, "failed": owing.failed if owing is not None else ""}

    def _end_owing(self) -> bool:
        owing, self._owing = self._owing, None
        if owing is not None and not owing.over:
            owing.close()
        left, self._left = self._left, False
        return owing is not None and left and not owing.over

    def explain(self, reply: Reply) -> None:
        """Give the true reason of a failure: whatever fails because the process has ended (its files of /proc are
        empty or gone), fails because of that.
        """
        if self._frozen is not None and not reply["ok"] and procfs.has_ended(self._frozen.live):
            reply["errno"], reply["text"] = errno.ESRCH, str(ProcessGone(self._frozen.pid).strerror)

    def undo(self) -> bool:
        """The daemon is gone, or gives up. Returns whether there was anything to undo."""
        frozen, settled = self._frozen, self._settled
        watched = self._rounds is not None
        self._drop_shared()
        self._drop_segments()
        self._unpledge()
        self._take_back()
        owed = self._end_owing()
        self._forget()
        if frozen is not None and settled:
            frozen.release()
        elif frozen is not None:
            abandon(frozen)
        return frozen is not None or watched or owed


def contents_of(request: Reply) -> int:
    """Bytes of open files without a name that may travel."""
    return int(request.get("contents", CONTENT_LIMIT))


def _is_expected(expected: Reply, seen: dump.Inspection) -> bool:
    """Whether `inspect` saw what `look` had foreseen, and it can move."""
    if seen.refusals:
        return False
    now = msgpack.unpackb(msgpack.packb([seen.externals, seen.outline()]), strict_map_key=False)
    return bool(now == [expected["externals"], expected["process"]])


def question(request: Reply) -> Reply:
    """What `inspect` is asked by a request."""
    return {key: value for key, value in request.items() if key not in ("op", "order", *_WHERE)}


def _pack(stream: Stream) -> None:
    """Pages may be packed on this connection from now on, where we can."""
    if packing.works():
        stream.packer = packing.Packer()
        stream.send(img.frame(img.PACKED, b""))


def _read_verdict(stream: Stream) -> bytes:
    """What the destination says of the copy: nothing where that is whole, else which files it lacks.

    Raises OSError where it could not be made.
    """
    kind, body = img.read_frame(stream.receive, (img.HELD, img.ERROR, img.LACKS), img.MAX_SMALL)
    if kind == img.ERROR:
        raise img.failure(body)
    return body

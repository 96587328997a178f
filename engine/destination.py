"""A worker's operations on the machine that a process comes to: engine/worker.py."""

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Final

from engine import faults, filling, kin, lending, placeholders, sysv
from engine import image as img
from engine.descriptors.ghost import take_from
from engine.image import MappedFile
from engine.linux import userfaultfd
from engine.operation import FDS, NOT_LAZY, ORDER, TOKEN_SIZE, Reply, report, sentence
from engine.reserve import sweep
from engine.restore import Builder
from engine.restore_files import gather
from engine.spans import Spans
from engine.spawn import Relative
from engine.staging import Child, Ghost, Keep, Stage, checked, unpack
from engine.stream import RECEIVE, Aborted, Stream, accept, widen
from engine.target import Target, place_child, seize_ghost

_RECEIVE_TIMEOUT_S: Final = 60.0
_LAST_WORD_S: Final = 5.0  # a source that says nothing for so long after its copy was whole is asked by the daemon


class Destination:
    """Operations on the machine that the process comes to."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._target: Target | None = None
        self._listener: socket.socket | None = None
        self._token = b""
        self._builder: Builder | None = None
        self._stream: Stream | None = None  # to the source's worker, once the copy is whole, or memory has come ahead
        self._stage: Stage | None = None  # that memory
        self._filling: filling.Filling | None = None  # memory that comes when the process runs
        self._runs = False  # and it does
        self._owed = 0  # bytes of it, about
        self._strict = 0  # host pid of nodeinit, where what comes is to be a strict job
        self._files: dict[int, int] = {}  # our descriptors of its files, by its own numbers
        self._carried: list[lending.Borrowed] = []  # files that are not here
        self._front = 0  # see `receive`
        self._segments: sysv.Segments | None = None  # which are gone with us
        self._kin: dict[int, int] = {}  # what the processes of a tree share, by key
        self._held_at = 0.0  # when the copy was whole, by time.monotonic()

    def prepare(self, request: Reply, fds: list[int]) -> Reply:
        """Make the stopped child, or seize the ghost, and listen, where `listen` has not been asked for.

        `lazy`: some of its memory will come later.
        """
        if self._target is not None:
            raise OSError(16, f"{ORDER}: a process is being built already")
        if request.get("lazy") and not userfaultfd.answers():
            raise OSError(95, NOT_LAZY)
        place = request["place"]
        if self._listener is None:
            self._expect_source(_listen(request["address"]))
        try:
            if "init" in place:
                pid, ppid, pgid, sid = (int(request[key]) for key in ("pid", "ppid", "pgid", "sid"))
                self._strict = int(place["init"]) if place.get("strict") else 0
                terminal, front = str(request.get("terminal", "")), bool(request.get("front", True))
                self._target = place_child(
                    int(place["init"]), pid, ppid, pgid, sid, int(request.get("uid", 0)), terminal, front,
                    [Relative(*child) for child in request.get("children", [])],
                )  # fmt: skip
            else:
                self._target = seize_ghost(int(place["ghost"]))
                self._target.staged = self._stage.spans if self._stage is not None else []
        except BaseException:
            self._close_listener()
            raise
        return self._where()

    def gather(self, request: Reply, fds: list[int]) -> Reply:
        """Have the `files` that the process maps at hand, while it still runs. Returns which of them the place `lacks`.

        Raises:
            OSError: one that should be here cannot be had.
        """
        if self._target is None:
            raise OSError(22, f"{ORDER}: prepare first")
        here = gather([MappedFile(*file) for file in request["files"]], self._target.pid)
        return {"lacks": [index for index, is_here in enumerate(here) if not is_here]}

    def take_files(self, request: Reply, fds: list[int]) -> Reply:
        """Take the content of `files`, which are not here, from the source's `give_files`."""
        if self._listener is None:
            raise OSError(22, f"{ORDER}: prepare first")
        files = [MappedFile(*file) for file in request["files"]]
        timeout = float(request.get("timeout_s", _RECEIVE_TIMEOUT_S))
        stream = Stream(accept(self._listener, self._token, self._control, timeout), self._control, timeout)
        self._close_carried()
        with self._telling(stream):
            self._carried = lending.receive_ahead(stream, files)
            stream.send(img.frame(img.HELD, b""))
        stream.close()
        return {}

    def _close_carried(self) -> None:
        carried, self._carried = self._carried, []
        for one in carried:
            one.close()

    def listen(self, request: Reply, fds: list[int]) -> Reply:
        """Before `prepare`: the image may be on its way here already."""
        self._close_listener()
        self._expect_source(_listen(request["address"]))
        return self._where()

    def _expect_source(self, listener: socket.socket) -> None:
        self._listener, self._token = listener, secrets.token_bytes(TOKEN_SIZE)

    def _where(self) -> Reply:
        assert self._listener is not None
        return {"port": self._listener.getsockname()[1], "token": self._token}

    def take_kin(self, request: Reply, fds: list[int]) -> Reply:
        """Make what the processes of a tree share: engine/kin.py. `root`: a process whose root directory paths mean."""
        if self._listener is None:
            raise OSError(22, f"{ORDER}: listen first")
        timeout = float(request.get("timeout_s", _RECEIVE_TIMEOUT_S))
        stream = Stream(accept(self._listener, self._token, self._control, timeout), self._control, timeout)
        self._close_listener()
        with self._telling(stream):
            self._segments = sysv.Segments(int(request["root"]))
            self._kin = kin.receive(stream, int(request["root"]), self._segments)
            stream.send(img.frame(img.HELD, b""))
        stream.close()
        return {}

    def keep_kin(self, request: Reply, fds: list[int]) -> Reply:
        """What `take_kin` has made is the processes' now."""
        segments, self._segments = self._segments, None
        if segments is not None:
            segments.close()
        return {}

    def hand_out(self, request: Reply, fds: list[int]) -> Reply:
        """Give what belongs to `keys`, in their order: the descriptors come with the reply."""
        return {FDS: [os.dup(self._kin[int(key)]) for key in request["keys"]]}

    def borrow(self, request: Reply, fds: list[int]) -> Reply:
        """Keep, by a key, what ghosts have for others than their own process: `of` is [key, pid, number] of each."""
        for key, pid, number in request["of"]:
            self._kin[int(key)] = take_from(int(pid), int(number))
        return {}

    def sweep(self, request: Reply, fds: list[int]) -> Reply:
        """End what stands for nobody on a node (`init`). Returns which of `pids` something has there still."""
        init = int(request["init"])
        sweep(init, request["pids"])
        return {"left": placeholders.present(init, request["pids"])}

    def stage(self, request: Reply, fds: list[int]) -> Reply:
        """Take memory that comes ahead, into what `prepare` made or into the ghost `ghost`, until all of it is there.

        `receive`, with `ahead`, goes on with the same connection.
        """
        if self._listener is None or self._stage is not None:
            raise OSError(22, f"{ORDER}: prepare or listen first")
        if self._target is None and "ghost" not in request:
            raise OSError(22, f"{ORDER}: there is no process to fill")
        timeout = float(request.get("timeout_s", _RECEIVE_TIMEOUT_S))
        self._stage = Stage(Child(self._target) if self._target is not None else Ghost(int(request["ghost"])))
        try:
            stream = Stream(accept(self._listener, self._token, self._control, timeout), self._control, timeout)
            self._stream = stream
            self._stage.receive(stream)
        except BaseException:
            self.undo()
            raise
        return {"bytes": self._stage.received}

    def receive(self, request: Reply, fds: list[int]) -> Reply:
        """Take the image and build the process, stopped. fds: as `externals` refers to them.

        `ahead`: on the connection of `stage`, and with what has come there.
        `part`: all but what comes after the memory, for which `complete` has to be called.
        `follow`: go on at once with that.
        `lends`: the source gives the content of files that are mapped and not here.
        `memory`: [device, inode, index] of shared memory that is among `fds`.
        `front`: the process group that it has put in front of its terminal, where that comes as well.
        """
        if self._target is None or self._listener is None or self._builder is not None:
            raise OSError(22, f"{ORDER}: prepare first")
        externals = {int(key): fds[index] for key, index in request.get("externals", {}).items()}
        self._front = int(request.get("front", 0))
        given = {(device, inode): fds[index] for device, inode, index in request.get("memory", [])}
        ghost_fds = {int(key): int(number) for key, number in request.get("ghost_fds", {}).items()}
        timeout = float(request.get("timeout_s", _RECEIVE_TIMEOUT_S))
        ahead = bool(request.get("ahead")) and self._stage is not None
        try:
            stream = self._stream if ahead and self._stream is not None else None
            if stream is None:
                connection = accept(self._listener, self._token, self._control, timeout)
                stream = Stream(connection, self._control, timeout)
        except BaseException:
            self.undo()
            raise
        self._stream = stream
        try:
            with self._telling(stream):
                total = self._build(stream, externals, ghost_fds, ahead, bool(request.get("lends")), given)
                if not request.get("part"):
                    self._complete(stream)
        finally:
            self._close_listener()
        received = {"bytes": total}
        return received | self.follow({}, []) if request.get("follow") else received

    def complete(self, request: Reply, fds: list[int]) -> Reply:
        """Build what `receive` has left: the descriptors, the threads with their ids."""
        stream = self._stream
        if self._builder is None or stream is None:
            raise OSError(22, f"{ORDER}: receive first")
        with self._telling(stream):
            self._complete(stream)
        return {}

    def _complete(self, stream: Stream) -> None:
        assert self._builder is not None
        self._builder.complete()
        self._held_at = time.monotonic()
        stream.send(img.frame(img.HELD, b""))
        if self._target is not None and not self._target.home:
            self._files = self._builder.take_files()
        self._builder.front = self._front
        self._builder.get_set()

    @contextlib.contextmanager
    def _telling(self, stream: Stream) -> Iterator[None]:
        """What fails in this context is undone, and the source's worker is told."""
        try:
            try:
                yield
            except OSError:
                raise
            except Exception as error:  # what an image claims is believed in many places
                report(error)
                raise img.ImageError(sentence(error)) from error
        except BaseException as error:
            if isinstance(error, OSError) and not isinstance(error, Aborted):
                _tell(stream, error.errno or 5, sentence(error))
            stream.close()
            self.undo()
            raise

    def follow(self, request: Reply, fds: list[int]) -> Reply:
        """Wait for the source's own word that it is gone, and let the copy run; `running` tells whether it came."""
        if self._stream is None:
            raise OSError(22, f"{ORDER}: nothing is built")
        self._stream.wait_at_most(_LAST_WORD_S)
        try:
            self._read_go(self._stream)
        except Aborted:
            raise
        except OSError:
            return {"running": False}
        faults.hold("follow")
        return {"running": True} | self.resume({}, [])

    def _read_go(self, stream: Stream) -> None:
        try:
            img.read_frame(stream.receive, (img.GO,), 0)
        except Aborted:
            if not _has_ended(self._control):
                raise
            # The daemon is gone, and maybe the master. The source may be, too: its worker knows, and ends soon.
            stream.let_daemon_wait(_LAST_WORD_S)
            img.read_frame(stream.receive, (img.GO,), 0)

    def _build(
        self, stream: Stream, externals: dict[int, int], ghost_fds: dict[int, int], ahead: bool, lends: bool,
        given: dict[tuple[int, int], int],
    ) -> int:  # fmt: skip
        assert self._target is not None
        before = None
        if ahead and self._stage is not None:
            _, body = img.read_frame(stream.receive, (img.KEEP,), img.MAX_META)
            before = (self._stage, Keep.unpacked(body))
        owed: Spans = []
        while (frame := img.read_frame(stream.receive, (img.META, img.PACKED, img.OWED), img.MAX_META))[0] != img.META:
            if frame[0] == img.PACKED:
                stream.packed = True
            else:
                spans, about = unpack(frame[1], 2)
                owed, self._owed = checked(spans), about if type(about) is int else 0
        image = img.decode(frame[1])
        books = lending.Lending(lends, self._carried)
        builder = self._builder = Builder(
            self._target, image, externals, ghost_fds, before, books, self._strict, given
        )
        builder.begin()
        kind, state = img.read_frame(stream.receive, (img.STATE, img.LATER), img.MAX_META)
        if kind == img.STATE:
            img.add_state(image, state)
        builder.pages(stream.receive_part)
        if kind == img.LATER:
            img.add_state(image, img.read_frame(stream.receive, (img.STATE,), img.MAX_META)[1])
        if owed:  # not before these are there: writing them would wait for us
            self._filling = filling.begin(self._target, image, owed, stream)
        _, end = img.read_frame(stream.receive, (img.END,), img.MAX_SMALL)
        if int.from_bytes(end, "little") != image.total:
            raise img.ImageError("the number of bytes differs")
        builder.borrow(stream)
        return image.total

    def resume(self, request: Reply, fds: list[int]) -> Reply:
        """The source is gone: let it run. Descriptors of its files (not at home) come with the reply; how many seconds
        after the copy was whole it ran (`ran_after`); and about how many bytes are still `owed`: `filled` tells more.
        """
        builder, target = self._builder, self._target
        if builder is None or target is None:
            raise OSError(22, f"{ORDER}: nothing is built")
        if self._filling is not None:
            if self._stream is None or self._stream.is_closed():
                raise OSError(5, "the source died with memory that had still to come")
            self._filling.begin()
            self._runs = True
        hostpid = builder.resume()
        ran_after = time.monotonic() - self._held_at
        files, self._files = self._files, {}
        builder.close()
        self._builder = self._target = self._stage = None
        if self._filling is not None:
            self._stream = None  # goes on
        self._close_stream()
        owed = self._owed if self._filling is not None else 0
        return {
            "hostpid": hostpid, "files": list(files), FDS: list(files.values()), "ran_after": ran_after, "owed": owed,
        }  # fmt: skip

    @property
    def work(self) -> filling.Filling | None:
        """What there is to do between two requests."""
        return self._filling if self._runs and self._filling is not None and not self._filling.over else None

    def filled(self, request: Reply, fds: list[int]) -> Reply:
        """How far the memory is that comes when the process runs. `failed`: it does not, and the process has ended."""
        one = self._filling
        if one is None:
            return {"over": True, "failed": "", "received": 0}
        return {"over": one.over, "failed": one.failed, "received": one.received}

    def give_up(self, request: Reply, fds: list[int]) -> Reply:
        """What is to come will not, because of `why`: the process ends. Returns as `filled`."""
        if self.work is not None:
            self.work.fail(str(request["why"]))
        return self.filled(request, fds)

    def discard(self, request: Reply, fds: list[int]) -> Reply:
        """Undo; with `errno` and `text` for a source's worker that waits."""
        if self._stream is not None and "errno" in request:
            _tell(self._stream, int(request["errno"]), str(request["text"]))
        self.undo()
        return {}

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def undo(self) -> bool:
        """Nothing of the new process stays; a ghost is a ghost again. Returns whether there was anything to undo."""
        self._close_listener()
        self._close_stream()
        self._close_carried()
        builder, target, stage = self._builder, self._target, self._stage
        self._builder = self._target = self._stage = None
        files, self._files = self._files, {}
        shared, self._kin = self._kin, {}
        segments, self._segments = self._segments, None
        if segments is not None:
            segments.remove()
            segments.close()
        for fd in [*files.values(), *shared.values()]:
            os.close(fd)
        memory, self._filling = self._filling, None
        runs, self._runs = self._runs, False
        with contextlib.ExitStack() as steps:  # each is gone, in this order from the end, whatever the others meet
            if target is not None:
                steps.callback(target.discard)
            if builder is not None:
                steps.callback(builder.close)
            if stage is not None:
                steps.callback(stage.discard, target)
            if memory is not None and runs:
                steps.callback(memory.fail, "nobody looks after it any more")
            elif memory is not None:
                steps.callback(memory.drop)
        return target is not None or stage is not None or (runs and memory is not None and bool(memory.failed))


def _listen(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family, backlog=8)
    widen(listener, RECEIVE)
    return listener


def _has_ended(control: socket.socket) -> bool:
    try:
        return not control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return True


def _tell(stream: Stream, code: int, text: str) -> None:
    """What `_read_verdict` will raise over there."""
    with contextlib.suppress(OSError):
        stream.send(img.error_frame(code, text))

"""One program for many processes: a *template* is dumped once, at its exec, and its image is made into a process again
and again, each time under the pid of another process that waits for it.

The template never runs its program: it ends with the worker that holds it. What differs between the processes is put
into the bytes of the image: the pid, the 16 random bytes that the kernel gives to a program (AT_RANDOM), and the value
of BPROC_RANK in its environment, where it has one with room for it.
"""

import contextlib
import os
import signal
import socket
import struct
from dataclasses import dataclass
from typing import Any, Final

from engine import dump, execorder, note
from engine import image as img
from engine.freeze import Frozen, freeze
from engine.ghosting import Passed, ghost_exec
from engine.linux import packets, procfs, ptrace
from engine.onexec import Armed, end
from engine.operation import FDS, ORDER, Reply
from engine.restore import Builder
from engine.runner import ProcessGone
from engine.target import place_child

RANK: Final = b"BPROC_RANK="
IMAGE_MAX: Final = packets.MAX_PACKET - 20_000  # bytes; a process at its exec has some 30,000, and its arguments
_AT_RANDOM: Final = 25  # <linux/auxvec.h>
_RANDOM_BYTES: Final = 16
_RIGHTS: Final = ("Uid", "Gid", "CapPrm")  # of /proc/PID/status: a program with more than its caller is none for all


class _Template(Armed):
    options = ptrace.O_EXITKILL  # its program must never run here


class Original:
    """Operations on the machine where template and waiting processes are."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._armed: _Template | None = None
        self._frozen: Frozen | None = None
        self._image: img.Image | None = None
        self._rights: list[str] = []
        self._arguments: list[bytes] = []

    def arm_template(self, request: Reply, fds: list[int]) -> Reply:
        """Seize a process that is to be stopped at its next exec, and to end with us."""
        if self._armed is not None or self._frozen is not None:
            raise OSError(16, f"{ORDER}: a template is held already")
        self._armed = _Template(int(request["pid"]))
        self._rights = _rights(procfs.parse_status(procfs.read(f"/proc/{self._armed.pid}/status")))
        return {}

    def wait_template(self, request: Reply, fds: list[int]) -> Reply:
        """Wait for that exec."""
        if self._armed is None:
            raise OSError(22, f"{ORDER}: nothing is armed")
        armed = self._armed
        self._frozen = armed.wait(self._control)
        self._armed = None
        return {}

    def image(self, request: Reply, fds: list[int]) -> Reply:
        """The image for nodes that are `unlike` (engine/facts.py) this machine, or why there can be none.

        `digests`: they know files by their content.

        Returns:
            `refusals`; or `image`, its bytes with the offsets in them of `rank` ([offset, bytes of room], or None) and
            of `random` (-1: none), the paths of its `files`, and `process` and `externals` as `inspect` gives them;
            and `order`: table, keys and rank of engine/execorder.py, or None.
        """
        frozen = self._held()
        digests = bool(request.get("digests"))
        if _rights(frozen.status) != self._rights:
            raise OSError(1, "it runs with other rights than those that it was started with")
        contents = int(request["contents"])
        seen = dump.inspect(
            frozen, request.get("unlike"), family=True, at_home=True, contents=contents, digests=digests
        )
        if seen.refusals:
            return {"refusals": seen.refusals}
        image = self._image = dump.build(seen)
        packed = bytearray()
        dump.write(seen, image, packed.extend)
        if len(packed) > IMAGE_MAX:
            raise OSError(90, f"{len(packed)} bytes are too many for one image for all")
        summary = seen.summary()
        self._arguments = summary["cmdline"]
        places = _Offsets(image, len(packed))
        order = execorder.write(frozen, image, seen.externals, self._arguments)
        return {
            "refusals": [], "image": bytes(packed), "process": summary, "externals": seen.externals,
            "rank": _find_rank(frozen, image, places), "random": places.of(_random_address(image)),
            "files": execorder.files_of(image),
            "order": [order.table, order.keys, order.rank] if order is not None else None,
        }  # fmt: skip

    def end_template(self, request: Reply, fds: list[int]) -> Reply:
        """It is not needed any more: it exits with 0, which tells its parent that it was of use."""
        frozen = self._held()
        self._frozen = None
        end(frozen, 0, b"")
        note.erase()
        return {}

    def become_ghost_of(self, request: Reply, fds: list[int]) -> Reply:
        """Process `pid`, which waits since its `start`, becomes the ghost of what was made of the image: an exec.

        fds: ghost program, control socket. `env`: of the ghost.
        """
        if self._image is None:
            raise OSError(22, f"{ORDER}: there is no image")
        frozen = _freeze_waiting(request)
        try:
            if _rights(frozen.status) != self._rights:
                raise OSError(1, f"process {frozen.pid} has other rights than the program")
            passed = Passed(frozen, self._image, fds[0], fds[1])
            try:
                env = list(request["env"])
                ghost_exec(frozen, self._image, passed, env, arguments=self._arguments).run(lambda: None)
            except OSError:
                with contextlib.suppress(OSError):  # it has ended
                    passed.take_back()
                raise
        except BaseException:
            frozen.release()
            raise
        note.erase()
        return {}

    def refuse(self, request: Reply, fds: list[int]) -> Reply:
        """Process `pid`, which waits since its `start`, ends: `message` on its standard error, exit with `code`."""
        end(_freeze_waiting(request), int(request["code"]), bytes(request["message"]))
        note.erase()
        return {}

    def _held(self) -> Frozen:
        if self._frozen is None:
            raise OSError(22, f"{ORDER}: no template is held")
        return self._frozen

    def undo(self) -> bool:
        """The template ends, if it is still there. Returns whether it was."""
        pid = self._armed.pid if self._armed is not None else self._frozen.pid if self._frozen is not None else 0
        frozen, self._frozen, self._armed, self._image = self._frozen, None, None, None
        if pid:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                while os.WIFSTOPPED(ptrace.wait(pid)):
                    pass
        if frozen is not None:
            frozen.close()
        return bool(pid)


def _freeze_waiting(request: Reply) -> Frozen:
    # What its wait comes to nobody will learn: it turns into another program, or ends.
    frozen = freeze(int(request["pid"]), sleeps=False)
    try:
        if procfs.parse_stat(procfs.read(f"{frozen.live}/stat")).starttime != int(request["start"]):
            raise ProcessGone(frozen.pid)  # another one has its pid now
        if len(frozen.threads) > 1:
            raise OSError(95, f"process {frozen.pid} has several threads: it cannot become one program")
    except BaseException:
        frozen.release()
        raise
    return frozen


def _rights(status: dict[str, str]) -> list[str]:
    return [status[name] for name in _RIGHTS]


class _Offsets:
    """Where the bytes of an image's memory are, in its own bytes."""

    def __init__(self, image: img.Image, length: int) -> None:
        self._runs = img.runs_of(image)
        self._first = length - (img.HEADER_SIZE + 8) - image.total  # behind the pages comes END

    def of(self, address: int) -> int:
        """-1 where it has none."""
        at = self._first
        for start, length in self._runs:
            if start <= address < start + length:
                return at + address - start
            at += length
        return -1


def _find_rank(frozen: Frozen, image: img.Image, places: _Offsets) -> list[int] | None:
    environment = b"\0" + procfs.read(f"/proc/{frozen.pid}/environ")
    found = environment.find(b"\0" + RANK)
    if found < 0:
        return None
    first = found + 1 + len(RANK)
    width = environment.index(b"\0", first) - first
    offset = places.of(image.mm[8] + first - 1)  # env_start, see proc(5)
    # A value that is not on one page of what was sent is nowhere in it.
    return [offset, width] if offset >= 0 and places.of(image.mm[8] + first + width - 2) == offset + width - 1 else None


def _random_address(image: img.Image) -> int:
    pairs = struct.iter_unpack("<QQ", image.auxv[: len(image.auxv) // 16 * 16])
    return next((value for kind, value in pairs if kind == _AT_RANDOM), 0)


class Copies:
    """Operations on the machine where the processes are made."""

    def make(self, request: Reply, fds: list[int]) -> Reply:
        """Make process `pid` of an `image` that was changed by `patches`, and let it run.

        fds: as `externals` refers to them. `place`, `ppid`, `pgid`, `sid`, `front`, `terminal`: as for `prepare`.
        """
        externals = {int(key): fds[index] for key, index in request["externals"].items()}
        source = _Bytes(bytearray(request["image"]), request["patches"], int(request["random"]))
        image = img.read_head(source.take)
        pid, ppid, pgid, sid = (int(request[key]) for key in ("pid", "ppid", "pgid", "sid"))
        image.pid = image.threads[0].tid = pid
        target = place_child(
            int(request["place"]["init"]), pid, ppid, pgid, sid, 0, str(request["terminal"]), bool(request["front"])
        )
        builder = None
        try:
            place = request["place"]
            builder = Builder(target, image, externals, strict=int(place["init"]) if place.get("strict") else 0)
            builder.begin()
            builder.pages(source.fill)
            builder.complete()
            files = builder.take_files()
            hostpid = builder.resume()
        except BaseException:
            if builder is not None:
                builder.close()
            target.discard()
            raise
        builder.close()
        return {"hostpid": hostpid, "files": list(files), FDS: list(files.values())}


@dataclass(slots=True)
class _Bytes:
    """An image's bytes, as its readers want them."""

    _data: memoryview

    def __init__(self, data: bytearray, patches: list[list[Any]], random: int) -> None:
        if random >= 0:
            patches = [*patches, [random, os.urandom(_RANDOM_BYTES)]]
        for offset, text in patches:
            if not 0 <= offset <= len(data) - len(text):
                raise img.ImageError("a change lies outside of it")
            data[offset : offset + len(text)] = text
        self._data = memoryview(data)

    def take(self, length: int) -> bytes:
        part, self._data = self._data[:length], self._data[length:]
        return bytes(part)

    def fill(self, view: memoryview) -> None:
        if len(view) > len(self._data):
            raise img.ImageError("it ends too early")
        view[:], self._data = self._data[: len(view)], self._data[len(view) :]

"""What a machine is to the processes that come to it: its kernel's vDSO, its CPU, and whose files they find."""

from functools import cache, lru_cache
from typing import Any, Final

import msgpack

from engine import cpu, packing, vdso
from engine.descriptors.model import boot_id
from engine.freeze import Frozen
from engine.linux import procfs, ptrace

_PAUSES_S: Final = [0.00005 * 2 ** min(i, 6) for i in range(60)]  # a call takes 50 ns; a busy machine may give no CPU


@cache
def facts(bare: bool = False) -> bytes:
    """This machine's, for another's `unlike`.

    Args:
        bare: jobs find programs and libraries here, but no files of users.
    """
    packed: bytes = msgpack.packb([vdso.DIGEST, cpu.packed(), bare, packing.works(), boot_id()])
    return packed


@lru_cache(maxsize=4096)
def _unlike(source: bytes, target: bytes) -> dict[str, Any]:
    here, there = msgpack.unpackb(source), msgpack.unpackb(target)
    if here[:3] == there[:3]:
        return {}
    return {"kernel": here[0] != there[0], "cpu": there[1], "bare": there[2]}


def unlike(source: bytes, target: bytes) -> dict[str, Any]:
    """What the source's engine has to be told of a target that is not like it; empty between equals.

    Of a target that says nothing sensible, nothing: its engine will judge the image itself.
    """
    if source == target:
        return {}
    try:
        return _unlike(source, target)
    except (TypeError, ValueError, IndexError, msgpack.UnpackException):
        return {}


@lru_cache(maxsize=4096)
def is_bare(target: bytes) -> bool:
    """Whether jobs find programs and libraries on a machine, but no files of users; those are fetched when wanted."""
    try:
        return bool(msgpack.unpackb(target)[2])
    except (TypeError, ValueError, IndexError, msgpack.UnpackException):
        return False


@lru_cache(maxsize=4096)
def share_files(source: bytes, target: bytes) -> bool:
    """Whether device and inode mean the same file for jobs of both: one kernel, and its own file systems."""
    try:
        boots = {msgpack.unpackb(one)[4] for one in (source, target)}
    except (TypeError, ValueError, IndexError, msgpack.UnpackException):
        return False
    return len(boots) == 1 and not is_bare(source) and not is_bare(target)


@lru_cache(maxsize=4096)
def unpacks(target: bytes) -> bool:
    """Whether a machine takes pages that are packed (engine/packing.py)."""
    try:
        return bool(msgpack.unpackb(target)[3])
    except (TypeError, ValueError, IndexError, msgpack.UnpackException):
        return False


def obstacles(frozen: Frozen, there: dict[str, Any]) -> list[str]:
    """Why a frozen process cannot go to a machine that is `unlike` this one; empty when it can.

    A thread that is inside the vDSO is let run on until it is outside. Raises OSError.
    """
    found = _leave_vdso(frozen) if there.get("kernel") else []
    if frozen.fresh or not there.get("cpu"):
        return found
    in_use = 0
    for thread in frozen.threads:
        in_use |= cpu.used(ptrace.get_xstate(thread.tid))
    lacks = cpu.missing(cpu.here(), cpu.unpack(there["cpu"]), in_use)
    return [*found, cpu.sentence(lacks)] if lacks else found


def _leave_vdso(frozen: Frozen) -> list[str]:
    for pause in _PAUSES_S:
        code = next((v for v in procfs.parse_maps(procfs.read(f"{frozen.live}/maps")) if v.path == "[vdso]"), None)
        inside = [t for t in frozen.threads if code and code.start <= t.registers.pc < code.end]
        if not inside:
            return []
        if frozen.group_stopped:
            return ["it is stopped while it reads a clock: let it continue first"]
        frozen.run_on(inside, pause)
    return ["it reads a clock whenever it is looked at: try again"]

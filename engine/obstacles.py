"""Everything about a process as a whole that forbids moving it, in words."""

import os

from engine.freeze import Frozen
from engine.jobspace import PROGRAM
from engine.linux import nsfs, procfs
from engine.linux.procfs import Stat


def obstacles(frozen: Frozen, stat: Stat, family: bool = False) -> list[str]:
    """Sentences, empty when nothing is in the way (memory and descriptors are judged elsewhere).

    Args:
        family: the daemon looks after children that it can stay in touch with.
    """
    found = []
    status = frozen.status
    children = living_children(frozen)
    if family:
        children = [pid for pid in children if not may_stay(pid)]
    if children:
        listing = ", ".join(str(pid) for pid in children[:8]) + (" and more" if len(children) > 8 else "")
        found.append(f"it has living children ({listing})")
    if frozen.leader_exited:
        found.append("its main thread has ended before the others")
    if any(_rights(frozen.status_of(thread)) != _rights(status) for thread in frozen.threads[1:]):
        found.append("its threads have different rights")
    if status.get("Seccomp", "0") != "0":
        found.append("it runs under seccomp")
    if status.get("x86_Thread_features", ""):
        found.append("it uses a shadow stack")
    if frozen.threads[0].stopped and frozen.threads[0].registers.cs != 0x33:
        found.append("it is a 32-bit program")
    if os.readlink(f"{frozen.live}/root") != "/":
        found.append("it runs in a changed root directory")
    if status.get("Kthread", "0") == "1" or stat.mm[0] == 0 == stat.mm[2]:
        found.append("it is a kernel thread")
    return found


_RIGHTS = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")


def _rights(status: dict[str, str]) -> list[str]:
    return [status.get(key, "") for key in _RIGHTS]


def may_stay(pid: int) -> bool:
    """Whether a child can be parted from its parent: it is at home (in our own pid namespace), or its real self is
    elsewhere already and this only stands for it."""
    if len(nsfs.pids_by_status(pid)) == 1:
        return True
    try:
        return os.path.samefile(f"/proc/{pid}/exe", PROGRAM)
    except OSError:
        return nsfs.name_by_status(pid) == b"nodeinit"  # a zombie has no program any more


def living_children(frozen: Frozen) -> list[int]:
    """Pids of its children, zombies included (their status would be lost)."""
    return procfs.children(frozen.pid)


def children_of(frozen: Frozen) -> list[int]:
    """Its children, zombies included, by the pids of their own namespace."""
    found = (nsfs.pids_by_status(pid) for pid in living_children(frozen))
    return [pids[-1] for pids in found if pids]

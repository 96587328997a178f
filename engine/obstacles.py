"""Everything about a process as a whole that forbids moving it, in words."""

import contextlib
import os
from typing import Final

from engine import strict
from engine.freeze import Frozen
from engine.linux import kcmp, nsfs, procfs, ptrace
from engine.linux.kcmp import same_memory
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
        children = [pid for pid in children if not may_stay(frozen, pid)]
    if children:
        listing = ", ".join(str(pid) for pid in children[:8]) + (" and more" if len(children) > 8 else "")
        found.append(f"it has living children ({listing})")
    found += _shared_memory(frozen, stat)
    found += _halves(frozen, stat)
    if frozen.leader_exited:
        found.append("its main thread has ended before the others")
    if any(_rights(frozen.status_of(thread)) != _rights(status) for thread in frozen.threads[1:]):
        found.append("its threads have different rights")
    if status.get("Seccomp", "0") != "0" and not strict.is_ours(frozen):
        found.append("it runs under seccomp")
    if status.get("x86_Thread_features", ""):
        found.append("it uses a shadow stack")
    if any(thread.stopped and ptrace.has_dispatch(thread.tid) for thread in frozen.threads):
        found.append("its system calls are dispatched to itself (PR_SET_SYSCALL_USER_DISPATCH)")
    if frozen.threads[0].stopped and not frozen.threads[0].registers.is_native:
        found.append("it is a 32-bit program")
    if os.readlink(f"{frozen.live}/root") != "/":
        found.append("it runs in a changed root directory")
    found += _namespaces(frozen, stat)
    if status.get("Kthread", "0") == "1" or stat.mm[0] == 0 == stat.mm[2]:
        found.append("it is a kernel thread")
    return found


_NAMESPACES: Final = {
    "user": "user", "mnt": "mount", "net": "network", "uts": "host name (uts)", "ipc": "System V IPC",
    "cgroup": "cgroup", "time": "time",
}  # fmt: skip
_LEVELS: Final = 2  # of pid namespaces: this one's, and that of a node's jobs


def _namespaces(frozen: Frozen, stat: Stat) -> list[str]:
    """What it has of its own would be left behind, and the rights that it has there are none elsewhere."""
    reference = "self"
    levels = len(frozen.status["NSpid"].split())
    if levels > 1:  # pid 1 of it is nodeinit, which made the others with it
        init = _init_of(frozen, stat)
        if levels > _LEVELS or nsfs.name_by_status(init) != b"nodeinit":
            return ["it has a pid namespace of its own"]
        reference = str(init)
    return [
        f"it has a {words} namespace of its own"
        for name, words in _NAMESPACES.items()
        if _namespace(frozen.live, name) != _namespace(f"/proc/{reference}", name)
    ]


def _init_of(frozen: Frozen, stat: Stat) -> int:
    """The first process of its pid namespace, from which it descends."""
    pid, parent = frozen.pid, stat.ppid
    while parent and nsfs.pids_by_status(pid)[-1:] != [1]:
        pid = parent
        parent = procfs.parse_stat(procfs.read(procfs.own_file(pid, "stat"))).ppid
    return pid


def _namespace(folder: str, name: str) -> str:
    try:
        return os.readlink(f"{folder}/ns/{name}")
    except FileNotFoundError:  # this kernel has none of that kind
        return ""


def _shared_memory(frozen: Frozen, stat: Stat) -> list[str]:
    if same_memory(frozen.pid, stat.ppid):
        return [f"it runs in the memory of its parent {stat.ppid} (vfork) until it runs another program"]
    others = [child for child in living_children(frozen) if same_memory(frozen.pid, child)]
    return [f"its child {others[0]} runs in its memory"] if others else []


_HALVES: Final = ((kcmp.FILES, "descriptors"), (kcmp.FS, "a working directory and umask"))


def _halves(frozen: Frozen, stat: Stat) -> list[str]:
    """What threads usually have in common and processes have not, where it is the other way round."""
    found = []
    first, *others = (thread.tid for thread in frozen.threads)
    relatives = [stat.ppid, *living_children(frozen)]
    for what, words in _HALVES:
        if any(not kcmp.same(first, tid, what) for tid in others):
            found.append(f"one of its threads has {words} of its own (unshare(2))")
        for pid in relatives:
            with contextlib.suppress(OSError):  # gone, or outside of this pid namespace
                if kcmp.same(first, pid, what):
                    found.append(f"it has {words} in common with process {pid} (clone(2))")
    return found


_RIGHTS = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")


def _rights(status: dict[str, str]) -> list[str]:
    return [status.get(key, "") for key in _RIGHTS]


def may_stay(frozen: Frozen, pid: int) -> bool:
    """Whether a child can be parted from its parent: not the first process of a pid namespace of its own."""
    return len(nsfs.pids_by_status(pid)) in (0, len(frozen.status["NSpid"].split()))


def living_children(frozen: Frozen) -> list[int]:
    """Pids of its children, zombies included (their status would be lost)."""
    return procfs.children(frozen.pid)


def children_of(frozen: Frozen, living: bool = False) -> list[tuple[int, int, int, int]]:
    """Its children, zombies included unless they are to be `living`: pid, group, session and real uid.

    By the numbers of their own namespace.
    """
    found = []
    for child in living_children(frozen):
        with contextlib.suppress(OSError):
            status = procfs.parse_status(procfs.read(procfs.own_file(child, "status")))
            if living and status["State"][0] in "ZX":
                continue
            ids = [int(status[key].split()[-1]) for key in ("NSpid", "NSpgid", "NSsid")]
            found.append((ids[0], ids[1], ids[2], int(status["Uid"].split()[0])))
    return found

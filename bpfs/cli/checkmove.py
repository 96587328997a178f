"""`bpcluster check-move [--tree] PID`: what keeps a process from moving, and what its user can do about each."""

from __future__ import annotations

import re
import sys
from errno import ENOENT, ESRCH
from pathlib import Path
from typing import Final

from bpfs.errors import BpfsError

_ADVICE: Final = [
    (re.compile(pattern), advice)
    for pattern, advice in (
        (r"living children", "move it before it starts them, or when they have ended"),
        (r"which stays, has its fd", "move it with its children: echo \"PID tree\" > nodes/N/migrate"),
        (r"traced|debugger", "end the debugger (strace, gdb) or detach it"),
        (r"seccomp", "run it without the sandbox: a filter cannot be read back from the kernel"),
        (r"shares memory with process|another process has open",
         "stop the other process, or, where one descends from the other, echo \"PID tree\" > nodes/N/migrate for that"),
        (r"(memory|descriptor table|working directory) in common", "wait until it runs another program, or has ended"),
        (r"that it shares with process", "have each of them open its own"),
        (r"is on (the master|node)", "move that one there first, or home"),
        (r"vfork|runs in its memory", "wait until the child runs another program, or has ended"),
        (r"System V", "detach the segment (shmdt), or use a file or mmap(MAP_SHARED) instead"),
        (r"socket", "close it, or have it closed on the way: echo \"PID close\" > nodes/N/migrate"),
        (r"io_uring|io_setup", "run it without (most programs have a switch for that)"),
        (r"written and executed", "run it without that protection (systemd: MemoryDenyWriteExecute=)"),
        (r"USER_DISPATCH", "start it on the node: what catches its calls (Wine, a tracer) cannot be moved"),
        (r"message queue", "have it close the queue, or use a pipe or socketpair instead"),
        (r"userfaultfd", "run it without userfaultfd"),
        (r"secret", "run it without secret memory: nobody but itself can read that"),
        (r"hugetlb", "map them without a file (MAP_ANONYMOUS), in one piece where shared, or use transparent ones"),
        (r"maps the device|device memory|DAX", "it belongs to this machine's hardware: start it on the node"),
        (r"protection keys", "run it without memory protection keys"),
        (r"deleted file for sharing", "have it keep the file, or use anonymous memory"),
        (r"bytes that would have to travel", "have it write less to deleted files, or keep the files"),
        (r"32-bit", "use a 64-bit build"),
        (r"shadow stack", "run it without: GLIBC_TUNABLES=glibc.cpu.x86_shstk=off"),
        (r"namespace of its own", "start it outside of its container or sandbox (unshare, ip netns), or on the node"),
        (r"changed root", "start it on the node, in that root directory"),
        (r"main thread has ended", "have its main thread stay until the others have ended"),
        (r"different rights", "have all its threads run with the same user and capabilities"),
        (r"one of its threads has", "have its threads share them: no unshare(2) with CLONE_FS or CLONE_FILES"),
        (r"in common with process", "wait until that process has ended"),
        (r"CPU there lacks", "choose a node with such a CPU, or `onexec`, which lets the program choose there"),
        (r"not the same file|No such file", "put the same file on the node, or on a file system that both reach"),
        (r"uninterruptible", "wait: a device or a file system keeps it in a call that cannot be broken off"),
        (r"moving already", "wait until it has arrived"),
        (r"not all there", "nothing: a move waits until it is"),
        (r"kernel thread", "nothing: it is part of the kernel"),
        (r"performance counter|BPF|fanotify|namespace|Landlock|virtual (machine|processor)|of a kind",
         "close it, or have it closed on the way: echo \"PID close\" > nodes/N/migrate"),
    )
]  # fmt: skip


def advice(obstacle: str) -> str:
    """What the user can do about an obstacle of procs/PID/cantmove; empty where there is nothing to say."""
    return next((text for pattern, text in _ADVICE if pattern.search(obstacle)), "")


def check_move(mount: str, pid: int, tree: bool = False) -> int:
    """Prints the obstacles. Returns the exit code: 0 when there are none, else 1.

    Args:
        mount: the cluster's.
        pid: of the process.
        tree: it is to move with all that descend from it.

    Raises:
        BpfsError: no such process, or no cluster.
    """
    if not Path(mount, "status").exists():
        raise BpfsError(ENOENT, f"there is no cluster at {mount}")
    try:
        found = Path(mount, "procs", str(pid), "canttree" if tree else "cantmove").read_text().splitlines()
    except FileNotFoundError:
        raise BpfsError(ESRCH, f"there is no process {pid}") from None
    if not found:
        print(f"process {pid} can move" + (" with its tree" if tree else ""))
        return 0
    for obstacle in found:
        print(obstacle)
        if text := advice(obstacle):
            text = text.replace("PID close", "PID close tree") if tree else text
            print(f"    {text.replace('PID', str(pid))}")
    sys.stdout.flush()
    return 1

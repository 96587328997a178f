"""What outlives a daemon that is killed, whichever it is: jobs on nodes, and what becomes of a move."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.cluster.desk import PROMPT, desk
from tests.cluster.moving import check_counting, move, place, processes_of, shell, tell
from tests.cluster.virtual import VirtualCluster, children, wait_until

EARLY = ("freeze", "transfer")
LATE = ("depart", "resume")
STRAIGHT = ("held", "go", "follow")  # engines by themselves: the copy is whole, the source has ended, that is told
LEAVE, HOP, HOME = (-1, 0), (0, 1), (1, -1)

FAMILY = """
until_told() {{ until [ -e {flag} ]; do sleep 0.05; done; }}
read; seq 1 100000 | (until_told; cksum) & (until_told; exit 3) & p=$!; sleep 100 | sleep 100 & q=$!
read; wait $p; echo child $?; kill %3; wait $q; echo killed $?; wait; echo over; exit 9
"""


def check_family(it: VirtualCluster, flag: Path, restart: Callable[[], object]) -> None:
    """A shell with children and pipelines on node 0: their ghosts, their output, and their statuses."""
    with shell(FAMILY.format(flag=flag)) as process:
        move(it, process.pid, 0)
        tell(process, "go")
        wait_until(lambda: len(children(process.pid)) >= 5, "the children have ghosts")
        before = set(children(process.pid))
        restart()
        # One that the dead master had just had made is made anew, once its node has told of that child again.
        wait_until(lambda: set(children(process.pid)) == before, "they all have ghosts again")
        assert {place(it, pid) for pid in before} == {"0"}
        flag.touch()
        tell(process, "on")
        assert sorted(process.stdout.read().splitlines()) == ["2052179976 588895", "child 3", "killed 143", "over"]
        assert process.wait(60) == 9
        wait_until(lambda: not processes_of(it, process.pid), "nothing is left")


def check_terminal(it: VirtualCluster, end: Callable[[], object], wait_back: Callable[[], object]) -> None:
    """A job in the foreground, on node 0, is typed to while there is nobody; Ctrl-Z, fg and Ctrl-C work afterwards."""
    with desk() as at:
        at.type('sh -c \'echo be""gun; while read line; do echo "<$line>"; done\'\r')
        at.see("begun\r\n")
        job = at.foreground()
        move(it, job, 0)
        end()
        at.type("one\r")
        at.see("<one>\r\n")
        wait_back()
        at.type("two\r")
        at.see("<two>\r\n")
        at.type("\x1a")
        at.see("Stopped", PROMPT)
        assert it.read(f"procs/{job}/state") == "stopped\n"
        at.type("fg\r")
        at.see("\nsh -c")
        at.await_lines()
        wait_until(lambda: at.foreground() == job, "the job should have the terminal")
        at.type("three\r")
        at.see("<three>\r\n")
        at.type("\x03")
        at.await_prompt()
        assert at.status() == 130


def check_one_end(it: VirtualCluster, process: subprocess.Popen[str], may_die: bool) -> None:
    """A counter has counted on, or, where it may have, it was killed with its only copy; nothing is left of it."""
    out, _ = process.communicate("enough\n", timeout=60)
    if process.returncode == 7:
        check_counting(out.splitlines(), process.pid)
    else:
        assert may_die and process.returncode == -signal.SIGKILL
    wait_until(lambda: not processes_of(it, process.pid), "nothing is left")

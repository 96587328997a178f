"""A ring of processes that move as a tree; whoever ran twice, or not at all, would show."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.cluster.moving import echo, processes_of
from tests.cluster.virtual import VirtualCluster, wait_until

# A token goes round in a ring of three processes, through pipes and a socket pair; each adds to what all map. Whoever
# ran twice, or not at all, would show: the token is lost then, doubled, or counted wrongly. One more child has ended
# long ago, and is waited for at the end.
RING = """
import mmap, os, select, socket, struct, sys
shared = mmap.mmap(-1, 4096)
one, two = os.pipe(), os.pipe()
back, home = socket.socketpair()
def turn(read, write, at):
    number = struct.unpack("q", read(8))[0]
    shared[at:at + 8] = struct.pack("q", struct.unpack("q", shared[at:at + 8])[0] + 1)
    if number >= 0: number += 1
    write(struct.pack("q", number))
    return number
def child(read, write, at, code):
    pid = os.fork()
    if pid == 0:
        os.close(0)
        while turn(read, write, at) >= 0: pass
        os._exit(code)
    return pid
first = child(lambda n: os.read(one[0], n), lambda b: os.write(two[1], b), 8, 5)
second = child(lambda n: os.read(two[0], n), back.send, 16, 6)
dead = os.fork()
if dead == 0: os._exit(9)
os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
number = rounds = 0
while not select.select([0], [], [], 0)[0]:
    os.write(one[1], struct.pack("q", number))
    number = struct.unpack("q", home.recv(8))[0]
    rounds += 1
    if rounds % 100 == 0: print(rounds, os.getpid(), first, second, flush=True)
os.write(one[1], struct.pack("q", -1))
home.recv(8)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (first, second, dead)]
counts = struct.unpack("qq", shared[8:24])
print("end", number == 2 * rounds, counts == (rounds + 1, rounds + 1), *codes, flush=True)
sys.exit(7)
"""


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A program that has written its first line; it ends with all that descends from it."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None and process.stdout.readline()
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def move(it: VirtualCluster, pid: int, *nodes: int) -> None:
    """Moves a tree to these nodes, one after the other."""
    for node in nodes:
        done = echo(it, f"{pid} tree", f"nodes/{node}/migrate")
        assert done.returncode == 0, done.stderr + it.read(f"nodes/{node}/migrate")


def check_ring(it: VirtualCluster, process: subprocess.Popen[str], *pids: int) -> None:
    """It has gone round all the time, exactly once."""
    out, _ = process.communicate("\n", timeout=60)
    assert out is not None and out.splitlines()[-1] == "end True True 5 6 9"
    assert process.returncode == 7
    for pid in pids:
        wait_until(lambda pid=pid: not processes_of(it, pid), f"left over: {processes_of(it, pid)}")

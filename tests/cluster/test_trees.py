"""`PID tree`: a process moves with its descendants and all that they share, or none of them does."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress

import pytest

from engine.linux import procfs
from tests.cluster.held import Interrupted, holding, kill_workers
from tests.cluster.moving import echo, place, processes_of
from tests.cluster.virtual import TOP, children, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("open_gates")]

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

# All that multiprocessing has, while the main program sleeps now and then; until a line comes.
POOL = """
import multiprocessing, os, select, time
def add(todo, done, total):
    while (number := todo.get()) is not None:
        with total.get_lock(): total.value += number
        done.put((number, os.getppid()))
def square(number):
    time.sleep(0.005)
    return number * number
def squares(): return pool.map_async(square, range(40), chunksize=4)
if __name__ == "__main__":
    todo, done, total = multiprocessing.Queue(), multiprocessing.Queue(), multiprocessing.Value("q", 0)
    workers = [multiprocessing.Process(target=add, args=(todo, done, total)) for _ in range(2)]
    for worker in workers: worker.start()
    with multiprocessing.Pool(2) as pool:
        under_way = squares()
        print("ready", flush=True)
        count = 0
        while not select.select([0], [], [], 0.005)[0]:
            count += 1
            todo.put(count)
            if under_way.ready():
                assert under_way.get() == [number * number for number in range(40)]
                under_way = squares()
        assert under_way.get(60) == [number * number for number in range(40)]
    for worker in workers: todo.put(None)
    got = [done.get() for _ in range(count)]
    for worker in workers: worker.join()
    print(total.value == count * (count + 1) // 2, sorted(n for n, _ in got) == list(range(1, count + 1)),
          {pid for _, pid in got} == {os.getpid()}, [worker.exitcode for worker in workers])
"""

# Moves itself, with a part of it that reads on in the same file and writes to the same place.
SCRIPT = r"""
exec 9< $1/numbers
read -u 9 a
(read -u 9 b; until [ -e $1/away ]; do sleep 0.01; done; read -u 9 c; echo sub $b $c; exit 3) & sub=$!
echo "$$ tree" > $2/nodes/0/migrate || exit 1
cat $2/procs/$$/node $2/procs/$sub/node
touch $1/away
wait $sub; echo $?
read -u 9 d; echo main $a $d
echo "$$ tree" > $2/nodes/-1/migrate || exit 1
seq 3 | (cat; exit 6) | wc -l
echo ${PIPESTATUS[*]}
exit 9
"""


# Two children that wait for ever, and share memory with it.
PARENT = """
import mmap, os, signal, sys
shared = mmap.mmap(-1, 4096)
print(os.getpid(), flush=True)
for _ in range(2):
    if not os.fork(): signal.pause()
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def it(session_folder, gates):
    with holding(gates), cluster(session_folder / "trees", "--lease", "3", nodes=3) as made:
        yield made


@contextmanager
def running(*command: str):
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


def move(it, pid: int, *nodes: int) -> None:
    for node in nodes:
        done = echo(it, f"{pid} tree", f"nodes/{node}/migrate")
        assert done.returncode == 0, done.stderr + it.read(f"nodes/{node}/migrate")


def check_ring(it, process: subprocess.Popen[str], *pids: int) -> None:
    """It has gone round all the time, exactly once."""
    out, _ = process.communicate("\n", timeout=60)
    assert out.splitlines()[-1] == "end True True 5 6 9"
    assert process.returncode == 7
    for pid in pids:
        wait_until(lambda pid=pid: not processes_of(it, pid), f"left over: {processes_of(it, pid)}")


def test_a_ring_goes_on_turning(it):
    with running(sys.executable, "-c", RING) as ring:
        family = [ring.pid, *children(ring.pid)[:2]]
        for node in (0, 1, -1):
            move(it, ring.pid, node)
            assert {place(it, pid) for pid in family} == {str(node)}
            ring.stdout.readline()  # it turns there
        check_ring(it, ring, *family)


def test_multiprocessing(it, tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    with running(sys.executable, str(tmp_path / "pool.py")) as pool:
        move(it, pool.pid, 1, 2, -1)
        assert pool.communicate("\n", timeout=60)[0] == "True True True [0, 0]\n"
        assert pool.returncode == 0


def test_make(it, tmp_path):
    """Its last recipes wait until all moves are done."""
    rule = "%:\n\t@echo begin $*; seq $* | tail -1 > $@; sleep 0.1; cat $@; echo end $*\n"
    rule += "\t@[ $* -ge 118 ] && until [ -e moved ]; do sleep 0.02; done; true\n"
    (tmp_path / "Makefile").write_text(f"all: {' '.join(map(str, range(101, 125)))}\n{rule}")
    with running("make", "-j3", "-C", str(tmp_path)) as make:
        move(it, make.pid, 0, 1, -1)
        (tmp_path / "moved").touch()
        out = make.stdout.read()
        assert make.wait(60) == 0
    for number in range(101, 125):
        assert re.search(rf"^{number}$", out, re.M)
        assert (tmp_path / str(number)).read_text() == f"{number}\n"


@pytest.mark.parametrize("stdout", ["pipe", "file"])
def test_a_shell_moves_itself_with_all_its_jobs(it, tmp_path, stdout):
    (tmp_path / "numbers").write_text("1\n2\n3\n4\n")
    with open(tmp_path / "out", "w") as file:
        done = subprocess.run(
            ["bash", "-c", SCRIPT, "sh", str(tmp_path), str(it.mount)],
            stdin=subprocess.DEVNULL, stdout=file if stdout == "file" else subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, timeout=60, check=False,
        )  # fmt: skip
    out = done.stdout or (tmp_path / "out").read_text()
    assert out.split("\n") == ["0", "0", "sub 2 3", "3", "main 1 4", "3", "0 6 0", ""], done.stderr
    assert done.returncode == 9, done.stderr


def test_none_moves_where_one_cannot(it):
    """Memory that somebody outside of the tree has, too; words that go with nothing; a node that is not there."""
    with running(sys.executable, "-c", PARENT) as parent:
        wait_until(lambda: len(children(parent.pid)) == 2, "it should have two children")
        first, second = children(parent.pid)
        done = echo(it, f"{first} tree", "nodes/0/migrate")
        assert "Operation not supported" in done.stderr
        assert "it shares memory with process" in it.read("nodes/0/migrate").splitlines()[-1]
        assert echo(it, f"{parent.pid} onexec tree", "nodes/0/migrate").returncode == 1
        done = echo(it, f"{parent.pid} tree", "nodes/9/migrate")
        assert "No such file" in done.stderr
        move(it, parent.pid, 0)
        assert [place(it, pid) for pid in (parent.pid, first, second)] == ["0"] * 3
        parent.stdin.close()
        assert parent.wait(60) == 0


# Two children that have a socket each.
SOCKETS = """
import os, signal, socket, sys
ready = os.pipe()
print(os.getpid(), flush=True)
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    if not os.fork():
        one = socket.socket(type=kind)
        one.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM: one.listen()
        os.write(ready[1], b"1")
        signal.pause()
for _ in range(2): os.read(ready[0], 1)
print("ready", flush=True)
sys.stdin.read()
"""


def test_all_that_is_in_the_way_of_any_is_named(it):
    with running(sys.executable, "-c", SOCKETS) as parent:
        assert parent.stdout.readline() == "ready\n"
        first, second = children(parent.pid)
        done = echo(it, f"{parent.pid} tree", "nodes/0/migrate")
        assert "Operation not supported" in done.stderr
        said = it.read("nodes/0/migrate").splitlines()[-1]
        found = it.read(f"procs/{parent.pid}/canttree").splitlines()
        assert len(found) == 2 and said.endswith("; ".join(found))
        tcp, udp = sorted(found)
        assert re.fullmatch(rf"process {first}: fd \d+ is a listening TCP socket.*", tcp)
        assert re.fullmatch(rf"process {second}: fd \d+ is a UDP socket.*", udp)
        assert it.read(f"procs/{parent.pid}/cantmove") == ""  # alone it could
        wait_until(lambda: not any(procfs.is_stopped(pid) for pid in (parent.pid, first, second)), "they go on")
        command = [sys.executable, "-m", "bpfs.cli.bpcluster", "check-move", "--tree", "--mount", str(it.mount)]
        told = subprocess.run([*command, str(parent.pid)], capture_output=True, text=True, check=False, cwd=TOP)
        assert (told.returncode, told.stderr) == (1, "")
        assert told.stdout.splitlines()[::2] == found and told.stdout.count(f'"{parent.pid} close tree"') == 2
        done = echo(it, f"{parent.pid} close tree", "nodes/0/migrate")
        assert done.returncode == 0, done.stderr
        assert it.read(f"procs/{parent.pid}/canttree") == ""


ROUTES = {"leave": (-1, 0), "hop": (0, 1), "return": (1, -1)}


CASES = itertools.product(ROUTES, ["source", "destination"], ["inspect", "transfer", "agreed"])
SOME = [
    ("leave", "source", "transfer"), ("return", "destination", "transfer"), ("leave", "source", "agreed"),
    ("hop", "source", "agreed"), ("return", "source", "agreed"), ("leave", "destination", "agreed"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "side", "phase"), CASES if "BPFS_ROUNDS" in os.environ else SOME)
def test_engine_workers_die(it, gates, route, side, phase):
    """Before all have agreed nothing has happened; afterwards all have moved, or, with the only copies, ended."""
    with running(sys.executable, "-c", RING) as ring:
        family = [ring.pid, *children(ring.pid)[:2]]
        held = Interrupted(it, gates, ring, ROUTES[route], phase, "tree")
        at = getattr(held, side)
        kill_workers(it.pid("master") if at == -1 else it.slave(at))
        done = held.go_on()
        if phase == "agreed" and side == "destination":
            assert ring.wait(60) == -signal.SIGKILL
            return
        assert (done == 0) == (phase == "agreed"), held.said + it.log("master")[-3000:]
        where = held.destination if done == 0 else held.source
        wait_until(lambda: {place(it, pid) for pid in family} == {str(where)}, f"they should be at {where}")
        check_ring(it, ring, *family)


@pytest.mark.parametrize("phase", ["transfer", "agreed"])
def test_the_destination_dies(it, gates, phase):
    with running(sys.executable, "-c", RING) as ring:
        family = [ring.pid, *children(ring.pid)[:2]]
        held = Interrupted(it, gates, ring, (-1, 2), phase, "tree")
        os.kill(it.slave(2), signal.SIGKILL)
        assert held.go_on() != 0
        if phase == "agreed":
            assert ring.wait(60) == -signal.SIGKILL
        else:
            check_ring(it, ring, *family)
        it.wait_state(2, "up")

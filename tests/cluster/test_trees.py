"""`PID tree`: a process moves with its descendants and all that they share, or none of them does."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from engine.linux import procfs
from tests.cluster.moving import echo, place
from tests.cluster.ring import RING, check_ring, move, running
from tests.cluster.virtual import TOP, children, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

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
def it(session_folder):
    with cluster(session_folder / "trees", nodes=3) as made:
        yield made


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

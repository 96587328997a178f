"""Trees of every kind: on a terminal, of an ordinary user, on nodes without files, with all that processes share."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cluster.desk import PROMPT, Desk, desk
from tests.cluster.moving import echo, place
from tests.cluster.ring import move
from tests.cluster.virtual import children, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

USER = 1234
PYTHON = "/usr/bin/python3"  # one that everybody may run

# A child with a thread shares with its parent anonymous memory, a memfd, an eventfd, the offset of a file, pipes both
# ways and a socket pair; another child is stopped; a third is a zombie. A line is a round, in which all of it is used.
SHARING = """
import mmap, os, signal, socket, sys, threading, time
anonymous, memfd = mmap.mmap(-1, 4096), os.memfd_create("both")
os.ftruncate(memfd, 4096)
mapped = mmap.mmap(memfd, 4096)
event = os.eventfd(0, os.EFD_SEMAPHORE)
log = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600) if sys.argv[1:] else -1
there, back = os.pipe(), os.pipe()
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
def work():
    count = [0]
    def turn():
        while True:
            count[0] += 1
            time.sleep(0.002)
    threading.Thread(target=turn, daemon=True).start()
    while os.read(there[0], 1) == b"x":
        before = count[0]
        while count[0] == before: time.sleep(0.001)
        anonymous[0] += os.eventfd_read(event)
        mapped[0] += 2
        if log >= 0: os.write(log, b"child")
        theirs.send(b"packet")
        os.write(back[1], b"y")
    os._exit(5)
worker = os.fork()
if not worker: work()
stopped = os.fork()
if not stopped:
    while True: signal.pause()
dead = os.fork()
if not dead: os._exit(9)
os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
os.kill(stopped, signal.SIGSTOP)
os.waitid(os.P_PID, stopped, os.WSTOPPED)
print("ready", flush=True)
rounds = 0
for line in sys.stdin:
    rounds += 1
    os.eventfd_write(event, 1)
    os.write(there[1], b"x")
    assert os.read(back[0], 2) == b"y" and ours.recv(20) == b"packet"
    if log >= 0:
        os.write(log, b"parent")
        assert os.lseek(log, 0, os.SEEK_CUR) == 11 * rounds
    state = open(f"/proc/{stopped}/stat").read().rpartition(") ")[2][0]
    print(anonymous[0] == rounds, mapped[0] == 2 * rounds, state, os.getuid(), os.uname().nodename, flush=True)
os.kill(stopped, signal.SIGCONT)
os.waitid(os.P_PID, stopped, os.WCONTINUED)
os.kill(stopped, signal.SIGTERM)
os.write(there[1], b".")
print(*[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (worker, stopped, dead)], flush=True)
"""

# Memory of shmget(2): the parent has it attached twice, the child once, for reading. A line is a round: the parent
# counts on, and tells what the child reads and what is told of the segment (struct shmid64_ds: key, uid, mode, nattch).
SEGMENT = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmdt.argtypes = [ctypes.c_void_p]
key, mode, removed = int(sys.argv[1]), 0o640, sys.argv[2] == "removed"
segment = libc.shmget(key, 12345, 0o3000 | mode)
assert segment >= 0
def attach(flags):
    at = libc.shmat(segment, None, flags)
    assert at not in (None, 2**64 - 1)
    return at
one, two = attach(0), attach(0)
if removed: assert libc.shmctl(segment, 0, None) == 0
there, back = os.pipe(), os.pipe()
if not os.fork():
    for at in (one, two): assert libc.shmdt(at) == 0
    at = attach(0o10000)
    os.write(back[1], b"!")
    while os.read(there[0], 1) == b"x":
        os.write(back[1], ctypes.string_at(at + 8192, 8))
    os._exit(0)
ctypes.memmove(one + 8192, struct.pack("q", 0), 8)
assert os.read(back[0], 1) == b"!"
print("ready", segment, flush=True)
for line in sys.stdin:
    number = struct.unpack("q", ctypes.string_at(one + 8192, 8))[0] + 1
    ctypes.memmove(two + 8192, struct.pack("q", number), 8)
    os.write(there[1], b"x")
    status = ctypes.create_string_buffer(112)
    assert libc.shmctl(segment, 2, status) == 0
    said = struct.unpack("<iIIIII24xQ32xQ16x", status.raw)
    print(struct.unpack("q", os.read(back[0], 8))[0], said[0], said[1], oct(said[5]), said[6], said[7], flush=True)
assert libc.shmdt(two) == 0
os.write(there[1], b".")
os.wait()
if not removed: assert libc.shmctl(segment, 0, None) == 0
print("over", flush=True)
"""


@pytest.fixture(scope="module")
def it(session_folder):
    with cluster(session_folder / "kinds", nodes=2) as made:
        yield made


@pytest.fixture(scope="module")
def bare(session_folder):
    with cluster(session_folder / "bare", "--root", "empty", nodes=2) as made:
        yield made


@pytest.fixture
def at():
    with desk() as made:
        yield made


def check_sharing(made, uid: int, *log: str) -> None:
    with subprocess.Popen(
        [PYTHON, "-c", SHARING, *log], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        user=uid, group=uid, extra_groups=[], cwd="/",
    ) as parent:  # fmt: skip
        try:
            assert parent.stdout is not None and parent.stdin is not None and parent.stdout.readline() == "ready\n"
            family = [parent.pid, *children(parent.pid)]
            for node in (0, 1, -1, 1):
                done = echo(made, f"{parent.pid} tree", f"nodes/{node}/migrate")
                assert done.returncode == 0, done.stderr + made.read(f"nodes/{node}/migrate")
                for _ in range(2):
                    parent.stdin.write("\n")
                    parent.stdin.flush()
                    name = os.uname().nodename if node == -1 else f"n{node}"
                    assert parent.stdout.readline() == f"True True T {uid} {name}\n"
                assert [place(made, pid) for pid in family[:3]] == [str(node)] * 3
            out, _ = parent.communicate(timeout=60)
            assert (out, parent.returncode) == ("5 -15 9\n", 0)
        finally:
            subprocess.run(["kill", "-KILL", *map(str, [parent.pid, *children(parent.pid)])], check=False)


@pytest.mark.parametrize("uid", [0, USER])
def test_all_that_is_shared(it, session_folder, uid):
    folder = session_folder / f"log{uid}"
    folder.mkdir()
    os.chown(folder, uid, uid)
    check_sharing(it, uid, str(folder / "log"))
    assert (folder / "log").read_text() == "childparent" * 8


@pytest.mark.parametrize("uid", [0, USER])
def test_on_nodes_that_have_no_files(bare, uid):
    check_sharing(bare, uid)


def test_a_user_cannot_move_anothers_child(it):
    """One of the tree became somebody else: the user may not move it, so none moves; root may."""
    command = "import os, sys; print('ready', flush=True) if os.fork() else os.setuid(1235); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline()
        (child,) = children(parent.pid)

        def became() -> bool:
            with open(f"/proc/{child}/status") as status:
                return "\nUid:\t1235" in status.read()

        wait_until(became, "the child should be another user's")
        asked = f"echo {child} tree > {it.mount}/nodes/0/migrate; echo {parent.pid} tree > {it.mount}/nodes/0/migrate"
        done = subprocess.run(["bash", "-c", asked], user=USER, group=USER, capture_output=True, text=True, check=False)
        assert done.stderr.count("Permission denied") == 2
        assert [place(it, pid) for pid in (parent.pid, child)] == ["-1", "-1"]
        move(it, parent.pid, 0)
        assert [place(it, pid) for pid in (parent.pid, child)] == ["0", "0"]


def segments() -> list[int]:
    """Ids of System V shared memory of the master."""
    with open("/proc/sysvipc/shm") as file:
        return [int(line.split()[1]) for line in list(file)[1:]]


@pytest.mark.parametrize("uid", [0, USER])
@pytest.mark.parametrize("how", ["kept", "removed"])
def test_system_v_memory(it, how, uid):
    """By id and key, with all of its attachments, and gone where it was; also where it is marked to go."""
    key = 0 if how == "removed" else 0x62707600 + uid
    with subprocess.Popen(
        [PYTHON, "-c", SEGMENT, str(key), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        user=uid, group=uid, extra_groups=[], cwd="/",
    ) as parent:  # fmt: skip
        family = [parent.pid]
        try:
            assert parent.stdout is not None and parent.stdin is not None
            number = int(parent.stdout.readline().split()[1])
            family += children(parent.pid)
            mode = oct(0o640 | (0o1000 if how == "removed" else 0))
            for count, node in enumerate((-1, 0, 1, -1), 1):
                if count > 1:
                    move(it, parent.pid, node)
                parent.stdin.write("\n")
                parent.stdin.flush()
                assert (number in segments()) == (node == -1)
                assert parent.stdout.readline() == f"{count} {key} {uid} {mode} 12345 3\n"
            out, _ = parent.communicate(timeout=60)
            assert (out, parent.returncode) == ("over\n", 0)
            wait_until(lambda: number not in segments(), "it should be gone")
        finally:
            subprocess.run(["kill", "-KILL", *map(str, family)], check=False, stderr=subprocess.DEVNULL)


def test_system_v_memory_of_others_as_well_is_named(it):
    with subprocess.Popen(
        [sys.executable, "-c", SEGMENT, "0", "removed"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        try:
            assert parent.stdout is not None
            number = parent.stdout.readline().split()[1]
            (child,) = children(parent.pid)
            assert "Operation not supported" in echo(it, f"{child} tree", "nodes/0/migrate").stderr
            said = it.read("nodes/0/migrate").splitlines()[-1]
            assert f"process {child}: System V shared memory {number} is attached by another process as well" in said
        finally:
            subprocess.run(["kill", "-KILL", *map(str, [parent.pid, *children(parent.pid)])], check=False)


def hostname(at: Desk) -> str:
    return at.run("hostname").strip()


def test_an_interactive_shell_with_a_pipeline(it, at):
    """The pipeline has the terminal while all move; keys go to it, and then the shell goes on."""
    for node in (0, 1, -1):
        at.type("(echo be''gun; exec sleep 1000) | cat\r")
        at.see("begun\r\n")
        move(it, at.shell.pid, node)
        at.type("\x1a")
        at.see("Stopped", PROMPT)
        assert hostname(at) == (os.uname().nodename if node == -1 else f"n{node}")
        assert "Stopped" in at.run("jobs")
        at.type("fg\r")
        at.see("| cat")
        at.await_turn()
        at.type("\x03")
        at.see("^C", PROMPT)
        at.await_shell()
        assert at.status() == 130
        assert at.run("seq 3 | (cat; exit 6) | wc -l; echo ${PIPESTATUS[*]}") == "3\n0 6 0\n"
    at.type("exit 3\r")
    wait_until(lambda: at.shell.poll() is not None, "the shell should end")
    assert at.shell.returncode == 3


def test_a_shell_gets_the_terminal_when_its_pipeline_ends(it, at):
    """Which had the terminal when all moved: at home nobody but the shell's ghost can give it back."""
    at.type("(echo be''gun; exec sleep 1000) | cat\r")
    at.see("begun\r\n")
    move(it, at.shell.pid, 1)
    at.type("\x03")
    at.see("^C", PROMPT)
    at.await_shell()
    for _ in range(3):
        assert at.run("seq 3 | (cat; exit 6) | wc -l; echo ${PIPESTATUS[*]}") == "3\n0 6 0\n"
    assert hostname(at) == "n1"
    move(it, at.shell.pid, -1)
    assert hostname(at) == os.uname().nodename


def test_a_shell_with_a_stopped_and_a_running_job(it, at):
    """Both are in groups of their own; the shell has the terminal, is told of both, and continues the one."""
    at.run("sleep 1000 &")
    at.type("(echo be''gun; read line; echo got:$line:)\r")
    at.see("begun")
    at.type("\x1a")
    at.see("Stopped", PROMPT)
    for node in (1, 0, -1):
        move(it, at.shell.pid, node)
        shown = at.run("jobs")
        assert "Running" in shown and "Stopped" in shown
    move(it, at.shell.pid, 1)
    at.type("fg %2\r")
    at.see("\n", "echo got")
    at.await_turn()
    at.type("a line\r")
    at.see("got:a line:\r\n", PROMPT)
    assert at.run("kill %1; wait %1 2>&1; echo s=$?").endswith("s=143\n")

"""`bpcluster check-move`: every obstacle at once, and what can be done about each."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cluster.moving import echo, move
from tests.cluster.virtual import TOP, VirtualCluster, cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# A child, a listening socket; then a line to say that it has both.
LADEN = """
import ctypes, socket, sys
server = socket.create_server(("127.0.0.1", 0))
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget(0, 4096, 0o600)
assert libc.shmat(segment, None, 0) not in (None, 2**64 - 1)
libc.shmctl(segment, 0, None)  # IPC_RMID: it goes with this process
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def it(session_folder):
    with cluster(session_folder / "checkmove", "--config", "contentlimit 100K", nodes=1) as made:
        yield made


def check_move(it: VirtualCluster, pid: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bpfs.cli.bpcluster", "check-move", "--mount", str(it.mount), str(pid)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=TOP)


def test_all_that_is_in_the_way_with_advice(it):
    process = subprocess.Popen(
        [sys.executable, "-c", LADEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        done = check_move(it, process.pid)
        assert (done.returncode, done.stderr) == (1, "")
        first, advice, second, way_out = done.stdout.splitlines()
        assert "System V shared memory" in first and advice
        assert "a listening TCP socket" in second and f'echo "{process.pid} close"' in way_out
    finally:
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
        process.communicate()


# Gets all of that, and a child that has its standard output, too, when a line comes; and gives all away at another.
GETS_LADEN = """
import ctypes, os, signal, socket, sys
sys.stdin.readline()
server = socket.create_server(("127.0.0.1", 0))
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
libc.shmdt.argtypes = [ctypes.c_void_p]
segment = libc.shmget(0, 4096, 0o600)
address = libc.shmat(segment, None, 0)
libc.shmctl(segment, 0, None)
child = os.fork()
if not child:
    signal.pause()
print(child, flush=True)
sys.stdin.readline()
os.kill(child, signal.SIGKILL)
assert os.waitpid(child, 0)[1] == signal.SIGKILL and not libc.shmdt(address)
server.close()
print("free", flush=True)
sys.stdin.readline()
"""


def test_all_that_is_in_the_way_on_a_node_is_named_at_once(it):
    command = [sys.executable, "-c", GETS_LADEN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            move(it, process.pid, 0)
            print(file=process.stdin, flush=True)
            child = int(process.stdout.readline())
            lines = it.read(f"procs/{process.pid}/cantmove").splitlines()
            for words in (
                "System V shared memory",
                "listening TCP",
                f"process {child}, which stays, has its fd 1, too",
            ):
                assert sum(words in line for line in lines) == 1, lines
            advised = check_move(it, process.pid).stdout.splitlines()
            assert len(advised) == 2 * len(lines) and set(lines) <= {line.split(": ", 1)[-1] for line in advised}, (
                advised
            )
            print(file=process.stdin, flush=True)
            assert process.stdout.readline() == "free\n"
            assert it.read(f"procs/{process.pid}/cantmove") == ""
            move(it, process.pid, -1)
            process.communicate("\n", timeout=60)
            assert process.returncode == 0
        finally:
            process.kill()


def test_one_that_can_move(it):
    process = subprocess.Popen(["sleep", "600"])
    try:
        done = check_move(it, process.pid)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"process {process.pid} can move\n", "")
    finally:
        process.kill()
        process.wait()


# A deleted file, which gets smaller when a line comes, and is read when another comes.
NAMELESS = """
import sys, tempfile
file = tempfile.TemporaryFile()
file.write(bytes(100_000) + b"end" * 1000)
file.flush()
print("ready", flush=True)
sys.stdin.readline()
file.seek(0)
file.truncate(3)
print("less", flush=True)
sys.stdin.readline()
print(file.read(), flush=True)
"""


def test_the_limit_of_what_has_no_name_is_the_configuration_s(it):
    command = [sys.executable, "-c", NAMELESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdin is not None
            assert process.stdout.readline() == "ready\n"
            assert "103000 bytes that would have to travel (limit: 102400 more)" in check_move(it, process.pid).stdout
            for path, line in (("nodes/0/migrate", str(process.pid)), (f"procs/{process.pid}/checkpoint", "/tmp/none")):
                done = echo(it, line, path)
                assert done.returncode == 1 and "not supported" in done.stderr
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "less\n"
            move(it, process.pid, 0)
            move(it, process.pid, -1)
            out, _ = process.communicate("\n", timeout=60)
            assert out == f"{bytes(3)!r}\n"
        finally:
            process.kill()


@pytest.mark.parametrize(("pid", "code", "words"), [(0x3FFFFF, 1, "there is no process"), ("x", 2, "not a process id")])
def test_errors_are_one_sentence(it, pid, code, words):
    done = check_move(it, pid)
    assert done.returncode == code
    assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr

"""Processes of ordinary users: they come home as what they were, and nobody gets at the rights that this takes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.moving import echo, move, place
from tests.cluster.virtual import VirtualCluster, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

USER = 1234
PYTHON = "/usr/bin/python3"  # one that everybody may run

# Two threads count; what a line on stdin asks for is answered on stdout.
THREADS = """
import os, sys, threading, time
counts = [0, 0]
def count(n):
    while True:
        counts[n] += 1
        time.sleep(0.001)
for n in range(2):
    threading.Thread(target=count, args=(n,), daemon=True).start()
print("ready", flush=True)
for line in sys.stdin:
    before = list(counts)
    while not all(now > was for now, was in zip(counts, before)):
        time.sleep(0.001)
    print("counting", os.readlink("/proc/self/exe"), os.uname().nodename, flush=True)
"""

# What an attacker may try on a ghost of his own, or on its program, each with its outcome.
ATTACK = """
import ctypes, os, sys
ghost, program = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
def outcome(name, call):
    try:
        call()
        print(name, "worked")
    except OSError as error:
        print(name, error.strerror)
def raw(number, *arguments):
    if libc.syscall(number, *map(ctypes.c_long, arguments)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
outcome("path", lambda: os.execv(program, ["ghost"]))
outcome("look", lambda: os.listdir(os.path.dirname(program)))
outcome("exe", lambda: os.execv(f"/proc/{ghost}/exe", ["ghost"]))
outcome("open", lambda: os.open(f"/proc/{ghost}/exe", os.O_PATH))
outcome("fds", lambda: os.listdir(f"/proc/{ghost}/fd"))
outcome("memory", lambda: os.open(f"/proc/{ghost}/mem", os.O_RDWR))
outcome("maps", lambda: os.open(f"/proc/{ghost}/maps", os.O_RDONLY))
outcome("attach", lambda: raw(101, 16, int(ghost), 0, 0))
outcome("seize", lambda: raw(101, 0x4206, int(ghost), 0, 0))
outcome("take", lambda: raw(438, os.pidfd_open(int(ghost)), 0, 0))
"""


@pytest.fixture(scope="module")
def it(session_folder: Path) -> Iterator[VirtualCluster]:
    with cluster(session_folder / "users", nodes=2) as made:
        for node in (0, 1):
            made.write(f"nodes/{node}/mode", "111")
        yield made


@contextmanager
def started(*command: str, privileged: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A user's program that has said a line; `privileged`: it becomes the user by itself."""
    who = {} if privileged else {"user": USER, "group": USER, "extra_groups": [USER, 4321]}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **who
    )  # type: ignore[call-overload]
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def status(pid: int) -> dict[str, str]:
    """What /proc/PID/status says about rights."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    words = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {key: words[key] for key in words if key.startswith(("Cap", "Uid", "Gid", "Groups", "NoNew", "Threads"))}


def ask(process: subprocess.Popen[str]) -> list[str]:
    """The answer of `THREADS`."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().split()


def test_a_program_with_threads_comes_home_as_it_left(it: VirtualCluster) -> None:
    with started(PYTHON, "-c", THREADS) as process:
        exe, rights = os.readlink(f"/proc/{process.pid}/exe"), status(process.pid)
        for node in (0, -1, 1, 0, -1):
            move(it, process.pid, node)
            where = os.uname().nodename if node < 0 else f"n{node}"
            assert ask(process) == ["counting", exe, where]
        assert status(process.pid) == rights
        assert os.readlink(f"/proc/{process.pid}/exe") == exe
        # It is the user's to look into again.
        assert os.stat(f"/proc/{process.pid}/fd").st_uid == USER


@pytest.mark.parametrize("kind", ["ambient", "permitted"])
def test_capabilities_of_its_own_come_home_and_not_one_more(it: VirtualCluster, kind: str) -> None:
    keep = ["--inh-caps=+net_raw,+net_admin", "--ambient-caps=+net_raw,+net_admin"]
    command = ["setpriv", f"--reuid={USER}", "--clear-groups", *keep, PYTHON, "-c", THREADS]
    if kind == "permitted":  # as a daemon that kept some over its setuid
        become = (
            "import ctypes, os; libc = ctypes.CDLL(None); libc.prctl(8, 1, 0, 0, 0); os.setgroups([]);"
            f" os.setresgid({USER}, {USER}, {USER}); os.setresuid({USER}, {USER}, {USER});"
            " head = (ctypes.c_uint32 * 2)(0x20080522, 0); sets = (ctypes.c_uint32 * 6)(0, 1 << 13 | 1 << 12);"
            " assert libc.capset(head, sets) == 0;"
        )
        command = [PYTHON, "-c", become + THREADS]
    with started(*command, privileged=True) as process:
        rights = status(process.pid)
        assert int(rights["CapPrm"], 16) == 1 << 13 | 1 << 12
        for node in (1, -1, 0, -1):
            move(it, process.pid, node)
            assert ask(process)[0] == "counting"
        assert status(process.pid) == rights


def test_without_new_privileges_one_thread_comes_home(it: VirtualCluster) -> None:
    script = "import sys\nprint('ready', flush=True)\nfor line in sys.stdin: print('here', flush=True)"
    with started("setpriv", "--no-new-privs", PYTHON, "-c", script) as process:
        rights = status(process.pid)
        for node in (0, -1):
            move(it, process.pid, node)
            assert ask(process) == ["here"]
        assert status(process.pid) == rights


def test_without_new_privileges_several_threads_stay_and_run_on(it: VirtualCluster) -> None:
    with started("setpriv", "--no-new-privs", PYTHON, "-c", THREADS) as process:
        move(it, process.pid, 0)
        refused = echo(it, process.pid, "nodes/-1/migrate")
        assert refused.returncode != 0 and "Operation not permitted" in refused.stderr
        assert place(it, process.pid) == "0"
        assert ask(process)[2] == "n0"


def test_nobody_comes_by_the_rights_of_his_ghost(it: VirtualCluster) -> None:
    with started(PYTHON, "-c", THREADS) as process:
        move(it, process.pid, 0)
        program = os.readlink(f"/proc/{process.pid}/exe")
        assert os.stat(it.rundir.programs).st_mode & 0o777 == 0o700
        assert "security.capability" in os.listxattr(program)
        tried = subprocess.run(
            [PYTHON, "-c", ATTACK, str(process.pid), program], capture_output=True, text=True, user=USER, group=USER,
            extra_groups=[],
        )  # fmt: skip
        assert tried.stderr == ""
        outcomes = dict(line.split(" ", 1) for line in tried.stdout.splitlines())
        assert len(outcomes) == 10
        assert set(outcomes.values()) <= {"Permission denied", "Operation not permitted"}, outcomes
        # The process on the node has none of them.
        assert int(status(it_pid(it, process.pid))["CapPrm"], 16) == 0


def test_who_came_to_the_program_all_the_same_gets_nothing_of_it(it: VirtualCluster) -> None:
    # A descriptor that root hands to the user; his control socket is not root's.
    with started(PYTHON, "-c", THREADS) as process:
        move(it, process.pid, 0)
        program = os.open(os.readlink(f"/proc/{process.pid}/exe"), os.O_PATH)
        run = (
            "import os, socket\n"
            "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            "os.set_inheritable(b.fileno(), True)\n"
            "if os.fork() == 0:\n"
            f"    os.execve('/proc/self/fd/{program}', ['ghost'], {{'BPFS_CONTROL': str(b.fileno())}})\n"
            "b.close()\n"
            "print(a.recv(100), os.waitstatus_to_exitcode(os.wait()[1]))"
        )
        try:
            done = subprocess.run(
                [PYTHON, "-c", run], capture_output=True, text=True, user=USER, group=USER, pass_fds=[program],
                timeout=60,
            )  # fmt: skip
        finally:
            os.close(program)
        assert done.stdout == "b'' 2\n", done.stderr
        assert "started by bpmaster only" in done.stderr


def test_a_ghost_of_a_user_is_his(it: VirtualCluster) -> None:
    with started(PYTHON, "-c", THREADS) as process:
        move(it, process.pid, 1)
        shown = subprocess.run(
            ["ps", "-ww", "-o", "uid=,args=", "-p", str(process.pid)], capture_output=True, text=True, user=USER
        ).stdout
        assert shown.split()[0] == str(USER) and "threading.Thread" in shown
        stranger = subprocess.run(["bash", "-c", f"kill {process.pid}"], capture_output=True, text=True, user=USER + 1)
        assert "not permitted" in stranger.stderr
        subprocess.run(["bash", "-c", f"kill -USR1 {process.pid}"], check=True, user=USER, group=USER)
        assert process.wait(60) == -signal.SIGUSR1


def test_a_users_crash_on_a_node_is_a_crash_at_home(it: VirtualCluster) -> None:
    crash = "import os, sys, resource\nprint('ready', flush=True)\nsys.stdin.readline()\nos.abort()"
    limit = ["bash", "-c", 'ulimit -c unlimited; cd /tmp; exec "$@"', "bash", PYTHON, "-c", crash]
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("the hard limit of core files is 0 here")
    with started(*limit) as process:
        move(it, process.pid, 1)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        _, wait_status = os.waitpid(process.pid, 0)
        process.returncode = -1
        assert os.WTERMSIG(wait_status) == signal.SIGABRT
        assert os.WCOREDUMP(wait_status) == (Path("/proc/sys/kernel/core_pattern").read_text()[0] not in "|/")


def test_the_death_signal_of_a_users_process_outlasts_its_way(it: VirtualCluster) -> None:
    parent = (
        "import ctypes, os, signal, sys\n"
        "if os.fork() == 0:\n"
        "    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)\n"
        "    signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'orphaned\\n'), os._exit(0)))\n"
        "    print(os.getpid(), flush=True)\n"
        "    while True: signal.pause()\n"
        "sys.stdin.readline()"
    )
    process = subprocess.Popen(
        [PYTHON, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, user=USER, group=USER
    )
    assert process.stdin is not None and process.stdout is not None
    child = int(process.stdout.readline())
    move(it, child, 0)
    process.stdin.close()
    assert process.stdout.readline() == "orphaned\n"
    process.wait(60)
    process.stdout.close()
    wait_until(lambda: not Path(f"/proc/{child}").exists(), "the orphan should end")


def it_pid(it: VirtualCluster, pid: int) -> int:
    """The host pid of a process that is on a node."""
    for entry in [folder / "status" for folder in Path("/proc").iterdir() if folder.name.isdigit()]:
        try:
            words = dict(line.split(":\t", 1) for line in entry.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue
        inner = words.get("NSpid", "").split()
        if len(inner) > 1 and inner[-1] == str(pid) and words["Name"] != "placeholder":
            return int(entry.parent.name)
    raise AssertionError(f"process {pid} is on no node of {it.mount}")

"""Strict jobs: their signals reach everybody, and their children have ghosts before they know of them."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.moving import echo, move
from tests.cluster.virtual import TOP, VirtualCluster, children, cluster, comm, kill, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MASTER = -1
USER, OTHER = 12321, 12322  # nobody else's on this machine: what they signal is theirs
PYTHON = "/usr/bin/python3"  # one that everybody may run
USR1, RT = signal.SIGUSR1, 40

# Does what it is told, a line of Python after the other, and says what comes of it.
ACTOR = """
import ctypes, os, signal, struct, subprocess, sys, threading, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM, 40})
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    if libc.syscall(number, *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]) < 0:
        raise OSError(ctypes.get_errno(), "call")
    return 0
def stir(count):
    # Forks and signals, again and again, while a handler that restarts nothing interrupts that.
    got = []
    libc.siginterrupt(signal.SIGALRM, 1)
    signal.signal(signal.SIGALRM, lambda *_: got.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
    failed, done = [], 0
    while done < count or len(got) < count:
        for call in (lambda: os.kill(os.getpid(), 0), lambda: os.fork() or os._exit(0)):
            try:
                child = call()
                done += 1
                if child:
                    os.waitpid(child, 0)
            except InterruptedError:
                pass # before callwatch has taken the call, which takes some microseconds
            except OSError as error:
                failed.append(error.errno)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return failed
def ran(*words):
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout
def threads(count):
    found = [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(count)]
    return len([thread.join() for thread in found if not thread.start()])
def sandboxed():
    # Under a filter of its own, as a browser's process is.
    program = ctypes.create_string_buffer(bytes.fromhex("06000000" "0000ff7f"))
    head = ctypes.create_string_buffer(struct.pack("QQ", 1, ctypes.addressof(program)))
    return libc.prctl(38, 1, 0, 0, 0), libc.prctl(22, 2, head)
def heard(seconds=20):
    info = signal.sigtimedwait({signal.SIGUSR1, signal.SIGTERM, 40}, seconds)
    return info and (info.si_signo, info.si_pid, info.si_uid, info.si_code)
def line(pid, name):
    return next(l.split()[1] for l in open(f"/proc/{pid}/status") if l.startswith(name + ":"))
def forked(count):
    unseen = 0
    for turn in range(count):
        pid = os.fork()
        here = os.path.exists(f"{tree}/procs/{pid or os.getpid()}/node")
        if pid == 0:
            while turn % 2: # until its parent has looked: an ended process is seen no more
                time.sleep(9)
            os._exit(0 if here else 1)
        if turn % 2:
            os.kill(pid, 9)
            unseen += not here
        unseen += os.waitpid(pid, 0)[1] != turn % 2 * 9
    return unseen
tree = sys.argv[1]
print("ready", flush=True)
for text in sys.stdin:
    try:
        print(repr(eval(text)), flush=True)
    except OSError as error:
        print(repr(("error", error.errno)), flush=True)
"""


class Actor:
    """One such program."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def begin(self, text: str) -> None:
        """Has it do something; `answer` tells what came of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        return ast.literal_eval(self._process.stdout.readline())

    def do(self, text: str) -> Any:
        self.begin(text)
        return self.answer()

    def heard_from(self, sender: Actor, signo: int = USR1, code: int = 0, uid: int = 0) -> bool:
        found = self.do("heard()")
        assert found == (signo, sender.pid, uid, code)
        return True


@contextmanager
def actor(it: VirtualCluster, node: int = MASTER, how: str = "strict", **more: Any) -> Iterator[Actor]:
    """One that runs on a node; `more` as for Popen."""
    process = subprocess.Popen(
        [PYTHON, "-c", ACTOR, str(it.mount)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        if node != MASTER:
            done = echo(it, f"{process.pid} {how}", f"nodes/{node}/migrate")
            assert done.returncode == 0, done.stderr + it.read(f"nodes/{node}/migrate")
        yield Actor(process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def it(session_folder: Path) -> Iterator[VirtualCluster]:
    """A cluster whose node 2 is strict."""
    with cluster(session_folder / "strict", "--config", "strict 2", nodes=3) as up:
        yield up


def seccomp(it: VirtualCluster, pid: int) -> str:
    return next(line.split()[1] for line in it.read(f"procs/{pid}/status").splitlines() if line.startswith("Seccomp:"))


def callwatch(it: VirtualCluster, node: int) -> list[int]:
    """Those of a node."""
    return [pid for pid in children(it.slave(node)) if comm(pid) == "bpfs-callwatch"]


def test_signals_of_every_kind_reach_whom_they_are_for(it: VirtualCluster) -> None:
    with actor(it, 0) as sender, actor(it, 1, "") as there, actor(it) as home, actor(it, 0, "") as beside:
        for receiver in (there, home, beside):
            pid = receiver.pid
            assert sender.do(f"os.kill({pid}, 0)") is None
            assert sender.do(f"os.kill({pid}, {USR1})") is None
            assert receiver.heard_from(sender)
            assert sender.do(f"call(200, {pid}, {USR1})") == 0  # tkill
            assert receiver.heard_from(sender)
            assert sender.do(f"call(234, {pid}, {pid}, {USR1})") == 0  # tgkill
            assert receiver.heard_from(sender)
            assert sender.do(f"libc.sigqueue({pid}, {RT}, 7)") == 0
            assert receiver.heard_from(sender, RT, -1)
        assert sender.do(f"os.kill({2**22 - 2}, 0)") == ("error", 3)
        assert sender.do(f"os.kill({there.pid}, 99)") == ("error", 22)
        assert sender.do("signal.raise_signal(signal.SIGUSR1)") is None
        assert sender.heard_from(sender)


def test_a_child_has_its_ghost_before_fork_returns(it: VirtualCluster) -> None:
    with actor(it, 1) as job:
        assert it.read(f"procs/{job.pid}/strict") == "yes\n"
        assert seccomp(it, job.pid) == "2"
        assert job.do("forked(30)") == 0
        assert job.do("os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)[1]") == 0
        script = "echo a | cat; (sleep 0.01 & wait); exit 3"
        assert job.do(f"ran('bash', '-c', {script!r})") == (3, b"a\n")
        assert job.do("threads(20)") == 20
        for _ in range(5):
            child = job.do("os.fork() or [signal.pause(), os._exit(0)]")
            assert Path(f"/proc/{child}/comm").read_text().startswith("python3")
            assert it.read(f"procs/{child}/strict") == "yes\n"
            assert job.do(f"os.kill({child}, 9) or os.waitpid({child}, 0)[1]") == 9


def test_what_comes_home_or_hops_leaves_its_filter_behind(it: VirtualCluster) -> None:
    with actor(it, 0, "") as job:
        assert (it.read(f"procs/{job.pid}/strict"), job.do("line('self', 'Seccomp')")) == ("no\n", "0")
        for node, word, filters in ((2, "yes", "1"), (1, "no", "0"), (MASTER, "no", "0")):
            move(it, job.pid, node)
            assert it.read(f"procs/{job.pid}/strict") == f"{word}\n"
            assert job.do("line('self', 'Seccomp_filters')") == filters
        assert echo(it, f"{job.pid} strict", "nodes/0/migrate").returncode == 0
        for node, filters in ((1, "1"), (2, "1"), (0, "1"), (MASTER, "0")):
            move(it, job.pid, node)
            assert job.do("line('self', 'Seccomp_filters')") == filters
        assert Path(f"/proc/{job.pid}/status").read_text().count("Seccomp:\t0\n") == 1


def test_onexec_takes_the_word(it: VirtualCluster) -> None:
    script = f"echo $$ onexec strict > {it.mount}/nodes/1/migrate; exec grep ^Seccomp: /proc/self/status"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("Seccomp:\t2\n", "", 0)


def test_the_senders_rights_count_as_on_one_machine(it: VirtualCluster) -> None:
    mine: dict[str, Any] = {"user": USER, "group": USER}
    with (
        actor(it, 1, **mine) as sender,
        actor(it, 0, "", **mine) as there,
        actor(it, **mine) as home,
        actor(it, 1, "", **mine) as beside,
        actor(it, 2, user=OTHER) as others,
        actor(it, 0) as roots,
        actor(it) as here,
    ):
        for stranger in (others, roots, here):
            assert sender.do(f"os.kill({stranger.pid}, {USR1})") == ("error", 1)
            assert sender.do(f"os.kill({stranger.pid}, 0)") == ("error", 1)
        assert sender.do(f"os.kill(1, {USR1})") == ("error", 1)
        assert sender.do(f"os.kill(-1, {USR1})") is None
        for own in (there, home, beside):
            assert own.heard_from(sender, uid=USER)
        for stranger in (others, roots, here, sender, there, home, beside):
            assert stranger.do("heard(0)") is None
        # An empty group, and one of others.
        assert sender.do(f"os.kill(-{home.pid}, {USR1})") == ("error", 3)


def test_a_group_is_signalled_wherever_its_members_are(it: VirtualCluster) -> None:
    with actor(it, 0, process_group=0) as leader, ExitStack() as stack:
        there, home, beside = (
            stack.enter_context(actor(it, node, "", process_group=leader.pid)) for node in (1, MASTER, 0)
        )
        stranger = stack.enter_context(actor(it, 2))
        members = (leader, there, home, beside)
        assert leader.do(f"os.killpg({leader.pid}, {USR1})") is None
        for member in members:
            assert member.heard_from(leader)
        assert leader.do(f"os.kill(0, {USR1})") is None
        for member in members:
            assert member.heard_from(leader)
        assert [one.do("heard(0.05)") for one in (*members, stranger)] == [None] * 5
        assert leader.do(f"os.killpg({leader.pid}, 0)") is None
        assert stranger.do(f"os.killpg({leader.pid}, {signal.SIGSTOP})") is None
        wait_until(lambda: all(state(one.pid) == "T" for one in members), "all of the group should stop")
        assert stranger.do(f"os.killpg({leader.pid}, {signal.SIGCONT})") is None
        assert [one.do("1") for one in members] == [1] * 4
        assert stranger.do(f"os.killpg({leader.pid}, {signal.SIGKILL})") is None
        wait_until(lambda: not any(Path(f"/proc/{one.pid}/fd/0").exists() for one in members), "all should end")


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_whoever_is_interrupted_or_loses_callwatch_goes_on(it: VirtualCluster) -> None:
    with actor(it, 0) as job, actor(it, 1, "") as other:
        assert job.do("stir(20)") == []
        for _ in range(3):
            job.begin("stir(20)")
            (before,) = callwatch(it, 0)
            kill(before)
            assert job.answer() == []
            wait_until(lambda gone=before: callwatch(it, 0) not in ([], [gone]), "callwatch should be there again")
        assert job.do(f"os.kill({other.pid}, {USR1})") is None
        assert other.heard_from(job)
        assert job.do("forked(4)") == 0


def test_a_job_may_have_a_filter_of_its_own_and_stays_then(it: VirtualCluster) -> None:
    with actor(it, 0) as job:
        assert it.read(f"procs/{job.pid}/cantmove") == ""
        assert job.do("sandboxed()") == (0, 0)
        assert job.do("line('self', 'Seccomp_filters')") == "2"
        assert job.do("forked(2)") == 0
        assert it.read(f"procs/{job.pid}/cantmove") == "it runs under seccomp\n"
        assert echo(it, job.pid, "nodes/1/migrate").returncode == 1
        assert job.do("1") == 1


def test_set_user_id_programs_are_what_they_were(it: VirtualCluster, session_folder: Path) -> None:
    program = session_folder / "strict-id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    with actor(it, 1, user=USER, group=USER, extra_groups=()) as job:
        assert job.do("line('self', 'NoNewPrivs')") == "0"
        assert job.do(f"ran({str(program)!r}, '-u')") == (0, b"0\n")
        assert job.do("forked(4)") == 0
        for node in (0, MASTER):
            move(it, job.pid, node)
            assert job.do("os.getuid()") == USER
        assert job.do("line('self', 'Seccomp')") == "0"


def test_bad_words(it: VirtualCluster) -> None:
    for words in ("strikt", "strict strict", "onexec close strict"):
        done = echo(it, f"1 {words}", "nodes/0/migrate")
        assert (done.returncode, "Invalid argument" in done.stderr) == (1, True)


def test_what_many_nodes_start_at_once_is_strict_where_they_are(it: VirtualCluster) -> None:
    environment = {**os.environ, "BPFS": str(it.mount)}
    program = [str(TOP / "bpfs/bin/bpsh"), "-p", "0-2", "grep", "^Seccomp:", "/proc/self/status"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert sorted(done.stdout.splitlines()) == [f"  {node}: Seccomp:\t{2 * (node == 2)}" for node in range(3)]
    assert done.stderr == ""


def test_a_relatives_pidfd_is_as_good_as_its_number(it: VirtualCluster) -> None:
    with actor(it, 0) as job:
        for node in (MASTER, 1):
            child = job.do("os.fork() or [os.closerange(0, 3), signal.pause()]")
            wait_until(lambda child=child: not it.read(f"procs/{child}/cantmove"), "it closes its files, and can move")
            move(it, child, node)
            handle = job.do(f"os.pidfd_open({child})")
            assert job.do(f"signal.pidfd_send_signal({handle}, 0)") is None
            assert job.do(f"signal.pidfd_send_signal({handle}, {signal.SIGKILL})") is None
            assert job.do(f"os.close({handle}) or os.waitpid({child}, 0)[1]") == signal.SIGKILL

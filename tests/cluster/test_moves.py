"""The main job: real processes moved by echo from the master to nodes and home again, seen from outside and inside."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bpfs.pidspace import BLOCK_BASE
from engine.linux import nsfs
from tests.cluster.moving import check_counting, counting, echo, finish, move, place, processes_of
from tests.cluster.virtual import children, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def it(session_folder):
    # Not pytest's own folder, which ordinary users may not enter.
    with cluster(session_folder / "moves", nodes=3) as made:
        yield made


def holds(pid: int, end: str) -> bool:
    """Whether a process has a file open whose path ends like this."""
    try:
        return any(os.readlink(fd).endswith(end) for fd in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False  # it has just closed one


@pytest.fixture
def counter():
    with counting() as process:
        yield process


@pytest.mark.parametrize("when", ["at home", "away", "a moment before"])
@pytest.mark.parametrize("route", [[1, -1, 0], [2, 0, -1]], ids=str)
def test_a_stopped_process_stays_stopped_wherever_it_goes(it, counter, route, when):
    if when != "at home":
        move(it, counter.pid, 1 - route[0] % 2)
    os.kill(counter.pid, signal.SIGSTOP)
    if when == "away":
        wait_until(lambda: it.read(f"procs/{counter.pid}/state") == "stopped\n", "its node should have stopped it")
    for node in route:
        move(it, counter.pid, node)
        assert place(it, counter.pid) == str(node)
        for which in (f"/proc/{counter.pid}/stat", f"{it.mount}/procs/{counter.pid}/stat"):
            # Of one that was stopped a moment ago its node may not have heard.
            wait_until(lambda which=which: Path(which).read_text().rpartition(")")[2].split()[0] == "T", which)
    assert counter.poll() is None
    os.kill(counter.pid, signal.SIGCONT)
    check_counting(finish(counter), counter.pid)


@pytest.mark.parametrize("route", [[1], [1, -1], [0, 2], [0, 1, 2, -1], [2, -1, 2, -1]], ids=str)
def test_a_process_counts_on_wherever_it_goes(it, counter, route):
    for node in route:
        move(it, counter.pid, node)
        assert place(it, counter.pid) == str(node)
    check_counting(finish(counter), counter.pid)


def test_the_kernels_own_files_come_from_the_node(it, counter):
    proc = it.mount / "procs" / str(counter.pid)
    move(it, counter.pid, 1)
    stat = (proc / "stat").read_text()
    assert stat.split()[0] == str(counter.pid)
    assert stat.rpartition(")")[2].split()[1] == str(os.getpid()), "its parent is the cluster's"
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
    assert status["Pid"] == str(counter.pid)
    assert int(status["VmRSS"].split()[0]) > 1000, "a ghost has less"
    assert len((proc / "statm").read_text().split()) == 7
    assert f"PATH={os.environ['PATH']}".encode() in (proc / "environ").read_bytes().split(b"\0")
    assert "[stack]" in (proc / "maps").read_text()
    assert "Pss:" in (proc / "smaps_rollup").read_text()
    assert "rchar:" in (proc / "io").read_text()
    assert "Max open files" in (proc / "limits").read_text()
    assert stat.rpartition(")")[2].split()[25] == "0", "the start of its stack is nobody's business"
    (proc / "wchan").read_text()
    assert [(proc / name).stat().st_mode & 0o777 for name in ("stat", "environ", "wchan")] == [0o444, 0o400, 0o400]
    move(it, counter.pid, -1)
    assert (proc / "maps").read_text() == Path(f"/proc/{counter.pid}/maps").read_text()
    check_counting(finish(counter), counter.pid)


def test_ps_and_procs_show_it_all_the_time(it, counter):
    move(it, counter.pid, 1)
    shown = subprocess.run(
        ["ps", "-ww", "-o", "pid=,ppid=,args=", "-p", str(counter.pid)], capture_output=True, text=True
    ).stdout
    assert shown.split()[:2] == [str(counter.pid), str(os.getpid())]
    assert "select.select" in shown
    assert str(counter.pid) in os.listdir(it.mount / "procs")
    assert str(counter.pid) in os.listdir(it.mount / "nodes/1/procs")
    assert os.path.samefile(it.mount / f"nodes/1/procs/{counter.pid}", it.mount / f"procs/{counter.pid}")
    assert it.read(f"procs/{counter.pid}/state") == "running\n"
    assert b"select.select" in (it.mount / f"procs/{counter.pid}/cmdline").read_bytes()
    assert [line.split()[0] for line in it.read(f"procs/{counter.pid}/history").splitlines()] == ["-1", "1"]
    usage = dict(line.split() for line in it.read(f"procs/{counter.pid}/rusage").splitlines())
    assert int(usage["rss_kb"]) > 1000 and float(usage["utime_s"]) >= 0
    move(it, counter.pid, -1)
    assert str(counter.pid) not in os.listdir(it.mount / "procs")
    check_counting(finish(counter), counter.pid)


def test_the_result_is_that_of_a_run_that_never_moved(it, tmp_path):
    data = b"".join(hashlib.sha256(str(n).encode()).digest() for n in range(60_000))
    source = tmp_path / "data"
    source.write_bytes(data)
    wanted = subprocess.run(["xz", "-6", "-c", source], capture_output=True, check=True).stdout
    with open(tmp_path / "out", "wb") as out:
        process = subprocess.Popen(["xz", "-6", "-c", source], stdout=out)
    for node in (2, 0, -1, 1):
        done = echo(it, process.pid, f"nodes/{node}/migrate")
        if done.returncode:
            break  # it was quicker than we
    assert process.wait(60) == 0
    assert (tmp_path / "out").read_bytes() == wanted


def test_signals_reach_it_and_its_death_comes_back(it, counter):
    move(it, counter.pid, 1)
    counter.send_signal(signal.SIGTERM)
    assert counter.wait(60) == -signal.SIGTERM


def test_kill_9_of_the_ghost_kills_the_process(it, counter):
    move(it, counter.pid, 1)
    counter.kill()
    assert counter.wait(60) == -signal.SIGKILL
    wait_until(lambda: not (it.mount / f"procs/{counter.pid}").exists(), "the process should be gone")


def test_stop_and_continue_are_seen_by_the_parent(it, counter):
    move(it, counter.pid, 2)
    counter.send_signal(signal.SIGTSTP)
    assert os.WIFSTOPPED(os.waitpid(counter.pid, os.WUNTRACED)[1])
    assert it.read(f"procs/{counter.pid}/state") == "stopped\n"
    counter.send_signal(signal.SIGCONT)
    assert os.WIFCONTINUED(os.waitpid(counter.pid, os.WCONTINUED)[1])
    wait_until(lambda: it.read(f"procs/{counter.pid}/state") == "running\n", "it should run")
    check_counting(finish(counter), counter.pid)


def test_sigstop_of_the_ghost_stops_the_process(it, counter):
    move(it, counter.pid, 2)
    counter.send_signal(signal.SIGSTOP)
    wait_until(lambda: it.read(f"procs/{counter.pid}/state") == "stopped\n", "it should stop")
    counter.send_signal(signal.SIGCONT)
    wait_until(lambda: it.read(f"procs/{counter.pid}/state") == "running\n", "it should run")
    check_counting(finish(counter), counter.pid)


def test_signal_file(it, counter):
    move(it, counter.pid, 0)
    assert echo(it, "banana", f"procs/{counter.pid}/signal").returncode != 0
    it.write(f"procs/{counter.pid}/signal", "SIGINT")
    counter.wait(60)
    assert counter.returncode in (1, -signal.SIGINT)


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_a_shell_moves_itself(it, shell):
    script = f"echo $$ > {it.mount}/nodes/1/migrate; hostname; cat {it.mount}/self/state; ls -d /bin | wc -l; exit 5"
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("n1\nup\n1\n", "", 5)


def test_a_shell_goes_and_comes_home(it):
    m = it.mount
    script = "; ".join(f"echo $$ > {m}/nodes/{node}/migrate; hostname" for node in (2, -1, 0))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.split(), done.stderr) == (["n2", os.uname().nodename, "n0"], "")


def test_a_shell_that_has_moved_finds_itself_where_it_is(it):
    # At once, and by itself: the master may hear of it later than the shell knows.
    m = it.mount
    script = f"""for turn in 1 2 3 4 5 6 7 8 9 10; do
        for node in 2 0 -1; do
            echo $$ > {m}/nodes/$node/migrate
            read place < {m}/procs/$$/node
            read state < {m}/procs/$$/state
            while read line; do last=$line; done < {m}/nodes/$node/migrate
            set -- $last
            echo $node:$place:$state:$(($1 - $$)):$2
        done
    done"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout.split(), done.stderr) == ([f"{n}:{n}:running:0:ok" for n in (2, 0, -1)] * 10, "")


def test_a_shell_that_cannot_go_says_why_and_stays(it):
    script = f"echo $$ > {it.mount}/nodes/77/migrate; hostname"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == os.uname().nodename
    assert "No such file or directory" in done.stderr


MISTAKES = [
    ("banana", "Invalid argument"),
    ("", "Invalid argument"),
    ("12 34", "Invalid argument"),
    ("99999999999999999999999", "Invalid argument"),
    ("-5", "Invalid argument"),
    ("4190000", "No such process"),
    ("1\n2", "Invalid argument"),
]


@pytest.mark.parametrize(("text", "error"), MISTAKES, ids=[repr(text) for text, _ in MISTAKES])
def test_mistakes_get_the_right_error(it, text, error):
    done = echo(it, text, "nodes/1/migrate")
    assert done.returncode != 0 and error in done.stderr


def test_a_down_node_takes_nobody(it, counter):
    it.write("nodes/2/state", "down")
    try:
        done = echo(it, counter.pid, "nodes/2/migrate")
        assert done.returncode != 0 and "Host is down" in done.stderr
    finally:
        it.write("nodes/2/state", "up")
    check_counting(finish(counter), counter.pid)


def test_what_cannot_move_is_refused_in_words_and_never_notices(it):
    script = (
        "import socket, sys; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print('on', flush=True); "
        "sys.stdin.readline(); print('off', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "on\n"
        done = echo(it, process.pid, "nodes/1/migrate")
        assert "Operation not supported" in done.stderr
        assert "TCP" in it.read("nodes/1/migrate").splitlines()[-1]
        assert "TCP" in it.read(f"procs/{process.pid}/cantmove")
        assert process.communicate("\n", timeout=60)[0] == "off\n"


def test_moving_to_where_it_is_is_success(it, counter):
    move(it, counter.pid, -1)
    move(it, counter.pid, 1)
    before = it.read("nodes/1/migrate")
    move(it, counter.pid, 1)
    assert it.read("nodes/1/migrate") == before
    check_counting(finish(counter), counter.pid)


def test_wait_tells_the_end(it, counter):
    move(it, counter.pid, 1)
    with subprocess.Popen(
        ["cat", it.mount / f"procs/{counter.pid}/wait"], stdout=subprocess.PIPE, text=True
    ) as waiting:
        wait_until(lambda: holds(waiting.pid, "/wait"), "cat should have the file open")
        check_counting(finish(counter), counter.pid)
        assert waiting.communicate(timeout=60)[0] == "exit 7\n"


def test_wait_outlasts_a_return_home(it, counter):
    move(it, counter.pid, 1)
    with subprocess.Popen(
        ["cat", it.mount / f"procs/{counter.pid}/wait"], stdout=subprocess.PIPE, text=True
    ) as waiting:
        try:
            wait_until(lambda: holds(waiting.pid, "/wait"), "cat should have the file open")
            move(it, counter.pid, -1)
            check_counting(finish(counter), counter.pid)
            assert waiting.communicate(timeout=60)[0] == "exit 7\n"
        finally:
            waiting.kill()


def test_an_ordinary_user_moves_his_own_and_nobody_elses(it, counter):
    it.write("nodes/1/mode", "111")
    script = f"id -u; echo $$ > {it.mount}/nodes/1/migrate; hostname; id -u"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=60, user=1234, group=1234, extra_groups=[]
    )
    assert (done.stdout.split(), done.stderr) == (["1234", "n1", "1234"], "")
    theirs = subprocess.run(
        ["bash", "-c", f"echo {counter.pid} > {it.mount}/nodes/1/migrate"],
        capture_output=True,
        text=True,
        user=1234,
        group=1234,
    )
    assert theirs.returncode != 0 and "Permission denied" in theirs.stderr
    it.write("nodes/1/mode", "0")
    kept_out = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, user=1234, group=1234)
    it.write("nodes/1/mode", "111")
    assert kept_out.stdout.split() == ["1234", os.uname().nodename, "1234"] and "Permission denied" in kept_out.stderr


def test_a_lost_node_ends_its_processes_as_killed(it):
    process = subprocess.Popen(["sleep", "600"])
    move(it, process.pid, 2)
    it.lose(2)
    assert process.wait(60) == -signal.SIGKILL
    it.wait_state(2, "up")


@pytest.mark.parametrize("how", [">", ">>"])
@pytest.mark.parametrize("moved", ["onexec", ""])
def test_jobs_that_write_to_one_file_at_the_same_time_lose_nothing(it, tmp_path, how, moved):
    (tmp_path / "count").write_text("for i in $(seq 30); do echo $1 $i; done\n")
    (tmp_path / "job").write_text(
        f'echo "$$ {moved}" > {it.mount}/nodes/$1/migrate || exit; exec bash {tmp_path}/count $1\n'
    )
    script = (
        f"(for node in 0 1 2; do bash {tmp_path}/job $node & done; bash {tmp_path}/count 9; wait) {how} {tmp_path}/out"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = (tmp_path / "out").read_text().splitlines()
    for who in ("0", "1", "2", "9"):
        mine = [line for line in lines if line.startswith(f"{who} ")]
        assert mine == [f"{who} {i}" for i in range(1, 31)], lines
    assert len(lines) == 120


@pytest.mark.parametrize("how", ["a > out", ">> out"])
def test_a_shared_output_file_goes_on_where_the_job_stopped(it, tmp_path, how):
    # The shell at home and its job on the node share one open file, and so one offset.
    script = (
        f"(echo one; bash -c 'echo $$ > {it.mount}/nodes/1/migrate; echo two; hostname'; echo three)"
        f" {how.split()[-2]} {tmp_path}/out; cat {tmp_path}/out"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.split(), done.stderr) == (["one", "two", "n1", "three"], "")


def test_a_shared_input_file_is_read_on_where_the_job_stopped(it, tmp_path):
    (tmp_path / "in").write_text("one\ntwo\nthree\nfour\n")
    script = (
        f"(read a; bash -c 'echo $$ > {it.mount}/nodes/2/migrate; read b; echo $b'; read c; echo $a $c) < {tmp_path}/in"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.split(), done.stderr) == (["two", "one", "three"], "")


RESTLESS = """
import os, select, sys
n = 0
while not select.select([0], [], [], 0)[0]:
    n += 1
    for fd in [os.dup(n % 3) for _ in range(n % 5)]:
        os.close(fd)
print("end", os.getpid(), sys.stdin.readline().strip(), flush=True)
"""


def test_descriptors_that_come_and_go_while_it_is_looked_at(it):
    """Its stdio is made ready while it still runs: what it has when it stands still is what counts."""
    command = [sys.executable, "-c", RESTLESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(5):
            for node in (0, 1, -1):
                move(it, process.pid, node)
        move(it, process.pid, 1)
        out, _ = process.communicate("enough\n", timeout=60)
    assert out == f"end {process.pid} enough\n"
    assert process.returncode == 0


# Has a descriptor beyond what its limit allows; answers lines.
CRAMPED = """
import os, resource, sys
os.dup2(os.open("/dev/null", os.O_RDONLY), 900)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
print("ready", flush=True)
for line in sys.stdin:
    print(line.strip(), os.fstat(900).st_rdev, flush=True)
"""


def test_a_return_that_fails_late_leaves_the_process_where_it_was(it):
    """The memory of its ghost has been given up by then: it has to start anew, with its control socket."""
    process = subprocess.Popen(
        [sys.executable, "-c", CRAMPED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        null = os.stat("/dev/null").st_rdev
        move(it, process.pid, 1)
        for round in range(3):
            done = echo(it, process.pid, "nodes/-1/migrate")
            # Root may raise the limit where it has CAP_SYS_RESOURCE.
            assert place(it, process.pid) == ("-1" if done.returncode == 0 else "1"), done.stderr
            process.stdin.write(f"{round}\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{round} {null}\n"
            move(it, process.pid, round % 2)
            if done.returncode == 1:
                move(it, process.pid, 1)
        process.stdin.close()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


ARMED = """
import os, sys
with open(sys.argv[1], "w") as file:
    file.write(f"{os.getpid()} onexec")
os.setpgid(0, 0)
os.dup2(int(sys.argv[2]), 1)
os.execv("/bin/sh", ["sh", "-c", "ps -o pgid= -p $$; echo $$; exit 5"])
"""


def test_what_an_armed_process_becomes_before_its_exec_counts(it):
    """The node makes ready for it as it was when it was armed: its group and its output are others by then."""
    reader, writer = os.pipe()
    command = [sys.executable, "-c", ARMED, it.mount / "nodes/1/migrate", str(writer)]
    with open(reader) as output, subprocess.Popen(command, pass_fds=[writer]) as process:
        os.close(writer)
        said = output.read()
    assert process.returncode == 5
    assert said.split() == [str(process.pid)] * 2
    assert it.read("nodes/1/migrate").splitlines()[-1].startswith(f"{process.pid} ok ")


def is_on(it, node: int, pid: int) -> bool:
    """Whether a node has a process of this pid. A look through all of /proc may take longer than that is kept ready."""
    todo = it.inits(node)
    while todo:
        one = todo.pop()
        if nsfs.pids_by_status(one)[-1:] == [pid]:
            return True
        todo += children(one)
    return False


def test_what_a_node_made_ready_for_an_exec_that_does_not_come_goes_again(it, counter):
    # A strict one: of others nothing but their exec itself is needed.
    assert echo(it, f"{counter.pid} onexec strict", "nodes/1/migrate").returncode == 0
    wait_until(lambda: is_on(it, 1, counter.pid), "a node should make ready for it")
    wait_until(lambda: len(processes_of(it, counter.pid)) == 1, "what was made ready should go")
    check_counting(finish(counter), counter.pid)


THREAD_MAKER = """
import sys, threading
sys.stdin.readline()
go, done, seen = threading.Event(), threading.Event(), []
def other():
    seen.append(threading.get_native_id())
    print(seen[0], flush=True)
    go.wait()
    seen.append(threading.get_native_id())
    done.set()
threading.Thread(target=other).start()
sys.stdin.readline()
go.set()
done.wait()
print(seen[0] == seen[1], flush=True)
"""


def test_a_thread_that_was_made_on_a_node_keeps_its_id_at_home(it):
    process = subprocess.Popen(
        [sys.executable, "-c", THREAD_MAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    move(it, process.pid, 1)
    process.stdin.write("\n")
    process.stdin.flush()
    tid = int(process.stdout.readline())
    assert tid >= BLOCK_BASE
    for node in (0, -1):
        move(it, process.pid, node)
    assert str(tid) in os.listdir(f"/proc/{process.pid}/task")
    assert process.communicate("\n", timeout=60) == ("True\n", None)
    assert process.returncode == 0

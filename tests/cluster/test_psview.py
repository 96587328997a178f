"""Unmodified ps, top and others on the master, looking at processes of nodes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.desk import Terminal, desk
from tests.cluster.virtual import TOP, VirtualCluster, bpcluster, children, cluster, comm, kill, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# Three threads of which one computes; 40 MB; nice 7.
BUSY = """
import os, threading, time
os.nice(7)
memory = bytearray(40 << 20)
for _ in range(2):
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
while True:
    pass
"""


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    with cluster(tmp_path_factory.mktemp("psview") / "m", nodes=2) as made:
        yield made


@contextmanager
def job(it: VirtualCluster, node: int, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process on a node that /proc shows."""
    environment = {**os.environ, "BPFS": str(it.mount)}
    process = subprocess.Popen(
        [str(TOP / "bpfs/bin/bpsh"), str(node), *command], env=environment, stdin=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: covered(process.pid), "its files in /proc should be covered")
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def busy(it: VirtualCluster) -> Iterator[subprocess.Popen[bytes]]:
    with job(it, 1, sys.executable, "-c", BUSY) as process:
        wait_until(lambda: ps("nlwp,ni", process.pid) == ["3", str(os.nice(0) + 7)], "it should have its threads")
        yield process


@pytest.fixture
def asleep(it: VirtualCluster) -> Iterator[subprocess.Popen[bytes]]:
    with job(it, 0, "sleep", "1000") as process:
        yield process


def covered(pid: int) -> bool:
    """Whether its stat is not the kernel's own."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return f"/proc/{pid}/stat" in points


def run(*command: str, environment: dict[str, str] | None = None) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=True, env={**os.environ, **(environment or {})}
    ).stdout


def ps(columns: str, pid: int) -> list[str]:
    return run("ps", "-o", ",".join(f"{column}=" for column in columns.split(",")), "-p", str(pid)).split()


def settings(it: VirtualCluster) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in it.read("psview").splitlines())


def test_ps_shows_what_a_process_is_on_its_node(it: VirtualCluster, busy: subprocess.Popen[bytes]) -> None:
    state, parent, threads, nice, rss, vsz, user = ps("s,ppid,nlwp,ni,rss,vsz,user", busy.pid)
    assert (state, parent, threads, nice) == ("R", str(os.getpid()), "3", str(os.nice(0) + 7))
    assert user == run("id", "-un").strip()
    assert int(rss) > 40 << 10
    assert int(vsz) > int(rss)
    wait_until(lambda: int(ps("cputimes", busy.pid)[0]) >= 1, "its processor time should be shown, and go on")
    assert float(ps("pcpu", busy.pid)[0]) > 1
    assert int(it.read(f"procs/{busy.pid}/stat").rpartition(") ")[2].split()[11]) >= 1


def test_other_programs_see_it_as_well(
    it: VirtualCluster, busy: subprocess.Popen[bytes], asleep: subprocess.Popen[bytes]
) -> None:
    top = run("top", "-b", "-n", "1", "-p", f"{busy.pid},{asleep.pid}", environment={"COLUMNS": "200"}).splitlines()
    rows = {line.split()[0]: line.split() for line in top if line.split()[:1] in ([str(busy.pid)], [str(asleep.pid)])}
    assert rows[str(busy.pid)][7] == "R"
    assert rows[str(asleep.pid)][7] == "S"
    assert str(busy.pid) in run("pgrep", "-r", "R", "-P", str(os.getpid())).split()
    assert str(asleep.pid) in run("pgrep", "-r", "S", "-x", "sleep").split()
    assert str(asleep.pid) in run("pidof", "sleep").split()
    if shutil.which("pstree"):
        assert f"sleep({asleep.pid})" in run("pstree", "-p", str(os.getpid()))
    asleep.send_signal(signal.SIGSTOP)
    wait_until(lambda: ps("s", asleep.pid) == ["T"], "it should be stopped there")
    run("kill", "-CONT", str(asleep.pid))
    wait_until(lambda: ps("s", asleep.pid) == ["S"], "it should go on there")


@pytest.mark.skipif(
    not (shutil.which("htop") and shutil.which("tmux")), reason="htop and tmux are not installed (mountscripts/check)"
)
def test_htop_shows_it(busy: subprocess.Popen[bytes], session_folder: Path) -> None:
    config = session_folder / "htoprc"
    config.write_text("fields=0 39 2 18 1\nhide_userland_threads=1\n")  # PID, M_RESIDENT, STATE, NICE, Command
    terminal = Terminal(
        session_folder / "htop", f"htop -p {busy.pid} -d 5", {**os.environ, "HTOPRC": str(config), "TERM": "screen"}
    )
    try:
        row = re.compile(rf"^ *{busy.pid} +(\S+) R +{os.nice(0) + 7} ", re.MULTILINE)
        wait_until(lambda: row.search(terminal.screen()), "htop should show state and nice value")
        found = row.search(terminal.screen())
        assert found
        assert found[1].endswith("M") or int(found[1]) > 40 << 10
    finally:
        terminal.close()


def test_everybody_sees_it_and_nobody_sees_addresses(busy: subprocess.Popen[bytes]) -> None:
    def as_nobody() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    shown = subprocess.run(
        ["/usr/bin/cat", f"/proc/{busy.pid}/stat"], preexec_fn=as_nobody, capture_output=True, text=True, check=True
    )  # fmt: skip
    fields = shown.stdout.rpartition(") ")[2].split()
    assert fields[0] == "R"
    assert [fields[number - 3] for number in (26, 27, 28, 29, 30, 45, 51)] == ["1", "1", "0", "0", "0", "0", "0"]


def test_above_the_limit_it_is_for_bpps_only(
    it: VirtualCluster, busy: subprocess.Popen[bytes], asleep: subprocess.Popen[bytes]
) -> None:
    try:
        it.write("psview", "1")
        assert settings(it) == {"shown_to": "bpps", "limit": "1", "covered": "0"}
        wait_until(lambda: not covered(busy.pid) and not covered(asleep.pid), "no covers should be left")
        assert ps("s", busy.pid) == ["S"], "that is the ghost"
        bpps = [sys.executable, "-m", "bpfs.cli.bpps", "--mount", str(it.mount), "-o", "pid,s", "-p", str(busy.pid)]
        assert run(*bpps).split()[-3:] == ["1", str(busy.pid), "R"]
        assert not covered(busy.pid)
        for wrong in ("-1", "5000", "maybe", ""):
            with pytest.raises(OSError):
                it.write("psview", wrong)
        it.write("psview", "on")
        wait_until(lambda: covered(busy.pid) and covered(asleep.pid), "both should be covered again")
        assert ps("s", busy.pid) == ["R"]
    finally:
        it.write("psview", "on")
    assert settings(it)["shown_to"] == "everybody"


def test_a_process_that_comes_home_is_the_kernels_again(it: VirtualCluster, busy: subprocess.Popen[bytes]) -> None:
    it.write(f"procs/{busy.pid}/node", "-1")
    assert not covered(busy.pid)
    assert ps("s,nlwp", busy.pid) == ["R", "3"]
    it.write("nodes/0/migrate", str(busy.pid))
    wait_until(lambda: covered(busy.pid), "it should be covered again")
    assert ps("s,nlwp", busy.pid) == ["R", "3"]


def test_a_silent_node_is_marked_and_hangs_nobody(
    it: VirtualCluster, busy: subprocess.Popen[bytes], asleep: subprocess.Popen[bytes]
) -> None:
    assert ps("s", busy.pid) == ["R"]
    slave = it.slave(1)
    os.kill(slave, signal.SIGSTOP)
    try:
        # What has just been shown is good for a moment.
        wait_until(lambda: ps("s", busy.pid) == ["R"] and "stale" in settings(it), "node 1 should be marked")
        number, seconds = settings(it)["stale"].split()
        assert number == "1"
        assert float(seconds) > 0
        assert ps("s", asleep.pid) == ["S"]
    finally:
        os.kill(slave, signal.SIGCONT)
    wait_until(lambda: ps("s", busy.pid) == ["R"] and "stale" not in settings(it), "node 1 should be heard again")


def test_ps_goes_on_while_the_master_is_stopped(it: VirtualCluster, busy: subprocess.Popen[bytes]) -> None:
    master = it.pid("master")
    os.kill(master, signal.SIGSTOP)
    try:
        for _ in range(3):
            assert ps("s", busy.pid) == ["R"]
    finally:
        os.kill(master, signal.SIGCONT)


def helper(it: VirtualCluster) -> int:
    return next(pid for pid in children(it.pid("master")) if comm(pid) == "bpfs-psview")


def test_covers_go_with_the_master(tmp_path: Path, session_folder: Path) -> None:
    with cluster(session_folder / "psdeath" / "m", "--lease", "60", nodes=1) as it, job(it, 0, "sleep", "1000") as one:
        kill(helper(it))
        wait_until(lambda: not covered(one.pid), "the master should take them away")
        assert settings(it)["shown_to"] == "bpps"
        assert "trouble" in settings(it)
        assert bpcluster("down", mount=it.mount).returncode == 0
        assert bpcluster("up", "--nodes", "1", "--lease", "60", mount=it.mount).returncode == 0
        with job(it, 0, "sleep", "1000") as other:
            kill(it.pid("master"))
            wait_until(lambda: not covered(other.pid), "they should go although the ghost lives on")
            assert other.poll() is None


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (mountscripts/check installs it)")
def test_who_traces_a_ghost_is_told_where_the_process_is(it: VirtualCluster, asleep: subprocess.Popen[bytes]) -> None:
    hint = f"process {asleep.pid} runs on node 0, this is only its ghost here. Use: bpsh 0"
    with desk() as person:
        person.type(f"strace -p {asleep.pid}\r")
        person.see("attached", f"{hint} strace -p {asleep.pid}")
        person.type("\x03")
        person.await_prompt()
        # One that holds it, as gdb does.
        hold = "import ctypes, sys; ctypes.CDLL(None).ptrace(16, int(sys.argv[1]), 0, 0); sys.stdin.readline()"
        person.type(f"{sys.executable} -c '{hold}' {asleep.pid}\r")
        person.see(f"{hint} gdb -p {asleep.pid}")
        person.type("\r")
        person.await_prompt()
    # Attached by SIGSTOP, and let go by the tracer's end, it is stopped (ptrace(2)); so is its process.
    wait_until(lambda: it.read(f"procs/{asleep.pid}/state") == "stopped\n", "its process is stopped")
    asleep.send_signal(signal.SIGCONT)
    wait_until(lambda: it.read(f"procs/{asleep.pid}/state") == "running\n", "it goes on")
    # And that command works: it sees what the process itself waits in.
    bpsh = [str(TOP / "bpfs/bin/bpsh"), "0", "strace", "-p", str(asleep.pid)]
    environment = {**os.environ, "BPFS": str(it.mount)}
    with subprocess.Popen(bpsh, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as strace:
        assert strace.stderr is not None
        seen = b""
        while b"nanosleep" not in seen and b"restart_syscall" not in seen:
            more = os.read(strace.stderr.fileno(), 4096)
            assert more, seen
            seen += more
        strace.send_signal(signal.SIGINT)
    assert asleep.poll() is None

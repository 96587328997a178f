"""bpstat, bpctl, the client library and bpsh on a real cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from errno import EINVAL
from itertools import islice
from pathlib import Path

import pytest

from bpfs.client import Cluster, ExitStatus
from bpfs.errors import BpfsError
from tests.cluster.virtual import TOP, VirtualCluster, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

BPSH = str(TOP / "bpfs" / "bin" / "bpsh")


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    with cluster(tmp_path_factory.mktemp("commands") / "m", nodes=4) as made:
        yield made


def command(it: VirtualCluster, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [BPSH] if name == "bpsh" else [sys.executable, "-m", f"bpfs.cli.{name}"]
    return subprocess.run(
        [*program, *arguments],
        cwd=TOP,
        env={**os.environ, "BPFS": str(it.mount)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def shown(it: VirtualCluster, name: str, *arguments: str) -> str:
    run = command(it, name, *arguments)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def test_bpctl_changes_what_bpstat_shows(it: VirtualCluster) -> None:
    assert shown(it, "bpstat", "-c").splitlines()[1].split() == ["0-3", "up", "---x--x--x", "root", "root"]
    try:
        assert shown(it, "bpctl", "-S", "2-3", "-s", "unavailable", "-m", "110", "-u", "daemon") == ""
        lines = [line.split() for line in shown(it, "bpstat", "-c").splitlines()[1:]]
        assert lines == [
            ["2-3", "unavailable", "---x--x---", "daemon", "root"],
            ["0-1", "up", "---x--x--x", "root", "root"],
        ]
        assert shown(it, "bpstat", "-n", "!up") == "2\n3\n"
        assert [row["mode"] for row in json.loads(shown(it, "bpstat", "--json"))] == ["111", "111", "110", "110"]
    finally:
        shown(it, "bpctl", "-S", "2-3", "-s", "up", "-m", "111", "-u", "root")


def test_what_a_node_refuses_is_an_error_of_bpctl(it: VirtualCluster) -> None:
    run = command(it, "bpctl", "-S", "0-1", "-s", "boot")
    assert run.returncode == 1
    assert run.stderr == "".join(
        f"bpctl: {n}: cannot set state of node {n} to boot: Invalid argument"
        " (no state, or none that it can be told to be in now)\n"
        for n in (0, 1)
    )


def test_a_node_that_hangs_keeps_no_others_from_what_bpctl_says(it: VirtualCluster) -> None:
    slave = it.slave(0)
    os.kill(slave, signal.SIGSTOP)
    program = [sys.executable, "-m", "bpfs.cli.bpctl", "-S", "0,2-3", "-s", "down"]
    with subprocess.Popen(program, env={**os.environ, "BPFS": str(it.mount), "PYTHONPATH": str(TOP)}) as run:
        try:
            it.wait_state(2, "down")
            it.wait_state(3, "down")
            assert run.poll() is None
        finally:
            os.kill(slave, signal.SIGCONT)
        assert run.wait(60) == 0
    shown(it, "bpctl", "-S", "0,2-3", "-s", "up")
    for number in (0, 2, 3):
        it.wait_state(number, "up")


def test_client_reads_every_file_of_a_node(it: VirtualCluster) -> None:
    api = Cluster(it.mount)
    assert list(api.nodes) == [0, 1, 2, 3]
    for node in [*api.nodes.values(), api.nodes[-1]]:
        assert (node.state, node.reason, node.mode, node.owner, node.group) == ("up", "", 0o111, "root", "root")
        assert node.kernel == os.uname().release
        assert node.cpus >= 1
        assert len(node.load) == 3
        assert node.uptime > 0
        assert node.memory["MemTotal"] > node.memory["MemFree"] > 0
    assert api.current.number == -1


def test_client_hears_of_changes(it: VirtualCluster) -> None:
    api = Cluster(it.mount)
    node = api.nodes[1]
    everything, of_node = api.events(), node.events()
    node.state = "unavailable"
    node.state = "up"
    for events in (everything, of_node):
        seen = [(event.kind, event.number, event.what.split(" (")[0]) for event in islice(events, 2)]
        assert seen == [("node", 1, "state unavailable"), ("node", 1, "state up")]


def test_client_says_what_went_wrong(it: VirtualCluster) -> None:
    api = Cluster(it.mount)
    with pytest.raises(BpfsError, match="cannot set state of node 1 to banana: Invalid argument") as caught:
        api.nodes[1].state = "banana"
    assert caught.value.errno == EINVAL
    with pytest.raises(BpfsError, match="process 4194304 to node 1"):
        api.nodes[1].migrate(4194304)


def is_open(path: Path) -> bool:
    """Whether this process has opened a file."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # closed since the listing
            if os.readlink(f"/proc/self/fd/{number}") == str(path):
                return True
    return False


def test_client_moves_a_process_and_waits_for_it(it: VirtualCluster) -> None:
    api = Cluster(it.mount)
    child = subprocess.Popen(["sleep", "1000"])
    try:
        for number in (2, 3, -1, 1):
            api.nodes[number].migrate(child.pid)
            process = api.procs[child.pid]
            assert process.node == number
            assert process.cmdline == ["sleep", "1000"]
        assert api.nodes[1].procs == [process]
        assert [stay.node for stay in process.history] == [-1, 2, 3, -1, 1]
        assert (api.nodes[1].moves[-1].pid, api.nodes[1].moves[-1].outcome) == (child.pid, "ok")
        status: list[ExitStatus] = []
        waiter = threading.Thread(target=lambda: status.append(process.wait()))
        waiter.start()
        # Who comes after its end finds nobody to wait for.
        wait_until(lambda: is_open(process.path / "wait"), "the thread should wait")
        process.signal(signal.SIGTERM)
        waiter.join(60)
        assert status == [ExitStatus(None, signal.SIGTERM)]
        assert child.wait(60) == -signal.SIGTERM
    finally:
        child.kill()
        child.wait()


def test_bpsh_runs_on_the_node_under_its_own_pid(it: VirtualCluster) -> None:
    for spec in ("0", "n3"):
        assert shown(it, "bpsh", spec, "uname", "-n") == f"n{spec[-1]}\n"
    child = subprocess.Popen(
        [BPSH, "2", "sh", "-c", "echo $$; readlink $BPFS/self; exit 9"],
        env={**os.environ, "BPFS": str(it.mount)},
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = child.communicate(timeout=100)
    assert (out.splitlines(), child.returncode) == ([str(child.pid), "nodes/2"], 9)


def test_bpsh_on_all_nodes(it: VirtualCluster) -> None:
    assert sorted(shown(it, "bpsh", "-p", "allup", "uname", "-n").splitlines()) == [f"  {n}: n{n}" for n in range(4)]
    assert shown(it, "bpsh", "-s", "3,1,3", "uname", "-n") == "n3\nn1\nn3\n"
    assert command(it, "bpsh", "all", "sh", "-c", "exit $BPROC_RANK").returncode == 3


def test_bpsh_many_times_on_one_node_at_once(it: VirtualCluster) -> None:
    # They share a parent, a group and a session; some end while others arrive.
    for _ in range(10):
        assert shown(it, "bpsh", "-s", "1,1,1,1,1,1", "uname", "-n") == "n1\n" * 6


def test_bpsh_reaches_standard_input(it: VirtualCluster) -> None:
    text = "".join(f"line {number}\n" for number in range(100_000))
    for spec, copies in (("1", 1), ("0-3", 4)):
        run = subprocess.run(
            [BPSH, "-s", spec, "cksum"],
            input=text,
            env={**os.environ, "BPFS": str(it.mount)},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        expected = subprocess.run(["cksum"], input=text, capture_output=True, text=True, check=True).stdout
        assert (run.stdout, run.stderr, run.returncode) == (expected * copies, "", 0)


def shell(it: VirtualCluster, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "BPFS": str(it.mount)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


READERS = {
    "true": "one two three four",  # reads nothing at all
    "head -c 4": "two three four",
    "python3 -c 'import os; os.read(0, 8)'": "three four",
    "sh -c 'exec 0<&-'": "one two three four",  # it closes what it was given
    "sh -c 'head -c 4 >/dev/null; kill $$'": "two three four",
    "cat": "",
}


@pytest.mark.parametrize("size", [0, 300_000], ids=["short", "long"])
@pytest.mark.parametrize("way", ["opened there", "relayed"])
@pytest.mark.parametrize("program", READERS)
def test_what_bpsh_leaves_of_a_file_is_for_the_next_reader(
    it: VirtualCluster, tmp_path: Path, program: str, way: str, size: int
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one two three four" + b"." * size)
    remove = f"rm {file}; " if way == "relayed" else ""
    done = shell(it, f"exec < {file}; {remove} {{ {BPSH} 1 {program} > /dev/null; }} 2> /dev/null; exec cat")
    rest = READERS[program] + ("." * size if program != "cat" else "")
    assert (done.stdout, done.stderr) == (rest, "")


def test_a_child_of_the_command_goes_on_reading(it: VirtualCluster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one two three four")
    command = "sh -c 'exec 3<&0; (sleep 0.3; exec head -c 7 <&3) &'"
    done = shell(it, f"exec < {tmp_path}/file; rm {tmp_path}/file; {BPSH} 1 {command} | cat; exec cat")
    assert (done.stdout, done.stderr) == ("one two", "")


def test_bpsh_in_a_loop_that_reads_a_list(it: VirtualCluster, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("0\n1\n0\n")
    script = f"while read node; do {BPSH} $node uname -n; done < {tmp_path}/list"
    done = shell(it, script)
    assert (done.stdout, done.stderr) == ("n0\nn1\nn0\n", "")


def test_bpsh_gives_a_terminal_on_each_node(it: VirtualCluster) -> None:
    run = subprocess.run(
        [BPSH, "-s", "-T", "0-2", "sh", "-c", "tty; uname -n; cat"],
        input="unfinished",
        env={**os.environ, "BPFS": str(it.mount)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert re.fullmatch("".join(rf"/dev/pts/\d+\nn{n}\nunfinished" for n in range(3)), run.stdout)


def test_client_runs_commands_on_nodes(it: VirtualCluster) -> None:
    results = {result.node: result for result in Cluster(it.mount).run(["uname", "-n"], nodes="0-2")}
    assert {number: result.stdout for number, result in results.items()} == {n: f"n{n}\n".encode() for n in range(3)}


def test_bpsh_begins_in_the_root_where_its_folder_is_not(it: VirtualCluster, tmp_path: Path) -> None:
    # Mounted here only: nodes have had mounts of their own since they began.
    subprocess.run(["mount", "-t", "tmpfs", "commands", str(tmp_path)], check=True)
    try:
        (tmp_path / "here").mkdir()
        run = subprocess.run(
            [BPSH, "1", "pwd"], cwd=tmp_path / "here", capture_output=True, text=True, timeout=100, check=False,
            env={**os.environ, "BPFS": str(it.mount)}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert (run.returncode, run.stdout) == (0, "/\n")
    assert run.stderr == f"bpfs: n1 has no folder {tmp_path}/here: the program begins in /\n"


def test_what_travels_with_bpsh(it: VirtualCluster, tmp_path: Path) -> None:
    script = 'umask 037; ulimit -n 555; ulimit -s 4096; export A=b; exec nice -n 5 "$@"'
    shown = 'pwd; umask; ulimit -n; ulimit -s; nice; echo "$A"'
    run = subprocess.run(
        ["sh", "-c", script, "sh", BPSH, "2", "sh", "-c", shown], cwd=tmp_path, capture_output=True, text=True,
        timeout=100, check=False, env={**os.environ, "BPFS": str(it.mount)}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (run.stdout.split(), run.stderr) == ([str(tmp_path), "0037", "555", "4096", str(os.nice(0) + 5), "b"], "")


def test_a_process_that_is_stopped_at_home_is_called_so(it: VirtualCluster) -> None:
    with subprocess.Popen(["sleep", "100"]) as sleeper:
        try:
            for number, state in ((signal.SIGSTOP, "stopped\n"), (signal.SIGCONT, "running\n")):
                sleeper.send_signal(number)
                wait_until(lambda state=state: it.read(f"procs/{sleeper.pid}/state") == state, f"it is {state.strip()}")
        finally:
            sleeper.kill()


def test_bpsh_says_why_a_node_cannot_be_had(it: VirtualCluster) -> None:
    shown(it, "bpctl", "-S", "3", "-s", "down")
    try:
        run = command(it, "bpsh", "3", "true")
        assert run.returncode == 255
        assert run.stderr.startswith("bpsh: node 3: Host is down")
        run = command(it, "bpsh", "-p", "2-3", "uname", "-n")
        assert (run.returncode, run.stdout) == (255, "  2: n2\n")
    finally:
        shown(it, "bpctl", "-S", "3", "-s", "up")
        wait_until(lambda: it.state(3) == "up", "node 3 comes back")


def test_killing_bpsh_kills_the_command(it: VirtualCluster) -> None:
    child = subprocess.Popen(
        [BPSH, "1", "sleep", "1000"], env={**os.environ, "BPFS": str(it.mount)}, stdin=subprocess.DEVNULL
    )
    process = Path(it.mount) / "procs" / str(child.pid)
    try:
        wait_until(lambda: process.exists() and (process / "node").read_text() == "1\n", "sleep arrives on node 1")
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == -signal.SIGINT
        wait_until(lambda: not os.listdir(it.mount / "nodes" / "1" / "procs"), "the process is gone")
    finally:
        child.kill()
        child.wait()

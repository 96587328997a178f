"""bpfs.client: reading and writing the files; what the real tree answers is checked in tests/cluster."""

from __future__ import annotations

import subprocess
import sys
from errno import EINVAL, ENOENT
from pathlib import Path

import pytest

from bpfs.client import Cluster, Event, ExitStatus
from bpfs.errors import BpfsError
from bpfs.records import Move, parse_event, parse_exit, parse_move, parse_status
from tests.cli.conftest import plain_tree

__all__ = ["plain_tree"]


def test_nodes(plain_tree: Path) -> None:
    cluster = Cluster(plain_tree)
    assert list(cluster.nodes) == [0, 1, 2, 3, 4, 5, 7]
    node = cluster.nodes[5]
    assert (node.state, node.mode, node.owner, node.group) == ("unavailable", 0o110, "nobody", "nogroup")
    assert node.load == (0.25, 0.5, 1.0)
    assert node.memory == {"total": 1024, "free": 512}
    assert (node.busy, node.heard) == ((0.25, 1.0), 1700000000.25)
    assert (node.cpus, node.uptime, node.kernel, node.address) == (2, 12.5, "6.1.0", "10.0.0.6")
    assert cluster.nodes[-1].state == "up"
    assert cluster.current == cluster.nodes[-1]
    assert 6 not in cluster.nodes
    with pytest.raises(KeyError):
        cluster.nodes[6]


def test_setting_writes_the_file(plain_tree: Path) -> None:
    node = Cluster(plain_tree).nodes[3]
    node.state, node.mode, node.owner = "up", 0o100, "daemon"
    assert [(node.path / name).read_text().split("\n")[0] for name in ("state", "mode")] == ["up", "100"]
    assert (node.mode, node.owner) == (0o100, "daemon")


def test_processes(plain_tree: Path) -> None:
    cluster = Cluster(plain_tree)
    assert list(cluster.procs) == [1234, 1300]
    process = cluster.procs[1234]
    assert (process.node, cluster.procs[1300].node) == (2, None)
    assert process.cmdline == ["sleep", "1000"]
    assert [stay.node for stay in process.history] == [-1, 2]
    assert process.wait() == ExitStatus(3, None)
    assert cluster.nodes[2].procs == [process]
    assert Path(process.path / "cantmove").read_text() == "\n"


def test_errors_carry_errno_and_sentence(plain_tree: Path) -> None:
    with pytest.raises(BpfsError, match="no cluster is mounted at /nowhere") as caught:
        Cluster("/nowhere")
    assert caught.value.errno == ENOENT
    with pytest.raises(BpfsError, match="No such file") as caught:
        Cluster(plain_tree).status_of(9)
    assert caught.value.errno == ENOENT


def test_the_environment_names_the_cluster(plain_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BPFS", str(plain_tree))
    assert Cluster().mount == plain_tree


def test_records() -> None:
    assert parse_event("node 7 state up") == Event("node", 7, "state up")
    assert parse_event("process 1234 node -1") == Event("process", 1234, "node -1")
    assert parse_event("lost 12") == Event("lost", 12, "")
    assert parse_event("whatever") == Event("other", 0, "whatever")
    assert parse_exit("signal 15") == ExitStatus(None, 15)
    assert parse_exit("signal 15").returncode == -15
    assert [status.address for status in parse_status("3 down 111 root root\n4 up 111 root root -\n")] == ["", ""]
    for nonsense in ("", "exit", "exit x", "up 3"):
        with pytest.raises(BpfsError) as caught:
            parse_exit(nonsense)
        assert caught.value.errno == EINVAL
    with pytest.raises(BpfsError, match="is no line of a status file"):
        parse_status("4 up\n")


def test_moves() -> None:
    line = "1234 EOPNOTSUPP freeze_ms=0.5 total_ms=1.0 bytes=0 fd 5 is a TCP socket=bad"
    figures = {"freeze_ms": 0.5, "total_ms": 1.0, "bytes": 0.0}
    assert parse_move(line) == Move(1234, "EOPNOTSUPP", figures, "fd 5 is a TCP socket=bad")
    assert parse_move("12 ok freeze_ms=2.5 total_ms=3.0 bytes=1048576").reason == ""
    with pytest.raises(BpfsError):
        parse_move("hello")


def test_it_needs_nothing_but_the_standard_library() -> None:
    code = "import sys, bpfs.client; print([m for m in ('trio', 'msgpack', 'pyfuse3', 'ptrace') if m in sys.modules])"
    top = str(Path(__file__).resolve().parent.parent)
    program = f"import sys; sys.path.insert(0, {top!r}); {code}"
    run = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"

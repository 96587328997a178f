"""libnss_beo: the C library finds nodes by name, on the master and on nodes, also while the master hangs."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from bpfs import hosts
from bpfs.rundir import RunDir
from tests.cluster.virtual import VirtualCluster, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

BIN = Path(__file__).parents[2] / "bpfs/bin"
# A mount namespace in which the switch knows us; tmp is where any root can be written.
LOOK = 'echo "hosts: beo" > "$0" && mount --bind "$0" /etc/nsswitch.conf && exec getent "$@"'


def getent(mount: Path, switch: str, *query: str, before: tuple[str, ...] = ()) -> list[list[str]]:
    """The words of what getent prints, a list a line; it may find nothing."""
    command = [*before, "unshare", "-m", "--propagation", "private", "sh", "-c", LOOK, switch, *query]
    environment = {**os.environ, "BPFS": str(mount), "LD_LIBRARY_PATH": str(BIN)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, cwd="/")
    assert done.returncode in (0, 2) and done.stderr == "", done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.fixture
def look(tmp_path):
    return lambda mount, *query, **more: getent(mount, str(tmp_path / "nsswitch.conf"), *query, **more)


@pytest.fixture
def table(tmp_path):
    """A file of names that no master keeps, and the mount that it stands for."""
    mount = tmp_path / ".odd-name" / "m m"
    path = RunDir(str(mount)).hosts
    yield mount, path
    path.unlink(missing_ok=True)


def test_names_in_a_file(look, table):
    mount, path = table
    assert look(mount, "hosts", "n1") == []
    addresses = {number: f"10.1.{number >> 8}.{number & 255}" for number in range(1024)}
    hosts.write(path, hosts.text({**addresses, 7: "fd00::7"}, "10.9.9.9", own=3))
    assert path.stat().st_mode & 0o777 == 0o644
    for name, wanted in (
        ("n5", ["10.1.0.5", "n5", ".5"]),
        (".1023", ["10.1.3.255", "n1023", ".1023"]),
        ("master", ["10.9.9.9", "master", ".-1"]),
        (".-1", ["10.9.9.9", "master", ".-1"]),
        ("self", ["10.1.0.3", "n3", ".3"]),
        ("n7", ["fd00::7", "n7", ".7"]),
        ("10.1.2.3", ["10.1.2.3", "n515", ".515"]),
        ("fd00::7", ["fd00::7", "n7", ".7"]),
    ):
        assert look(mount, "hosts", name) == [wanted], name
    for name in ("n1024", "n05", "n", ".", "n5x", "nobody", "n99999999999999999999", "10.1.4.0", "127.0.0.1"):
        assert look(mount, "hosts", name) == [], name
    assert look(mount, "ahostsv4", "n5")[0] == ["10.1.0.5", "STREAM", "n5"]
    assert look(mount, "ahosts", "n7")[0][0] == "fd00::7" and look(mount, "ahostsv4", "n7") == []
    everybody = look(mount, "hosts")
    assert len(everybody) == 1025 and everybody[6] == ["10.1.0.5", "n5", ".5"]


def test_lines_that_make_no_sense_are_passed_over(look, table):
    mount, path = table
    hosts.write(path, f"# n1\n\nnonsense n1\n10.0.0.1\n{'x' * 2000} n1\n10.0.0.2 other\n10.0.0.3 n1 .1")
    assert look(mount, "hosts", "n1") == [["10.0.0.3", "n1", ".1"]]
    assert look(mount, "hosts", "master") == []


def names_everywhere(it: VirtualCluster, look) -> None:
    address = it.read("nodes/1/address").strip()
    wait_until(lambda: len(it.rundir.hosts.read_text().splitlines()) == 3, "all nodes have names")
    assert look(it.mount, "hosts", "n1") == [[address, "n1", ".1"]]
    assert look(it.mount, "hosts", "self")[0][1] == look(it.mount, "hosts", "master")[0][1] == "master"


def on_node(it: VirtualCluster, number: int, switch: str, *query: str) -> list[list[str]]:
    return getent(it.mount, switch, *query, before=(str(BIN / "bpsh"), "-n", str(number)))


def test_on_the_master_and_on_nodes_while_the_master_hangs(look, session_folder, tmp_path):
    with cluster(session_folder / "names", nodes=2) as it:
        names_everywhere(it, look)
        for number in range(2):
            found = on_node(it, number, str(tmp_path / f"switch{number}"), "hosts", "self")
            assert found[0][1:] == [f"n{number}", f".{number}"]
        master = it.rundir.master_pid()
        os.kill(master, signal.SIGSTOP)
        try:
            assert look(it.mount, "hosts", ".0")[0][1] == "n0"
        finally:
            os.kill(master, signal.SIGCONT)
        path = it.rundir.hosts
    assert not path.exists()


def test_on_nodes_with_an_empty_root(look, session_folder):
    with cluster(session_folder / "bare", "--root", "empty", "--export", str(BIN), nodes=2) as it:
        names_everywhere(it, look)
        inside = f"/run/bpfs/{it.rundir.hosts.name}"
        wait = f"for i in $(seq 500); do [ $(wc -l < '{inside}') = 3 ] && exit; sleep 0.02; done; exit 9"
        environment = {**os.environ, "BPFS": str(it.mount)}
        for number in range(2):
            command = [str(BIN / "bpsh"), "-n", str(number), "--", "sh", "-c", wait]
            done = subprocess.run(command, env=environment, timeout=60, stderr=subprocess.DEVNULL, cwd="/")
            assert done.returncode == 0
            found = on_node(it, number, "/tmp/switch", "hosts", "self")
            assert found[0][1:] == [f"n{number}", f".{number}"]
            assert on_node(it, number, "/tmp/switch", "hosts", "n0")[0][1] == "n0"

"""bpsetup writes what bpmaster reads, and nothing over what is there."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpfs.config import read
from bpfs.wire.handshake import read_key
from tests.boot.lab import TOP, Lab, mac
from tests.cluster.virtual import wait_until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def lab(session_folder: Path) -> Iterator[Lab]:
    lab = Lab(session_folder / "setup", machines=0)
    try:
        lab.open()
        yield lab
    finally:
        lab.close()


@pytest.mark.slow
def test_a_master_runs_by_it_and_gives_the_first_machine_its_number(lab: Lab, session_folder: Path) -> None:
    folder = session_folder / "setup" / "etc"
    assert bpsetup(lab, folder, *GOOD).returncode == 0
    options = ["-c", folder / "config", "--mount", lab.mount, "--state", folder / "state"]
    lab.spawn("bpfs.cli.bpmaster", "-f", *options, "--log", lab.folder / "master.log")
    wait_until(lambda: "nodes can boot" in lab.log(), "the boot server is not there")
    lab.add_client(0)
    assert lab.client(0, "ask", "20").stdout == "10.54.0.10\n"
    wait_until((lab.mount / "nodes/0").exists, "the new node is not there")
    assert (folder / "config").read_text().endswith(f"\nnode 0 {mac(0)}\n")


def bpsetup(lab: Lab, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Runs it in the lab's network."""
    options = ["--folder", str(folder), *more]
    return subprocess.run(
        [*lab.inside, sys.executable, "-m", "bpfs.cli.bpsetup", *options], cwd=TOP, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


GOOD = ("--interface", "br0", "--nodes", "16", "--first", "10.54.0.10")


def test_what_it_writes(lab: Lab, tmp_path: Path) -> None:
    done = bpsetup(lab, tmp_path / "etc", *GOOD)
    assert done.returncode == 0, done.stderr
    config = read(tmp_path / "etc/config")
    assert (config.interface, config.nodes, config.bootserver, config.nodeassign) == ("br0", 16, True, "append")
    assert [config.address_for(number) for number in (0, 15, 16)] == ["10.54.0.10", "10.54.0.25", None]
    assert (config.fstab, config.nodeup) == (tmp_path / "etc/fstab", tmp_path / "etc/node_up.d")
    assert len(read_key(config.key)) == 64 and stat.S_IMODE(config.key.stat().st_mode) == 0o600

    again = bpsetup(lab, tmp_path / "etc", *GOOD)
    assert again.returncode == 1 and "--force replaces it" in again.stderr
    key = config.key.read_text()
    assert bpsetup(lab, tmp_path / "etc", *GOOD, "--force").returncode == 0
    assert config.key.read_text() == key


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("--interface", "none0"), "interface none0 has no address"),
        (("--nodes", "0"), "no number of nodes"),
        (("--nodes", "250"), "has no room for 250 nodes"),
        (("--first", "10.54.0.1"), "is this machine's own"),
        (("--first", "10.54"), "no network address"),
    ],
)
def test_what_it_refuses(lab: Lab, tmp_path: Path, change: tuple[str, str], sentence: str) -> None:
    done = bpsetup(lab, tmp_path / "etc", *GOOD, *change)
    assert done.returncode == 1 and sentence in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "etc").exists()


def test_without_a_terminal_all_must_be_said(lab: Lab, tmp_path: Path) -> None:
    done = bpsetup(lab, tmp_path / "etc", *GOOD[:4])
    assert done.returncode == 1 and "address of node 0: there is no terminal to ask on" in done.stderr


def test_on_a_terminal_it_asks_for_what_was_not_said(lab: Lab, tmp_path: Path) -> None:
    screen, terminal = os.openpty()
    command = [*lab.inside, sys.executable, "-m", "bpfs.cli.bpsetup", "--folder", tmp_path / "etc"]
    with subprocess.Popen(command, cwd=TOP, stdin=terminal, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        os.write(screen, b"\n4\n\n")  # what it suggests, but for the number of nodes
        assert process.wait(60) == 0
    shown = os.read(screen, 65536).decode()
    os.close(screen)
    for question in (
        "network interface of the nodes [br0]: ",
        "how many nodes [16]: ",
        "address of node 0 [10.54.0.11]: ",
    ):
        assert question in shown
    config = read(tmp_path / "etc/config")
    assert (config.interface, config.nodes) == ("br0", 4)
    assert [config.address_for(number) for number in (0, 3, 4)] == ["10.54.0.11", "10.54.0.14", None]

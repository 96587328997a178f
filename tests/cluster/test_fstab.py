"""Local disks and file systems of nodes by fstab, with real block devices under a node with an empty root."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bpfs.errors import ConfigError
from bpfs.fstab import Entry, Kind, Policy, find, read
from bpfs.rundir import RunDir
from tests.cluster.daemons import end, start
from tests.cluster.virtual import TOP, wait_until

VALUES = {"MASTER": "10.0.0.1", "NODE": "3"}


def parsed(folder: Path, text: str) -> list[Entry]:
    (folder / "fstab").write_text(text)
    return read(folder / "fstab", VALUES, Policy.NEVER, Policy.IF_NEEDED)


def test_what_a_line_says(tmp_path: Path) -> None:
    disk, swap, home = parsed(
        tmp_path,
        "# what nodes have\n\n"
        "/dev/sda1 /scratch ext4 noatime,x-bpfs.mkfs=if_needed,x-bpfs.fsck=always 0 2\n"
        "/dev/sda2 none swap sw 0 0\n"
        "$MASTER:/srv/n${NODE} /home nfs\n",
    )
    assert disk == Entry("/dev/sda1", "/scratch", "ext4", "noatime", Policy.IF_NEEDED, Policy.ALWAYS)
    assert (swap.kind, swap.mkfs) == (Kind.SWAP, Policy.NEVER)
    assert (home.device, home.options, home.kind) == ("10.0.0.1:/srv/n3", "defaults", Kind.OTHER)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/dev/sda1 /scratch", "fstab:1: write: DEVICE DIRECTORY TYPE"),
        ("/dev/sda1 scratch ext4", "'scratch' is no directory of a node"),
        ("/dev/sda1 /a/../../b ext4", "is no directory of a node"),
        ("/dev/sda1 / ext4", "'/' is no directory of a node"),
        ("$MASTR:/home /home nfs", "$MASTR is nothing here; known: $MASTER $NODE"),
        ("/dev/sda1 /a ext4 x-bpfs.mkfs=often", "'often' is none of never if_needed always"),
        ("/dev/sda1 /a ext4 x-bpfs.mk=never", "'x-bpfs.mk=never' is no option"),
    ],
)
def test_what_a_line_must_not_say(tmp_path: Path, line: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed(tmp_path, line)
    assert sentence in str(error.value)


def test_whose_file_counts(tmp_path: Path) -> None:
    assert find(tmp_path / "fstab", 3) is None
    (tmp_path / "fstab").touch()
    (tmp_path / "fstab.3").touch()
    assert find(tmp_path / "fstab", 3) == tmp_path / "fstab.3" and find(tmp_path / "fstab", 4) == tmp_path / "fstab"


# -- with a node -----------------------------------------------------------------------------------


@dataclass
class Desk:
    """A master, a node with an empty root, and a disk."""

    folder: Path
    mount: Path
    disk: str

    def bpmount(self, *options: str) -> subprocess.CompletedProcess[str]:
        """As an administrator calls it by hand."""
        command = [sys.executable, "-m", "bpfs.cli.bpmount", "-c", str(self.folder / "config"), *options, "0"]
        return subprocess.run(command, cwd=TOP, env=self.environment, capture_output=True, text=True, timeout=100)

    def bpsh(self, command: str) -> subprocess.CompletedProcess[str]:
        """A shell on the node."""
        bpsh = [str(TOP / "bpfs/bin/bpsh"), "0", "/bin/sh", "-c", command]
        return subprocess.run(
            bpsh, env=self.environment, cwd="/", capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL
        )

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "BPFS": str(self.mount), "PYTHONPATH": str(TOP)}

    def text(self, path: str) -> str:
        """A file of the tree; empty while there is none."""
        try:
            return (self.mount / path).read_text()
        except OSError:
            return ""


@pytest.fixture
def desk(session_folder: Path) -> Iterator[Desk]:
    folder = session_folder / "fstab"
    mount, key, image = folder / "m", folder / "key", folder / "disk"
    mount.mkdir(parents=True)
    key.write_text("0123456789abcdef0123456789abcdef\n")
    key.chmod(0o600)
    with image.open("wb") as file:
        file.truncate(16 << 20)
    loop = subprocess.run(["losetup", "-f", "--show", str(image)], capture_output=True, text=True, check=False)
    if loop.returncode != 0:
        pytest.skip(f"no loop device: {loop.stderr.strip()}")
    disk = loop.stdout.strip()
    lines = [f"key {key}", f"mount {mount}", "bprocport 0", f"state {folder}/state", f"fstab {folder}/fstab"]
    (folder / "config").write_text("\n".join([*lines, "mkfs if_needed", ""]))
    (folder / "fstab").write_text(f"tmpfs /fast tmpfs size=1m\n{disk} /scratch ext4 noatime\n")
    daemons: list[subprocess.Popen[bytes]] = []

    try:
        options = ("-f", "-c", folder / "config", "--address", "127.0.0.1", "--log", folder / "master.log")
        daemons.append(start("bpmaster", *options))
        rundir = RunDir(str(mount))
        wait_until(lambda: os.path.ismount(mount) and rundir.read("port"), "the master should be ready")
        host, port = (rundir.read("port") or "").split()
        where = ("--no-mount", "--root", "empty", "--cache", folder / "cache", f"{host}:{port}")
        daemons.append(start("bpslave", "-f", "-k", key, "-n", 0, "--log", folder / "slave.log", *where))
        yield Desk(folder, mount, disk)
    finally:
        for daemon in reversed(daemons):
            end(daemon)
        subprocess.run(["losetup", "-d", disk], check=False)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_node_gets_its_file_systems_and_gives_them_back(desk: Desk) -> None:
    # The node is on this machine, and so is its disk: it is not touched unasked, and the node says so.
    wait_until(lambda: desk.text("nodes/0/state") == "error\n", "the disk should be refused")
    assert "the master's own machine" in desk.text("nodes/0/reason")
    assert "fstab: /fast: tmpfs" in desk.text("nodes/0/log")  # what came before is there, and told
    (desk.folder / "fstab.0").write_text("tmpfs /fast tmpfs size=1m\n")
    (desk.mount / "nodes/0/state").write_text("up\n")
    assert desk.text("nodes/0/state") == "up\n" and "/fast is mounted already" in desk.text("nodes/0/log")
    (desk.folder / "fstab.0").unlink()

    # By hand, with force: an empty disk is given its file system, and what is on it stays.
    done = desk.bpmount("--force")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert f"{desk.disk}: making ext4" in done.stdout and f"/scratch: {desk.disk}" in done.stdout
    assert desk.bpsh("echo kept > /scratch/f; stat -f -c %T /scratch").stdout == "ext2/ext3\n"
    assert desk.bpmount("--force").stdout == "/fast is mounted already\n/scratch is mounted already\n"
    assert desk.bpmount("-u").stdout == "/scratch: unmounted\n/fast: unmounted\n"
    assert desk.bpsh("ls /scratch").stdout == ""
    again = desk.bpmount("--force", "--fsck", "always")
    assert again.returncode == 0 and "making" not in again.stdout
    assert desk.bpsh("cat /scratch/f").stdout == "kept\n"
    # In use it cannot go; what can does.
    assert desk.bpsh("sleep 1000 < /scratch/f > /dev/null 2>&1 & echo $! > /fast/pid").returncode == 0
    busy = desk.bpmount("-u")
    assert busy.returncode == 1 and busy.stderr.endswith("/scratch: it cannot be unmounted\n")
    desk.bpsh("pkill -x sleep; while mountpoint -q /scratch; do umount /scratch 2>/dev/null || sleep 0.05; done")

    # What somebody else has put on a disk is not overwritten, unless that was said.
    subprocess.run(["mkswap", desk.disk], check=True, capture_output=True)
    foreign = desk.bpmount("--force")
    assert foreign.returncode == 1 and f"{desk.disk}: it has swap, not ext4" in foreign.stderr
    assert desk.bpmount("--force", "--mkfs", "always").returncode == 0
    assert desk.bpsh("mountpoint /scratch").returncode == 0
    assert desk.bpmount("-u").returncode == 0

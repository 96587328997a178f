"""bpsh where other programs expect rsh or ssh, with the programs as Debian packages them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.virtual import TOP, VirtualCluster, cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    with cluster(tmp_path_factory.mktemp("dropin") / "m", nodes=4) as made:
        yield made


def call(it: VirtualCluster, folder: Path, *command: str, **more: str) -> str:
    """Runs a program with bpsh in its PATH; its standard output."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed (mountscripts/check installs it)")
    path = f"{TOP / 'bpfs' / 'bin'}:{os.environ['PATH']}"
    run = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=100, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "BPFS": str(it.mount), "PATH": path, "HOME": str(folder), **more},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_rsync_to_a_node_and_back(it: VirtualCluster, tmp_path: Path) -> None:
    data = os.urandom(2_000_000)
    (tmp_path / "f").write_bytes(data)
    (tmp_path / "there").mkdir()
    call(it, tmp_path, "rsync", "-a", "-e", "bpsh", "f", f"3:{tmp_path}/there/")
    assert (tmp_path / "there" / "f").read_bytes() == data
    call(it, tmp_path, "rsync", "-a", "-e", "bpsh", f"me@2:{tmp_path}/there/", "back")
    assert (tmp_path / "back" / "f").read_bytes() == data


def test_parallel_spreads_jobs(it: VirtualCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHELL", raising=False)  # as in a service; its worker needs one, which sshd would give it
    line = ["parallel", "--will-cite", "--ssh", "bpsh", "-S", "1/0,1/1,1/2", "-k", "uname -n; echo '{} done'"]
    shown = call(it, tmp_path, *line, ":::", "a", "b c", "d").splitlines()
    assert shown[1::2] == ["a done", "b c done", "d done"]
    assert set(shown[0::2]) <= {"n0", "n1", "n2"}
    assert len(set(shown[0::2])) > 1


def test_pdsh(it: VirtualCluster, tmp_path: Path) -> None:
    shown = call(it, tmp_path, "pdsh", "-R", "exec", "-w", "[0-3]", "bpsh", "%h", "uname", "-n")
    assert sorted(shown.splitlines()) == [f"{n}: n{n}" for n in range(4)]
    # Without brackets pdsh takes 0-3 for one name, which is a nodespec.
    shown = call(it, tmp_path, "pdsh", "-R", "exec", "-w", "0-3", "bpsh", "%h", "uname", "-n")
    assert sorted(shown.splitlines()) == [f"0-3: n{n}" for n in range(4)]


def test_clush(it: VirtualCluster, tmp_path: Path) -> None:
    shown = call(it, tmp_path, "clush", "--worker=exec", "-w", "[0-3]", "bpsh", "%h", "uname", "-n")
    assert sorted(shown.splitlines()) == [f"{n}: n{n}" for n in range(4)]


def test_git_pushes_to_a_node_and_clones_from_it(it: VirtualCluster, tmp_path: Path) -> None:
    def git(*words: str) -> str:
        return call(it, tmp_path, "git", *words, GIT_SSH_COMMAND="bpsh", GIT_CONFIG_NOSYSTEM="1")

    git("init", "-q", "--bare", "there.git")
    git("init", "-q", "here")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    git("-C", "here", *identity, "commit", "-q", "--allow-empty", "-m", "first")
    git("-C", "here", "push", "-q", f"2:{tmp_path}/there.git", "HEAD:main")
    git("clone", "-q", "-b", "main", f"1:{tmp_path}/there.git", "back")
    assert git("-C", "back", "log", "--format=%s") == "first\n"

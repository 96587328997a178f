"""bpcp on a real cluster whose nodes each have a file system of their own at one and the same path."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.cluster.virtual import TOP, VirtualCluster, cluster, kill, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NODES = 7
SMALL = 6  # the node with a disk of 1 MB


class Copies:
    """A cluster, and what is in `place` on each of its nodes."""

    def __init__(self, it: VirtualCluster, place: Path) -> None:
        self.it = it
        self.place = place

    def command(self, *words: str | Path) -> list[str]:
        return [sys.executable, "-m", "bpfs.cli.bpcp", *map(str, words)]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "BPFS": str(self.it.mount), "PYTHONPATH": str(TOP)}

    def bpcp(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=100, check=False, env=self.environment,
            stdin=subprocess.DEVNULL, cwd=self.place.parent,
        )  # fmt: skip

    def on(self, node: int | str, *words: str, stdin: bytes = b"") -> str:
        run = subprocess.run(
            [str(TOP / "bpfs/bin/bpsh"), "-s", str(node), "--", *words], input=stdin, capture_output=True, timeout=100,
            env=self.environment, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return run.stdout.decode(errors="surrogateescape")

    def sums(self, nodes: str, name: str) -> list[str]:
        return [line.split()[0] for line in self.on(nodes, "sha256sum", f"{self.place}/{name}").splitlines()]

    def everything(self, node: int) -> str:
        return self.on(node, "find", str(self.place), "-mindepth", "1")


@pytest.fixture(scope="module")
def copies(session_folder: Path) -> Iterator[Copies]:
    folder = session_folder / "copies"
    (folder / "place").mkdir(parents=True)
    with cluster(folder / "m", nodes=NODES) as it:
        made = Copies(it, folder / "place")
        for node in range(NODES):
            size = "1m" if node == SMALL else "100m"
            made.on(node, "mount", "-t", "tmpfs", "-o", f"size={size}", f"node{node}", str(made.place))
        yield made


@pytest.fixture(autouse=True)
def empty(copies: Copies) -> Iterator[None]:
    """What a test has copied does not stay; nor does anything else: every file there has a name that was asked for."""
    yield
    left = copies.on("up", "sh", "-c", f"find {copies.place} -name '.bpcp*'; rm -rf {copies.place}/*")
    assert left == ""


def test_to_many_nodes_from_one_and_between(copies: Copies, tmp_path: Path) -> None:
    data = os.urandom(5_000_000)
    (tmp_path / "f").write_bytes(data)
    run = copies.bpcp(tmp_path / "f", f"0-5:{copies.place}")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert copies.sums("0-5", "f") == [sha256(data).hexdigest()] * 6
    assert not (copies.place / "f").exists()
    assert copies.bpcp(f"2:{copies.place}/f", f"4:{copies.place}/g").returncode == 0
    assert copies.sums("4", "g") == [sha256(data).hexdigest()]
    # From several nodes each has its number behind its name.
    assert copies.bpcp(f"1-2:{copies.place}/f", tmp_path).returncode == 0
    assert [(tmp_path / f"f.{node}").read_bytes() == data for node in (1, 2)] == [True, True]


def test_a_terminal_shows_a_bar(copies: Copies, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(3 << 20))
    terminal, end = pty.openpty()
    try:
        run = subprocess.run(
            copies.command(tmp_path / "f", f"1-2:{copies.place}"), stderr=end, stdin=subprocess.DEVNULL, timeout=100,
            env=copies.environment, check=False,
        )  # fmt: skip
        os.close(end)
        shown = os.read(terminal, 65536).decode()
    finally:
        os.close(terminal)
    assert run.returncode == 0
    lines = [line for line in shown.split("\r") if line.startswith("[")]
    assert re.fullmatch(r"\[#+\] 100% 3\.0M [0-9.]+[BKMG]/s 00:00  2/2 done", lines[-1].rstrip())
    assert all(len(line) < 80 for line in lines)


def test_a_tree_with_all_that_is_in_it(copies: Copies, tmp_path: Path) -> None:
    top = tmp_path / "tree"
    (top / "inner" / "closed").mkdir(parents=True)
    (top / "inner" / "odd\nname \udcff").write_bytes(b"x")
    (top / "inner" / "link").symlink_to("../nowhere")
    (top / "program").write_bytes(b"#!")
    (top / "program").chmod(0o4751)
    os.chown(top / "program", 7, 8)
    os.utime(top / "program", ns=(10**18, 10**18 + 1))
    (top / "inner" / "closed").chmod(0o511)
    os.utime(top / "inner", ns=(10**18, 10**18))
    os.mkfifo(top / "fifo")
    run = copies.bpcp("-p", "-r", top, f"1-2:{copies.place}")
    assert run.returncode == 1
    assert run.stderr == f"bpcp: {top}/fifo: is no file, directory or symbolic link: left out\n"
    (top / "fifo").unlink()
    os.utime(top, ns=(10**18, 10**18))
    assert copies.bpcp("-p", "-r", top, f"1-2:{copies.place}").stderr == ""
    show = ["find", ".", "-printf", "%p %y %m %U:%G %T@ %l\\n"]
    found = subprocess.run(show, cwd=top, capture_output=True, check=True).stdout
    want = found.decode(errors="surrogateescape")
    for node in (1, 2):
        assert copies.on(node, "sh", "-c", f'cd {copies.place}/tree && exec "$@"', "sh", *show) == want
    # Without -p the mode is that of a new file.
    assert copies.bpcp(top / "program", f"1:{copies.place}/p").returncode == 0
    assert copies.on(1, "stat", "-c", "%a %u", f"{copies.place}/p") == "751 0\n"


def test_holes_stay_holes(copies: Copies, tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.seek(3 << 30)
        file.write(b"end")
        file.truncate(4 << 30)
    assert copies.bpcp(tmp_path / "sparse", f"0-1:{copies.place}/s").returncode == 0
    for node in (0, 1):
        size, blocks = copies.on(node, "stat", "-c", "%s %b", f"{copies.place}/s").split()
        assert (int(size), int(blocks) < 100) == (4 << 30, True)
        assert copies.on(node, "sh", "-c", f"tail -c +{(3 << 30) + 1} {copies.place}/s | head -c 3") == "end"


def test_a_full_disk_is_named_and_nobody_elses_trouble(copies: Copies, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    order = f"{SMALL},0-5"  # the full one feeds others
    assert copies.bpcp(tmp_path / "f", f"{order}:{copies.place}").returncode == 0
    data = os.urandom(3_000_000)
    (tmp_path / "f").write_bytes(data)
    run = copies.bpcp(tmp_path / "f", f"{order}:{copies.place}")
    assert (run.returncode, run.stderr) == (1, f"bpcp: node {SMALL}: {copies.place}/f: No space left on device\n")
    assert copies.sums("0-5", "f") == [sha256(data).hexdigest()] * 6
    assert copies.sums(str(SMALL), "f") == [sha256(b"old").hexdigest()]


def started(copies: Copies, tmp_path: Path, *options: str, megabytes: int = 3) -> tuple[subprocess.Popen[str], bytes]:
    """A copy to nodes 0-5 that is under way, and stays so for three seconds."""
    data = os.urandom(megabytes << 20)
    (tmp_path / "f").write_bytes(data)
    bpcp = subprocess.Popen(
        copies.command("-l", f"{megabytes / 3}M", *options, tmp_path / "f", f"0-5:{copies.place}"),
        env=copies.environment, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    # tmpfs counts the pages of files that have no name yet.
    wait_until(
        lambda: int(copies.on(5, "stat", "-f", "-c", "%b-%f", str(copies.place)).split("-")[0])
        - int(copies.on(5, "stat", "-f", "-c", "%f", str(copies.place))) > 50,
        "data should arrive at node 5",
    )  # fmt: skip
    return bpcp, data


def agent_on(copies: Copies, node: int) -> int:
    """The pid of what runs on a node for bpcp."""
    (pid,) = os.listdir(copies.it.mount / "nodes" / str(node) / "procs")
    return int(pid)


# 3 MB find room in the kernel's buffers, 30 do not.
@pytest.mark.parametrize("megabytes", [3, 30])
def test_a_node_that_stands_still_is_given_up(copies: Copies, tmp_path: Path, megabytes: int) -> None:
    bpcp, data = started(copies, tmp_path, "--timeout", "2", megabytes=megabytes)
    try:
        copies.it.write(f"procs/{agent_on(copies, 0)}/signal", "STOP")  # it feeds nodes 2 and 3
        _, err = bpcp.communicate(timeout=100)
    finally:
        bpcp.kill()
        bpcp.wait()
    assert (bpcp.returncode, err) == (1, "bpcp: node 0: it took nothing for too long\n")
    assert copies.sums("1-5", "f") == [sha256(data).hexdigest()] * 5
    assert copies.everything(0) == ""


def test_an_interrupted_copy_leaves_nothing(copies: Copies, tmp_path: Path) -> None:
    bpcp, _ = started(copies, tmp_path)
    try:
        kill(bpcp.pid)
        bpcp.communicate(timeout=100)
        wait_until(lambda: not os.listdir(copies.it.mount / "nodes/5/procs"), "the agents should end")
    finally:
        bpcp.kill()
        bpcp.wait()
    assert [copies.everything(node) for node in range(6)] == [""] * 6


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["{t}/none", "1:{p}"], 1, "{t}/none: No such file or directory"),
        (["{t}", "1:{p}"], 1, "{t}: Is a directory (-r copies directories)"),
        (["{t}/f", "1:{p}/none/"], 1, "node 1: {p}/none/: Not a directory"),
        (["{t}/f", "1:{p}/none/g"], 1, "node 1: {p}/none/g: No such file or directory"),
        (["{t}/f", "99:{p}"], 1, "there is no node 99"),
        (["-l", "x", "{t}/f", "1:{p}"], 2, "bpcp: error: argument -l/--limit: 'x' is no rate such as 10M"),
    ],
)
def test_errors_name_file_and_node(copies: Copies, tmp_path: Path, words: list[str], code: int, sentence: str) -> None:
    (tmp_path / "f").write_text("x")
    run = copies.bpcp(*(word.format(t=tmp_path, p=copies.place) for word in words))
    assert run.returncode == code
    assert run.stderr.rstrip().endswith(sentence.format(t=tmp_path, p=copies.place))
    assert copies.everything(1) == ""


def test_devices_and_their_like_are_not_replaced(copies: Copies, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    (tmp_path / "link").symlink_to("f")
    copies.on(1, "mkfifo", f"{copies.place}/f", f"{copies.place}/link")
    try:
        for name in ("f", "link"):
            run = copies.bpcp(*["-r"] * (name == "link"), tmp_path / name, f"1:{copies.place}/{name}")
            assert (run.returncode, run.stderr) == (
                1, f"bpcp: node 1: {copies.place}/{name}: is a device, a socket or a pipe, which no file replaces\n",
            )  # fmt: skip
        assert copies.on(1, "stat", "-c", "%F", f"{copies.place}/f", f"{copies.place}/link") == "fifo\n" * 2
    finally:
        copies.on(1, "rm", f"{copies.place}/f", f"{copies.place}/link")
    assert copies.everything(1) == ""


def test_a_lost_node_is_named_and_the_others_go_on(copies: Copies, tmp_path: Path) -> None:
    bpcp, data = started(copies, tmp_path)
    try:
        kill(copies.it.pid("n0"))
        _, err = bpcp.communicate(timeout=100)
    finally:
        bpcp.kill()
        bpcp.wait()
    assert bpcp.returncode == 1
    assert err.startswith("bpcp: node 0: ")
    assert len(err.splitlines()) == 1
    assert copies.sums("1-5", "f") == [sha256(data).hexdigest()] * 5

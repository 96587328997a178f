"""libbproc and libbeostat: programs written for them compile, in C and C++, and run on a real cluster."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.cluster.virtual import cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

HERE = Path(__file__).parent
BIN = HERE.parents[1] / "bpfs" / "bin"


@pytest.fixture(scope="module")
def it(session_folder):
    with cluster(session_folder / "lib", nodes=3) as made:
        yield made


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lib")

    def compiled(name: str) -> Path:
        program = folder / name
        options = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "bproc", "beostat"],
            env={**os.environ, "PKG_CONFIG_PATH": str(BIN / "pkgconfig")}, capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        source = str(HERE / f"{name}.c")
        subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-o", program, source, *options], check=True)
        return program

    return compiled


def run(program: Path, it, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BPFS": str(it.mount if it is not None else "/nowhere")}
    command = [str(program), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_nodes_sets_rights_and_attributes(it, build):
    done = run(build("nodes"), it)
    assert (done.returncode, done.stderr) == (0, "")


def test_figures(it, build):
    done = run(build("figures"), it)
    assert (done.returncode, done.stderr) == (0, "")


def test_moves_forks_and_programs(it, build):
    done = run(build("moves"), it)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["n1", "n2", os.uname().nodename]
    outcomes = [line.split()[1:3] for line in it.read("procs/onexec").splitlines()[-24:]]
    assert sorted(outcomes) == sorted([["-1", "EOPNOTSUPP"]] * 6 + [["8", "ENOENT"]] + [
        [str(number), "ok"] for rank in range(24) if rank != 7 and (number := rank % 4 - 1) >= 0
    ])  # fmt: skip


def test_descriptors_of_moved_processes(it, build, session_folder):
    folder = session_folder / "lib-io"
    folder.mkdir()
    done = run(build("io"), it, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "written").stat().st_mode & 0o777 == 0o640


def test_twins_with_descriptors_and_flags(it, build, session_folder):
    folder = session_folder / "lib-twins"
    folder.mkdir()
    done = run(build("twins"), it, folder)
    assert (done.returncode, done.stderr) == (0, "")
    said = sorted((folder / "twins").read_text().splitlines())
    assert said == sorted([
        "move_io 1", "rfork_io 0", "rfork_io -1", *["vrfork_io 2", "vrfork_io 1"] * 2,
        "rexec_io n1", "vexecmove_io n0", "vexecmove_io n2",
    ])  # fmt: skip


def test_ends_of_nodes(build, session_folder):
    with cluster(session_folder / "power", nodes=6) as six:
        done = run(build("power"), six)
    assert (done.returncode, done.stderr) == (0, "")


def test_images(it, build, tmp_path):
    program = build("image")
    done = run(program, it, tmp_path / "image")
    assert (done.returncode, done.stderr) == (0, "")
    back = run(program, it, "-", tmp_path / "image")
    assert (back.returncode, back.stderr) == (55, "")


def test_images_of_programs_that_have_not_run_yet(it, build, tmp_path):
    out, image = tmp_path / "out", tmp_path / "image"
    script = f'echo "$FROM $0 $$" >> {out}; exit 7'
    done = run(build("execdump"), it, image, "/bin/sh", "-c", script, "zero")
    assert (done.returncode, done.stderr) == (0, "") and not out.exists()
    back = run(build("image"), it, "-", image)
    assert (back.returncode, back.stderr) == (7, "")
    assert out.read_text().split()[:2] == ["before", "zero"]


def test_without_a_cluster(build):
    done = run(build("alone"), None)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_headers_are_good_for_cplusplus(tmp_path):
    source = tmp_path / "it.cc"
    source.write_text(
        "#include <sys/beostat.h>\n#include <sys/bproc.h>\n"
        "int main() { return bproc_currnode() == BPROC_NODE_MASTER ? 0 : 1; }\n"
    )
    command = ["g++", "-Wall", "-Werror", "-I", str(BIN / "include"), "-fsyntax-only", str(source)]
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        subprocess.run(["gcc", "-x", "c++", *command[1:]], check=True)


def test_python_can_use_it_through_ctypes(it, monkeypatch):
    monkeypatch.setenv("BPFS", str(it.mount))
    library = ctypes.CDLL(str(BIN / "libbproc.so"), use_errno=True)
    # os.environ reaches getenv(3), so the library finds this cluster.
    assert library.bproc_numnodes() == 3 and library.bproc_currnode() == -1


@pytest.mark.parametrize("name", ["bproc", "beostat"])
def test_each_library_has_all_calls_of_its_header_and_no_others(name):
    header = (BIN / "include" / "sys" / f"{name}.h").read_text()
    declared = set(re.findall(rf"\b(_?{name}_\w+)\((?!\d\))", re.sub(r"#define.*", "", header)))
    symbols = subprocess.run(["nm", "-D", "--defined-only", BIN / f"lib{name}.so"], capture_output=True, text=True)
    assert declared == {line.split()[2] for line in symbols.stdout.splitlines()}
    # A program of these tests calls each of them.
    sources = "".join(path.read_text() for path in HERE.glob("*.c"))
    assert {call for call in declared if not re.search(rf"\b{call}\(", sources)} == set()
    page = (HERE.parents[1] / f"bpfs/man/lib{name}.3.md").read_text()
    assert declared <= set(re.findall(rf"`(_?{name}_\w+)", page))


def test_attributes_by_hand(it):
    path = it.mount / "nodes/0"
    os.setxattr(path, "bproc.colour", b"blue")
    assert os.getxattr(path, "bproc.colour") == b"blue"
    assert os.listxattr(path) == ["bproc.state", "bproc.addr", "bproc.colour"]
    os.removexattr(path, "bproc.colour")
    with pytest.raises(OSError, match="No data"):
        os.getxattr(path, "bproc.colour")
    for target, name in ((path, "user.colour"), (path / "state", "bproc.colour"), (it.mount, "bproc.colour")):
        with pytest.raises(OSError, match="not supported"):
            os.setxattr(target, name, b"blue")
    for number in range(32):
        os.setxattr(path, f"bproc.{number}", b"")
    with pytest.raises(OSError, match="No space"):
        os.setxattr(path, "bproc.more", b"")
    on_node = f"import os; print(os.getxattr('{it.mount}/nodes/0', 'bproc.state'))"
    done = subprocess.run(
        [BIN / "bpsh", "1", "/usr/bin/python3", "-c", on_node],
        env={**os.environ, "BPFS": str(it.mount)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("b'up'\n", "")

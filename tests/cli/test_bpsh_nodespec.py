"""bpsh's nodespecs are those of bpfs.nodespec: the same nodes, the same errors."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bpfs.nodespec import Candidate, NodespecError, expand
from bpfs.records import parse_status

BPSH = Path(__file__).resolve().parents[2] / "bpfs" / "bin" / "bpsh"

numbers = st.one_of(st.integers(0, 12).map(str), st.sampled_from(["007", "999999999", "1234567890123"]))
prefixed = st.builds(str.__add__, st.sampled_from(["", "n", "."]), numbers)
words = st.sampled_from(["down", "boot", "unavailable", "up", "error", "odd", "banana", "", "master", "self", "all"])
terms = st.one_of(
    prefixed,
    st.builds("{}-{}".format, prefixed, prefixed),
    st.builds("{}-".format, prefixed),
    st.builds("{}{}{}".format, st.sampled_from(["", "all", "!"]), st.sampled_from(["", "!", "not"]), words),
    st.sampled_from(
        ["-1", "n-1", ".-1", "10.0.0.3", "10.0.0.99", "fd00::7", "::", "1.", ".5.", "-2", "n", "-", "@nodes"]
    ),
    st.text("0123456789-.n!,:@#abcdefg ", max_size=8),
)
specs = st.lists(terms, max_size=5).flatmap(
    lambda found: st.sampled_from([",", " ", ",,", "\n"]).map(lambda separator: separator.join(found))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mount of plain files, which is the working directory as well."""
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "status").write_text(
        "-1 up 111 root root 10.0.0.254\n0 up 111 root root 10.0.0.1\n3 odd 111 root root 10.0.0.3\n"
        "1 down 111 root root\n2 boot 111 root root -\n7 unavailable 111 root root fd00::7\n"
    )
    (folder / "self").symlink_to("nodes/3")
    (folder / "nodes").write_text("7, 0 # the best\n#1\nup\n")
    return folder


def by_bpsh(folder: Path, spec: str) -> list[int] | str:
    command = [str(BPSH), "--mount", str(folder), "--expand", spec]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return [int(line) for line in run.stdout.splitlines()]
    assert run.returncode == 1, run.stderr
    return run.stderr.removeprefix("bpsh: ").removesuffix("\n")


def by_python(folder: Path, spec: str) -> list[int] | str:
    nodes = [Candidate(row.number, row.state, row.address) for row in parse_status((folder / "status").read_text())]

    def read(path: str) -> str:
        return (folder / path).read_text()

    try:
        return expand(spec, nodes, current=3, read=read)
    except NodespecError as error:
        return str(error)


@given(specs)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@example("0-2,self,master,all!up,@nodes,notodd")
@example("@missing,99")
@example("@")
@example("@.")
@example("99,@missing")
def test_both_agree(folder: Path, spec: str) -> None:
    assert by_bpsh(folder, spec) == by_python(folder, spec)


def test_a_file_cannot_name_a_file(folder: Path) -> None:
    (folder / "outer").write_text("1 @nodes\n")
    assert by_bpsh(folder, "@outer") == by_python(folder, "@outer") == "outer: a file of nodes cannot name another file"

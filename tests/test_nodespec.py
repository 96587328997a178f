"""Nodespecs: the grammar, its errors, and that folding and expanding are inverse."""

from __future__ import annotations

from errno import EINVAL, ENOENT
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpfs.nodes.states import NodeState
from bpfs.nodespec import STATES, Candidate, NodespecError, expand, fold

NODES = [
    Candidate(-1, "up", "10.0.0.254"),
    Candidate(0, "up", "10.0.0.1"),
    Candidate(1, "down"),
    Candidate(2, "up", "10.0.0.3"),
    Candidate(3, "boot", "10.0.0.4"),
    Candidate(7, "unavailable", "fd00::7"),
]
SLAVES = [0, 1, 2, 3, 7]


@pytest.mark.parametrize(
    ("spec", "numbers"),
    [
        ("2", [2]),
        ("n2", [2]),
        (".2", [2]),
        ("007", [7]),
        ("0-3", [0, 1, 2, 3]),
        ("n0-n2", [0, 1, 2]),
        ("2-", [2, 3, 7]),
        ("4-", [7]),
        ("7,0-1", [7, 0, 1]),
        ("0,0", [0, 0]),
        ("-1", [-1]),
        ("n-1", [-1]),
        ("master", [-1]),
        ("self", [3]),
        ("all", SLAVES),
        ("up", [0, 2]),
        ("allup", [0, 2]),
        ("notup", [1, 3, 7]),
        ("!up", [1, 3, 7]),
        ("allnotup", [1, 3, 7]),
        ("all!down", [0, 2, 3, 7]),
        ("halt", []),
        ("!halt", SLAVES),
        ("unavailable,boot", [7, 3]),
        ("10.0.0.3", [2]),
        ("fd00::7", [7]),
        ("0 1,,2\n", [0, 1, 2]),
    ],
)
def test_grammar(spec: str, numbers: list[int]) -> None:
    assert expand(spec, NODES, current=3) == numbers


@pytest.mark.parametrize(
    ("spec", "errno", "sentence"),
    [
        ("", EINVAL, "the nodespec is empty"),
        (" , ", EINVAL, "the nodespec is empty"),
        ("5", ENOENT, "there is no node 5"),
        ("0-5", ENOENT, "there is no node 4"),
        ("0-429496729", ENOENT, "there is no node 4"),
        ("99999999999999999999", ENOENT, "there is no node 99999999999999999999"),
        ("8-", ENOENT, "there is no node 8 or above"),
        ("3-1", EINVAL, "the range 3-1 runs backwards"),
        ("banana", EINVAL, "'banana' is no node, range, state or file of nodes"),
        ("1-2-3", EINVAL, "'1-2-3' is no node, range, state or file of nodes"),
        ("-2", EINVAL, "'-2' is no node, range, state or file of nodes"),
        ("!", EINVAL, "'!' is no node, range, state or file of nodes"),
        ("not", EINVAL, "'not' is no node, range, state or file of nodes"),
        ("!5", EINVAL, "'!5' is no node, range, state or file of nodes"),
        ("٣", EINVAL, "'٣' is no node, range, state or file of nodes"),
        ("10.0.0.9", ENOENT, "no node has the address 10.0.0.9"),
        ("@/nowhere/at all", ENOENT, "/nowhere/at: No such file or directory"),
    ],
)
def test_errors_name_what_is_wrong(spec: str, errno: int, sentence: str) -> None:
    with pytest.raises(NodespecError) as caught:
        expand(spec, NODES)
    assert (caught.value.errno, str(caught.value)) == (errno, sentence)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "nodes"
    file.write_text("# the good ones\n7 0\nup # whatever is up\n")
    assert expand(f"3,@{file},1", NODES) == [3, 7, 0, 0, 2, 1]
    file.write_text("@other\n")
    with pytest.raises(NodespecError, match="cannot name another file"):
        expand(f"@{file}", NODES)


def test_states_are_those_of_the_node_table() -> None:
    assert set(STATES) == {state.value for state in NodeState}


numbers = st.lists(st.integers(min_value=-1, max_value=300), min_size=1)


@given(numbers)
def test_folding_keeps_order_and_number(wanted: list[int]) -> None:
    nodes = [Candidate(number, "up") for number in range(301)]
    assert expand(fold(wanted), nodes) == wanted


@given(st.sets(st.integers(min_value=0, max_value=400), min_size=1))
def test_folding_a_set_is_as_short_as_can_be(wanted: set[int]) -> None:
    terms = fold(sorted(wanted)).split(",")
    gaps = sum(number + 1 not in wanted for number in wanted)
    assert len(terms) == gaps


@given(st.text())
def test_any_text_gives_nodes_or_a_sentence(text: str) -> None:
    def unreadable(path: str) -> str:
        raise FileNotFoundError(ENOENT, "No such file or directory")

    try:
        assert set(expand(text, NODES, read=unreadable)) <= {-1, *SLAVES}
    except NodespecError as error:
        assert error.errno in (EINVAL, ENOENT)
        assert "\n" not in str(error)

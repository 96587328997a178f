"""What a master leaves to the next one: the last word on everything counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpfs.procs import ledger
from bpfs.procs.ledger import Ledger, Part


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "away"


def test_the_last_word_counts(path):
    with Ledger(path) as first:
        first.put(Part.AWAY, 7, {"place": 1})
        first.put(Part.AWAY, 8, {"place": 2})
        first.put(Part.CHILD, 8, 7)
        first.put(Part.AWAY, 7, {"place": 3, "comm": b"x"})
        first.drop(Part.AWAY, 8)
        first.drop(Part.AWAY, 9)  # never heard of
    with Ledger(path, afresh=False) as second:
        assert second.left(Part.AWAY) == {7: {"place": 3, "comm": b"x"}}
        assert second.left(Part.CHILD) == {8: 7}
        assert second.left(Part.STREAMS) == {}
        second.drop(Part.AWAY, 7)
    with Ledger(path, afresh=False) as third:
        assert third.left(Part.AWAY) == {}
        assert third.left(Part.CHILD) == {8: 7}
    assert Ledger(path).left(Part.CHILD) == {}


def test_what_is_void_does_not_pile_up(path, monkeypatch):
    monkeypatch.setattr(ledger, "COMPACT", 1000)
    with Ledger(path) as first:
        first.put(Part.AWAY, 1, "stays")
        for number in range(2000):
            first.put(Part.STREAMS, 0, number)
        assert path.stat().st_size < 2000
    assert Ledger(path, afresh=False).left(Part.AWAY) == {1: "stays"}
    assert Ledger(path, afresh=False).left(Part.STREAMS) == {0: 1999}


def test_a_torn_end_costs_no_more_than_itself(path):
    with Ledger(path) as first:
        first.put(Part.AWAY, 1, "whole")
        first.put(Part.AWAY, 2, "torn")
    path.write_bytes(path.read_bytes()[:-3])
    assert Ledger(path, afresh=False).left(Part.AWAY) == {1: "whole"}

"""What a node tells its next master once more of what its jobs did."""

from __future__ import annotations

import struct

import pytest

from engine.jobwatch import RECORD, Kind, parse, still_news

IS, ENDED, REAPED, STOOD = Kind.IS, Kind.ENDED, Kind.REAPED, Kind.STOOD


def packet(*records: tuple[Kind, int, int]) -> bytes:
    """One packet of records: kind, pid, code."""
    return b"".join(RECORD.pack(RECORD.size, kind, ord("S"), pid, 1, 1, 1, 0, code, 0, 0, 0, b"name")
                    for kind, pid, code in records)  # fmt: skip


def told(packets: list[bytes], alive: set[int]) -> list[list[tuple[Kind, int, int]]]:
    """The same of what is left."""
    return [[(one.kind, one.pid, one.code) for one in parse(left)] for left in still_news(packets, alive)]


CASES = {
    "who lives and who has ended": (
        [[(IS, 5, 0), (IS, 6, 0)], [(ENDED, 6, 256)]], {5}, [[(IS, 5, 0), (IS, 6, 0)], [(ENDED, 6, 256)]],
    ),
    "who was waited for is no child to wait for": (
        [[(IS, 5, 0)], [(IS, 5, 0), (ENDED, 5, 0), (REAPED, 5, 0)]], set(), [[], [(ENDED, 5, 0), (REAPED, 5, 0)]],
    ),
    "its pid is somebody else's now": (
        [[(IS, 5, 0), (ENDED, 5, 9)], [(REAPED, 5, 0), (IS, 5, 0)]], {5}, [[], [(IS, 5, 0)]],
    ),
    "and that one has ended, too": (
        [[(IS, 5, 0), (ENDED, 5, 9), (REAPED, 5, 0)], [(IS, 5, 0), (ENDED, 5, 0)]], set(),
        [[(ENDED, 5, 9), (REAPED, 5, 0)], [(IS, 5, 0), (ENDED, 5, 0)]],
    ),
    "what a move has left ended first": (
        [[(IS, 5, 0), (ENDED, 5, -1)], [(IS, 5, 0), (ENDED, 5, 256)]], set(),
        [[(IS, 5, 0)], [(IS, 5, 0), (ENDED, 5, 256)]],
    ),
    "what stands for a living one has not": ([[(STOOD, 5, 9), (STOOD, 6, 9)]], {5}, [[(STOOD, 6, 9)]]),
    "nothing": ([], set(), []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_told_again(case: str) -> None:
    packets, alive, left = CASES[case]
    assert told([packet(*records) for records in packets], alive) == left


@pytest.mark.parametrize("length", [1, RECORD.size - 1, RECORD.size + 1, 2 * RECORD.size - 1])
def test_a_packet_that_was_cut_off_is_refused(length: int) -> None:
    with pytest.raises((ValueError, struct.error)):
        still_news([packet((IS, 5, 0), (ENDED, 5, 0))[:length]], set())

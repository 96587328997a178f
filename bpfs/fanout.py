"""A tree without a plan: who feeds whom follows from everybody's rank, as in a heap.

The source has rank 0; rank r feeds the ranks from fanout * r + 1 to fanout * (r + 1).
"""

from __future__ import annotations

from collections.abc import Iterator


def below(rank: int, fanout: int) -> slice:
    """Whom a rank feeds, of a list by rank."""
    return slice(fanout * rank + 1, fanout * (rank + 1) + 1)


def above(rank: int, fanout: int) -> Iterator[int]:
    """The ranks between a rank and the source, the one that feeds it first."""
    while (rank := (rank - 1) // fanout) > 0:
        yield rank

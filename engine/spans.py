"""Sets of addresses as sorted, disjoint lists of (start, end)."""

import bisect
from collections.abc import Iterable

Spans = list[tuple[int, int]]


def merge(spans: Iterable[tuple[int, int]]) -> Spans:
    """Any spans as a set: sorted, what overlaps or touches made one."""
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif start < end:
            merged.append((start, end))
    return merged


def both(one: Spans, other: Spans) -> Spans:
    """What is in both sets."""
    found: Spans = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            found.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(one: Spans, other: Spans) -> Spans:
    """What is in the first set only."""
    left: Spans = []
    j = 0
    for start, end in one:
        while j < len(other) and other[j][1] <= start:
            j += 1
        k = j
        while k < len(other) and other[k][0] < end:
            if other[k][0] > start:
                left.append((start, other[k][0]))
            start = max(start, other[k][1])
            k += 1
        if start < end:
            left.append((start, end))
    return left


def overlapping(spans: Spans, start: int, end: int) -> Spans:
    """The members of a set that have something of a span, whole."""
    first = max(bisect.bisect_right(spans, (start, end)) - 1, 0)
    last = first
    while last < len(spans) and spans[last][0] < end:
        last += 1
    while first and spans[first - 1][1] > start:
        first -= 1
    return [one for one in spans[first:last] if start < one[1]]


def touches(spans: Spans, start: int, end: int) -> bool:
    """Whether a set has something of a span."""
    return bool(overlapping(spans, start, end))


def size(spans: Spans) -> int:
    """Bytes in a set."""
    return sum(end - start for start, end in spans)


def runs(spans: Spans) -> list[tuple[int, int]]:
    """As (address, length)."""
    return [(start, end - start) for start, end in spans]


def of_runs(found: Iterable[tuple[int, int]]) -> Spans:
    """From (address, length)."""
    return merge((address, address + length) for address, length in found)


def cut(spans: Spans, start: int, end: int) -> None:
    """Take a span out of a set, in place: of use where sets are large and what goes is small."""
    first = bisect.bisect_left(spans, start, key=lambda one: one[1])
    if first < len(spans) and spans[first][1] == start:
        first += 1
    last = bisect.bisect_left(spans, end, first, key=lambda one: one[0])
    left = [(a, b) for a, b in ((spans[first][0], start), (end, spans[last - 1][1])) if a < b] if first < last else []
    spans[first:last] = left


def within(spans: Spans, start: int, end: int) -> Spans:
    """What of a set is in a span, found by bisection."""
    return [(max(a, start), min(b, end)) for a, b in overlapping(spans, start, end)]

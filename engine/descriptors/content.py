"""Contents of objects that have no name to find them by: deleted files and memfds travel with the process."""

from __future__ import annotations

import errno
import os

from engine.descriptors.model import Entry, Probe, Source

_CHUNK = 1 << 20


def dump(source: Source, probe: Probe) -> Entry:
    """`size` and `runs` ([offset, bytes] of what is no hole); empty when another entry carries the same object's.

    Raises:
        Refusal: more than may travel.
        OSError: it cannot be read.
    """
    key = (probe.status.dev, probe.status.ino)
    if key in source.content_seen:
        return {}
    fd = os.open(source.path(probe), os.O_RDONLY | os.O_CLOEXEC)
    try:
        runs = []
        for start, end in _data(fd, probe.status.size):
            source.take_room(end - start)
            runs += [[at, os.pread(fd, min(_CHUNK, end - at), at)] for at in range(start, end, _CHUNK)]
    finally:
        os.close(fd)
    source.content_seen.add(key)
    return {"size": probe.status.size, "runs": runs}


def _data(fd: int, size: int) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # holes to the end
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        spans.append((start, end))
    return spans


def fill(fd: int, entry: Entry) -> None:
    """Write what `dump` read. Raises OSError."""
    os.ftruncate(fd, entry["size"])
    for offset, data in entry["runs"]:
        view = memoryview(data)
        while view:
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count

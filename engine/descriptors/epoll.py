"""epoll(7): the set is made here, its members are added inside the process when all descriptors are in place.

Inside, because a set remembers numbers, and because a signalfd in it watches the signals of whoever added it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from engine.descriptors.model import Entry, Kind, Probe, Refusal, Row, Source, Target
from engine.linux import epoll


def _matches(_: Source, probe: Probe) -> bool:
    return probe.link == b"anon_inode:[eventpoll]"


def _dump(source: Source, probe: Probe) -> Entry:
    numbers = {fd: other for other in source.probes for fd, _ in other.fds}
    members = []
    for line in probe.info.split(b"\ntfd:")[1:]:
        # "tfd: 3 events: 80000019 data: 3 pos:0 ino:7f2f sdev:9": hexadecimal but for the number
        words = line.replace(b":", b" ").split()
        fields = dict(zip(words[1::2], words[2::2], strict=False))
        number = int(words[0])
        member = numbers.get(number)
        if member is None or member.status.ino != int(fields[b"ino"], 16):
            raise Refusal(f"is an epoll set that watches descriptor {number}, which was closed and lives on elsewhere")
        members.append([number, int(fields[b"events"], 16), int(fields[b"data"], 16)])
    return probe.entry("epoll", members=members)


def forget(table: Iterable[Entry], numbers: Container[int]) -> None:
    """Take descriptors that will not be there out of all sets, as closing them does."""
    for entry in table:
        if entry["kind"] == "epoll":
            entry["members"] = [member for member in entry["members"] if member[0] not in numbers]


def _build(_: Target, entry: Entry) -> int:
    return epoll.create()


def _rows(entry: Entry) -> Iterator[Row]:
    fd = entry["fds"][0][0]
    for number, events, data in entry["members"]:
        arguments = (fd, epoll.CTL_ADD, number, epoll.event(events, data))
        yield Row(epoll.EPOLL_CTL, arguments, label=f"descriptor {number} of epoll set {fd}")


KINDS = (Kind("epoll", _matches, _dump, _build, _rows),)

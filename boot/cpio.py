"""The archive that a kernel unpacks at its start: cpio in the "newc" format.

Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel. What is written depends on the
entries alone, never on their order, owner, or time.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

ALIGN = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of an archive.

    Attributes:
        path: without a leading slash.
        mode: type and permissions, as st_mode.
        data: content of a file, target of a symbolic link.
        device: major and minor number of a device node.
    """

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str, mode: int = 0o755) -> Entry:
    """A directory."""
    return Entry(path, stat.S_IFDIR | mode)


def file(path: str, data: bytes, mode: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(path, stat.S_IFREG | mode, data)


def link(path: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def character_device(path: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    """A character device."""
    return Entry(path, stat.S_IFCHR | mode, b"", (major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive of these entries, with every directory that they need; the same bytes for the same entries.

    Raises:
        ValueError: two different entries have one path.
    """
    found: dict[str, Entry] = {}
    for entry in entries:
        if found.setdefault(entry.path, entry) != entry:
            raise ValueError(f"{entry.path} is in the archive twice")
    for path in list(found):
        while (path := path.rpartition("/")[0]) and path not in found:
            found[path] = directory(path)
    parts = [_record(number, found[path]) for number, path in enumerate(sorted(found), 1)]
    return b"".join(parts) + _record(0, Entry("TRAILER!!!", 0))


def _record(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    # magic, inode, mode, uid, gid, links, mtime, size, device of the file system (2), of the node (2), name, checksum
    fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return _padded(head) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGN)

"""Regular files, directories, O_PATH descriptors: opened again under the same path.

Rights: what a process has open, it may have lost the right to open. It gets the very same object again in any case
(same machine, device and inode: the descriptor gives nothing that it had not). Any other object that the path leads to
on this node is opened with the process's own rights, symbolic links and all. Paths are resolved in the jobs' root.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator

from engine.descriptors import content
from engine.descriptors.model import (
    Entry,
    Kind,
    Probe,
    Refusal,
    Source,
    Target,
    boot_id,
    is_mode,
    open_flags,
    reopen,
)
from engine.linux import mounts, statx
from engine.linux.credentials import acting_as
from engine.linux.libc import LIBC
from engine.linux.openat2 import open_in_root

_FUSE_MAGIC = 0x65735546  # <linux/magic.h>
_MQUEUE_MAGIC = 0x19800202  # ipc/mqueue.c
_DELETED = b" (deleted)"


def _is_file(_: Source, probe: Probe) -> bool:
    return is_mode(probe, stat.S_IFREG) and probe.link.startswith(b"/")


def _is_directory(_: Source, probe: Probe) -> bool:
    return is_mode(probe, stat.S_IFDIR) and probe.link.startswith(b"/")


def _is_path(_: Source, probe: Probe) -> bool:
    return bool(probe.flags & os.O_PATH) and probe.link.startswith(b"/")


def _dump_file(source: Source, probe: Probe) -> Entry:
    # Every queue lies at the top of a file system of its own, which need not be mounted anywhere.
    at_top = probe.link.count(b"/") == 1 and source.file_system(probe) in ("", "mqueue")
    if at_top and _is_of(source.path(probe), _MQUEUE_MAGIC):
        raise Refusal(f"is a POSIX message queue ({os.fsdecode(probe.link)})")
    if probe.status.nlink == 0:
        return _dump_deleted(source, probe)
    return _dump_named(source, probe)


def _dump_named(source: Source, probe: Probe) -> Entry:
    path = _name(source, probe)
    _write_back(source, probe)
    return probe.entry(
        "file", path=path, pos=probe.pos, type=stat.S_IFMT(probe.status.mode), boot=boot_id()
    )  # fmt: skip


def _dump_deleted(source: Source, probe: Probe) -> Entry:
    if not is_mode(probe, stat.S_IFREG):
        raise Refusal(f"is a deleted directory ({os.fsdecode(probe.link)})")
    return dump_content(source, probe)


def dump_content(source: Source, probe: Probe) -> Entry:
    """The entry of a file that is made anew, from its content. Raises Refusal."""
    status = probe.status
    if source.held_elsewhere(probe):
        what = "a deleted file" if status.nlink == 0 else "memory"
        raise Refusal(f"is {what} that other processes have open, too ({os.fsdecode(probe.link)})")
    more = content.dump(source, probe)
    if status.nlink:
        more["boot"] = boot_id()
    return probe.entry(
        "deleted", path=probe.link.removesuffix(_DELETED), pos=probe.pos, mode=stat.S_IMODE(status.mode),
        uid=status.uid, gid=status.gid, **more,
    )  # fmt: skip


def _write_back(source: Source, probe: Probe) -> None:
    """What it has written to a server's file is there before the file is opened at its next place.

    The last close would do that, but not of a process that is killed, and so late that its copy runs already.
    """
    if os.major(probe.status.dev) or probe.access == os.O_RDONLY or not is_mode(probe, stat.S_IFREG):
        return
    if source.file_system(probe) in mounts.OF_SERVERS:
        try:
            os.fsync(source.grab(probe))
        except OSError as error:
            raise Refusal(f"cannot be written back to its server: {error.strerror}") from None


def _name(source: Source, probe: Probe) -> bytes:
    """The link's text, which must lead back to the object: not after unlinking one of its names, nor below an
    overmount."""
    there = False
    for root in _roots(source.pid):
        try:
            if statx.of_path(root + probe.link, follow=False).same(probe.status):
                return probe.link
            there = True
        except OSError:
            continue
    if not is_fuse(source.path(probe)):  # a FUSE server may renumber its files at will
        raise Refusal(f"is a file that its path does not lead to any more ({os.fsdecode(probe.link)})")
    # Then the kernel drops the name of the one that is open.
    return probe.link if there else probe.link.removesuffix(_DELETED)


def _roots(pid: int) -> Iterator[bytes]:
    yield b"/proc/%d/root" % pid
    yield b""  # a process in a chroot: the kernel shows us paths from its namespace's root


def is_fuse(path: bytes) -> bool:
    """Whether a path is on a FUSE file system; its server is asked, so never call it where it cannot answer."""
    return _is_of(path, _FUSE_MAGIC)


def _is_of(path: bytes, magic: int) -> bool:
    buffer = ctypes.create_string_buffer(256)
    return LIBC.statfs(path, buffer) == 0 and int.from_bytes(buffer.raw[:8], "little") == magic


def _build_file(target: Target, entry: Entry) -> int:
    fd = open_object(target, entry, entry["type"], open_flags(entry))
    if entry["pos"] and not entry["flags"] & os.O_PATH:
        os.lseek(fd, entry["pos"], os.SEEK_SET)
    return fd


def open_object(target: Target, entry: Entry, file_type: int, flags: int) -> int:
    """Open an entry's path, with the rights that the head of this module tells.

    Args:
        file_type: what it must be (stat.S_IFREG, …).
        flags: of open(2).

    Raises:
        OSError: not there, not allowed, or something else is there (ESTALE).
    """
    path, follow = entry["path"], os.O_NOFOLLOW if stat.S_ISLNK(file_type) else 0
    if entry["boot"] == boot_id():
        try:
            found = open_in_root(target.root, path, os.O_PATH | follow)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EACCES, errno.ENOTDIR):
                raise
        else:
            status = statx.of_descriptor(found)
            if status.ino == entry["ino"] and status.dev == entry["dev"]:
                return _finish(found, status, file_type, path, flags)
            os.close(found)
    with acting_as(target.credentials):
        found = open_in_root(target.root, path, os.O_PATH | follow)
        return _finish(found, statx.of_descriptor(found), file_type, path, flags)


def _finish(found: int, status: statx.Status, file_type: int, path: bytes, flags: int) -> int:
    # Only now that it is known to be no fifo and no device is it opened: neither can make us wait.
    if stat.S_IFMT(status.mode) != file_type:
        os.close(found)
        raise OSError(errno.ESTALE, "something else has this path here", os.fsdecode(path))
    if flags & os.O_PATH:
        return found
    try:
        return reopen(found, flags)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), os.fsdecode(path)) from None
    finally:
        os.close(found)


def _build_deleted(target: Target, entry: Entry) -> int:
    key = ("content", entry["dev"], entry["ino"])
    if "runs" in entry:
        same = find_same(target.root, entry["path"], entry.get("boot", b""), (entry["dev"], entry["ino"]))
        target.made[key] = target.spare(_make_nameless(target, entry) if same is None else same)
    fd = reopen(target.made[key], open_flags(entry))
    os.lseek(fd, entry["pos"], os.SEEK_SET)
    return fd


def find_same(root: int, path: bytes, boot: bytes, what: tuple[int, int]) -> int | None:
    """The very object that was there when this kernel was that of the source, by its path; None where it is not.

    Args:
        root: descriptor of the root directory that paths mean.
        boot: `boot_id` of the source; anything else where the object has no name.
        what: its device and inode.
    """
    if boot != boot_id():
        return None
    try:
        fd = open_in_root(root, path, os.O_RDWR)
    except OSError:
        return None
    status = statx.of_descriptor(fd)
    if (status.dev, status.ino) == what:
        return fd
    os.close(fd)
    return None


def _make_nameless(target: Target, entry: Entry) -> int:
    directory = os.path.dirname(entry["path"])
    try:
        with acting_as(target.credentials):
            fd = open_in_root(target.root, directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:
        fd = os.memfd_create("deleted")  # the folder is not there or not writable: memory behaves the same
    content.fill(fd, entry)
    os.fchown(fd, entry["uid"], entry["gid"])
    os.fchmod(fd, entry["mode"])
    return fd


KINDS = (
    Kind("path", _is_path, _dump_named, _build_file),
    Kind("file", _is_file, _dump_file, _build_file),
    Kind("directory", _is_directory, _dump_file, _build_file),
    Kind("deleted", lambda _, __: False, _dump_deleted, _build_deleted),
)

"""inotify(7): watches are found by their file handles and set again under the same numbers by path."""

from __future__ import annotations

import fcntl
import os
import stat
import termios

from engine.descriptors.model import Entry, Kind, Probe, Refusal, Source, Target, boot_id
from engine.descriptors.paths import open_object
from engine.linux import inotify, statx


def _matches(_: Source, probe: Probe) -> bool:
    return probe.link == b"anon_inode:inotify"


def _dump(source: Source, probe: Probe) -> Entry:
    if int.from_bytes(fcntl.ioctl(source.grab(probe), termios.FIONREAD, bytes(4)), "little"):
        raise Refusal("is an inotify queue with events that have not been read")
    watches = [_watch(source, line) for line in probe.info.splitlines() if line.startswith(b"inotify wd:")]
    return probe.entry("inotify", watches=sorted(watches, key=lambda watch: watch["wd"]))


def _watch(source: Source, line: bytes) -> Entry:
    fields = dict(word.split(b":", 1) for word in line.split()[1:])
    sdev = int(fields[b"sdev"], 16)
    dev = os.makedev(sdev >> 20, sdev & 0xFFFFF)  # the kernel's own encoding, <linux/kdev_t.h>
    mount = os.open(_mount_point(source.pid, dev), os.O_RDONLY | os.O_CLOEXEC)
    try:
        handle = bytes.fromhex(fields[b"f_handle"].decode())
        found = inotify.open_by_handle(mount, int(fields[b"fhandle-type"], 16), handle)
    except (OSError, KeyError):
        raise Refusal("is an inotify queue that watches something that cannot be found again") from None
    finally:
        os.close(mount)
    try:
        path, status = os.readlink(b"/proc/self/fd/%d" % found), statx.of_descriptor(found)
    finally:
        os.close(found)
    if not status.nlink or not path.startswith(b"/"):
        raise Refusal("is an inotify queue that watches a deleted file")
    return {
        "wd": int(fields[b"wd"], 16), "mask": int(fields[b"mask"], 16), "path": path, "dev": status.dev,
        "ino": status.ino, "type": stat.S_IFMT(status.mode), "boot": boot_id(),
    }  # fmt: skip


def _mount_point(pid: int, dev: int) -> bytes:
    wanted = b"%d:%d" % (os.major(dev), os.minor(dev))
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        for line in file:
            words = line.split()
            if words[2] == wanted:
                # Octal escapes of blanks, see proc(5).
                return b"/proc/%d/root%b" % (pid, words[4].decode("unicode_escape").encode("latin-1"))
    raise Refusal("is an inotify queue that watches a file system without a mount point")


def _build(target: Target, entry: Entry) -> int:
    fd = inotify.create()
    for watch in entry["watches"]:
        # Watching takes the right to read.
        found = target.spare(open_object(target, watch, watch["type"], os.O_RDONLY | os.O_NONBLOCK))
        inotify.add_watch(fd, found, watch["mask"], watch["wd"])
    return fd


KINDS = (Kind("inotify", _matches, _dump, _build),)

"""The files that a process maps, runs and stands in, found again on this machine.

What is opened as root must be the very object the process had: else it would read what it may not. The same content by
another way, that is on a network file system or in the view of the master's files, is opened with the process's own
rights. Where the image says its digest, that decides, and nothing else does. Else path, kind, size and time of change
are what can agree, of file systems that have no device of their own (major number 0).
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from engine import digests
from engine.image import Image, MappedFile
from engine.lending import Lending
from engine.linux.credentials import Credentials, acting_as

_NOT_HERE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ESTALE, errno.ELOOP)
_AT_ONCE: Final = 4  # as many as a view's daemon fetches at a time
_REMOVED: Final = b" (deleted)"
_ROOT = MappedFile(b"/", 0, 0, 0, 0, False)


def open_all(image: Image, root_of: int, who: Credentials, books: Lending) -> list[int]:
    """Open all files of an image, in order.

    Args:
        root_of: a process in whose root they are looked for.
        books: what is not here is borrowed there, where the source lends.

    Raises:
        OSError: a file is missing or another one than on the source; names it.
    """
    opened: list[int] = []
    try:
        for index, file in enumerate(image.files):
            if file.nameless:
                opened.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))  # replaced when descriptors are there
                continue
            path = b"/proc/%d/root%s" % (root_of, file.path)
            if index == image.cwd and begins_in_root(image, root_of):
                # A program that begins here, and its folder is not here: it begins in the root, as BProc's bpsh has it.
                path, file = b"/proc/%d/root/" % root_of, _ROOT
            try:
                opened.append(_open(file, path, index == image.cwd, who))
            except OSError as error:
                if index == image.cwd and error.errno == errno.ENOENT and path.endswith(_REMOVED):
                    opened.append(_removed_folder(path, root_of, who))
                    continue
                if error.errno not in _NOT_HERE or not books.may_borrow(image, index):
                    raise
                opened.append(books.borrow(image, index))
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise
    return opened


def _removed_folder(path: bytes, root_of: int, who: Credentials) -> int:
    """A folder that has been removed, as that which the process stood in: below the same one where it may, else /tmp.

    Raises:
        OSError: neither can be written to.
    """
    parents = [os.path.dirname(path), b"/proc/%d/root/tmp" % root_of]
    with acting_as(who):
        for parent in parents:
            name = b"%s/.bpfs-%s" % (parent, secrets.token_hex(8).encode())
            try:
                os.mkdir(name, 0o700)
            except OSError as error:
                if parent is parents[-1]:
                    text = f"its working directory has been removed, and none can be made below {os.fsdecode(parent)}"
                    raise OSError(error.errno, text) from None
                continue
            try:
                return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            finally:
                os.rmdir(name)
    raise AssertionError


def gather(files: Iterable[MappedFile], root_of: int) -> list[bool]:
    """Open these files and close them again, so that `open_all` will find at hand what is here.

    Who opens a file of the view (or of a network file system) waits until it has been fetched. Several at once.

    Args:
        root_of: a process in whose root they are looked for.

    Returns:
        Of each, whether it is here.

    Raises:
        OSError: one is there, and cannot be opened; names it.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda file: _fetch(file, b"/proc/%d/root%s" % (root_of, file.path)), files))


def _fetch(file: MappedFile, path: bytes) -> bool:
    try:
        if not _may_be(file, os.stat(path, follow_symlinks=False), False):
            return False
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return _is(file, fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in _NOT_HERE:
            return False
        raise OSError(error.errno, f"{os.fsdecode(file.path)}: {os.strerror(error.errno or 0)}") from None


def begins_in_root(image: Image, root_of: int) -> bool:
    """Whether a program begins here, and the folder it was to begin in is not here."""
    return image.fresh and not os.path.isdir(b"/proc/%d/root%s" % (root_of, image.files[image.cwd].path))


def _open(file: MappedFile, path: bytes, directory: bool, who: Credentials) -> int:
    try:
        info = os.stat(path, follow_symlinks=False)
        if not file.digest and (info.st_dev, info.st_ino) == (file.device, file.inode):
            return _open_same(file, path, info)
        if not _may_be(file, info, directory):
            raise OSError(116, f"{os.fsdecode(file.path)} is not the same file here")
        with acting_as(who):
            fd = os.open(path, (os.O_PATH if directory else os.O_NONBLOCK) | os.O_CLOEXEC | os.O_NOFOLLOW)
        return _expect(fd, _may_be(file, os.fstat(fd), directory) and (directory or _is(file, fd)), file)
    except OSError as error:
        if error.filename is None:
            raise
        raise OSError(error.errno, f"{os.fsdecode(file.path)}: {os.strerror(error.errno or 0)}") from None


def _open_same(file: MappedFile, path: bytes, info: os.stat_result) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    if stat.S_ISDIR(info.st_mode):
        flags |= os.O_PATH
    elif not file.writable and (info.st_size, info.st_mtime_ns) != (file.size, file.mtime_ns):
        raise OSError(116, f"{os.fsdecode(file.path)} is not the same file here")
    else:
        flags |= os.O_RDWR if file.writable else os.O_RDONLY
    fd = os.open(path, flags)
    return _expect(fd, os.fstat(fd).st_ino == file.inode, file)


def _expect(fd: int, holds: bool, file: MappedFile) -> int:
    if not holds:
        os.close(fd)
        raise OSError(116, f"{os.fsdecode(file.path)} is not the same file here")
    return fd


def _may_be(file: MappedFile, info: os.stat_result, directory: bool) -> bool:
    """Whether a file has the same content as far as its status tells."""
    if file.digest:
        return stat.S_ISREG(info.st_mode) and info.st_size == file.size
    if file.writable or (os.major(info.st_dev) and os.major(file.device)):
        return False
    if directory:
        return stat.S_ISDIR(info.st_mode)
    return stat.S_ISREG(info.st_mode) and (info.st_size, info.st_mtime_ns) == (file.size, file.mtime_ns)


def _is(file: MappedFile, fd: int) -> bool:
    """Whether an open file has the digest that the image says, if it says one."""
    return not file.digest or digests.of_descriptor(fd) == file.digest

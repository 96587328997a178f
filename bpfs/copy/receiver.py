# SPDX-License-Identifier: GPL-2.0-or-later
"""A leaf or branch of a copy: writes what comes, each file without a name until it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EINVAL, EIO, EISDIR, ENOTDIR, EOPNOTSUPP
from typing import Any

from bpfs.copy.frames import HEAD, Kind

_TOLD = 10  # failures that are told by name; of further ones the number

_WITHOUT_TMPFILE = (EISDIR, EOPNOTSUPP)  # open(2): old file systems


class Receiver:
    """Takes frames.

    Attributes:
        failures: how many files could not be written.
    """

    def __init__(self, target: str, report: Callable[..., None], *, folder: bool, preserve: bool) -> None:
        """Args:
        target: the directory to put the sources into, or, when it is none, the one source's new name.
        folder: it has to be a directory.
        preserve: modes, times and, for root, owners are those of the source.
        """
        self._target = target
        self._report = report
        self._folder = folder
        self._preserve = preserve
        self._umask = os.umask(0)
        os.umask(self._umask)
        self._top = ""
        self._file: _File | None = None
        self._folders: list[tuple[str, dict[str, Any]]] = []
        self.failures = 0
        self._table: dict[Kind, Callable[[int, memoryview], None]] = {
            Kind.SOURCE: self._source,
            Kind.FOLDER: self._make_folder,
            Kind.LINK: self._make_link,
            Kind.FILE: self._begin_file,
            Kind.DATA: self._data,
            Kind.FILE_END: self._end_file,
            Kind.FILE_BAD: lambda _, __: self.close(),
            Kind.END: self._end,
        }

    def take(self, kind: Kind, offset: int, body: memoryview) -> None:
        """Does what a frame says; what fails is reported, and counted."""
        if not self._top and kind not in (Kind.SOURCE, Kind.END):
            return  # its source had no place here: that has been told
        try:
            self._table[kind](offset, body)
        except OSError as error:
            self.close()
            self._fail(f"{error.filename or self._top or self._target}: {error.strerror}")

    def close(self) -> None:
        """Drops an unfinished file: it never had a name."""
        if self._file:
            self._file.drop()
        self._file = None

    def _fail(self, text: str) -> None:
        self.failures += 1
        if self.failures <= _TOLD:
            self._report(error=text)

    def _source(self, _: int, body: memoryview) -> None:
        fields = json.loads(bytes(body))
        self._top = ""
        if os.path.isdir(self._target):
            self._top = os.path.join(self._target, os.path.basename(fields["name"]))
        elif self._folder:
            raise OSError(ENOTDIR, os.strerror(ENOTDIR), self._target)
        else:
            self._top = self._target

    def _path(self, fields: dict[str, Any]) -> str:
        parts = [part for part in fields["path"].split("/") if part]
        if ".." in parts:
            raise OSError(EINVAL, os.strerror(EINVAL), fields["path"])
        return os.path.join(self._top, *parts)

    def _make_folder(self, _: int, body: memoryview) -> None:
        fields = json.loads(bytes(body))
        path = self._path(fields)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not os.path.isdir(path) or (os.path.islink(path) and fields["path"]):
                raise
            if not self._preserve:
                return
        self._folders.append((path, fields))  # its mode may forbid, and its time tell, what is still to come

    def _make_link(self, _: int, body: memoryview) -> None:
        fields = json.loads(bytes(body))
        path = self._path(fields)
        temporary = f"{os.path.dirname(path)}/.bpcp-{os.getpid()}"
        os.symlink(fields["target"], temporary)
        try:
            _expect_replaceable(path)
            self._dress(temporary, fields)
            os.rename(temporary, path)
        except OSError as error:
            os.unlink(temporary)
            raise OSError(error.errno, error.strerror, path) from None

    def _begin_file(self, _: int, body: memoryview) -> None:
        fields = json.loads(bytes(body))
        self._file = _File(self._path(fields), fields)

    def _data(self, offset: int, body: memoryview) -> None:
        if self._file:
            self._file.write(offset, body)

    def _end_file(self, size: int, body: memoryview) -> None:
        if self._file is None:
            return  # it could not be written: that has been told
        self._file.finish(size, bytes(body), self._dress)
        self._file = None

    def _end(self, _: int, __: memoryview) -> None:
        for path, fields in reversed(self._folders):
            try:
                self._dress(path, fields)
            except OSError as error:
                self._fail(f"{path}: {error.strerror}")
        if self.failures > _TOLD:
            self._report(error=f"and {self.failures - _TOLD} more")

    def _dress(self, what: str | int, fields: dict[str, Any]) -> None:
        link = "target" in fields
        # The owner first: chown(2) takes set-uid bits away.
        if self._preserve and os.geteuid() == 0:
            os.chown(what, *fields["owner"], follow_symlinks=not link)
        if not link:
            os.chmod(what, fields["mode"] if self._preserve else fields["mode"] & 0o777 & ~self._umask)
        if self._preserve:
            os.utime(what, ns=tuple(fields["times"]), follow_symlinks=not link)


class _File:
    """One file on its way: nameless (O_TMPFILE), so that not even SIGKILL leaves a part of it behind."""

    def __init__(self, path: str, fields: dict[str, Any]) -> None:
        self._path = path
        self._fields = fields
        self._hash = hashlib.sha256()
        self._temporary = f".bpcp-{os.getpid()}"  # only while it takes another file's place
        with self._naming_it():
            _expect_replaceable(path)  # and once more before it is done
            self._folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
            try:
                self._fd = self._open()
            except OSError:
                os.close(self._folder)
                raise

    def _open(self) -> int:
        try:
            self._named = False
            return os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o600, dir_fd=self._folder)
        except OSError as error:
            if error.errno not in _WITHOUT_TMPFILE:
                raise
        self._named = True
        return os.open(self._temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=self._folder)

    def write(self, offset: int, body: memoryview) -> None:
        """Writes a data frame."""
        self._hash.update(HEAD.pack(Kind.DATA, len(body), offset))
        self._hash.update(body)
        with self._naming_it():
            while body:
                done = os.pwrite(self._fd, body, offset)
                body, offset = body[done:], offset + done

    def finish(self, size: int, digest: bytes, dress: Callable[[int, dict[str, Any]], None]) -> None:
        """Gives the file its name, and what else it is to have, when it is what the sender read."""
        with self._naming_it():
            if self._hash.digest() != digest:
                raise OSError(EIO, "its checksum is wrong: it was damaged on the way")
            _expect_replaceable(self._path)
            os.ftruncate(self._fd, size)
            dress(self._fd, self._fields)
            self._name(os.path.basename(self._path))
        self.drop()

    def _name(self, name: str) -> None:
        if not self._named:
            try:
                self._link(name)
                return
            except FileExistsError:  # linkat(2) replaces nothing, rename(2) does
                self._link(self._temporary)
                self._named = True
        os.rename(self._temporary, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._named = False

    def _link(self, name: str) -> None:
        # With dst_dir_fd it is linkat(2) with AT_SYMLINK_FOLLOW; without, link(2) would link the link.
        os.link(f"/proc/self/fd/{self._fd}", name, dst_dir_fd=self._folder)

    def drop(self) -> None:
        """Closes it; what has no name is gone then."""
        if self._named:
            os.unlink(self._temporary, dir_fd=self._folder)
        os.close(self._fd)
        os.close(self._folder)

    @contextmanager
    def _naming_it(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._path) from None


def _expect_replaceable(path: str) -> None:
    """Raises OSError where something has the name that a file must not take the place of, a device for example."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise OSError(EISDIR, os.strerror(EISDIR))
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OSError(EINVAL, "is a device, a socket or a pipe, which no file replaces")

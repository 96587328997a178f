"""A worker's operations on checkpoint files: keep an image that a source sends, give one to a destination.

Whoever asked for it has named the file, so every path is opened with that user's rights and none of ours.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
from collections.abc import Callable
from typing import Final

from engine import image as img
from engine.birth import Newborn, bear
from engine.checkpoint import Chain, Checkpoint, Writer
from engine.image import Image
from engine.linux import process_vm, procfs
from engine.linux.credentials import EVERYTHING, Credentials, acting_as
from engine.operation import TOKEN_SIZE, Reply
from engine.restarting import adapt, renumber
from engine.stream import Stream, accept, connect

_TIMEOUT_S: Final = 60.0
_BUFFER: Final = 1 << 20


def user(request: Reply) -> Credentials:
    """The rights of the user who asked: `uid`, `gid` and `groups` of a request."""
    uid = int(request["uid"])
    return Credentials(uid, int(request["gid"]), tuple(request.get("groups", ())), 0 if uid else EVERYTHING)


def open_for(who: Credentials, path: str | bytes, flags: int, dir_fd: int | None = None, mode: int = 0) -> int:
    """open(2) with a user's rights. Raises OSError, with the path."""
    with acting_as(who):
        try:
            return os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, mode, dir_fd=dir_fd)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), os.fsdecode(path)) from None


def bear_ghost(request: Reply, fds: list[int]) -> Reply:
    """Make a ghost. fds: ghost program, control socket.

    `inputs` and `outputs` are numbers of its descriptors: it reads from /dev/null, and writes to where the standard
    error of process `output_of` goes (0, or that process is gone: to /dev/null).
    """
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    output = _standard_error(int(request.get("output_of", 0)))
    try:
        numbers = dict.fromkeys(request["inputs"], null)
        numbers.update(dict.fromkeys(request["outputs"], null if output < 0 else output))
        newborn = Newborn(
            int(request.get("pid", 0)), int(request["uid"]), int(request["gid"]), tuple(request["groups"]), numbers,
            fds[1], fds[0], tuple(request["arguments"]), tuple(request["env"]),
        )  # fmt: skip
        return {"pid": bear(newborn)}
    finally:
        os.close(null)
        if output >= 0:
            os.close(output)


def _standard_error(pid: int) -> int:
    if not pid:
        return -1
    try:
        process = process_vm.pidfd_open(pid)
        try:
            return process_vm.pidfd_getfd(process, 2)
        finally:
            os.close(process)
    except OSError:
        return -1


class Keeper:
    """Writes an image beside its name, and gives it the name when it is whole and on the disk."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._listener: socket.socket | None = None
        self._stream: Stream | None = None
        self._token = b""
        self._folder = self._fd = -1
        self._name = self._spare_name = ""
        self._who = Credentials(0, 0, (), EVERYTHING)
        self._parent: tuple[Checkpoint, bytes] | None = None
        self._writer: Writer | None = None

    def keep(self, request: Reply, fds: list[int]) -> Reply:
        """Open the file (`path`, with the rights of `uid`, `gid`, `groups`; `since`: the name of an image in the same
        folder that it may build on) and listen on `address`.
        """
        if self._fd >= 0:
            raise OSError(16, "an image is being kept already")
        self._who = user(request)
        folder, self._name = os.path.split(request["path"])
        if not self._name or not folder.startswith("/"):
            raise OSError(22, "the file's path must be absolute", request["path"])
        try:
            self._folder = open_for(self._who, folder, os.O_PATH | os.O_DIRECTORY)
            self._open_parent(request.get("since", ""))
            self._check_name()
            self._fd = self._open_spare()
            family = socket.AF_INET6 if ":" in request["address"] else socket.AF_INET
            self._listener = socket.create_server((request["address"], 0), family=family, backlog=8)
        except BaseException:
            self.undo()
            raise
        self._token = secrets.token_bytes(TOKEN_SIZE)
        return {"port": self._listener.getsockname()[1], "token": self._token}

    def _open_spare(self) -> int:
        """A file without a name, of which a crash leaves nothing; one beside its name where there are none such."""
        try:
            return open_for(self._who, ".", os.O_RDWR | os.O_TMPFILE, self._folder, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                raise
        self._spare_name = self._new_name()
        return open_for(self._who, self._spare_name, os.O_RDWR | os.O_CREAT | os.O_EXCL, self._folder, 0o600)

    def _new_name(self) -> str:
        return f".{self._name}.{secrets.token_hex(4)}.part"

    def _check_name(self) -> None:
        # Nothing but an image of this user's, or nothing at all, is ever replaced.
        try:
            fd = open_for(self._who, self._name, os.O_RDONLY | os.O_NOFOLLOW, self._folder)
        except FileNotFoundError:
            return
        try:
            head = os.pread(fd, len(img.MAGIC), 0)
        finally:
            os.close(fd)
        if head != img.MAGIC:
            raise OSError(17, "there is a file of this name that is no checkpoint", self._name)

    def _open_parent(self, name: str) -> None:
        if name:
            if "/" in name:
                raise OSError(22, "an image builds on one in the same folder", name)
            fd = open_for(self._who, name, os.O_RDONLY, self._folder)
            self._parent = Checkpoint(fd), os.fsencode(name)

    def keep_image(self, request: Reply, fds: list[int]) -> Reply:
        """Take the image from its source; afterwards the source need not wait."""
        if self._listener is None:
            raise OSError(22, "keep first")
        timeout = float(request.get("timeout_s", _TIMEOUT_S))
        stream = Stream(accept(self._listener, self._token, self._control, timeout), self._control, timeout)
        try:
            try:
                total = self._take(stream)
            except OSError as error:
                with contextlib.suppress(OSError):
                    stream.send(img.error_frame(error.errno or 5, error.strerror or str(error)))
                raise
            stream.send(img.frame(img.HELD, b""))
        except BaseException:
            stream.close()
            self.undo()
            raise
        self._stream = stream  # its end would tell the source that its image is lost
        return {"bytes": total}

    def _take(self, stream: Stream) -> int:
        image = img.read_head(stream.receive)
        self._writer = Writer(self._fd, self._parent)
        self._writer.begin(image)
        view, left = memoryview(bytearray(_BUFFER)), image.total
        while left:
            part = view[: min(left, _BUFFER)]
            stream.receive_into(part)
            self._writer.add(part)
            left -= len(part)
        _, end = img.read_frame(stream.receive, (img.END,), img.MAX_SMALL)
        if int.from_bytes(end, "little") != image.total:
            raise img.ImageError("the number of bytes differs")
        return image.total

    def keep_done(self, request: Reply, fds: list[int]) -> Reply:
        """Complete the file, and give it its name; `keep`: how many older ones stay, as NAME.1, NAME.2, …"""
        if self._writer is None:
            raise OSError(22, "keep_image first")
        try:
            size = self._writer.finish()
            with acting_as(self._who):
                if not self._spare_name:
                    name = self._new_name()
                    os.link(f"/proc/self/fd/{self._fd}", name, dst_dir_fd=self._folder)
                    self._spare_name = name
                self._rotate(int(request.get("keep", 1)))
                os.rename(self._spare_name, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._spare_name = ""
            self._sync_folder()
        finally:
            self._clear()
        return {"size": size}

    def _rotate(self, keep: int) -> None:
        for age in range(keep - 1, 0, -1):
            older = f"{self._name}.{age}"
            newer = f"{self._name}.{age - 1}" if age > 1 else self._name
            with contextlib.suppress(FileNotFoundError):
                if age > 1:
                    os.rename(newer, older, src_dir_fd=self._folder, dst_dir_fd=self._folder)
                else:  # the newest keeps its name until the rename that replaces it
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(older, dir_fd=self._folder)
                    os.link(newer, older, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def _sync_folder(self) -> None:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._folder)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def undo(self) -> bool:
        """Nothing of an image that is not whole stays. Returns whether there was anything to undo."""
        begun = self._fd >= 0
        self._clear()
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        return begun

    def _clear(self) -> None:
        if self._spare_name and self._fd >= 0:
            with contextlib.suppress(OSError), acting_as(self._who):
                os.unlink(self._spare_name, dir_fd=self._folder)
        for fd in (self._fd, self._folder):
            if fd >= 0:
                os.close(fd)
        if self._listener is not None:
            self._listener.close()
        if self._parent is not None:
            self._parent[0].close()
        self._fd = self._folder = -1
        self._listener = self._parent = self._writer = None
        self._spare_name = ""


class Giver:
    """Reads an image and sends it to a destination's worker."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._chain: Chain | None = None
        self._image: Image | None = None
        self._patches: dict[int, tuple[bytes, bytes]] = {}

    def load(self, request: Reply, fds: list[int]) -> Reply:
        """Open the image `path` with the rights of `uid`, `gid`, `groups` and see whether this user, whose limits are
        those of process `limits_of`, may bring it up. `relayed`: its ghost still relays what led outside.
        """
        who = user(request)
        folder = os.path.dirname(request["path"])
        if not request["path"].startswith("/"):
            raise OSError(22, "the file's path must be absolute", request["path"])

        def beside(name: bytes) -> int:
            return open_for(who, os.path.join(os.fsencode(folder), name), os.O_RDONLY)

        self.undo()
        self._chain = Chain(open_for(who, request["path"], os.O_RDONLY), beside)
        image = self._chain.newest.image
        with img.believing_nothing():
            found = self._adapted(image, who, request)
        self._image = image
        return found

    def _adapted(self, image: Image, who: Credentials, request: Reply) -> Reply:
        assert self._chain is not None
        owner, limits = os.fstat(self._chain.newest.fd).st_uid, procfs.read_limits(int(request["limits_of"]))
        externals = adapt(image, who, owner, limits, bool(request.get("relayed")))
        return {
            "pid": image.pid, "comm": image.comm, "uid": image.credentials["uids"][0],
            "gid": image.credentials["gids"][0], "groups": image.credentials["groups"],
            "rights": image.credentials["permitted"], "externals": externals, "bytes": image.total,
            "name": os.fsencode(os.path.basename(image.files[image.exe].path)),
        }  # fmt: skip

    def load_as(self, request: Reply, fds: list[int]) -> Reply:
        """What was loaded gets another `pid`."""
        if self._image is None:
            raise OSError(22, "load first")
        with img.believing_nothing():
            self._patches = renumber(self._image, int(request["pid"]))
        return {}

    def give(self, request: Reply, fds: list[int]) -> Reply:
        """Send it to the worker at `host`, `port`, `token`; returns when the process is whole there."""
        if self._chain is None or self._image is None:
            raise OSError(22, "load first")
        stream = Stream(connect(request["host"], request["port"], self._control), self._control, _TIMEOUT_S)
        try:
            stream.send(request["token"])
            stream.send(img.head(self._image))
            self._send_pages(stream.send)
            stream.send(img.frame(img.END, self._image.total.to_bytes(8, "little")))
            kind, body = img.read_frame(stream.receive, (img.HELD, img.ERROR), img.MAX_SMALL)
        finally:
            stream.close()
        if kind == img.ERROR:
            raise img.failure(body)
        return {"bytes": self._image.total}

    def _send_pages(self, send: Callable[[bytes], object]) -> None:
        assert self._chain is not None
        gathered: list[bytes] = []
        size = 0
        for address, data in self._chain.pages():
            gathered.append(self._patched(address, data))
            size += len(data)
            if size >= _BUFFER:
                send(b"".join(gathered))
                gathered, size = [], 0
        send(b"".join(gathered))

    def _patched(self, address: int, data: bytes) -> bytes:
        for where, (old, new) in self._patches.items():
            at = where - address
            if 0 <= at <= len(data) - 4 and data[at : at + 4] == old:
                data = data[:at] + new + data[at + 4 :]
        return data

    def undo(self) -> bool:
        """Close the files. Returns whether any were open."""
        open_ = self._chain is not None
        if self._chain is not None:
            self._chain.close()
        self._chain = self._image = None
        return open_

"""The view's daemon without a cluster, as older kernels make it work: no passthrough, nothing sent again."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from bpfs import kernel
from bpfs.view.fuse import mount_data
from bpfs.view.start import start

TOP = Path(__file__).parents[2]
TIMEOUT = 4.0

# What a kernel before 6.9 offers.
OLD = (
    "import sys; from bpfs.view import daemon, fuse; "
    "fuse._PASSTHROUGH = fuse._HAS_RESEND = 0; daemon.main(sys.argv[1:])"
)


class Rig:
    """A server of files, a view of it, and its daemon; this process is its bpslave and bpmaster."""

    def __init__(self, folder: Path, exported: Path) -> None:
        self.mount, self.cache = folder / "view", folder / "cache"
        self.mount.mkdir()
        self.cache.mkdir()
        self._to_server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.server = start("server", [theirs.fileno()])
        self._to_server.send(msgpack.packb([[str(exported), "/usr", "/lib64", "/lib"], []]))
        self._streams, self._streams_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control, self._control_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.port = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._bring, daemon=True).start()
        self.fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        kernel.mount("test", str(self.mount), "fuse.bpview", kernel.MS_RDONLY | kernel.MS_NODEV, mount_data(self.fuse))
        self.daemon = self.start()

    def _bring(self) -> None:
        while self._streams.recv(64):
            near = socket.create_connection(self.port.getsockname())
            far, _ = self.port.accept()
            with near, far:
                socket.send_fds(self._to_server, [b"s"], [far.fileno()])
                socket.send_fds(self._streams, [b"stream"], [near.fileno()])

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the daemon; also after it was killed."""
        fds = [self.fuse, self._streams_theirs.fileno(), self._control_theirs.fileno()]
        arguments = [*map(str, fds), str(self.cache), "0", str(TIMEOUT)]
        return subprocess.Popen([sys.executable, "-c", OLD, *arguments], pass_fds=fds, cwd=TOP)

    def close(self) -> None:
        """Undoes all of it, whatever state it is in."""
        self.server.send_signal(signal.SIGCONT)
        for process in (self.daemon, self.server):
            process.kill()
            process.wait()
        os.close(self.fuse)
        kernel.umount(str(self.mount))
        self._streams_theirs.close()
        for sock in (self._to_server, self._streams, self._control, self._control_theirs, self.port):
            sock.close()


@pytest.fixture
def exported() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="view-", dir="/var/tmp") as folder:
        (Path(folder) / "file").write_bytes(bytes(range(256)) * 8192)
        (Path(folder) / "late").write_text("late\n")
        yield Path(folder)


@pytest.fixture
def rig(tmp_path: Path, exported: Path) -> Iterator[Rig]:
    it = Rig(tmp_path, exported)
    try:
        yield it
    finally:
        it.close()


def below(rig: Rig, path: Path) -> Path:
    return rig.mount / str(path).lstrip("/")


def test_pages_are_read_through_the_daemon(rig, exported):
    file = below(rig, exported / "file")
    wanted = (exported / "file").read_bytes()
    assert file.read_bytes() == wanted
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as memory:
        assert memory[1_000_000:1_000_256] == wanted[1_000_000:1_000_256]
    # By another program: this one holds its interpreter's lock until the exec, and `_bring` may be needed for that.
    command = ["/usr/bin/env", below(rig, Path("/usr/bin/env")), "echo", "x"]
    assert subprocess.run(command, capture_output=True).stdout == b"x\n"
    assert sorted(os.listdir(below(rig, exported))) == ["file", "late"]
    assert os.listdir(rig.mount / "var") == ["tmp"]


def test_a_killed_daemon_leaves_nothing_unanswered(rig, exported):
    kept = open(below(rig, exported / "file"), "rb")  # noqa: SIM115
    with kept:
        assert kept.read(256) == bytes(range(256))
        os.kill(rig.server.pid, signal.SIGSTOP)
        with subprocess.Popen(["cat", below(rig, exported / "late")], stdout=subprocess.PIPE) as reader:
            waits_in_the_kernel(reader.pid)
            rig.daemon.kill()
            rig.daemon.wait()
            os.kill(rig.server.pid, signal.SIGCONT)
            rig.daemon = rig.start()
            assert reader.communicate(timeout=30)[0] == b"late\n"
        assert kept.read() == (exported / "file").read_bytes()[256:]
    # What the first daemon knew, the second one still hears changes of.
    (exported / "late").write_text("changed\n")
    deadline = time.monotonic() + 30
    while below(rig, exported / "late").read_text() != "changed\n":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def waits_in_the_kernel(pid: int) -> None:
    """Waits until a process sleeps in its open."""
    deadline = time.monotonic() + 30
    while (
        b"cat" not in Path(f"/proc/{pid}/comm").read_bytes() or b"fuse" not in Path(f"/proc/{pid}/stack").read_bytes()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_silent_master_is_waited_for_as_long_as_was_said_and_no_longer(rig, exported):
    os.listdir(below(rig, exported))
    os.kill(rig.server.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(OSError, match="Input/output error"):
        below(rig, exported / "late").read_text()
    assert TIMEOUT * 0.9 < time.monotonic() - began < TIMEOUT * 4
    os.kill(rig.server.pid, signal.SIGCONT)
    assert below(rig, exported / "late").read_text() == "late\n"

"""Starting daemons by fork: complain to the caller before detaching, log to a file afterwards.

The caller's process is warm (everything imported), single-threaded, and has never run trio; its children share its
memory.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bpfs.errors import BpfsError

_OK = b"\0ok"


class Ready:
    """How a starting daemon tells its starter that it is ready, or what is wrong. Both count once only."""

    def __init__(self, fd: int | None = None) -> None:
        """Args:
        fd: write end of the starter's pipe; None: there is no starter, complaints go to stderr.
        """
        self._fd = fd
        self.told = False

    def ok(self) -> None:
        """The daemon is ready."""
        self._tell(_OK)
        notify("READY=1")

    def failed(self, sentence: str) -> None:
        """The daemon cannot start."""
        if self._fd is None and not self.told:
            print(f"{os.path.basename(sys.argv[0])}: {sentence}", file=sys.stderr)
        self._tell(sentence.encode(errors="replace")[:4000])

    def _tell(self, data: bytes) -> None:
        self.told = True
        if self._fd is not None:
            with suppress(OSError):
                os.write(self._fd, data)
            os.close(self._fd)
            self._fd = None


@dataclass(slots=True)
class Started:
    """A child that is starting."""

    pid: int
    _fd: int
    _heard: bytes = b""

    def fileno(self) -> int:
        """The pipe from the child, for select."""
        return self._fd

    def wait_ready(self, timeout: float) -> str | None:
        """Wait until the daemon is ready: None; or a sentence that says what is wrong."""
        deadline = time.monotonic() + timeout
        while self._fd >= 0:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._fd], [], [], left)[0]:
                return f"it was not ready within {timeout:g} s"
            data = os.read(self._fd, 4096)
            self._heard += data
            if not data or self._heard == _OK:
                self.close()
        if self._heard == _OK:
            return None
        return self._heard.decode(errors="replace") or "it ended without a word; see its log"

    def close(self) -> None:
        """Give the pipe back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def start(body: Callable[[Ready], int], log: Path | None, keep: Iterable[int] = ()) -> Started:
    """Fork a daemon.

    Args:
        body: what it does; gives the exit code.
        log: where its stdout and stderr go (appended); None: /dev/null.
        keep: descriptors above 2 that it needs; all others are closed in it.
    """
    receive, send = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(send)
        return Started(pid, receive)
    code = 1
    ready = Ready(send)
    try:
        detach(log, {*keep, send})
        code = body(ready)
    except BpfsError as error:
        ready.failed(error.sentence)
    except KeyboardInterrupt:
        pass
    except BaseException:
        traceback.print_exc()
        ready.failed("it failed at its start; see its log")
    finally:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)


def detach(log: Path | None, keep: Iterable[int]) -> None:
    """Make this process a daemon: a session of its own, plain signals, no descriptors but these."""
    os.setsid()
    os.chdir("/")
    os.umask(0o022)
    for signo in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(signo, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    null = os.open("/dev/null", os.O_RDWR)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if log is not None else null
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    close_others(keep)


def close_others(keep: Iterable[int]) -> None:
    """Close every descriptor above 2 but these."""
    kept = set(keep)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in kept:
            with suppress(OSError):  # the descriptor of the listing itself
                os.close(fd)


def notify(state: str) -> None:
    """Tell a service manager that waits for it (sd_notify(3): a unit of Type=notify)."""
    # Once, and none of what is started from here: it is not theirs to say.
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock, suppress(OSError):
            sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def raise_limits() -> None:
    """As many descriptors as the hard limit allows: a link, a few files and sockets a node."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

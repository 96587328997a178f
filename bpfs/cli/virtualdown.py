"""Asking a virtual cluster, and taking it down without a trace; without the code of the daemons, so at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from errno import EBUSY, EIO, ENOENT

from bpfs import kernel, pidspace
from bpfs.cli import virtualnet
from bpfs.errors import BpfsError
from bpfs.rundir import Recorded, RunDir, process_start

DOWN_TIMEOUT = 10.0
"""Seconds for daemons to end in peace; then they are killed."""

TELL_AGAIN = 0.3
"""Seconds between two signals to the same process."""


def is_mounted(mount: str) -> bool:
    """Whether something is mounted exactly there (proc_pid_mountinfo(5))."""
    with open("/proc/self/mountinfo", "rb") as file:
        points = [line.split()[4] for line in file]
    escaped = os.fsencode(mount)
    for plain, code in ((b"\\", b"\\134"), (b" ", b"\\040"), (b"\t", b"\\011")):
        escaped = escaped.replace(plain, code)
    return escaped in points


def node_states(rundir: RunDir) -> dict[int, tuple[str, str]]:
    """State and reason of every node, from the master.

    Raises:
        BpfsError: it does not answer.
    """
    try:
        text = rundir.ask("status")
    except OSError as error:
        way_out = "" if rundir.master_pid() else f"; start it with: bpcluster restart-master --mount {rundir.mount}"
        why = f"does not answer: {error.strerror or error}{way_out}"
        raise BpfsError(EIO, f"the master of {rundir.mount} {why}") from None
    found = {}
    for line in text.splitlines():
        words = line.split(" ", 6)
        found[int(words[0])] = (words[1], words[6] if len(words) > 6 else "")
    return found


def end_master(rundir: RunDir) -> None:
    """Kill the master, whose nodes and ghosts then wait for the next one. Raises BpfsError EBUSY: it does not end."""
    master = rundir.recorded().get("master")
    _end_all(lambda: [master] if master is not None else [], signal.SIGKILL)


# -- taking down -----------------------------------------------------------------------------------


def take_down(mount: str) -> None:
    """End a cluster, whatever is left of it.

    Raises:
        BpfsError: there is none, or something resists.
    """
    rundir = RunDir(mount)
    if not rundir.path.is_dir():
        raise BpfsError(ENOENT, f"there is no cluster at {mount}")
    _end_all(lambda: list(rundir.recorded().values()), signal.SIGTERM)
    while is_mounted(mount):
        kernel.umount(mount)
    for point in (rundir.programs, rundir.psview):
        while is_mounted(str(point)):  # its master was killed
            kernel.umount(str(point))
    _end_all(lambda: ghosts(mount), signal.SIGKILL)
    virtualnet.remove(mount)
    made = rundir.read("made")
    if made is not None:
        with suppress(OSError):
            os.rmdir(made.rstrip("\n"))
    pidspace.restore()
    rundir.remove()


def _end_all(find: Callable[[], list[Recorded]], first: signal.Signals) -> None:
    """End processes in peace, after `DOWN_TIMEOUT` by force; a daemon in the making may miss the first word."""
    began, told, wait = time.monotonic(), 0.0, 0.005
    while living := [process for process in find() if process.alive]:
        waited = time.monotonic() - began
        if waited > 3 * DOWN_TIMEOUT:
            raise BpfsError(EBUSY, f"these processes do not end: {' '.join(str(process.pid) for process in living)}")
        if not told or time.monotonic() - told > TELL_AGAIN:
            told = time.monotonic()
            for process in living:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, first if waited < DOWN_TIMEOUT else signal.SIGKILL)
                    # A stopped process hears of nothing but SIGKILL until it goes on.
                    os.kill(process.pid, signal.SIGCONT)
        time.sleep(wait)
        wait = min(wait * 1.5, 0.1)


def ghosts(mount: str) -> list[Recorded]:
    """The ghosts of a cluster, by the environment that they were given."""
    mark = b"BPFS_GHOST=" + os.fsencode(mount)
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        if mark in words:
            found.append(Recorded(int(name), process_start(int(name))[1]))
    return found

"""A virtual cluster on this machine: master and nodes forked from one warm parent, and taken down without a trace.

Each node is a process tree in pid, mount and uts namespaces (on wish a network namespace too) whose pid 1 is the
slave's supervisor: when that dies, the kernel kills the node. Everything is recorded below /run/bpfs before it may
be needed for the taking down.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from errno import EBUSY, EIO, ENOENT
from pathlib import Path

from bpfs import daemon, kernel, log
from bpfs.cli import virtualnet
from bpfs.config import Config
from bpfs.daemon import Ready, Started
from bpfs.errors import BpfsError
from bpfs.master import control
from bpfs.master.app import MasterOptions, serve
from bpfs.rundir import Recorded, RunDir, process_start
from bpfs.slave.life import live
from bpfs.slave.options import SlaveOptions
from bpfs.slave.supervisor import Supervisor
from bpfs.wire.handshake import make_key

UP_TIMEOUT = 60.0
"""Seconds for the whole cluster to come up; 64 nodes take a few."""

DOWN_TIMEOUT = 10.0
"""Seconds for daemons to end in peace; then they are killed."""

TELL_AGAIN = 0.3
"""Seconds between two signals to the same process."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What `up` is to make."""

    mount: str
    nodes: int
    lease: float
    netns: bool = False
    tree: bool = True
    verbose: bool = False


class Up:
    """The making of one cluster; `run` makes all of it or nothing."""

    def __init__(self, options: UpOptions) -> None:
        self._options = options
        self._rundir = RunDir(options.mount)
        self._starting: dict[int, Started] = {}

    def run(self) -> None:
        """Make the cluster; returns when every node is up.

        Raises:
            BpfsError: what failed; everything has been cleaned up.
        """
        self._claim()
        try:
            key = make_key()
            self._rundir.write("key", key.decode() + "\n")
            self._make_mount_point()
            # What lives now lives on in every child: keep the collector from touching (and so copying) it.
            gc.collect()
            gc.freeze()
            net = virtualnet.VirtualNetwork(self._options.mount) if self._options.netns else None
            port = self._start_master(net.address if net else "127.0.0.1")
            for number in range(self._options.nodes):
                self._start_node(number, key, port, net)
            if net is not None:
                net.close()
            self._wait_up()
        except BaseException:
            take_down(self._options.mount)
            raise
        finally:
            for started in self._starting.values():
                started.close()

    def _claim(self) -> None:
        self._rundir.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            self._rundir.path.mkdir(mode=0o700)
        except FileExistsError:
            down = f"bpcluster down --mount {self._options.mount}"
            raise BpfsError(
                EBUSY, f"there is a cluster at {self._options.mount} already; end it with: {down}"
            ) from None

    def _make_mount_point(self) -> None:
        point = Path(self._options.mount)
        if not point.exists():
            self._rundir.write("made", f"{point}\n")
            point.mkdir(parents=True)

    def _start_master(self, address: str) -> tuple[str, int]:
        options, rundir = self._options, self._rundir
        config = Config(address=address, port=0, lease=options.lease, key=rundir.key, mount=options.mount)

        def body(ready: Ready) -> int:
            log.start("bpmaster", None, options.verbose)
            return serve(MasterOptions(config, tree=options.tree), ready)

        started = daemon.start(body, rundir.master_log)
        rundir.record("master", started.pid)
        complaint = started.wait_ready(UP_TIMEOUT)
        if complaint is not None:
            raise BpfsError(EIO, f"the master did not start: {complaint}")
        host, port = (rundir.read("port") or "").split()
        return host, int(port)

    def _start_node(
        self, number: int, key: bytes, master: tuple[str, int], net: virtualnet.VirtualNetwork | None
    ) -> None:
        options = self._options
        slave = SlaveOptions(*master, key, number, options.mount if options.tree else None, options.verbose)
        namespace = net.add_node(number) if net is not None else -1
        try:
            self._starting[number] = started = daemon.start(
                lambda ready: _become_node(slave, namespace, options.mount, ready),
                self._rundir.node_log(number),
                [namespace],
            )
        finally:
            if namespace >= 0:
                os.close(namespace)
        # The first child only makes the node's pid 1.
        os.waitpid(started.pid, 0)

    def _wait_up(self) -> None:
        deadline = time.monotonic() + UP_TIMEOUT
        for number, started in self._starting.items():
            complaint = started.wait_ready(max(0.1, deadline - time.monotonic()))
            if complaint is not None:
                raise BpfsError(EIO, f"node {number} did not start: {complaint}")
        wait = 0.01
        while True:
            states = node_states(self._rundir)
            missing = [number for number in range(self._options.nodes) if states.get(number, ("", ""))[0] != "up"]
            if not missing:
                return
            self._expect_hope(missing, states, time.monotonic() > deadline)
            time.sleep(wait)
            wait = min(wait * 1.5, 0.1)

    def _expect_hope(self, missing: list[int], states: dict[int, tuple[str, str]], late: bool) -> None:
        recorded = self._rundir.recorded()
        for number in missing:
            state, reason = states.get(number, ("not there", ""))
            if state == "error":
                raise BpfsError(EIO, f"node {number} is in error: {reason}")
            process = recorded.get(f"n{number}")
            if late or process is None or not process.alive:
                why = f"not up within {UP_TIMEOUT:g} s: {state} {reason}".rstrip() if late else "its slave has ended"
                raise BpfsError(EIO, f"node {number} did not start: {why}; {_last_line(self._rundir.node_log(number))}")


def _last_line(path: Path) -> str:
    with suppress(OSError, IndexError):
        return path.read_text(errors="replace").splitlines()[-1]
    return "its log is empty"


def _become_node(slave: SlaveOptions, namespace: int, mount: str, ready: Ready) -> int:
    """In the first child: make pid 1 of the node's pid namespace, record it, and end."""
    if namespace >= 0:
        kernel.setns(namespace, kernel.CLONE_NEWNET)
        os.close(namespace)
    kernel.unshare(kernel.CLONE_NEWPID)
    go, recorded = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        RunDir(mount).record(f"n{slave.number}", pid)
        os.write(recorded, b"x")
        return 0
    os.close(recorded)
    try:
        os.read(go, 1)
        os.close(go)
        _be_node(slave, mount, ready)
    except OSError as error:
        ready.failed(f"the namespaces cannot be made: {error.strerror} ({error.filename})")
    finally:
        os._exit(1)


def _be_node(slave: SlaveOptions, mount: str, ready: Ready) -> None:
    """In pid 1 of the node; never returns."""
    kernel.set_title(f"bpslave: supervisor of node {slave.number} at {mount}")
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS)
    os.setsid()
    socket.sethostname(f"n{slave.number}")
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    # The master's tree is not the node's: with it, the node would outlive the master's mount, and hang on it.
    while is_mounted(mount):
        kernel.umount(mount)
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    log.start(f"n{slave.number}", None, slave.verbose)
    ready.ok()
    os._exit(Supervisor(slave, live).run())


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
        text = control.ask(rundir.control, "status")
    except OSError as error:
        raise BpfsError(EIO, f"the master of {rundir.mount} does not answer: {error.strerror or error}") from None
    found = {}
    for line in text.splitlines():
        words = line.split(" ", 6)
        found[int(words[0])] = (words[1], words[6] if len(words) > 6 else "")
    return found


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
    _end_all(lambda: ghosts(mount), signal.SIGKILL)
    virtualnet.remove(mount)
    made = rundir.read("made")
    if made is not None:
        with suppress(OSError):
            os.rmdir(made.rstrip("\n"))
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

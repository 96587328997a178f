"""A virtual cluster on this machine: master and nodes forked from one warm parent.

Each node is a process tree in pid, mount and uts namespaces (on wish a network namespace too) whose pid 1 is the
slave's supervisor: when that dies, the kernel kills the node. Everything is recorded below /run/bpfs before it may
be needed for the taking down.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from errno import EBUSY, EIO, ENOENT
from pathlib import Path

from bpfs import daemon, kernel, log
from bpfs.cli import virtualnet
from bpfs.cli.virtualdown import end_master, is_mounted, node_states, take_down
from bpfs.config import DEFAULT_CACHE_SIZE, DEFAULT_PRECOPY, Config, apply_line
from bpfs.daemon import Ready, Started
from bpfs.errors import BpfsError
from bpfs.master.app import MasterOptions, serve
from bpfs.rundir import RunDir
from bpfs.slave.life import live
from bpfs.slave.options import SlaveOptions
from bpfs.slave.supervisor import Supervisor
from bpfs.wire.handshake import make_key
from engine import jobwatch
from engine.linux import procfs

OPTIONS = "options"
"""In the run directory: what `up` was asked for, as JSON."""

UP_TIMEOUT = 60.0
"""Seconds for the whole cluster to come up; 64 nodes take a few."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What `up` is to make."""

    mount: str
    nodes: int
    lease: float
    netns: bool = False
    tree: bool = True
    verbose: bool = False
    empty: bool = False
    exports: tuple[str, ...] = ()
    cachesize: int = DEFAULT_CACHE_SIZE
    precopy: int | None = DEFAULT_PRECOPY
    config: tuple[str, ...] = ()  # lines of the configuration


@contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Keeps ^C for the function it gives, which raises KeyboardInterrupt then.

    Raised at any moment, it could hit between a fork and its record, and leave what nobody knows of.
    """
    heard: list[int] = []

    def check() -> None:
        if heard:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, lambda signo, _: heard.append(signo))
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


class Up:
    """The making of one cluster; `run` makes all of it or nothing."""

    def __init__(self, options: UpOptions) -> None:
        self._options = options
        self._rundir = RunDir(options.mount)
        self._starting: dict[int, Started] = {}
        self._check_interrupt: Callable[[], None] = lambda: None

    def run(self) -> None:
        """Make the cluster; returns when every node is up.

        Raises:
            BpfsError: what failed; everything has been cleaned up.
        """
        with _interrupts_between_steps() as self._check_interrupt:
            self._run()

    def _run(self) -> None:
        self._claim()
        try:
            key = make_key()
            self._rundir.write("key", key.decode() + "\n")
            self._rundir.write(OPTIONS, json.dumps(asdict(self._options)))
            self._make_mount_point()
            # What lives now lives on in every child: keep the collector from touching (and so copying) it.
            gc.collect()
            gc.freeze()
            net = virtualnet.VirtualNetwork(self._options.mount) if self._options.netns else None
            port = start_master(self._options, net.address if net else "127.0.0.1")
            self._start_watch()
            for number in range(self._options.nodes):
                self._check_interrupt()
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

    def _start_watch(self) -> None:
        # One for all nodes, and outside of their namespaces, where the kernel would not speak to it.
        try:
            watch = jobwatch.open_shared(self._rundir.watch)
        except OSError as error:
            raise BpfsError(EIO, f"jobwatch does not start: {error.strerror}") from None
        self._rundir.record("watch", watch.pid)

    def _start_node(
        self, number: int, key: bytes, master: tuple[str, int], net: virtualnet.VirtualNetwork | None
    ) -> None:
        options = self._options
        slave = SlaveOptions(
            *master,
            key,
            number,
            options.mount if options.tree else None,
            options.verbose,
            self._rundir.watch,
            options.empty,
            self._rundir.node_cache(number),
        )
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
            self._check_interrupt()
            complaint = started.wait_ready(max(0.1, deadline - time.monotonic()))
            if complaint is not None:
                raise BpfsError(EIO, f"node {number} did not start: {complaint}")
        wait = 0.01
        while True:
            self._check_interrupt()
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


def start_master(options: UpOptions, address: str) -> tuple[str, int]:
    """Starts the master of a cluster; returns address and port when it is ready.

    Raises:
        BpfsError: EIO, with its own sentence.
    """
    rundir = RunDir(options.mount)
    config = Config(address=address, port=0, lease=options.lease, key=rundir.key, mount=options.mount)
    config.exports, config.cachesize = list(options.exports), options.cachesize
    config.precopy = options.precopy
    for line in options.config:
        apply_line(config, line, "--config")

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


def restart_master(mount: str) -> None:
    """Kills the master of a cluster, if it lives, and starts another one, which takes up nodes and processes.

    Raises:
        BpfsError: ENOENT, there is no such cluster; EIO, the master does not start; EBUSY, the old one does not end.
    """
    rundir = RunDir(mount)
    words = (rundir.read("port") or "").split()
    try:
        kept = json.loads(rundir.read(OPTIONS) or "")
        options = UpOptions(**kept | {name: tuple(kept[name]) for name in ("exports", "config")})
        address = words[0]
    except (ValueError, IndexError):
        raise BpfsError(ENOENT, f"there is no virtual cluster at {mount}") from None
    end_master(rundir)
    gc.freeze()
    start_master(options, address)


def restart_slave(mount: str, number: int) -> None:
    """Has the slave of a node start anew, with what lives there; returns when the node is back.

    Raises:
        BpfsError: ENOENT, there is no such node; EIO, it does not come back.
    """
    rundir = RunDir(mount)
    supervisor = rundir.recorded().get(f"n{number}")
    if supervisor is None or not supervisor.alive:
        raise BpfsError(ENOENT, f"there is no virtual node {number} at {mount}")
    before = _slave(supervisor.pid)
    os.kill(supervisor.pid, signal.SIGHUP)
    deadline = time.monotonic() + UP_TIMEOUT
    while _slave(supervisor.pid) in (0, before) or node_states(rundir).get(number, ("", ""))[0] not in _BACK:
        if time.monotonic() > deadline:
            raise BpfsError(EIO, f"node {number} does not come back: {_last_line(rundir.node_log(number))}")
        time.sleep(0.02)


_BACK = ("up", "unavailable")


def _slave(supervisor: int) -> int:
    """The pid of the slave proper; 0: there is none."""
    for pid in procfs.children(supervisor):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text() == "bpslave\n":
                return pid
    return 0


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
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_SHARED)  # with its jobs only
    # The master's tree is not the node's: with it, the node would outlive the master's mount, and hang on it.
    while is_mounted(mount):
        kernel.umount(mount)
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    log.start(f"n{slave.number}", None, slave.verbose)
    ready.ok()
    os._exit(Supervisor(slave, live).run())

"""bpmaster's composition root: parse, key, port, engine, mount, ready; then serve until told to end, and undo all
of it.

Whatever can be wrong is complained of before the daemon is ready, and so on the starter's terminal.
"""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import socket
import struct
from contextlib import AsyncExitStack
from dataclasses import dataclass
from errno import EBUSY, ENODEV
from pathlib import Path

import trio

from bpfs import config as configuration
from bpfs import daemon, kernel, log
from bpfs.config import DEFAULT_STATE, Config
from bpfs.daemon import Ready
from bpfs.engines import Workers
from bpfs.errors import BpfsError, ConfigError, first_error
from bpfs.master import control, tree
from bpfs.master.boot import BootDesk
from bpfs.master.cluster import Cluster
from bpfs.master.listener import Listener, open_port
from bpfs.master.processes import processes
from bpfs.master.succession import Succession
from bpfs.master.view import view
from bpfs.nodes.clockwatch import ClockWatch
from bpfs.nodes.names import NodeNames
from bpfs.nodes.registry import MASTER
from bpfs.nodes.settings import Settings
from bpfs.pidspace import own_pids
from bpfs.procs.covers import Covers
from bpfs.rundir import RunDir, escape
from bpfs.sample import LOOK_EVERY, Sampler
from bpfs.wire.handshake import read_key
from engine.zygote import Zygote

COLLECT = (20_000, 10, 50)
"""For gc.set_threshold: a ghost is some hundred objects, and Python's own figures have them all looked at, which takes
half a second where there are 10,000, whenever a reader lists them."""

_log = log.get("master")

FAREWELL = 3.0
"""Seconds that slaves have to kill their jobs when the master ends; after it they fence themselves, alone."""

SIOCGIFADDR = 0x8915  # linux/sockios.h


@dataclass(frozen=True, slots=True)
class MasterOptions:
    """The options of a master.

    Attributes:
        config: what it runs by.
        config_path: the file that SIGHUP reads again; None: there is none.
        tree: whether to mount the tree at all (tests of the rest do without).
    """

    config: Config
    config_path: Path | None = None
    tree: bool = True


def serve(options: MasterOptions, ready: Ready) -> int:
    """Be the master until told to end; gives the exit code."""
    kernel.set_title(f"bpmaster: {options.config.mount}")
    daemon.raise_limits()
    gc.set_threshold(*COLLECT)
    running = RunDir(options.config.mount).master_pid()
    if running not in (0, os.getpid()):
        raise BpfsError(EBUSY, f"a master runs at {options.config.mount} already (pid {running})")
    key = read_key(options.config.key)
    port = open_port(listen_address(options.config), options.config.port or _last_port(RunDir(options.config.mount)))
    # Before trio and before any thread: workers are forks of the zygote, and it is a fork of this.
    zygote = Zygote.start()
    covers = Covers.start(RunDir(options.config.mount).psview)
    complaint = ""
    try:
        with own_pids():
            trio.run(_serve, options, ready, key, port, Workers(zygote), covers)
    except* BpfsError as group:
        complaint = first_error(group).sentence
        if ready.told:
            _log.error("%s", complaint)
        ready.failed(complaint)
    finally:
        covers.close()
        zygote.close()
        port.close()
    return 1 if complaint else 0


def _last_port(rundir: RunDir) -> int:
    """The port where slaves expect the master after one that was killed; 0: any will do."""
    words = (rundir.read("port") or "").split()
    return int(words[1]) if Succession.next(rundir).follows and len(words) == 2 else 0


def listen_address(config: Config) -> str:
    """The address to listen on: as configured, else the interface's, else all.

    Raises:
        BpfsError: there is no such interface, or it has no address.
    """
    if config.address or not config.interface:
        return config.address
    request = struct.pack("256s", config.interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            return socket.inet_ntoa(fcntl.ioctl(sock, SIOCGIFADDR, request)[20:24])
        except OSError as error:
            raise BpfsError(ENODEV, f"interface {config.interface} has no address: {error.strerror}") from None


def state_file(rundir: RunDir) -> Path:
    """Where settings of nodes are kept: what a virtual cluster has goes with it."""
    return rundir.path / "nodes" if rundir.virtual else DEFAULT_STATE / escape(rundir.mount)


async def _serve(
    options: MasterOptions, ready: Ready, key: bytes, port: socket.socket, workers: Workers, covers: Covers
) -> None:
    rundir = RunDir(options.config.mount)
    async with AsyncExitStack() as stack:
        signals = stack.enter_context(trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        rundir.make()
        succession = Succession.next(rundir)
        cluster = Cluster(options.config, key, workers, nursery, succession=succession)
        host, number = port.getsockname()
        cluster.nodes.set_address(cluster.nodes.get(MASTER), host)
        cluster.reconfigure(options.config)
        Settings(cluster.nodes, cluster.admission, options.config.state or state_file(rundir)).load()
        stack.callback(_leave, cluster, rundir, ready)
        succession.enter(rundir)
        cluster.blocks.remember(rundir.path / "blocks", afresh=not succession.follows)
        rundir.record("master", os.getpid())
        rundir.write("port", f"{host} {number}\n")
        procs = await stack.enter_async_context(processes(cluster, covers))
        boot = BootDesk(cluster, lambda: _read_again(cluster, options.config_path))
        files = (await stack.enter_async_context(view(cluster))).server
        clocks = ClockWatch(cluster.nodes)
        cluster.node_entries.append(clocks.entry())
        if options.tree:
            await stack.enter_async_context(tree.mounted(cluster))
        nursery.start_soon(workers.keep_spare, name="spare worker")
        nursery.start_soon(clocks.run, name="clocks of nodes")
        nursery.start_soon(NodeNames(cluster.nodes, rundir.hosts).run, name="names of nodes")
        nursery.start_soon(_sample, cluster, name="samples of the master")
        await nursery.start(control.serve, cluster, rundir.control, name="control socket")
        nursery.start_soon(Listener(cluster, port).run, name="cluster port")
        if options.config.bootserver and options.config_path is not None:
            nursery.start_soon(boot.watch, name="boots that stop")
            nursery.start_soon(boot.run, options.config_path.absolute(), number, name="boot server")
        _log.info("ready on %s port %d", host, number)
        signal.signal(signal.SIGUSR1, _hand_over)
        ready.ok()
        async for signo in signals:
            if signo != signal.SIGHUP:
                break
            _read_again(cluster, options.config_path)
            boot.read_again()
            files.export()
            procs.choose_strict(cluster.config.strict)
            if procs.view is not None:
                procs.view.configure(cluster.config.psview)
        _log.info("told to end")
        cluster.ending = True
        await _farewell(cluster)


def _hand_over(signo: int, frame: object) -> None:
    """End here and now, as if killed, and leave nodes, jobs and ghosts to the next master: how a unit is restarted."""
    _log.info("told to leave all to the next master")
    os._exit(0)


def _leave(cluster: Cluster, rundir: RunDir, ready: Ready) -> None:
    # What a master that has failed has left is for the next one.
    if cluster.ending or not (ready.told or cluster.succession.follows):
        cluster.succession.end(rundir)
        rundir.leave()


async def _farewell(cluster: Cluster) -> None:
    """Have all slaves kill their jobs; who does not answer in time finds the link closed, and does it then."""
    with trio.move_on_after(FAREWELL):
        async with trio.open_nursery() as nursery:
            for node in cluster.nodes:
                if node.session is not None:
                    nursery.start_soon(node.session.fence, "the master ends", "afresh")


def _read_again(cluster: Cluster, path: Path | None) -> None:
    if path is None:
        _log.info("there is no configuration file to read again")
        return
    try:
        cluster.reconfigure(configuration.read(path))
        _log.info("read %s again", path)
    except ConfigError as error:
        _log.error("the configuration stays as it was: %s", error)


async def _sample(cluster: Cluster) -> None:
    sampler, master = Sampler(), cluster.nodes.get(MASTER)
    try:
        while True:
            sample = sampler.take_changed()
            if sample is not None:
                cluster.nodes.set_sample(master, sample)
            await trio.sleep(LOOK_EVERY)
    finally:
        sampler.close()

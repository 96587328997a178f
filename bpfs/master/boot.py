"""bpbootd as the master's child: started, kept running, and its reports made into states, reasons, logs and
/bpfs/boot.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from boot.reports import Report
from bpfs import log
from bpfs.errors import BpfsError
from bpfs.master.cluster import Cluster
from bpfs.nodes.registry import Node, NodeTable
from bpfs.nodes.states import Cause, NodeState
from bpfs.tree.entries import Directory, File, Table
from bpfs.tree.formats import lines

_log = log.get("boot")

SILENCE = 120.0
"""Seconds after which a machine that was booting and tells nothing more has failed to: its slowest step, the start of
a kernel with its firmware, takes a quarter of that."""

FIRST_PAUSE, LAST_PAUSE = 1.0, 60.0
"""Seconds before a boot server that ended is started again, doubling."""

LINE_MOST = 4096


@dataclass(frozen=True, slots=True)
class Stranger:
    """A machine that asked and is no node."""

    mac: str
    count: int
    last: int  # seconds since the epoch


class BootDesk:
    """What the master knows of machines that boot."""

    def __init__(self, cluster: Cluster, reread: Callable[[], None]) -> None:
        """Args:
        reread: has the configuration read again: it has a new node.
        """
        self._cluster = cluster
        self._reread = reread
        self._strangers: OrderedDict[str, Stranger] = OrderedDict()
        self._heard: dict[int, float] = {}
        self._child: subprocess.Popen[bytes] | None = None
        self._takers: dict[Report, Callable[..., None]] = {
            Report.ASKED: self._asked,
            Report.NEW: self._new,
            Report.UNKNOWN: self._unknown,
            Report.PROGRESS: self._progress,
            Report.LOG: self._told,
            Report.READY: self._ready,
        }
        cluster.root_entries.append(directory(lambda: list(self._strangers.values())))

    # -- reports -----------------------------------------------------------------------------------

    def take(self, line: str) -> None:
        """One report. What is none is logged, and nothing else."""
        word, *words = line.split(" ")
        try:
            self._takers[Report(word)](*words)
        except (ValueError, TypeError, BpfsError):
            _log.warning("the boot server says %r, which makes no sense", line[:200])

    def _asked(self, number: str, mac: str, address: str) -> None:
        node = self._node(int(number))
        self._cluster.logs.add(node.number, f"boot: {mac} asked, and is {address}")
        self._strangers.pop(mac, None)
        self._heard[node.number] = time.monotonic()
        if node.state is NodeState.DOWN and not node.barred:
            self._cluster.nodes.set_state(node, NodeState.BOOT, Cause.BOOTING, "its machine has asked for an address")
        else:
            self._say(node, "its machine has asked for an address")

    def _new(self, number: str, mac: str) -> None:
        _log.info("%s is node %s from now on", mac, number)
        self._reread()

    def _unknown(self, mac: str, count: str, last: str) -> None:
        if mac not in self._strangers:
            _log.warning("%s wants to boot and is no node; see `node` and `nodeassign` in bpmaster(8)", mac)
        self._strangers[mac] = Stranger(mac, int(count), int(last))
        self._strangers.move_to_end(mac)
        while len(self._strangers) > 256:
            self._strangers.popitem(last=False)

    def _progress(self, number: str, what: str, percent: str) -> None:
        node = self._node(int(number))
        self._heard[node.number] = time.monotonic()
        self._say(node, f"fetching {what} {int(percent)} %")

    def _told(self, number: str, *words: str) -> None:
        self._cluster.logs.add(self._node(int(number)).number, "boot: " + " ".join(words))

    def _ready(self, address: str, port: str) -> None:
        _log.info("nodes can boot from %s, port %s", address, port)

    def _node(self, number: int) -> Node:
        return self._cluster.nodes.find(number) or self._cluster.nodes.add(number)

    def _say(self, node: Node, reason: str) -> None:
        if node.state is NodeState.BOOT and node.session is None:
            self._cluster.nodes.set_reason(node, reason)

    async def watch(self) -> None:
        """Takes machines for failed whose boot has stopped."""
        nodes: NodeTable = self._cluster.nodes
        while True:
            await trio.sleep(SILENCE / 10)
            for number, heard in list(self._heard.items()):
                node = nodes.find(number)
                if node is None or node.state is not NodeState.BOOT or node.session is not None:
                    del self._heard[number]
                elif time.monotonic() - heard > SILENCE:
                    nodes.set_state(node, NodeState.DOWN, Cause.LOST, f"its boot stopped: {node.reason}")

    # -- the server --------------------------------------------------------------------------------

    def read_again(self) -> None:
        """Have the boot server read the configuration again."""
        if self._child is not None:
            with suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGHUP)

    async def run(self, config: Path, port: int) -> None:
        """Keep a boot server running until cancelled."""
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            code = await self._run_once(config, port)
            pause = FIRST_PAUSE if time.monotonic() - began > LAST_PAUSE else min(2 * pause, LAST_PAUSE)
            _log.error("the boot server ended with exit code %d; it is started again in %g s", code, pause)
            await trio.sleep(pause)

    async def _run_once(self, config: Path, port: int) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        options = ["-f", "-c", str(config), "--mount", self._cluster.config.mount, "-p", str(port)]
        options += ["-k", str(self._cluster.config.key), "--reports", str(theirs.fileno())]
        command = [sys.executable, "-m", "bpfs.cli.bpbootd", *options]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with theirs:
            child = subprocess.Popen(  # noqa: ASYNC220  (a spawn takes a millisecond, and must not be cancelled half-way)
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment, cwd="/"
            )
        self._child = child
        try:
            await self._read(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        finally:
            # It ends by itself when its reports are not taken any more; a second is plenty.
            self._child = None
            with trio.CancelScope(shield=True):
                child.terminate()
                await trio.to_thread.run_sync(child.wait)
        return child.returncode

    async def _read(self, stream: trio.SocketStream) -> None:
        async with stream:
            rest = b""
            async for data in stream:
                *whole, rest = (rest + data).split(b"\n")
                for line in whole:
                    self.take(line.decode(errors="replace"))
                if len(rest) > LINE_MOST:
                    return


def directory(strangers: Callable[[], list[Stranger]]) -> Directory[NodeTable]:
    """/bpfs/boot."""

    def unknown(_: NodeTable) -> str:
        return lines(f"{it.mac} {it.count} {it.last}" for it in strangers())

    return Directory(
        "boot",
        "machines that boot over the network",
        table=Table(File("unknown", "a line a machine that asked and is no node: mac count last", read=unknown)),
    )

"""The final stage of a node's start, and the first of its end: the clock, and the administrator's own steps.

A step is a program in a folder of the master (node_up.d, node_down.d), in order of names as run-parts(8) takes them; it
runs on the master, knows the node by $NODE, and reaches it with bpsh. Its output goes to nodes/N/log. A step that fails
makes the node `error`, its last line being the reason.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from errno import EIO
from pathlib import Path

import trio

from bpfs import log
from bpfs.config import Config
from bpfs.errors import BpfsError, LinkClosed
from bpfs.nodes.nodelog import NodeLog
from bpfs.nodes.registry import Node, NodeTable
from bpfs.wire.messages import SetClock

_log = log.get("stage")

STEP_TIMEOUT = 600.0
"""Seconds that one step may take; the longest that is usual is mkfs of a large disk."""

CLOCK_TIMEOUT = 10.0

LINE_MOST = 1000

_NAME = re.compile(r"[A-Za-z0-9_-]+")  # what run-parts(8) takes


def steps(folder: Path) -> list[Path]:
    """The steps in a folder, in order; none where there is no folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    paths = [folder / name for name in names if _NAME.fullmatch(name)]
    return [path for path in paths if path.is_file() and os.access(path, os.X_OK)]


class Stage:
    """Brings nodes from a ready slave to `up`, many at a time."""

    def __init__(self, nodes: NodeTable, logs: NodeLog, config: Callable[[], Config]) -> None:
        self._nodes = nodes
        self._logs = logs
        self._config = config
        self._limit = trio.CapacityLimiter(1)

    async def up(self, node: Node) -> None:
        """Everything before `up`.

        Raises:
            BpfsError: a step failed; its last line is the sentence.
        """
        await self._set_clock(node)
        await self._run(node, self._config().nodeup)

    async def down(self, node: Node) -> None:
        """Everything before a node is taken down; a failure is in its log, and holds nothing up."""
        with suppress(BpfsError):
            await self._run(node, self._config().nodedown)

    async def _set_clock(self, node: Node) -> None:
        # No process is there yet, so the clock may also go backwards. A virtual node's clock is this machine's.
        if node.real and node.session is not None:
            try:
                await node.session.link.request(SetClock(time.time_ns()), CLOCK_TIMEOUT)
            except LinkClosed:
                raise
            except BpfsError as error:
                raise BpfsError(EIO, f"its clock cannot be set: {error}") from None

    async def _run(self, node: Node, folder: Path) -> None:
        found = steps(folder)
        if not found:
            return
        self._limit.total_tokens = self._config().nodeparallel
        self._nodes.set_reason(node, f"waits for its turn in {folder.name}")
        async with self._limit:
            for path in found:
                self._nodes.set_reason(node, f"{folder.name}: {path.name}")
                await self._step(node, path)

    async def _step(self, node: Node, path: Path) -> None:
        config = self._config()
        environment = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), "NODE": str(node.number),
            "BPFS": config.mount, "ADDRESS": node.address, "MASTER": config.address or self._nodes.get(-1).address,
        }  # fmt: skip
        try:
            process = await trio.lowlevel.open_process(
                [str(path)], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, cwd="/", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise BpfsError(EIO, f"{path.name} cannot be run: {error.strerror}") from None
        last = ""
        try:
            with trio.fail_after(STEP_TIMEOUT):
                last = await self._collect(node, path, process)
                code = await process.wait()
        except trio.TooSlowError:
            raise BpfsError(EIO, f"{path.name} took longer than {STEP_TIMEOUT:g} s") from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                with trio.CancelScope(shield=True):
                    await process.wait()
        if code != 0:
            said = last or (f"exit code {code}" if code > 0 else f"signal {-code}")
            raise BpfsError(EIO, f"{path.name}: {said}")

    async def _collect(self, node: Node, path: Path, process: trio.Process) -> str:
        """Its output into the log; gives the last line."""
        assert process.stdout is not None
        last, rest = "", b""
        async for data in process.stdout:
            *whole, rest = (rest + data).split(b"\n")
            if len(rest) > LINE_MOST:
                whole, rest = [*whole, rest], b""
            for line in whole:
                last = self._enter(node, path, line) or last
        return self._enter(node, path, rest) or last

    def _enter(self, node: Node, path: Path, line: bytes) -> str:
        text = line.decode(errors="replace").strip()
        if text:
            self._logs.add(node.number, f"{path.name}: {text}")
        return text

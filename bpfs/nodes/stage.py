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
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EIO
from pathlib import Path

import trio

from bpfs import log
from bpfs.config import Config
from bpfs.errors import BpfsError, LinkClosed
from bpfs.fstab import find
from bpfs.nodes.nodelog import NodeLog
from bpfs.nodes.registry import Node, NodeTable
from bpfs.wire.messages import SetClock

_log = log.get("stage")

STEP_TIMEOUT = 600.0
"""Seconds that one step may take; the longest that is usual is mkfs of a large disk."""

CLOCK_TIMEOUT = 120.0
"""Seconds for a slave that is there and slow: one that is not is given up by its session."""

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


@dataclass(frozen=True, slots=True)
class Step:
    """One step: what it is called in log and reason, and what is run."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def _programs(folder: Path) -> list[Step]:
    return [Step(path.name, [str(path)]) for path in steps(folder)]


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
        folder = self._config().nodeup
        await self._run(node, folder.name, [*self._mounting(node), *_programs(folder)])

    async def down(self, node: Node) -> None:
        """Everything before a node is taken down; a failure is in its log, and holds nothing up."""
        folder = self._config().nodedown
        with suppress(BpfsError):
            await self._run(node, folder.name, _programs(folder))
        with suppress(BpfsError):
            await self._run(node, folder.name, self._mounting(node, "--unmount"))

    async def _set_clock(self, node: Node) -> None:
        # No process is there yet, so the clock may also go backwards. A virtual node's clock is this machine's.
        if node.real and node.session is not None:
            try:
                await node.session.link.request(SetClock(time.time_ns()), CLOCK_TIMEOUT)
            except LinkClosed:
                raise
            except BpfsError as error:
                raise BpfsError(EIO, f"its clock cannot be set: {error}") from None

    def _mounting(self, node: Node, *more: str) -> list[Step]:
        """The step that is always there: the node's file systems, where there is a file that names any."""
        config = self._config()
        if find(config.fstab, node.number) is None:
            return []
        options = ["--mount", config.mount, "--fstab", config.fstab, "--bootimages", config.bootimages]
        options += ["--mkfs", config.mkfs.value, "--fsck", config.fsck.value, "--master", self._master]
        options += [*more, str(node.number)]
        # By this very Python, wherever our modules are.
        ours = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        return [Step("fstab", [sys.executable, "-m", "bpfs.cli.bpmount", *map(str, options)], ours)]

    @property
    def _master(self) -> str:
        return self._config().address or self._nodes.get(-1).address

    async def _run(self, node: Node, where: str, found: list[Step]) -> None:
        if not found:
            return
        self._limit.total_tokens = self._config().nodeparallel
        self._nodes.set_reason(node, f"waits for its turn in {where}")
        async with self._limit:
            for step in found:
                self._nodes.set_reason(node, f"{where}: {step.name}")
                await self.run_step(node, step)

    async def run_step(self, node: Node, step: Step, timeout: float = STEP_TIMEOUT) -> None:
        """One step, with its output in the node's log.

        Raises:
            BpfsError: EIO: it failed; the sentence is its last line.
        """
        environment = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), "NODE": str(node.number),
            "BPFS": self._config().mount, "ADDRESS": node.address, "MASTER": self._master,
        }  # fmt: skip
        try:
            process = await trio.lowlevel.open_process(
                step.command, env=environment | step.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, cwd="/", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise BpfsError(EIO, f"{step.name} cannot be run: {error.strerror}") from None
        last = ""
        try:
            with trio.fail_after(timeout):
                last = await self._collect(node, step, process)
                code = await process.wait()
        except trio.TooSlowError:
            raise BpfsError(EIO, f"{step.name} took longer than {timeout:g} s") from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                with trio.CancelScope(shield=True):
                    await process.wait()
        if code != 0:
            said = last or (f"exit code {code}" if code > 0 else f"signal {-code}")
            raise BpfsError(EIO, f"{step.name}: {said}")

    async def _collect(self, node: Node, step: Step, process: trio.Process) -> str:
        """Its output into the log; gives the last line."""
        assert process.stdout is not None
        last, rest = "", b""
        async for data in process.stdout:
            *whole, rest = (rest + data).split(b"\n")
            if len(rest) > LINE_MOST:
                whole, rest = [*whole, rest], b""
            for line in whole:
                last = self._enter(node, step, line) or last
        return self._enter(node, step, rest) or last

    def _enter(self, node: Node, step: Step, line: bytes) -> str:
        text = line.decode(errors="replace").strip()
        if text:
            self._logs.add(node.number, f"{step.name}: {text}")
        return text

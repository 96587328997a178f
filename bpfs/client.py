# SPDX-License-Identifier: GPL-2.0-or-later
"""The cluster from Python, without any of the daemons' code.

Everything here is a read or a write of a file below /bpfs, as bpfs(5) describes them, and can be done with cat and
echo::

    from bpfs.client import Cluster

    cluster = Cluster()
    for node in cluster.nodes.values():
        print(node.number, node.state, node.load)
    cluster.nodes[7].migrate(1234)              # echo 1234 > /bpfs/nodes/7/migrate
    cluster.procs[1234].wait()                  # cat /bpfs/procs/1234/wait
    for result in cluster.run(["hostname"], nodes="allup"):
        print(result.node, result.stdout)

What the cluster refuses comes as an `OSError` (`BpfsError`) with the errno of the write and a sentence. Only the
standard library is needed; nothing is cached, so every attribute is as fresh as the file behind it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal as signals
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from errno import EINVAL, ENOENT
from itertools import chain
from pathlib import Path

from bpfs.errors import BpfsError
from bpfs.nodespec import MASTER, Candidate, expand
from bpfs.records import Event, ExitStatus, Move, NodeStatus, Stay, parse_event, parse_exit, parse_move, parse_status

__all__ = ["MASTER", "Cluster", "Event", "ExitStatus", "Move", "Node", "NodeStatus", "Process", "Result", "Stay"]

DEFAULT_MOUNT = "/bpfs"
_READ_SIZE = 1 << 16


def bpsh_command(node: int) -> list[str]:
    """What to put before a command and its arguments to run it on a node."""
    own = Path(__file__).parent / "bin" / "bpsh"
    bpsh = str(own) if own.exists() else shutil.which("bpsh") or "bpsh"
    return [bpsh, "master" if node == MASTER else str(node), "--"]


@dataclass(frozen=True, slots=True)
class Result:
    """What a command did on one node."""

    node: int
    returncode: int  # negative: killed by that signal
    stdout: bytes
    stderr: bytes


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape")
    except OSError as error:
        raise BpfsError(error.errno or EINVAL, f"{path}: {error.strerror}") from None


def _write(path: Path, text: object, doing: str = "") -> None:
    # One write(2), nothing buffered: its errno is the answer, and close(2) would lose it.
    try:
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(fd, f"{text}\n".encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise BpfsError(error.errno or EINVAL, f"{doing or path}: {error.strerror}") from None


def _batches(path: Path) -> Iterator[list[Event]]:
    # Opened now, not at the first read: what happens from here on counts.
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BpfsError(error.errno or EINVAL, f"{path}: {error.strerror}") from None
    return _read_batches(fd)


def _read_batches(fd: int) -> Iterator[list[Event]]:
    rest = ""
    try:
        while data := os.read(fd, _READ_SIZE):
            *lines, rest = (rest + data.decode(errors="replace")).split("\n")
            yield [parse_event(line) for line in lines]
    finally:
        os.close(fd)


class Node:
    """One node; -1 is the master. Attributes read its files anew each time; state, owner, group and mode can be set."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster = cluster
        self.number = number
        self.path = cluster.mount / "nodes" / str(number)

    def __repr__(self) -> str:
        return f"Node({self.number})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def read(self, name: str) -> str:
        """Returns the content of one of the node's files, without the last newline."""
        return _read(self.path / name).removesuffix("\n")

    def write(self, name: str, value: object) -> None:
        """Writes to one of the node's files.

        Raises:
            BpfsError: what the cluster has against it.
        """
        _write(self.path / name, value, f"cannot set {name} of node {self.number} to {value}")

    @property
    def state(self) -> str:
        """down, boot, unavailable, up, error, reboot, halt or pwroff."""
        return self.read("state")

    @state.setter
    def state(self, wanted: str) -> None:
        self.write("state", wanted)

    @property
    def reason(self) -> str:
        """Why the node is not up, in a sentence; empty when it is."""
        return self.read("reason")

    @property
    def owner(self) -> str:
        """The user whose node it is, by name."""
        return self.read("owner")

    @owner.setter
    def owner(self, user: str | int) -> None:
        self.write("owner", user)

    @property
    def group(self) -> str:
        """The group whose node it is, by name."""
        return self.read("group")

    @group.setter
    def group(self, group: str | int) -> None:
        self.write("group", group)

    @property
    def mode(self) -> int:
        """Who may migrate here: x bits, 0o111 for everybody."""
        return int(self.read("mode"), 8)

    @mode.setter
    def mode(self, mode: int) -> None:
        self.write("mode", f"{mode:03o}")

    @property
    def load(self) -> tuple[float, float, float]:
        """Load averages over 1, 5 and 15 minutes."""
        one, five, fifteen = self.read("load").split()[:3]
        return float(one), float(five), float(fifteen)

    @property
    def memory(self) -> dict[str, int]:
        """What `memory` shows, in kB."""
        return {key: int(value) for key, value in (line.split()[:2] for line in self.read("memory").splitlines())}

    @property
    def cpus(self) -> int:
        """How many processors it has."""
        return int(self.read("cpus"))

    @property
    def busy(self) -> tuple[float, ...]:
        """Of each processor, the share of the last seconds that it was busy, 0 to 1."""
        return tuple(map(float, self.read("busy").split()))

    @property
    def heard(self) -> float:
        """When it was last heard of, seconds since 1970; 0 where it never was."""
        return float(self.read("heard") or 0)

    @property
    def uptime(self) -> float:
        """Seconds since it started."""
        return float(self.read("uptime").split()[0])

    @property
    def kernel(self) -> str:
        """The version of its kernel."""
        return self.read("kernel")

    @property
    def address(self) -> str:
        """Its address in the cluster's network."""
        return self.read("address")

    @property
    def procs(self) -> list[Process]:
        """The processes that run there, in order of their pids."""
        try:
            pids = sorted(int(name) for name in os.listdir(self.path / "procs"))
        except OSError as error:
            raise BpfsError(error.errno or EINVAL, f"{self.path / 'procs'}: {error.strerror}") from None
        return [Process(self.cluster, pid) for pid in pids]

    @property
    def moves(self) -> list[Move]:
        """The last moves to this node, oldest first."""
        return [parse_move(line) for line in self.read("migrate").splitlines()]

    def migrate(self, pid: int, *, onexec: bool = False, lazy: bool = False) -> None:
        """Moves a process here; returns when it is here.

        Args:
            pid: whom.
            onexec: arms the move for the process's next exec(2) instead.
            lazy: it runs here before its memory is here; see bpfs(5) for what it risks.

        Raises:
            BpfsError: why not, with the errno of bpfs(5) and the reason in words.
        """
        try:
            words = [str(pid), *["onexec"] * onexec, *["lazy"] * lazy]
            _write(self.path / "migrate", " ".join(words), f"process {pid} to node {self.number}")
        except BpfsError as error:
            reason = self._why_not(pid)
            raise BpfsError(error.code, f"{error.sentence}: {reason}" if reason else error.sentence) from None

    def _why_not(self, pid: int) -> str:
        # The last word about this pid; nobody else can have moved it in between but to the same end.
        try:
            moves = [move for move in self.moves if move.pid == pid]
        except OSError:
            return ""
        return moves[-1].reason if moves and moves[-1].outcome != "ok" else ""

    def events(self) -> Iterator[Event]:
        """What happens to this node from now on, without end."""
        return chain.from_iterable(_batches(self.path / "events"))


class Process:
    """A process of the cluster, known by its pid wherever it runs."""

    def __init__(self, cluster: Cluster, pid: int) -> None:
        self.cluster = cluster
        self.pid = pid
        self.path = cluster.mount / "procs" / str(pid)

    def __repr__(self) -> str:
        return f"Process({self.pid})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Process) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def read(self, name: str) -> str:
        """Returns the content of one of the process's files, without the last newline."""
        return _read(self.path / name).removesuffix("\n")

    def write(self, name: str, value: object) -> None:
        """Writes to one of the process's files.

        Raises:
            BpfsError: what the cluster has against it.
        """
        _write(self.path / name, value, f"process {self.pid}: cannot write {value} to {name}")

    @property
    def node(self) -> int | None:
        """The number of the node where it runs (-1: the master); None while it is on its way."""
        text = self.read("node")
        return None if text == "migrating" else int(text)

    @property
    def state(self) -> str:
        """What it is doing."""
        return self.read("state")

    @property
    def cmdline(self) -> list[str]:
        """Its command and arguments."""
        return self.read("cmdline").removesuffix("\0").split("\0")

    @property
    def rusage(self) -> dict[str, str]:
        """The resources it used, as `rusage` names them."""
        return dict(line.split(" ", 1) for line in self.read("rusage").splitlines())

    @property
    def history(self) -> list[Stay]:
        """The places it has been to, oldest first."""
        return [Stay(int(line.split()[0]), line) for line in self._history() if not line.startswith("signal ")]

    @property
    def killed_because(self) -> str:
        """Why it was killed, where memory that was to come was lost; else empty."""
        return next((line for line in self._history() if line.startswith("signal ")), "")

    def _history(self) -> list[str]:
        return self.read("history").splitlines()

    @property
    def cantmove(self) -> str:
        """Why it cannot move now, in words; empty if it can, or if nobody knows the process any more."""
        try:
            return self.read("cantmove").replace("\n", "; ")
        except OSError:
            return ""

    def migrate(self, node: int, *, lazy: bool = False) -> None:
        """Moves it to a node (-1: home). `lazy` and what it raises: as of `Node.migrate`."""
        Node(self.cluster, node).migrate(self.pid, lazy=lazy)

    def signal(self, number: int | signals.Signals) -> None:
        """Sends it a signal, wherever it runs."""
        _write(self.path / "signal", int(number), f"process {self.pid}: cannot send signal {int(number)}")

    def checkpoint(self, path: str | os.PathLike[str], *, stop: bool = False) -> None:
        """Writes an image of it into a file of the master's; see bpckpt(1). `stop`: and ends it."""
        order = shlex.quote(os.path.abspath(path)) + (" stop" if stop else "")
        _write(self.path / "checkpoint", order, f"process {self.pid}: no checkpoint")

    def wait(self) -> ExitStatus:
        """Waits until it ended, and returns how. No need to be its parent.

        Raises:
            BpfsError: ENOENT, there is no such process in the cluster; it may have ended before.
        """
        return parse_exit(self.read("wait"))


class Nodes(Mapping[int, Node]):
    """All nodes by number, in order; `nodes[-1]`, the master, is there but not counted."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def __getitem__(self, number: int) -> Node:
        node = Node(self._cluster, number)
        if not node.path.is_dir():
            raise KeyError(f"there is no node {number}")
        return node

    def __iter__(self) -> Iterator[int]:
        return iter([status.number for status in self._cluster.status()])

    def __len__(self) -> int:
        return len(self._cluster.status())


class Processes(Mapping[int, Process]):
    """The processes that the cluster knows of, by pid: those that are away or have been."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def __getitem__(self, pid: int) -> Process:
        process = Process(self._cluster, pid)
        if not process.path.is_dir():
            raise KeyError(f"there is no process {pid}")
        return process

    def __iter__(self) -> Iterator[int]:
        # There are files beside the processes.
        return iter(sorted(int(name) for name in os.listdir(self._cluster.mount / "procs") if name.isdigit()))

    def __len__(self) -> int:
        return len(list(iter(self)))


class Cluster:
    """A cluster, known by the directory where its files are mounted.

    Args:
        mount: that directory; without it $BPFS, or else /bpfs.

    Raises:
        BpfsError: ENOENT, no cluster is mounted there.
    """

    def __init__(self, mount: str | os.PathLike[str] | None = None) -> None:
        self.mount = Path(mount or os.environ.get("BPFS") or DEFAULT_MOUNT)
        if not (self.mount / "status").exists():
            raise BpfsError(ENOENT, f"no cluster is mounted at {self.mount} (bpcluster up starts one)")
        self.nodes = Nodes(self)
        self.procs = Processes(self)

    def status(self) -> list[NodeStatus]:
        """All nodes but the master in order of their numbers, with what one read of /bpfs/status tells about them."""
        found = parse_status(_read(self.mount / "status"))
        return sorted(status for status in found if status.number != MASTER)

    def status_of(self, number: int) -> NodeStatus:
        """What the files of one node tell, the master's too.

        Raises:
            BpfsError: ENOENT, there is no such node.
        """
        node = Node(self, number)
        return NodeStatus(number, node.state, node.mode, node.owner, node.group, node.address)

    @property
    def current(self) -> Node:
        """The node that this program runs on."""
        return Node(self, int(os.path.basename(os.readlink(self.mount / "self"))))

    def expand(self, spec: str) -> list[int]:
        """Returns the numbers of the nodes that a nodespec names.

        Raises:
            NodespecError: the sentence says which term is wrong.
        """
        nodes = [Candidate(status.number, status.state, status.address) for status in self.status()]
        return expand(spec, nodes, current=self.current.number)

    @property
    def libraries(self) -> list[str]:
        """The files and directories that nodes without files of their own fetch when they come up."""
        return _read(self.mount / "libraries").splitlines()

    def change_libraries(self, verb: str, path: str = "") -> None:
        """Changes that list: `add` (and have nodes fetch it now) or `delete` a path, or `clear` it.

        Raises:
            BpfsError: EACCES; ENOENT: it is not there, or not in the list.
        """
        _write(self.mount / "libraries", f"{verb} {path}".rstrip(), f"{path or 'libraries'}: cannot {verb}")

    def move(self, node: int) -> None:
        """Moves this very process; it returns there. Raises as `Node.migrate` does."""
        self.nodes[node].migrate(os.getpid())

    def rfork(self, node: int) -> int:
        """Forks, with the child on a node: 0 there, the child's pid here.

        Raises:
            BpfsError: as `Node.migrate` does; there is no child then.
        """
        home, target, parent = self.current.number, self.nodes[node], os.getpid()
        pid = os.fork()
        if pid == 0:
            while node != home and self.current.number == home:
                if os.getppid() != parent:  # whoever was to move us has died
                    os._exit(127)
                time.sleep(0.0003)
            return 0
        try:
            if node != home:
                target.migrate(pid)
        except BaseException:
            os.kill(pid, signals.SIGKILL)
            os.waitpid(pid, 0)
            raise
        return pid

    def restart(self, path: str | os.PathLike[str], node: int = MASTER, *, anypid: bool = False) -> Process:
        """Brings a process back from its checkpoint; see bpckpt(1)."""
        name = os.path.abspath(path)
        order = f"{shlex.quote(name)} {node}" + (" anypid" if anypid else "")
        _write(self.mount / "procs" / "restart", order, f"no restart of {name}")
        lines = _read(self.mount / "procs" / "restart").splitlines()
        mine = [line for line in lines if f" {name} pid=" in line]
        return Process(self, int(mine[-1].rpartition(" pid=")[2].split()[0]))

    def events(self) -> Iterator[Event]:
        """What happens in the cluster from now on, without end."""
        return chain.from_iterable(_batches(self.mount / "events"))

    def changes(self) -> Iterator[list[Event]]:
        """As `events`, but all that have come meanwhile at once: for those who then look at everything anew."""
        return _batches(self.mount / "events")

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        nodes: str = "allup",
        *,
        stdin: bytes = b"",
        fanout: int = 64,
        timeout: float | None = None,
    ) -> Iterator[Result]:
        """Runs a program of the master on nodes, each with bpsh(1), and yields what came out as they end.

        Args:
            argv: the program and its arguments.
            nodes: a nodespec; a node that is named twice runs it twice.
            stdin: what each of them reads.
            fanout: how many run at a time.
            timeout: seconds for each of them.

        Raises:
            NodespecError: at once, before anything runs.
            subprocess.TimeoutExpired: one took too long; it has been killed.
        """
        numbers = self.expand(nodes)
        return self._run([os.fspath(word) for word in argv], numbers, stdin, fanout, timeout)

    def _run(
        self, argv: list[str], numbers: list[int], stdin: bytes, fanout: int, timeout: float | None
    ) -> Iterator[Result]:
        environment = {**os.environ, "BPFS": str(self.mount)}

        def run_on(number: int) -> Result:
            command = [*bpsh_command(number), *argv]
            done = subprocess.run(
                command, input=stdin, capture_output=True, env=environment, timeout=timeout, check=False
            )
            return Result(number, done.returncode, done.stdout, done.stderr)

        pool = ThreadPoolExecutor(max(1, min(fanout, len(numbers))), thread_name_prefix="bpsh")
        try:
            for future in as_completed([pool.submit(run_on, number) for number in numbers]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)

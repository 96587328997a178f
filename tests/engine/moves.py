"""Whole moves through real workers, for the tests of the engine: away into a job namespace, and home into a ghost."""

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.jobspace import JobSpace
from engine.linux import packets
from engine.zygote import Zygote

DEADLINE_S = 60.0


def until(condition: Callable[[], Any], what: str) -> Any:
    """Poll until `condition()` is true; returns it."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited too long for {what}")
        time.sleep(0.003)


class Refused(Exception):
    """A worker said no: errno, text, refusals."""

    def __init__(self, reply: dict[str, Any]) -> None:
        super().__init__(reply["text"])
        self.errno, self.text, self.refusals = reply["errno"], reply["text"], reply["refusals"]


class Worker:
    """One engine worker."""

    def __init__(self, zygote: Zygote) -> None:
        self.sock = zygote.worker()
        self.sock.settimeout(DEADLINE_S)

    def start(self, op: str, fds: list[int] | None = None, **arguments: Any) -> None:
        packets.send(self.sock, {"op": op, **arguments}, fds)

    def finish(self) -> dict[str, Any]:
        packet = packets.receive(self.sock)
        if packet is None:
            raise ConnectionResetError("the worker is gone")
        for fd in packet[1]:
            os.close(fd)
        if not packet[0]["ok"]:
            raise Refused(packet[0])
        return packet[0]

    def ask(self, op: str, fds: list[int] | None = None, **arguments: Any) -> dict[str, Any]:
        self.start(op, fds, **arguments)
        return self.finish()

    def close(self) -> None:
        self.sock.close()


class Mover:
    """Moves processes between this machine and one job namespace."""

    def __init__(self, zygote: Zygote, space: JobSpace) -> None:
        self.zygote, self.space = zygote, space
        self.workers: list[Worker] = []

    def worker(self) -> Worker:
        worker = Worker(self.zygote)
        self.workers.append(worker)
        return worker

    def away(
        self, pid: int, stdio: int, finish: str = "vanish", to: "Mover | None" = None, unlike: Any = None, **more: Any
    ) -> int:
        """Move a process into the namespace; returns its host pid there.

        Args:
            stdio: descriptor placed for every external.
            finish: what becomes of the source: vanish or become_ghost.
            to: whose worker builds it, and in whose namespace.
            unlike: of engine/facts.py.
        """
        target = to or self
        source, destination = self.worker(), target.worker()
        place = {"init": target.space.init}
        source.ask("freeze", pid=pid, writing=False)
        seen = source.ask("inspect", unlike=unlike or {})
        if seen["refusals"]:
            source.ask("release")
            raise Refused({"errno": 95, "text": seen["refusals"][0], "refusals": seen["refusals"]})
        hostpid = self._transfer(source, destination, seen, place, {e["key"]: 0 for e in seen["externals"]}, [stdio])
        if finish == "vanish":
            source.ask("vanish")
        else:
            source.ask("become_ghost", more["fds"], env=[b"BPFS_GHOST=/bpfs"])
        result: int = destination.ask("resume")["hostpid"]
        assert hostpid is None
        source.close(), destination.close()
        return result

    def _transfer(
        self, source: Worker, destination: Worker, seen: dict[str, Any], place: dict[str, int], externals: dict[int,
        int],
        fds: list[int],
    ) -> None:  # fmt: skip
        process = seen["process"]
        ids = {key: process[key] for key in ("pid", "ppid", "pgid", "sid")}
        ready = destination.ask("prepare", place=place, address="127.0.0.1", **ids)
        destination.start("receive", fds, externals=externals, timeout_s=30)
        try:
            source.ask("send", host="127.0.0.1", port=ready["port"], token=ready["token"])
        except Refused:
            try:
                destination.finish()
            except Refused:
                pass
            source.ask("release")
            raise
        destination.finish()

    def home(self, hostpid: int, ghost: int) -> int:
        """Bring a process from the namespace into its ghost."""
        source, destination = self.worker(), self.worker()
        source.ask("freeze", pid=hostpid, writing=False)
        seen = source.ask("inspect")
        assert not seen["refusals"], seen["refusals"]
        self._transfer(source, destination, seen, {"ghost": ghost}, {}, [])
        source.ask("vanish")
        result: int = destination.ask("resume")["hostpid"]
        source.close(), destination.close()
        return result

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.workers = []


class Victim:
    """A victim program under test."""

    def __init__(
        self, program: Path, directory: Path, *arguments: str, command: list[str] | None = None, **options: Any
    ) -> None:
        self.stop_file = directory / "stop"
        self.output = open(directory / "output", "w+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        self.process = subprocess.Popen(
            command or [str(program), str(self.stop_file), *arguments],
            stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output, **options,
        )  # fmt: skip
        until(self.is_ready, f"{program.name} to get ready")

    def is_ready(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"ended early: {self.text()}")
        return Path(f"{self.stop_file}.ready").exists()

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        self.stop_file.touch()

    def text(self) -> str:
        return os.pread(self.output.fileno(), 1 << 20, 0).decode(errors="replace")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.output.close()


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """A ghost's control socket: (ours, the ghost's)."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

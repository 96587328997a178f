"""Strict jobs of this node: their listeners are held here, and what callwatch cannot answer alone is answered."""

from __future__ import annotations

import array
import itertools
import os
import signal
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from errno import ENOSPC, EPERM

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.slave.keeper import Keeper
from bpfs.slave.line import Line
from bpfs.slave.spool import Source
from bpfs.wire.messages import GhostOf, JobCall, JobCallIs
from engine import jobwatch, strict
from engine.callwatch import NOTES_SIZE, SLOTS, CallWatch, Kind, Question
from engine.jobspace import JobSpace
from engine.linux import procfs
from engine.placeholders import INIT, World

ASK_S = 4.0  # seconds for the master; callwatch itself waits for 5
HAND_OVER_S = 5.0
AGAIN_S = 0.1  # between two of callwatch, should one after the other die
UNSEEN = frozenset({signal.SIGKILL, signal.SIGSTOP})  # nobody learns who sent them, and placeholders cannot hold them
CAP_KILL = 5

_log = log.get("strict")


@dataclass(frozen=True, slots=True)
class Rights:
    """Of a process of this node, as far as signals go."""

    uids: tuple[int, int]  # real, effective
    targets: tuple[int, int]  # real, saved
    over_all: bool  # CAP_KILL
    sid: int

    def may_signal(self, other: Rights, signo: int) -> bool:
        """As kill(2) says."""
        if self.over_all or (signo == signal.SIGCONT and self.sid == other.sid):
            return True
        return not {*self.uids}.isdisjoint(other.targets)


class StrictJobs:
    """Of a node. Costs a socket, until the first of them comes."""

    def __init__(self, space: JobSpace, link: Line, keeper: Keeper) -> None:
        """Raises OSError."""
        self._space, self._link, self._keeper = space, link, keeper
        self._numbers = itertools.count((keeper.life << 20) + 1)
        self._listeners = {number: kept.fds[0] for number, kept in keeper.of("listener")}
        self._slots = {number: int(kept.value) for number, kept in keeper.of("listener")}
        self._notes = next((kept.fds[0] for _, kept in keeper.of("notes")), -1)
        self._watch: CallWatch | None = None
        self._nursery: trio.Nursery | None = None
        self._closed = False
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            self._door.bind(strict.address(space.init))
            self._door.listen(64)
        except BaseException:
            self._door.close()
            raise

    async def run(self) -> None:
        """Take the listeners that the engine's workers bring, until `close`."""
        async with trio.open_nursery() as self._nursery:
            if self._listeners:
                self._start()
            while not self._closed:
                try:
                    await trio.lowlevel.wait_readable(self._door)
                    worker, _ = self._door.accept()
                except (trio.ClosedResourceError, OSError):
                    continue
                self._nursery.start_soon(self._take, worker)

    def close(self) -> None:
        """No job lives any more."""
        if self._closed:
            return
        self._closed = True
        with suppress(OSError):
            trio.lowlevel.notify_closing(self._door)
        self._door.close()
        if self._watch is not None:
            self._end(self._watch)
        for fd in (*self._listeners.values(), *([self._notes] if self._notes >= 0 else [])):
            os.close(fd)
        self._listeners.clear()

    async def _take(self, worker: socket.socket) -> None:
        with worker, trio.move_on_after(HAND_OVER_S):
            worker.setblocking(False)
            _, uid, _ = struct.unpack("=iII", worker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid != 0:
                return
            await trio.lowlevel.wait_readable(worker)
            with suppress(OSError):
                _, ancillary, _, _ = worker.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
                for _, kind, data in ancillary:
                    if kind == socket.SCM_RIGHTS:
                        self._add(array.array("i", data[:4])[0])
                        worker.send(b"y")

    def _add(self, listener: int) -> None:
        taken = set(self._slots.values())
        slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        if slot >= SLOTS:
            os.close(listener)
            raise OSError(ENOSPC, f"{SLOTS} strict jobs have come to this node, and are there")
        number = next(self._numbers)
        self._keeper.keep(("listener", number), slot, [listener])
        self._listeners[number], self._slots[number] = listener, slot
        if self._watch is not None:
            self._watch.listen(number, slot, listener)
        else:
            self._start()

    def _start(self) -> None:
        if self._notes < 0:
            self._notes = os.memfd_create("callwatch", os.MFD_CLOEXEC)
            os.ftruncate(self._notes, NOTES_SIZE)
            self._keeper.keep(("notes", 0), None, [self._notes])
        watch = CallWatch(self._space.init, self._notes)
        for number, listener in self._listeners.items():
            watch.listen(number, self._slots[number], listener)
        self._watch = watch
        assert self._nursery is not None
        self._nursery.start_soon(self._follow, watch)

    def _drop(self, number: int) -> None:
        listener = self._listeners.pop(number, None)  # none: one that has died had told it as well
        if listener is not None:
            del self._slots[number]
            self._keeper.drop(("listener", number))
            os.close(listener)

    def _end(self, watch: CallWatch) -> None:
        self._watch = None
        with suppress(OSError):
            trio.lowlevel.notify_closing(watch.socket)
        watch.close()

    async def _follow(self, watch: CallWatch) -> None:
        assert self._nursery is not None
        try:
            while True:
                await trio.lowlevel.wait_readable(watch.socket)
                question = watch.read()
                if question is not None and question.kind is Kind.OVER:
                    self._drop(question.token)
                elif question is not None:
                    self._nursery.start_soon(self._answer, watch, question)
        except (EOFError, trio.ClosedResourceError):
            if self._closed:
                return
        _log.error("callwatch has died: the calls of strict jobs wait for another one")
        self._end(watch)
        while self._watch is None and self._listeners and not self._closed:
            await trio.sleep(AGAIN_S)
            try:
                self._start()
            except OSError as error:
                _log.error("no callwatch can be started: %s", error)

    async def _answer(self, watch: CallWatch, question: Question) -> None:
        error: int | None = None  # the kernel makes the call, as for a job that is not strict
        try:
            error = await (self._born(question) if question.kind is Kind.BORN else self._signal(question))
        except (BpfsError, OSError) as failure:
            _log.info("process %d: its call is the kernel's alone: %s", question.pid, failure)
        if self._watch is watch:
            watch.answer(question.token, error)

    async def _born(self, question: Question) -> None:
        self._link.report(jobwatch.describe(self._space.init, question.pid), Source.EVENTS)
        await self._link.request(GhostOf(question.pid), ASK_S)

    async def _signal(self, question: Question) -> int | None:
        if question.target > 0:
            sent, error = await self._signal_others(question, question.target)
            return 0 if sent else error or None
        sender, members, target = self._members(question)
        sent, error = await self._signal_others(question, target)
        allowed = [pid for pid, rights in members.items() if sender.may_signal(rights, question.signo)]
        if allowed and question.signo not in UNSEEN:
            return None
        for pid in sorted(allowed, key=lambda pid: pid == question.pid):  # the sender last
            with suppress(ProcessLookupError):
                self._space.signal(pid, question.signo)
        if sent or allowed:
            return 0
        return EPERM if members else error

    async def _signal_others(self, question: Question, target: int) -> tuple[int, int]:
        message = JobCall(question.pid, target, question.signo, question.code, question.value)
        reply = await self._link.request(message, ASK_S)
        assert isinstance(reply, JobCallIs)
        return reply.sent, reply.error

    def _members(self, question: Question) -> tuple[Rights, dict[int, Rights], int]:
        """The sender; the jobs of this node whom it means; the group, or -1, for the master."""
        world = World(self._space.init)
        try:
            everybody = [ids for ids in world.every() if ids.pid != INIT and not ids.placeholder]
        finally:
            world.close()
        own = next((ids for ids in everybody if ids.pid == question.pid), None)
        if own is None:
            raise ProcessLookupError(3, f"process {question.pid} has ended")
        target = question.target or -own.pgid
        found: dict[int, Rights] = {}
        for ids in everybody:
            if ids.pid != own.pid if target == -1 else ids.pgid == -target:
                with suppress(OSError, KeyError):
                    found[ids.pid] = self._rights(ids.pid, ids.sid)
        return self._rights(own.pid, own.sid), found, target

    def _rights(self, pid: int, sid: int) -> Rights:
        status = procfs.parse_status(procfs.read(f"/proc/{self._space.init}/root/proc/{pid}/status"))
        real, effective, saved, _ = (int(word) for word in status["Uid"].split())
        return Rights((real, effective), (real, saved), bool(int(status["CapEff"], 16) >> CAP_KILL & 1), sid)

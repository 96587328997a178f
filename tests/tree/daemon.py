# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon of its own for tests of the mount: ``python -m tests.tree.daemon MOUNTPOINT [remote]``.

pyfuse3 can mount once a process, and what is tested is what other processes see. Prints ``ready`` when mounted; ends on
SIGTERM.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import signal
import socket
import sys
import time

import trio

from bpfs.errors import BpfsError
from bpfs.master.fs_service import FsService
from bpfs.nodes.events import EventLog
from bpfs.nodes.registry import NodeTable
from bpfs.slave.remote_tree import RemoteTree
from bpfs.tree.base import Caller, Changes
from bpfs.tree.entries import Access, Collection, Control, Directory, File, Link, Table, Verb, WriteRequest
from bpfs.tree.formats import number_of_name, parse_number, parse_permissions, value
from bpfs.tree.local import LocalTree
from bpfs.tree.mount import FuseMount, mount
from bpfs.wire import link
from bpfs.wire.messages import FsRequest


class Box:
    """An object with an owner and a value, as a node has."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.access = Access(0, 0, 0o755)
        self.value = "0"


class Hub:
    """Lines for readers, by topic; None hears all."""

    def __init__(self) -> None:
        self.readers: list[tuple[int | None, trio.MemorySendChannel[str]]] = []

    def publish(self, line: str, topic: int | None = None) -> None:
        for reader in list(self.readers):
            wanted, channel = reader
            if wanted in (None, topic):
                try:
                    channel.send_nowait(f"{line}\n")
                except trio.BrokenResourceError:
                    self.readers.remove(reader)

    def subscribe(self, topic: int | None = None) -> trio.MemoryReceiveChannel[str]:
        send, receive = trio.open_memory_channel[str](1000)
        self.readers.append((topic, send))
        return receive


class State:
    """All that the tables show."""

    def __init__(self) -> None:
        self.boxes = {number: Box(number) for number in range(3)}
        self.hub = Hub()
        self.last = ""
        self.gate = trio.Event()
        self.done: list[str] = []
        self.started = 0
        self.links: list[link.Link] = []
        self.tree: LocalTree
        self.mount: FuseMount


def find_box(state: State, name: str) -> Box | None:
    number = number_of_name(name)
    return state.boxes.get(number) if number is not None else None


async def over_a_link(state: State, nursery: trio.Nursery) -> RemoteTree:
    """The tree as a node sees it, number 0 (its identity is process_of here: no job space is needed)."""
    nodes = NodeTable(EventLog())
    service = FsService(state.tree, nodes, nursery)
    here, there = socket.socketpair()
    master, slave = link.Link(here, "node 0"), link.Link(there, "master")
    handlers: link.Handlers = {FsRequest: functools.partial(service.serve, nodes.add(0))}
    nursery.start_soon(master.run, handlers)
    nursery.start_soon(slave.run, {})
    state.links = [master, slave]
    return RemoteTree(slave)


async def beat(file: str) -> None:
    """The heart of the daemon itself: counts up in a file as long as the event loop turns."""
    heart = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for count in itertools.count():
        os.pwrite(heart, b"%d" % count, 0)
        await trio.sleep(0.002)


async def main(mountpoint: str, remote: bool) -> None:
    state = State()

    def set_value(box: Box, request: WriteRequest) -> None:
        box.value = str(parse_number(request.text, -(2**31), 2**31 - 1))
        state.hub.publish(f"box {box.number} {box.value}", box.number)

    def set_mode(box: Box, request: WriteRequest) -> None:
        change_box(box, request.caller, Changes(mode=parse_permissions(request.text)))

    def change_box(box: Box, caller: Caller, changes: Changes) -> None:
        old = box.access
        box.access = Access(
            old.uid if changes.uid is None else changes.uid,
            old.gid if changes.gid is None else changes.gid,
            old.mode if changes.mode is None else changes.mode,
        )
        state.tree.changed("boxes", str(box.number))

    def fail(_: State, request: WriteRequest) -> None:
        raise BpfsError(getattr(errno, request.text), "as asked")

    async def slow(_: State, request: WriteRequest) -> None:
        await trio.sleep(float(request.text))

    async def slow_interruptible(_: State, request: WriteRequest) -> None:
        request.let_go()
        state.started += 1
        await request.interrupted.wait()
        state.done.append(f"interrupted {request.caller.pid}")

    def kick(_: State, request: WriteRequest) -> None:
        # The writer's FUSE_INTERRUPT is in the queue when its write is answered, and vanishes with the answer.
        os.kill(request.caller.pid, signal.SIGUSR1)
        time.sleep(0.001)

    async def early(_: State, request: WriteRequest) -> None:
        await request.answer()
        await state.gate.wait()
        state.done.append(f"early {request.text}")

    def say(_: State, request: WriteRequest, arguments: list[str]) -> None:
        state.last = f"{' '.join(arguments)} uid={request.caller.uid} gid={request.caller.gid} pid={request.caller.pid}"

    def crash(_: State, request: WriteRequest, arguments: list[str]) -> None:
        raise ZeroDivisionError

    async def cut(_: State, request: WriteRequest, arguments: list[str]) -> None:
        await request.answer()
        state.links[0].close("cut by a test")

    def publish(_: State, request: WriteRequest, arguments: list[str]) -> None:
        state.hub.publish(arguments[0])

    def open_gate(_: State, request: WriteRequest, arguments: list[str]) -> None:
        state.gate.set()

    def remake(_: State, request: WriteRequest, arguments: list[str]) -> None:
        number = int(arguments[0])
        state.boxes[number] = Box(number)
        state.tree.gone("boxes", arguments[0])

    def remove(_: State, request: WriteRequest, arguments: list[str]) -> None:
        del state.boxes[int(arguments[0])]
        state.tree.gone("boxes", arguments[0])

    async def wait_gate(_: State) -> str:
        await state.gate.wait()
        return "open\n"

    box_table: Table[Box] = Table(
        File("value", "a number", read=lambda box: value(box.value), write=set_value, mode=0o644),
        File("mode", "permissions", read=lambda box: value(f"{box.access.mode:o}"), write=set_mode, mode=0o644),
        File(
            "guarded",
            "writable for whom the directory is searchable",
            read=lambda box: "",
            write=lambda box, request: None,
            access=lambda box: Access(box.access.uid, box.access.gid, 0o444 | (box.access.mode & 0o111) << 1),
        ),
        File("events", "of this box", follow=lambda box: state.hub.subscribe(box.number)),
    )
    table: Table[State] = Table(
        Link("self", "the first box", target=lambda _, caller: f"boxes/{max(caller.node, 0)}"),
        Collection(
            "boxes",
            "a directory a box",
            names=lambda s: map(str, sorted(s.boxes)),
            lookup=find_box,
            table=box_table,
            member_access=lambda box: box.access,
            member_change=change_box,
        ),
        Collection(
            "fresh",
            "boxes whose objects are made anew at each look",
            names=lambda s: map(str, sorted(s.boxes)),
            lookup=lambda s, name: Box(number_of_name(name) or 0) if find_box(s, name) else None,
            table=box_table,
            member_access=lambda box: box.access,
            member_key=lambda box: box.number,
            member_lasting=False,
        ),
        Directory(
            "inner",
            "tests of files",
            Table(
                Control(
                    "control",
                    "verbs",
                    Verb("say", "keeps the words in `last`", say, "WORD...", 1, 99),
                    Verb("publish", "an event", publish, "WORD", 1, 1),
                    Verb("gate", "opens the gate", open_gate),
                    Verb("cut", "ends the link to the master", cut),
                    Verb("crash", "fails", crash),
                    Verb("remake", "makes a box anew", remake, "N", 1, 1),
                    Verb("remove", "removes a box", remove, "N", 1, 1),
                    mode=0o666,
                ),
                File("last", "what was said last", read=lambda s: value(s.last)),
                File("done", "what ended late", read=lambda s: "".join(f"{line}\n" for line in s.done)),
                File("kick", "interrupts its writer", write=kick, mode=0o222),
                File("started", "how many slow ones began", read=lambda s: value(s.started)),
                File("fail", "fails with the errno written", write=fail, mode=0o222),
                File("slow", "takes the seconds written", write=slow, mode=0o222),
                File("slow_interruptible", "waits for ^C", write=slow_interruptible, mode=0o222),
                File("early", "answers early, goes on until the gate opens", write=early, mode=0o222),
                File("gate", "waits until the gate is open", read=wait_gate, blocks=True),
                File("large", "300 kB", read=lambda s: "0123456789abcde\n" * 19200),
                File("secret", "for root", read=lambda s: "root only\n", mode=0o400),
                File("statistics", "of the mount", read=lambda s: f"{s.mount.statistics()}\n"),
            ),
        ),
        File("events", "all events", follow=lambda s: s.hub.subscribe()),
        File("pulse", "a number", read=lambda s: f"{os.getpid()}\n"),
    )
    async with trio.open_nursery() as nursery:
        state.tree = LocalTree(table, state, nursery)
        shown = await over_a_link(state, nursery) if remote else state.tree
        async with mount(shown, mountpoint) as state.mount:
            nursery.start_soon(beat, f"{mountpoint}.heart")
            print("ready", flush=True)
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                async for _ in signals:
                    break
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], "remote" in sys.argv)

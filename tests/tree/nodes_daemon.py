# SPDX-License-Identifier: GPL-2.0-or-later
"""The real tables over a table of nodes that nobody is: ``python -m tests.tree.nodes_daemon MOUNTPOINT NODES``.

A line of stdin (``load N TEXT``, ``mode N OCTAL``, ``state N STATE``) is what a slave would have told; ``done`` is
echoed when all before it has been obeyed.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import replace

import trio

from bpfs.config import Config
from bpfs.nodes.admin import Administrator
from bpfs.nodes.admission import Admission
from bpfs.nodes.events import EventLog
from bpfs.nodes.files import NodeFiles
from bpfs.nodes.nodelog import NodeLog
from bpfs.nodes.power import Power
from bpfs.nodes.registry import Node, NodeTable
from bpfs.nodes.stage import Stage
from bpfs.nodes.states import NodeState
from bpfs.sample import Sampler
from bpfs.tree.local import LocalTree
from bpfs.tree.mount import mount
from bpfs.wire.messages import Sample


def with_load(sample: Sample, load: str) -> Sample:
    """A sample with another load line."""
    return replace(sample, load=load)


def obey(nodes: NodeTable, line: str) -> None:
    """One line of stdin."""
    word, number, text = line.split(None, 2)
    node = nodes.get(int(number))
    if word == "load":
        assert node.sample is not None
        nodes.set_sample(node, with_load(node.sample, text))
    elif word == "mode":
        nodes.set_mode(node, int(text, 8))
    elif word == "state":
        nodes.enter(node, NodeState(text), "as told")


async def listen(nodes: NodeTable) -> None:
    stdin = trio.lowlevel.FdStream(0)
    rest = b""
    async for data in stdin:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line == b"done":
                print("done", flush=True)
            else:
                obey(nodes, line.decode())


async def main(mountpoint: str, count: int) -> None:
    nodes = NodeTable(EventLog(), limit=4096)
    nodes.enter(nodes.add(-1), NodeState.UP)
    sample = Sampler().take()
    for number in range(count):
        node: Node = nodes.add(number)
        nodes.set_address(node, f"10.0.{number >> 8}.{number & 255}")
        nodes.set_sample(node, with_load(sample, f"0.00 0.01 0.05 1/100 {number}"))
        nodes.enter(node, NodeState.UP)
    stage = Stage(nodes, NodeLog(), Config)
    async with trio.open_nursery() as nursery:
        admission = Admission(nodes, Config)
        power = Power(nodes, admission, Config, stage.run_step, nursery)
        files = NodeFiles(nodes, Administrator(nodes, admission, stage, power))
        tree = LocalTree(files.root_table, nodes, nursery)
        files.attach(tree)
        async with mount(tree, mountpoint):
            nursery.start_soon(listen, nodes)
            print("ready", flush=True)
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                async for _ in signals:
                    break
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]))

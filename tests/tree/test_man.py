# SPDX-License-Identifier: GPL-2.0-or-later
"""The manual page bpfs(5) and the tables of the tree tell the same."""

from __future__ import annotations

import os
import re
from pathlib import Path
from socket import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bpfs.master.boot import directory as boot_directory
from bpfs.master.view import View
from bpfs.nodes.admin import Administrator
from bpfs.nodes.clockwatch import ClockWatch
from bpfs.nodes.events import EventLog
from bpfs.nodes.files import NodeFiles, log_file
from bpfs.nodes.nodelog import NodeLog
from bpfs.nodes.registry import Node, NodeId, NodeTable
from bpfs.procs.files import ProcFiles
from bpfs.procs.process import Pid, Process
from bpfs.procs.psview import PsView
from bpfs.procs.table import read_identity
from bpfs.tree.entries import Entry, File, Link, Table

PAGE = Path(__file__).resolve().parents[2] / "bpfs/man/bpfs.5.md"


def section(title: str) -> dict[str, list[str]]:
    """Name and further columns of each line of a section's table."""
    text = PAGE.read_text().split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `([a-z_]+)` \| (.*) \|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}


PROCS = ProcFiles(cast(Any, None))
NODES = NodeTable(EventLog())
FILES = NodeFiles(
    NODES,
    cast(Administrator, None),
    [*PROCS.node_entries(), log_file(NodeLog()), ClockWatch(NODES).entry(), View(cast(Any, None)).entry()],
    [
        PROCS.collection(),
        boot_directory(list),
        View(cast(Any, None)).libraries(),
        PsView(cast(Any, SimpleNamespace(socket=socket())), cast(Any, None), NODES, 0).entry(),
    ],
)
NODE = Node(NodeId(1))
PROCESS = Process(Pid(os.getpid()), read_identity(os.getpid()))
DIRECTORIES: list[tuple[str, Table[Any], object]] = [
    ("/bpfs", FILES.root_table, NODES),
    ("/bpfs/nodes/N", FILES.node_table, NODE),
    ("/bpfs/procs/PID", PROCS.process_table(), PROCESS),
]


@pytest.mark.parametrize(("title", "table", "target"), DIRECTORIES, ids=lambda it: it if isinstance(it, str) else "")
def test_page_has_all_files_with_their_modes(title: str, table: Table[Any], target: object) -> None:
    described = section(title)
    assert set(described) == {entry.name for entry in table}
    for entry in table:
        assert described[entry.name][0].split(",")[0] == shown_mode(entry, target), entry.name


def shown_mode(entry: Entry[Any], target: object) -> str:
    if isinstance(entry, Link):
        return "link"
    return f"{entry.access(target).mode if entry.access else entry.mode:04o}"


@pytest.mark.parametrize(("title", "table", "target"), DIRECTORIES, ids=lambda it: it if isinstance(it, str) else "")
def test_page_tells_what_can_be_read_written_and_blocks(title: str, table: Table[Any], target: object) -> None:
    described = section(title)
    for entry in table:
        if not isinstance(entry, File):
            continue
        _, read, write = (*described[entry.name], "", "")[:3]
        assert bool(read) == (entry.read is not None or entry.follow is not None), entry.name
        assert bool(write) == (entry.write is not None), entry.name
        assert read.startswith("blocks") == (entry.follow is not None or entry.blocks), entry.name
        bits = int(shown_mode(entry, target), 8)
        assert bool(bits & 0o444) == bool(read), entry.name
        assert bool(bits & 0o222) == (entry.write is not None), entry.name

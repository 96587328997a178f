"""What administrators have set on nodes, kept in a small file so that it outlasts the master.

A line a node that is not as it would be by itself: ``N wish mode owner group hostname mac,mac``. The wish is `down`,
`unavailable` or `-`; the name and hardware addresses of its last slave (`-` where there was none) have a node without
a configured number get its own again.
"""

from __future__ import annotations

import os
from pathlib import Path

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.nodes.admission import BARRED, Admission
from bpfs.nodes.registry import DEFAULT_MODE, MASTER, Node, NodeTable
from bpfs.tree.formats import parse_permissions, permissions

_log = log.get("nodes")

_FIELDS = 7
_UNSET = (False, False, DEFAULT_MODE, 0, 0)


class Settings:
    """The file of one master; every change is in it when the call that made it returns."""

    def __init__(self, table: NodeTable, admission: Admission, path: Path) -> None:
        self._table = table
        self._admission = admission
        self._path = path
        self._lines: dict[int, str] = {}

    def load(self) -> None:
        """Take over what the file says, and write all changes from now on."""
        text = ""
        try:
            text = self._path.read_text(errors="replace")
        except FileNotFoundError:
            pass  # nothing was ever set
        except OSError as error:
            _log.error("the settings of nodes cannot be read: %s: %s", self._path, error.strerror)
        for line in text.splitlines():
            try:
                node = self._enter(line.split())
                self._lines[node.number] = self._line(node)
            except (ValueError, BpfsError) as error:
                _log.error("%s: a line is passed over: %r: %s", self._path, line[:200], error)
        self._table.listen(self._changed)

    def _enter(self, words: list[str]) -> Node:
        if len(words) != _FIELDS or words[1] not in ("-", "down", "unavailable"):
            raise ValueError("no line of this file")
        number, wish, mode, uid, gid, hostname, macs = words
        node = self._table.find(int(number)) or self._table.add(int(number))
        self._table.set_mode(node, parse_permissions(mode))
        self._table.set_owner(node, int(uid))
        self._table.set_group(node, int(gid))
        if node.number != MASTER:
            node.barred, node.reserved = wish == "down", wish == "unavailable"
            if node.barred:
                self._table.set_reason(node, BARRED)
            if hostname != "-":
                self._admission.remember(node.number, hostname, tuple(macs.split(",")))
        return node

    def _changed(self, node: Node, what: str) -> None:
        if what == "sample":
            return
        line = self._line(node)
        if line == self._lines.get(node.number, ""):
            return
        if line:
            self._lines[node.number] = line
        else:
            del self._lines[node.number]
        self._write()

    def _write(self) -> None:
        new = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644), "w") as file:
                file.writelines(self._lines[number] for number in sorted(self._lines))
            new.rename(self._path)
        except OSError as error:
            _log.error("the settings of nodes cannot be kept: %s: %s", self._path, error.strerror)

    def _line(self, node: Node) -> str:
        """The node's line; empty where nothing was set."""
        if (node.barred, node.reserved, node.mode, node.uid, node.gid) == _UNSET:
            return ""
        wish = "down" if node.barred else "unavailable" if node.reserved else "-"
        hostname, macs = self._admission.known(node.number)
        # Nothing that a slave says of itself may break the line.
        name, addresses = ("".join(text.split()) or "-" for text in (hostname, ",".join(macs)))
        return f"{node.number} {wish} {permissions(node.mode)} {node.uid} {node.gid} {name} {addresses}\n"

"""What administrators have set on nodes, kept in a small file so that it outlasts the master.

A line a node that is not as it would be by itself: ``N wish mode owner group hostname mac,mac``. The wish is `down`,
`unavailable` or `-`; the name and hardware addresses of its last slave (`-` where there was none) have a node without
a configured number get its own again.

A change adds a line, and the last line of a node counts: a thousand nodes are changed in no time, for to replace a file
makes the disk's file system write it out. What is out of date is left away when the master starts, and now and then.
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
SPARE = 4096
"""Lines that are out of date at which the file is written anew."""

_UNSET = (False, False, DEFAULT_MODE, 0, 0)


class Settings:
    """The file of one master; every change is in it when the call that made it returns."""

    def __init__(self, table: NodeTable, admission: Admission, path: Path) -> None:
        self._table = table
        self._admission = admission
        self._path = path
        self._lines: dict[int, str] = {}
        self._length = 0  # lines in the file

    def load(self) -> None:
        """Take over what the file says, and write all changes from now on."""
        text = ""
        try:
            text = self._path.read_text(errors="replace")
        except FileNotFoundError:
            pass  # nothing was ever set
        except OSError as error:
            _log.error("the settings of nodes cannot be read: %s: %s", self._path, error.strerror)
        lines = text.splitlines()
        last: dict[int, list[str]] = {}
        for line in lines:
            try:
                last |= _parse(line)
            except (ValueError, BpfsError) as error:
                self._pass_over(line, error)
        for words in last.values():
            try:
                self._enter(words)
            except BpfsError as error:  # beyond the limit
                self._pass_over(" ".join(words), error)
        self._length = len(lines)
        if self._length != len(self._lines):
            self._write()
        self._table.listen(self._changed)

    def _pass_over(self, line: str, error: Exception) -> None:
        _log.error("%s: a line is passed over: %r: %s", self._path, line[:200], error)

    def _enter(self, words: list[str]) -> None:
        number, wish, mode, uid, gid, hostname, macs = words
        if (wish, parse_permissions(mode), int(uid), int(gid)) == ("-", DEFAULT_MODE, 0, 0):
            return  # as it is by itself
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
        self._lines[node.number] = self._line(node)

    def _changed(self, node: Node, what: str) -> None:
        if what == "sample":
            return
        line = self._line(node) if self._is_set(node) else ""
        if line == self._lines.get(node.number, ""):
            return
        if line:
            self._lines[node.number] = line
        else:
            del self._lines[node.number]
        if self._length > SPARE + 2 * len(self._lines):
            self._write()
        else:
            self._add(self._line(node))

    def _add(self, line: str) -> None:
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            with open(os.open(self._path, flags, 0o644), "a") as file:
                file.write(line)
            self._length += 1
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        _log.error("the settings of nodes cannot be kept: %s: %s", self._path, error.strerror)

    def _write(self) -> None:
        new = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644), "w") as file:
                file.writelines(self._lines[number] for number in sorted(self._lines))
            new.rename(self._path)
            self._length = len(self._lines)
        except OSError as error:
            self._complain(error)

    @staticmethod
    def _is_set(node: Node) -> bool:
        return (node.barred, node.reserved, node.mode, node.uid, node.gid) != _UNSET

    def _line(self, node: Node) -> str:
        wish = "down" if node.barred else "unavailable" if node.reserved else "-"
        hostname, macs = self._admission.known(node.number)
        # Nothing that a slave says of itself may break the line.
        name, addresses = ("".join(text.split()) or "-" for text in (hostname, ",".join(macs)))
        return f"{node.number} {wish} {permissions(node.mode)} {node.uid} {node.gid} {name} {addresses}\n"


def _parse(line: str) -> dict[int, list[str]]:
    """The words of a line, by the node's number; raises ValueError or BpfsError where they make no sense."""
    words = line.split()
    if len(words) != _FIELDS or words[1] not in ("-", "down", "unavailable"):
        raise ValueError("no line of this file")
    parse_permissions(words[2])
    int(words[3]), int(words[4])
    return {int(words[0]): words}

"""Pids that nodes hand out: which of them processes have, wherever these are.

On the master every process of the cluster has its pid, as itself or as a ghost, and as long as it is waited for.
"""

from __future__ import annotations

import os
from contextlib import suppress

from bpfs.nodes.blocks import Blocks
from bpfs.nodes.registry import Node
from bpfs.procs.table import ProcTable
from bpfs.wire import messages
from engine.linux import procfs


class Pids:
    """All of them."""

    def __init__(self, table: ProcTable, blocks: Blocks) -> None:
        self._table = table
        self._blocks = blocks

    def taken(self, node: Node) -> dict[int, int]:
        """Real uids, by pid, of processes that have pids of a node which starts afresh."""
        block = self._blocks.of(node.number)
        found = {int(proc.pid): proc.identity.uid for proc in self._table if proc.away and proc.pid in block}
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            if pid in block:
                with suppress(OSError, KeyError):  # it has just ended
                    found[pid] = int(procfs.parse_status(procfs.read(procfs.own_file(pid, "status")))["Uid"].split()[0])
        return found

    def asked(self, _node: Node, message: messages.AskFree) -> messages.AreFree:
        """Handler: a node keeps these for processes that were elsewhere."""
        return messages.AreFree(tuple(pid for pid in message.pids if not self._is_taken(pid)))

    def _is_taken(self, pid: int) -> bool:
        known = self._table.known(pid)
        return (known is not None and known.away) or os.path.exists(f"/proc/{pid}")

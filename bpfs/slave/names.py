# SPDX-License-Identifier: GPL-2.0-or-later
"""Names of nodes for libnss_beo on this node: what the master tells goes into a file."""

from __future__ import annotations

from pathlib import Path

from bpfs import hosts, log
from bpfs.rundir import RunDir
from bpfs.wire.messages import Names, Welcome
from engine.descriptors.model import boot_id

_log = log.get("slave")


class NamesFile:
    """The hosts file of one life, for the jobs of this node."""

    def __init__(self, welcome: Welcome, mount: str | None, master: str) -> None:
        """Args:
        mount: where the tree is mounted here; None: nowhere, then programs ask for that of the master.
        master: the address by which this node reaches the master.
        """
        self._path = RunDir(mount or welcome.mount).hosts
        self._master = master
        self._own = welcome.node
        self._shared = welcome.boot == boot_id()
        self._addresses: dict[int, str] = {}

    def hear(self, message: Names, root: Path | None) -> None:
        """Enter changes.

        Args:
            root: the jobs' own root; None where they have this machine's.
        """
        self._addresses |= dict(message.addresses)
        if root is None and self._shared:
            return  # the master's file is the same one
        path = self._path if root is None else root / self._path.relative_to("/")
        try:
            hosts.write(path, hosts.text(self._addresses, self._master, self._own))
        except OSError as error:
            _log.error("no names of nodes for libnss_beo: %s: %s", path, error.strerror)

"""The three directions of a migration, and what each does with ghost and stdio.

* `Leave`: from the master to a node. The process turns into its ghost.
* `Hop`: from node to node. The ghost stays; only its stream changes.
* `Return`: home. The process is rebuilt inside its ghost, which so becomes the process again.
"""

from __future__ import annotations

from bpfs.procs.homecoming import Return
from bpfs.procs.hop import Hop
from bpfs.procs.leave import Leave
from bpfs.procs.migration import Migration
from bpfs.procs.places import NodePlace, Place
from bpfs.procs.process import Process
from bpfs.procs.surroundings import Surroundings


def route(proc: Process, source: Place, destination: Place, around: Surroundings) -> Migration:
    """The migration from here to there."""
    migration: Migration
    if not isinstance(source, NodePlace):
        assert isinstance(destination, NodePlace)
        migration = Leave(proc, source, destination, around)
    elif isinstance(destination, NodePlace):
        migration = Hop(proc, source, destination, around)
    else:
        migration = Return(proc, source, destination, around)
    migration.looking["contents"], migration.compress = around.contents, around.compress
    return migration

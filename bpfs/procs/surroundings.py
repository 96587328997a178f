"""What all moves need of the master."""

from __future__ import annotations

from bpfs.config import Config
from bpfs.nodes.blocks import Blocks
from bpfs.procs.ghost import ROOM_FOR_HEIR
from bpfs.procs.ghosts import Ghosts
from bpfs.procs.programs import Programs
from bpfs.view.exports import Exports
from bpfs.wire.streams import StreamBook
from engine.linux.procfs import read


class Surroundings:
    """What all routes need of the master.

    Attributes:
        precopy: bytes of memory from which on it is sent ahead; None: never.
        compress: whether memory may be packed for slow links.
        fanout, tree_timeout: of images of programs for many nodes, see ImageTree.
        strict_nodes: numbers of nodes whose jobs are strict.
        contents: bytes of files without a name that may travel with a process.
        exports: what nodes with an empty root see.
        environment: of every ghost: BPFS_GHOST names the cluster, BPFS_LEASE how long one lives without a master.
    """

    def __init__(self, ghosts: Ghosts, streams: StreamBook, programs: Programs, blocks: Blocks, config: Config) -> None:
        self.precopy = config.precopy
        self.strict_nodes = config.strict
        self.contents = config.contentlimit
        self.compress = config.compress
        self.fanout, self.tree_timeout = config.fanout, config.tree_timeout
        self.exports = Exports(config.exports, (config.mount, str(config.key)))
        self.ghosts = ghosts
        self.blocks = blocks
        self.streams = streams
        self.programs = programs
        lease = max(1, round(config.lease))
        self.environment = [f"BPFS_GHOST={config.mount}".encode(), f"BPFS_LEASE={lease}".encode(), ROOM_FOR_HEIR]

    def is_strict(self, node: int) -> bool:
        """Whether all jobs of a node are strict (engine/strict.py)."""
        return any(node in numbers for numbers in self.strict_nodes)

    def is_ghost(self, pid: int) -> bool:
        """Whether a process of the master is a ghost of this cluster by now.

        Its environment tells: /proc/PID/exe of a process without new privileges goes on naming the ghost.
        """
        try:
            return read(f"/proc/{pid}/environ").startswith(self.environment[0] + b"\0")
        except OSError:
            return False

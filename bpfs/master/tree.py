"""The master's own /bpfs: the tables of all rooms in one tree, mounted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bpfs.master.cluster import Cluster
from bpfs.master.fs_service import FsService
from bpfs.nodes.files import NodeFiles, log_file
from bpfs.tree.local import LocalTree
from bpfs.tree.mount import FuseMount, mount
from bpfs.wire.messages import FsRequest


@asynccontextmanager
async def mounted(cluster: Cluster) -> AsyncIterator[FuseMount]:
    """The tree at the cluster's mount point, for as long as the context lasts.

    Raises:
        BpfsError: it cannot be mounted.
    """
    cluster.node_entries.append(log_file(cluster.logs))
    files = NodeFiles(cluster.nodes, cluster.administrator, cluster.node_entries, cluster.root_entries)
    cluster.tree = LocalTree(files.root_table, cluster.nodes, cluster.nursery)
    files.attach(cluster.tree)
    service = FsService(cluster.tree, cluster.nodes, cluster.nursery, cluster.succession.generation)
    cluster.handle(FsRequest, service.serve)
    async with mount(cluster.tree, cluster.config.mount) as mounted_tree:
        yield mounted_tree

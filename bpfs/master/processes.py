"""The master's process table and ghosts, hung into the cluster: its messages, its files, its end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from bpfs.master.cluster import Cluster
from bpfs.procs.births import Births
from bpfs.procs.covers import Covers
from bpfs.procs.files import ProcFiles
from bpfs.procs.ghosts import Ghosts
from bpfs.procs.ledger import Ledger
from bpfs.procs.pids import Pids
from bpfs.procs.programs import Programs
from bpfs.procs.psview import PsView
from bpfs.procs.service import Procs
from bpfs.procs.strict import StrictCalls
from bpfs.procs.surroundings import Surroundings
from bpfs.procs.table import ProcTable
from bpfs.procs.takeover import Takeover
from bpfs.rundir import RunDir
from bpfs.wire import messages


@asynccontextmanager
async def processes(cluster: Cluster, covers: Covers) -> AsyncIterator[Procs]:
    """The cluster's processes for as long as the context lasts.

    Every ghost ends with it when the master was told to end; else they are for the next master.
    """
    table, rundir = ProcTable(cluster.events.post), RunDir(cluster.config.mount)
    ledger = Ledger(rundir.path / "away", afresh=not cluster.succession.follows)
    ghosts = Ghosts(table, cluster.nodes, cluster.streams, cluster.nursery, ledger)
    programs = Programs(rundir.programs)
    around = Surroundings(ghosts, cluster.streams, programs, cluster.blocks, cluster.config)
    procs = Procs(cluster.nodes, around, cluster.workers)
    cluster.handle(messages.JobReport, ghosts.reports.take)
    cluster.handle(messages.AskImage, procs.batches.images.asked)
    births = Births(ghosts, cluster.nodes, cluster.blocks, cluster.nursery)
    cluster.handle(messages.JobEvents, births.report)
    cluster.handle(messages.GhostOf, births.ghost_of)
    cluster.handle(messages.JobCall, StrictCalls(ghosts).call)
    pids = Pids(table, cluster.blocks)
    cluster.taken = pids.taken
    cluster.handle(messages.AskFree, pids.asked)
    takeover = Takeover(
        ghosts, cluster.nodes, cluster.blocks, cluster.streams, cluster.nursery, lambda: cluster.config.silence
    )
    cluster.handle(messages.Resumed, takeover.resumed)
    cluster.idle += [ghosts.is_idle, births.is_idle]
    cluster.handle(messages.RelayLost, lambda node, message: None)  # the ghost tells of it, too
    procs.view = view = PsView(covers, ghosts, cluster.nodes, cluster.config.psview)
    cluster.events.listen(lambda _: view.poke())
    cluster.root_entries.append(view.entry())
    cluster.nursery.start_soon(view.run, name="view of ps")
    files = ProcFiles(procs)
    cluster.root_entries.append(files.collection())
    cluster.node_entries += files.node_entries()
    with programs, ledger:
        await takeover.take_up()
        procs.take_up()
        try:
            yield procs
        finally:
            with trio.CancelScope(shield=True):
                if cluster.ending:
                    await ghosts.end_all()
                await view.close()

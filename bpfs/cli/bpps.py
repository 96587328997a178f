# SPDX-License-Identifier: GPL-2.0-or-later
"""bpps: the output of ps with a column NODE before it.

ps itself is the system's own, with all its options: a ghost has the pid, the user and the command line of its process,
and bpmaster gives it the state, times and memory as well; where it does not, psview does so for root.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from errno import EINVAL

from bpfs.cli.common import make_parser, run
from bpfs.cli.psview import PsView
from bpfs.client import MASTER, Cluster
from bpfs.errors import BpfsError

PROG = "bpps"

_EPILOG = """\
All other options and arguments are those of ps(1), without options those of ps without options. NODE is - for what is
on the master. Exit code: that of ps; 1 when the cluster cannot be read.
"""

_FRESH_S = 2.0  # between two looks at the nodes while another program runs
_WIDTH = 4  # of the column
_BLANKS = frozenset({"COMMAND", "CMD", "STARTED", "LABEL"})
"""Headers of columns whose values may hold blanks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = make_parser(PROG, "Shows processes as ps does, and on which node each is.", _EPILOG)
    parser.usage = (
        "bpps [--nodes NODES] [--mount DIR] [OPTIONS OF PS]\n       bpps [--mount DIR] --run PROGRAM [ARGUMENTS]"
    )
    parser.add_argument("--nodes", metavar="NODES", help="only what is on these nodes")
    parser.add_argument(
        "--run", nargs=argparse.REMAINDER, metavar="PROGRAM", help="run top, htop or the like in place of ps"
    )  # fmt: skip
    options, arguments = parser.parse_known_args(argv)
    cluster = Cluster(options.mount)
    wanted = set(cluster.expand(options.nodes)) if options.nodes else None
    # Files of processes can be covered by root only. Others see what everybody does.
    view = PsView(cluster) if os.geteuid() == 0 and not shown_to_everybody(cluster) else None
    try:
        if view:
            view.refresh()
        if options.run:
            if view:
                view.keep_fresh(_FRESH_S)
            return _status(subprocess.call(options.run))
        return _ps(cluster, arguments, wanted)
    finally:
        if view:
            view.close()


def _ps(cluster: Cluster, arguments: list[str], wanted: set[int] | None) -> int:
    # Looked at first: who ends in between is in no list, and who comes has no node yet.
    nodes = places(cluster)
    ps = subprocess.Popen(["ps", *arguments], stdout=subprocess.PIPE, env=_environment())
    assert ps.stdout is not None
    text = ps.stdout.read().decode(errors="surrogateescape")
    code = ps.wait()
    if text:
        shown = label(text.splitlines(keepends=True), nodes, wanted)
        sys.stdout.buffer.write("".join(shown).encode(errors="surrogateescape"))
        sys.stdout.buffer.flush()
    return _status(code)


def _status(code: int) -> int:
    return code if code >= 0 else 128 - code


def _environment() -> dict[str, str]:
    # ps makes its lines as wide as the terminal; what it writes to here is none.
    if not sys.stdout.isatty():
        return dict(os.environ)
    columns = shutil.get_terminal_size().columns - _WIDTH - 1
    return {**os.environ, "COLUMNS": str(max(columns, 20))}


def shown_to_everybody(cluster: Cluster) -> bool:
    """Whether /proc itself shows what processes do on their nodes."""
    try:
        return "shown_to everybody\n" in (cluster.mount / "psview").read_text()
    except OSError:
        return False


def places(cluster: Cluster) -> dict[int, int]:
    """Returns the node of each process that is away."""
    found = {}
    for pid, process in cluster.procs.items():
        try:
            node = process.node
        except OSError:
            continue  # ended meanwhile
        if node is not None:
            found[pid] = node
    return found


def label(lines: Iterable[str], nodes: dict[int, int], wanted: set[int] | None) -> Iterator[str]:
    """Puts the node of its process before each line of ps, and leaves out those that are not wanted.

    Raises:
        BpfsError: EINVAL, there is no column PID.
    """
    header = next(iter(lines := iter(lines)))
    words = header.split()
    if "PID" not in words:
        raise BpfsError(EINVAL, "ps shows no column PID here: ask for one with its header, as in -o pid,args")
    column = words.index("PID")
    # Where blanks may stand before the pid its place on the line counts; else it may be pushed to the right.
    end = next(found.end() for found in re.finditer(r"(?<!\S)PID(?!\S)", header))
    by_place = bool(_BLANKS.intersection(words[:column]))
    yield f"{'NODE':>{_WIDTH}} {header}"
    for line in lines:
        word = line[:end].split()[-1:] if by_place else line.split(maxsplit=column + 1)[column : column + 1]
        pid = int(word[0]) if word and word[0].isdigit() else 0
        node = nodes.get(pid, MASTER)
        if wanted is None or node in wanted:
            yield f"{'-' if node == MASTER else node:>{_WIDTH}} {line}"


if __name__ == "__main__":
    sys.exit(main())

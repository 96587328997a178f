# SPDX-License-Identifier: GPL-2.0-or-later
"""bpmodprobe: loads kernel modules on nodes, which have none of their own beside those of their image."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bpfs import config as configuration
from bpfs import nodemodules
from bpfs.cli.common import EXIT_ERROR, make_parser, run
from bpfs.client import Cluster, Node
from bpfs.config import DEFAULT_PATH, Config
from bpfs.errors import BpfsError

PROG = "bpmodprobe"

_EPILOG = """\
Modules and what they need are read here, from /lib/modules or from what bpboot image 2 has kept of its kernel; what a
node has already is not loaded again. Exit code: 0; 1 when a node failed, which is named; 2 for a wrong command line.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = make_parser(PROG, "Loads kernel modules on nodes.", _EPILOG)
    parser.add_argument("nodes", metavar="NODES", help="which, as a nodespec")
    parser.add_argument("modules", metavar="MODULE", nargs="+", help="names, without .ko")
    parser.add_argument("-c", "--config", metavar="FILE", type=Path, help=f"configuration ({DEFAULT_PATH} if there)")
    args = parser.parse_args(argv)
    path = args.config or (DEFAULT_PATH if DEFAULT_PATH.exists() else None)
    config = configuration.read(path) if path is not None else Config()
    cluster, code = Cluster(args.mount), 0
    os.chdir("/")  # a folder that nodes have
    for number in cluster.expand(args.nodes):
        try:
            done = nodemodules.load(Node(cluster, number), args.modules, config.bootimages)
            print(f"{number}: {' '.join(done) or 'all there already'}", flush=True)
        except BpfsError as error:
            print(f"{PROG}: {error}", file=sys.stderr)
            code = EXIT_ERROR
    return code


if __name__ == "__main__":
    sys.exit(main())

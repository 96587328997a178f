# SPDX-License-Identifier: GPL-2.0-or-later
"""bplib: what nodes without files of their own keep of the master's libraries and programs, with BProc's options.

BProc kept a list of libraries; here a node keeps whatever it has used, by content, and forgets what it does not use.
Everything is a write to or a read of /bpfs/nodes/N/cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from errno import EOPNOTSUPP

from bpfs.cli.bpctl import apply
from bpfs.cli.common import EXIT_ERROR, make_parser, run
from bpfs.client import Cluster, Node
from bpfs.errors import BpfsError

PROG = "bplib"

_EPILOG = """\
Without -S it is about all nodes that are up and have no files of their own.
Exit code: 0; 1 when a node refused or failed, which is named on stderr; 2 for a wrong command line.
"""

_COLUMNS = ("objects", "bytes", "limit", "hits", "misses", "fetched_bytes", "evicted")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, "Shows and changes what nodes keep of the master's files.", _EPILOG)
    parser.add_argument("-S", "--slave", dest="nodes", metavar="NODES", help="on these nodes")
    parser.add_argument("--json", action="store_true", help="with -l: an array of objects")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-a", "--add", metavar="PATH", nargs="+", help="fetch files, or all below directories, now")
    what.add_argument("-d", "--delete", metavar="PATH", nargs="+", help="not supported: see -c")
    what.add_argument("-l", "--list", action="store_true", help="how much each node keeps, and how often it helped")
    what.add_argument("-c", "--clear", action="store_true", help="drop whatever is not in use")
    return parser


def _main(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    cluster = Cluster(options.mount)
    if options.delete:
        raise BpfsError(
            EOPNOTSUPP, "there is no list to delete from: nodes forget what they do not use (-c: all of it)"
        )
    nodes = chosen(cluster, options.nodes)
    if options.list:
        return _list(nodes, options.json)
    if not nodes:
        raise BpfsError(EOPNOTSUPP, "all nodes that are up have files of their own: they keep none of the master's")
    verbs = ["purge"] if options.clear else [f"prestage {os.path.abspath(path)}" for path in options.add]
    done = [apply(node, "cache", verb, PROG) for verb in verbs for node in nodes]
    return EXIT_ERROR if any(entry["error"] for entry in done) else 0


def chosen(cluster: Cluster, spec: str | None) -> list[Node]:
    """Returns the nodes of a nodespec; without one, those that are up and keep anything of the master's."""
    if spec is not None:
        return [Node(cluster, number) for number in cluster.expand(spec)]
    up = [Node(cluster, status.number) for status in cluster.status() if status.state == "up"]
    return [node for node in up if node.read("cache")]


def _list(nodes: list[Node], as_json: bool) -> int:
    rows = []
    for node in nodes:
        found = dict(line.split(" ", 1) for line in node.read("cache").splitlines())
        rows.append({"node": node.number, **{name: int(found[name]) for name in _COLUMNS if name in found}})
    if as_json:
        print(json.dumps(rows))
        return 0
    print(f"{'node':>4}" + "".join(f" {name:>14}" for name in _COLUMNS))
    for row in rows:
        print(f"{row['node']:>4}" + "".join(f" {row.get(name, '-'):>14}" for name in _COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())

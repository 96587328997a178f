# SPDX-License-Identifier: GPL-2.0-or-later
"""bplib: the libraries that nodes without files of their own have before they need them, with BProc's options.

The list is /bpfs/libraries; what a node keeps, by content, whoever asked for it, is /bpfs/nodes/N/cache.
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
Without -S it is about the cluster's list, and about all nodes that are up; with -S about what those nodes keep now.
Exit code: 0; 1 when the cluster or a node refused or failed, which stderr says; 2 for a wrong command line.
"""

_COLUMNS = ("objects", "bytes", "limit", "hits", "misses", "fetched_bytes", "evicted")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, "Shows and changes what libraries nodes have before they need them.", _EPILOG)
    parser.add_argument("-S", "--slave", dest="nodes", metavar="NODES", help="on these nodes, now, not in the list")
    parser.add_argument("--json", action="store_true", help="with -l: an array")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "-a", "--add", metavar="PATH", nargs="+", help="files, or all below directories: now, and when a node comes up"
    )
    what.add_argument("-d", "--delete", metavar="PATH", nargs="+", help="take them out of the list")
    what.add_argument("-l", "--list", action="store_true", help="the list; with -S how much each node keeps")
    what.add_argument("-c", "--clear", action="store_true", help="empty the list, and drop whatever is not in use")
    return parser


def _main(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    cluster = Cluster(options.mount)
    if options.nodes is not None:
        return _on_nodes(chosen(cluster, options.nodes), options)
    if options.list:
        names = cluster.libraries
        sys.stdout.write(f"{json.dumps(names)}\n" if options.json else "".join(f"{name}\n" for name in names))
        return 0
    if options.clear:
        cluster.change_libraries("clear")
        return _tell(chosen(cluster, None), ["purge"])
    return _change(cluster, "add" if options.add else "delete", options.add or options.delete)


def _change(cluster: Cluster, verb: str, paths: list[str]) -> int:
    """Each path; those that stand for themselves on `-` come a line each from stdin, as with BProc."""
    names = [name for path in paths for name in (sys.stdin.read().splitlines() if path == "-" else [path])]
    code = 0
    for name in names:
        try:
            if verb == "add":
                os.stat(name)  # the nodes would find out, one after the other, when they come up
            cluster.change_libraries(verb, os.path.abspath(name))
        except OSError as refused:
            sentence = str(refused) if isinstance(refused, BpfsError) else f"{name}: {refused.strerror}"
            print(f"{PROG}: {sentence}", file=sys.stderr)
            code = EXIT_ERROR
    return code


def _on_nodes(nodes: list[Node], options: argparse.Namespace) -> int:
    if options.list:
        return _list(nodes, options.json)
    if options.delete:
        raise BpfsError(EOPNOTSUPP, "nodes keep contents, not names, and forget what they do not use (-c: all of it)")
    return _tell(nodes, ["purge"] if options.clear else [f"prestage {os.path.abspath(path)}" for path in options.add])


def _tell(nodes: list[Node], verbs: list[str]) -> int:
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

# SPDX-License-Identifier: GPL-2.0-or-later
"""bpstat: shows nodes and processes, with BProc's options and formats.

All it knows comes from /bpfs/status and /bpfs/procs: see bpstat(1) for the same with cat and ls.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from errno import EINVAL, ENOENT
from itertools import groupby

from bpfs.cli.common import make_parser, run
from bpfs.client import Cluster, NodeStatus
from bpfs.errors import BpfsError
from bpfs.nodespec import fold

PROG = "bpstat"

_EPILOG = """\
NODES is a nodespec: 5  5-10  5-  n5  master  self  all  up  allup  notup  !down  @file, separated by commas.
Without one: all nodes. Exit code: 0, or 1 when the cluster cannot be read or a node does not exist.
"""

# Widths of the columns after the first, as BProc had them: a state is at most 15 characters.
_STATUS, _MODE, _USER, _GROUP = 15, 10, 8, 8
_CLEAR = "\33[H\33[J"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, "Shows the nodes of the cluster and what state they are in.", _EPILOG)
    parser.add_argument("nodes", metavar="NODES", nargs="*", help="which nodes to show")
    show = parser.add_argument_group("what to print")
    for letters, function, text in (
        (("-c", "--compact"), compact, "nodes that are alike in one line, ranges folded (default)"),
        (("-l", "--long"), long, "a line a node, with addresses"),
        (("-a", "--address"), addresses, "addresses only"),
        (("-s", "--status"), states, "states only"),
        (("-n", "--number"), numbers, "numbers only"),
        (("-t", "--total"), total, "how many nodes there are"),
    ):
        show.add_argument(*letters, dest="show", action="store_const", const=function, help=text)
    show.add_argument("--json", action="store_true", help="all of it, for programs")
    order = parser.add_argument_group("order")
    order.add_argument("-N", "--sort-number", dest="order", action="store_const", const="number", help="by number")
    order.add_argument("-S", "--sort-status", dest="order", action="store_const", const="status", help="by state")
    order.add_argument("-O", "--keep-order", dest="order", action="store_const", const="keep", help="as asked for")
    order.add_argument("-R", "--sort-reverse", action="store_true", help="the other way round")
    other = parser.add_argument_group("other")
    other.add_argument("-U", "--update", action="store_true", help="show again whenever something changes")
    other.add_argument("-L", "--lock", action="store_true", help="ignore ^C and ^Z, for unattended terminals")
    other.add_argument("-A", dest="host", metavar="HOST", help="print the number of the node with this name or address")
    other.add_argument("-p", dest="processes", action="store_true", help="which process is on which node")
    other.add_argument("-P", dest="ps", action="store_true", help="read output of ps, put a column NODE before it")
    return parser


def _main(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    cluster = Cluster(options.mount)
    if options.lock:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    if options.host is not None:
        print(node_of_host(cluster, options.host))
    elif options.ps:
        sys.stdout.writelines(augment_ps(sys.stdin, dict(places(cluster))))
    else:
        show_nodes(cluster, options)
    return 0


def show_nodes(cluster: Cluster, options: argparse.Namespace) -> None:
    """Prints what the options ask for, once or at every change."""
    # Opened before the first look, so that no change falls between the two.
    changes = cluster.changes() if options.update else iter(())
    while True:
        text = render(cluster, options)
        print(_CLEAR + text if options.update and not options.json else text, end="", flush=True)
        if next(changes, None) is None:
            return


def render(cluster: Cluster, options: argparse.Namespace) -> str:
    """Returns the whole text of one look at the cluster."""
    if options.processes:
        pairs = places(cluster)
        if options.json:
            return json.dumps([{"pid": pid, "node": node} for pid, node in pairs]) + "\n"
        return "PID\tNode\n" + "".join(f"{pid}\t{node}\n" for pid, node in pairs)
    show: Callable[[list[NodeStatus]], str] = options.show or compact
    nodes = select(cluster, options.nodes)
    order = options.order or ("status" if show is compact and not options.json else "number")
    if order == "number":
        nodes.sort(key=lambda node: node.number, reverse=options.sort_reverse)
    elif order == "status":
        nodes.sort(key=lambda node: node.number)
        nodes.sort(key=lambda node: node.state, reverse=options.sort_reverse)
    return as_json(nodes) if options.json else show(nodes)


def select(cluster: Cluster, specs: Sequence[str]) -> list[NodeStatus]:
    """Returns the nodes that nodespecs name, in that order; all nodes when there is none."""
    nodes = cluster.status()
    if not specs:
        return nodes
    known = {node.number: node for node in nodes}
    return [known.get(number) or cluster.status_of(number) for number in cluster.expand(",".join(specs))]


def places(cluster: Cluster) -> list[tuple[int, str]]:
    """Returns every process the cluster knows, by pid, with where it is."""
    found = []
    for pid, process in cluster.procs.items():
        try:
            found.append((pid, process.read("node")))
        except OSError:
            pass  # ended meanwhile
    return found


def node_of_host(cluster: Cluster, host: str) -> int:
    """Returns the number of the node with this name or address.

    Raises:
        BpfsError: there is none.
    """
    try:
        wanted = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        raise BpfsError(ENOENT, f"{host} is no host that is known here") from None
    for node in [*cluster.status(), cluster.status_of(-1)]:
        if node.address in wanted:
            return node.number
    raise BpfsError(ENOENT, f"no node has the address of {host}")


def augment_ps(lines: Iterable[str], nodes: dict[int, str]) -> Iterable[str]:
    """Puts a column NODE before the lines of ps: filled for processes that the cluster knows.

    Raises:
        BpfsError: the first line has no column PID.
    """
    column = -1
    for line in lines:
        if column < 0:
            words = line.split()
            if "PID" not in words:
                raise BpfsError(EINVAL, "standard input does not begin with a header line of ps with a column PID")
            # Counted in words: what ps prints before the pid (user, node, flags) never holds a blank.
            column = words.index("PID")
            yield f"NODE\t{line}"
            continue
        word = line.split()[column : column + 1]
        pid = int(word[0]) if word and word[0].isdigit() else 0
        yield f"{nodes.get(pid, '')}\t{line}"


# What is printed of nodes.


def mode_string(mode: int) -> str:
    """Returns the x bits as ls shows a mode: ``---x--x--x``."""
    return "-" + "".join("--x" if mode & bit else "---" for bit in (0o100, 0o010, 0o001))


def compact(nodes: list[NodeStatus]) -> str:
    """Neighbours that are alike in a line, their numbers folded into ranges, as wide as the terminal allows."""
    columns = shutil.get_terminal_size((80, 24)).columns
    width = max(11, columns - (_STATUS + _MODE + _USER + _GROUP + 5))

    def line(first: str, status: str, mode: str, user: str, group: str) -> str:
        rest = f"{status:<{_STATUS}.{_STATUS}} {mode:<{_MODE}} {user:<{_USER}.{_USER}} {group:<{_GROUP}.{_GROUP}}"
        return f"{first:<{width}} {rest}".rstrip() + "\n"

    text = line("Node(s)", "Status", "Mode", "User", "Group")
    for (state, mode, owner, group), alike in groupby(nodes, key=lambda node: node[1:5]):
        for part in wrap(fold(node.number for node in alike), width):
            text += line(part, str(state), mode_string(int(mode)), str(owner), str(group))
    return text


def wrap(spec: str, width: int) -> list[str]:
    """Breaks a folded nodespec between its terms into pieces of at most `width` characters (one term at least)."""
    pieces = [""]
    for term in spec.split(","):
        if pieces[-1] and len(pieces[-1]) + 1 + len(term) > width:
            pieces.append(term)
        else:
            pieces[-1] += f",{term}" if pieces[-1] else term
    return pieces


def long(nodes: list[NodeStatus]) -> str:
    """A line a node, with its address."""
    text = "Node Address         Status       Mode          User       Group\n"
    for node in nodes:
        mode = mode_string(node.mode)
        line = f"{node.number:4} {node.address or '-':<15} {node.state:<12} {mode:<13} {node.owner:<10.10}"
        text += f"{line} {node.group:.10}\n"
    return text


def addresses(nodes: list[NodeStatus]) -> str:
    """A line a node: its address."""
    return "".join(f"{node.address or '-'}\n" for node in nodes)


def states(nodes: list[NodeStatus]) -> str:
    """A line a node: its state."""
    return "".join(f"{node.state}\n" for node in nodes)


def numbers(nodes: list[NodeStatus]) -> str:
    """A line a node: its number."""
    return "".join(f"{node.number}\n" for node in nodes)


def total(nodes: list[NodeStatus]) -> str:
    """How many there are."""
    return f"{len(nodes)}\n"


def as_json(nodes: list[NodeStatus]) -> str:
    """One JSON array in a line; the mode is octal in a string, as in /bpfs."""
    return json.dumps([{**node._asdict(), "mode": f"{node.mode:03o}"} for node in nodes]) + "\n"


if __name__ == "__main__":
    sys.exit(main())

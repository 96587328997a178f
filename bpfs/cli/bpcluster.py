"""bpcluster: a whole cluster of virtual nodes on this machine, up and down with one command."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from errno import EPERM

from bpfs.cli.common import EXIT_ERROR, make_parser, run
from bpfs.cli.virtualdown import node_states, take_down
from bpfs.config import (
    DEFAULT_CACHE_SIZE,
    DEFAULT_LEASE,
    DEFAULT_PRECOPY,
    Config,
    apply_line,
    parse_precopy,
    parse_size,
)
from bpfs.errors import BpfsError, ConfigError
from bpfs.rundir import RunDir, chosen_mount

PROG = "bpcluster"

_EPILOG = """\
`up` returns when every node is up, or else names what failed and leaves nothing behind. `status` prints a line a
node. `restart-master` kills the master's daemon, if it still runs, and starts it anew: nodes and processes live on.
`restart-slave` does so for the daemon of a node.
`down` ends everything that belongs to the cluster, also when its daemons have been killed. `check-move` tells of any
cluster, virtual or not, what keeps a process from moving. Clusters with different mount points may run side by side.
Exit code: 0, 1 when something failed or there is no cluster, 2 for a
command line that makes no sense.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of nodes from 1 to 1000")
    return int(text)


def _pid(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 0 < int(text[:20]) <= 1 << 22:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is not a process id")
    return int(text)


def _node(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text[:20]) >= 1000:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is not the number of a node")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.5 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"'{text}' is not a lease in seconds from 0.5 to 86400")
    return value


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _precopy(text: str) -> int | None:
    try:
        return parse_precopy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _line(text: str) -> str:
    try:
        apply_line(Config(), text, "its line")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, "Runs a cluster of virtual nodes on this machine.", _EPILOG)
    # After the verb it counts as well as before it.
    mount = argparse.ArgumentParser(add_help=False)
    mount.add_argument(
        "--mount", metavar="DIR", default=argparse.SUPPRESS, help="which cluster (default: $BPFS or /bpfs)"
    )
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    up = verbs.add_parser("up", parents=[mount], help="start a cluster", description="Starts master and nodes.")
    up.add_argument("-n", "--nodes", metavar="N", type=_count, default=4, help="how many nodes (default: 4)")
    up.add_argument("--lease", metavar="SECONDS", type=_seconds, default=DEFAULT_LEASE, help="the lease (default: 30)")
    up.add_argument("--netns", action="store_true", help="a network namespace for each node, joined by a bridge")
    up.add_argument(
        "--root",
        choices=("own", "empty"),
        default="own",
        help="what jobs on nodes see: this machine's files (the default), or an empty root with what is exported",
    )
    up.add_argument(
        "--export",
        metavar="PATH",
        action="append",
        default=[],
        help="with an empty root: show this, too; may be repeated",
    )
    up.add_argument(
        "--cachesize",
        metavar="SIZE",
        type=_size,
        default=DEFAULT_CACHE_SIZE,
        help="with an empty root: what a node may keep of it, as 500M (default: 1G)",
    )
    up.add_argument(
        "--precopy",
        metavar="SIZE",
        type=_precopy,
        default=DEFAULT_PRECOPY,
        help="memory of a process from which on it moves while it runs, or `off` (default: 32M)",
    )
    up.add_argument(
        "--config",
        metavar="LINE",
        type=_line,
        action="append",
        default=[],
        help="a line of bpmaster's configuration, as 'contentlimit 10M'; may be repeated",
    )
    up.add_argument("--no-tree", action="store_true", help="do not mount the tree")
    up.add_argument("--verbose", action="store_true", help="log more")
    up.set_defaults(body=_up)
    status = verbs.add_parser("status", parents=[mount], help="show the nodes", description="Prints a line a node.")
    status.set_defaults(body=_status)
    anew = verbs.add_parser(
        "restart-master",
        parents=[mount],
        help="start the master anew",
        description="Kills the master's daemon, if it still runs, and starts it anew. It takes up the nodes, and what "
        "runs there; returns when it is ready.",
    )
    anew.set_defaults(body=_restart_master)
    slave = verbs.add_parser(
        "restart-slave",
        parents=[mount],
        help="start the slave of a node anew",
        description="Has the daemon of a node start anew, from the program as it is now. What runs there runs on; "
        "returns when the node is back.",
    )
    slave.add_argument("node", metavar="N", type=_node, help="the number of the node")
    slave.set_defaults(body=_restart_slave)
    down = verbs.add_parser("down", parents=[mount], help="end a cluster", description="Ends all that belongs to it.")
    down.set_defaults(body=_down)
    check = verbs.add_parser(
        "check-move",
        parents=[mount],
        help="say what keeps a process from moving",
        description="Prints all that keeps a process from moving, each with what can be done about it. Exit code: 0 "
        "when nothing does, else 1. Needs no root: the process's user may ask.",
    )
    check.add_argument("--tree", action="store_true", help="with all that descend from it")
    check.add_argument("pid", metavar="PID", type=_pid, help="the process")
    check.set_defaults(body=_check_move, root=False)
    return parser


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    body: Callable[[argparse.Namespace, str], int] = args.body
    if os.geteuid() != 0 and getattr(args, "root", True):
        raise BpfsError(EPERM, "needs root: it mounts, makes namespaces, and traces processes")
    return body(args, chosen_mount(args.mount))


def _up(args: argparse.Namespace, mount: str) -> int:
    # The daemons' code is for `up` alone: the other verbs answer at once.
    from bpfs.cli.virtual import Up, UpOptions

    empty, exports = args.root == "empty", ("default", *args.export)
    options = UpOptions(
        mount, args.nodes, args.lease, args.netns, not args.no_tree, args.verbose, empty, exports, args.cachesize,
        args.precopy, tuple(args.config),
    )  # fmt: skip
    Up(options).run()
    return 0


def _restart_master(_args: argparse.Namespace, mount: str) -> int:
    from bpfs.cli.virtual import restart_master

    restart_master(mount)
    return 0


def _restart_slave(args: argparse.Namespace, mount: str) -> int:
    from bpfs.cli.virtual import restart_slave

    restart_slave(mount, args.node)
    return 0


def _status(_args: argparse.Namespace, mount: str) -> int:
    rundir = RunDir(mount)
    if not rundir.path.is_dir():
        print(f"{PROG}: there is no cluster at {mount}", file=sys.stderr)
        return EXIT_ERROR
    states = node_states(rundir)
    counts = Counter(state for state, _ in states.values())
    summary = ", ".join(f"{count} {state}" for state, count in counts.items()) or "no nodes"
    print(f"{mount}: {summary}")
    for number, (state, reason) in sorted(states.items()):
        print(f"{number} {state} {reason}".rstrip())
    return 0


def _check_move(args: argparse.Namespace, mount: str) -> int:
    from bpfs.cli.checkmove import check_move

    return check_move(mount, args.pid, args.tree)


def _down(_args: argparse.Namespace, mount: str) -> int:
    take_down(mount)
    return 0


if __name__ == "__main__":
    sys.exit(main())

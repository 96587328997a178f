"""bpslave: the daemon of a node."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bpfs import daemon, kernel, log
from bpfs.cli.common import EXIT_USAGE, make_parser, run
from bpfs.config import DEFAULT_KEY, DEFAULT_PORT
from bpfs.daemon import Ready
from bpfs.errors import ConfigError
from bpfs.rundir import chosen_mount
from bpfs.slave.life import live
from bpfs.slave.options import DEFAULT_CACHE, SlaveOptions
from bpfs.slave.supervisor import Supervisor
from bpfs.wire.handshake import read_key

PROG = "bpslave"

_EPILOG = """\
The node looks for its master until it is found, and holds processes while it hears of it: when the link ends, or
the master is silent for the lease, the node kills its processes and starts afresh. SIGTERM ends it. Exit code: 0,
or 2 for a mistake in the options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, "Makes this machine a node of a cluster.", _EPILOG)
    own = parser.add_argument_group("the node")
    own.add_argument("master", metavar="MASTER[:PORT]", help=f"where the master is (default port: {DEFAULT_PORT})")
    own.add_argument(
        "-n", "--number", metavar="N", type=int, help="the node number to ask for (default: master decides)"
    )
    own.add_argument(
        "-k", "--key", metavar="FILE", type=Path, default=DEFAULT_KEY, help=f"the cluster key ({DEFAULT_KEY})"
    )
    own.add_argument("--no-mount", action="store_true", help="do not mount the tree on this node")
    own.add_argument(
        "--root",
        choices=("own", "empty"),
        default="own",
        help="what jobs see: this machine's own files (the default), or an empty root with the master's programs",
    )
    own.add_argument(
        "--cache", metavar="DIR", type=Path, default=DEFAULT_CACHE, help=f"where those are kept ({DEFAULT_CACHE})"
    )
    own.add_argument("-f", "--foreground", action="store_true", help="stay on the terminal, log to stderr")
    own.add_argument("--log", metavar="FILE", type=Path, help="log to this file (default: nowhere in the background)")
    own.add_argument("--verbose", action="store_true", help="log more")
    return parser


def _options(args: argparse.Namespace) -> SlaveOptions:
    host, _, port = args.master.rpartition(":") if ":" in args.master else (args.master, "", str(DEFAULT_PORT))
    if not host or not port.isdigit() or not 0 < int(port) <= 65535:
        raise ConfigError(f"{args.master!r} is no MASTER[:PORT]")
    if args.number is not None and args.number < 0:
        raise ConfigError("--number must not be negative")
    mount = None if args.no_mount else chosen_mount(args.mount)
    return SlaveOptions(
        host,
        int(port),
        read_key(args.key),
        args.number,
        mount,
        args.verbose,
        empty=args.root == "empty",
        cache=args.cache.absolute(),
    )


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    try:
        if os.geteuid() != 0:
            raise ConfigError("needs root: it makes namespaces and traces processes")
        options = _options(args)
    except ConfigError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return EXIT_USAGE
    gc.freeze()
    if args.foreground:
        log.start(PROG, args.log, args.verbose)
        return Supervisor(options, live).run()

    def body(ready: Ready) -> int:
        log.start(PROG, None, args.verbose)
        kernel.set_title(f"bpslave: supervisor, master {args.master}")
        ready.ok()
        return Supervisor(options, live).run()

    started = daemon.start(body, args.log.absolute() if args.log else None)
    complaint = started.wait_ready(60.0)
    if complaint is not None:
        print(f"{PROG}: {complaint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

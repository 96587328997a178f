"""bpbootd: lets machines with nothing on them boot as nodes of this master."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from boot import signature
from boot.errors import BootError
from boot.reports import Reporter
from boot.server import ServerOptions, serve
from bpfs import config as configuration
from bpfs import daemon, log
from bpfs.bootserver import Desk
from bpfs.cli.common import EXIT_ERROR, EXIT_USAGE, make_parser, run
from bpfs.config import DEFAULT_PATH, DEFAULT_PORT, Config
from bpfs.daemon import Ready
from bpfs.errors import BpfsError, ConfigError
from bpfs.wire.handshake import read_key

PROG = "bpbootd"

READY_TIMEOUT = 20.0

_EPILOG = """\
It answers RARP on the configuration's `interface` and on no other, and serves the manifest, kernel and image that
`bpboot image 2` has made, and nothing else. bpmaster starts it by itself where the configuration says `bootserver
yes`. SIGHUP reads the configuration again; SIGTERM ends it. Exit code: 0, 1 when it cannot start, 2 for a mistake in
options or configuration.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, "Lets machines boot over the network and join the cluster.", _EPILOG)
    parser.set_defaults(mount=None)
    own = parser.add_argument_group("the boot server")
    own.add_argument("-c", "--config", metavar="FILE", type=Path, default=DEFAULT_PATH, help=f"({DEFAULT_PATH})")
    own.add_argument("-k", "--key", metavar="FILE", type=Path, help="the cluster key")
    own.add_argument("-p", "--port", metavar="PORT", type=int, help="the port of bpmaster, which nodes are told")
    own.add_argument("-f", "--foreground", action="store_true", help="stay on the terminal, log to stderr")
    own.add_argument("--log", metavar="FILE", type=Path, help="log to this file (default: nowhere in the background)")
    own.add_argument("--reports", metavar="FD", type=int, help="write what happens to this descriptor (for bpmaster)")
    return parser


def _config(args: argparse.Namespace) -> Config:
    config = configuration.read(args.config)
    config.mount = args.mount or config.mount
    config.key = args.key or config.key
    config.port = config.port if args.port is None else args.port
    if not config.interface:
        raise ConfigError(f"{args.config}: name the nodes' network with `interface`: there is no default")
    if not config.ranges:
        raise ConfigError(f"{args.config}: give addresses for nodes with `iprange`")
    if not config.port:
        config.port = DEFAULT_PORT
    return config


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    try:
        if os.geteuid() != 0:
            raise ConfigError("needs root: it answers RARP and listens on a privileged port")
        config = _config(args)
        key = read_key(config.key)
        signature.ensure_key(config.boot_key)
        signature.public_key(config.boot_key)  # whether it can be used
        reports = args.reports if args.reports is not None else os.open(os.devnull, os.O_WRONLY)
        os.set_blocking(reports, False)
        desk = Desk(config, args.config.absolute(), key, Reporter(reports))
        options = ServerOptions(
            config.interface, str(desk.network.ip), config.bootport, config.bootimages, config.boot_key,
            desk.read_again, reports, desk.network if config.pxe else None,
        )  # fmt: skip
    except (ConfigError, BootError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return EXIT_USAGE
    if args.foreground:
        log.start(PROG, args.log)
        return _serve(options, Ready())

    def body(ready: Ready) -> int:
        log.start(PROG)
        return _serve(options, ready)

    complaint = daemon.start(body, args.log.absolute() if args.log else None, {reports}).wait_ready(READY_TIMEOUT)
    if complaint is not None:
        raise BpfsError(EXIT_ERROR, complaint)
    return 0


def _serve(options: ServerOptions, ready: Ready) -> int:
    try:
        asyncio.run(serve(options, ready.ok))
    except OSError as error:
        ready.failed(f"cannot serve on {options.interface}, {options.address} port {options.port}: {error.strerror}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

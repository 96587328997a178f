"""bpmaster: the master's daemon."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bpfs import config as configuration
from bpfs import daemon, log
from bpfs.cli.common import EXIT_ERROR, EXIT_USAGE, make_parser, run
from bpfs.config import DEFAULT_PATH, Config
from bpfs.daemon import Ready
from bpfs.errors import BpfsError, ConfigError
from bpfs.master.app import MasterOptions, serve
from bpfs.rundir import RunDir, chosen_mount

PROG = "bpmaster"

READY_TIMEOUT = 60.0

_EPILOG = """\
Options come before the configuration file, and the file before the defaults. SIGHUP reads the file again; SIGTERM
has all nodes kill their processes, unmounts, and ends. Exit code: 0 when the master is ready (with --foreground:
has ended), 1 when it cannot start, 2 for a mistake in options or configuration.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, "Runs the master of a cluster and mounts its tree.", _EPILOG)
    parser.set_defaults(mount=None)
    own = parser.add_argument_group("the master")
    own.add_argument(
        "-c", "--config", metavar="FILE", type=Path, help=f"configuration (default: {DEFAULT_PATH} if there)"
    )
    own.add_argument("--address", metavar="ADDRESS", help="address to listen on (default: that of `interface`, or all)")
    own.add_argument("-p", "--port", metavar="PORT", type=int, help="port to listen on; 0: any free one")
    own.add_argument("-k", "--key", metavar="FILE", type=Path, help="the cluster key")
    own.add_argument("--lease", metavar="SECONDS", type=float, help="how long a node lives without the master")
    own.add_argument("--state", metavar="FILE", type=Path, help="settings of nodes that outlast the master")
    own.add_argument("-f", "--foreground", action="store_true", help="stay on the terminal, log to stderr")
    own.add_argument("--log", metavar="FILE", type=Path, help="log to this file (default: master.log below /run/bpfs)")
    own.add_argument("--verbose", action="store_true", help="log more")
    return parser


def read_config(args: argparse.Namespace) -> tuple[Config, Path | None]:
    """The configuration by file and options, and the file that SIGHUP is to read again.

    Raises:
        ConfigError: it is wrong.
    """
    path = args.config or (DEFAULT_PATH if DEFAULT_PATH.exists() else None)
    config = configuration.read(path) if path is not None else Config()
    if args.mount is not None or path is None:
        config.mount = chosen_mount(args.mount)
    config.address = args.address or config.address
    config.port = config.port if args.port is None else args.port
    config.key = args.key or config.key
    config.state = args.state or config.state
    if args.lease is not None:
        if not 0.1 <= args.lease <= 86400:
            raise ConfigError("--lease must be seconds from 0.1 to 86400")
        config.lease, config.pingtimeout = args.lease, None
    if not 0 <= config.port <= 65535:
        raise ConfigError("--port must be a number from 0 to 65535")
    return config, path


def _make_mount_point(config: Config) -> None:
    """On a new machine there is none; one that was named on the command line is its user's to make."""
    try:
        # Not exist_ok, which looks at what is there: the mount of a master that was killed cannot be looked at.
        with suppress(FileExistsError):
            Path(config.mount).mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{config.mount} cannot be made: {error.strerror}") from None


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    try:
        config, path = read_config(args)
        if args.mount is None:
            _make_mount_point(config)
        options = MasterOptions(config, path)
        if args.foreground:
            log.start(PROG, args.log, args.verbose)
            return serve(options, Ready())
        rundir = RunDir(config.mount)
        rundir.make()
        file = args.log or rundir.master_log
    except ConfigError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return EXIT_USAGE
    gc.freeze()
    return detach(options, file.absolute(), args.verbose)


def detach(options: MasterOptions, file: Path, verbose: bool) -> int:
    """Start the master in the background; returns when it is ready.

    Raises:
        BpfsError: it cannot start, with its own sentence.
    """

    def body(ready: Ready) -> int:
        log.start(PROG, None, verbose)
        return serve(options, ready)

    rundir = RunDir(options.config.mount)
    started = daemon.start(body, file)
    complaint = started.wait_ready(READY_TIMEOUT)
    if complaint is not None:
        if not rundir.master_pid():
            rundir.leave()
        raise BpfsError(EXIT_ERROR, complaint)
    return 0


if __name__ == "__main__":
    sys.exit(main())

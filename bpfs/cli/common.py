# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands that work through /bpfs share: options, and errors as one line with an exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

import bpfs
from bpfs.client import DEFAULT_MOUNT

EXIT_ERROR = 1
EXIT_USAGE = 2  # argparse's own


def make_parser(prog: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Returns a parser with the options that every command has: --help, --version and --mount."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="show this text and exit")
    general.add_argument("-v", "-V", "--version", action="version", version=f"{prog} {bpfs.__version__}")
    default = os.environ.get("BPFS") or DEFAULT_MOUNT
    general.add_argument(
        "--mount", metavar="DIR", default=default, help=f"where the cluster is mounted (default: $BPFS, now {default})"
    )
    return parser


def run(prog: str, body: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Runs a command's body; a user's error becomes one line on stderr and exit code 1.

    A reader that went away and ^C end the command as they end any other program: by their signal, without a word.
    """
    try:
        code = body(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _die_of(signal.SIGPIPE)
    except KeyboardInterrupt:
        return _die_of(signal.SIGINT)
    except OSError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return EXIT_ERROR


def _die_of(number: signal.Signals) -> int:
    # The shell has to see the signal, or a loop around this command would go on after ^C.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number

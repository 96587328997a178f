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
    _open_closed()
    try:
        code = body(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _die_of(signal.SIGPIPE)
    except KeyboardInterrupt:
        return _die_of(signal.SIGINT)
    except OSError as error:
        text = str(error)
        if text.startswith("[Errno"):  # the kernel's, and not a sentence of ours
            text = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        print(f"{prog}: {text}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return EXIT_ERROR


def _open_closed() -> None:
    # Who was started with closed descriptors may run; only what he has to say comes to nothing, as an error.
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def _drop_output() -> None:
    # What is left of it would fail once more when the interpreter ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _die_of(number: signal.Signals) -> int:
    # The shell has to see the signal, or a loop around this command would go on after ^C.
    _drop_output()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number

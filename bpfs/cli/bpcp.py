# SPDX-License-Identifier: GPL-2.0-or-later
"""bpcp: copies files between nodes, to many at once down a tree of them.

It is built on bpsh alone: a small program of the master runs at every place of the copy (bpfs.copy).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bpfs.cli.common import EXIT_ERROR, make_parser, run
from bpfs.client import MASTER, Cluster
from bpfs.copy.transfer import HERE, Options, Transfer

PROG = "bpcp"

_EPILOG = """\
A place is PATH, on this machine, or NODES:PATH; NODES is a nodespec. With several nodes as source, each file gets .N
behind its name, N being its node. Exit code: 0; 1 when anything did not arrive somewhere, which is named on stderr;
2 for a wrong command line.
"""

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_STALL = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, "Copies files to nodes, from nodes, and between them.", _EPILOG)
    parser.add_argument("source", metavar="SOURCE", nargs="+", help="what to copy")
    parser.add_argument("target", metavar="TARGET", help="a directory, or the new name of the one source")
    how = parser.add_argument_group("how")
    how.add_argument("-p", "--preserve", action="store_true", help="keep modes, times and (for root) owners")
    how.add_argument("-r", "--recursive", action="store_true", help="copy directories with all that is in them")
    how.add_argument(
        "-l", "--limit", metavar="RATE", type=_rate, default=0.0,
        help="limit: bytes a second as 500K, 10M or 1G; a plain number is Kbit/s, as scp has it",
    )  # fmt: skip
    how.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    how.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=_STALL,
        help=f"give up a node that takes nothing for so long (default: {_STALL:g})",
    )  # fmt: skip
    return parser


def _rate(text: str) -> float:
    unit = _UNITS.get(text[-1:].upper(), 0)
    try:
        value = float(text[:-1] if unit else text) * (unit or 125)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no rate such as 10M")
    return value


def split(place: str) -> tuple[str, str]:
    """Returns nodespec ("" for this machine) and path of `NODES:PATH` or `PATH`, as scp(1) tells them apart."""
    spec, colon, path = place.partition(":")
    if not colon or not spec or "/" in spec.lstrip("@"):
        return "", place
    return spec, path or "."


def _main(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    cluster = Cluster(options.mount)

    def places(spec: str) -> list[int | None]:
        return [HERE] if not spec else [HERE if node == MASTER else node for node in cluster.expand(spec)]

    spec, path = split(options.target)
    targets = list(dict.fromkeys(places(spec)))
    groups: dict[str, list[str]] = {}
    for source in options.source:
        groups.setdefault(split(source)[0], []).append(split(source)[1])
    plan = [(node, spec, files) for spec, files in groups.items() for node in dict.fromkeys(places(spec))]
    several = len(plan) > 1 or len(options.source) > 1
    bar = Bar(len(targets)) if sys.stderr.isatty() and not options.quiet else None
    transfer = Transfer(
        Options(
            path, several or path.endswith("/"), options.preserve, options.recursive, options.limit, options.timeout
        ),
        [_bpsh(), "--mount", str(cluster.mount)],
        lambda node: cluster.nodes[MASTER if node is HERE else node].address,
        complain=lambda text: print(f"{bar.erase() if bar else ''}{PROG}: {text}", file=sys.stderr),
        progress=bar.show if bar else lambda *_: None,
    )
    perfect = True
    for node, spec, files in plan:
        alike = sum(other == spec for _, other, _ in plan)
        perfect &= transfer.run(node, files, targets, f".{node}" if alike > 1 else "")
        if bar:
            bar.end()
    return 0 if perfect else EXIT_ERROR


def _bpsh() -> str:
    own = Path(__file__).resolve().parent.parent / "bin" / "bpsh"
    return str(own) if own.exists() else shutil.which("bpsh") or "bpsh"


class Bar:
    """The progress bar: one line of the terminal."""

    def __init__(self, targets: int) -> None:
        self._targets = targets
        self._began = time.monotonic()
        self._line = ""

    def show(self, sent: int, total: int, finished: int) -> None:
        """Draws it anew."""
        part = min(1.0, sent / total) if total else 1.0
        seconds = max(time.monotonic() - self._began, 0.001)
        rate = sent / seconds
        left = (total - sent) / rate if rate and part < 1 else 0
        tail = f" {part:4.0%} {human(sent)} {human(rate)}/s {int(left) // 60:02}:{int(left) % 60:02}"
        tail += f"  {finished}/{self._targets} done"
        width = max(4, shutil.get_terminal_size((80, 24)).columns - len(tail) - 3)
        line = "[" + ("#" * round(part * width)).ljust(width) + "]" + tail
        if line != self._line:
            print(f"\r{line}", end="", file=sys.stderr, flush=True)
        self._line = line

    def erase(self) -> str:
        """What takes the line away, so that a message can stand there."""
        self._line = ""
        return "\r\33[K"

    def end(self) -> None:
        """Leaves the line standing, for the next copy to begin below it."""
        if self._line:
            print(file=sys.stderr)
        self._line = ""
        self._began = time.monotonic()


def human(count: float) -> str:
    """Returns a number of bytes as people read it: ``1.5M``."""
    for unit in ("B", "K", "M", "G"):
        if count < 1000:
            return f"{count:.0f}{unit}" if unit == "B" or count >= 100 else f"{count:.1f}{unit}"
        count /= 1024
    return f"{count:.1f}T"


if __name__ == "__main__":
    sys.exit(main())

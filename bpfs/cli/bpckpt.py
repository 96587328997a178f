# SPDX-License-Identifier: GPL-2.0-or-later
"""bpckpt: takes checkpoints, brings processes back, and looks into image files. See bpckpt(1)."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from bpfs.cli.common import EXIT_ERROR, make_parser, run
from engine.checkpoint import Chain, describe, merge
from engine.image import MAGIC

PROG = "bpckpt"

_EPILOG = """\
save and restart are writes to files of /bpfs; the others need no cluster.
Exit code: 0, 1 when something failed, 2 for a command line that makes no sense.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = make_parser(PROG, "Checkpoints: images of processes in files.", _EPILOG)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    save = commands.add_parser("save", help="write an image of a running process")
    save.add_argument("pid", type=int)
    save.add_argument("file")
    save.add_argument("--stop", action="store_true", help="end the process when its image is safe")
    save.add_argument("--since", metavar="NAME", default="", help="only what differs from this image beside it")
    save.set_defaults(run=_save)
    restart = commands.add_parser("restart", help="bring a process back; what it writes comes to stderr")
    restart.add_argument("file")
    restart.add_argument("node", nargs="?", type=int, default=-1, help="where (default: -1, the master)")
    restart.add_argument("--anypid", action="store_true", help="under another pid, where its own is in use")
    restart.set_defaults(run=_restart)
    for name, body, text in (
        ("info", _info, "show what is inside"),
        ("verify", _verify, "read and check all of it"),
        ("merge", _merge, "make a whole image of one that builds on others"),
    ):
        one = commands.add_parser(name, help=text)
        one.add_argument("file")
        one.set_defaults(run=body)
        if name == "info":
            one.add_argument("--json", action="store_true")
        if name == "merge":
            one.add_argument("-o", "--output", required=True, metavar="FILE")
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


def _write(path: Path, text: str) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(text.encode() + b"\n")


def _save(arguments: argparse.Namespace) -> int:
    order = shlex.quote(os.path.abspath(arguments.file))
    order += " stop" if arguments.stop else ""
    order += f" since {shlex.quote(arguments.since)}" if arguments.since else ""
    _write(Path(arguments.mount) / "procs" / str(arguments.pid) / "checkpoint", order)
    return 0


def _restart(arguments: argparse.Namespace) -> int:
    path = os.path.abspath(arguments.file)
    control = Path(arguments.mount) / "procs" / "restart"
    _write(control, f"{shlex.quote(path)} {arguments.node}" + (" anypid" if arguments.anypid else ""))
    mine = [line for line in control.read_text().splitlines() if f" {path} pid=" in line]
    print(mine[-1].rpartition(" pid=")[2].split()[0])
    return 0


def _open(path: str) -> Chain:
    folder = os.path.dirname(os.path.abspath(path))

    def beside(name: bytes) -> int:
        return os.open(os.path.join(folder, os.fsdecode(name)), os.O_RDONLY | os.O_CLOEXEC)

    try:
        return Chain(os.open(path, os.O_RDONLY | os.O_CLOEXEC), beside)
    except OSError as error:
        raise _named(error, path) from None


def _named(error: OSError, path: str) -> OSError:
    if error.filename is not None:
        return _Sentence(f"{error.filename}: {error.strerror}")
    return _Sentence(f"{path}: {error.strerror}")


class _Sentence(OSError):
    """An error that is told as it stands."""

    def __str__(self) -> str:
        return str(self.args[0])


def _info(arguments: argparse.Namespace) -> int:
    with closing(_open(arguments.file)) as chain:
        found = describe(chain)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for key, value in found.items():
        match key, value:
            case "time", _:
                print(f"time {time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(value))}")
            case "descriptors", _:
                for one in value:
                    print(f"fd {' '.join(map(str, one['fds']))} {one['kind']} {one.get('path', '')}".rstrip())
            case _, list():
                for one in value:
                    print(f"{key} {one}")
            case _:
                print(f"{key} {value}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    with closing(_open(arguments.file)) as chain:
        try:
            for _ in chain.pages():
                pass
        except OSError as error:
            raise _named(error, arguments.file) from None
    return 0


def _check_name(path: str) -> None:
    with suppress(FileNotFoundError), open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise OSError(errno.EEXIST, "there is a file of this name that is no checkpoint")


def _merge(arguments: argparse.Namespace) -> int:
    spare = f"{arguments.output}.{os.getpid()}.part"
    with closing(_open(arguments.file)) as chain:
        try:
            _check_name(arguments.output)
            fd = os.open(spare, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                merge(chain, fd)
            finally:
                os.close(fd)
            os.rename(spare, arguments.output)
        except OSError as error:
            print(f"{PROG}: {arguments.output}: {error.strerror}", file=sys.stderr)
            if os.path.exists(spare):
                os.unlink(spare)
            return EXIT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())

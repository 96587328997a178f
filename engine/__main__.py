"""`python -m engine dump PID -o FILE | restore FILE | info FILE`: the engine without a cluster, for trying it out.

dump leaves the process as it was (`--kill` ends it). restore brings it up in a fresh job namespace under its old pid,
with this
terminal in place of its own, waits for it and ends as it ended.
"""

import argparse
import contextlib
import os
import signal
import sys
import time

from engine import dump, image
from engine.freeze import freeze
from engine.jobspace import JobSpace, Kind
from engine.restore import Builder
from engine.target import place_child

_BLOCK = range(100_000, 200_000)


def _dump(arguments: argparse.Namespace) -> int:
    frozen = freeze(arguments.pid)
    killed = False
    try:
        inspection = dump.inspect(frozen)
        for refusal in inspection.refusals:
            print(f"process {arguments.pid} cannot be dumped: {refusal}", file=sys.stderr)
        if inspection.refusals:
            return 1
        with open(arguments.output, "wb") as file:
            total, ms = dump.write(inspection, dump.build(inspection), file.write)
        if arguments.kill:
            os.kill(arguments.pid, signal.SIGKILL)
            killed = True
        print(f"{total} bytes of pages in {ms:.1f} ms")
        return 0
    finally:
        if killed:
            frozen.close()
        else:
            frozen.release()


def _load(path: str) -> tuple[image.Image, int]:
    """The image, and where its pages begin."""
    with open(path, "rb") as file:
        return image.read_head(file.read), file.tell()


def _info(arguments: argparse.Namespace) -> int:
    found, _ = _load(arguments.file)
    print(f"pid {found.pid}\ncomm {os.fsdecode(found.comm)}\nexe {os.fsdecode(found.files[found.exe].path)}")
    print(f"threads {len(found.threads)}\nmappings {len(found.regions)}\nbytes {found.total}")
    for entry in found.descriptors:
        print(f"fd {' '.join(str(number) for number, _ in entry['fds'])} {entry['kind']}")
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    found, pages_at = _load(arguments.file)
    space = JobSpace.start(_BLOCK)
    try:
        externals = {e["key"]: min(e["fds"][0][0], 2) for e in found.descriptors if e["kind"] == "external"}
        target = place_child(space.init, found.pid, found.ppid, found.pgid, found.sid)
        builder = Builder(target, found, externals)
        try:
            builder.begin()
            with open(arguments.file, "rb", buffering=0) as file:
                file.seek(pages_at)
                builder.pages(lambda view: _fill(file.fileno(), view))
            builder.complete()
            builder.resume()
        except BaseException:
            target.discard()
            raise
        finally:
            builder.close()
        return _wait(space, found.pid)
    finally:
        space.close()


def _fill(fd: int, view: memoryview) -> None:
    while view:
        count = os.readv(fd, [view])
        if not count:
            raise image.ImageError("it ends too early")
        view = view[count:]


def _wait(space: JobSpace, pid: int) -> int:
    while True:
        for report in space.read_reports():
            if (
                report.kind == Kind.CHILD and report.pid == pid and report.code <= 3
            ):  # CLD_EXITED, CLD_KILLED, CLD_DUMPED
                return report.status if report.code == 1 else 128 + report.status
        time.sleep(0.02)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m engine", description="Dump a process into a file and restore it.")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("dump", help="write the image of a running process")
    one.add_argument("pid", type=int)
    one.add_argument("-o", "--output", required=True)
    one.add_argument("--kill", action="store_true", help="end the process once it is dumped")
    one.set_defaults(run=_dump)
    for name, run, text in (
        ("restore", _restore, "bring it up again and wait for it"),
        ("info", _info, "say what is in an image"),
    ):
        one = commands.add_parser(name, help=text)
        one.add_argument("file")
        one.set_defaults(run=run)
    arguments = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))
    with contextlib.suppress(KeyboardInterrupt):
        try:
            return int(arguments.run(arguments))
        except OSError as error:
            print(f"engine: {error.strerror or error}", file=sys.stderr)
            return 1
    return 130


if __name__ == "__main__":
    sys.exit(main())

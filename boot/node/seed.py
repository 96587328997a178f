"""A node that passes kernel and image on: it fetches both once, keeps them in memory, and serves them as the master
does.

It needs no trust: who fetches here checks what comes by the manifest, which is the master's.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections import OrderedDict
from pathlib import Path

from boot import manifest
from boot.directory import Assign, Directory
from boot.errors import BootError
from boot.files import replace
from boot.httpd import HttpServer
from boot.manifest import Blob
from boot.node.console import say
from boot.node.fetch import Server
from boot.reports import Reporter

FOLDER = Path("/run/bpfs-seed")
AFTER = 10.0
"""Seconds after its own start: the node has more urgent things to do."""
SOON = 1.0
"""Seconds until it tries again after a failure, doubling."""
AGAIN = 60.0
"""Seconds between two announcements to the master."""


def main() -> None:
    """Serve for ever. Arguments: own address, the master's, the port, and a folder."""
    own, master, port, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    asyncio.run(_serve(own, Server(master, port), port, folder))


async def _serve(own: str, master: Server, port: int, folder: Path) -> None:
    nobody = Directory({}, lambda _: None, Assign.LOCKED, lambda _: None, lambda _: {}, "", OrderedDict())
    quiet = Reporter(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC))
    server = HttpServer(folder, folder / "no key", lambda: nobody, quiet)
    try:
        await server.start(own, port)
    except OSError as error:  # the one from before bpslave was started again still does
        say(f"nothing is passed on from here: {error.strerror}")
        return
    pause = SOON
    while True:
        try:
            await asyncio.to_thread(_fetch, master, folder)
            await asyncio.to_thread(master.text, "/seed")
            pause = AGAIN
        except (BootError, OSError) as error:
            # The master is away, has no image just now, or does not see whose address this is yet.
            pause = SOON if pause == AGAIN else min(2 * pause, AGAIN)
            say(f"nothing is passed on just now: {getattr(error, 'strerror', None) or error}")
        await asyncio.sleep(pause * random.uniform(0.8, 1.2))


def _fetch(master: Server, folder: Path) -> None:
    """Have what the master's manifest names now, and nothing else."""
    lines = [line.partition(" ") for line in master.text("/manifest").decode(errors="replace").splitlines()]
    listed = {name: Blob.parse(value, name) for name, _, value in lines if name in ("kernel", "image")}
    for what, blob in listed.items():
        path = folder / blob.name
        if not path.exists():
            fd = master.blob(blob, what)
            try:
                with open(fd, "rb", closefd=False) as source:
                    source.seek(0)
                    replace(path, source.read())
            finally:
                os.close(fd)
    replace(folder / manifest.FILE, "".join(f"{what} {blob}\n" for what, blob in listed.items()).encode())
    names = {blob.name for blob in listed.values()} | {manifest.FILE}
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def start(own: str, master: str, port: int) -> None:
    """Start it as a process of its own, which outlives this one."""
    command = [sys.executable, "-S", "-s", "-B", "-m", "boot.node.seed", own, master, str(port), str(FOLDER)]
    child = os.fork()
    if child == 0:
        # A grandchild, so that pid 1 is its parent and not bpslave, which waits for its own.
        if os.fork() == 0:
            os.setsid()
            os.nice(10)
            time.sleep(AFTER)
            os.execv(sys.executable, command)
        os._exit(0)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: GPL-2.0-or-later
"""Callers that are interrupted and killed at all moments: ``python storm.py KIND COUNT``, in the root of a test mount.

Runs on its own, without anything of bpfs, so that a fork of it is cheap.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

AT_A_TIME = 40


def interrupted_reader() -> None:
    """Reads and writes quick files while a timer interrupts it all the time; requests vanish before they are read."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    for turn in range(25):
        fd = os.open("boxes/1/value", os.O_RDWR)
        if turn % 2:
            os.write(fd, b"1")
        else:
            os.read(fd, 100)
        os.close(fd)


def blocked_reader() -> None:
    """Waits for what never comes."""
    fd = os.open(random.choice(["events", "boxes/1/events", "inner/gate"]), os.O_RDONLY)
    os.read(fd, 100)


def blocked_writer() -> None:
    """Waits in a write that a signal may end."""
    os.write(os.open("inner/slow_interruptible", os.O_WRONLY), b"1")


def reader() -> None:
    """Reads quick files until it is killed."""
    while True:
        with open("inner/large", "rb") as file:
            file.read()
        os.listdir("boxes/1")


KINDS = {each.__name__: each for each in (interrupted_reader, blocked_reader, blocked_writer, reader)}


def spawn(kind: str) -> int:
    """A child of a kind; what a signal does to its calls is no matter."""
    pid = os.fork()
    if pid == 0:
        try:
            KINDS[kind]()
        finally:
            os._exit(0)
    return pid


def main(kind: str, count: int) -> None:
    """Spawns `count` children, some at a time, and kills each after a random while, two thirds of them by SIGKILL."""
    random.seed(count)
    for _ in range(count // AT_A_TIME):
        children = [spawn(kind) for _ in range(AT_A_TIME)]
        if kind != "interrupted_reader":
            for child in children:
                time.sleep(random.uniform(0, 0.002))
                os.kill(child, random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

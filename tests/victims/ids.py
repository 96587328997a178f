"""Tells in a file which ids it has, as JSON, and lives on: SIGUSR1 ends it with status 7.

usage: ids.py FILE [UID]
"""

import json
import os
import signal
import sys


def main() -> None:
    file = sys.argv[1]
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(7))
    if len(sys.argv) > 2:
        os.setresuid(*3 * [int(sys.argv[2])])
    ids = {"pid": os.getpid(), "ppid": os.getppid(), "pgid": os.getpgrp(), "sid": os.getsid(0)}
    with open(file + ".new", "w") as out:
        json.dump(ids, out)
    os.rename(file + ".new", file)
    while True:
        signal.pause()


main()

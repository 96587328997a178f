# SPDX-License-Identifier: GPL-2.0-or-later
"""bpmount: has nodes mount what /etc/beowulf/fstab says. bpmaster does it before a node is up; this is for by hand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bpfs import config as configuration
from bpfs import fstab, nodemodules
from bpfs.cli.common import EXIT_ERROR, make_parser, run
from bpfs.client import MASTER, Cluster, Node
from bpfs.config import DEFAULT_PATH, Config
from bpfs.errors import BpfsError, ConfigError
from bpfs.fstab import Kind, Policy

PROG = "bpmount"

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_EPILOG = """\
What is mounted already stays so: it can be run again at any time. Without a file there is nothing to do.
Exit code: 0; 1 when something failed on a node, its last line being the reason; 2 for a wrong command line.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, "Sets up the local disks and network file systems of nodes, by fstab.", _EPILOG)
    policies = [policy.value for policy in Policy]
    parser.add_argument("nodes", metavar="NODES", help="which, as a nodespec")
    parser.add_argument("-u", "--unmount", action="store_true", help="undo it, in reverse")
    parser.add_argument("-c", "--config", metavar="FILE", type=Path, help=f"configuration ({DEFAULT_PATH} if there)")
    parser.add_argument("--fstab", metavar="FILE", type=Path, help="the configuration's, or FILE.N for node N")
    parser.add_argument("--mkfs", choices=policies, help="when to make local file systems")
    parser.add_argument("--fsck", choices=policies, help="when to check them")
    parser.add_argument("--master", metavar="ADDRESS", help="what $MASTER stands for")
    parser.add_argument("--bootimages", metavar="FOLDER", type=Path, help="where bpboot has put the modules of nodes")
    parser.add_argument("--force", action="store_true", help="also disks of this very machine, for virtual nodes")
    return parser


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    path = args.config or (DEFAULT_PATH if DEFAULT_PATH.exists() else None)
    config = configuration.read(path) if path is not None else Config()
    config.fstab = (args.fstab or config.fstab).absolute()
    config.mkfs = Policy(args.mkfs) if args.mkfs else config.mkfs
    config.fsck = Policy(args.fsck) if args.fsck else config.fsck
    config.bootimages = args.bootimages or config.bootimages
    cluster = Cluster(args.mount)
    config.address = args.master or config.address or Node(cluster, MASTER).address
    numbers = cluster.expand(args.nodes)
    os.chdir("/")  # a folder that nodes have

    def one(number: int) -> bool:
        try:
            text, failed = _do(Node(cluster, number), config, args.unmount, args.force)
        except (BpfsError, ConfigError) as error:
            text, failed = f"{error}\n", True
        head = f"{number}: " if len(numbers) > 1 else ""
        out = sys.stderr if failed else sys.stdout
        print("".join(f"{head}{line}\n" for line in text.splitlines()), end="", file=out, flush=True)
        return failed

    with ThreadPoolExecutor(config.nodeparallel) as pool:
        return EXIT_ERROR if any(list(pool.map(one, numbers))) else 0


def _do(node: Node, config: Config, unmount: bool, force: bool) -> tuple[str, bool]:
    """What it printed, and whether it failed."""
    path = fstab.find(config.fstab, node.number)
    if path is None:
        return "", False
    values = {"MASTER": config.address, "NODE": str(node.number)}
    entries = fstab.read(path, values, config.mkfs, config.fsck)
    if not entries:
        return "", False
    if not unmount:
        types = {entry.type for entry in entries if entry.kind is not Kind.SWAP}
        nodemodules.load_file_systems(node, types, config.bootimages)
        script = fstab.mount_script(entries, _BOOT_ID.read_text().strip(), force)
    else:
        script = fstab.unmount_script(entries)
    (done,) = node.cluster.run(["/bin/sh", "-c", script + "\n"], str(node.number))
    return (done.stderr + done.stdout).decode(errors="replace"), done.returncode != 0


if __name__ == "__main__":
    sys.exit(main())

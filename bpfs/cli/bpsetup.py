"""bpsetup: asks what a cluster of real machines needs to know, and writes its configuration and key."""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from collections.abc import Sequence
from errno import EEXIST, EPERM
from pathlib import Path

from boot.files import replace
from bpfs import config as configuration
from bpfs.bootserver import interface_network
from bpfs.cli.common import make_parser, run
from bpfs.config import DEFAULT_PATH
from bpfs.errors import BpfsError, ConfigError
from bpfs.wire.handshake import make_key

PROG = "bpsetup"

_EPILOG = """\
What no option says is asked for; without a terminal, missing options are an error. What is there already is not
touched without --force, and the key never is. Exit code: 0, 1 when something failed, 2 for a wrong command line.
"""

TEMPLATE = """\
# The cluster's configuration, written by bpsetup; every keyword is described in bpmaster(8).
# `systemctl reload bpmaster` reads it again.

# The nodes' private network: nobody but nodes is to be connected to it.
interface {interface}
iprange {first} {last}
nodes {nodes}

# Machines boot from this master. An unknown one: append = gets the next number and a line below,
# manual = is listed in /bpfs/boot/unknown, locked = is ignored. Set it to manual when all are known.
bootserver yes
nodeassign append

# Machines that can boot from their network card only: answered by DHCP here (bpboot image 1 --pxe).
#pxe {interface}

# How long a node goes on without this master (seconds), and what it does when it has not found it again.
#lease 30
#onlost reboot 30

# For the kernel of nodes; console=ttyS0 for a serial line.
#kernelcommandline panic=10 quiet

# How `echo up` starts a machine that is off: wol, or a program that is given `on NUMBER`.
#powercontrol wol

# Local disks and network file systems of nodes are in {folder}/fstab; when to make and check the former:
#mkfs never
#fsck if_needed

# Programs that are run here before a node is up, with its number in $NODE.
#nodeup {folder}/node_up.d
#nodeparallel 16

# A line a node: number and hardware addresses.
"""


FSTAB = """\
# The file systems of nodes, as in fstab(5); see bpmount(8). For node N alone: fstab.N.
#/dev/sda1       /scratch  ext4   noatime,x-bpfs.mkfs=if_needed
#/dev/sda2       none      swap
#$MASTER:/home   /home     nfs4
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, "Sets a master up for machines that boot over the network.", _EPILOG)
    own = parser.add_argument_group("what is asked for")
    own.add_argument("--interface", metavar="NAME", help="network interface of the nodes' private network")
    own.add_argument("--nodes", metavar="COUNT", help="how many nodes")
    own.add_argument("--first", metavar="ADDRESS", help="address of node 0; the others follow")
    own.add_argument("--folder", metavar="DIR", type=Path, default=DEFAULT_PATH.parent, help="(/etc/beowulf)")
    own.add_argument("--force", action="store_true", help="replace a configuration that is there")
    return parser


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    if os.geteuid() != 0:
        raise BpfsError(EPERM, "needs root: it writes the cluster's key")
    path = args.folder / DEFAULT_PATH.name
    if path.exists() and not args.force:
        raise BpfsError(EEXIST, f"{path} is there already; --force replaces it")
    interface = args.interface or _ask("network interface of the nodes", _likely_interface())
    network = interface_network(interface)
    nodes = _count(args.nodes or _ask("how many nodes", "16"))
    first = _first(args.first or _ask("address of node 0", str(network.ip + 10)), nodes, network)
    text = TEMPLATE.format(interface=interface, first=first, last=first + nodes - 1, nodes=nodes, folder=args.folder)
    key = args.folder / "key"
    if args.folder != DEFAULT_PATH.parent:
        own = {"key": "key", "fstab": "fstab", "nodeup": "node_up.d", "nodedown": "node_down.d"}
        text = "".join(f"{keyword} {args.folder.absolute() / name}\n" for keyword, name in own.items()) + text
    configuration.parse(text, str(path))  # what bpmaster would refuse must not be written
    for folder in (args.folder, args.folder / "node_up.d", args.folder / "node_down.d"):
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    replace(path, text.encode())
    if not (args.folder / "fstab").exists():
        replace(args.folder / "fstab", FSTAB.encode())
    if not key.exists():
        replace(key, make_key() + b"\n", 0o600)
    print(f"wrote {path}; next: bpboot image 1, bpboot image 2, and start bpmaster (see beowulf(7))")
    return 0


def _likely_interface() -> str:
    """The first that has an address and is not how this machine reaches the world."""
    with open("/proc/net/route") as file:
        routes = [line.split() for line in file.readlines()[1:]]
    outward = {words[0] for words in routes if words[1] == "00000000"}
    for words in routes:
        if words[0] not in outward:
            return words[0]
    return ""


def _ask(what: str, default: str) -> str:
    if not sys.stdin.isatty():
        raise ConfigError(f"{what}: there is no terminal to ask on; give it as an option (--help)")
    answer = input(f"{what}{f' [{default}]' if default else ''}: ").strip() or default
    if not answer:
        raise ConfigError(f"{what}: nothing was given")
    return answer


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 100000:
        raise ConfigError(f"{text!r} is no number of nodes")
    return int(text)


def _first(text: str, nodes: int, network: ipaddress.IPv4Interface) -> ipaddress.IPv4Address:
    try:
        first = ipaddress.IPv4Address(text)
    except ValueError:
        raise ConfigError(f"{text!r} is no network address") from None
    last = first + nodes - 1
    for address in (first, last):
        if address not in network.network or address == network.network.broadcast_address:
            raise ConfigError(f"{network.network} has no room for {nodes} nodes from {first} on")
    if first <= network.ip <= last:
        raise ConfigError(f"{network.ip} is this machine's own, and lies between {first} and {last}")
    return first


if __name__ == "__main__":
    sys.exit(main())

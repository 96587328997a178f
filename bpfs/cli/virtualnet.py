"""The network of a virtual cluster whose nodes have network namespaces of their own: a bridge, and a veth pair a
node.

The addresses are of 198.18.0.0/15, which RFC 2544 sets aside for tests of networks: no real network has them. A
pair goes with its namespace, so the bridge is all that must be removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import os
import socket
from errno import ENOSPC
from typing import Any

from bpfs import kernel
from bpfs.errors import BpfsError
from bpfs.rundir import BASE

NETWORK = ipaddress.ip_network("198.18.0.0/15")
PREFIX = 22
"""Of a cluster's own part: 1,021 nodes."""


def bridge_name(mount: str) -> str:
    """The bridge of a cluster; names of interfaces end at 15 bytes."""
    return "bp" + hashlib.sha256(os.fsencode(mount)).hexdigest()[:6]


class _Lock:
    """Held by who chooses a part of the network."""

    def __enter__(self) -> None:
        self._fd = os.open(BASE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


class VirtualNetwork:
    """The bridge and the pairs of one cluster, in the making."""

    def __init__(self, mount: str) -> None:
        # Only who wants network namespaces pays for the import.
        from pyroute2 import IPRoute

        self._make_socket: Any = IPRoute
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._ip: Any = IPRoute()
        self.name = bridge_name(mount)
        self._bridge, self._block = self._make_bridge()
        hosts = self._block.hosts()
        self.address = str(next(hosts))

    def _make_bridge(self) -> tuple[int, ipaddress.IPv4Network]:
        # Two clusters in the making at once must not choose the same part.
        with _Lock():
            block = self._free_block()
            self._ip.link("add", ifname=self.name, kind="bridge", br_forward_delay=0, br_stp_state=0)
            index = self._ip.link_lookup(ifname=self.name)[0]
            self._ip.addr("add", index=index, address=str(next(block.hosts())), prefixlen=PREFIX)
            self._ip.link("set", index=index, state="up")
        return index, block

    def _free_block(self) -> ipaddress.IPv4Network:
        messages = self._ip.get_addr(family=socket.AF_INET)
        taken = [ipaddress.ip_address(message.get_attr("IFA_ADDRESS")) for message in messages]
        for block in NETWORK.subnets(new_prefix=PREFIX):
            if isinstance(block, ipaddress.IPv4Network) and not any(address in block for address in taken):
                return block
        raise BpfsError(ENOSPC, f"no part of {NETWORK} is free for the cluster's network")

    def add_node(self, number: int) -> int:
        """Make a network namespace with one leg on the bridge; gives a descriptor of it.

        Raises:
            BpfsError: the network is full.
        """
        if number >= self._block.num_addresses - 3:
            raise BpfsError(ENOSPC, f"{self._block} has no address for node {number}")
        kernel.unshare(kernel.CLONE_NEWNET)
        try:
            namespace = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            inner = self._make_socket()
        finally:
            kernel.setns(self._home, kernel.CLONE_NEWNET)
        try:
            leg = self.leg(number)
            self._ip.link("add", ifname=leg, kind="veth", peer={"ifname": "eth0", "net_ns_fd": namespace})
            self._ip.link("set", ifname=leg, master=self._bridge, state="up")
            inner.link("set", index=inner.link_lookup(ifname="lo")[0], state="up")
            index = inner.link_lookup(ifname="eth0")[0]
            inner.addr("add", index=index, address=str(self._block[number + 2]), prefixlen=PREFIX)
            inner.link("set", index=index, state="up")
        finally:
            inner.close()
        return namespace

    def leg(self, number: int) -> str:
        """The name of a node's leg on this side: taking it down cuts the node off."""
        return f"{self.name}.{number}"

    def close(self) -> None:
        """Give the sockets back; the network stays."""
        self._ip.close()
        os.close(self._home)


def remove(mount: str) -> None:
    """Remove what is left of a cluster's network."""
    name = bridge_name(mount)
    if name not in os.listdir("/sys/class/net"):
        return
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        for leg in [leg for leg in os.listdir("/sys/class/net") if leg.startswith(name + ".")]:
            for index in ip.link_lookup(ifname=leg):
                ip.link("del", index=index)
        for index in ip.link_lookup(ifname=name):
            ip.link("del", index=index)

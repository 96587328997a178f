"""A booting node's own code in a network namespace: what phase 1 does between its drivers and kexec.

Arguments: a verb and its own; prints what it found, a word a line. Exit code 1 with a sentence where it fails.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from boot import manifest, pxe, rarp
from boot.errors import BootError
from boot.node import network, phase1
from boot.node.fetch import Server

ADDRESS = "10.54.0.1"
PORT = 933


def boot(public: str) -> None:
    """All of phase 1; prints digests, and the size of the image with what was put behind it."""
    kernel, image, _ = phase1.fetch(public.encode(), PORT)
    for fd in (kernel, image):
        data = os.pread(fd, 1 << 30, 0)
        print(hashlib.sha256(data).hexdigest(), len(data))
    print(data[-2000:].decode(errors="replace").count("proof "))


def ask(seconds: str) -> None:
    """RARP for a while; prints the address or nothing."""
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(0))
    signal.setitimer(signal.ITIMER_REAL, float(seconds))
    print(network.find_server().address)


def noise(count: str) -> None:
    """Frames that are no requests, and many that are from nobody."""
    network.set_up("eth0")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(rarp.ETHERTYPE)) as sock:
        sock.bind(("eth0", rarp.ETHERTYPE))
        deadline = time.monotonic() + 20
        for number in range(int(count)):
            good = rarp.request(bytes([2, *number.to_bytes(5, "big")]))
            bad = good[:12] + good[12:14] + os.urandom(number % 60)
            for frame in (good, bad[:1400]):
                while time.monotonic() < deadline:
                    try:
                        sock.send(frame)
                        break
                    except OSError:  # the queue is full, or the link not up yet
                        time.sleep(0.001)


def rom(kind: str, seconds: str) -> None:
    """Asks by DHCP as a network card's ROM does, until it is acknowledged; prints address and file."""
    vendor, architecture, user = {
        "bios": (b"PXEClient:Arch:00000:UNDI:002001", 0, b""), "uefi": (b"PXEClient:Arch:00007:UNDI:003016", 7, b""),
        "http": (b"HTTPClient:Arch:00016:UNDI:003001", 16, b""), "ipxe": (b"PXEClient", 0, b"iPXE"),
        "system": (b"MSFT 5.0", 0, b""),
    }[kind]  # fmt: skip
    network.set_up("eth0")
    with open("/sys/class/net/eth0/address") as file:
        mac = rarp.mac_bytes(file.read().strip())
    own = [(60, vendor), (93, architecture.to_bytes(2, "big"))] + ([(77, user)] if user else [])
    with pxe.bound("eth0", "", 68) as sock:
        sock.setblocking(True)
        offer = _exchange(sock, mac, [(53, b"\1"), *own], float(seconds))
        if offer is None:
            return
        address, server = offer[16:20], offer[20:24]
        acknowledged = _exchange(sock, mac, [(53, b"\3"), (50, address), (54, server), *own], float(seconds))
        assert acknowledged is not None and acknowledged[16:20] == address
        print(ipaddress.IPv4Address(address), acknowledged[108:236].rstrip(b"\0").decode())


def _exchange(sock: socket.socket, mac: bytes, options: list[tuple[int, bytes]], seconds: float) -> bytes | None:
    head = struct.pack(">BBBBIHH16s16s192x", 1, 1, 6, 0, 42, 0, 0x8000, bytes(16), mac)
    body = bytes([99, 130, 83, 99]) + b"".join(bytes([code, len(value)]) + value for code, value in options) + b"\xff"
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            sock.sendto(head + body, ("255.255.255.255", 67))
            sock.settimeout(min(0.25, left))
            return sock.recv(2048)
        except OSError:  # no answer; or the link is not up yet
            time.sleep(0.02)
    return None


def wake(seconds: str) -> None:
    """Waits for Wake-on-LAN; prints whom it is for."""
    network.set_up("eth0")
    with pxe.bound("eth0", "", 9) as sock:
        sock.settimeout(float(seconds))
        print("listening", flush=True)
        data = sock.recv(2048)
    assert data[:6] == b"\xff" * 6 and data[6:] == data[6:12] * 16
    print(rarp.mac_text(data[6:12]))


def tftp(address: str, name: str, seconds: str) -> None:
    """Fetches a file with blocks of 1400 bytes; prints its digest and size, or `nothing`."""
    network.set_up("eth0")
    network.configure("eth0", address, 24)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(float(seconds))
        request = b"\0\1" + name.encode() + b"\0octet\0tsize\x000\0blksize\x001400\0"
        sock.sendto(request, (ADDRESS, 69))
        content, block = b"", 0
        try:
            data, server = sock.recvfrom(2048)
            assert data.startswith(b"\0\6tsize\0") and b"blksize\x001400\0" in data
            size = int(data.split(b"\0")[2])
            while len(content) < size:
                sock.sendto(struct.pack(">HH", 4, block & 0xFFFF), server)
                data = sock.recv(2048)
                if data[:4] == struct.pack(">HH", 3, (block + 1) & 0xFFFF):
                    content, block = content + data[4:], block + 1
            sock.sendto(struct.pack(">HH", 4, block & 0xFFFF), server)
        except TimeoutError:
            print("nothing")
            return
    print(hashlib.sha256(content).hexdigest(), len(content))


def peers() -> None:
    """Who passes files on, by the server."""
    network.set_up("eth0")
    network.configure("eth0", "10.54.0.200", 24)
    print(Server(ADDRESS, PORT).text("/peers").decode())


def http(address: str, *requests: str) -> None:
    """Sends each as it is, after taking the address; prints the first line of the answer, or `nothing`."""
    network.set_up("eth0")
    network.configure("eth0", address, 24)
    for text in requests:
        with socket.create_connection((ADDRESS, PORT), 10) as sock:
            sock.sendall(text.encode("latin-1").decode("unicode_escape").encode("latin-1"))
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while data := sock.recv(65536):
                answer += data
            print(answer.split(b"\r\n")[0].decode(errors="replace") or "nothing")


def crowd(count: str, public: str) -> None:
    """Many nodes on one interface: prints when all had their address, when the last had all, and bytes."""
    network.set_up("eth0")
    start = time.monotonic()
    addresses = [_ask_as(number) for number in range(int(count))]
    asked = time.monotonic() - start
    network.configure("eth0", addresses[0], 24)
    for address in addresses[1:]:
        subprocess.run(["ip", "addr", "add", f"{address}/24", "dev", "eth0"], check=True)
    began, total = time.monotonic(), 0
    with ThreadPoolExecutor(len(addresses)) as pool:
        for size in pool.map(partial(_fetch_all, public.encode()), addresses):
            total += size
    print(asked, time.monotonic() - began, total)


def _ask_as(number: int) -> str:
    mac = bytes([0x52, 0x54, 0, 0, 0, number + 1])
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(rarp.ETHERTYPE)) as sock:
        sock.bind(("eth0", rarp.ETHERTYPE))
        sock.settimeout(0.25)
        # The bridge learns by the sender; answers to others' addresses come to a leg that takes everything.
        sock.setsockopt(263, 1, struct.pack("iHH8s", sock_index(), 1, 0, bytes(8)))  # PACKET_ADD_MEMBERSHIP, PROMISC
        while True:
            frame = rarp.request(mac)
            sock.send(frame)
            try:
                packet = rarp.parse(sock.recv(2048))
            except TimeoutError:
                continue
            if packet is not None and packet.operation is rarp.Operation.REPLY and packet.target == mac:
                return str(ipaddress.IPv4Address(packet.address))


def sock_index() -> int:
    """The number of eth0."""
    return socket.if_nametoindex("eth0")


def _fetch_all(key: bytes, address: str) -> int:
    def get(path: str, source: str = ADDRESS) -> bytes | int:
        with socket.create_connection((source, PORT), 60, (address, 0)) as sock:
            sock.sendall(f"GET /{path} HTTP/1.1\r\n\r\n".encode())
            buffer, size, text = bytearray(1 << 18), 0, b""
            while count := sock.recv_into(buffer):
                size += count
                if len(text) < 65536:
                    text += buffer[:count]
            return text.partition(b"\r\n\r\n")[2] if path in ("manifest", "peers") else size

    text = get("manifest")
    assert isinstance(text, bytes)
    listed = manifest.check(text, key, "manifest")
    found = get("peers")
    assert isinstance(found, bytes)
    source = random.choice(found.decode().split() or [ADDRESS])
    sizes = [get(manifest.Blob.parse(listed[what], what).name, source) for what in ("kernel", "image")]
    return sum(size for size in sizes if isinstance(size, int))


if __name__ == "__main__":
    try:
        verbs = {verb.__name__: verb for verb in (boot, ask, rom, tftp, wake, peers, noise, http, crowd)}
        verbs[sys.argv[1]](*sys.argv[2:])  # type: ignore[operator]
    except (BootError, OSError) as error:
        sys.exit(str(error))

"""A booting node's own code in a network namespace: what phase 1 does between its drivers and kexec.

Arguments: a verb and its own; prints what it found, a word a line. Exit code 1 with a sentence where it fails.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import time

from boot import manifest, rarp
from boot.errors import BootError
from boot.node import network, phase1

ADDRESS = "10.54.0.1"
PORT = 933


def boot(key: str) -> None:
    """All of phase 1; prints digests, and the size of the image with what was put behind it."""
    kernel, image, _ = phase1.fetch(manifest.boot_key(key.encode()), PORT)
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


if __name__ == "__main__":
    try:
        {"boot": boot, "ask": ask, "noise": noise, "http": http}[sys.argv[1]](*sys.argv[2:])
    except (BootError, OSError) as error:
        sys.exit(str(error))

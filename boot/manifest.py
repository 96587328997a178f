"""The texts that a node gets from the boot server, with their proof.

A text is lines of `keyword value`; the last one, `proof`, is the HMAC-SHA256 of all before with the boot key. That
key is derived from the cluster key, and is in the phase 1 image: so a node believes nobody but its own cluster's
master, while the image reveals nothing that would let anybody into the cluster.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from boot.errors import BootError

MOST = 65536
"""Bytes of the longest text that is believed."""


def boot_key(cluster_key: bytes) -> bytes:
    """The key that proves what the boot server says."""
    return hmac.new(cluster_key, b"bpfs boot server", hashlib.sha256).hexdigest().encode()


def signed(values: Mapping[str, str], key: bytes) -> bytes:
    """A text of these values with its proof."""
    text = "".join(f"{name} {value}\n" for name, value in values.items()).encode()
    return text + b"proof " + _proof(text, key) + b"\n"


def check(data: bytes, key: bytes, what: str) -> dict[str, str]:
    """The values of a text.

    Raises:
        BootError: the proof is wrong, or it is no such text.
    """
    text, found, proof = data.rpartition(b"proof ")
    if len(data) > MOST or not found or not hmac.compare_digest(proof, _proof(text, key) + b"\n"):
        raise BootError(f"the {what} is not signed with this cluster's key")
    lines = [line.partition(" ") for line in text.decode(errors="replace").splitlines()]
    return {name: value for name, _, value in lines}


def _proof(text: bytes, key: bytes) -> bytes:
    return hmac.new(key, text, hashlib.sha256).hexdigest().encode()


@dataclass(frozen=True, slots=True)
class Blob:
    """A file that the server has: kernel or image.

    Attributes:
        name: in the server's folder, and in its address.
        size: bytes.
        digest: SHA-256, in hexadecimal.
    """

    name: str
    size: int
    digest: str

    @classmethod
    def parse(cls, text: str, what: str) -> Blob:
        """Read `NAME SIZE DIGEST`. Raises BootError."""
        words = text.split()
        if len(words) != 3 or not words[1].isdigit() or len(words[2]) != 64 or "/" in words[0]:
            raise BootError(f"the manifest says nothing of use about the {what}")
        return cls(words[0], int(words[1]), words[2])

    def __str__(self) -> str:
        return f"{self.name} {self.size} {self.digest}"

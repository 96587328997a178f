"""The texts that a node gets from the boot server, with their proof.

A text is lines of `keyword value`; the last one, `proof`, is the signature of all before with the master's boot key,
whose public half is in the phase 1 image. The manifest has the digests of kernel and image. So a node believes nobody
but its own cluster's master, and what it boots from has no secret.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from boot import signature
from boot.errors import BootError

FILE = "manifest"
"""Its name in a folder of images."""

MOST = 65536
"""Bytes of the longest text that is believed."""


def signed(values: Mapping[str, str], sign: Callable[[bytes], bytes]) -> bytes:
    """A text of these values with its proof. Raises what `sign` does."""
    text = "".join(f"{name} {value}\n" for name, value in values.items()).encode()
    return text + b"proof " + sign(text) + b"\n"


def check(data: bytes, public: bytes, what: str) -> dict[str, str]:
    """The values of a text.

    Args:
        public: the public half of the boot key.

    Raises:
        BootError: the proof is wrong, or it is no such text.
    """
    text, found, proof = data.rpartition(b"proof ")
    if len(data) > MOST or not found or not proof.endswith(b"\n") or not signature.verify(text, proof[:-1], public):
        raise BootError(f"the {what} is not signed with this cluster's boot key")
    lines = [line.partition(" ") for line in text.decode(errors="replace").splitlines()]
    return {name: value for name, _, value in lines}


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

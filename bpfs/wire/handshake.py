"""Mutual proof of the cluster key: nobody says anything of interest before both sides have shown it.

    slave                               master
    Hello(nonce_s)            ->
                              <-        Challenge(nonce_m, HMAC("master", nonce_s, nonce_m))
    Join(HMAC("slave", …), …) ->
                              <-        Welcome | Refused

The role in the HMAC keeps a proof from being played back to its maker. A peer that sends anything else, or nothing
within `TIMEOUT`, is dropped by the caller.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from dataclasses import replace
from errno import EACCES
from pathlib import Path

from bpfs.errors import BpfsError, ConfigError, LinkClosed, ProtocolError
from bpfs.wire.link import Link
from bpfs.wire.messages import VERSION, Challenge, Hello, Join, Message, Refused, Welcome

TIMEOUT = 5.0
"""Seconds that a handshake may take: a loaded machine needs milliseconds."""

NONCE = 32
KEY_MIN = 16
"""Bytes of the shortest key: 128 bits."""


class RefusedByMaster(BpfsError):
    """The master proved the key and said no; `parked`: its closing of the connection means "try again at once"."""

    def __init__(self, reason: str, parked: bool) -> None:
        super().__init__(EACCES, reason)
        self.parked = parked


def make_key() -> bytes:
    """A new cluster key, as text that fits a line."""
    return os.urandom(32).hex().encode()


def read_key(path: Path) -> bytes:
    """The cluster key of a file.

    Raises:
        ConfigError: missing, too short, or readable to others than its owner.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            key = file.read(4096).strip()
    except OSError as error:
        raise ConfigError(f"cannot read the cluster key {path}: {error.strerror}") from None
    if mode & 0o077:
        raise ConfigError(f"the cluster key {path} can be read by others (mode {mode:o}); set it to 600")
    if len(key) < KEY_MIN:
        raise ConfigError(f"the cluster key {path} is shorter than {KEY_MIN} bytes")
    return key


def _proof(key: bytes, role: str, nonce_s: bytes, nonce_m: bytes) -> bytes:
    return hmac.new(key, b"bpfs %d " % VERSION + role.encode() + nonce_s + nonce_m, hashlib.sha256).digest()


def _expect_version(version: int) -> None:
    if version != VERSION:
        raise ProtocolError(f"speaks version {version} of the protocol, not {VERSION}")


async def admit(link: Link, key: bytes, hello: Hello) -> Join:
    """The master's side, from a received Hello on to a slave that has proved the key.

    Raises:
        ProtocolError: the peer is no slave of this cluster.
        LinkClosed: it went away.
    """
    if hello.version != VERSION:
        await link.notify(Refused(f"the master speaks version {VERSION} of the protocol, not {hello.version}", False))
    _expect_version(hello.version)
    if len(hello.nonce) != NONCE:
        raise ProtocolError("sent a bad nonce")
    nonce = os.urandom(NONCE)
    await link.notify(Challenge(VERSION, nonce, _proof(key, "master", hello.nonce, nonce)))
    try:
        join = await link.receive()
    except LinkClosed:
        # A slave goes without a word when our proof is not the one that its key gives.
        raise ProtocolError("went away when it had seen the master's proof: it has another cluster key") from None
    if not isinstance(join, Join) or not hmac.compare_digest(join.proof, _proof(key, "slave", hello.nonce, nonce)):
        raise ProtocolError("does not know the cluster key")
    return join


async def enter(link: Link, key: bytes, join: Join) -> Welcome:
    """The slave's side, whole; `join.proof` is filled in here.

    Raises:
        RefusedByMaster: with the master's reason.
        ProtocolError: the peer is no master of this cluster.
        LinkClosed: it went away (which a master does to slaves with a wrong key).
    """
    nonce = os.urandom(NONCE)
    await link.notify(Hello(VERSION, nonce))
    challenge = await link.receive()
    if isinstance(challenge, Refused):
        raise RefusedByMaster(challenge.reason, False)
    if not isinstance(challenge, Challenge):
        raise ProtocolError(f"answered with {type(challenge).__name__}")
    _expect_version(challenge.version)
    if not hmac.compare_digest(challenge.proof, _proof(key, "master", nonce, challenge.nonce)):
        raise ProtocolError("does not know the cluster key")
    await link.notify(replace(join, proof=_proof(key, "slave", nonce, challenge.nonce)))
    return _welcomed(await link.receive())


def _welcomed(answer: Message) -> Welcome:
    if isinstance(answer, Refused):
        raise RefusedByMaster(answer.reason, answer.parked)
    if not isinstance(answer, Welcome):
        raise ProtocolError(f"answered with {type(answer).__name__}")
    return answer

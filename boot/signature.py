"""The boot server's signature: RSA with PKCS #1 v1.5 and SHA-256 (RFC 8017, 8.2), made by openssl, checked here.

Phase 1 has the public half only, so it can lie on a stick, or be given to whoever asks by TFTP. Checking is one power
and one comparison: the whole encoded message is built and compared, and nothing is taken apart, which is where checkers
of this kind have gone wrong. The image needs no library for it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import subprocess
from pathlib import Path

from boot.errors import BootError

BITS = 3072
"""Of a new key: 128 bits of strength (NIST SP 800-57, part 1, table 2)."""

_EXPONENT = 65537
_SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420")  # DigestInfo of SHA-256, RFC 8017, 9.2, note 1
_BITS_LEAST, _BITS_MOST = 2048, 8192


def ensure_key(path: Path) -> None:
    """Make the private key where there is none.

    Raises:
        BootError: it cannot be made.
    """
    if path.exists():
        return
    key = _openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", f"rsa_keygen_bits:{BITS}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass  # somebody else has made one meanwhile
        temporary.unlink()
    except OSError as error:
        raise BootError(f"{path} cannot be made: {error.strerror}") from None


def public_key(path: Path) -> bytes:
    """The public half of a private key: its modulus, in hexadecimal.

    Raises:
        BootError: there is no such key, or it can be read by others.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise BootError(f"cannot read the boot key {path}: {error.strerror}") from None
    if mode & 0o077:
        raise BootError(f"the boot key {path} can be read by others; set its mode to 600")
    return _openssl("rsa", "-in", str(path), "-noout", "-modulus").strip().rpartition(b"=")[2].lower()


def sign(data: bytes, path: Path) -> bytes:
    """The signature, in hexadecimal.

    Raises:
        BootError: openssl is not there, or refuses.
    """
    return _openssl("dgst", "-sha256", "-sign", str(path), data=data).hex().encode()


def verify(data: bytes, signature: bytes, public: bytes) -> bool:
    """Whether the holder of the key has signed this.

    Args:
        signature, public: as `sign` and `public_key` give them.
    """
    try:
        modulus, number = int(public, 16), int(signature, 16)
    except ValueError:
        return False
    size = (modulus.bit_length() + 7) // 8
    if not _BITS_LEAST <= modulus.bit_length() <= _BITS_MOST or not 0 < number < modulus or len(signature) != 2 * size:
        return False
    tail = _SHA256_INFO + hashlib.sha256(data).digest()
    expected = b"\0\1" + b"\xff" * (size - len(tail) - 3) + b"\0" + tail
    return hmac.compare_digest(pow(number, _EXPONENT, modulus).to_bytes(size, "big"), expected)


def _openssl(*arguments: str, data: bytes = b"") -> bytes:
    try:
        run = subprocess.run(["openssl", *arguments], input=data, capture_output=True, check=True)
    except FileNotFoundError:
        raise BootError("openssl is not installed (package openssl)") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()[:1]
        raise BootError(f"openssl {arguments[0]} failed: {''.join(said)}") from None
    return run.stdout

"""Nothing on a node speaks TLS; trio only wants the names."""

from __future__ import annotations


class _Absent:
    pass


class SSLError(OSError):
    """As in ssl."""


class SSLWantReadError(SSLError):
    """As in ssl."""


class CertificateError(SSLError):
    """As in ssl."""


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Absent

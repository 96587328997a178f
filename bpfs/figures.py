"""Figures that a machine tells only when somebody asks: nodes/N/disk and nodes/N/netdev."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from errno import ENOENT

from bpfs.errors import BpfsError
from engine.linux.statfs import statfs

ROOT = "/"
"""The file system whose figures `disk` has: of a node that has booted, the memory that its root is in."""


def _disk() -> str:
    return "".join(f"{key} {value}\n" for key, value in statfs(ROOT).items())


def _netdev() -> str:
    with open("/proc/self/net/dev", encoding="ascii", errors="replace") as file:
        return file.read()


_FIGURES: Mapping[str, Callable[[], str]] = {"disk": _disk, "netdev": _netdev}


def figure(name: str) -> str:
    """One figure of this machine or node. Waits as long as its file system does.

    Raises:
        BpfsError: there is no such figure, or the kernel does not tell it.
    """
    try:
        return _FIGURES[name]()
    except KeyError:
        raise BpfsError(ENOENT, f"there is no figure {name!r}") from None
    except OSError as error:
        raise BpfsError(error.errno or ENOENT, f"{name}: {error.strerror}") from error

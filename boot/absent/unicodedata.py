"""Nothing on a node has names of hosts beyond ASCII; the codec for those only wants the names."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

unidata_version = "3.2.0"  # stringprep looks


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_: object) -> NoReturn:
        raise UnicodeError(f"a node has no unicodedata.{name}")

    return absent


class _Database:
    unidata_version = unidata_version

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        return __getattr__(name)


ucd_3_2_0 = _Database()

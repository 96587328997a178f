# SPDX-License-Identifier: GPL-2.0-or-later
"""The few text formats of the tree, and the one place where numbers and names are read.

One value; a list, a line each; ``key value`` lines. Writes mirror reads; the unit is in the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from errno import EINVAL
from functools import lru_cache
from pathlib import Path as FilePath

from bpfs.errors import BpfsError

ID_LIMIT = 2**32 - 2
"""Highest uid and gid: the one above, (uid_t)-1, means "no change" to chown(2)."""

_CANONICAL = re.compile(r"0|-?[1-9][0-9]{0,9}", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,10}", re.ASCII)


def value(content: object) -> str:
    """One value, one line."""
    return f"{content}\n"


def lines(items: Iterable[object]) -> str:
    """A list, a line an item."""
    return "".join(f"{item}\n" for item in items)


def key_values(items: Mapping[str, object] | Iterable[tuple[str, object]]) -> str:
    """``key value`` lines."""
    pairs = items.items() if isinstance(items, Mapping) else items
    return "".join(f"{key} {content}\n" for key, content in pairs)


def permissions(mode: int) -> str:
    """A mode as three octal digits."""
    return f"{mode & 0o777:03o}"


def parse_number(text: str, least: int, most: int, what: str = "number") -> int:
    """A decimal number from `least` to `most`, both included.

    Raises:
        BpfsError: EINVAL, with a sentence that names `what`, for all that is no plain decimal number in the range.
    """
    if _NUMBER.fullmatch(text) is None:
        raise BpfsError(EINVAL, f"'{text[:40]}' is not a {what}")
    number = int(text)
    if not least <= number <= most:
        raise BpfsError(EINVAL, f"{number} is out of range for a {what} ({least} to {most})")
    return number


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhd]?)", re.ASCII)


def parse_duration(text: str, least: float) -> float:
    """Seconds of a time like ``60``, ``60s``, ``1.5m``, ``2h`` or ``1d``.

    Raises:
        BpfsError: EINVAL, it is no time, or less than `least` seconds.
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        raise BpfsError(EINVAL, f"'{text[:40]}' is no time such as 60s, 5m or 1h")
    seconds = float(found[1]) * _UNITS[found[2] or "s"]
    if seconds < least:
        raise BpfsError(EINVAL, f"{text} is less than {least:g} s")
    return seconds


def number_of_name(name: str) -> int | None:
    """The number that a file name is, in its one way of writing it (``07`` and ``+7`` are no 7), or None."""
    return int(name) if _CANONICAL.fullmatch(name) else None


def parse_permissions(text: str) -> int:
    """A mode of one to four octal digits, at most 777.

    Raises:
        BpfsError: EINVAL.
    """
    if re.fullmatch(r"0?[0-7]{1,3}", text, re.ASCII) is None:
        raise BpfsError(EINVAL, f"'{text[:40]}' is not a mode like 111")
    return int(text, 8)


# Names of users and groups come from the files of the system and from nowhere else: a name service (NSS: LDAP, sssd, or
# one that looks into the tree) may wait for the network, or for /bpfs itself, which would wait for us. The files are
# read again when they changed.


@lru_cache(maxsize=2)
def _names_of(path: str, _version: tuple[int, int, int]) -> tuple[dict[str, int], dict[int, str]]:
    by_name: dict[str, int] = {}
    by_number: dict[int, str] = {}
    for line in FilePath(path).read_text(errors="replace").splitlines():
        fields = line.split(":")
        # passwd(5) and group(5) agree in their first three fields: name, password, number. The first of a number wins.
        if len(fields) >= 3 and _NUMBER.fullmatch(fields[2]):
            by_name.setdefault(fields[0], int(fields[2]))
            by_number.setdefault(int(fields[2]), fields[0])
    return by_name, by_number


def _names(path: str) -> tuple[dict[str, int], dict[int, str]]:
    try:
        found = FilePath(path).stat()
        return _names_of(path, (found.st_ino, found.st_mtime_ns, found.st_size))
    except OSError:
        return {}, {}


def user_name(uid: int) -> str:
    """The name of a user, or the number where it has none."""
    return _names("/etc/passwd")[1].get(uid, str(uid))


def group_name(gid: int) -> str:
    """The name of a group, or the number where it has none."""
    return _names("/etc/group")[1].get(gid, str(gid))


def parse_user(text: str) -> int:
    """A user by name or number.

    Raises:
        BpfsError: EINVAL where there is no such user.
    """
    found = _names("/etc/passwd")[0].get(text)
    return found if found is not None else _parse_id(text, "user")


def parse_group(text: str) -> int:
    """A group by name or number.

    Raises:
        BpfsError: EINVAL where there is no such group.
    """
    found = _names("/etc/group")[0].get(text)
    return found if found is not None else _parse_id(text, "group")


def _parse_id(text: str, what: str) -> int:
    if not text.isdigit():
        raise BpfsError(EINVAL, f"there is no {what} '{text[:40]}'")
    return parse_number(text, 0, ID_LIMIT, what)

"""What of the master's files nodes may see: names only, checked as text.

Paths that nodes ask for never contain symbolic links (the node's kernel follows those by itself) nor `..`, and are
resolved on the master without either; so a path is inside an export exactly when its text is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from glob import glob

DEFAULT = (
    *("/bin", "/sbin", "/lib", "/lib32", "/libx32", "/lib64", "/usr", "/opt"),
    *("/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.preload"),
    *("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/hosts", "/etc/host.conf", "/etc/resolv.conf"),
    *("/etc/services", "/etc/protocols", "/etc/networks", "/etc/gai.conf", "/etc/ethertypes", "/etc/mime.types"),
    *("/etc/localtime", "/etc/timezone", "/etc/locale.alias", "/etc/locale.conf", "/etc/default/locale"),
    *("/etc/profile", "/etc/profile.d", "/etc/bash.bashrc", "/etc/inputrc", "/etc/terminfo", "/etc/shells"),
    *("/etc/os-release", "/etc/debian_version", "/etc/lsb-release", "/etc/mtab", "/etc/login.defs"),
    *("/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/ca-certificates", "/etc/pki/tls/certs"),
    *("/etc/python3*", "/etc/perl", "/etc/java-*", "/etc/gcc", "/etc/fonts", "/etc/magic", "/etc/vim", "/etc/emacs"),
    *("/etc/bindresvport.blacklist", "/etc/rpc", "/etc/libaudit.conf", "/etc/OpenCL", "/etc/openmpi", "/etc/mpi"),
)
"""Programs, libraries, and what libc and common interpreters read at their start. `*` matches within one name."""

NEVER = (
    *("/root", "/proc", "/sys", "/dev", "/run", "/var/run", "/lost+found"),
    *("/etc/shadow*", "/etc/gshadow*", "/etc/sudoers", "/etc/sudoers.d", "/etc/security/opasswd"),
    *("/etc/ssl/private", "/etc/ssh/*_key", "/etc/pki/tls/private", "/etc/krb5.keytab", "/etc/beowulf"),
)
"""Not even where an export holds them."""

WRITABLE = frozenset({"tmp", "var", "run", "home", "root"})
"""Top directories that a node has of its own, to write in."""


class Exports:
    """The exports of one configuration.

    Args:
        patterns: absolute paths, `*` and `?` allowed; `DEFAULT` where there is none.
        hidden: more that is never shown: the cluster's own mount points and keys.
    """

    def __init__(self, patterns: Iterable[str] = (), hidden: Iterable[str] = ()) -> None:
        named = {"default": DEFAULT}
        words = [word for pattern in patterns or named for word in named.get(pattern, (pattern,))]
        self.patterns = tuple(word.rstrip("/") or "/" for word in words)
        self._shown = [_split(pattern) for pattern in self.patterns]
        never = [_split(pattern) for pattern in (*NEVER, *hidden)]
        # Asked for each name that anybody looks up: one match instead of a hundred.
        self._holds = _expression(self._shown, "(?:/.*)?")
        self._leads = _expression([pattern[:n] for pattern in self._shown for n in range(len(pattern))], "")
        self._hides = _expression(never, "(?:/.*)?")

    def shows(self, path: str) -> bool:
        """Whether a path, absolute and plain, is to be seen: in an export, or on the way to one."""
        return self.holds(path) or self.leads(path)

    def holds(self, path: str) -> bool:
        """Whether a path is an export or inside one."""
        plain = _plain(path)
        return self._holds.fullmatch(plain) is not None and self._hides.fullmatch(plain) is None

    def leads(self, path: str) -> bool:
        """Whether a path is a directory on the way to an export."""
        return self._leads.fullmatch(_plain(path)) is not None

    def tops(self) -> list[str]:
        """Where a node binds the view into its root: top directories, or within `WRITABLE` ones the exports."""
        found = set()
        for pattern in self._shown:
            depth = len(pattern) if pattern[:1] and pattern[0] in WRITABLE else 1
            found |= set(glob("/" + "/".join(pattern[:depth] or "*")))
        return sorted(path for path in found if self.shows(path) and self._hides.fullmatch(path) is None)


def _split(path: str) -> tuple[str, ...]:
    return tuple(word for word in path.split("/") if word)


def _plain(path: str) -> str:
    """Without slashes that say nothing; the root is empty."""
    return path if "//" not in path and path[-1:] != "/" else "".join(f"/{word}" for word in _split(path))


def _expression(patterns: Iterable[tuple[str, ...]], rest: str) -> re.Pattern[str]:
    """For the plain paths that begin as one of the patterns and go on as `rest`."""
    wild = {"*": "[^/]*", "?": "[^/]"}
    written = {"".join("/" + "".join(wild.get(c) or re.escape(c) for c in name) for name in p) for p in patterns}
    return re.compile(f"(?:{'|'.join(sorted(written))}){rest}" if written else "(?!)", re.DOTALL)

"""What of the master's files nodes may see: names only, checked as text.

Paths that nodes ask for never contain symbolic links (the node's kernel follows those by itself) nor `..`, and are
resolved on the master without either; so a path is inside an export exactly when its text is.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
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
        self._never = [_split(pattern) for pattern in (*NEVER, *hidden)]

    def shows(self, path: str) -> bool:
        """Whether a path, absolute and plain, is to be seen: in an export, or on the way to one."""
        return self.holds(path) or self.leads(path)

    def holds(self, path: str) -> bool:
        """Whether a path is an export or inside one."""
        words = _split(path)
        return any(_begins(words, pattern) for pattern in self._shown) and not self.hides(words)

    def leads(self, path: str) -> bool:
        """Whether a path is a directory on the way to an export."""
        words = _split(path)
        return any(len(p) > len(words) and _begins(p[: len(words)], words, swap=True) for p in self._shown)

    def hides(self, words: tuple[str, ...]) -> bool:
        """Whether it is among what is never shown."""
        return any(_begins(words, pattern) for pattern in self._never)

    def tops(self) -> list[str]:
        """Where a node binds the view into its root: top directories, or within `WRITABLE` ones the exports."""
        found = set()
        for pattern in self._shown:
            depth = len(pattern) if pattern[:1] and pattern[0] in WRITABLE else 1
            found |= set(glob("/" + "/".join(pattern[:depth] or "*")))
        return sorted(path for path in found if self.shows(path) and not self.hides(_split(path)))


def _split(path: str) -> tuple[str, ...]:
    return tuple(word for word in path.split("/") if word)


def _begins(words: tuple[str, ...], pattern: tuple[str, ...], swap: bool = False) -> bool:
    if len(words) < len(pattern):
        return False
    pairs = zip(pattern, words, strict=False) if swap else zip(words, pattern, strict=False)
    return all(fnmatchcase(name, wanted) for name, wanted in pairs)

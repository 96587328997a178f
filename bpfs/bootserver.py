"""The boot server's view of the configuration: machines and their numbers, and what a node is told."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from dataclasses import dataclass, field
from errno import ENODEV
from pathlib import Path

from boot.directory import Assign, Directory
from boot.reports import Report, Reporter
from bpfs import config as configuration
from bpfs import log
from bpfs.config import Config, NodeEntry
from bpfs.errors import BpfsError, ConfigError

_log = log.get("boot")

_FIXED = ("interface", "address", "port", "mount", "key", "bootkey", "pxe", "bootport", "bootimages")
"""Of the configuration: what holds until the end of the server."""

_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B  # linux/sockios.h


def interface_network(name: str) -> ipaddress.IPv4Interface:
    """Address and mask of an interface.

    Raises:
        BpfsError: ENODEV, there is no such interface, or it has no address: it may have one later.
    """
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for code in (_SIOCGIFADDR, _SIOCGIFNETMASK):
            try:
                answer = fcntl.ioctl(sock, code, struct.pack("256s", name.encode()[:15]))
            except OSError as error:
                raise BpfsError(ENODEV, f"interface {name} has no address: {error.strerror}") from None
            found.append(socket.inet_ntoa(answer[20:24]))
    return ipaddress.IPv4Interface("/".join(found))


@dataclass
class Desk:
    """Makes the boot server's directory from the configuration, again whenever the file is read again.

    Attributes:
        config: what holds now.
        path: the file, which `nodeassign append` adds lines to; None: there is none.
        key: the cluster key.
        reporter: told of new nodes.
    """

    config: Config
    path: Path | None
    key: bytes
    reporter: Reporter
    network: ipaddress.IPv4Interface = field(init=False)
    _numbers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.network = interface_network(self.config.interface)

    def read_again(self) -> Directory:
        """The directory by the file as it is now; by what held before where the file is wrong."""
        if self.path is not None:
            try:
                fresh = configuration.read(self.path)
                for name in _FIXED:
                    setattr(fresh, name, getattr(self.config, name))
                self.config = fresh
            except ConfigError as error:
                _log.error("the configuration stays as it was: %s", error)
        self._numbers = {mac: entry.number for entry in self.config.entries for mac in entry.macs}
        return Directory(
            numbers=self._numbers,
            address=self.config.address_for,
            assign=Assign(self.config.nodeassign),
            append=self._append,
            texts=self._text,
            command_line=self.config.kernelcommandline,
        )

    def _text(self, number: int) -> dict[str, str]:
        return {
            "node": str(number),
            "master": f"{self.config.address or self.network.ip}:{self.config.port}",
            "key": self.key.decode(errors="replace"),
            "mount": self.config.mount,
            "prefix": str(self.network.network.prefixlen),
            "hostname": f"n{number}",
            "seed": "yes" if number < self.config.bootpeers else "no",
            "bootport": str(self.config.bootport),
        }

    def _append(self, mac: str) -> int | None:
        taken = {entry.number for entry in self.config.entries}
        number = next((n for n in range(self.config.nodes) if n not in taken), None)
        if number is None or self.path is None or self.config.address_for(number) is None:
            return None
        try:
            _add_line(self.path, f"node {number} {mac}\n")
        except OSError as error:
            _log.error("no number for %s: %s cannot be written: %s", mac, self.path, error.strerror)
            return None
        self.config.entries.append(NodeEntry(number, (mac,)))
        self._numbers[mac] = number
        self.reporter.tell(Report.NEW, number, mac)
        _log.info("%s is node %d from now on", mac, number)
        return number


def _add_line(path: Path, line: str) -> None:
    # Whole or not at all, and never glued to a last line without an end.
    text = path.read_text(encoding="utf-8")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    mode = path.stat().st_mode & 0o777
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text + ("" if text.endswith("\n") or not text else "\n") + line)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)

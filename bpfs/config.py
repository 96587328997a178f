"""The configuration file: /etc/beowulf/config, in the ClusterWare manner.

A keyword a line with its arguments, ``#`` starts a comment, words may be quoted as in a shell. The keywords are one
table, `KEYWORDS`; an unknown one is an error that names file, line and the nearest known keyword. The virtual
cluster needs no file.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bpfs.errors import ConfigError
from bpfs.fstab import Policy, parse_policy

DEFAULT_PATH = Path("/etc/beowulf/config")
DEFAULT_KEY = Path("/etc/beowulf/key")
DEFAULT_STATE = Path("/var/lib/bpfs")
DEFAULT_PORT = 932
"""`bprocport` of Scyld's configuration: the port its bpmaster listened on."""
DEFAULT_LEASE = 30.0
"""Seconds that a slave lives on without hearing from the master."""
DEFAULT_ONLOST = 30.0
"""Seconds that a real node looks for a lost master before it does what `onlost` says."""
DEFAULT_NODES = 1024
DEFAULT_BOOTPORT = 933
"""TCP port from which nodes fetch their images: beside `DEFAULT_PORT`, and one that only root can listen on."""
DEFAULT_BOOTPEERS = 8
DEFAULT_BOOTIMAGES = Path("/var/lib/beowulf/boot")
DEFAULT_NODEUP = Path("/etc/beowulf/node_up.d")
DEFAULT_NODEDOWN = Path("/etc/beowulf/node_down.d")
WOL = ("wol",)
DEFAULT_FSTAB = Path("/etc/beowulf/fstab")
DEFAULT_NODEPARALLEL = 16
DEFAULT_COMMAND_LINE = "panic=10 quiet"
"""A node whose kernel panics starts again after 10 s."""
DEFAULT_CACHE_SIZE = 1 << 30
"""Bytes of a node's object store: programs and libraries of a large job take a tenth of it."""
DEFAULT_PRECOPY = 32 << 20  # below it a freeze with all the memory is as short: tests/benchmarks/bench_precopy.py
DEFAULT_CONTENT_LIMIT = 64 << 20
MOST_CONTENT = 192 << 20
"""What is read into an image's description, whose most is engine.image.MAX_META, with room for the rest of it."""


DEFAULT_NODETIMEOUT = 60.0
"""Seconds: a busy machine may take many to make a process, and who waits can be killed at any time."""
DEFAULT_FANOUT = 64
"""Nodes to which each passes an image on: tests/benchmarks/bench_images.py."""
DEFAULT_TREE_TIMEOUT = 2.0
"""Seconds: a node answers within some milliseconds, and within a tenth of a second where it has to wait itself."""
LEAST_TREE_TIMEOUT = 0.5
DEFAULT_PSVIEW = 128
PSVIEW_MOST = 4096
"""Three mounts a ghost: 128 cost an `unshare -m` 1.5 ms, 4096 some 50 ms, and three descriptors."""


@dataclass(frozen=True, slots=True)
class NodeEntry:
    """One `node` line: a number and the hardware addresses that get it."""

    number: int
    macs: tuple[str, ...]


@dataclass(slots=True)
class Config:
    """What the file says, or the defaults."""

    interface: str = ""  # listen on this interface's address; empty: the host's own choice (all)
    address: str = ""  # listen on this address; comes before `interface`
    port: int = DEFAULT_PORT
    nodes: int = DEFAULT_NODES  # node numbers go from 0 to this - 1
    ranges: list[tuple[str, str]] = field(default_factory=list)  # first and last address for nodes
    entries: list[NodeEntry] = field(default_factory=list)
    lease: float = DEFAULT_LEASE  # seconds
    pingtimeout: float | None = None  # seconds of silence after which a node is down; None: lease + margin
    onlost: str = "reboot"  # one of ONLOST
    onlost_after: float = DEFAULT_ONLOST  # seconds
    key: Path = DEFAULT_KEY
    bootkey: Path | None = None  # signs what nodes boot; None: beside the cluster key
    mount: str = "/bpfs"
    bootserver: bool = False  # bpmaster starts bpbootd
    bootpeers: int = DEFAULT_BOOTPEERS  # nodes from 0 on that pass kernel and image on
    pxe: bool = False  # bpbootd answers network ROMs by DHCP, on `interface`
    bootport: int = DEFAULT_BOOTPORT
    bootimages: Path = DEFAULT_BOOTIMAGES
    nodeassign: str = "manual"  # one of NODEASSIGN
    kernelcommandline: str = DEFAULT_COMMAND_LINE
    state: Path | None = None  # what administrators set on nodes; None: below DEFAULT_STATE, named after the mount
    nodeup: Path = DEFAULT_NODEUP
    nodedown: Path = DEFAULT_NODEDOWN
    powercontrol: tuple[str, ...] = WOL  # the command that switches machines; WOL: Wake-on-LAN; empty: none
    fstab: Path = DEFAULT_FSTAB  # local disks and network file systems of nodes
    mkfs: Policy = Policy.NEVER
    fsck: Policy = Policy.IF_NEEDED
    nodeparallel: int = DEFAULT_NODEPARALLEL  # nodes whose steps run at once
    exports: list[str] = field(default_factory=list)  # what nodes without files of their own see; empty: the default
    prestage: list[str] = field(default_factory=list)  # what such nodes fetch when they come up
    libraries: list[str] = field(default_factory=list)  # libraries, and folders whose libraries, they fetch as well
    cachesize: int = DEFAULT_CACHE_SIZE  # bytes that a node may keep of it
    precopy: int | None = DEFAULT_PRECOPY  # bytes of memory from which on it is sent ahead; None: never
    compress: bool = True  # memory on its way, where the link is what it waits for
    contentlimit: int = DEFAULT_CONTENT_LIMIT  # bytes of open files without a name that travel with a process
    nodetimeout: float = DEFAULT_NODETIMEOUT  # seconds for a node to answer, before what it was asked for has failed
    fanout: int = DEFAULT_FANOUT  # nodes to which each passes an image on; 0: all have it from the master
    tree_timeout: float = DEFAULT_TREE_TIMEOUT  # seconds of silence after which a node asks another for an image
    strict: tuple[range, ...] = ()  # nodes whose jobs are strict
    psview: int = DEFAULT_PSVIEW  # ghosts up to which everybody's ps shows what is on nodes; 0: never

    @property
    def margin(self) -> float:
        """Seconds that the master waits beyond the lease: a tenth of it (clock rates, scheduling), at least one."""
        return max(1.0, self.lease / 10)

    @property
    def silence(self) -> float:
        """Seconds of silence after which the master takes a node for dead, its lease surely over."""
        return self.pingtimeout if self.pingtimeout is not None else self.lease + self.margin

    @property
    def boot_key(self) -> Path:
        """The private key that signs what nodes boot."""
        return self.bootkey or self.key.with_name("bootkey")

    @property
    def heartbeat(self) -> float:
        """Seconds between a slave's heartbeats: one may be late by two of them."""
        return min(self.lease / 3, 10.0)

    def number_for(self, macs: tuple[str, ...]) -> int | None:
        """The number that the configuration gives to these hardware addresses, or None."""
        for entry in self.entries:
            if any(mac in entry.macs for mac in macs):
                return entry.number
        return None

    def address_for(self, number: int) -> str | None:
        """The address that `iprange` has for a number: the ranges are counted through; None where they end before."""
        for first, last in self.ranges:
            low, high = ipaddress.ip_address(first), ipaddress.ip_address(last)
            size = int(high) - int(low) + 1
            if number < size:
                return str(low + number)
            number -= size
        return None


ONLOST = ("wait", "reboot", "halt", "continue")
"""What a real node does, its jobs being dead, when it has not found its master for a time."""

NODEASSIGN = ("append", "manual", "locked")
"""Of a machine that asks and is no node: it gets the next number, is listed in boot/unknown, or is ignored."""


# -- the keywords: one table -----------------------------------------------------------------------

Apply = Callable[[Config, list[str]], None]


@dataclass(frozen=True, slots=True)
class Keyword:
    """A keyword of the file.

    Attributes:
        usage: its arguments as the manual shows them.
        least, most: how many arguments it takes.
        apply: checks the arguments and enters them; raises ValueError with a sentence.
        help: one line.
    """

    usage: str
    least: int
    most: int
    apply: Apply
    help: str


def _number(text: str, least: int, most: int, what: str) -> int:
    if not (text.isascii() and text.isdigit()) or not least <= int(text) <= most:
        raise ValueError(f"{what} must be a number from {least} to {most}, not {text!r}")
    return int(text)


def _seconds(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.1 <= value <= 86400:
        raise ValueError(f"{what} must be seconds from 0.1 to 86400, not {text!r}")
    return value


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError(f"{text!r} is no network address") from None


_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def _mac(text: str) -> str:
    if not _MAC.fullmatch(text.lower()):
        raise ValueError(f"{text!r} is no hardware address")
    return text.lower()


def _interface(config: Config, args: list[str]) -> None:
    config.interface = args[0]


def _nodes(config: Config, args: list[str]) -> None:
    config.nodes = _number(args[0], 1, 100000, "nodes")


def _iprange(config: Config, args: list[str]) -> None:
    first, last = _address(args[0]), _address(args[-1])
    if (":" in first) != (":" in last):
        raise ValueError(f"{first} and {last} are not of the same kind")
    if int(ipaddress.ip_address(first)) > int(ipaddress.ip_address(last)):
        raise ValueError(f"{first} comes after {last}")
    config.ranges.append((first, last))


def _node(config: Config, args: list[str]) -> None:
    numbered = args[0].isdigit()
    number = int(args[0]) if numbered else max((entry.number for entry in config.entries), default=-1) + 1
    macs = tuple(_mac(word) for word in args[numbered:] if word != "off")
    if any(entry.number == number for entry in config.entries):
        raise ValueError(f"node {number} is there already")
    taken = {mac: entry.number for entry in config.entries for mac in entry.macs}
    for mac in macs:
        if mac in taken:
            raise ValueError(f"{mac} belongs to node {taken[mac]} already")
    config.entries.append(NodeEntry(number, macs))


def _bprocport(config: Config, args: list[str]) -> None:
    config.port = _number(args[0], 0, 65535, "bprocport")


def _lease(config: Config, args: list[str]) -> None:
    config.lease = _seconds(args[0], "lease")


def _pingtimeout(config: Config, args: list[str]) -> None:
    config.pingtimeout = _seconds(args[0], "pingtimeout")


def _onlost(config: Config, args: list[str]) -> None:
    config.onlost = _one_of(args[0], ONLOST, "onlost")
    if len(args) > 1:
        config.onlost_after = _seconds(args[1], "onlost")


def _key(config: Config, args: list[str]) -> None:
    config.key = Path(args[0])


def _bootkey(config: Config, args: list[str]) -> None:
    config.bootkey = Path(args[0])


def _mount(config: Config, args: list[str]) -> None:
    if not args[0].startswith("/"):
        raise ValueError(f"the mount point must be an absolute path, not {args[0]!r}")
    config.mount = args[0]


def _bootserver(config: Config, args: list[str]) -> None:
    config.bootserver = _one_of(args[0], ("yes", "no"), "bootserver") == "yes"


def _bootpeers(config: Config, args: list[str]) -> None:
    config.bootpeers = _number(args[0], 0, 1000, "bootpeers")


def _pxe(config: Config, args: list[str]) -> None:
    # Named once more, so that nobody has a second DHCP server by a slip.
    if args[0] not in ("no", config.interface):
        raise ValueError(f"{args[0]!r} is not the cluster's `interface`, {config.interface!r}, which is named before")
    config.pxe = args[0] != "no"


def _bootport(config: Config, args: list[str]) -> None:
    config.bootport = _number(args[0], 1, 65535, "bootport")


def _bootimages(config: Config, args: list[str]) -> None:
    config.bootimages = Path(args[0])


def _nodeassign(config: Config, args: list[str]) -> None:
    config.nodeassign = _one_of(args[0], NODEASSIGN, "nodeassign")


def _kernelcommandline(config: Config, args: list[str]) -> None:
    config.kernelcommandline = " ".join(args)


def _nodeup(config: Config, args: list[str]) -> None:
    config.nodeup = Path(args[0])


def _nodedown(config: Config, args: list[str]) -> None:
    config.nodedown = Path(args[0])


def _powercontrol(config: Config, args: list[str]) -> None:
    if args[0] not in ("wol", "no") and not args[0].startswith("/"):
        raise ValueError(f"powercontrol must be wol, no, or the absolute path of a program, not {args[0]!r}")
    config.powercontrol = () if args == ["no"] else tuple(args)


def _fstab(config: Config, args: list[str]) -> None:
    config.fstab = Path(args[0])


def _mkfs(config: Config, args: list[str]) -> None:
    config.mkfs = parse_policy(args[0])


def _fsck(config: Config, args: list[str]) -> None:
    config.fsck = parse_policy(args[0])


def _nodeparallel(config: Config, args: list[str]) -> None:
    config.nodeparallel = _number(args[0], 1, 1000, "nodeparallel")


def _one_of(word: str, known: tuple[str, ...], what: str) -> str:
    if word not in known:
        raise ValueError(f"{what} must be one of {' '.join(known)}, not {word!r}")
    return word


def _state(config: Config, args: list[str]) -> None:
    config.state = Path(args[0])


def _export(config: Config, args: list[str]) -> None:
    for path in args:
        if path != "default" and not path.startswith("/"):
            raise ValueError(f"an export must be an absolute path, not {path!r}")
        if ".." in path.split("/") or "\0" in path:
            raise ValueError(f"an export must be a plain path, not {path!r}")
    config.exports += args


def _prestage(config: Config, args: list[str]) -> None:
    config.prestage += _fetched(args)


def _libraries(config: Config, args: list[str]) -> None:
    config.libraries += _fetched(args)


def _fetched(paths: list[str]) -> list[str]:
    for path in paths:
        if not path.startswith("/"):
            raise ValueError(f"what is to be fetched must be an absolute path, not {path!r}")
    return paths


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of a text like 500M. Raises ValueError with a sentence."""
    match = re.fullmatch(r"(\d{1,12})([KMGT]?)", text, re.ASCII | re.IGNORECASE)
    if match is None:
        raise ValueError(f"a size is a number of bytes, or of K, M, G or T, not {text!r}")
    return int(match[1]) * _UNITS[match[2].upper()]


def _cachesize(config: Config, args: list[str]) -> None:
    config.cachesize = parse_size(args[0])


def parse_precopy(text: str) -> int | None:
    """What `precopy` says. Raises ValueError with a sentence."""
    return None if text == "off" else parse_size(text)


def _precopy(config: Config, args: list[str]) -> None:
    config.precopy = parse_precopy(args[0])


def _compress(config: Config, args: list[str]) -> None:
    config.compress = _one_of(args[0], ("auto", "off"), "compress") == "auto"


def _contentlimit(config: Config, args: list[str]) -> None:
    config.contentlimit = parse_size(args[0])
    if config.contentlimit > MOST_CONTENT:
        raise ValueError(f"contentlimit must be at most {MOST_CONTENT >> 20}M, not {args[0]}")


def _nodetimeout(config: Config, args: list[str]) -> None:
    config.nodetimeout = _seconds(args[0], "nodetimeout")


def _imagetree(config: Config, args: list[str]) -> None:
    config.fanout = 0 if args[0] == "off" else _number(args[0], 1, 1000, "imagetree")
    if len(args) > 1:
        config.tree_timeout = _seconds(args[1], "imagetree")
        if config.tree_timeout < LEAST_TREE_TIMEOUT:
            raise ValueError(f"imagetree must have at least {LEAST_TREE_TIMEOUT:g} seconds, not {args[1]}")


def _strict(config: Config, args: list[str]) -> None:
    if args in (["all"], ["none"]):
        config.strict = (range(1 << 31),) if args == ["all"] else ()
        return
    found = [re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part, re.ASCII) for word in args for part in word.split(",")]
    spans = [range(int(match[1]), int(match[2] or match[1]) + 1) for match in found if match is not None]
    if len(spans) < len(found) or not all(spans):
        raise ValueError(f"strict takes all, none, or numbers of nodes, as 0-3,7, not {' '.join(args)!r}")
    config.strict = tuple(spans)


def _psview(config: Config, args: list[str]) -> None:
    config.psview = 0 if args[0] == "off" else _number(args[0], 0, PSVIEW_MOST, "psview")


KEYWORDS = {
    "interface": Keyword("NAME", 1, 1, _interface, "network interface of the cluster's private network"),
    "nodes": Keyword("COUNT", 1, 1, _nodes, "how many nodes there may be; numbers go from 0 to COUNT - 1"),
    "iprange": Keyword("FIRST [LAST]", 1, 2, _iprange, "addresses for nodes, in order of their numbers"),
    "node": Keyword("[NUMBER] MAC...", 1, 9, _node, "hardware addresses of a node; `off` keeps a number free"),
    "bprocport": Keyword("PORT", 1, 1, _bprocport, f"TCP port of bpmaster (default {DEFAULT_PORT})"),
    "lease": Keyword("SECONDS", 1, 1, _lease, f"how long a node lives without the master (default {DEFAULT_LEASE:g})"),
    "pingtimeout": Keyword("SECONDS", 1, 1, _pingtimeout, "silence after which a node is down; more than the lease"),
    "onlost": Keyword(
        "wait|reboot|halt|continue [SECONDS]", 1, 2, _onlost, "what a node does without its master (reboot 30)"
    ),
    "key": Keyword("FILE", 1, 1, _key, f"the cluster key (default {DEFAULT_KEY})"),
    "bootkey": Keyword("FILE", 1, 1, _bootkey, "the key that signs what nodes boot (default bootkey, beside key)"),
    "export": Keyword("PATH...", 1, 999, _export, "what nodes without files of their own see; `default`: programs"),
    "prestage": Keyword("PATH...", 1, 999, _prestage, "files and directories that such nodes fetch when they come up"),
    "libraries": Keyword("PATH...", 1, 999, _libraries, "libraries, or folders with them, that such nodes fetch then"),
    "cachesize": Keyword("SIZE", 1, 1, _cachesize, "bytes that such a node keeps of it, as 500M (default 1G)"),
    "precopy": Keyword("SIZE|off", 1, 1, _precopy, "memory of a process from which on it moves while it runs (32M)"),
    "compress": Keyword("auto|off", 1, 1, _compress, "memory of moving processes, where links are slow (auto)"),
    "contentlimit": Keyword(
        "SIZE", 1, 1, _contentlimit, "bytes of open, deleted files and memfds that move with a process (64M)"
    ),
    "nodetimeout": Keyword(
        "SECONDS", 1, 1, _nodetimeout, f"for a node's answer; then what was asked for fails ({DEFAULT_NODETIMEOUT:g})"
    ),
    "imagetree": Keyword(
        "COUNT|off [SECONDS]",
        1,
        2,
        _imagetree,
        f"nodes to which each passes an image on, and its patience ({DEFAULT_FANOUT} {DEFAULT_TREE_TIMEOUT:g})",
    ),
    "strict": Keyword("all|none|NODE...", 1, 999, _strict, "nodes whose jobs are strict, as 0-3,7 (none); see bpfs(5)"),
    "psview": Keyword("COUNT|off", 1, 1, _psview, f"ghosts up to which any ps shows what nodes do ({DEFAULT_PSVIEW})"),
    "mount": Keyword("PATH", 1, 1, _mount, "where the tree is mounted (default /bpfs)"),
    "bootserver": Keyword("yes|no", 1, 1, _bootserver, "whether bpmaster starts bpbootd, too (default no)"),
    "bootpeers": Keyword("COUNT", 1, 1, _bootpeers, f"nodes that pass images on to others ({DEFAULT_BOOTPEERS})"),
    "pxe": Keyword("INTERFACE|no", 1, 1, _pxe, "where bpbootd answers PXE, UEFI and iPXE by DHCP, too (default no)"),
    "bootport": Keyword("PORT", 1, 1, _bootport, f"TCP port of bpbootd (default {DEFAULT_BOOTPORT})"),
    "bootimages": Keyword("FOLDER", 1, 1, _bootimages, f"where images are (default {DEFAULT_BOOTIMAGES})"),
    "nodeassign": Keyword("append|manual|locked", 1, 1, _nodeassign, "what becomes of unknown machines (manual)"),
    "kernelcommandline": Keyword(
        "WORD...", 1, 99, _kernelcommandline, f"for the kernel of nodes (default {DEFAULT_COMMAND_LINE})"
    ),
    "state": Keyword("FILE", 1, 1, _state, f"settings of nodes that outlast bpmaster (default below {DEFAULT_STATE})"),
    "nodeup": Keyword("FOLDER", 1, 1, _nodeup, f"steps before a node is up (default {DEFAULT_NODEUP})"),
    "nodedown": Keyword("FOLDER", 1, 1, _nodedown, f"steps before it is taken down (default {DEFAULT_NODEDOWN})"),
    "powercontrol": Keyword(
        "wol|no|PROGRAM [WORD...]", 1, 99, _powercontrol, "how `up` starts a machine that is off: PROGRAM on NODE (wol)"
    ),
    "fstab": Keyword("FILE", 1, 1, _fstab, f"file systems of nodes, see bpmount(8) (default {DEFAULT_FSTAB})"),
    "mkfs": Keyword("never|if_needed|always", 1, 1, _mkfs, "when local file systems are made (never)"),
    "fsck": Keyword("never|if_needed|always", 1, 1, _fsck, "when local file systems are checked (if_needed)"),
    "nodeparallel": Keyword("COUNT", 1, 1, _nodeparallel, f"nodes in their steps at once ({DEFAULT_NODEPARALLEL})"),
}
"""Every keyword of /etc/beowulf/config."""


def parse(text: str, name: str) -> Config:
    """Read the text of a configuration file.

    Args:
        name: the file's name, for messages.

    Raises:
        ConfigError: naming file and line.
    """
    config = Config()
    for number, line in enumerate(text.splitlines(), 1):
        apply_line(config, line, f"{name}:{number}")
    if config.pingtimeout is not None and config.pingtimeout <= config.lease:
        raise ConfigError(f"{name}: pingtimeout ({config.pingtimeout:g}) must be more than lease ({config.lease:g})")
    return config


def apply_line(config: Config, line: str, where: str) -> None:
    """Enter one line. Raises ConfigError, which begins with `where`."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise ConfigError(f"{where}: {str(error).lower()}") from None
    if words:
        _apply(config, words[0], words[1:], where)


def _apply(config: Config, name: str, args: list[str], where: str) -> None:
    keyword = KEYWORDS.get(name)
    if keyword is None:
        near = difflib.get_close_matches(name, KEYWORDS, 1, 0.0)
        raise ConfigError(f"{where}: unknown keyword {name!r}; the nearest known one is {near[0]!r}")
    if not keyword.least <= len(args) <= keyword.most:
        raise ConfigError(f"{where}: write: {name} {keyword.usage}")
    try:
        keyword.apply(config, args)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def read(path: Path) -> Config:
    """Read a configuration file.

    Raises:
        ConfigError: it cannot be read, or is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no UTF-8 text") from None
    return parse(text, str(path))

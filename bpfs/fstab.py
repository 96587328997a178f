# SPDX-License-Identifier: GPL-2.0-or-later
"""The file systems of nodes: /etc/beowulf/fstab, in the format of fstab(5), and what a node has to do for it.

`$MASTER` and `$NODE` are replaced. Options that begin with `x-bpfs.` are ours, and say for one line what the
configuration says for all: `x-bpfs.mkfs=always`. What is to be done becomes one script for the node's /bin/sh, whose
functions are below; it may be run again at any time.
"""

from __future__ import annotations

import enum
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bpfs.errors import ConfigError


class Policy(enum.Enum):
    """When a local file system is made, or checked."""

    NEVER = "never"
    IF_NEEDED = "if_needed"  # made: the device has nothing on it; checked: it was not unmounted, or is due
    ALWAYS = "always"


class Kind(enum.Enum):
    """How a line is treated, and so the function of the script."""

    DISK = "disk"
    SWAP = "swap"
    OTHER = "other"  # of the network, or of memory


_MAKE = {
    "ext2": "-q -F", "ext3": "-q -F", "ext4": "-q -F", "xfs": "-q -f", "btrfs": "-q -f", "f2fs": "-q -f", "vfat": "",
}  # fmt: skip
"""Types of local file systems, and the options with which their mkfs neither asks nor talks."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line."""

    device: str
    point: str
    type: str
    options: str
    mkfs: Policy
    fsck: Policy

    @property
    def kind(self) -> Kind:
        """How it is treated."""
        return Kind.SWAP if self.type == "swap" else Kind.DISK if self.type in _MAKE else Kind.OTHER


def find(path: Path, node: int) -> Path | None:
    """The file of a node: `fstab.N`, or else the one for all; None where there is none."""
    own = path.with_name(f"{path.name}.{node}")
    return next((it for it in (own, path) if it.exists()), None)


def read(path: Path, values: Mapping[str, str], mkfs: Policy, fsck: Policy) -> list[Entry]:
    """The lines of a file.

    Args:
        values: what replaces `$NAME`.
        mkfs, fsck: for lines that say nothing else.

    Raises:
        ConfigError: naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            entries.append(_entry([_replaced(word, values) for word in words], mkfs, fsck))
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: {error}") from None
    return entries


def _entry(words: Sequence[str], mkfs: Policy, fsck: Policy) -> Entry:
    if not 3 <= len(words) <= 6:
        raise ValueError("write: DEVICE DIRECTORY TYPE [OPTIONS [0 0]]")
    device, point, kind = words[:3]
    policies, options = {"mkfs": mkfs, "fsck": fsck}, []
    for option in words[3].split(",") if len(words) > 3 else ["defaults"]:
        if not option.startswith("x-bpfs."):
            options.append(option)
            continue
        name, _, value = option.removeprefix("x-bpfs.").partition("=")
        if name not in policies:
            raise ValueError(f"{option!r} is no option: x-bpfs.mkfs= or x-bpfs.fsck=")
        policies[name] = parse_policy(value)
    if kind != "swap" and (not point.startswith("/") or point == "/" or ".." in point.split("/")):
        raise ValueError(f"{point!r} is no directory of a node")
    return Entry(device, point, kind, ",".join(options) or "defaults", policies["mkfs"], policies["fsck"])


def parse_policy(text: str) -> Policy:
    """The policy of this name. Raises ValueError with a sentence."""
    try:
        return Policy(text)
    except ValueError:
        raise ValueError(f"{text!r} is none of {' '.join(it.value for it in Policy)}") from None


def _replaced(word: str, values: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in values:
            raise ValueError(f"${name} is nothing here; known: {' '.join('$' + it for it in values)}")
        return values[name]

    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, word)


# -- what the node does ----------------------------------------------------------------------------

_FUNCTIONS = r"""
fail() { echo "$*"; exit 1; }
own() { # a virtual node's disks are the master's
    [ "$FORCE" ] || [ "$(cat /proc/sys/kernel/random/boot_id)" != "$MASTER_BOOT" ] ||
        fail "$1: this node is on the master's own machine, and so is the disk (--force takes it all the same)"
    [ -b "$1" ] || fail "$1: there is no such block device"
}
found() { blkid -c /dev/null -p -o value -s TYPE "$1"; } # empty: nothing is on it
make() { # DEVICE TYPE POLICY COMMAND...
    device=$1 type=$2 policy=$3; shift 3
    has=$(found "$device") || has=
    case $policy in
    never) return ;;
    if_needed)
        [ "$has" != "$type" ] || return 0
        # Something unknown may be somebody's: only what is empty is overwritten unasked.
        [ -z "$has" ] && [ -z "$(blkid -c /dev/null -p -o value -s PTTYPE "$device")" ] ||
            fail "$device: it has ${has:-a partition table}, not $type: x-bpfs.mkfs=always overwrites that"
    esac
    echo "$device: making $type"
    "$@" "$device" || fail "$device: $1 failed"
}
disk() { # DEVICE POINT TYPE OPTIONS MKFS FSCK MKFS_OPTIONS FSCK_OPTIONS
    if mountpoint -q "$2"; then echo "$2 is mounted already"; return; fi
    own "$1"
    make "$1" "$3" "$5" "mkfs.$3" $7
    if [ "$6" != never ]; then
        code=0; "fsck.$3" $8 "$1" || code=$?
        [ "$code" -lt 4 ] || fail "$1: fsck.$3 ended with $code"
    fi
    attach "$1" "$2" "$3" "$4"
}
swap() { # DEVICE OPTIONS MKFS
    if grep -q "^$(readlink -f "$1") " /proc/swaps; then echo "$1 is in use already"; return; fi
    own "$1"
    make "$1" swap "$3" mkswap
    swapon "$1" || fail "$1: it cannot be used for swap"
    echo "$1: swap"
}
other() { # DEVICE POINT TYPE OPTIONS
    if mountpoint -q "$2"; then echo "$2 is mounted already"; return; fi
    attach "$@"
}
attach() {
    mkdir -p "$2" || fail "$2: it cannot be made"
    mount -t "$3" -o "$4" "$1" "$2" || fail "$2: $1 cannot be mounted"
    echo "$2: $1"
}
detach() { # POINT
    mountpoint -q "$1" || return 0
    umount "$1" && echo "$1: unmounted" || failed="$1: it cannot be unmounted"
}
swap_off() { # DEVICE
    grep -q "^$(readlink -f "$1") " /proc/swaps || return 0
    swapoff "$1" && echo "$1: no swap any more" || failed="$1: it is still swap"
}
failed=
"""


def mount_script(entries: Sequence[Entry], boot: str, force: bool = False) -> str:
    """Makes, checks and mounts all, in order; the first failure ends it, with a sentence as its last line.

    Args:
        boot: the master's boot id: disks of its own machine are not touched.
        force: they are.
    """
    lines = [_FUNCTIONS, f"MASTER_BOOT={shlex.quote(boot)}", f"FORCE={'yes' if force else ''}"]
    for it in entries:
        if it.kind is Kind.DISK:
            check = "-f -y" if it.fsck is Policy.ALWAYS and it.type.startswith("ext") else "-a"
            policies = (it.mkfs.value, it.fsck.value)
            lines.append(_call("disk", it.device, it.point, it.type, it.options, *policies, _MAKE[it.type], check))
        elif it.kind is Kind.SWAP:
            lines.append(_call("swap", it.device, it.options, it.mkfs.value))
        else:
            lines.append(_call("other", it.device, it.point, it.type, it.options))
    return "\n".join([*lines, "exit 0\n"])


def unmount_script(entries: Sequence[Entry]) -> str:
    """Undoes it in reverse, as far as it goes."""
    lines = [_FUNCTIONS]
    for it in reversed(entries):
        lines.append(_call("swap_off", it.device) if it.kind is Kind.SWAP else _call("detach", it.point))
    return "\n".join([*lines, '[ -z "$failed" ] || fail "$failed"', "exit 0\n"])


def _call(function: str, *arguments: str) -> str:
    return " ".join([function, *map(shlex.quote, arguments)])

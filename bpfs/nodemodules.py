# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel modules for nodes: read here, with what they need, and loaded there, where nothing of them is on a disk."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from errno import EIO, ENOENT
from pathlib import Path

from boot.errors import BootError
from boot.image import modules_folder
from boot.kernel import Kernel, plain
from bpfs.client import Node
from bpfs.errors import BpfsError

INSTALLED = (Path("/lib/modules"), Path("/usr/lib/modules"))

_INSERT = """file=$(mktemp) || exit 1
trap 'rm -f "$file"' EXIT
while [ $# -gt 0 ]; do
    head -c "$2" > "$file"
    # Somebody else may have loaded it meanwhile.
    why=$(insmod "$file" 2>&1) || grep -q "^$1 " /proc/modules ||
        { echo "$1 cannot be loaded: ${why##*: }" >&2; exit 1; }
    shift 2
done
"""
"""Takes modules from standard input, one after the other; its arguments are the name and the bytes of each."""

_TIMEOUT = 120.0  # seconds for one command: mounting of a cold view included


def folder(release: str, images: Path) -> Path:
    """Where this master has the modules of a kernel: installed, or kept by `bpboot image 2`.

    Raises:
        BpfsError: ENOENT.
    """
    for place in (*(base / release for base in INSTALLED), modules_folder(images, release)):
        if (place / "kernel").is_dir():
            return place
    raise BpfsError(ENOENT, f"the modules of kernel {release} are not here: bpboot image 2 keeps those of its kernel")


_PARTS = {
    "nfs": ("nfs", "nfsv3", "nfsv4"), "nfs4": ("nfsv4",), "vfat": ("vfat", "nls_cp437", "nls_ascii", "nls_utf8"),
}  # fmt: skip
"""Types whose module is not all: what the kernel would ask modprobe for when it mounts one."""


def load_file_systems(node: Node, types: set[str], images: Path) -> None:
    """Have a node's kernel know these types of file systems. Raises as `load` does."""
    lines = _run(node, "cat /proc/filesystems").splitlines()
    missing = types - {line.split()[-1] for line in lines if line.strip()}
    names = [name for kind in sorted(missing) for name in _PARTS.get(kind, (kind,))]
    if names:
        kernel = Kernel(Path("/"), folder(node.kernel, images))
        first = {_PARTS.get(kind, (kind,))[0] for kind in missing}  # without that one there is none of it
        load(node, [name for name in names if name in first or kernel.having([name])], images)


def load(node: Node, names: Iterable[str], images: Path) -> list[str]:
    """Load modules and what they need, unless they are there; gives the names of those that were loaded.

    Raises:
        BpfsError: ENOENT: there is no such module; EIO: the node's kernel refuses one.
    """
    kernel = Kernel(Path("/"), folder(node.kernel, images))
    try:
        wanted = kernel.closure(names)
    except BootError as error:
        raise BpfsError(ENOENT, str(error)) from None
    there = {plain(line.split()[0]) for line in _run(node, "cat /proc/modules").splitlines() if line}
    new = [module for module in wanted if module.name not in there]
    if new:
        sizes = [word for module in new for word in (module.name, str(len(module.data)))]
        _run(node, _INSERT, sizes, b"".join(module.data for module in new))
    return [module.name for module in new]


def _run(node: Node, script: str, arguments: Iterable[str] = (), data: bytes = b"") -> str:
    command = ["/bin/sh", "-c", script, "sh", *arguments]
    try:
        (done,) = node.cluster.run(command, str(node.number), stdin=data, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise BpfsError(EIO, f"node {node.number}: no answer within {_TIMEOUT:g} s") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise BpfsError(EIO, f"node {node.number}: {''.join(said) or f'a command ended with {done.returncode}'}")
    return done.stdout.decode(errors="replace")

"""Phase 2: from the start of the operational image to bpslave."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from boot.errors import BootError
from boot.node import network, seed
from boot.node.console import say
from boot.node.drivers import FETCHED, Drivers

CONF = Path("/etc/beowulf/node.conf")
KEY = Path("/run/bpfs-key")
MARK = Path("/run/bpfs-node-image")
"""bpslave takes this machine for a real node when this file has the boot's id (bpfs/slave/machine.py)."""

PID_MAX, PID_LIMIT = Path("/proc/sys/kernel/pid_max"), 1 << 22
"""Jobs have the master's pids, and their children those of the node's block: a small machine's kernel ends at 32768 by
itself (PID_MAX_LIMIT of include/linux/threads.h)."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def run() -> None:
    """Once through all steps; does not return where they work.

    Raises:
        BootError, OSError: with what failed.
    """
    conf = _read_conf()
    if not FETCHED.exists():
        raise BootError("phase 1 brought no drivers: it is older than this image. Make it again (bpboot image 1)")
    drivers = Drivers()
    loaded = drivers.load_for_hardware()
    drivers.load_always()
    say(f"drivers: {' '.join(loaded) or 'none new'}")
    answer = network.find_server()
    say(f"{answer.interface} {answer.mac} is {answer.address}, server {answer.server}")
    _be_node(conf, answer)
    _allow_all_pids()
    _write_secret(KEY, conf["key"].encode() + b"\n", 0o600)
    _write_secret(MARK, _BOOT_ID.read_bytes(), 0o400)
    Path(conf["mount"]).mkdir(parents=True, exist_ok=True)
    if conf.get("seed") == "yes":
        seed.start(answer.address, answer.server, int(conf["bootport"]))
    say(f"starting bpslave, node {conf['node']} of {conf['master']}")
    options = ["-f", "-n", conf["node"], "-k", str(KEY), "--mount", conf["mount"], "--root", "empty", conf["master"]]
    os.execv(sys.executable, [sys.executable, "-S", "-s", "-B", "-m", "bpfs.cli.bpslave", *options])


def _read_conf() -> dict[str, str]:
    try:
        lines = [line.partition(" ") for line in CONF.read_text().splitlines()]
    except OSError:
        raise BootError("this image was not started by phase 1: it does not know its node") from None
    conf = {name: value for name, _, value in lines}
    missing = [name for name in ("node", "master", "key", "mount", "prefix") if name not in conf]
    if missing:
        raise BootError(f"the text about this node lacks {' '.join(missing)}")
    return conf


def _be_node(conf: dict[str, str], answer: network.Answer) -> None:
    network.set_up("lo")
    network.configure("lo", "127.0.0.1", 8)
    network.configure(answer.interface, answer.address, int(conf["prefix"]))
    socket.sethostname(conf.get("hostname", f"n{conf['node']}"))


def _allow_all_pids() -> None:
    try:
        PID_MAX.write_text(f"{PID_LIMIT}\n")
    except OSError as error:
        say(f"{PID_MAX}: {error.strerror}")


def _write_secret(path: Path, data: bytes, mode: int) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
        file.write(data)

# SPDX-License-Identifier: GPL-2.0-or-later
"""Network boot: images, the stages of one emulated machine, its memory, and 64 nodes that boot at once.

The 64 are simulated: each has its hardware and network address on one interface, asks by RARP, and fetches what phase 1
fetches, by the node's own code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.benchmarks.bench_idle import cpu, memory
from tests.benchmarks.frame import Row
from tests.boot.lab import ADDRESS, TOP, Lab, kernel_package, python, run
from tests.cluster.virtual import wait_until

CROWD = 64
PEERS = 4


def rows() -> Iterator[Row]:
    """The table."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        lab = Lab(Path(name) / "boot", machines=CROWD + PEERS, taps=1)
        try:
            lab.open()
            yield from images(lab)
            lab.start()
            yield from machine(lab)
            yield from crowd(lab)
        finally:
            lab.close()


def images(lab: Lab) -> Iterator[Row]:
    """Sizes, and how long they take to make."""
    for phase in ("1", "2"):
        command = python("bpfs.cli.bpboot", "image", phase, "-c", lab.config, "--kernel", kernel_package())
        start = time.perf_counter()
        text = run(*command)
        taken = time.perf_counter() - start
        sizes = re.findall(r"([\d.]+) MB", text.partition("\n")[0])
        yield Row(f"image of phase {phase}: unpacked", float(sizes[0]), "MB")
        yield Row(f"image of phase {phase}: compressed", float(sizes[1]), "MB")
        yield Row(f"image of phase {phase}: made in", taken, "s")


def machine(lab: Lab) -> Iterator[Row]:
    """From power-on to `up`, by what its serial line says, and the memory that it takes."""
    start = time.perf_counter()
    marks = [
        ("RARP of phase 1", "RARP on eth0"),
        ("kernels switched", "switching kernels"),
        ("RARP of phase 2", r"switching kernels[\s\S]*RARP on eth0"),
        ("bpslave started", "starting bpslave"),
    ]
    with lab.machine(0) as vm:
        for what, pattern in marks:
            vm.wait_for(pattern)
            yield Row(f"power-on to: {what}", time.perf_counter() - start, "s")
        lab.wait_state(0, "up")
        yield Row("power-on to: up", time.perf_counter() - start, "s")
        while not (text := lab.read("nodes/0/memory")):
            time.sleep(0.1)
        figures = dict(line.split() for line in text.splitlines())
        used = (int(figures["MemTotal"]) - int(figures["MemAvailable"])) / 1024
        yield Row("memory of an idle node, kernel's tables apart", used, "MB", note="MemTotal - MemAvailable")


def crowd(lab: Lab) -> Iterator[Row]:
    """64 at once."""
    lab.add_client(0)
    (server,) = lab.processes("bpfs.cli.bpbootd")
    before = cpu([server.pid])
    done = lab.client(0, "crowd", str(CROWD), lab.public(), timeout=600)
    assert done.returncode == 0, done.stderr
    asked, last, total = map(float, done.stdout.split())
    yield Row(f"{CROWD} nodes at once: all have their address", asked, "s")
    yield Row(f"{CROWD} nodes at once: the last has kernel and image", last, "s", note=f"{total / 1e6:.0f} MB together")
    yield Row("… processor time of bpbootd", cpu([server.pid]) - before, "s")
    yield Row("… its memory afterwards (RSS)", memory([server.pid])[1], "MB")
    with ExitStack() as stack:
        for number in range(CROWD, CROWD + PEERS):
            stack.enter_context(peer(lab, number))
        wait_until(lambda: len(lab.peers(0)) == PEERS, "the peers are not there")
        before, sent = cpu([server.pid]), sent_bytes(lab)
        done = lab.client(0, "crowd", str(CROWD), lab.public(), timeout=600)
        assert done.returncode == 0, done.stderr
        yield Row(f"{CROWD} nodes at once, {PEERS} peers: the last has all", float(done.stdout.split()[1]), "s")
        yield Row("… processor time of bpbootd", cpu([server.pid]) - before, "s")
        yield Row("… bytes that left the master", (sent_bytes(lab) - sent) / 1e6, "MB")


@contextmanager
def peer(lab: Lab, number: int) -> Iterator[None]:
    """A booted node that passes kernel and image on."""
    name, address = lab.add_client(number), f"10.54.0.{10 + number}"
    run("ip", "-n", name, "link", "set", "eth0", "up")
    run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
    command = ["ip", "netns", "exec", name, *python("boot.node.seed", address, ADDRESS, "933", lab.folder / name)]
    with subprocess.Popen(command, cwd=TOP) as process:
        try:
            yield
        finally:
            process.kill()


def sent_bytes(lab: Lab) -> int:
    """What the master has sent to nodes."""
    return int(run(*lab.inside, "ip", "netns", "exec", lab.name, "cat", "/sys/class/net/br0/statistics/tx_bytes"))

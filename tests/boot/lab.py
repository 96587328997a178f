"""A network of our own with a master and a boot server in it, and virtual machines that boot from them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from boot import image, manifest, signature
from boot.files import replace
from boot.modules import Table
from tests.cluster.virtual import TOP, wait_until

PACKAGES = TOP / ".venv" / "boot"
"""Where mountscripts/lib.sh puts the kernel package for these tests."""

VM_DEADLINE = 240.0
"""Seconds that a machine may take from power-on to where it is waited for: 10 by itself, where nothing else runs. This
is for machines that hang, and no measure of speed."""

_COUNT = itertools.count()

ADDRESS = "10.54.0.1"
QEMU = "qemu-system-x86_64"


def mac(number: int) -> str:
    """The hardware address of a machine of ours."""
    return f"52:54:00:00:00:{number + 1:02x}"


def kernel_package(name: str = "linux-image-cloud-amd64") -> Path:
    """A kernel of Debian's; skips where there is none."""
    path = PACKAGES / f"{name}.deb"
    if not path.exists():
        pytest.skip(f"there is no {path}: ./mountscripts/check fetches it on Debian")
    return path


def run(*command: str | Path) -> str:
    """Runs a command of ours that has to work; gives its output."""
    done = subprocess.run([*command], capture_output=True, text=True, timeout=VM_DEADLINE, check=False, cwd=TOP)
    assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
    return done.stdout


def python(module: str, *arguments: str | Path) -> list[str | Path]:
    """A command of this tree."""
    return [sys.executable, "-m", module, *arguments]


NETWORK: list[str | Path] = ["-boot", "n"]
"""The medium of a machine whose firmware boots from its network card."""

DEAD_CARD: list[str | Path] = ["-netdev", "hubport,id=n9,hubid=9", "-device", "virtio-net-pci,netdev=n9,romfile="]
"""One more network card, before the other, with a link and nobody on it."""

_OVMF = Path("/usr/share/ovmf/OVMF.fd")


def uefi(http: bool = False) -> list[str | Path]:
    """The medium of a machine with UEFI that boots from its network card: by PXE, or by HTTP."""
    if not _OVMF.exists():
        pytest.skip(f"there is no {_OVMF} (package ovmf)")
    without = [f"name=opt/org.tianocore/IPv{version}PXESupport,string=no" for version in (4, 6)] if http else []
    return ["-bios", _OVMF, *NETWORK, *(word for setting in without for word in ("-fw_cfg", setting))]


class Machine:
    """One virtual machine without a disk; its serial line is kept."""

    def __init__(self, lab: Lab, number: int, medium: list[str | Path], card: str = "virtio-net-pci") -> None:
        # Without the card's ROM the firmware never tries the network.
        device = f"{card},netdev=n0,mac={mac(number)}" + ("" if medium[:2] == NETWORK else ",romfile=")
        command = [
            *lab.inside, QEMU, "-machine", "pc", "-accel", "tcg", "-cpu", "max,-sse4a,-mpx,-pku", "-m", "256",
            "-nographic", "-nodefaults", "-serial", "stdio", *medium, "-device", device,
            "-netdev", f"tap,id=n0,ifname={lab.tap(number)},script=no,downscript=no",
            "-qmp", f"unix:{lab.folder / f'qmp{number}'},server=on,wait=off",
        ]  # fmt: skip
        self._control = lab.folder / f"qmp{number}"
        self.text = ""
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while data := os.read(self._process.stdout.fileno(), 65536):
            self.text += data.decode(errors="replace").replace("\r", "")

    def wait_for(self, pattern: str, after: int = 0) -> re.Match[str]:
        """Waits for what matches on the serial line."""
        deadline = time.monotonic() + VM_DEADLINE
        while (found := re.search(pattern, self.text[after:])) is None:
            assert self._process.poll() is None, f"the machine ended: {self.text[-2000:]}"
            assert time.monotonic() < deadline, f"no {pattern!r} within {VM_DEADLINE:g} s: {self.text[-2000:]}"
            time.sleep(0.05)
        return found

    def press(self, *keys: str) -> None:
        """Presses keys of its keyboard together, by QEMU's names."""
        with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rw") as control:
            sock.settimeout(VM_DEADLINE)
            sock.connect(str(self._control))
            pressed = {"keys": [{"type": "qcode", "data": key} for key in keys]}
            for command in ({"execute": "qmp_capabilities"}, {"execute": "send-key", "arguments": pressed}):
                control.write(json.dumps(command))
                control.flush()
                while "return" not in (answer := json.loads(control.readline())):
                    assert "error" not in answer, answer

    @property
    def busy(self) -> float:
        """Seconds of processor time that it has taken: what its owner waits at least, whatever else runs here."""
        words = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, words[11:13])) / os.sysconf("SC_CLK_TCK")

    @property
    def ended(self) -> bool:
        """Whether it is switched off."""
        return self._process.poll() is not None

    def close(self) -> None:
        """Pulls the plug."""
        self._process.kill()
        self._process.wait()
        self._reader.join(10)


@dataclass(frozen=True)
class Child:
    """A process that somebody else waits for."""

    pid: int

    def send_signal(self, number: int) -> None:
        """As Popen has it."""
        os.kill(self.pid, number)


class Lab:
    """A network namespace with a bridge and taps, images, a master and its boot server."""

    def __init__(self, folder: Path, machines: int = 2, config: str = "", taps: int | None = None) -> None:
        """Args:
        machines: how many are in the configuration.
        config: more lines of it.
        taps: for how many of them there is a leg; all by default.
        """
        self.folder = folder
        self.mount = folder / "m"
        self.images = folder / "images"
        self.config = folder / "config"
        self.key = folder / "key"
        self.name = f"bpt{os.getpid()}{next(_COUNT)}"
        self.inside = ["nsenter", f"--net=/run/netns/{self.name}"]
        self._machines = machines
        self._taps = machines if taps is None else taps
        self._lines = config
        self._clients: list[str] = []
        self._daemons: list[subprocess.Popen[bytes]] = []

    def tap(self, number: int) -> str:
        """The name of a machine's leg."""
        return f"tap{number}"

    def open(self) -> None:
        """Network, configuration and key."""
        self.mount.mkdir(parents=True)
        run("ip", "netns", "add", self.name)
        run(*self.inside, "ip", "link", "set", "lo", "up")
        run(*self.inside, "ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0", "stp_state", "0")
        # Its own for good: a bridge takes its ports' lowest one else, and whoever knows the former finds nobody there.
        run(*self.inside, "ip", "link", "set", "br0", "address", "52:54:00:00:01:00")
        run(*self.inside, "ip", "addr", "add", f"{ADDRESS}/24", "dev", "br0")
        run(*self.inside, "ip", "link", "set", "br0", "up")
        for number in range(self._taps):
            run(*self.inside, "ip", "tuntap", "add", self.tap(number), "mode", "tap")
            run(*self.inside, "ip", "link", "set", self.tap(number), "master", "br0", "up")
        self.key.write_text("0123456789abcdef" * 4 + "\n")
        self.key.chmod(0o600)
        self.configure(self._lines)

    def add_client(self, number: int, beside: str = "") -> str:
        """A network namespace on the bridge whose eth0 has a machine's hardware address; gives its name.

        Args:
            beside: an address for the master's end: then it is on no bridge, but on an interface of its own.
        """
        name = f"{self.name}c{number}"
        run("ip", "netns", "add", name)
        self._clients.append(name)
        leg = f"leg{number}"
        run(*self.inside, "ip", "link", "add", leg, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "-n", name, "link", "set", "eth0", "address", mac(number))
        if beside:
            run(*self.inside, "ip", "addr", "add", beside, "dev", leg)
        run(*self.inside, "ip", "link", "set", leg, *([] if beside else ["master", "br0"]), "up")
        return name

    def drop_client(self, number: int) -> None:
        """Takes a client away."""
        run(*self.inside, "ip", "link", "del", f"leg{number}")
        run("ip", "netns", "del", f"{self.name}c{number}")
        self._clients.remove(f"{self.name}c{number}")

    def peers(self, number: int) -> list[str]:
        """Who passes files on, as a client hears it."""
        return self.client(number, "peers").stdout.split()

    def start_client(self, number: int, *arguments: str) -> subprocess.Popen[str]:
        """Starts tests.boot.client there, and returns when it has printed its first line."""
        command = ["ip", "netns", "exec", f"{self.name}c{number}", *python("tests.boot.client", *arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TOP)
        assert process.stdout is not None and process.stdout.readline()
        return process

    def client(self, number: int, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs tests.boot.client there, with a /sys of that network."""
        return subprocess.run(
            ["ip", "netns", "exec", f"{self.name}c{number}", *python("tests.boot.client", *arguments)],
            capture_output=True, text=True, timeout=timeout, check=False, cwd=TOP,
        )  # fmt: skip

    def configure(self, more: str = "", nodes: bool = True) -> None:
        """Writes the configuration file."""
        lines = [
            "interface br0", "iprange 10.54.0.10 10.54.0.99", f"key {self.key}", f"bootimages {self.images}",
            f"mount {self.mount}", "lease 8", "kernelcommandline console=ttyS0 panic=1 quiet", "bootserver yes",
            f"state {self.folder / 'state'}", "onlost reboot 2", "bootpeers 0",
            f"fstab {self.folder / 'fstab'}", "mkfs if_needed",
        ]  # fmt: skip
        if nodes:
            lines += [f"node {number} {mac(number)}" for number in range(self._machines)]
        self.config.write_text("\n".join([*lines, more, ""]))

    def make_images(self, package: Path, *options: str, media: tuple[str | Path, ...] = ()) -> None:
        """Both phases, from a kernel package.

        Args:
            media: more options for phase 1.
        """
        for phase, more in (("1", media), ("2", ())):
            run(*python("bpfs.cli.bpboot", "image", phase, "-c", self.config, "--kernel", package, *options, *more))

    def make_small_images(self, size: int = 300_000) -> None:
        """Files that look like kernel and image to everybody but a machine."""
        self.images.mkdir(exist_ok=True)
        blobs = {what: image.store(self.images, what, os.urandom(size)) for what in ("kernel", "image")}
        apart = image.Parcels(Table({"card": "card.ko"}, {"card": []}, [("pci:*", "card")]), {"card": b"a driver"})
        blobs["drivers"] = apart.publish(self.images)[0]
        replace(self.images / manifest.FILE, "".join(f"{k} {v}\n" for k, v in blobs.items()).encode())

    def start(self) -> None:
        """The master, which starts its boot server."""
        self.master = self.spawn("bpfs.cli.bpmaster", "-f", "-c", self.config, "--log", self.folder / "master.log")
        wait_until(lambda: "nodes can boot" in self.log(), "the boot server is not there")

    def public(self) -> str:
        """The public half of the boot key, as phase 1 has it."""
        return signature.public_key(self.folder / "bootkey").decode()

    def log(self) -> str:
        """What the master has logged."""
        path = self.folder / "master.log"
        return path.read_text() if path.exists() else ""

    def spawn(self, module: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """A daemon in this network."""
        daemon = subprocess.Popen([*self.inside, *python(module, *arguments)], cwd=TOP, stdin=subprocess.DEVNULL)
        self._daemons.append(daemon)
        return daemon

    def processes(self, word: str) -> list[Child]:
        """The children of the master that have this word in their command line."""
        found = []
        for name in Path(f"/proc/{self.master.pid}/task/{self.master.pid}/children").read_text().split():
            with suppress(OSError):
                if word in Path(f"/proc/{name}/cmdline").read_text():
                    found.append(Child(int(name)))
        return found

    def reload(self) -> None:
        """Has the configuration read again; returns when it has been."""
        before = self.log().count("again")
        self.master.send_signal(signal.SIGHUP)
        wait_until(lambda: self.log().count("again") > before, "the master has not read its configuration again")

    def bpsh(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs bpsh as a user of the master does, in whose network namespace."""
        return subprocess.run(
            [*self.inside, TOP / "bpfs/bin/bpsh", *arguments], capture_output=True, text=True, timeout=VM_DEADLINE,
            check=False, cwd="/", stdin=subprocess.DEVNULL, env={**os.environ, "BPFS": str(self.mount)},
        )  # fmt: skip

    def read(self, path: str) -> str:
        """A file of the tree."""
        return (self.mount / path).read_text()

    def write(self, path: str, text: str) -> None:
        """Writes a line to a file of the tree."""
        (self.mount / path).write_text(text + "\n")

    def cut(self, number: int, cut: bool) -> None:
        """Pulls a machine's network cable, or puts it back."""
        run(*self.inside, "ip", "link", "set", self.tap(number), "down" if cut else "up")

    def wait_state(self, number: int, state: str) -> None:
        """Waits for a node's state."""
        deadline = time.monotonic() + VM_DEADLINE
        while self.read(f"nodes/{number}/state").strip() != state:
            now = f"{self.read(f'nodes/{number}/state').strip()}: {self.read(f'nodes/{number}/reason').strip()}"
            assert state != "up" or not now.startswith("error"), f"node {number}: {now}"
            assert time.monotonic() < deadline, f"node {number} is not {state} within {VM_DEADLINE:g} s but {now}"
            time.sleep(0.05)

    def disk(self, name: str, size: int) -> list[str | Path]:
        """Options of a machine that give it one more empty disk, the first being /dev/vda."""
        path = self.folder / name
        with path.open("wb") as file:
            file.truncate(size)
        return ["-drive", f"file={path},if=virtio,format=raw"]

    @contextmanager
    def machine(self, number: int, medium: list[str | Path] | None = None, **options: str) -> Iterator[Machine]:
        """A machine that boots phase 1: from its own kernel and image, as from a disk, or from another medium."""
        if shutil.which(QEMU) is None:
            pytest.skip(f"{QEMU} is not installed (package qemu-system-x86)")
        files: list[str | Path] = ["-kernel", self.images / "phase1.vmlinuz", "-initrd", self.images / "phase1.img"]
        vm = Machine(self, number, medium or [*files, "-append", "console=ttyS0 panic=5 quiet"], **options)
        try:
            yield vm
        finally:
            vm.close()

    def close(self) -> None:
        """Ends it all."""
        for daemon in reversed(self._daemons):
            with suppress(ProcessLookupError):
                daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for name in (*self._clients, self.name):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

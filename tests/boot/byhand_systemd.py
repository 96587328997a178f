"""A master with systemd, and a node that boots from it: both real machines, emulated.

For maintainers, and not for CI: it makes a Debian 12 with debootstrap, once, and takes ten minutes on a machine that
does nothing else: .venv/bin/python -m pytest -s tests/boot/byhand_systemd.py

It does what beowulf(7) says, in its words, and looks at what becomes of the units. Nothing runs outside of the machines
but debootstrap, and apt and pip in a chroot with mounts and pids of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.boot.lab import QEMU, Lab, mac, run
from tests.cluster.virtual import TOP, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(7200)]

FOLDER = Path(os.environ.get("BPFS_VM", "/var/tmp/bpfs-vm"))
"""Where the root is made, and kept for the next time."""

PACKAGES = (
    "systemd systemd-sysv udev dbus iproute2 procps psmisc kmod ca-certificates ifupdown isc-dhcp-client"
    " initramfs-tools linux-image-cloud-amd64 iputils-ping less"
)
"""What a small server has."""
MORE = "zstd openssl kmod e2fsprogs ipxe grub-common grub-pc-bin grub-efi-amd64-bin xorriso mtools"
"""What the guide has it install."""
DEADLINE = 1800.0
"""Seconds for anything: for machines that hang, and no measure of speed."""

IMAGES = "bpsetup --interface eth1 --nodes 16 --first 10.54.0.10; bpboot image 1 --iso phase1.iso --pxe; bpboot image 2"

AGENT = """
import json, subprocess, sys, tty
line = open("/dev/ttyS1", "r+b", buffering=0)
tty.setraw(line)
line.write(b"\\nready\\n")
data = b""
while True:
    data += line.read(4096)
    while b"\\n" in data:
        command, _, data = data.partition(b"\\n")
        try:
            done = subprocess.run(["/bin/bash", "-c", json.loads(command)], stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1700, cwd="/root")
            answer = [done.returncode, done.stdout.decode(errors="replace")]
        except Exception as error:
            answer = [-1, str(error)]
        line.write(json.dumps(answer).encode() + b"\\n")
"""
UNIT = """
[Unit]
After=multi-user.target
[Service]
ExecStart=/usr/bin/python3 /usr/local/lib/agent.py
KillMode=process
[Install]
WantedBy=default.target
"""
INTERFACES = """
auto lo
iface lo inet loopback
auto eth0
iface eth0 inet dhcp
auto eth1
iface eth1 inet static
    address 10.54.0.1/24
"""


def chroot(root: Path, script: str, *more: str) -> None:
    """Runs a script in the root, with mounts, pids and a /tmp of its own, and what more is not to be shared."""
    inside = (
        'mount --make-rprivate /; mount -t proc proc "$0/proc"; mount -t tmpfs tmpfs "$0/tmp"; '
        'exec chroot "$0" /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root '
        'LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive sh -ec "$1"'
    )
    subprocess.run(["unshare", "-m", "-p", *more, "-f", "--kill-child", "sh", "-c", inside, root, script], check=True)


def make_root(root: Path) -> None:
    """A Debian 12 with systemd and a kernel; a matter of minutes, once."""
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", root], check=True)
    (root / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
    (root / "usr/sbin/policy-rc.d").chmod(0o755)
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    chroot(root, f"apt-get update -q; apt-get install -y -q --no-install-recommends {PACKAGES}")


def install(root: Path) -> None:
    """As the guide says; and our way to talk to the machine."""
    shutil.rmtree(root / "opt/bpfs", ignore_errors=True)
    subprocess.run(["git", "clone", "-q", TOP, root / "opt/bpfs"], check=True)
    # Fetched by this machine's pip, as it is set up to: the root's own may not know how.
    wheels = [
        "hatchling>=1.24",
        "editables",
        *tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["dependencies"],
    ]
    run(sys.executable, "-m", "pip", "wheel", "-q", "-w", root / "opt/wheels", *wheels)
    with suppress(FileExistsError):
        os.mknod(root / "dev/fuse", stat.S_IFCHR | 0o666, os.makedev(10, 229))
    chroot(root, "export PIP_NO_INDEX=1 PIP_FIND_LINKS=/opt/wheels; cd /opt/bpfs; ./mountscripts/quickstart --install")
    chroot(root, f"apt-get install -y -q --no-install-recommends {MORE}")
    (root / "usr/sbin/policy-rc.d").unlink(missing_ok=True)
    (root / "usr/local/lib/agent.py").write_text(AGENT)
    (root / "etc/systemd/system/agent.service").write_text(UNIT)
    (root / "etc/network/interfaces").write_text(INTERFACES)
    (root / "etc/fstab").write_text("/dev/vda / ext4 defaults 0 1\n")
    (root / "etc/hostname").write_text("master\n")
    slow = root / "etc/systemd/system.conf.d/slow.conf"  # an emulated machine takes longer than 90 s for many a thing
    slow.parent.mkdir(exist_ok=True)
    slow.write_text("[Manager]\nDefaultTimeoutStartSec=900\n")
    # The guide's first words, where they are ten times as fast: they need an interface, and nothing of systemd.
    for path in (root / "etc/beowulf", root / "var/lib/beowulf"):
        shutil.rmtree(path, ignore_errors=True)
    chroot(
        root, f"ip link add eth1 type veth peer name other; ip addr add 10.54.0.1/24 dev eth1; cd /root; {IMAGES}", "-n"
    )
    chroot(root, "systemctl enable -q agent.service")


class Master:
    """The master's machine, with a shell on its second serial line."""

    def __init__(self, folder: Path, inside: list[str], root: Path, tap: str) -> None:
        kernel, initrd = (max((root / "boot").glob(f"{name}-*")) for name in ("vmlinuz", "initrd.img"))
        self.console = folder / "console"
        self._path = folder / "shell"
        command = [
            *inside, QEMU, "-machine", "pc", "-accel", "tcg", "-cpu", "max,-sse4a,-mpx,-pku", "-smp", "2", "-m", "1024",
            "-display", "none", "-nodefaults", "-serial", f"file:{self.console}",
            "-serial", f"unix:{self._path},server=on,wait=off", "-kernel", kernel, "-initrd", initrd,
            "-append", "root=/dev/vda rw console=ttyS0 net.ifnames=0 panic=-1 systemd.show_status=0",
            "-drive", f"file={folder / 'disk'},if=virtio,format=raw,cache=unsafe",
            "-drive", f"file={folder / 'stick'},if=virtio,format=raw,cache=unsafe",
            "-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile=",
            "-netdev", f"tap,id=n1,ifname={tap},script=no,downscript=no",
            "-device", "virtio-net-pci,netdev=n1,mac=52:54:00:00:01:01,romfile=",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        wait_until(self._path.exists, "the machine does not start")
        self._shell = socket.socket(socket.AF_UNIX)
        self._shell.connect(str(self._path))
        self._shell.settimeout(DEADLINE)
        self._lines = self._shell.makefile("rwb")
        self.wait_boot()

    def wait_boot(self) -> None:
        """Waits for its shell."""
        while self._lines.readline().strip() != b"ready":
            pass

    def run(self, script: str, code: int | None = 0) -> str:
        """Runs a script there; gives its output.

        Args:
            code: the exit code that is expected; None: any.
        """
        began = time.monotonic()
        print(f"  # {script}", flush=True)
        self._lines.write(json.dumps(script).encode() + b"\n")
        self._lines.flush()
        got, output = json.loads(self._lines.readline())
        print("".join(f"    {line}\n" for line in output.splitlines()) + f"    [{time.monotonic() - began:.1f} s]")
        assert code is None or got == code, f"exit code {got}"
        return str(output)

    def wait(self, script: str, pattern: str, seconds: float = DEADLINE) -> str:
        """Runs a script until its output matches."""
        until = f"x=$({script} 2>&1); grep -qzP '{pattern}' <<<\"$x\" && break; sleep 1"
        said = self.run(f'for i in $(seq {seconds:.0f}); do {until}; done; echo "$x"')
        assert re.search(pattern, said), f"no {pattern!r}"
        return said

    def reboot(self) -> None:
        """As an administrator does it."""
        self.run("systemctl --no-block reboot")
        self.wait_boot()

    def close(self) -> None:
        """Pulls the plug."""
        self._process.kill()
        self._process.wait()


@pytest.fixture
def lab(session_folder: Path) -> Iterator[Lab]:
    """A network whose first leg is the master's; nothing of ours runs in it."""
    lab = Lab(session_folder / "systemd", machines=0, taps=2)
    try:
        lab.open()
        run(*lab.inside, "ip", "addr", "flush", "dev", "br0")
        yield lab
    finally:
        lab.close()


@pytest.fixture
def master(lab: Lab) -> Iterator[Master]:
    root = FOLDER / "root"
    if not (root / "var/cache/apt").exists():
        make_root(root)
    install(root)
    disk = lab.folder / "disk"
    for path, size in ((disk, 6 << 30), (lab.folder / "stick", 256 << 20)):
        with path.open("wb") as file:
            file.truncate(size)
    run("mke2fs", "-q", "-t", "ext4", "-d", root, disk)
    master = Master(lab.folder, lab.inside, root, lab.tap(0))
    try:
        yield master
    finally:
        master.close()


COUNT = """
cat > /root/count <<'END'
echo "$$ onexec" > /bpfs/nodes/0/migrate
exec /bin/sh -c 'while :; do echo $((n += 1)); sleep 0.2; done'
END
nohup bash /root/count > /root/out 2> /root/err < /dev/null & echo $! > /root/pid
"""
ALIVE = "a=$(wc -l < /root/out); sleep 5; test $(wc -l < /root/out) -gt $a"
"""The job still counts, and what it prints still comes home."""


def test_units_in_a_machine_with_systemd(lab: Lab, master: Master) -> None:
    on = master.run
    # An empty machine: what the guide says.
    on("dd if=phase1.iso of=/dev/vdb bs=4M && sync")
    shutil.copy(lab.folder / "stick", lab.folder / "pulled")  # the master's machine has the former's lock
    on(
        "printf 'lease 600\\npingtimeout 700\\n' >> /etc/beowulf/config"
    )  # an emulated master needs half a minute to start
    on("cd /opt/bpfs && cp mountscripts/systemd/*.service /etc/systemd/system/")
    on("systemctl daemon-reload && systemctl enable --now bpmaster && ls /bpfs/nodes/-1")
    assert on("systemctl is-active bpmaster; findmnt -no FSTYPE /bpfs") == "active\nfuse.bpfs\n"
    with lab.machine(1, ["-drive", f"file={lab.folder / 'pulled'},if=virtio,format=raw"]):
        master.wait("cat /bpfs/nodes/0/state", "^up")
        assert f"node 0 {mac(1)}" in on("cat /etc/beowulf/config")
        assert on("bpsh 0 hostname") == "n0\n"

        # A restart of the unit: by hand, and after a death.
        on(COUNT)
        master.wait("cat /root/out", "3")
        on("systemctl restart bpmaster")
        for end in ("true", "kill -9 $(systemctl show -P MainPID bpmaster)"):
            on(end)
            master.wait("cat /bpfs/status", "^0 up")
            on(ALIVE)
            assert on("cat /bpfs/procs/$(cat /root/pid)/node") == "0\n"
        assert "sleep" in on("ps -o pid,stat,time,args $(pgrep -P $(cat /root/pid))")
        said = on("journalctl -u bpmaster -o cat --no-pager")
        assert "told to leave all to the next master" in said and "Traceback" not in said

        # bpbootd by itself, as its unit confines it.
        on("echo bootserver no >> /etc/beowulf/config && systemctl restart bpmaster && systemctl enable --now bpbootd")
        master.wait("cat /bpfs/status", "^0 up")
        on("echo reboot > /bpfs/nodes/0/state")
        master.wait("cat /bpfs/status", "^0 down")
        master.wait("cat /bpfs/status", "^0 up")

        # A stop ends all; the machine's own restart brings it back by itself.
        on(COUNT)
        master.wait("cat /root/out", "3")
        on("systemctl stop bpmaster")
        on("ps -o pid,ppid,stat,args -p $(cat /root/pid); systemctl status bpmaster; grep bpfs /proc/mounts", None)
        assert on("grep -c ' /bpfs ' /proc/self/mountinfo", 1) == "0\n"
        master.wait("kill -0 $(cat /root/pid)", "No such process", 60)
        assert on("systemctl show -P Result bpmaster") == "success\n"
        on("systemctl start bpmaster")
        master.reboot()
        master.wait("systemctl is-active bpmaster bpbootd", "active\nactive")
        master.wait("cat /bpfs/status", "^0 up")
        assert on("systemctl --failed --no-legend") == ""

"""Real machines, emulated: from power-on through both phases to `up`, and their life as nodes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot.kernel import unpack
from tests.boot import nfs
from tests.boot.lab import ADDRESS, DEAD_CARD, NETWORK, VM_DEADLINE, Lab, kernel_package, mac, python, run, uefi
from tests.cluster.virtual import TOP, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def lab(session_folder: Path) -> Iterator[Lab]:
    package = kernel_package()
    # Pre-copy is by soft-dirty marks, which Debian's kernel has; the first machine passes its image on.
    lab = Lab(session_folder / "boot", config="precopy 1M\nbootpeers 1")
    try:
        lab.open()
        lab.make_images(package, media=("--iso", lab.folder / "phase1.iso"))
        home(lab).mkdir()
        with nfs.serving(lab, home(lab)):
            yield lab
    finally:
        lab.close()


LIMIT = 90.0
"""Seconds from power-on to `up` that are promised, for a machine that nothing else slows down."""


PROTOCOLS = ("tcp", "tcp6", "udp", "udp6", "udplite", "raw", "raw6", "packet")
"""What sockets are of that somebody else's packets can come to: files of /proc/net."""

LISTENS = "0A"
"""TCP_LISTEN in the fourth column of /proc/net/tcp (include/net/tcp_states.h)."""


def doors(lab: Lab, number: int) -> list[str]:
    """Where a node takes in what it has not asked for, a line each, as its own kernel names it."""
    script = 'cd /proc/net; for name in "$@"; do test ! -e $name || sed "1d;s/^/$name /" $name; done'
    done = lab.bpsh(str(number), "/bin/sh", "-c", script, "sh", *PROTOCOLS)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert any(row[0] == "tcp" for row in rows), "bpslave's own connection, at least"
    return [f"{row[0]} {row[2]}" for row in rows if not row[0].startswith("tcp") or row[4] == LISTENS]


def home(lab: Lab) -> Path:
    """The users' files, which nodes see by NFS where the master has them."""
    return lab.folder / "home"


TRAVELLER = """
import hashlib, os, sys
digest, count, places = b"", 0, []
ballast = os.urandom(8 << 20)
weight = hashlib.sha256(ballast).digest()
notes = open(sys.argv[1], "a", buffering=1)
while len(places) < 4:
    here = os.uname()[1:3]
    if places[-1:] != [here]:
        places.append(here)
        print(here[0], file=notes)
        print(*here, flush=True)
    if len(places) == 3 and here[0][0] != "n":
        break
    digest, count = hashlib.sha256(digest).digest(), count + 1
again = b""
for _ in range(count):
    again = hashlib.sha256(again).digest()
sys.exit(7 if again == digest and hashlib.sha256(ballast).digest() == weight else 1)
"""
"""Computes while it is away, and at home does it all once more: the same, or its exit status tells."""


def travel(lab: Lab) -> None:
    """A process of the master starts on one machine, goes to the other before its memory does, and comes home."""
    script = f'echo "$$ onexec" > {lab.mount}/nodes/0/migrate; exec /usr/bin/python3 -c "$0" "$1"'
    notes = home(lab) / "notes"
    process = subprocess.Popen(
        [*lab.inside, "/bin/bash", "-c", script, TRAVELLER, notes], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        text=True, cwd="/",
        env={"PATH": "/usr/bin:/bin"},  # bound late, on a CPU that has fewer registers than the master's
    )  # fmt: skip
    try:
        assert process.stdout is not None
        kernel = lab.read("nodes/0/kernel")
        assert process.stdout.readline() == f"n0 {kernel}"
        lab.write("nodes/1/migrate", f"{process.pid} lazy")
        assert process.stdout.readline() == f"n1 {kernel}"
        sent = int(re.findall(r" bytes=(\d+)", lab.read("nodes/1/migrate"))[-1])
        assert sent < 8 << 20, "its ballast should have come later"
        lab.write("nodes/-1/migrate", str(process.pid))
        assert process.stdout.readline() == f"{os.uname().nodename} {os.uname().release}\n"
        assert process.wait(VM_DEADLINE) == 7
        assert notes.read_text() == f"n0\nn1\n{os.uname().nodename}\n"
    finally:
        process.kill()
        process.wait()


def test_two_machines_with_nothing_on_them_become_nodes_and_live_as_such(lab: Lab) -> None:
    files = f"$MASTER:{home(lab)} {home(lab)} nfs4\n"
    (lab.folder / "fstab").write_text(files)
    (lab.folder / "fstab.0").write_text(f"/dev/vda /scratch ext4 noatime\n/dev/vdb none swap\n{files}")
    disks = [*lab.disk("scratch", 64 << 20), *lab.disk("swap", 32 << 20)]
    disc = ["-cdrom", lab.folder / "phase1.iso", *disks, *DEAD_CARD]
    with lab.machine(0, disc) as first, lab.machine(1) as second:
        # They were there before their master was: they ask on.
        for machine in (first, second):
            machine.wait_for("RARP on eth0")
        lab.start()
        for number, machine in enumerate((first, second)):
            lab.wait_state(number, "up")
            assert machine.busy < LIMIT
        assert "fetching the image" in first.text and "switching kernels" in first.text
        # It has another card that nobody answers on, and that is its first one.
        assert first.text.count(f"eth1 {mac(0)} is 10.54.0.10, server {ADDRESS}\n") == 2
        assert [lab.read(f"nodes/{number}/address") for number in (0, 1)] == ["10.54.0.10\n", "10.54.0.11\n"]
        # The kernel is the one that the image was made with, not this machine's.
        assert lab.read("nodes/0/kernel").strip() in (lab.images / "manifest").read_text()
        assert "asked, and is 10.54.0.10" in lab.read("nodes/0/log")

        # Its disks had nothing on them; the file systems' modules are none of the image's.
        assert "fstab: /scratch: /dev/vda" in lab.read("nodes/0/log")
        script = 'df --output=fstype /scratch "$0"; sed 1d /proc/swaps; cat "$0/here"; echo there > "$0/there"'
        (home(lab) / "here").write_text("from the master\n")
        seen = lab.bpsh("0", "/bin/sh", "-c", script, str(home(lab))).stdout.splitlines()
        assert seen[:3] == ["Type", "ext4", "nfs4"] and seen[3].split()[:2] == ["/dev/vdb", "partition"]
        assert seen[4:] == ["from the master"] and (home(lab) / "there").read_text() == "there\n"

        # More modules come by hand, each with what it needs, once; one that is for other hardware is refused by name.
        modprobe = [*lab.inside, *python("bpfs.cli.bpmodprobe", "-c", lab.config, "--mount", lab.mount, "0")]
        assert (
            run(*modprobe, "bridge") == "0: llc stp bridge\n" and run(*modprobe, "bridge") == "0: all there already\n"
        )
        refused = subprocess.run([*modprobe, "pcc_cpufreq"], capture_output=True, text=True, check=False, cwd=TOP)
        assert refused.stderr == "bpmodprobe: node 0: pcc_cpufreq cannot be loaded: No such device\n"

        # It takes every pid that its master may have, and those of its own block.
        assert lab.bpsh("0", "/bin/cat", "/proc/sys/kernel/pid_max").stdout == "4194304\n"

        # Nobody can call a node but at bpslave's two doors (bpslave(8)), and at port 933 where images are passed on.
        assert [door.partition(":")[0] for door in doors(lab, 1)] == 2 * ["tcp 0B00360A"]
        assert [door.partition(":")[0] for door in doors(lab, 0)] == 3 * ["tcp 0A00360A"]
        assert "tcp 0A00360A:03A5" in doors(lab, 0)

        # It has no program, library or script of its own, and runs the master's.
        done = lab.bpsh("0", "/bin/sh", "-c", "/usr/bin/uname -r; exit 3")
        assert (done.returncode, done.stdout) == (3, lab.read("nodes/0/kernel")), done.stderr
        travel(lab)

        # One loses its cable, fences itself, starts again, and gets kernel and image from the other.
        wait_until(lambda: "it passes kernel and image on" in lab.read("nodes/0/log"), "nothing is passed on")
        before, other = len(first.text), len(second.text)
        lab.cut(1, True)
        lab.wait_state(1, "down")
        second.wait_for("no master for 2 s: reboot", other)
        second.wait_for("RARP on eth0", other)
        lab.cut(1, False)
        second.wait_for("fetching the image, .* from 10.54.0.10\n[^\n]*switching kernels", other)
        # That one's kernel panics: what ran there ends, and it starts again by itself.
        panic = lab.bpsh("0", "/bin/sh", "-c", "echo c > /proc/sysrq-trigger; sleep 1000")
        assert panic.returncode == -signal.SIGKILL, panic.stderr
        assert "down (silent for 9 s)" in lab.read("nodes/0/log")
        first.wait_for(r"Kernel panic[\s\S]*RARP on eth0", before)
        for number in (0, 1):
            lab.wait_state(number, "up")

        # Its clock is the master's, and is looked at; the emulator's own may wander by some milliseconds meanwhile.
        wait_until(lambda: lab.read("nodes/1/clock"), "its clock is not looked at")
        assert abs(int(lab.read("nodes/1/clock").split()[1])) < 1_000_000

        lab.write("nodes/0/state", "pwroff")
        wait_until(lambda: first.ended, "the machine is still powered")
        assert lab.read("nodes/1/state") == "up\n"

        # Somebody at the other's keyboard has it start again: it leaves its master first.
        other = len(second.text)
        second.press("ctrl", "alt", "delete")
        second.wait_for("told by the console to reboot[\\s\\S]*reboot: Restarting system", other)
        lab.wait_state(1, "down")
        assert "silent" not in lab.read("nodes/1/reason")


FIRMWARE = ("e100/d102e_ucode.bin", bytes(134 * 4) + bytes([1, 2, 3]))
"""What the driver of an i82551 does not do without: a program for the card, which the emulated one passes over, and
where three figures are in it (drivers/net/ethernet/intel/e100.c, e100_request_firmware)."""


def test_a_general_kernel_and_cards_that_take_their_time_or_firmware(session_folder: Path) -> None:
    kernel = session_folder / "kernel"
    unpack(kernel_package("linux-image-amd64"), kernel)
    name, program = FIRMWARE
    (kernel / "lib/firmware" / name).parent.mkdir(parents=True)
    (kernel / "lib/firmware" / name).write_bytes(program)
    lab = Lab(session_folder / "boot2", config="pxe br0")
    try:
        lab.open()
        lab.make_images(kernel, "--drivers", "e100,e1000,virtio_net", media=("--pxe",))
        lab.start()
        # The link of this card is up seconds after its driver: the first requests are lost.
        with lab.machine(0, medium=[*NETWORK, "-device", "i6300esb"], card="e1000") as machine:
            # Beside it one with UEFI gets iPXE by HTTP, and then, by TFTP, all the way to phase 1.
            with lab.machine(1, medium=uefi(http=True)) as modern:
                modern.wait_for(r"Start HTTP Boot over IPv4[\s\S]*ipxe.efi[\s\S]*iPXE initialising devices...ok")
            with lab.machine(1, medium=uefi()) as modern:
                modern.wait_for(r"Start PXE over IPv4[\s\S]*NBP file downloaded successfully[\s\S]*phase1.img... ok")
                modern.wait_for("this is node 1\n")
            machine.wait_for("RARP on eth0")
            lab.wait_state(0, "up")
            assert "http://10.54.0.1:933/phase1.img... ok" in machine.text
            assert "drivers: e1000" in machine.text
            # Longer while kernels are switched, when nobody feeds it.
            fed = re.findall(r"the watchdog is fed; it resets the machine after (\d+) s", machine.text)
            assert fed == ["300", "60"]
            # It starts again because it is told to.
            before = len(machine.text)
            lab.write("nodes/0/state", "reboot")
            machine.wait_for(r"reboot: Restarting system[\s\S]*iPXE initialising devices", before)
        # This card's link is up with its firmware only, in both phases.
        with lab.machine(1, card="i82551") as machine:
            lab.wait_state(1, "up")
            assert re.findall("drivers: .*", machine.text) == 2 * ["drivers: e100 mii"]
            assert f"direct-loading firmware {name}" in lab.bpsh("1", "/bin/dmesg").stdout
    finally:
        lab.close()

"""What is in an image: small, the same each time, and enough for its programs, which run from it here in a chroot."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from boot import cpio, image, python
from boot.errors import BootError
from boot.image import Recipe
from boot.kernel import Kernel, find, unpack
from boot.modules import Table
from engine import packing
from tests.boot.lab import TOP, kernel_package
from tests.boot.lab import python as python_command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernel(session_folder: Path) -> Kernel:
    return unpack(kernel_package(), session_folder / "kernel")


@pytest.fixture(scope="module")
def operational(kernel: Kernel) -> list[cpio.Entry]:
    return image.entries(Recipe(2, kernel))


@pytest.fixture(scope="module")
def packed(operational: list[cpio.Entry]) -> bytes:
    return image.compress(cpio.archive(operational))


def test_the_operational_image_is_small_and_has_no_way_in(operational: list[cpio.Entry], packed: bytes) -> None:
    # 8 MB are promised: what is left of them is for interpreters with a libpython of their own (Debian's: 0.7 MB).
    assert len(cpio.archive(operational)) < 50e6 and len(packed) < 7.2e6
    inside = {entry.path.rpartition("/")[2] for entry in operational if entry.path.endswith(".ko")}
    assert inside == {"fuse.ko", "unix_diag.ko", "binfmt_misc.ko", "overlay.ko"}
    names = {entry.path.rpartition("/")[2] for entry in operational}
    assert not names & {"sh", "bash", "dash", "busybox", "login", "getty", "sshd", "shadow", "key", "bootkey"}
    (passwd,) = (entry.data for entry in operational if entry.path == "etc/passwd")
    assert passwd == b"root:*:0:0:root:/root:/bin/sh\n"


def test_the_same_input_gives_the_same_bytes_with_a_bar_on_a_terminal(packed: bytes, tmp_path: Path) -> None:
    screen, terminal = os.openpty()
    options = ["image", "2", "--kernel", kernel_package(), "-k", tmp_path / "bootkey", "-o", tmp_path / "images"]
    with subprocess.Popen(
        python_command("bpfs.cli.bpboot", *options), stdout=subprocess.PIPE, stderr=terminal, text=True, cwd=TOP
    ) as process:
        os.close(terminal)
        said = process.communicate()[0]
    shown = os.read(screen, 65536).decode()  # all that there is: the kernel keeps it
    os.close(screen)
    assert process.returncode == 0, shown
    assert re.fullmatch(r"[\d.]+ MB, compressed [\d.]+ MB, [\d.]+ s", said.splitlines()[0])
    steps = re.findall(r"\r\x1b\[Kphase 2 \[([# ]{10})\] ([\w ]+)(?=\r)", shown)
    shown_steps = [(bar.count("#"), step) for bar, step in steps]
    assert shown_steps == [(0, "Python"), (2, "kernel and drivers"), (5, "compressing"), (7, "writing")]
    assert shown.endswith("\r\x1b[K")  # nothing of it stays
    (made,) = (tmp_path / "images").glob("image-*")
    assert made.read_bytes() == packed


def test_drivers_come_with_what_they_need(kernel: Kernel) -> None:
    names = [module.name for module in kernel.closure(["virtio_net"])]
    assert names.index("failover") < names.index("net_failover") < names.index("virtio_net")
    assert "virtio:d00000001v*" in kernel.module("virtio_net").aliases
    assert {"virtio_net", "ixgbevf"} <= set(kernel.network_drivers())
    with pytest.raises(BootError, match="has no module no_such_card"):
        kernel.closure(["no_such_card"])


def test_drivers_travel_apart_to_machines_that_have_the_hardware(kernel: Kernel, tmp_path: Path) -> None:
    apart = image.parcels(Recipe(2, kernel))
    listed, names = apart.publish(tmp_path)
    table = Table.parse((tmp_path / listed.name).read_text())
    assert table.lines() == (tmp_path / listed.name).read_text() and len(names) == len(table.parcels) > 20
    assert image.parcels(Recipe(2, kernel)).packed == apart.packed
    card, scsi = "virtio:d00000001v00001AF4", "virtio:d00000008v00001AF4"
    assert table.drivers({card, "acpi:PNP0303:"}) == ["virtio_ring", "virtio", "failover", "net_failover", "virtio_net"]
    # Of a disk there is nothing to be seen before its controller has a driver.
    assert {"virtio_scsi", "scsi_mod", "sd_mod"} <= set(table.drivers({scsi})) and not table.drivers(set())
    chosen = Table.parse(table.lines(table.drivers({card})))
    assert chosen.drivers({card, scsi}) == table.drivers({card}) and set(chosen.files) == set(chosen.parcels)
    blob = table.parcels["virtio_net"]
    archive = subprocess.run(["zstd", "-dc", tmp_path / blob.name], capture_output=True, check=True).stdout
    assert archive == cpio.archive(
        [cpio.file(f"lib/modules/{table.files['virtio_net']}", kernel.module("virtio_net").data)]
    )


CARD = """
#define INFO(name, text) __attribute__((section(".modinfo"), used)) static const char name[] = text
INFO(a, "alias=pci:v00001234d*"); INFO(b, "firmware=maker/card.fw"); INFO(c, "firmware=maker/older.fw");
"""


@pytest.mark.parametrize("suffix", ["", ".xz", ".zst"])
def test_firmware_travels_with_its_driver(tmp_path: Path, suffix: str) -> None:
    modules, firmware = tmp_path / "lib/modules/6.1.0/kernel/drivers/net", tmp_path / "lib/firmware"
    for place in (modules, firmware / "maker", tmp_path / "boot"):
        place.mkdir(parents=True)
    (tmp_path / "boot/vmlinuz-6.1.0").touch()
    subprocess.run(["cc", "-x", "c", "-c", "-o", modules / "card.ko", "-"], input=CARD, text=True, check=True)
    found = find(tmp_path)
    assert image.without_firmware(Recipe(2, found, ("card",))) == ["card"]
    (firmware / "maker/card.fw").write_bytes(b"for the card")
    if suffix:
        command = {".xz": ["xz"], ".zst": ["zstd", "-q", "--rm"]}[suffix]
        subprocess.run([*command, firmware / "maker/card.fw"], check=True)
    for phase in (1, 2):
        recipe = Recipe(phase, found, ("card",))
        assert image.without_firmware(recipe) == []
        packed = image.parcels(recipe).packed["card"]
        parcel = subprocess.run(["zstd", "-dc"], input=packed, capture_output=True, check=True).stdout
        assert b"lib/firmware/maker/card.fw\0" in parcel and b"for the card" in parcel and b"older" not in parcel[-300:]
        inside = {entry.path: entry.data for entry in image.kernels_part(recipe)}
        assert inside.get("lib/firmware/maker/card.fw") == (b"for the card" if phase == 1 else None)


@pytest.mark.parametrize("line", ["module x", "parcel x y 1 z", "nothing", "module", "parcel"])
def test_no_table_of_modules(line: str) -> None:
    with pytest.raises(BootError):
        Table.parse(f"always fuse\n{line}\n")


def test_the_nodes_program_runs_from_the_image(operational: list[cpio.Entry], tmp_path: Path) -> None:
    for entry in operational:
        path = tmp_path / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry.mode >> 12 == 0o10:
            path.write_bytes(entry.data)
            path.chmod(entry.mode & 0o7777)
        elif entry.mode >> 12 == 0o12:
            path.symlink_to(entry.data.decode())
    environment = {
        "PYTHONHOME": f"/{python.HOME}", "LD_LIBRARY_PATH": f"/{python.LIBRARIES}",
        "PYTHONPATH": f"/{python.HOME}:/{python.HOME}/lib-dynload:/{python.SITE}",
    }  # fmt: skip
    (tmp_path / "proc").mkdir(exist_ok=True)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", f'mount --bind /proc {tmp_path}/proc && exec chroot {tmp_path} "$@"', "sh",
             f"/{python.PROGRAM}", "-S", "-s", "-B", *arguments],
            env={**environment, "PATH": os.environ["PATH"] + ":/usr/sbin"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-m", "bpfs.cli.bpslave", "--version").startswith("bpslave ")
    assert run("-c", "from engine import packing; print(packing.works())") == f"{packing.works()}\n"

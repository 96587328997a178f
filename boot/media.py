"""Phase 1 for what machines boot from: an ISO image, and the files of ROMs of network cards, by Debian's tools."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from boot.errors import BootError
from boot.files import replace
from boot.pxe import LOADERS, SCRIPT, script

IPXE = Path("/usr/lib/ipxe")

_MENU = """\
set timeout=0
menuentry "bpfs: boot from the network" {{
    linux /boot/phase1.vmlinuz {command_line}
    initrd /boot/phase1.img
}}
"""


def iso(path: Path, kernel: Path, packed: bytes, command_line: str) -> None:
    """An image of a disc that BIOS and UEFI start; written to a stick or disk as it is, it works there, too.

    Args:
        kernel, packed: of phase 1.
        command_line: for its kernel.

    Raises:
        BootError: the tools are not there, or fail.
    """
    with tempfile.TemporaryDirectory(prefix="bpboot-") as name:
        boot = Path(name) / "boot"
        (boot / "grub").mkdir(parents=True)
        (boot / "grub" / "grub.cfg").write_text(_MENU.format(command_line=command_line))
        (boot / "phase1.vmlinuz").write_bytes(kernel.read_bytes())
        (boot / "phase1.img").write_bytes(packed)
        temporary = path.with_name(f".{path.name}.part")
        command: list[str | Path] = ["grub-mkrescue", "-o", temporary, "--locales=", "--fonts=", "--themes=", name]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise BootError(
                "grub-mkrescue is not installed (packages grub-common grub-pc-bin grub-efi-amd64-bin xorriso mtools)"
            ) from None
        if run.returncode != 0:
            temporary.unlink(missing_ok=True)
            raise BootError(f"grub-mkrescue failed: {''.join(run.stderr.strip().splitlines()[-1:])}")
        temporary.rename(path)


def pxe(folder: Path, port: int, command_line: str) -> list[str]:
    """What bpbootd needs beside phase 1 to boot machines from their network cards' ROMs; gives the names.

    Raises:
        BootError: iPXE is not installed, or the folder cannot be written.
    """
    try:
        for name in LOADERS:
            replace(folder / name, (IPXE / name).read_bytes())
        replace(folder / SCRIPT, script(port, command_line).encode())
    except FileNotFoundError as error:
        raise BootError(f"{error.filename} is missing (package ipxe)") from None
    except OSError as error:
        raise BootError(f"{folder} cannot be written: {error.strerror}") from None
    return [*LOADERS, SCRIPT]

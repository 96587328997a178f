"""Smoke test of a built wheel: installs it without dependencies into a throw-away folder and looks at what came out.

Usage: check_wheel.py WHEEL
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Helpers without which the installed package cannot work.
NEEDED = [
    "bpfs/bin/ghost",
    "bpfs/bin/iorelay",
    "bpfs/bin/bpsh",
    "bpfs/bin/libbproc.so",
    "bpfs/bin/libbeostat.so",
    "bpfs/bin/libnss_beo.so.2",
    "bpfs/bin/include/sys/bproc.h",
    "bpfs/bin/include/sys/beostat.h",
    "bpfs/bin/pkgconfig/bproc.pc",
    "bpfs/bin/pkgconfig/beostat.pc",
    "engine/bin/nodeinit",
    "boot/bin/bpfs-init",
]


def problems(wheel: Path) -> list[str]:
    """Returns what is wrong with the wheel, one sentence each."""
    found = []
    if not wheel.name.endswith("-py3-none-linux_x86_64.whl"):
        found.append(f"wrong tag: {wheel.name}")
    with zipfile.ZipFile(wheel) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        for name in NEEDED:
            if name not in infos:
                found.append(f"{name} is missing")
        for page in ("man1/bpsh.1", "man3/bproc_move.3", "man5/bpfs.5"):
            if not any(name.endswith(f".data/data/share/man/{page}") for name in infos):
                found.append(f"{page} is missing")
        for name, info in infos.items():
            if name.endswith((".o", ".pyc")) or name.startswith("tests/"):
                found.append(f"{name} does not belong in a wheel")
            if "/bin/" in name and archive.read(info)[:4] == b"\x7fELF" and not (info.external_attr >> 16) & 0o111:
                found.append(f"{name} is not executable")
    if not found:
        found += install_problems(wheel)
    return found


def install_problems(wheel: Path) -> list[str]:
    """Installs the wheel and runs each of its commands with --help, outside the source tree."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
        if subprocess.run([*pip, str(wheel)], check=False).returncode != 0:
            return ["pip cannot install it"]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        environment.pop("BPFS", None)
        commands = sorted((site / "bin").iterdir())
        if not commands:
            found.append("it brings no commands")
        for command in commands:
            run = subprocess.run(
                [str(command), "--help"], env=environment, cwd=folder, capture_output=True, text=True, check=False
            )
            if run.returncode != 0 or "usage" not in run.stdout.lower():
                said = (run.stderr or run.stdout).strip()[-300:]
                found.append(f"{command.name} --help: exit code {run.returncode}: {said}")
    return found


if __name__ == "__main__":
    complaints = problems(Path(sys.argv[1]))
    for complaint in complaints:
        print(f"{sys.argv[1]}: {complaint}")
    sys.exit(bool(complaints))

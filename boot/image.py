"""The images of both phases, as entries of an archive, and the folder that the boot server serves."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from boot import cpio, manifest, modules, python
from boot.cpio import Entry
from boot.errors import BootError
from boot.files import replace
from boot.kernel import Kernel, Module
from boot.manifest import Blob
from boot.modules import Table

FOLDER = Path("/var/lib/beowulf/boot")
"""Where images are kept and served from."""

INIT = Path(__file__).parent / "bin" / "bpfs-init"

PROGRAMS = {
    1: ("boot.node.__main__",),
    2: ("boot.node.__main__", "boot.node.seed", "bpfs.cli.bpslave", "bpfs.view.daemon"),
}
"""What is run on a node in each phase."""

HARDWARE = (
    "virtio_pci", "virtio_mmio", "virtio_rng",
    "i6300esb", "iTCO_wdt", "lpc_ich", "i2c_i801", "wdat_wdt", "sp5100_tco", "hpwdt",
)  # fmt: skip
"""Modules beside the network drivers: buses, randomness, watchdogs (and what makes iTCO_wdt's device appear)."""
DISKS = ("virtio_blk", "virtio_scsi", "sd_mod", "ahci", "nvme", "megaraid_sas", "mpt3sas")
"""Of phase 2: what local disks hang on. The file systems on them come with bpmodprobe(8)."""
SOFTWARE = ("fuse", "unix_diag", "binfmt_misc", "overlay")
"""Modules that the node's programs want, whatever the hardware: the only ones in phase 2's image."""
FOLLOWERS = {
    "sd_mod": ("virtio_scsi", "ahci", "megaraid_sas", "mpt3sas"),
    "mlx4_en": ("mlx4_core",),
}
"""Modules for devices that appear only when one of these drivers has been loaded: they come with it."""

DEFAULT_DRIVERS = (
    "virtio_net", "e1000", "e1000e", "igb", "igc", "ixgbe", "i40e", "ice", "r8169", "tg3", "bnx2", "bnx2x", "bnxt_en",
    "mlx4_en", "mlx5_core", "forcedeth", "sky2", "atlantic", "vmxnet3", "hv_netvsc", "ena", "gve",
)  # fmt: skip
"""The cards of nine machines in ten; `--drivers all` takes every wired one."""

ABSENT = Path(__file__).parent / "absent"
"""What stands for modules of the standard library that are large (OpenSSL is a third of the image) and not used."""
WITHOUT = frozenset({
    *("_ssl", "_hashlib", "bz2", "_bz2", "lzma", "_lzma", "pdb", "doctest", "unittest"),
    *("multiprocessing", "_multiprocessing", "concurrent.futures.process"),  # boot.python's own
    *("email", "zipfile", "csv"),  # of the real importlib.metadata
})  # fmt: skip
"""What is left out without that."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an image is made of.

    Attributes:
        phase: 1 or 2.
        kernel: whose modules.
        drivers: names of network drivers, or ("all",).
        boot_key, port: phase 1: the public half of the server's boot key, and where it listens.
    """

    phase: int
    kernel: Kernel
    drivers: tuple[str, ...] = DEFAULT_DRIVERS
    boot_key: bytes = b""
    port: int = 0


def entries(recipe: Recipe) -> list[Entry]:
    """Everything in the image. Raises BootError: something that it needs is not there."""
    return [*programs(recipe.phase), *kernels_part(recipe)]


def programs(phase: int) -> list[Entry]:
    """What in an image is the same for every kernel. Raises BootError."""
    try:
        init = INIT.read_bytes()
    except OSError:
        raise BootError(f"{INIT} is missing: build it with make -C mountscripts helpers") from None
    found = [cpio.file("init", init, 0o755), cpio.file("etc/beowulf/phase", b"%d\n" % phase), *_skeleton()]
    absent = {path.stem: path.read_bytes() for path in ABSENT.glob("[!_]*.py")}
    found += python.entries(PROGRAMS[phase], WITHOUT | set(absent))
    for name, text in sorted(absent.items()):
        path = name.replace(".", "/")
        found.append(cpio.file(f"{python.HOME}/{path}.pyc", python.compiled_text(text, f"/{path}.py")))
    return found + (python.helpers() if phase == 2 else [])


def kernels_part(recipe: Recipe) -> list[Entry]:
    """The rest: modules, and what phase 1 knows of its server. Raises BootError."""
    found = list(_modules(recipe))
    if recipe.phase == 1:
        found.append(cpio.file("etc/beowulf/bootkey", recipe.boot_key + b"\n"))
        found.append(cpio.file("etc/beowulf/bootport", b"%d\n" % recipe.port))
    return found


def _skeleton() -> list[Entry]:
    folders = ("proc", "sys", "dev", "run", "tmp", "mnt", "var/tmp", "var/log", "root", "bpfs")
    devices = {"console": (5, 1), "null": (1, 3), "random": (1, 8), "urandom": (1, 9)}
    return [
        *(cpio.directory(name, 0o1777 if name.endswith("tmp") else 0o755) for name in folders),
        # Python wants randomness before anything is mounted.
        *(cpio.character_device(f"dev/{name}", *numbers) for name, numbers in devices.items()),
        cpio.link("etc/mtab", "../proc/self/mounts"),
        cpio.file("etc/hosts", b"127.0.0.1 localhost\n"),
        cpio.file("etc/passwd", b"root:*:0:0:root:/root:/bin/sh\n"),
        cpio.file("etc/group", b"root:*:0:\n"),
        cpio.file("etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files\n"),
    ]


def _modules(recipe: Recipe) -> Iterable[Entry]:
    kernel = recipe.kernel
    always = kernel.having(SOFTWARE) if recipe.phase == 2 else []
    found = kernel.closure(always) if recipe.phase == 2 else _drivers(recipe)
    for module in found:
        yield from _files(kernel, module)
    yield cpio.file(modules.IMAGE, _table(kernel, found, always).lines().encode())


def _drivers(recipe: Recipe) -> list[Module]:
    """What may be needed for a machine's hardware, by the recipe's choice of cards."""
    kernel = recipe.kernel
    if recipe.drivers == ("all",):
        network = kernel.network_drivers()
    elif recipe.drivers == DEFAULT_DRIVERS:
        network = kernel.having(DEFAULT_DRIVERS)
    else:
        network = list(recipe.drivers)
    more = kernel.having([*HARDWARE, *(DISKS if recipe.phase == 2 else ())])
    found = kernel.closure([*network, *more])
    names = [module.name for module in found]
    followers = [name for name, leaders in FOLLOWERS.items() if not set(leaders).isdisjoint(names)]
    return kernel.closure([*names, *kernel.having(followers)])


def _table(kernel: Kernel, found: Iterable[Module], always: Iterable[str] = ()) -> Table:
    table = Table(always=list(always))
    aliases = {module.name: module.aliases for module in found}
    for module in found:
        table.files[module.name] = f"{kernel.release}/{module.path}"
        table.needs[module.name] = list(module.needs)
        for name in (module.name, *FOLLOWERS.get(module.name, ())):
            table.aliases += [(pattern, module.name) for pattern in aliases.get(name, ())]
    return table


def _files(kernel: Kernel, module: Module) -> Iterator[Entry]:
    yield cpio.file(f"lib/modules/{kernel.release}/{module.path}", module.data)
    for name, data in kernel.firmware(module).items():
        yield cpio.file(f"lib/firmware/{name}", data)


def without_firmware(recipe: Recipe) -> list[str]:
    """The drivers that name files of firmware of which there is none here: cards may want them. Raises BootError."""
    named = (module for module in _drivers(recipe) if module.firmware)
    return [module.name for module in named if not recipe.kernel.firmware(module)]


def _lines(lines: Iterable[str]) -> bytes:
    return "".join(line + "\n" for line in sorted(lines)).encode()


@dataclass(frozen=True, slots=True)
class Parcels:
    """The drivers of phase 2's kernel, of which each node fetches those of its own hardware.

    Attributes:
        table: what there is, without where.
        packed: by name, an archive with the module as the kernel unpacks it behind the image's own.
    """

    table: Table
    packed: dict[str, bytes]

    def publish(self, folder: Path) -> tuple[Blob, set[str]]:
        """Put them into the folder; gives their list's file, and the names of all others. Raises OSError."""
        self.table.parcels = {name: store(folder, "driver", data) for name, data in self.packed.items()}
        return store(folder, "drivers", self.table.lines().encode()), {b.name for b in self.table.parcels.values()}


def parcels(recipe: Recipe) -> Parcels:
    """What of a phase 2 kernel travels apart. Raises BootError."""
    found = _drivers(recipe)
    archives = {module.name: cpio.archive(_files(recipe.kernel, module)) for module in found}
    return Parcels(_table(recipe.kernel, found), compress_each(archives))


LEVEL = 12
"""Of zstd: 16 makes phase 2 smaller by 4.5 % and takes 5.3 s of processor time for it, this one 1.4 s."""


def compress(archive: bytes) -> bytes:
    """By zstd, which the kernel unpacks fastest.

    The same bytes for the same archive, whatever the number of cores.

    Raises:
        BootError: zstd is not installed, or failed.
    """
    return _zstd("-T0", "-c", data=archive)


def compress_each(archives: Mapping[str, bytes]) -> dict[str, bytes]:
    """As `compress` does with one: many are small, and a process for each would start longer than it works.

    Raises:
        BootError: zstd is not installed, or failed.
    """
    with tempfile.TemporaryDirectory(prefix="bpboot-") as folder:
        paths = {name: Path(folder, name) for name in archives}
        for name, path in paths.items():
            path.write_bytes(archives[name])
        cores = len(os.sched_getaffinity(0))
        shares = [share for first in range(cores) if (share := list(paths.values())[first::cores])]
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda share: _zstd("-T1", "--", *share), shares))
        return {name: path.with_name(f"{name}.zst").read_bytes() for name, path in paths.items()}


def _zstd(*arguments: str | Path, data: bytes = b"") -> bytes:
    try:
        run = subprocess.run(["zstd", f"-{LEVEL}", "-q", *arguments], input=data, capture_output=True, check=True)
    except FileNotFoundError:
        raise BootError("zstd is not installed (package zstd)") from None
    except subprocess.CalledProcessError as error:
        raise BootError(f"zstd failed: {error.stderr.decode(errors='replace').strip()}") from None
    return run.stdout


def make_folder(folder: Path) -> None:
    """Where images are kept. Raises BootError."""
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise BootError(f"{folder} cannot be made: {error.strerror}") from None


def modules_folder(folder: Path, release: str) -> Path:
    """Where the modules of a phase 2 kernel are kept, for those that a node wants later."""
    return folder / "modules" / release


def keep_modules(folder: Path, kernel: Kernel, take: bool = False) -> None:
    """Keep the modules of a kernel that is not installed here, and drop those of others.

    Args:
        take: they are nobody else's, and may be moved.

    Raises:
        BootError: they cannot be written.
    """
    target = modules_folder(folder, kernel.release)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for other in target.parent.iterdir():
            if other != kernel.modules:
                shutil.rmtree(other)
        if take:
            shutil.move(kernel.modules, target)
        elif target != kernel.modules:
            shutil.copytree(kernel.modules, target, symlinks=True)
    except OSError as error:
        raise BootError(f"{target} cannot be written: {error.strerror or error}") from None


def publish(folder: Path, recipe: Recipe, packed: bytes, drivers: Parcels | None = None) -> list[str]:
    """Put an image and its kernel where they are wanted, and drop those that they replace; gives the names.

    Phase 1 is two files of fixed names, for whatever boots them. Phase 2 is served by digest, so that a node never gets
    half of one and half of another: the manifest, which is replaced last, names kernel, image and the list of drivers.

    Args:
        drivers: of phase 2, what travels apart.

    Raises:
        BootError: the folder cannot be written.
    """
    try:
        kernel = recipe.kernel.image.read_bytes()
        if recipe.phase == 1:
            replace(folder / "phase1.img", packed)
            replace(folder / "phase1.vmlinuz", kernel)
            return ["phase1.img", "phase1.vmlinuz"]
        blobs = {"kernel": store(folder, "kernel", kernel), "image": store(folder, "image", packed)}
        apart: set[str] = set()
        if drivers is not None:
            blobs["drivers"], apart = drivers.publish(folder)
        lines = [f"release {recipe.kernel.release}", *(f"{what} {blob}" for what, blob in blobs.items())]
        replace(folder / manifest.FILE, _lines(lines))
        names = {blob.name for blob in blobs.values()}
        for kind in ("kernel", "image", "drivers", "driver"):
            for path in folder.glob(f"{kind}-*"):
                if path.name not in names | apart:
                    path.unlink(missing_ok=True)
        return [*sorted(names), manifest.FILE]
    except OSError as error:
        raise BootError(f"{folder} cannot be written: {error.strerror}") from None


def store(folder: Path, name: str, data: bytes) -> Blob:
    """Put a file into the folder, under a name that has its digest. Raises OSError."""
    digest = hashlib.sha256(data).hexdigest()
    blob = Blob(f"{name}-{digest[:16]}", len(data), digest)
    replace(folder / blob.name, data)
    return blob

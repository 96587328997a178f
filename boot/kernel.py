"""A kernel and its modules: where they are, what they need, which devices they drive.

Everything is read from the modules themselves (their .modinfo section), so that an unpacked package is enough: no
depmod, no root, no running kernel of that version.
"""

from __future__ import annotations

import gzip
import lzma
import re
import subprocess
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from boot.elf import Elf, NotElf
from boot.errors import BootError

_SUFFIXES = (".ko", ".ko.xz", ".ko.gz", ".ko.zst")

_PACKED = ("", ".xz", ".zst")

FIRMWARE = Path("/lib/firmware")


@dataclass(frozen=True, slots=True)
class Module:
    """One kernel module.

    Attributes:
        name: with underscores, as the kernel says it.
        path: below lib/modules/RELEASE, the suffix .ko.
        data: uncompressed.
        needs: names of the modules that have to be loaded before.
        aliases: patterns of the devices that it drives.
        firmware: files that it may ask for, below /lib/firmware.
    """

    name: str
    path: str
    data: bytes
    needs: tuple[str, ...]
    aliases: tuple[str, ...]
    firmware: tuple[str, ...]


@dataclass
class Kernel:
    """A kernel with its modules, unpacked or installed.

    Attributes:
        image: the bootable file, vmlinuz.
        modules: its folder lib/modules/RELEASE.
        firmware_folder: what the devices' own programs are taken from; they come with no kernel.
    """

    image: Path
    modules: Path
    firmware_folder: Path = FIRMWARE
    _read: dict[str, Module] = field(default_factory=dict)

    @property
    def release(self) -> str:
        """As uname -r says it."""
        return self.modules.name

    @cached_property
    def _files(self) -> dict[str, Path]:
        found = {}
        for path in self.modules.glob("**/*.ko*"):
            if path.name.endswith(_SUFFIXES):
                found[plain(path.name)] = path
        return found

    @cached_property
    def _builtin(self) -> set[str]:
        try:
            return {plain(Path(line).name) for line in (self.modules / "modules.builtin").read_text().splitlines()}
        except OSError:
            return set()

    def network_drivers(self) -> list[str]:
        """Names of all drivers of wired network cards."""
        folder = self.modules / "kernel/drivers/net"
        wired = [folder / "ethernet", folder / "virtio_net.ko", folder / "hyperv", folder / "vmxnet3"]
        return sorted(
            name for name, path in self._files.items()
            if any(place in path.parents or place == path.with_name(f"{name}.ko") for place in wired)
        )  # fmt: skip

    def module(self, name: str) -> Module:
        """A module by its name.

        Raises:
            BootError: the kernel has none of this name.
        """
        name = plain(name)
        if name not in self._read:
            path = self._files.get(name)
            if path is None:
                raise BootError(f"kernel {self.release} has no module {name}")
            self._read[name] = _parse(name, path, self.modules, self._files)
        return self._read[name]

    def closure(self, wanted: Iterable[str]) -> list[Module]:
        """These modules and all that they need, each after what it needs; built-in ones left out.

        Raises:
            BootError: the kernel lacks one.
        """
        ordered: dict[str, Module] = {}

        def add(name: str) -> None:
            if name not in ordered and not (name in self._builtin and name not in self._files):
                module = self.module(name)
                for need in module.needs:
                    add(need)
                ordered.setdefault(name, module)

        for name in wanted:
            add(plain(name))
        return list(ordered.values())

    def firmware(self, module: Module) -> dict[str, bytes]:
        """What there is of the files that a module may ask for, uncompressed, by name.

        Of most drivers some are not, being for other cards or versions.

        Raises:
            BootError: one cannot be read.
        """
        found = {}
        for name in module.firmware:
            places = (self.firmware_folder / f"{more}{name}{suffix}" for more in ("updates/", "") for suffix in _PACKED)
            path = next((place for place in places if place.is_file()), None)
            if path is not None:
                try:
                    found[name] = _uncompressed(path)
                except (OSError, EOFError, lzma.LZMAError, subprocess.CalledProcessError) as error:
                    raise BootError(f"{path} cannot be read: {error}") from None
        return found

    def having(self, names: Iterable[str]) -> list[str]:
        """Those of the names that this kernel has as modules."""
        return [plain(name) for name in names if plain(name) in self._files]


def plain(name: str) -> str:
    """The kernel's own spelling of a module's name: virtio-net.ko.xz is virtio_net."""
    return name.partition(".")[0].replace("-", "_")


def find(where: Path) -> Kernel:
    """The kernel in a folder: an unpacked package, or / for the installed ones (the newest with modules counts).

    Raises:
        BootError: there is none.
    """
    found = []
    own = where / "lib/firmware"
    for image in where.glob("boot/vmlinuz-*"):
        release = image.name.removeprefix("vmlinuz-")
        for modules in (where / "lib/modules" / release, where / "usr/lib/modules" / release):
            if (modules / "kernel").is_dir():
                found.append(Kernel(image, modules, own if own.is_dir() else FIRMWARE))
                break
    if not found:
        raise BootError(f"{where} has no kernel: no boot/vmlinuz-RELEASE with lib/modules/RELEASE")
    return max(found, key=lambda kernel: _version(kernel.release))


class Package:
    """The kernel of a Debian package, which is unpacked while others work."""

    def __init__(self, package: Path, into: Path) -> None:
        """Starts. Raises BootError: there is no dpkg."""
        self._package = package
        self._into = into
        into.mkdir(parents=True, exist_ok=True)
        try:
            self._process = subprocess.Popen(["dpkg-deb", "-x", package, into], stderr=subprocess.PIPE, text=True)
        except OSError as error:
            raise BootError(f"dpkg-deb cannot be run: {error.strerror}") from None

    def kernel(self) -> Kernel:
        """The kernel, when it is unpacked. Raises BootError: it is none, or cannot be unpacked."""
        said = self._process.communicate()[1]
        if self._process.returncode != 0:
            raise BootError(f"{self._package} cannot be unpacked: {''.join(said.strip().splitlines()[-1:])}")
        return find(self._into)

    def close(self) -> None:
        """Nothing writes any more."""
        with self._process:
            self._process.kill()


def unpack(package: Path, into: Path) -> Kernel:
    """The kernel of a Debian package. Raises BootError."""
    return Package(package, into).kernel()


def _version(release: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", release)]


def _parse(name: str, path: Path, base: Path, known: Container[str]) -> Module:
    try:
        data = _uncompressed(path)
        info = Elf(data).section(".modinfo").decode(errors="replace").split("\0")
    except (OSError, NotElf, EOFError, lzma.LZMAError) as error:
        raise BootError(f"{path} is no kernel module: {error}") from None
    pairs = [line.partition("=")[::2] for line in info]
    needs = [plain(need) for key, value in pairs if key == "depends" for need in value.split(",") if need]
    # A soft dependency is wanted only where the kernel has it.
    soft = [value.partition("post:")[0] for key, value in pairs if key == "softdep" and value.startswith("pre:")]
    needs += [plain(need) for value in soft for need in value.split()[1:] if plain(need) in known]
    aliases = tuple(sorted(value for key, value in pairs if key == "alias"))
    firmware = tuple(sorted({value for key, value in pairs if key == "firmware"}))
    relative = path.relative_to(base).with_name(path.name.partition(".")[0] + ".ko")
    return Module(name, str(relative), data, tuple(needs), aliases, firmware)


def _uncompressed(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dc", path], capture_output=True, check=True).stdout
    return path.read_bytes()

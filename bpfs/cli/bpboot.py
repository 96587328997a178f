"""bpboot: makes the images that nodes boot from."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from errno import EINVAL
from pathlib import Path

from boot import cpio, image, kernel, media, signature
from boot.errors import BootError
from boot.image import DEFAULT_DRIVERS, Recipe
from boot.kernel import Kernel
from bpfs import config as configuration
from bpfs.cli.common import make_parser, run
from bpfs.config import DEFAULT_PATH, Config
from bpfs.errors import BpfsError

PROG = "bpboot"

_EPILOG = """\
`image 1` makes kernel and initial file system for whatever the machines boot from (disk, stick, PXE); it finds the
master and fetches from it what `image 2` has made: the kernel and file system that nodes run with. bpbootd serves a
new phase 2 from the next request on. Exit code: 0, 1 when something failed, 2 for a command line that makes no sense.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, "Makes the images that nodes boot from.", _EPILOG)
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    make = verbs.add_parser("image", help="make an image", description="Makes the image of phase 1 or 2.")
    make.add_argument("phase", metavar="PHASE", type=int, choices=(1, 2), help="1 or 2")
    make.add_argument("-c", "--config", metavar="FILE", type=Path, help=f"configuration ({DEFAULT_PATH} if there)")
    make.add_argument("-k", "--key", metavar="FILE", type=Path, help="the boot key (default: the configuration's)")
    make.add_argument(
        "--kernel", metavar="WHERE", type=Path, default=Path("/"),
        help="a Debian kernel package, or the folder with boot/ and lib/modules/ (default: /, the newest installed)",
    )  # fmt: skip
    make.add_argument(
        "--drivers", metavar="NAME,...", default="", help="network drivers, or `all` (default: the commonest twenty)"
    )
    make.add_argument("-o", "--output", metavar="FOLDER", type=Path, help="where to (default: the configuration's)")
    make.add_argument("--iso", metavar="FILE", type=Path, help="phase 1: also a disc or stick that boots it")
    make.add_argument("--pxe", action="store_true", help="phase 1: also what network cards boot (keyword `pxe`)")
    make.set_defaults(body=_image)
    return parser


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    try:
        code: int = args.body(args)
        return code
    except BootError as error:
        raise BpfsError(EINVAL, str(error)) from None


def _image(args: argparse.Namespace) -> int:
    if args.phase != 1 and (args.iso or args.pxe):
        raise BootError("only phase 1 is booted by machines: --iso and --pxe go with `image 1`")
    path = args.config or (DEFAULT_PATH if DEFAULT_PATH.exists() else None)
    config = configuration.read(path) if path is not None else Config()
    key = args.key or config.boot_key
    signature.ensure_key(key)
    folder = args.output or config.bootimages
    drivers = tuple(args.drivers.replace(",", " ").split()) or DEFAULT_DRIVERS
    image.make_folder(folder)
    progress, began = Progress(f"phase {args.phase}"), time.monotonic()
    with _kernel(args.kernel, folder) as find, progress:
        progress.step("Python")
        programs = image.programs(args.phase)
        progress.step("kernel and drivers")
        found = find()
        recipe = Recipe(args.phase, found, drivers, signature.public_key(key), config.bootport)
        archive = cpio.archive([*programs, *image.kernels_part(recipe)])
        progress.step("compressing")
        packed = image.compress(archive)
        apart = image.parcels(recipe) if args.phase == 2 else None
        bare = image.without_firmware(recipe)
        progress.step("writing")
        paths = [folder / name for name in image.publish(folder, recipe, packed, apart)]
        if args.phase == 2 and args.kernel != Path("/"):
            image.keep_modules(folder, found, take=not args.kernel.is_dir())
        if args.pxe:
            paths += [folder / name for name in media.pxe(folder, config.bootport, config.kernelcommandline)]
        if args.iso is not None:
            media.iso(args.iso, found.image, packed, config.kernelcommandline)
            paths.append(args.iso)
    print(f"{len(archive) / 1e6:.1f} MB, compressed {len(packed) / 1e6:.1f} MB, {time.monotonic() - began:.1f} s")
    if apart is not None:
        sizes = [len(data) / 1e6 for data in apart.packed.values()]
        print(f"{len(sizes)} drivers apart: {sum(sizes):.1f} MB, the largest {max(sizes, default=0):.1f} MB")
    if bare:
        print(f"without firmware, of which {found.firmware_folder} has none for them: {' '.join(bare)}")
    for written in paths:
        print(written)
    return 0


@contextmanager
def _kernel(where: Path, folder: Path) -> Iterator[Callable[[], Kernel]]:
    """Gives what gives the kernel: a package is unpacked meanwhile, where its modules need only be moved to be kept."""
    if where.is_dir():
        yield lambda: kernel.find(where)
        return
    if not where.exists():
        raise BootError(f"there is no {where}")
    with (
        tempfile.TemporaryDirectory(prefix=".bpboot-", dir=folder) as into,
        closing(kernel.Package(where, Path(into))) as package,
    ):
        yield package.kernel


class Progress:
    """A bar on a terminal, of which nothing stays; nothing elsewhere."""

    STEPS = 4

    def __init__(self, title: str) -> None:
        self._title = title
        self._count = 0
        self._shown = os.isatty(sys.stderr.fileno())

    def step(self, what: str) -> None:
        """The next step begins."""
        bar = ("#" * (10 * self._count // self.STEPS)).ljust(10)
        self._count += 1
        if self._shown:
            print(f"\r\x1b[K{self._title} [{bar}] {what}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

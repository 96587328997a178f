"""The Python of a node image: the very interpreter that runs here, with the modules that the node's programs import,
and the shared libraries that both want. So its C extensions fit by nature.

What the programs import is found by importing them in a fresh interpreter, together with everything that their own code
imports later, within functions.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import marshal
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from boot import cpio
from boot.elf import Elf
from boot.errors import BootError

HOME = "usr/lib/bpfs/python"
"""Where the standard library is in the image: away from where the master's own view comes to lie."""
SITE = "usr/lib/bpfs/site"
"""Where everything else is."""
LIBRARIES = "usr/lib/bpfs/lib"
PROGRAM = "usr/lib/bpfs/bpfs-python"
"""The interpreter."""

ALWAYS = (
    "encodings.ascii", "encodings.idna", "encodings.latin_1", "encodings.utf_8", "encodings.utf_8_sig", "stringprep",
    "importlib.util", "runpy", "pkgutil", "linecache", "traceback", "codecs", "io", "abc",
    "site", "os", "stat", "_strptime",
)  # fmt: skip
"""What the interpreter and the standard library import by themselves, at one time or another."""

BUILTIN_HASHES = ("_md5", "_sha1", "_sha2", "_sha256", "_sha512", "_sha3", "_blake2")
"""What hashlib takes where there is no OpenSSL; which of them exist differs between versions."""

OWN = ("boot", "bpfs", "engine")

_FOLDERS = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib")
"""Where the dynamic loader of Debian and others looks by itself."""


def entries(programs: Iterable[str], without: frozenset[str] = frozenset()) -> list[cpio.Entry]:
    """The interpreter, modules and libraries for these programs.

    Args:
        programs: modules that are run with ``python -m``.
        without: modules and packages to leave out although they are imported; the importer can do without.

    Raises:
        BootError: a program cannot be imported, or a library is not found.
    """
    modules = {name: path for name, path in _trace(programs).items() if not _is_within(name, without)}
    interpreter = Path(os.path.realpath(sys.executable))
    found = [cpio.file(PROGRAM, Elf(interpreter.read_bytes()).loadable(), 0o755)]
    sources = [(name, path) for name, path in modules.items() if path.endswith(".py")]
    with ProcessPoolExecutor() as pool:
        for (name, path), code in zip(sources, pool.map(_compiled, sources, chunksize=16), strict=True):
            found.append(cpio.file(_place(name, path) + ".pyc", code))
    objects = [Path(path) for path in modules.values() if path.endswith(".so")]
    for name, path in modules.items():
        if path.endswith(".so"):
            found.append(cpio.file(_place(name, path) + ".so", Elf(Path(path).read_bytes()).loadable()))
    return found + libraries([interpreter, *objects])


def _is_within(name: str, packages: frozenset[str]) -> bool:
    words = name.split(".")
    return any(".".join(words[:count]) in packages for count in range(1, len(words) + 1))


HELPERS = {"bpfs": ("iorelay",), "engine": ("nodeinit", "jobwatch", "callwatch", "runner.bin")}
"""What in C a node runs, by package; the rest is the master's."""


LOADED = ("liblz4.so.1", "libgcc_s.so.1")
"""Libraries that are loaded by name: by engine/packing.py, which can do without, and by the C library in pthread_exit,
which aborts without."""


def helpers() -> list[cpio.Entry]:
    """The programs in C that bpslave starts, and what is LOADED of libraries.

    Raises:
        BootError: one has not been built.
    """
    found = []
    for package, names in HELPERS.items():
        spec = importlib.util.find_spec(package)
        folders = spec.submodule_search_locations if spec is not None else None
        for name in names:
            path = Path((folders or ["?"])[0]) / "bin" / name
            try:
                found.append(cpio.file(f"{SITE}/{package}/bin/{name}", path.read_bytes(), 0o755))
            except OSError:
                raise BootError(f"{path} is missing: build it with make -C mountscripts helpers") from None
    for name in LOADED:
        with suppress(BootError):
            library = Elf(_find_library(name, []).read_bytes())
            found.append(cpio.file(f"{LIBRARIES}/{name}", library.loadable(), 0o755))
    return found


def libraries(objects: Iterable[Path]) -> list[cpio.Entry]:
    """The shared libraries that programs and libraries want, the dynamic loader included.

    Raises:
        BootError: one is not found.
    """
    found: dict[str, cpio.Entry] = {}
    waiting = list(objects)
    while waiting:
        path = waiting.pop()
        elf = Elf(path.read_bytes())
        if elf.interpreter is not None:
            target = elf.interpreter.lstrip("/")
            found[target] = cpio.file(target, Elf(Path(elf.interpreter).read_bytes()).loadable(), 0o755)
        names, folders = elf.needed()
        for name in names:
            if f"{LIBRARIES}/{name}" in found or any(target.endswith(f"/{name}") for target in found):
                continue
            library = _find_library(name, [folder.replace("$ORIGIN", str(path.parent)) for folder in folders])
            found[f"{LIBRARIES}/{name}"] = cpio.file(f"{LIBRARIES}/{name}", Elf(library.read_bytes()).loadable(), 0o755)
            waiting.append(library)
    return list(found.values())


def _find_library(name: str, folders: list[str]) -> Path:
    for folder in (*folders, *_FOLDERS):
        path = Path(folder) / name
        if path.exists():
            return path
    raise BootError(f"the library {name}, which the node image needs, is not found")


def _trace(programs: Iterable[str]) -> dict[str, str]:
    """Modules and their files."""
    wanted = [*ALWAYS, *programs]
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PATH": os.environ.get("PATH", "")}
    command = [sys.executable, "-s", "-B", "-m", "boot.python", *wanted]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise BootError(f"the node's programs cannot be imported: {run.stderr.strip().splitlines()[-1:]}")
    answer: dict[str, str] = json.loads(run.stdout)
    return dict(sorted(answer.items()))


def _import_all(wanted: list[str]) -> dict[str, str]:
    # Within the fresh interpreter. What an own module imports later is imported now, until nothing new appears.
    for name in wanted:
        __import__(name)
    for name in BUILTIN_HASHES:
        _try_import(name)
    scanned: set[str] = set()
    while own := [name for name in sys.modules if name.partition(".")[0] in OWN and name not in scanned]:
        for name in own:
            scanned.add(name)
            for imported in _imports(getattr(sys.modules[name], "__file__", None)):
                _try_import(imported)
    return {
        name: path for name, module in sys.modules.items()
        if name != "__main__" and (path := getattr(module, "__file__", None)) and path.endswith((".py", ".so"))
        and getattr(module.__spec__, "name", name) == name
    }  # fmt: skip


def _imports(path: str | None) -> set[str]:
    if path is None or not path.endswith(".py"):
        return set()
    found = set()
    for node in ast.walk(ast.parse(Path(path).read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _try_import(name: str) -> None:
    try:
        __import__(name)
    except ImportError:
        pass  # a name within a module, or a module of another Python


@lru_cache
def _standard() -> str:
    return os.path.dirname(os.__file__) + os.sep


def _place(name: str, path: str) -> str:
    """Where a module goes, without suffix."""
    home = HOME if path.startswith(_standard()) and "site-packages" not in path else SITE
    if "lib-dynload" in path:
        home = f"{HOME}/lib-dynload"
    words = name.split(".")
    if os.path.basename(path).startswith("__init__."):
        words.append("__init__")
    return "/".join([home, *words])


def _compiled(source: tuple[str, str]) -> bytes:
    name, path = source
    return compiled_text(Path(path).read_bytes(), "/" + _place(name, path) + ".py")


def compiled_text(text: str | bytes, name: str) -> bytes:
    """A module's text as a .pyc that stands for itself; the same bytes for the same text."""
    code = compile(text, name, "exec", dont_inherit=True, optimize=2)
    # Unchecked, for there is no source beside it. Version 2 of marshal has no references, which depend on chance.
    return importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8) + marshal.dumps(code, 2)


if __name__ == "__main__":
    # The programs' own output must not get into the answer.
    answer = os.dup(1)
    os.dup2(2, 1)
    os.write(answer, json.dumps(_import_all(sys.argv[1:])).encode())

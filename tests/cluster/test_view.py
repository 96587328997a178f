"""Nodes with an empty root: every program, library and script comes from the master by the view."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster.virtual import VirtualCluster, cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

BPSH = Path(__file__).parents[2] / "bpfs/bin/bpsh"


@pytest.fixture(scope="module")
def exported(session_folder):
    folder = session_folder / "exported"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def it(session_folder, exported):
    with cluster(session_folder / "view", "--root", "empty", "--export", str(exported), nodes=2) as made:
        yield made


def run(it: VirtualCluster, *command: str, **more) -> subprocess.CompletedProcess[str]:
    """Runs a command on node 0, from the root directory; its output travels through pipes."""
    return subprocess.run(
        [str(BPSH), "0", *command], capture_output=True, text=True, timeout=60, cwd="/",
        env={**os.environ, "BPFS": str(it.mount)}, **{"stdin": subprocess.DEVNULL, **more},
    )  # fmt: skip


def shell(it: VirtualCluster, script: str, **more) -> str:
    """What a bash on node 0 prints; it must succeed."""
    done = run(it, "/bin/bash", "-c", script, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_shell_with_pipelines(it):
    assert shell(it, "seq 1000 | sort -rn | head -3 | tr '\\n' ' '; uname -n") == "1000 999 998 n0\n"


def test_the_root_has_nothing_of_the_masters_but_what_is_exported(it, exported):
    names = shell(it, "ls -A /").split()
    assert {"bin", "dev", "etc", "lib", "proc", "sys", "tmp", "usr"} <= set(names)
    assert "work" not in names and "boot" not in names
    assert shell(it, "ls -A /root /home /var") == "/home:\n\n/root:\n\n/var:\ntmp\n"
    assert run(it, "/bin/cat", "/etc/shadow").returncode == 1
    assert "passwd" in shell(it, "ls /etc").split()
    assert "shadow" not in shell(it, "ls /etc").split()


def test_the_compiler(it):
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    source = '#include <stdio.h>\nint main(void) { puts("compiled there"); return 7; }'
    done = run(it, "/bin/bash", "-c", f"cd /tmp && echo '{source}' > a.c && gcc -o a a.c && ./a")
    assert (done.returncode, done.stdout) == (7, "compiled there\n"), done.stderr


def test_python_with_extension_modules(it):
    code = "import ssl, sqlite3, json, ctypes; print(json.dumps([6 * 7]), ctypes.CDLL('libm.so.6').abs(-3))"
    done = run(it, "/usr/bin/python3", "-c", code)
    assert (done.stdout, done.stderr) == ("[42] 3\n", "")


def test_scripts_and_the_errors_of_exec(it, exported):
    for name, text, mode in (
        ("good", "#!/usr/bin/perl\nprint join(',', @ARGV), \"\\n\";", 0o755),
        ("lost", "#!/no/such/interpreter\n", 0o755),
        ("plain", "#!/bin/sh\n", 0o644),
        ("noise", "\x7f no program", 0o755),
    ):
        (exported / name).write_text(text)
        (exported / name).chmod(mode)
    code = (
        "import os, errno, sys\n"
        "for path in sys.argv[1:]:\n"
        "    try: os.execv(path, [path] + (['x' * 4000000] if path.endswith('true') else []))\n"
        "    except OSError as error: print(errno.errorcode[error.errno])\n"
    )
    paths = [str(exported / name) for name in ("lost", "plain", "noise", "nothing")]
    done = run(it, "/usr/bin/python3", "-c", code, *paths, "/bin/true", "/etc/passwd/x")
    assert done.stdout.split() == ["ENOENT", "EACCES", "ENOEXEC", "ENOENT", "E2BIG", "ENOTDIR"], done.stderr
    assert run(it, str(exported / "good"), "1", "2").stdout == "1,2\n"

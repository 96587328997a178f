"""Exports, cache and prestaging by the configuration file, with the daemons as an administrator starts them."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from bpfs.rundir import RunDir
from tests.cluster.daemons import end, start
from tests.cluster.virtual import TOP, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def test_a_node_shows_and_fetches_what_the_file_says(session_folder):
    folder = session_folder / "configured"
    data = folder / "data"
    data.mkdir(parents=True)
    (data / "big").write_bytes(b"b" * 300_000)
    (data / "other").write_text("other\n")
    (folder / "unshown").write_text("no\n")
    (data / "libs").mkdir()
    for number, name in enumerate(("liba.so", "libb.so.1.2", "notes.txt", "soup")):
        (data / "libs" / name).write_bytes(bytes([number]) * 200_000)
    (folder / "libs").symlink_to(data / "libs")
    mount, key, config, cache = folder / "m", folder / "key", folder / "config", folder / "cache"
    mount.mkdir()
    key.write_text("0123456789abcdef0123456789abcdef\n")
    key.chmod(0o600)
    common = f"key {key}\nmount {mount}\nbprocport 0\nstate {folder}/state\n"
    fetched = f"prestage {data}/big {folder}/nothing\nlibraries {folder}/libs\ncachesize 50M\n"
    config.write_text(common + f"export default {data} {folder}/libs\n" + fetched)
    env = {**os.environ, "BPFS": str(mount)}

    def there(command: str) -> subprocess.CompletedProcess[str]:
        bpsh = [str(TOP / "bpfs/bin/bpsh"), "0", "/bin/sh", "-c", command]
        return subprocess.run(
            bpsh, env=env, cwd="/", capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )

    master = start("bpmaster", "-f", "-c", config, "--address", "127.0.0.1")
    slave = None
    try:
        rundir = RunDir(str(mount))
        wait_until(lambda: os.path.ismount(mount) and rundir.read("port"), "the master should be ready")
        host, port = (rundir.read("port") or "").split()
        # A node that cannot make its view is in error, and its slave starts afresh at a word.
        cache.mkdir()
        (cache / "root").touch()
        slave = start(
            "bpslave", "-f", "-k", key, "-n", 0, "--no-mount", "--root", "empty", "--cache", cache, f"{host}:{port}"
        )
        wait_until(lambda: text(mount / "nodes/0/state") == "error\n", "it should be in error")
        assert text(mount / "nodes/0/reason") == f"no view of the master's files: File exists ({cache}/root)\n"
        (cache / "root").unlink()
        (mount / "nodes/0/state").write_text("up\n")
        assert text(mount / "nodes/0/state") == "up\n"
        wait_until(lambda: "fetched_bytes 700000\n" in text(mount / "nodes/0/cache"), "it should fetch what was said")
        assert f"limit {50 << 20}\n" in text(mount / "nodes/0/cache")
        assert there(f"cat {data}/other").stdout == "other\n"
        assert there(f"cat {folder}/unshown").returncode == 1
        # What is exported beside it is seen at once, in a folder that the node sees already.
        (data / "more").mkdir()
        config.write_text(common + f"export /usr /lib /lib64 /bin {data}/more {data}/other\n")
        master.send_signal(signal.SIGHUP)
        wait_until(lambda: there(f"ls {data}").stdout == "more\nother\n", "the new exports should count")
        assert there(f"cat {data}/big").returncode == 1
        mine = f" {cache}/"
        assert mine in Path("/proc/self/mountinfo").read_text()
    finally:
        if slave is not None:
            end(slave)
        end(master)
    assert mine not in Path("/proc/self/mountinfo").read_text()

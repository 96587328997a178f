"""bpmaster and bpslave as plain daemons: options, configuration, SIGHUP, SIGTERM, complaints before they detach."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpfs.rundir import RunDir
from tests.cluster.virtual import TOP, VirtualCluster, bpcluster, left_behind, living, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def run(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs a daemon's command until it has detached (or complained)."""
    command = [sys.executable, "-m", f"bpfs.cli.{program}", *args]
    return subprocess.run(
        command, cwd=TOP, capture_output=True, text=True, timeout=100, check=False, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text("0123456789abcdef0123456789abcdef\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """A slave's log; who still writes to it in the end is ended."""
    path = tmp_path / "slave.log"
    yield path
    for pid in _writers(path):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not _writers(path), "the slave should be dead")


def _writers(log: Path) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.readlink(f"/proc/{name}/fd/1") == str(log):
                    found.append(int(name))
            except OSError:
                pass
    return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[VirtualCluster]:
    """A mount point, and the sweeping up of whatever a test leaves there."""
    mount = tmp_path / "m"
    mount.mkdir()
    it = VirtualCluster(mount)
    yield it
    if it.rundir.path.exists():
        processes = it.processes()
        assert bpcluster("down", mount=mount).returncode == 0
        assert left_behind(it, processes) == []


def test_master_and_slave_by_hand(place, key, log, tmp_path):
    config = tmp_path / "config"
    config.write_text(f"bprocport 0\nlease 20\nnodes 8\nkey {key}\nmount {place.mount}\nstate {tmp_path}/state/m\n")
    master = run("bpmaster", "--config", str(config), "--address", "127.0.0.1")
    assert (master.returncode, master.stdout, master.stderr) == (0, "", "")
    host, port = (place.rundir.read("port") or "").split()
    slave = run("bpslave", f"{host}:{port}", "--key", str(key), "--no-mount", "--log", str(log))
    assert (slave.returncode, slave.stdout, slave.stderr) == (0, "", "")
    wait_until(lambda: (place.mount / "nodes/0").exists(), "the slave should be there")
    place.wait_state(0, "up")

    second = run("bpmaster", "--config", str(config), "--address", "127.0.0.1")
    pid = place.pid("master")
    assert (second.returncode, second.stderr) == (1, f"bpmaster: a master runs at {place.mount} already (pid {pid})\n")

    # SIGHUP reads the file again: a mistake leaves everything as it is, and is named.
    config.write_text("leese 9\n")
    os.kill(place.pid("master"), signal.SIGHUP)
    wait_until(
        lambda: "unknown keyword 'leese'; the nearest known one is 'lease'" in place.log("master"), "a complaint"
    )
    config.write_text("nodes 9\nnode 7 52:54:00:00:00:07\n")
    os.kill(place.pid("master"), signal.SIGHUP)
    wait_until(lambda: (place.mount / "nodes/7").exists(), "node 7 should be there")
    assert place.state(7) == "down" and place.state(0) == "up"

    os.chown(place.mount / "nodes/0", 1234, -1)

    # SIGTERM: the slave's jobs end, the tree is unmounted; the slave goes on looking for a master.
    everybody = place.processes()
    os.kill(place.pid("master"), signal.SIGTERM)
    wait_until(lambda: not living(everybody), "the master should have ended")
    assert not os.path.ismount(place.mount)
    wait_until(lambda: "cannot connect" in log.read_text(), "the slave should look for a master")
    assert not place.rundir.path.exists()
    again = run("bpmaster", "--config", str(tmp_path / "none"))
    assert again.returncode == 2
    config.write_text(f"key {key}\nmount {place.mount}\nbprocport {port}\nstate {tmp_path}/state/m\n")
    assert run("bpmaster", "--config", str(config), "--address", host).returncode == 0
    assert place.read("nodes/0/owner") == "1234\n"
    place.wait_state(0, "up")  # the slave has found it, and has its number again
    assert place.read("status").splitlines() == [f"0 up 111 1234 root {host}"]
    # `halt` is the end of a slave that is no real node.
    place.write("nodes/0/state", "halt")
    place.wait_state(0, "down")
    wait_until(lambda: not _writers(log), "the slave should have ended")


def test_complaints_come_before_detaching(place, key, tmp_path):
    mount = str(place.mount)
    open_key = tmp_path / "open"
    open_key.write_text("0123456789abcdef\n")
    open_key.chmod(0o644)
    bad = tmp_path / "bad"
    bad.write_text("lease 10\npingtimeout 9\n")
    for args, code, text in [
        (
            ["--mount", mount, "--key", str(tmp_path / "none")],
            1,
            f"cannot read the cluster key {tmp_path}/none: No such file",
        ),
        (["--mount", mount, "--key", str(open_key)], 1, f"the cluster key {open_key} can be read by others (mode 644)"),
        (["--mount", f"{mount}/none", "--key", str(key), "--port", "0"], 1, f"{mount}/none is no directory"),
        (["--mount", mount, "--key", str(key), "--address", "203.0.113.1"], 1, "cannot listen on 203.0.113.1 port 932"),
        (["--mount", "/"], 2, "'/' cannot be a mount point"),
        (["--config", str(bad)], 2, f"{bad}: pingtimeout (9) must be more than lease (10)"),
        (["--port", "http"], 2, "invalid int value: 'http'"),
        (["--port", "70000"], 2, "--port must be a number from 0 to 65535"),
        (["--lease", "0"], 2, "--lease must be seconds from 0.1 to 86400"),
    ]:
        done = run("bpmaster", *args)
        assert (done.returncode, done.stdout) == (code, ""), (args, done)
        assert text in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, (args, done.stderr)
    for args, text in [
        (["somewhere:port"], "'somewhere:port' is no MASTER[:PORT]"),
        (["host", "--number", "-2"], "--number must not be negative"),
        (["host", "--key", str(tmp_path / "none")], "cannot read the cluster key"),
        ([], "required: MASTER[:PORT]"),
    ]:
        done = run("bpslave", *args)
        assert (done.returncode, done.stdout) == (2, ""), (args, done)
        assert text in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, (args, done.stderr)
    assert not os.path.ismount(mount)
    assert not RunDir(f"{mount}/none").path.exists() and not RunDir(mount).path.exists()


def test_a_service_manager_is_told_when_the_master_is_ready(place, key, tmp_path):
    """On a new machine: the folder that the configuration names is made, one on the command line is not."""
    mount, config = tmp_path / "made" / "m", tmp_path / "config"
    config.write_text(f"mount {mount}\nkey {key}\nstate {tmp_path / 'state'}\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        command = [sys.executable, "-m", "bpfs.cli.bpmaster", "-f", "--port", "0", "--config", config]
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        for end, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGUSR1, 0), (signal.SIGTERM, 0)):
            with subprocess.Popen(command, cwd=TOP, env=environment) as daemon:
                try:
                    assert manager.recv(100) == b"READY=1"
                    assert Path("/proc/self/mountinfo").read_text().count(f" {mount} ") == 1
                    assert os.listdir(mount)
                    sitter = subprocess.Popen(["sleep", "1000"], cwd=mount)
                finally:
                    daemon.send_signal(end)
                assert daemon.wait(30) == code
                sitter.kill()
                sitter.wait()
        assert f" {mount} " not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize("program", ["bpmaster", "bpslave"])
def test_help(program):
    done = run(program, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {program}") and done.stderr == ""

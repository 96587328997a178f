"""What quickstart and check say on machines that cannot run it: the real scripts, where something is missing.

They run in a copy of the tree without `.venv`, and nothing that they install reaches this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from pathlib import Path

import pip
import pytest

TOP = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root for mount namespaces")

# A /dev of our own, with what scripts and pip use.
DEV = """
mkdir -p dev; mount -t tmpfs none dev
for name in null zero urandom random; do : > dev/$name; mount --bind /dev/$name dev/$name; done
ln -s /proc/self/fd dev/fd
mount --move dev /dev
"""
# No package is installed, and apt-get cannot change what is there.
NO_PACKAGES = """
for folder in /var/lib/dpkg /var/lib/apt /var/cache/apt; do mount -t tmpfs none $folder; done
mkdir -p /var/lib/dpkg/updates /var/lib/dpkg/info /var/lib/apt/lists/partial /var/cache/apt/archives/partial
: > /var/lib/dpkg/status
mount --bind /usr /usr; mount -o remount,bind,ro /usr
"""


class Machine:
    """A machine that lacks something."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fakes = folder / "fakes"
        self.fakes.mkdir()
        (folder / "apt.conf").write_text('Acquire::Retries "0";\n')
        shutil.copytree(TOP / "mountscripts", folder / "tree/mountscripts")
        shutil.copy(TOP / "pyproject.toml", folder / "tree")

    def fake(self, name: str, script: str) -> Path:
        """Puts a program of this name before all others."""
        path = self.fakes / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        return path

    def kernel(self, release: str = "6.1.0-13-amd64", machine: str = "x86_64", system: str = "Linux") -> None:
        """What uname says."""
        self.fake("uname", f"case $1 in -r) echo {release} ;; -m) echo {machine} ;; *) echo {system} ;; esac")

    def run(self, script: str, prepare: str = "", *unshare: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["unshare", "-m", *unshare, "bash", "-ec", f"{prepare}\nexec tree/mountscripts/{script}"],
            cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
            env={
                "PATH": f"{self.fakes}:{os.environ['PATH']}",
                # Nothing that this machine has of its own, and no second try.
                "PIP_CONFIG_FILE": os.devnull,
                "PIP_RETRIES": "0",
                "APT_CONFIG": str(self.folder / "apt.conf"),
            },
        )  # fmt: skip

    def refusal(self, script: str, prepare: str = "", *unshare: str) -> str:
        """The last line of standard error: the script's own sentence."""
        run = self.run(script, prepare, *unshare)
        assert run.returncode == 1, run
        name, _, sentence = run.stderr.splitlines()[-1].partition(": ")
        assert name == script
        assert "Traceback" not in run.stdout
        return sentence


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(("release", "enough"), [
    ("4.19.0-26-amd64", False), ("5.12.19", False), ("5.4.0-150-generic", False),
    ("5.13.0-52-generic", True), ("5.13+", True), ("6.8.0-31-generic", True), ("10.0", True),
])  # fmt: skip
def test_an_old_kernel(machine: Machine, release: str, enough: bool) -> None:
    machine.kernel(release)
    machine.fake("modprobe", "exit 1")
    said = machine.refusal("quickstart", DEV)
    if enough:
        assert said.startswith("there is no /dev/fuse")  # the next thing that it looks at
    else:
        assert said == f"kernel {release} is too old: Linux 5.13 or newer is needed"


def test_another_machine(machine: Machine) -> None:
    machine.kernel(machine="aarch64")
    assert machine.refusal("quickstart") == "needs an x86_64 machine, this is aarch64"
    machine.kernel(system="FreeBSD")
    assert machine.refusal("quickstart") == "needs Linux, this is FreeBSD"


@pytest.mark.parametrize("script", ["quickstart", "check"])
def test_no_fuse(machine: Machine, script: str) -> None:
    asked = machine.folder / "asked"
    machine.fake("modprobe", f"echo $* > {asked}; exit 1")
    assert machine.refusal(script, DEV) == (
        "there is no /dev/fuse: load the module (modprobe fuse) or give the container the device"
    )
    assert asked.read_text() == "fuse\n"
    assert machine.refusal(script, f"{DEV}\nmkdir /dev/fuse") == (
        "/dev/fuse cannot be opened: the container does not allow the device"
    )


@pytest.mark.parametrize("capability", ["sys_admin", "sys_ptrace"])
def test_a_container_without_rights(machine: Machine, capability: str) -> None:
    drop = f'exec setpriv --bounding-set=-{capability} --inh-caps=-{capability} "$@"'
    machine.fake("without", drop)
    said = machine.refusal("quickstart", 'mount() { :; }; set -- tree/mountscripts/quickstart; exec without "$@"')
    assert said == f"root here lacks CAP_{capability.upper()} (an unprivileged container?)"


def test_too_old_a_python(machine: Machine) -> None:
    # `python3 -c` that checks the version fails, as that of an old one does.
    old = machine.fake("python3", '[ "$1" = --version ] && echo "Python 3.9.2" || exit 1')
    for minor in range(11, 15):
        shutil.copy(old, machine.fakes / f"python3.{minor}")
    machine.fake("dpkg-query", "echo installed")
    hide = f"mount --bind {old} $(realpath /usr/bin/python3)"
    assert machine.refusal("quickstart", hide) == (
        "needs Python 3.11 or newer, this is Python 3.9.2: install one, or name it with PYTHON=/path/to/python3"
    )


def test_no_network_for_packages(machine: Machine) -> None:
    said = machine.refusal("check", NO_PACKAGES, "-n")
    assert said.startswith(("apt-get could not install (no network?): ", "apt-get update failed (no network?)"))


@pytest.mark.slow
def test_no_network_for_pip(machine: Machine) -> None:
    # An environment that is there already, with pip and nothing else: made within a moment.
    environment = machine.folder / "tree/.venv"
    venv.create(environment, symlinks=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "pip").symlink_to(Path(pip.__file__).parent)
    machine.fake("dpkg-query", "echo installed")
    said = machine.refusal("check", "", "-n")
    log = environment / "install.log"
    assert said == f"pip could not install the dependencies (no network? all of it: {log})"
    assert "hatchling" in log.read_text()

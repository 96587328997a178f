"""The project as a package: metadata, entry points, scripts, and the session's own clean-up check."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bpfs
from tests import leftovers

TOP = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())


def run_pytest(folder: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs one test file under our conftest, as a session of its own."""
    # Not called tests: that name is taken by the one on the path.
    tests = folder / "sample"
    tests.mkdir()
    for name in ("conftest.py", "leftovers.py"):
        source = (TOP / "tests" / name).read_text()
        source = re.sub(r"^GRACE_SECONDS = .*", "GRACE_SECONDS = 1.0", source, flags=re.MULTILINE)
        (tests / name).write_text(source.replace("from tests import", "from sample import"))
    (tests / "test_sample.py").write_text(text)
    settings = '[tool.pytest.ini_options]\npythonpath = ["."]\naddopts = "--import-mode=importlib"\n'
    (folder / "pyproject.toml").write_text(settings)
    clean = {key: value for key, value in os.environ.items() if key != "BPFS_STRICT"}
    clean["PYTHONPATH"] = str(TOP)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "sample"],
        cwd=folder,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"])
def test_every_entry_point_can_be_imported(command: str) -> None:
    module, _, function = PROJECT["project"]["scripts"][command].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def verify_units(folder: Path, old: str = "", new: str = "") -> str:
    """What systemd-analyze (which reads units, and starts none) says of ours, with the commands of this environment."""
    for unit in (TOP / "mountscripts/systemd").glob("*.service"):
        text = unit.read_text().replace("/usr/local/bin/", f"{Path(sys.executable).parent}/")
        (folder / unit.name).write_text(text.replace(old, new) if old else text)
    command = ["systemd-analyze", "verify", "--man=no", *sorted(map(str, folder.glob("*.service")))]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (package systemd)"
)
def test_systemd_has_nothing_to_say_of_the_units(tmp_path: Path) -> None:
    assert verify_units(tmp_path) == ""
    assert "Restrat" in verify_units(tmp_path, "\nRestart=", "\nRestrat=")  # it would say so


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"])
def test_every_command_has_help_and_a_man_page(command: str) -> None:
    module = PROJECT["project"]["scripts"][command].partition(":")[0]
    code = f"import sys; sys.argv[0] = {command!r}; from {module} import main; sys.exit(main())"
    run = subprocess.run([sys.executable, "-c", code, "--help"], cwd=TOP, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "usage" in run.stdout.lower()
    assert list((TOP / "bpfs" / "man").glob(f"{command}.[1-8].md")), f"{command} has no man page"


def test_version_is_in_the_changelog() -> None:
    assert bpfs.__version__ in (TOP / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("script", ["mountscripts/check", "mountscripts/quickstart", "mountscripts/lib.sh", ".ci/run"])
def test_scripts_are_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", str(TOP / script)], check=True)


def test_scripts_want_root_and_say_so(session_folder: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to become somebody else")
    # The tree itself, and pytest's own folders, may lie where nobody else can read.
    copy = session_folder / "mountscripts"
    copy.mkdir(mode=0o755)
    for name in ("check", "lib.sh"):
        (copy / name).write_text((TOP / "mountscripts" / name).read_text())
    run = subprocess.run(
        ["bash", str(copy / "check")],
        cwd="/",
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("check: needs root")


def test_strict_turns_skips_into_failures(tmp_path: Path) -> None:
    text = "import pytest\n@pytest.mark.skipif(True, reason='no unicorns here')\ndef test_one(): pass\n"
    run = run_pytest(tmp_path, text, BPFS_STRICT="1")
    assert run.returncode == 1
    assert "test_one was skipped, and BPFS_STRICT=1 allows no skips: no unicorns here" in run.stdout


def test_without_strict_skips_are_skips(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, "import pytest\ndef test_one(): pytest.skip('no unicorns here')\n")
    assert run.returncode == 0, run.stdout


def test_a_process_left_behind_fails_the_session_and_is_removed(tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    text = (
        "import subprocess\n"
        "def test_one():\n"
        "    child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        f"    open({str(pidfile)!r}, 'w').write(str(child.pid))\n"
    )
    run = run_pytest(tmp_path, text)
    assert run.returncode == 1
    pid = int(pidfile.read_text())
    assert f"LEFT BEHIND: process {pid} is still there: sleep 1000" in run.stdout
    assert not leftovers.alive(pid)

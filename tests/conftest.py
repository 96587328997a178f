"""What all tests share: one temporary folder a session, nothing left behind, and strictness about skips.

BPFS_STRICT=1 turns every skip into a failure that names the reason: on a machine that is meant to have all abilities
a test that did not run is a test that failed.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest

from tests import leftovers

STRICT = os.environ.get("BPFS_STRICT", "") not in ("", "0")

# No deadlines: the machine may be busy with anything. In strict mode the same examples every time, so that a change is
# judged by itself; new examples are looked for on developers' machines.
hypothesis.settings.register_profile(
    "bpfs", deadline=None, derandomize=STRICT, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("bpfs")

_FOLDER = pytest.StashKey[Path]()
_FOUND = pytest.StashKey[list[str]]()


_ASKED_TO_IGNORE = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD),
    *(signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
)


def _take_own_group() -> None:
    # Without a terminal the group we were started in may be orphaned, and the kernel discards SIGTSTP for such: in a
    # group of our own, with a parent in another of the session, our children can be stopped.
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        if os.getsid(0) != os.getpid():
            os.setpgid(0, 0)


def _take_signals_back() -> None:
    """Undoes what nohup, or a script that runs us in its background (`check &`), has had us ignore.

    All that the tests start would inherit it, and wait for ever for an interrupt that nobody hears.
    """
    for number in _ASKED_TO_IGNORE:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _is_worker(config: pytest.Config) -> bool:
    """Whether this is one of several processes that share the tests (`check -n 2`, pytest-xdist)."""
    return hasattr(config, "workerinput")


def _make_folder(config: pytest.Config) -> Path:
    # Short, because paths of Unix sockets end at 107 characters. Below its starter's, which looks for what is left.
    if _is_worker(config):
        folder = Path(os.environ["TMPDIR"], os.environ["PYTEST_XDIST_WORKER"])
        folder.mkdir()
    else:
        folder = Path(tempfile.mkdtemp(prefix="bpt-", dir="/tmp"))
    # Ordinary users' processes move in tests, too: they have to get through to their files.
    folder.chmod(0o755)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--repeat", type=int, default=1, metavar="N", help="run every test N times in a row")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    times = metafunc.config.getoption("repeat")
    if times > 1:
        metafunc.fixturenames.append("_turn")
        metafunc.parametrize("_turn", range(times), ids=lambda turn: f"turn{turn}")


def pytest_configure(config: pytest.Config) -> None:
    _take_signals_back()
    _take_own_group()
    config.stash[_FOLDER] = folder = _make_folder(config)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = str(folder)
    # A cluster of the developer's must not be taken for one of the tests.
    os.environ.pop("BPFS", None)


@pytest.fixture(scope="session")
def session_folder(pytestconfig: pytest.Config) -> Path:
    """The folder that everything of this session lives in; its path marks our processes and mounts."""
    return pytestconfig.stash[_FOLDER]


def _skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if STRICT and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, and BPFS_STRICT=1 allows no skips: {_skip_reason(report)}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _is_worker(session.config):
        return
    folder = session.config.stash[_FOLDER]
    found = leftovers.wait_until_clean(folder)
    session.config.stash[_FOUND] = found
    if found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        leftovers.sweep(folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(_FOUND, []):
        terminalreporter.write_line(f"LEFT BEHIND: {line}", red=True)


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = config.stash.get(_FOLDER, None)
    if folder is not None and not leftovers.mounts(folder):
        shutil.rmtree(folder, ignore_errors=True)

"""kernel.pid_max of the master: in a pid namespace of its own, which has a setting of its own since Linux 6.14."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from bpfs.pidspace import BLOCK_BASE, BLOCK_SIZE, pid_block

LIMIT = 4 << 20  # PID_MAX_LIMIT, include/linux/threads.h

HEAD = """
import os, sys
from contextlib import ExitStack
from pathlib import Path
from bpfs import pidspace
setting = Path("/proc/sys/kernel/pid_max")
def value(): return int(setting.read_text())
"""


def run(script: str) -> str:
    """Runs Python in new pid and mount namespaces with a /run of their own."""
    inner = 'mount -t tmpfs none /run && exec "$@"'
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", inner, "sh"]
    done = subprocess.run(
        [*command, sys.executable, "-c", HEAD + script],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def own_setting() -> None:
    """Skips where the kernel has one pid_max for all."""
    if int(run("print(value())")) != LIMIT:
        pytest.skip("this kernel has one pid_max for all pid namespaces (older than 6.14)")


def test_blocks_of_a_thousand_nodes_lie_above_native_pids_and_apart() -> None:
    blocks = [pid_block(number) for number in range(1024)]
    assert blocks[0].start == BLOCK_BASE and blocks[-1].stop == LIMIT
    assert all(len(block) == BLOCK_SIZE for block in blocks)
    assert all(before.stop == after.start for before, after in itertools.pairwise(blocks))


@pytest.mark.usefixtures("own_setting")
def test_the_first_master_lowers_and_the_last_restores() -> None:
    script = """
with ExitStack() as first:
    first.enter_context(pidspace.own_pids())
    print(value())
    with pidspace.own_pids():
        first.pop_all().close()
        print(value())
    print(value(), pidspace.RECORD.exists())
"""
    assert run(script).split() == [str(BLOCK_BASE), str(BLOCK_BASE), str(LIMIT), "False"]


@pytest.mark.usefixtures("own_setting")
def test_no_process_of_the_master_gets_a_pid_of_a_block() -> None:
    script = """
with pidspace.own_pids():
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(pidspace.BLOCK_BASE - 3))
    for _ in range(6):
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
        print(pid < pidspace.BLOCK_BASE)
"""
    assert run(script).split() == ["True"] * 6


@pytest.mark.usefixtures("own_setting")
def test_what_a_killed_master_left_is_put_back() -> None:
    script = """
pid = os.fork()
if not pid:
    with pidspace.own_pids():
        os.kill(os.getpid(), 9)
os.waitpid(pid, 0)
print(value())
pidspace.restore()
print(value())
pidspace.restore()
"""
    assert run(script).split() == [str(BLOCK_BASE), str(LIMIT)]


@pytest.mark.usefixtures("own_setting")
@pytest.mark.parametrize("own", [32768, 3000000])
def test_a_setting_that_is_low_already_or_is_changed_meanwhile_stays(own: int) -> None:
    script = f"""
if {own} < pidspace.BLOCK_BASE:
    setting.write_text("{own}")
with pidspace.own_pids():
    setting.write_text("{own}")
print(value())
"""
    assert run(script).split() == [str(own)]

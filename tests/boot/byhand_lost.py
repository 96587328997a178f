"""What a real node does that has lost its master: wait, let its jobs run on, halt. `reboot` is in test_vm.

For maintainers, and not for CI, for it takes a minute: .venv/bin/python -m pytest tests/boot/byhand_lost.py
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.boot.lab import VM_DEADLINE, Lab, Machine, kernel_package
from tests.cluster.virtual import TOP

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

LEASE, AFTER = 4, 2


@pytest.fixture
def lab(session_folder: Path) -> Iterator[Lab]:
    lab = Lab(session_folder / "lost", machines=1)
    try:
        lab.open()
        lab.make_images(kernel_package())
        choose(lab, "wait")
        lab.start()
        yield lab
    finally:
        lab.close()


def choose(lab: Lab, onlost: str) -> None:
    """Writes the configuration that nodes hear of when they join."""
    lab.configure(f"lease {LEASE}\nonlost {onlost} {AFTER}")


def lose(lab: Lab, machine: Machine) -> int:
    """Pulls the cable, until the master has given the node up; gives how much the machine had said before."""
    before = len(machine.text)
    lab.cut(0, True)
    lab.wait_state(0, "down")
    return before


def test_nodes_that_have_lost_their_master(lab: Lab) -> None:
    with lab.machine(0) as machine:
        lab.wait_state(0, "up")

        before = lose(lab, machine)
        time.sleep(3 * AFTER)  # that nothing happens can only be seen by waiting
        choose(lab, "continue")
        lab.reload()
        lab.cut(0, False)
        lab.wait_state(0, "up")
        said = machine.text[before:]
        assert "no master for" not in said and "RARP on" not in said, said

        script = 'echo on; sleep 30; echo "<2>the job is over" > /dev/kmsg'
        command = [*lab.inside, TOP / "bpfs/bin/bpsh", "0", "/bin/sh", "-c", script]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/", env={"BPFS": str(lab.mount)}) as job:
            assert job.stdout is not None and job.stdout.readline() == "on\n"
            before = lose(lab, machine)
            assert job.wait(VM_DEADLINE) == -signal.SIGKILL  # as far as the master can know
            assert lab.read("nodes/0/reason").endswith("what runs there runs on to its end\n")
            choose(lab, "halt")
            lab.reload()
            lab.cut(0, False)
            machine.wait_for("the job is over", before)
        lab.wait_state(0, "up")
        said = machine.text[before:]
        assert "no master for" not in said and "RARP on" not in said, said

        before = lose(lab, machine)
        machine.wait_for(f"no master for {AFTER} s: halt[\\s\\S]*reboot: System halted", before)
        assert not machine.ended

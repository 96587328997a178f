"""Real machines, emulated: from power-on through both phases to `up`, and their life as nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.boot.lab import Lab, kernel_package
from tests.cluster.virtual import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def lab(session_folder: Path) -> Iterator[Lab]:
    package = kernel_package()
    lab = Lab(session_folder / "boot")
    try:
        lab.open()
        lab.make_images(package)
        lab.start()
        yield lab
    finally:
        lab.close()


def test_a_machine_with_nothing_on_it_becomes_a_node(lab: Lab) -> None:
    with lab.machine(0) as vm:
        lab.wait_state(0, "up")
        assert "fetching the image" in vm.text and "switching kernels" in vm.text
        assert lab.read("nodes/0/address") == "10.54.0.10\n"
        # The kernel is the one that the image was made with, not this machine's.
        assert lab.read("nodes/0/kernel").strip() in (lab.images / "manifest").read_text()
        before = len(vm.text)
        lab.write("nodes/0/state", "reboot")
        vm.wait_for("RARP on", before)
        lab.wait_state(0, "up")
        lab.write("nodes/0/state", "pwroff")
        wait_until(lambda: vm.ended, "the machine is still powered")

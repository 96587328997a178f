"""What tests share whose moves stand still at a phase: tests/cluster/held.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def gates(session_folder: Path, request: pytest.FixtureRequest) -> Path:
    """Where a module's gates are, for `holding`."""
    folder = session_folder / f"{request.path.stem}-gates"
    folder.mkdir()
    return folder


@pytest.fixture
def open_gates(gates: Path) -> Iterator[None]:
    """Around each test no gate is closed, or said to have been reached: where one fails, the next is not to wait."""
    for gate in gates.iterdir():
        gate.unlink(missing_ok=True)
    yield
    for gate in gates.iterdir():
        gate.unlink(missing_ok=True)

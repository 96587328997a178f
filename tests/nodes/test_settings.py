"""The file of what administrators set on nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpfs.config import Config
from bpfs.nodes import settings
from bpfs.nodes.admission import Admission
from bpfs.nodes.events import EventLog
from bpfs.nodes.registry import MASTER, NodeTable
from bpfs.nodes.settings import Settings
from bpfs.nodes.states import Cause, NodeState


def made(path: Path, limit: int = 16) -> tuple[NodeTable, Admission]:
    """A master's table with what the file says."""
    table = NodeTable(EventLog(), limit)
    admission = Admission(table, Config)
    table.enter(table.add(MASTER), NodeState.UP)
    Settings(table, admission, path).load()
    return table, admission


def test_a_new_master_has_what_the_old_was_told(tmp_path: Path) -> None:
    path = tmp_path / "new" / "state"
    table, admission = made(path)
    assert not path.exists()
    node = table.add(3)
    admission.remember(3, "two words", ("52:54:00:00:00:01", "52:54:00:00:00:02"))
    table.set_mode(node, 0)
    table.set_owner(node, 7)
    table.set_mode(table.get(MASTER), 0o100)
    node.barred = True
    table.set_reason(node, "because")
    again, known = made(path)
    # What is out of date goes when a master starts; of each node the last line counts.
    assert path.read_text() == "-1 - 100 0 0 - -\n3 down 000 7 0 twowords 52:54:00:00:00:01,52:54:00:00:00:02\n"
    node = again.get(3)
    assert (node.mode, node.uid, node.gid, node.barred, node.reserved) == (0, 7, 0, True, False)
    assert (node.state, node.reason) == (NodeState.DOWN, "down by the administrator")
    assert known.known(3)[1] == ("52:54:00:00:00:01", "52:54:00:00:00:02")
    assert again.get(MASTER).mode == 0o100 and again.get(MASTER).state is NodeState.UP


def test_it_is_written_only_when_it_would_differ(tmp_path: Path) -> None:
    path = tmp_path / "state"
    table, _ = made(path)
    node = table.add(1)
    table.set_group(node, 5)
    before = path.read_text()
    table.set_state(node, NodeState.BOOT, Cause.JOINED, "starts")
    table.set_state(node, NodeState.UP, Cause.READY)
    table.set_address(node, "10.0.0.1")
    assert path.read_text() == before == "1 - 111 0 5 - -\n"
    table.set_group(node, 0)
    assert path.read_text() == before + "1 - 111 0 0 - -\n"
    made(path)
    assert path.read_text() == ""
    assert list(tmp_path.iterdir()) == [path]


def test_it_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "SPARE", 10)
    path = tmp_path / "state"
    table, _ = made(path)
    node, other = table.add(1), table.add(2)
    table.set_group(other, 9)
    for turn in range(100):
        table.set_group(node, 5 + turn % 2)
        assert len(path.read_text().splitlines()) <= 15
    again, _ = made(path)
    assert (again.get(1).gid, again.get(2).gid) == (6, 9)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "7",
        "x - 111 0 0 - -",
        "2 - 777 0 0 - -",
        "2 - 9 0 0 - -",
        "2 maybe 111 0 0 - -",
        "99 - 110 0 0 - -",
        "2 - 111 a b - -",
        "\x00\xff" * 50,
    ],
)
def test_damage_is_passed_over(tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state"
    path.write_text(f"1 - 110 0 0 - -\n{line}\n5 - 100 0 0 - -\n")
    table, _ = made(path)
    assert (table.get(1).mode, table.get(5).mode) == (0o110, 0o100)
    assert "a line is passed over" in caplog.text


def test_a_torn_line_takes_nothing_with_it(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("1 - 110 0 0 - -\n1 - 11")
    table, _ = made(path)
    assert table.get(1).mode == 0o110
    table.set_owner(table.get(1), 7)
    assert path.read_text() == "1 - 110 0 0 - -\n1 - 110 7 0 - -\n"


def test_a_file_that_cannot_be_written_is_complained_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    table, _ = made(tmp_path / "file" / "state")
    table.set_owner(table.add(1), 7)
    assert "cannot be kept" in caplog.text and table.get(1).uid == 7

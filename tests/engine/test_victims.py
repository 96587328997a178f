"""The table of what moves (tests/victims/ZDTM.md) names nothing that is not there."""

import re
from pathlib import Path

from tests.engine.test_descriptors import MOVED

TESTS = Path(__file__).parent.parent
TABLE = TESTS / "victims/ZDTM.md"


def test_all_that_shows_what_moves_exists() -> None:
    victims = {path.stem for path in (TESTS / "victims").glob("*.c")} | {"memory-static", "memory-fixed"}
    programs = {path.name for folder in ("tests", "engine") for path in (TESTS.parent / folder).rglob("*.py")}
    moves = TABLE.read_text().split("## Moves")[1].split("## Refused")[0]
    rows = [line.split("|") for line in moves.splitlines() if line.startswith("|")][2:]
    shown = {name for row in rows for name in re.findall(r"`([^`]+)`", row[2])}
    assert shown <= victims | set(MOVED) | programs
    assert set(MOVED) - {"devices"} <= shown
    assert set(re.findall(r"`([a-z_]+\.py)`", TABLE.read_text())) <= programs

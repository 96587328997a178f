"""Sleeping processes sleep out their time: each kind of wait is moved in the middle."""

import time
from pathlib import Path

from tests.engine.moves import Mover, Refused, Victim
from tests.engine.test_moves import CLD_EXITED

KINDS = [
    "nanosleep", "nanosleep-norem", "clock_nanosleep", "clock_nanosleep-abs", "poll", "ppoll", "select", "pselect",
    "futex", "futex-abs",
    "epoll_wait", "epoll_pwait2", "sigtimedwait", "read",
]  # fmt: skip


def move_asleep(mover: Mover, programs: Path, folder: Path, kind: str) -> Victim:
    """Start a sleeper, freeze it in vain and then move it. One that a busy machine let end meanwhile is tried again."""
    for attempt in range(5):
        (folder / f"{kind}{attempt}").mkdir()
        one = Victim(programs / "sleep", folder / f"{kind}{attempt}", kind)
        try:
            worker = mover.worker()
            worker.ask("freeze", pid=one.pid, writing=False)
            worker.ask("release")
            worker.close()
            mover.away(one.pid, one.output.fileno())
            return one
        except Refused:
            assert one.process.wait() == 0, one.text()
            one.close()
    raise AssertionError(f"{kind}: it always ended before it could be moved")


def test_all_kinds_of_sleep_go_on(mover: Mover, programs: Path, tmp_path: Path) -> None:
    victims = []
    try:
        for kind in KINDS:
            victims.append(move_asleep(mover, programs, tmp_path, kind))
        reports: dict[int, tuple[int, int]] = {}
        deadline = time.monotonic() + 60
        while len(reports) < len(victims) and time.monotonic() < deadline:
            for report in mover.space.read_reports():
                reports[report.pid] = (report.code, report.status)
            time.sleep(0.01)
        results = {kind: (reports.get(one.pid), one.text()) for kind, one in zip(KINDS, victims, strict=True)}
        bad = {kind: found for kind, found in results.items() if found[0] != (CLD_EXITED, 0)}
        assert not bad
        print({kind: text.strip() for kind, (_, text) in results.items()})
    finally:
        for one in victims:
            one.close()

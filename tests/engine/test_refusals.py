"""What cannot move is refused by name, all of it at once, and never notices."""

import os
from collections.abc import Callable

import pytest

from engine.freeze import freeze
from tests.engine.moves import Mover, Refused, Victim
from tests.engine.test_deaths import assert_unharmed, maps


def refusals(mover: Mover, pid: int) -> list[str]:
    with pytest.raises(Refused) as refused:
        mover.away(pid, 0)
    assert refused.value.errno == 95
    return refused.value.refusals


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("child", ["living children"]),
        ("shared", ["living children", "shares memory with process"]),
        ("sysv", ["System V shared memory"]),
        ("seccomp", ["seccomp"]),
        ("several", ["living children", "System V"]),
    ],
)
def test_obstacles_are_named(mover: Mover, victim: Callable[..., Victim], kind: str, words: list[str]) -> None:
    one = victim("obstacle", kind)
    mappings = maps(one.pid)
    found = refusals(mover, one.pid)
    for word in words:
        assert any(word in sentence for sentence in found), found
    assert_unharmed(one, mappings)


def test_traced_process(mover: Mover, victim: Callable[..., Victim]) -> None:
    one = victim("memory")
    mappings = maps(one.pid)
    held = freeze(one.pid)  # by this process
    try:
        with pytest.raises(Refused) as refused:
            mover.away(one.pid, 0)
        assert refused.value.errno == 1  # EPERM
    finally:
        held.release()
    assert_unharmed(one, mappings)


def test_no_such_process(mover: Mover) -> None:
    with pytest.raises(Refused) as refused:
        mover.away(0x3FFFFF, 0)
    assert refused.value.errno == 3


def test_pid_in_use_there(mover: Mover, victim: Callable[..., Victim]) -> None:
    one = victim("memory")
    mappings = maps(one.pid)
    destination, source = mover.worker(), mover.worker()
    source.ask("freeze", pid=one.pid, writing=False)
    seen = source.ask("inspect")["process"]
    ids = {key: seen[key] for key in ("ppid", "pgid", "sid")}
    destination.ask("prepare", place={"init": mover.space.init}, address="127.0.0.1", pid=one.pid, **ids)
    with pytest.raises(Refused) as refused:
        mover.worker().ask("prepare", place={"init": mover.space.init}, address="127.0.0.1", pid=one.pid, **ids)
    assert refused.value.errno == 17
    destination.ask("discard")
    source.ask("release")
    assert_unharmed(one, mappings)


def test_everything_is_named_of_a_traced_process_too(mover: Mover, victim: Callable[..., Victim]) -> None:
    one = victim("obstacle", "several")
    held = freeze(one.pid)  # by this process
    try:
        found = mover.worker().ask("obstacles", pid=one.pid)["refusals"]
        assert found[0].startswith(f"it is traced by process {os.getpid()} ("), found
        assert any("living children" in line for line in found) and any("System V" in line for line in found), found
        assert not any("32-bit" in line for line in found)
    finally:
        held.release()
    found = mover.worker().ask("obstacles", pid=one.pid)["refusals"]
    assert len(found) == 3, found
    assert_unharmed(one, maps(one.pid))

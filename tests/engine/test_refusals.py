"""What cannot move is refused by name, all of it at once, and never notices."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.freeze import freeze
from engine.linux import procfs
from tests.engine.moves import Mover, Refused, Victim, until
from tests.engine.test_deaths import assert_unharmed, maps


def refusals(mover: Mover, pid: int) -> list[str]:
    with pytest.raises(Refused) as refused:
        mover.away(pid, 0)
    assert refused.value.errno == 95
    return refused.value.refusals or [refused.value.text]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("child", ["living children"]),
        ("shared", ["living children", "shares memory with process"]),
        ("sysv", ["System V shared memory"]),
        ("seccomp", ["seccomp"]),
        ("several", ["living children", "System V"]),
        ("descriptors", ["one of its threads has descriptors of its own"]),
        ("folder", ["one of its threads has a working directory and umask of its own"]),
        ("descriptors of a child", ["living children", "descriptors in common with process"]),
        ("folder of a child", ["living children", "a working directory and umask in common with process"]),
        ("uring", ["io_uring"]),
        ("aio", ["asynchronous I/O (io_setup)"]),
        ("queue", ["is a POSIX message queue (/bpfs-test (deleted))"]),
        ("dispatch", ["PR_SET_SYSCALL_USER_DISPATCH"]),
        ("mdwe", ["both written and executed"]),
        ("userfault", ["is a userfaultfd"]),
        ("secret", ["secret memory"]),
        ("ring", ["it maps", "socket:["]),
        ("counter", ["perf_event"]),
        ("hugetlb", ["huge pages (hugetlb)"]),
        ("user", ["a user namespace of its own"]),
        ("mount", ["a mount namespace of its own"]),
        ("network", ["a network namespace of its own"]),
        ("uts", ["a host name (uts) namespace of its own"]),
        ("IPC", ["a System V IPC namespace of its own"]),
        ("cgroup", ["a cgroup namespace of its own"]),
    ],
)
def test_obstacles_are_named(mover: Mover, victim: Callable[..., Victim], kind: str, words: list[str]) -> None:
    try:
        one = victim("obstacle", kind)
    except AssertionError as error:
        if "SKIP: " in str(error):
            pytest.skip(f"the kernel has no {kind}: {error}")
        raise
    mappings = maps(one.pid)
    found = refusals(mover, one.pid)
    for word in words:
        assert any(word in sentence for sentence in found), found
    assert_unharmed(one, mappings)


def test_a_pid_namespace_of_its_own(mover: Mover, programs: Path, tmp_path: Path) -> None:
    stop = tmp_path / "stop-inner"
    command = ["unshare", "--pid", "--fork", "--kill-child", str(programs / "memory"), str(stop)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as outer:
        try:
            until(lambda: (tmp_path / "stop-inner.ready").exists(), "the victim")
            (inner,) = procfs.children(outer.pid)
            assert refusals(mover, inner) == ["it has a pid namespace of its own"]
        finally:
            stop.touch()
        assert outer.wait(60) == 0


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


def test_everything_is_named_of_one_that_does_not_stop(mover: Mover, victim: Callable[..., Victim]) -> None:
    one = victim("obstacle", "vfork sysv")
    found = mover.worker().ask("obstacles", pid=one.pid)["refusals"]
    assert "waits for a child that it has by vfork" in found[0], found
    assert any("System V" in line for line in found) and any("runs in its memory" in line for line in found[1:]), found
    one.stop()
    assert one.process.wait() == 0, one.text()


def test_a_32_bit_program(mover: Mover, tmp_path: Path) -> None:
    code = 'void _start(void) { for (;;) __asm__ volatile("int $0x80" :: "a"(29)); }'  # pause
    program = tmp_path / "small"
    build = ["gcc", "-m32", "-static", "-nostdlib", "-fno-pic", "-no-pie", "-x", "c", "-o", str(program), "-"]
    if subprocess.run(build, input=code, text=True, stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("the compiler makes no 32-bit programs")
    try:
        process = subprocess.Popen([str(program)])
    except OSError as error:
        pytest.skip(f"the kernel runs no 32-bit programs: {error}")
    try:
        assert any("32-bit" in line for line in refusals(mover, process.pid))
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_a_program_in_vfork_waits_for_its_child(mover: Mover, victim: Callable[..., Victim]) -> None:
    one = victim("obstacle", "vfork")
    worker = mover.worker()
    with pytest.raises(Refused, match="waits for a child that it has by vfork"):
        worker.ask("freeze", pid=one.pid)
    worker.close()
    one.stop()
    assert one.process.wait() == 0, one.text()

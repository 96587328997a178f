"""A worker is killed at each phase: the source runs on unharmed, nothing half-built stays."""

import errno
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.freeze import freeze
from engine.linux import packets, procfs
from engine.memory import send_pages
from engine.runner import ProcessGone
from engine.zygote import _SESSIONS_MAX, Zygote
from tests.engine.moves import Mover, Refused, Victim, Worker, until
from tests.engine.test_home import ghost_program, go_away
from tests.engine.test_moves import CLD_EXITED, ended


def children(pid: int) -> set[int]:
    return {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def new_worker(mover: Mover) -> tuple[Worker, int]:
    """A worker and its pid."""
    worker = mover.worker()
    return worker, worker.ask("hello")["pid"]


def kill_worker(zygote: Zygote, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: pid not in children(zygote.pid), "the worker's end")


def status(pid: int, key: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return line.split(":", 1)[1].strip()
    return ""


def test_memory_of_a_process_that_is_killed_meanwhile_is_never_made_up(victim: Callable[..., Victim]) -> None:
    one = victim("memory")
    frozen = freeze(one.pid)
    runs = [(vma.start, vma.end - vma.start) for vma in procfs.parse_maps(procfs.read(f"{frozen.live}/maps"))[:1]]
    sent: list[bytes] = []
    assert send_pages(one.pid, frozen.memory, runs, lambda part: sent.append(bytes(part))) == runs[0][1]
    os.kill(one.pid, signal.SIGKILL)
    until(lambda: procfs.has_ended(f"/proc/{one.pid}"), "its end")
    with pytest.raises(ProcessGone):
        send_pages(one.pid, frozen.memory, runs, lambda part: sent.append(bytes(part)))
    assert len(sent) == 1
    frozen.close()


def assert_unharmed(one: Victim, mappings: str) -> None:
    """It runs, nobody traces it, its mappings are as they were; then it checks itself."""
    until(lambda: status(one.pid, "TracerPid") == "0", "no tracer")
    until(lambda: maps(one.pid) == mappings, "the mappings as they were")
    one.stop()
    assert one.process.wait() == 0, one.text()


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("name", ["memory", "threads"])
@pytest.mark.parametrize("op", ["inspect", "send", "release"])
def test_a_source_that_dies_is_no_missing_file(mover: Mover, victim: Callable[..., Victim], name: str, op: str) -> None:
    one = victim(name, *(["3"] if name == "threads" else []))
    source = mover.worker()
    source.ask("freeze", pid=one.pid, writing=False)
    if op == "send":
        source.ask("inspect")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.kill(one.pid, signal.SIGKILL)
        until(lambda: status(one.pid, "State")[:1] in ("Z", "X", ""), "its end")
        if op == "release":
            source.ask(op)  # nothing is left to let go
        else:
            with pytest.raises(Refused, match=f"process {one.pid} has ended") as refused:
                source.ask(op, host="127.0.0.1", port=listener.getsockname()[1], token=bytes(32))
            assert refused.value.errno == errno.ESRCH
    source.close()


@pytest.mark.parametrize("phase", ["freeze", "inspect", "sending", "sent"])
@pytest.mark.parametrize("name", ["memory", "signals"])
def test_source_worker_dies(mover: Mover, victim: Callable[..., Victim], zygote: Zygote, phase: str, name: str) -> None:
    one = victim(name, *(["all"] if name == "signals" else []))
    mappings = maps(one.pid)
    source, pid = new_worker(mover)
    destination = mover.worker()
    source.ask("freeze", pid=one.pid, writing=False)
    if phase != "freeze":
        seen = source.ask("inspect")
    if phase in ("sending", "sent"):
        ids = {key: seen["process"][key] for key in ("pid", "ppid", "pgid", "sid")}
        ready = destination.ask("prepare", place={"init": mover.space.init}, address="127.0.0.1", **ids)
        if phase == "sent":
            destination.start("receive", [0], externals={e["key"]: 0 for e in seen["externals"]}, timeout_s=30)
            source.ask("send", host="127.0.0.1", port=ready["port"], token=ready["token"])
            destination.finish()
        else:  # nobody accepts: it waits for the answer, the runner in the process
            source.start("send", host="127.0.0.1", port=ready["port"], token=ready["token"])
            until(lambda: maps(one.pid) != mappings, "the scratch")
    kill_worker(zygote, pid)
    destination.close()
    assert_unharmed(one, mappings)
    until(lambda: mover.space.hostpid(one.pid) is None, "the end of the half-built process")


@pytest.mark.parametrize("phase", ["prepare", "receiving", "held"])
def test_destination_worker_dies(mover: Mover, victim: Callable[..., Victim], zygote: Zygote, phase: str) -> None:
    one = victim("memory")
    mappings = maps(one.pid)
    source = mover.worker()
    destination, pid = new_worker(mover)
    source.ask("freeze", pid=one.pid, writing=False)
    seen = source.ask("inspect")
    ids = {key: seen["process"][key] for key in ("pid", "ppid", "pgid", "sid")}
    ready = destination.ask("prepare", place={"init": mover.space.init}, address="127.0.0.1", **ids)
    if phase != "prepare":
        destination.start("receive", [0], externals={e["key"]: 0 for e in seen["externals"]}, timeout_s=30)
    if phase == "held":
        source.ask("send", host="127.0.0.1", port=ready["port"], token=ready["token"])
        destination.finish()
    kill_worker(zygote, pid)
    until(lambda: mover.space.hostpid(one.pid) is None, "the end of the half-built process")
    if phase != "held":
        with pytest.raises(Refused):
            source.ask("send", host="127.0.0.1", port=ready["port"], token=ready["token"])
    source.ask("release")
    assert_unharmed(one, mappings)


@pytest.mark.parametrize("phase", ["prepare", "held"])
def test_home_worker_dies(
    mover: Mover, victim: Callable[..., Victim], programs: Path, zygote: Zygote, phase: str
) -> None:
    one = victim("memory")
    program = ghost_program(programs)
    control, hostpid = go_away(mover, one, program)
    source = mover.worker()
    destination, pid = new_worker(mover)
    source.ask("freeze", pid=hostpid, writing=False)
    seen = source.ask("inspect")
    if phase == "prepare":
        ids = {key: seen["process"][key] for key in ("pid", "ppid", "pgid", "sid")}
        destination.ask("prepare", place={"ghost": one.pid}, address="127.0.0.1", **ids)
    else:
        mover._transfer(source, destination, seen, {"ghost": one.pid}, {}, [])
    kill_worker(zygote, pid)
    if phase == "held":
        assert control.recv(64) == b"ghost"  # it runs anew
    source.ask("release")
    control.send(b"?")
    assert control.recv(64)
    assert mover.home(hostpid, one.pid) == one.pid
    one.stop()
    assert one.process.wait() == 0, one.text()
    os.close(program)
    control.close()


def test_many_moves_there_and_back_leave_no_growth(
    mover: Mover, victim: Callable[..., Victim], programs: Path, zygote: Zygote
) -> None:
    one = victim("memory")
    program = ghost_program(programs)

    def there_and_back() -> None:
        control, hostpid = go_away(mover, one, program)
        mover.home(hostpid, one.pid)
        control.close()

    def size() -> tuple[int, int, int]:
        return (
            maps(one.pid).count("\n"),
            int(status(one.pid, "VmRSS").split()[0]),
            len(os.listdir(f"/proc/{one.pid}/fd")),
        )

    there_and_back()
    mappings, resident, descriptors = size()
    ours = len(os.listdir("/proc/self/fd"))
    for _ in range(40):
        there_and_back()
    after = size()
    assert after[0] == mappings and after[2] == descriptors
    assert after[1] < resident + 512  # kB
    assert len(os.listdir("/proc/self/fd")) == ours
    until(lambda: len(mover.space.placeholders()) <= 3, "no more placeholders")
    one.stop()
    assert one.process.wait() == 0, one.text()
    os.close(program)


@pytest.mark.slow
def test_a_worker_that_has_served_often_is_followed_by_a_fresh_one(zygote: Zygote) -> None:
    # One session after the other: the same worker serves them, up to its last; none may be given to one that leaves.
    pids = []
    for _ in range(_SESSIONS_MAX + 20):
        with zygote.worker() as sock:
            sock.settimeout(60)
            packets.send(sock, {"op": "hello"})
            packet = packets.receive(sock)
            assert packet is not None
            pids.append(packet[0]["pid"])
        # It says that it is idle a moment later; without that the next would be another one.
        until(lambda: sleeps_or_ended(pids[-1]), "the worker to wait for its next session, or to end")
    assert 2 <= len(set(pids)) <= 20


def sleeps_or_ended(pid: int) -> bool:
    """Whether it waits for something, or has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "SZX"
    except OSError:
        return True


def whole_copy(mover: Mover, one: Victim) -> tuple[Worker, int, Worker]:
    """The worker that holds the frozen source, its pid, and the one that holds the whole copy."""
    (source, pid), destination = new_worker(mover), mover.worker()
    seen = source.ask("freeze", pid=one.pid, inspect=True, moving=True)
    ids = {key: seen["process"][key] for key in ("pid", "ppid", "pgid", "sid")}
    ready = destination.ask("prepare", place={"init": mover.space.init}, address="127.0.0.1", **ids)
    externals = {e["key"]: 0 for e in seen["externals"]}
    destination.start("receive", [one.output.fileno()], externals=externals, timeout_s=30)
    source.ask("send", host="127.0.0.1", port=ready["port"], token=ready["token"])
    destination.finish()
    return source, pid, destination


def test_the_source_itself_lets_its_copy_run(mover: Mover, victim: Callable[..., Victim]) -> None:
    one = victim("memory")
    source, _, destination = whole_copy(mover, one)
    destination.start("follow")
    source.ask("vanish", go=True)
    followed = destination.finish()
    assert followed["running"]
    assert followed["hostpid"] == mover.space.hostpid(one.pid)
    one.stop()
    assert ended(mover, one.pid) == (CLD_EXITED, 0), one.text()


def test_a_source_that_dies_without_a_word_lets_nothing_run(
    mover: Mover, victim: Callable[..., Victim], zygote: Zygote
) -> None:
    one = victim("memory")
    mappings = maps(one.pid)
    _, pid, destination = whole_copy(mover, one)
    destination.start("follow")
    kill_worker(zygote, pid)
    assert not destination.finish()["running"]
    destination.ask("discard")
    assert_unharmed(one, mappings)
    until(lambda: mover.space.hostpid(one.pid) is None, "the end of the copy")


def test_a_source_does_not_go_while_its_copy_is_gone(
    mover: Mover, victim: Callable[..., Victim], zygote: Zygote
) -> None:
    one = victim("memory")
    mappings = maps(one.pid)
    source, _, destination = whole_copy(mover, one)
    kill_worker(zygote, destination.ask("hello")["pid"])
    with pytest.raises(Refused, match="copy is gone"):
        source.ask("vanish", go=True)
    source.ask("release")
    assert_unharmed(one, mappings)

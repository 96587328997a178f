"""Checkpoints and restarts of real processes through /bpfs, on the master and on nodes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.moving import counting, echo, finish, move, place
from tests.cluster.virtual import cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# Appends a line a step to its file; each number is kept in several places, and checked against the others.
STEPPER = """
import os, sys, threading, time
lock, n, seen = threading.Lock(), 0, []
def other():
    while True:
        time.sleep(0.003)
        with lock:
            assert len(seen) == n
threads = int(sys.argv[2])
for _ in range(threads):
    threading.Thread(target=other, daemon=True).start()
with open(sys.argv[1], "a", buffering=1) as file:
    while True:
        with lock:
            n += 1
            seen.append(n)
        file.write(f"{n} {os.getpid()} {threading.active_count()}\\n")
        time.sleep(0.01)
"""
QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@pytest.fixture(scope="module")
def it(session_folder):
    with cluster(session_folder / "checkpoints", nodes=2) as made:
        yield made


@pytest.fixture
def folder(session_folder, request):
    path = session_folder / f"ck-{request.node.name.translate(str.maketrans('[]/- ', '_____'))}"
    path.mkdir(mode=0o777)
    path.chmod(0o777)
    return path


def steps(folder: Path) -> list[int]:
    return [int(line.split()[0]) for line in (folder / "out").read_text().splitlines()]


def goes_on(folder: Path, more: int = 3) -> None:
    """Waits until the process has made steps, and checks that none was left out or came twice in a row."""
    begun = len(steps(folder))
    wait_until(lambda: len(steps(folder)) >= begun + more, f"no steps after {steps(folder)[-3:]}")
    numbers = steps(folder)[begun:]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@contextmanager
def stepping(folder: Path, threads: int = 0, **who):
    process = subprocess.Popen(
        ["/usr/bin/python3", "-c", STEPPER, str(folder / "out"), str(threads)], cwd="/", **QUIET, **who
    )
    try:
        wait_until(lambda: (folder / "out").exists() and steps(folder), "it did not begin")
        yield process
    finally:
        process.kill()
        process.wait()


def checkpoint(it, pid: int, order: str) -> None:
    done = echo(it, order, f"procs/{pid}/checkpoint")
    assert done.returncode == 0, done.stderr + it.read(f"procs/{pid}/checkpoint")


def restart(it, order: str, **who) -> int:
    """Brings one up; its pid."""
    done = subprocess.run(
        ["bash", "-c", f"echo '{order}' > {it.mount}/procs/restart"], capture_output=True, text=True, timeout=60, **who
    )
    assert done.returncode == 0, done.stderr + it.read("procs/restart")
    return int(it.read("procs/restart").splitlines()[-1].split("pid=")[1].split()[0])


def gone(pid: int) -> None:
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"{pid} is still there")


@contextmanager
def ended(pid: int):
    try:
        yield
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        gone(pid)


def bpckpt(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bpfs.cli.bpckpt", *map(str, words)], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("where", [-1, 0])
@pytest.mark.parametrize("again", [-1, 1])
def test_a_process_comes_back_under_its_pid_where_its_image_was_taken(it, folder, where, again):
    with stepping(folder, threads=2) as process:
        if where != -1:
            move(it, process.pid, where)
        checkpoint(it, process.pid, f"{folder}/ck")
        goes_on(folder)  # it has not noticed
        taken = it.read(f"procs/{process.pid}/checkpoint")
        assert f" {folder}/ck freeze_ms=" in taken and taken.endswith(" ok\n")
        assert os.stat(folder / "ck").st_mode & 0o777 == 0o600
        process.kill()
        process.wait()
    last = steps(folder)[-1]
    pid = restart(it, f"{folder}/ck {again}")
    with ended(pid):
        assert pid == process.pid and place(it, pid) == str(again)
        goes_on(folder)
        assert steps(folder)[-1] > 1 and last > 3
        line = (folder / "out").read_text().splitlines()[-1].split()
        assert line[1:] == [str(pid), "3"]
        stat = Path(f"/proc/{pid}/status").read_text()
        assert "PPid:\t1\n" in stat
        move(it, pid, 0)
        move(it, pid, -1)
        goes_on(folder)
        assert os.readlink(f"/proc/{pid}/exe") == os.path.realpath("/usr/bin/python3")


def test_the_content_of_its_files_decides_whether_it_comes_back(it, folder):
    program = folder / "own"
    shutil.copy("/usr/bin/sleep", program)
    process = subprocess.Popen([str(program), "1000"], cwd="/", **QUIET)
    try:
        wait_until(lambda: os.readlink(f"/proc/{process.pid}/exe") == str(program), "it did not begin")
        checkpoint(it, process.pid, f"{folder}/ck")
    finally:
        process.kill()
        process.wait()
    # As on another machine: another file, of another time, and the same in it.
    shutil.copy(program, folder / "copy")
    os.utime(folder / "copy", (1, 1))
    (folder / "copy").rename(program)
    for node in (-1, 0):
        pid = restart(it, f"{folder}/ck {node}")
        with ended(pid):
            assert f"own {program}" in it.read(f"procs/{pid}/mapped").splitlines()
    content, times = program.read_bytes(), program.stat().st_mtime_ns
    program.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(program, ns=(times, times))
    for missing in (False, True):
        if missing:
            program.unlink()
        why = f"{program}: No such file or directory" if missing else f"{program} is not the same file here"
        for node in (-1, 0):
            gone(process.pid)
            assert echo(it, f"{folder}/ck {node}", "procs/restart").returncode
            assert why in it.read("procs/restart").splitlines()[-1]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_it_has_open_and_is_not_there_any_more_is_named(it, folder, what):
    home, spare = folder / "home", folder / "spare"
    (home / "here").mkdir(parents=True)
    script = f"exec 5>>{home}/file; cd {home}/here; echo on >&5; exec sleep 1000"
    with subprocess.Popen(["bash", "-c", script], **QUIET) as process:
        wait_until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n", "it did not begin")
        checkpoint(it, process.pid, f"{folder}/ck stop")
    missing = home / {"file": "file", "folder": "here"}[what]
    missing.rename(spare)
    for node in (-1, 0):
        assert echo(it, f"{folder}/ck {node}", "procs/restart").returncode
        assert f"{missing}: No such file or directory" in it.read("procs/restart").splitlines()[-1]
        gone(process.pid)
    spare.rename(missing)
    pid = restart(it, f"{folder}/ck 0")
    with ended(pid):
        assert place(it, pid) == "0"
        move(it, pid, -1)
        assert os.readlink(f"/proc/{pid}/cwd") == f"{home}/here" and os.readlink(f"/proc/{pid}/fd/5") == f"{home}/file"


def test_stop_ends_it_right_after_its_image(it, folder):
    with stepping(folder) as process:
        move(it, process.pid, 1)
        checkpoint(it, process.pid, f"{folder}/ck stop")
        assert process.wait(30) == -signal.SIGKILL
    last = steps(folder)[-1]
    pid = restart(it, f"{folder}/ck")
    with ended(pid):
        goes_on(folder)
        numbers = steps(folder)
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > last, "a step was lost or doubled"


def test_a_pid_in_use_is_an_error_and_any_other_may_do(it, folder):
    with stepping(folder) as process:
        checkpoint(it, process.pid, f"{folder}/ck")
        refused = echo(it, f"{folder}/ck 1", "procs/restart")
        assert "File exists" in refused.stderr
        assert f"pid {process.pid} is in use" in it.read("procs/restart").splitlines()[-1]
        pid = restart(it, f"{folder}/ck 1 anypid")
        with ended(pid):
            assert pid != process.pid
            wait_until(lambda: f" {pid} " in (folder / "out").read_text(), "the other one makes no steps")
            assert process.poll() is None


def test_images_that_build_on_one_another(it, folder):
    with stepping(folder) as process:
        checkpoint(it, process.pid, f"{folder}/a")
        checkpoint(it, process.pid, f"{folder}/b since a")
        goes_on(folder, more=20)
        checkpoint(it, process.pid, f"{folder}/c since b")
    assert (folder / "c").stat().st_size < (folder / "a").stat().st_size / 2
    merged = bpckpt("merge", folder / "c", "-o", folder / "whole")
    assert (merged.returncode, merged.stderr) == (0, "")
    (folder / "b").rename(folder / "elsewhere")
    refused = echo(it, f"{folder}/c", "procs/restart")
    assert refused.returncode and "b, which it builds on: No such file" in it.read("procs/restart")
    (folder / "elsewhere").rename(folder / "b")
    for name in ("c", "whole"):
        pid = restart(it, f"{folder}/{name}")
        with ended(pid):
            goes_on(folder)


def test_periodic_images_and_how_many_stay(it, folder):
    with stepping(folder) as process:
        checkpoint(it, process.pid, f"{folder}/ck every 1s keep 3")
        assert it.read(f"procs/{process.pid}/checkpoint").startswith(f"every 1s keep 3 {folder}/ck\n")
        wait_until(lambda: len(it.read(f"procs/{process.pid}/checkpoint").splitlines()) > 5, "no five images")
        checkpoint(it, process.pid, "off")
        lines = it.read(f"procs/{process.pid}/checkpoint").splitlines()
        assert not lines[0].startswith("every")
    assert sorted(path.name for path in folder.iterdir()) == ["ck", "ck.1", "ck.2", "out"]
    ages = [json.loads(bpckpt("info", "--json", folder / name).stdout)["time"] for name in ("ck", "ck.1", "ck.2")]
    assert ages == sorted(ages, reverse=True)


def test_a_process_whose_node_is_lost_comes_back_from_its_last_image(it, folder):
    assert "Invalid argument" in echo(it, "perhaps", f"procs/{os.getpid()}/onloss").stderr
    with counting() as process:
        move(it, process.pid, 0)
        checkpoint(it, process.pid, f"{folder}/ck every 1h")
        it.write(f"procs/{process.pid}/onloss", "restart")
        assert it.read(f"procs/{process.pid}/onloss") == "restart\n"
        it.lose(0)
        wait_until(lambda: place(it, process.pid) == "1", "it did not come back")
        assert process.poll() is None
        assert len(it.read(f"procs/{process.pid}/history").splitlines()) == 3
        lines = finish(process)
    # It counts on from the image, on the very same pipe: what it had said after the image comes again.
    numbers = [int(line.split()[0]) for line in lines[:-1]]
    jumps = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    assert len(jumps) <= 1 and all(numbers[i] <= numbers[i - 1] for i in jumps)
    assert {line.split()[1] for line in lines[:-1]} == {str(process.pid)}
    _, last, told = lines[-1].split()
    # It may be told to end before it counts once more: then the image's number is its last one.
    assert told == "enough" and (int(last) == numbers[-1] or (not jumps and int(last) in numbers))
    it.wait_state(0, "up")


def test_what_it_wrote_to_a_pipe_comes_to_who_restarts_it(it, folder):
    script = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); echo line $i; read -t 0.02 x; done"
    with subprocess.Popen(["bash", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        checkpoint(it, process.pid, f"{folder}/ck stop")
        process.wait()
    for node in (-1, 1):
        done = subprocess.Popen(
            ["bash", "-c", f"echo '{folder}/ck {node}' > {it.mount}/procs/restart"], stderr=subprocess.PIPE, text=True
        )
        with ended(process.pid):
            assert done.stderr is not None
            assert done.stderr.readline().startswith("line ")
            assert done.wait(30) == 0
        done.stderr.close()


def test_a_process_makes_its_own_image(it, folder):
    script = f"echo {folder}/ck > {it.mount}/procs/$$/checkpoint; echo $? $$ >> {folder}/out; exec sleep 100"
    with subprocess.Popen(["bash", "-c", script], **QUIET) as process:
        wait_until(lambda: (folder / "out").exists(), "no answer")
        process.kill()
    pid = restart(it, f"{folder}/ck 0")
    with ended(pid):
        wait_until(lambda: len((folder / "out").read_text().splitlines()) == 2, "it did not go on")
        assert (folder / "out").read_text() == f"0 {pid}\n" * 2


@pytest.mark.parametrize(
    ("order", "error"),
    [
        ("ck", "Invalid argument"), ("/", "Invalid argument"), ("/tmp/", "Invalid argument"),
        ("/nowhere/ck", "No such file or directory"), ("FOLDER/ck every", "Invalid argument"),
        ("FOLDER/ck every 0.1s", "Invalid argument"), ("FOLDER/ck sometimes", "Invalid argument"),
        ("FOLDER/ck keep 0", "Invalid argument"), ("FOLDER/ck since nothing", "No such file or directory"),
        ("FOLDER/ck stop every 5s", "Invalid argument"), ("FOLDER/out", "File exists"), ("/proc/ck", "No such file"),
    ],
)  # fmt: skip
def test_mistakes(it, folder, order, error):
    with stepping(folder) as process:
        done = echo(it, order.replace("FOLDER", str(folder)), f"procs/{process.pid}/checkpoint")
        assert done.returncode and error in done.stderr
        goes_on(folder)
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_last_image_and_the_process_as_they_were(it, folder):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "ck", folder], check=True)
    try:
        with stepping(folder) as process:
            checkpoint(it, process.pid, f"{folder}/ck")
            (folder / "filler").write_bytes(bytes(1 << 20))
            good = (folder / "ck").read_bytes()
            done = echo(it, f"{folder}/ck", f"procs/{process.pid}/checkpoint")
            assert "No space left on device" in done.stderr
            goes_on(folder)
            assert (folder / "ck").read_bytes() == good
            assert sorted(path.name for path in folder.iterdir()) == ["ck", "filler", "out"]
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_merge_replaces_images_only_and_needs_room(it, folder):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "ck", folder], check=True)
    try:
        with stepping(folder) as process:
            checkpoint(it, process.pid, f"{folder}/a")
            checkpoint(it, process.pid, f"{folder}/b since a")
        (folder / "text").write_text("mine\n")
        refused = bpckpt("merge", folder / "b", "-o", folder / "text")
        assert refused.returncode == 1 and "no checkpoint" in refused.stderr and refused.stderr.count("\n") == 1
        assert (folder / "text").read_text() == "mine\n"
        names, small = sorted(path.name for path in folder.iterdir()), (folder / "b").read_bytes()
        state = os.statvfs(folder)
        (folder / "filler").write_bytes(bytes(state.f_bavail * state.f_frsize - (1 << 20)))
        refused = bpckpt("merge", folder / "b", "-o", folder / "b")
        assert refused.returncode == 1 and "No space left on device" in refused.stderr
        (folder / "filler").unlink()
        assert sorted(path.name for path in folder.iterdir()) == names and (folder / "b").read_bytes() == small
        assert bpckpt("merge", folder / "b", "-o", folder / "b").returncode == 0
        (folder / "a").unlink()
        assert bpckpt("verify", folder / "b").returncode == 0
        with ended(restart(it, f"{folder}/b -1")):  # nodes do not see this disk
            goes_on(folder)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


USER = {"user": 1234, "group": 1234, "extra_groups": []}


def test_only_its_owner_and_with_the_owners_rights(it, folder):
    (folder / "mine").mkdir(mode=0o700)
    with stepping(folder) as process:  # root's
        theirs = subprocess.run(
            ["bash", "-c", f"echo {folder}/ck > {it.mount}/procs/{process.pid}/checkpoint"],
            capture_output=True, text=True, **USER,
        )  # fmt: skip
        assert theirs.returncode and "Permission denied" in theirs.stderr
        checkpoint(it, process.pid, f"{folder}/roots stop")
        process.wait()
    (folder / "roots").chmod(0o644)
    for order in (f"{folder}/roots", f"{folder}/roots 1"):
        done = subprocess.run(
            ["bash", "-c", f"echo {order} > {it.mount}/procs/restart"], capture_output=True, text=True, **USER
        )
        assert done.returncode and "Operation not permitted" in done.stderr
    os.unlink(folder / "out")
    with stepping(folder, **USER) as process:
        script = f"echo {folder}/mine/ck > {it.mount}/procs/{process.pid}/checkpoint"
        kept_out = subprocess.run(["bash", "-c", script], capture_output=True, text=True, **USER)
        assert kept_out.returncode and "Permission denied" in kept_out.stderr
        script = f"echo {folder}/ck stop > {it.mount}/procs/{process.pid}/checkpoint"
        assert subprocess.run(["bash", "-c", script], **USER).returncode == 0
        process.wait()
    assert os.stat(folder / "ck").st_uid == 1234
    pid = restart(it, f"{folder}/ck 1", **USER)
    with ended(pid):
        assert os.stat(f"/proc/{pid}").st_uid in (1234, 0)
        goes_on(folder)
        status = Path(f"/proc/{pid}/status").read_text()
        assert "Uid:\t1234\t1234\t1234\t1234" in status


def _forge(path: Path, change) -> None:
    """Changes what an image says, as its owner can, with checksums that are right."""
    from engine.checkpoint import Chain, Writer

    chain = Chain(os.open(path, os.O_RDONLY), lambda name: -1)
    image = chain.newest.image
    change(image)
    new = os.open(path.with_suffix(".forged"), os.O_RDWR | os.O_CREAT, 0o644)
    writer = Writer(new)
    writer.begin(image)
    for _, data in chain.pages():
        writer.add(data)
    writer.finish()
    chain.close()
    os.fchown(new, 1234, 1234)
    os.close(new)
    path.with_suffix(".forged").rename(path)


def test_a_forged_image_gives_no_rights(it, folder):
    secret = folder / "secret"
    secret.write_text("root only")
    secret.chmod(0o600)
    with stepping(folder, **USER) as process:
        checkpoint(it, process.pid, f"{folder}/ck stop")
        process.wait()

    def refused(change, error: str) -> None:
        copy = folder / "forged"
        copy.write_bytes((folder / "ck").read_bytes())
        _forge(copy, change)
        done = subprocess.run(
            ["bash", "-c", f"echo {copy} > {it.mount}/procs/restart"], capture_output=True, text=True, **USER
        )
        assert done.returncode and error in done.stderr, it.read("procs/restart").splitlines()[-1]
        gone(process.pid)

    def root(image) -> None:
        image.credentials["uids"] = [0, 0, 0, 0]

    def group(image) -> None:
        image.credentials["groups"] = [0]

    def mapping(image) -> None:
        found = secret.stat()
        file = image.files[image.regions[0].file]
        file.path, file.device, file.inode = os.fsencode(secret), found.st_dev, found.st_ino
        file.size, file.mtime_ns = found.st_size, found.st_mtime_ns

    def descriptor(image) -> None:
        found = secret.stat()
        entry = next(e for e in image.descriptors if e["kind"] == "file")
        entry.update(path=os.fsencode(secret), dev=found.st_dev, ino=found.st_ino)

    refused(root, "Operation not permitted")
    refused(group, "Operation not permitted")
    refused(mapping, "Permission denied")
    refused(descriptor, "Permission denied")

    def capable(image) -> None:
        for name in ("permitted", "effective", "inheritable", "ambient"):
            image.credentials[name] = (1 << 40) - 1
        image.limits[7] = [1 << 20, 1 << 20]
        image.oom_score_adj = -500

    copy = folder / "capable"
    copy.write_bytes((folder / "ck").read_bytes())
    copy.chmod(0o600)
    _forge(copy, capable)
    pid = restart(it, f"{copy} -1", **USER)
    with ended(pid):
        goes_on(folder)
        status = Path(f"/proc/{pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status and "CapPrm:\t0000000000000000" in status
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "0\n"


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_a_damaged_image_gives_an_error_and_no_process(it, folder, damage):
    with stepping(folder) as process:
        checkpoint(it, process.pid, f"{folder}/ck stop")
        process.wait()
    data = bytearray((folder / "ck").read_bytes())
    for at in (20, len(data) // 3, len(data) // 2, len(data) - 30) if damage == "flip" else (len(data) // 2,):
        bad = bytearray(data)
        if damage == "flip":
            bad[at] ^= 4
        changed = {"flip": bad, "cut": bad[:at], "empty": b"", "text": b"hello\n"}[damage]
        (folder / "ck").write_bytes(changed)
        done = echo(it, f"{folder}/ck 1", "procs/restart")
        assert done.returncode and "Bad message" in done.stderr
        checked = bpckpt("verify", folder / "ck")
        assert checked.returncode == 1 and checked.stderr.count("\n") == 1 and "bad image" in checked.stderr
        gone(process.pid)


def test_bpckpt_shows_and_verifies(it, folder):
    with stepping(folder, threads=3) as process:
        checkpoint(it, process.pid, f"{folder}/ck")
    said = bpckpt("info", folder / "ck").stdout
    assert f"pid {process.pid}\n" in said and "threads 4\n" in said and f"{folder}/out" in said
    shown = json.loads(bpckpt("info", "--json", folder / "ck").stdout)
    assert shown["pid"] == process.pid and shown["threads"] == 4 and shown["uid"] == 0
    assert bpckpt("verify", folder / "ck").returncode == 0
    missing = bpckpt("info", folder / "nothing")
    assert missing.returncode == 1 and missing.stderr == f"bpckpt: {folder}/nothing: No such file or directory\n"

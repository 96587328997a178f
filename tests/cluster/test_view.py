"""Nodes with an empty root: every program, library and script comes from the master by the view."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from bpfs.rundir import process_start
from bpfs.view.files import BESIDE
from tests.benchmarks.subject import last_move
from tests.building import build_victims
from tests.cluster.held import Interrupted, holding
from tests.cluster.moving import check_counting, counting, finish, move
from tests.cluster.virtual import VirtualCluster, children, cluster, comm, kill, wait_until
from tests.engine.moves import until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

VICTIMS = Path(__file__).parent.parent / "victims"
BPSH = Path(__file__).parents[2] / "bpfs/bin/bpsh"


@pytest.fixture(scope="module")
def exported(session_folder):
    folder = session_folder / "exported"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def it(session_folder, exported, gates):
    with (
        holding(gates),
        cluster(session_folder / "view", "--root", "empty", "--export", str(exported), nodes=2) as made,
    ):
        yield made


def run(it: VirtualCluster, *command: str, **more) -> subprocess.CompletedProcess[str]:
    """Runs a command on node 0, from the root directory; its output travels through pipes."""
    return subprocess.run(
        [str(BPSH), "0", *command], capture_output=True, text=True, timeout=60, cwd="/",
        env={**os.environ, "BPFS": str(it.mount)}, **{"stdin": subprocess.DEVNULL, **more},
    )  # fmt: skip


def shell(it: VirtualCluster, script: str, **more) -> str:
    """What a bash on node 0 prints; it must succeed."""
    done = run(it, "/bin/bash", "-c", script, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_shell_with_pipelines(it):
    assert shell(it, "seq 1000 | sort -rn | head -3 | tr '\\n' ' '; uname -n") == "1000 999 998 n0\n"


def test_the_root_has_nothing_of_the_masters_but_what_is_exported(it, exported):
    names = shell(it, "ls -A /").split()
    assert {"bin", "dev", "etc", "lib", "proc", "sys", "tmp", "usr"} <= set(names)
    assert "work" not in names and "boot" not in names
    assert shell(it, "ls -A /root /home /var") == "/home:\n\n/root:\n\n/var:\ntmp\n"
    assert run(it, "/bin/cat", "/etc/shadow").returncode == 1
    assert "passwd" in shell(it, "ls /etc").split()
    assert "shadow" not in shell(it, "ls /etc").split()


def test_the_compiler(it):
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    source = '#include <stdio.h>\nint main(void) { puts("compiled there"); return 7; }'
    done = run(it, "/bin/bash", "-c", f"cd /tmp && echo '{source}' > a.c && gcc -o a a.c && ./a")
    assert (done.returncode, done.stdout) == (7, "compiled there\n"), done.stderr


def test_python_with_extension_modules(it):
    code = "import ssl, sqlite3, json, ctypes; print(json.dumps([6 * 7]), ctypes.CDLL('libm.so.6').abs(-3))"
    done = run(it, "/usr/bin/python3", "-c", code)
    assert (done.stdout, done.stderr) == ("[42] 3\n", "")


def test_scripts_and_the_errors_of_exec(it, exported):
    for name, text, mode in (
        ("good", "#!/usr/bin/perl\nprint join(',', @ARGV), \"\\n\";", 0o755),
        ("lost", "#!/no/such/interpreter\n", 0o755),
        ("plain", "#!/bin/sh\n", 0o644),
        ("noise", "\x7f no program", 0o755),
    ):
        (exported / name).write_text(text)
        (exported / name).chmod(mode)
    code = (
        "import os, errno, sys\n"
        "for path in sys.argv[1:]:\n"
        "    try: os.execv(path, [path] + (['x' * 4000000] if path.endswith('true') else []))\n"
        "    except OSError as error: print(errno.errorcode[error.errno])\n"
    )
    paths = [str(exported / name) for name in ("lost", "plain", "noise", "nothing")]
    done = run(it, "/usr/bin/python3", "-c", code, *paths, "/bin/true", "/etc/passwd/x")
    assert done.stdout.split() == ["ENOENT", "EACCES", "ENOEXEC", "ENOENT", "E2BIG", "ENOTDIR"], done.stderr
    assert run(it, str(exported / "good"), "1", "2").stdout == "1,2\n"


def test_a_program_that_is_written_to_is_no_program_yet(it, exported):
    program = exported / "growing"
    shutil.copy("/bin/echo", program)
    with talking(it) as say:
        assert say(f"{program} once") == "once\n"
        with program.open("ab") as writer:
            writer.write(b"more")
            writer.flush()
            wait_until(lambda: "Text file busy" in say(f"{program} twice 2>&1"), "it should be busy")
            assert say(f"wc -c < {program}") == f"{program.stat().st_size}\n"  # to be read by anybody
        wait_until(lambda: say(f"{program} twice 2>&1") == "twice\n", "it should be a program again")


def test_files_of_the_master_as_standard_input_and_output(it, tmp_path):
    (tmp_path / "in").write_text("".join(f"{n}\n" for n in range(1000)))
    with open(tmp_path / "in") as source, open(tmp_path / "out", "w") as out:
        done = subprocess.run(
            [str(BPSH), "0", "/bin/bash", "-c", "read a; read b; echo $a $b $PWD; uname -n >&2"],
            stdin=source, stdout=out, stderr=out, timeout=60, cwd=tmp_path, env={**os.environ, "BPFS": str(it.mount)},
        )  # fmt: skip
    assert done.returncode == 0
    complaint, *output = (tmp_path / "out").read_text().splitlines()
    assert output == ["0 1 /", "n0"] and str(tmp_path) in complaint  # the folder is not there


def test_owners_modes_and_set_uid_programs(it, exported):
    secret = exported / "secret"
    secret.write_text("mine\n")
    secret.chmod(0o600)
    shutil.copy("/bin/cat", exported / "strong")
    (exported / "strong").chmod(0o4755)
    nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups"
    refused = run(it, "/bin/bash", "-c", f"{nobody} cat {secret}")
    assert (refused.returncode, refused.stdout) == (1, "") and "Permission denied" in refused.stderr
    assert shell(it, f"{nobody} {exported}/strong {secret}") == "mine\n"
    assert "Read-only file system" in run(it, "/bin/bash", "-c", f"echo x >> {secret}").stderr
    assert shell(it, f"stat -c '%a %u %s' {secret}") == "600 0 5\n"


def test_links_do_not_lead_out_of_the_exports(it, exported):
    (exported / "out").symlink_to("/etc/shadow")
    (exported / "up").symlink_to("../../../etc/shadow")
    (exported / "loop").symlink_to("loop")
    for name, error in (("out", "No such file"), ("up", "No such file"), ("loop", "Too many levels")):
        assert error in run(it, "/bin/cat", str(exported / name)).stderr


@contextmanager
def talking(it: VirtualCluster):
    """A shell on node 0 that runs one line after the other; gives a function from a line to its output."""
    process = subprocess.Popen(
        [str(BPSH), "0", "/bin/bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, cwd="/", env={**os.environ, "BPFS": str(it.mount)},
    )  # fmt: skip

    def say(line: str) -> str:
        process.stdin.write(f"{line}; echo; echo =end\n")
        process.stdin.flush()
        return "".join(iter(process.stdout.readline, "=end\n"))[:-1]

    try:
        yield say
    finally:
        process.stdin.close()
        assert process.wait(60) == 0


def test_a_changed_file_is_seen_by_the_next_exec(it, exported):
    script, other = exported / "changing", exported / "other"
    with talking(it) as say:
        assert "No such file" in say(str(script))
        for turn in range(30):
            text = f"#!/bin/sh\necho {turn}\n"
            if turn % 2:
                script.write_text(text)
            else:
                other.write_text(text)
                other.chmod(0o755)
                other.rename(script)
            wait_until(lambda: say(f"{script} 2>&1") == f"{turn}\n", f"turn {turn} should be seen")  # noqa: B023
        script.unlink()
        wait_until(lambda: "No such file" in say(f"{script} 2>&1"), "it should be seen to be gone")
        (exported / "made").mkdir()
        (exported / "made/file").write_text("new\n")
        wait_until(lambda: say(f"cat {exported}/made/* 2>&1") == "new\n", "the folder should be seen")


def test_what_is_beside_a_name_is_told_with_it_and_changes_are_seen(it, exported):
    folder = exported / "beside"
    (folder / "below").mkdir(parents=True)
    for name in ("a", "b", "c", "d", "below/e"):
        (folder / name).write_text(f"{name}\n")
    (folder / "d").chmod(0o750)
    (folder / "link").symlink_to("c")
    with talking(it) as say:
        assert say(f"cd {folder}; readlink a; stat -c %a /; cat a; cat b; echo such | grep such") == "755\na\nb\nsuch\n"
        # Two names were looked up: with the second came all the others, and that there are no more.
        seen = 'for name in c d link nothing below/e; do stat -L -c "%n %a %s" $name 2>&1; done'
        with silent_master(it):
            assert say("stat -c %a d; readlink link; stat nothing 2>&1 | grep -c such") == "750\nc\n1\n"
        (folder / "d").chmod(0o640)
        (folder / "nothing").write_text("something\n")
        (folder / "link").unlink()
        (folder / "link").symlink_to("d")
        (folder / "c").write_text("other\n")
        now = ["c 644 6", "d 640 2", "link 640 2", "nothing 644 10", "below/e 644 8"]
        wait_until(lambda: say(seen).splitlines() == now, "the changes should be seen")
        (folder / "below").rename(folder / "now")
        wait_until(lambda: say("cat now/e below/e 2> /dev/null") == "below/e\n", "the new name should be seen")


def test_a_folder_with_too_much_in_it_is_asked_for_name_by_name(it, exported):
    folder = exported / "crowd"
    folder.mkdir()
    for number in range(BESIDE + 1):
        (folder / str(number)).write_text(f"{number}\n")
    with talking(it) as say:
        names = " ".join(map(str, range(40)))
        assert say(f"cd {folder}; cat {names}").split() == names.split()


def test_who_has_a_file_open_keeps_it(it, exported):
    held = exported / "held"
    held.write_text("one\n")
    with talking(it) as say:
        say(f"exec 5< {held}")
        held.write_text("two, longer\n")
        wait_until(lambda: say(f"cat {held}") == "two, longer\n", "the change should be seen")
        assert say("cat <&5") == "one\n"


def test_processes_move_to_such_nodes_and_home(it):
    with counting("/usr/bin/python3", "/tmp") as process:
        for node in (0, 1, -1, 1, 0, -1):
            move(it, process.pid, node)
        check_counting(finish(process), process.pid)


@contextmanager
def threads(program: Path, folder: Path, **environment: str):
    """A copy of the victim `threads` that runs, and has to end well at the end of the context."""
    build_victims()
    shutil.copy(VICTIMS / "bin/threads", program)
    with open(program, "ab") as file:
        file.write(os.urandom(200_000))  # no other is like it; small ones come with their digest
    stop = folder / "stop"
    with (
        open(folder / "output", "wb") as output,  # what is read and written at once does not move there
        subprocess.Popen(
            [str(program), str(stop), "3"], cwd="/tmp", env={**os.environ, **environment},
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        ) as process,
    ):  # fmt: skip
        try:
            until(Path(f"{stop}.ready").exists, "the program to get ready")
            yield process
            stop.touch()
            assert process.wait(60) == 0, (folder / "output").read_text()
        finally:
            process.kill()


def test_programs_and_libraries_that_nodes_do_not_see_come_along(it, tmp_path):
    program, library = tmp_path / "program", tmp_path / "libown.so"
    shutil.copy("/usr/lib/x86_64-linux-gnu/libm.so.6", library)
    with threads(program, tmp_path, LD_PRELOAD=str(library)) as process:
        content = library.stat().st_size + (VICTIMS / "bin/threads").stat().st_size
        for node in (0, 1, 0, -1):
            move(it, process.pid, node)
            assert (last_move(it, node)["bytes"] > content) == (node != -1)
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
        assert f"{library}\n" in mapped and f"{program}\n" in mapped and "memfd" not in mapped
        assert os.readlink(f"/proc/{process.pid}/exe") == str(program)


def test_what_a_node_lacks_is_fetched_before_the_process_stands_still(it, gates, exported, tmp_path):
    program = exported / "threads"
    with threads(program, tmp_path) as process:
        digest = hashlib.sha256(program.read_bytes()).hexdigest()
        for source, node in ((-1, 0), (0, 1)):
            stored = it.rundir.node_cache(node) / "objects" / digest
            assert not stored.exists()
            moving = Interrupted(it, gates, process, (source, node), "freeze")
            try:
                assert stored.exists()
            finally:
                assert moving.go_on() == 0, moving.said
        move(it, process.pid, -1)


def test_files_are_known_by_their_content(it, exported, tmp_path):
    program, library = exported / "known", tmp_path / "libown.so"
    shutil.copy("/usr/lib/x86_64-linux-gnu/libm.so.6", library)
    with threads(program, tmp_path, LD_PRELOAD=str(library)) as process:
        os.utime(program, (1, 1))  # the same as ever
        for node in (0, 1):
            move(it, process.pid, node)
            mapped = it.read(f"procs/{process.pid}/mapped").splitlines()
            assert f"cache {program}" in mapped and "carried libown.so" in mapped
        move(it, process.pid, -1)
        assert f"own {program}" in it.read(f"procs/{process.pid}/mapped").splitlines()
    code = f"import os; print(os.getxattr('{program}', 'trusted.bpfs.digest').decode())"
    assert shell(it, f'/usr/bin/python3 -c "{code}"').strip() == hashlib.sha256(program.read_bytes()).hexdigest()


def test_files_that_nodes_do_not_have_come_before_the_process_stands_still(it, gates, exported, tmp_path):
    library = tmp_path / "libahead.so"
    shutil.copy("/usr/lib/x86_64-linux-gnu/libm.so.6", library)
    with threads(exported / "ahead", tmp_path, LD_PRELOAD=str(library)) as process:
        for source, node in ((-1, 0), (0, 1)):
            moving = Interrupted(it, gates, process, (source, node), "freeze")
            try:
                assert workers_with(it.slave(node), "/memfd:bpfs:libahead.so"), "it has not come yet"
            finally:
                assert moving.go_on() == 0, moving.said
            assert "carried libahead.so" in it.read(f"procs/{process.pid}/mapped").splitlines()
        move(it, process.pid, -1)
        assert f"own {library}" in it.read(f"procs/{process.pid}/mapped").splitlines()


def workers_with(daemon: int, prefix: str) -> list[int]:
    """The engine workers of a daemon that have a file open whose path begins so."""
    workers = [one for zygote in children(daemon) if comm(zygote) == "bpfs-zygote" for one in children(zygote)]
    return [one for one in workers if any(open_file.startswith(prefix) for open_file in open_files(one))]


def open_files(pid: int) -> list[str]:
    """Where the descriptors of a process lead to."""
    return [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]


def test_a_program_that_nodes_do_not_see_is_run_there(it, tmp_path):
    shutil.copy("/usr/bin/readlink", tmp_path / "own")
    done = run(it, str(tmp_path / "own"), "/proc/self/exe")
    assert (done.stdout, done.stderr) == ("/memfd:bpfs:own (deleted)\n", "")
    both = subprocess.run(
        [str(BPSH), "0,1", str(tmp_path / "own"), "/proc/self/exe"], capture_output=True, text=True, timeout=60,
        cwd="/", env={**os.environ, "BPFS": str(it.mount)}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (both.stdout, both.stderr) == (2 * done.stdout, "")


def daemon(it: VirtualCluster, node: int = 0) -> int:
    """The pid of a node's view daemon; 0 while there is none."""
    return next((pid for pid in children(it.slave(node)) if comm(pid) == "bpview"), 0)


def test_the_daemon_may_die_under_load(it, exported):
    (exported / "many").mkdir()
    for n in range(300):
        (exported / f"many/{n}").write_text(f"{n}\n")
    load = f"for n in $(seq 0 299); do cat {exported}/many/$n && /bin/true || echo FAILED $n; done"
    with subprocess.Popen(
        [str(BPSH), "0", "/bin/bash", "-c", load], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, cwd="/", env={**os.environ, "BPFS": str(it.mount)},
    ) as process:  # fmt: skip
        killed = 0
        while process.poll() is None and killed < 4:
            pid = daemon(it)
            if pid:
                kill(pid)
                killed += 1
                wait_until(lambda: daemon(it) not in (0, pid), "the daemon should be started again")  # noqa: B023
        assert process.stdout.read() == "".join(f"{n}\n" for n in range(300))
    assert killed
    assert "starting it again" in it.log("n0")


def test_the_slave_may_die(it):
    """Its jobs keep their root, and what they have mapped; the tree is there again."""
    script = f"echo on; read; /bin/true && seq 3 | sort -r && cat {it.mount}/procs/$$/node"
    with subprocess.Popen(
        [str(BPSH), "0", "/bin/bash", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, cwd="/", env={**os.environ, "BPFS": str(it.mount)},
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "on\n"
        slave, inits = it.slave(0), it.inits(0)
        kill(slave)
        wait_until(lambda: it.slave(0) not in (0, slave), "another slave comes")
        it.wait_state(0, "up")
        assert it.inits(0) == inits
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.read() == "3\n2\n1\n0\n"
        assert process.wait(60) == 0
    assert shell(it, "uname -n") == "n0\n"


def server(it: VirtualCluster) -> int:
    """The pid of the master's server of files."""
    (pid,) = (pid for pid in children(it.pid("master")) if comm(pid) == "bpfiles" and process_start(pid)[0] not in "ZX")
    return pid


@contextmanager
def silent_master(it: VirtualCluster):
    """The master's server of files does not run meanwhile."""
    pid = server(it)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_silent_master_gives_eio_and_killed_readers_go_at_once(it, exported):
    for name in ("a", "b"):
        (exported / f"unread-{name}").write_text("late\n")
    with talking(it) as say:
        assert say(f"cat {exported} 2>/dev/null & sleep 0.1; wait $!; date >/dev/null; ls / | cat >/dev/null") == ""
        with silent_master(it):
            # One reader is killed and must be gone long before its file could be answered with EIO.
            began = time.monotonic()
            said = say(f"cat {exported}/unread-a & sleep 0.3; kill -9 $!; wait $!; echo $?")
            assert said.split()[-1] == "137" and time.monotonic() - began < 8
            assert say("date +%Y; ls /")  # what is known needs nobody
            assert "Input/output error" in say(f"cat {exported}/unread-b 2>&1")
        wait_until(lambda: say(f"cat {exported}/unread-b 2>&1") == "late\n", "it should be back")


def test_the_server_of_files_may_die(it, exported):
    late = exported / "after"
    with talking(it) as say:
        assert say("cat /etc/hostname /etc/debian_version 2>/dev/null")
        for turn in range(3):
            kill(server(it))
            late.write_text(f"{turn}\n")
            wait_until(lambda: say(f"cat {late} 2>&1") == f"{turn}\n", "it should be started again")  # noqa: B023


def cache(it: VirtualCluster, node: int = 0) -> dict[str, int]:
    """nodes/N/cache"""
    return {key: int(number) for key, number in (line.split() for line in it.read(f"nodes/{node}/cache").splitlines())}


def test_a_damaged_object_is_fetched_again(it, exported):
    target = exported / "precious"
    target.write_text("undamaged content\n" * 1000)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    assert shell(it, f"cat {target} | sha256sum").split()[0] == digest
    stored = it.rundir.node_cache(0) / "objects" / digest
    stored.chmod(0o644)
    stored.write_bytes(b"damaged" * 100)
    before = cache(it)
    assert shell(it, f"cat {target} | sha256sum").split()[0] == digest
    assert cache(it)["damaged"] == before["damaged"] + 1


def test_a_moved_program_is_not_made_of_damaged_objects_and_keeps_its_own(it, exported, tmp_path):
    program = exported / "sound"
    with threads(program, tmp_path) as process:
        it.write("nodes/0/cache", f"prestage {program}")
        digest = hashlib.sha256(program.read_bytes()).hexdigest()
        stored = it.rundir.node_cache(0) / "objects" / digest
        times = stored.stat().st_mtime_ns
        stored.chmod(0o644)
        stored.write_bytes(os.urandom(program.stat().st_size))
        os.utime(stored, ns=(times, times))  # nothing but its content tells
        before = cache(it)
        move(it, process.pid, 0)
        assert f"cache {program}" in it.read(f"procs/{process.pid}/mapped").splitlines()
        assert hashlib.sha256(stored.read_bytes()).hexdigest() == digest
        assert cache(it)["damaged"] == before["damaged"] + 1
        it.write("nodes/0/cache", "purge")
        assert stored.exists()  # it is mapped
        move(it, process.pid, 1)
        it.write("nodes/0/cache", "purge")
        assert not stored.exists()
        move(it, process.pid, 0)
        assert stored.exists()
        move(it, process.pid, -1)


def test_an_object_comes_from_another_node_that_has_it(it, exported):
    size = 1_000_000
    for name in "one", "two", "three", "four":
        (exported / name).write_bytes(os.urandom(size))

    def fetch(node: int, name: str) -> tuple[int, int]:
        """Has a node fetch a file; the bytes that it got from others by then, and that others got from node 0."""
        it.write(f"nodes/{node}/cache", f"prestage {exported / name}")
        digest = hashlib.sha256((exported / name).read_bytes()).hexdigest()
        assert (it.rundir.node_cache(node) / "objects" / digest).read_bytes() == (exported / name).read_bytes()
        return cache(it, node)["peer_bytes"], cache(it, 0)["given_bytes"]

    fetch(0, "one")
    before = fetch(1, "one")
    fetch(0, "two")
    assert fetch(1, "two") == (before[0] + size, before[1] + size)
    # What a node has dropped, or has damaged, comes from the master.
    fetch(0, "three"), fetch(0, "four")
    objects = it.rundir.node_cache(0) / "objects"
    (objects / hashlib.sha256((exported / "three").read_bytes()).hexdigest()).unlink()
    damaged = objects / hashlib.sha256((exported / "four").read_bytes()).hexdigest()
    damaged.chmod(0o644)
    damaged.write_bytes(os.urandom(size))
    assert fetch(1, "three") == fetch(1, "four") == (before[0] + size, before[1] + size)


def test_another_node_that_does_not_answer_is_given_up(it, exported):
    (exported / "lonely").write_bytes(os.urandom(1_000_000))
    it.write("nodes/0/cache", f"prestage {exported / 'lonely'}")
    pid = daemon(it, 0)
    os.kill(pid, signal.SIGSTOP)
    try:
        before = cache(it, 1)
        it.write("nodes/1/cache", f"prestage {exported / 'lonely'}")
        after = cache(it, 1)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert after["fetched_bytes"] == before["fetched_bytes"] + 1_000_000
    assert after["peer_bytes"] == before["peer_bytes"]


def test_the_cache_is_shown_purged_and_filled(it, exported):
    it.write("nodes/1/cache", "purge")
    assert cache(it, 1)["objects"] < 20  # what is mapped stays
    (exported / "tree/below").mkdir(parents=True)
    for name in ("one", "below/two"):
        (exported / "tree" / name).write_text(name * 100)
    before = cache(it, 1)
    it.write("nodes/1/cache", f"prestage {exported}/tree")
    it.write("nodes/1/cache", "prestage /lib/x86_64-linux-gnu/libc.so.6")
    after = cache(it, 1)
    assert after["objects"] >= before["objects"] + 2
    libc = hashlib.sha256(Path("/lib/x86_64-linux-gnu/libc.so.6").read_bytes()).hexdigest()
    assert (it.rundir.node_cache(1) / "objects" / libc).exists()
    it.write("nodes/1/cache", f"prestage {exported}/tree")
    assert cache(it, 1)["misses"] == after["misses"]
    for text, error in (("prestage /etc/shadow", "No such file"), ("polish", "Invalid"), ("prestage x", "Invalid")):
        with pytest.raises(OSError, match=error):
            it.write("nodes/1/cache", text)
    with pytest.raises(OSError, match="not supported"):
        it.write("nodes/-1/cache", "purge")


def test_the_list_of_libraries(it, exported):
    library, late = exported / "library", exported / "late"
    library.write_text("a library\n" * 100)
    it.write("libraries", f"add {library}")
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    assert all((it.rundir.node_cache(node) / "objects" / digest).exists() for node in range(2))
    for text, error in (("add /no/such", "No such file"), ("add", "Invalid"), ("delete /x", "No such file")):
        with pytest.raises(OSError, match=error):
            it.write("libraries", text)
    assert it.read("libraries") == f"{library}\n"
    # A node that comes up fetches what it has not.
    it.write("nodes/1/state", "down")
    late.write_text("late\n" * 100)
    it.write("libraries", f"add {late}")
    it.write("nodes/1/state", "up")
    stored = it.rundir.node_cache(1) / "objects" / hashlib.sha256(late.read_bytes()).hexdigest()
    wait_until(stored.exists, "the node that came up has the library")
    it.write("libraries", f"delete {library}")
    assert it.read("libraries") == f"{late}\n"
    it.write("libraries", "clear")
    assert it.read("libraries") == ""


def test_the_cache_keeps_to_its_limit(session_folder, exported):
    names = [exported / f"large-{n}" for n in range(6)]
    for n, name in enumerate(names):
        name.write_bytes(bytes([n]) * 2_000_000)
    with (
        cluster(
            session_folder / "small", "--root", "empty", "--export", str(exported), "--cachesize", "8M", nodes=1
        ) as small,
        talking(small) as say,
    ):
        say(f"exec 6< {names[0]}")
        assert say(f"cat {' '.join(map(str, names))} | wc -c") == "12000000\n"
        seen = cache(small)
        assert seen["evicted"] > 0 and seen["bytes"] <= 8 << 20
        assert say("cat <&6 | head -c 3 | od -An -tx1").split() == ["00"] * 3
        assert (small.rundir.node_cache(0) / "objects" / hashlib.sha256(bytes(2_000_000)).hexdigest()).exists()


def test_a_numerical_library(it):
    if subprocess.run(["/usr/bin/python3", "-c", "import numpy"], capture_output=True).returncode:
        pytest.skip("NumPy is not installed for /usr/bin/python3")
    code = "import numpy; print(numpy.linalg.det(numpy.eye(50)))"
    assert run(it, "/usr/bin/python3", "-c", code).stdout == "1.0\n"

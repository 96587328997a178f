"""One program for many nodes, dumped once: procs/onexec, and bpsh, which uses it."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.moving import echo
from tests.cluster.virtual import TOP, VirtualCluster, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

BPSH = str(TOP / "bpfs" / "bin" / "bpsh")
USER: dict[str, Any] = {"user": 1234, "group": 1234, "extra_groups": []}
NODES = 3


@pytest.fixture(scope="module")
def it(session_folder: Path) -> Iterator[VirtualCluster]:
    with cluster(session_folder / "batch", nodes=NODES) as made:
        yield made


def bpsh(it: VirtualCluster, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BPSH, *words], env={**os.environ, "BPFS": str(it.mount)}, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=100, check=False, **more,
    )  # fmt: skip


def outcomes(it: VirtualCluster, count: int) -> dict[int, str]:
    """How the last so many went, by node."""
    lines = [line.split() for line in it.read("procs/onexec").splitlines()[-count:]]
    return {int(node): outcome for _, node, outcome, *_ in lines}


@contextmanager
def waiting(count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """A shell that execs what it is told, and others that wait."""
    processes = [
        subprocess.Popen([*words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for words in [("sh",), *[("sleep", "1000")] * (count - 1)]
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def tell(shell: subprocess.Popen[str], line: str) -> None:
    assert shell.stdin is not None
    shell.stdin.write(f"{line}\n")
    shell.stdin.flush()


def test_each_is_a_process_of_its_own(it: VirtualCluster) -> None:
    # AT_RANDOM, kind 25 of the auxiliary vector: the seed of stack protectors and hash tables.
    script = (
        "import ctypes, os; auxv = ctypes.CDLL(None).getauxval; auxv.restype = ctypes.c_ulong;"
        "print(os.getpid(), os.getppid(), os.uname().nodename, os.environ['BPROC_RANK'],"
        "ctypes.string_at(auxv(25), 16).hex(), os.path.realpath('/proc/self'), auxv(33))"
    )
    more = "1" * 9  # ranks of two digits beside those of one
    spec = ",".join(map(str, [0, 1, 2, *more]))
    run = bpsh(it, "-L", spec, sys.executable, "-Sc", script)
    assert (run.returncode, run.stderr) == (0, "")
    lines = [line.split() for line in run.stdout.splitlines()]
    pids, parents, names, ranks, seeds, own, layouts = zip(*lines, strict=True)
    assert len(set(pids)) == len(set(seeds)) == len(lines) == 12
    assert len(set(layouts)) > 1  # where the vDSO is: each was exec'd where it runs, none was copied
    assert len(set(parents)) == 1
    assert {int(rank): name for rank, name in zip(ranks, names, strict=True)} == {
        rank: f"n{node}" for rank, node in enumerate(map(int, spec.split(",")))
    }
    assert [f"/proc/{pid}" for pid in pids] == list(own)
    assert set(outcomes(it, 12).items()) == {(0, "ok"), (1, "ok"), (2, "ok")}


def settle_down() -> None:
    """What an exec keeps, other than by default."""
    os.umask(0o027)
    os.nice(3)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.sched_setaffinity(0, {0})
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    if os.getuid() == 0:  # another user's own files of /proc are root's between setuid and exec
        Path("/proc/self/oom_score_adj").write_text("77")
        Path("/proc/self/coredump_filter").write_text("0x7")
    prctl = ctypes.CDLL(None).prctl
    prctl(29, ctypes.c_ulong(123456))  # PR_SET_TIMERSLACK
    prctl(38, ctypes.c_ulong(1), 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    ctypes.CDLL(None).personality(ctypes.c_ulong(0x0040000))  # ADDR_NO_RANDOMIZE


@pytest.mark.parametrize("user", [{}, {"user": 1234, "group": 99, "extra_groups": [98, 5]}], ids=["root", "user"])
def test_what_an_exec_keeps_is_there_on_the_node(it: VirtualCluster, user: dict[str, Any]) -> None:
    script = """if True:
        import ctypes, json, os, resource
        wanted = "Umask Uid Gid Groups NoNewPrivs Cpus_allowed SigBlk SigIgn CapInh CapPrm CapEff CapBnd CapAmb".split()
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        found = {name: status[name] for name in wanted}
        found |= {name: open("/proc/self/" + name).read() for name in ("limits", "oom_score_adj", "comm", "cmdline")}
        found["filter"] = open("/proc/self/coredump_filter").read()
        found["slack"] = ctypes.CDLL(None).prctl(30)
        found["personality"] = ctypes.CDLL(None).personality(ctypes.c_ulong(0xffffffff))
        found["cwd"], found["nice"], found["environ"] = os.getcwd(), os.nice(0), dict(os.environ)
        for name in ("BPROC_RANK", "BPROC_PROGNAME"):
            found["environ"].pop(name, None)
        found["fds"] = [fd for fd in range(3, 200) if os.path.exists(f"/proc/self/fd/{fd}")]
        print(json.dumps(found, sort_keys=True))
    """
    command = ["/usr/bin/python3", "-Sc", script, "", "a b"]
    more: dict[str, Any] = {**user, "cwd": "/usr/share", "preexec_fn": settle_down}
    here = subprocess.run(
        command, env={**os.environ, "BPFS": str(it.mount)}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=True, **more,
    )  # fmt: skip
    there = bpsh(it, "-L", "0-2", *command, **more)
    alone = bpsh(it, "1", *command, **more)
    for run in (there, alone):
        assert (run.returncode, run.stderr) == (0, "")
    assert [json.loads(line) for line in there.stdout.splitlines()] == [json.loads(here.stdout)] * NODES
    assert json.loads(alone.stdout) == json.loads(here.stdout)


def test_a_script_keeps_its_name_and_arguments(it: VirtualCluster, session_folder: Path) -> None:
    folder = session_folder / "scripts"
    folder.mkdir()
    script = folder / "show-words"
    script.write_text('#!/bin/sh -u\necho "$0" $# "$2" "$(cat /proc/$$/comm)" "$(tr "\\0" " " < /proc/$$/cmdline)"\n')
    script.chmod(0o755)
    here = subprocess.run(["./show-words", "a", "b c"], cwd=folder, capture_output=True, text=True, check=True).stdout
    run = bpsh(it, "-L", "0-2", "./show-words", "a", "b c", cwd=folder)
    assert (run.returncode, run.stderr, run.stdout) == (0, "", here * NODES)


def test_where_it_cannot_be_made_is_said_and_the_others_go_on(it: VirtualCluster, tmp_path: Path) -> None:
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "here").symlink_to("/bin/uname")
    program = folder / "uname"
    program.write_bytes(Path("/bin/uname").read_bytes())
    program.chmod(0o755)
    enter = ["nsenter", "-m", "-t", str(it.inits(1)[0]), "--"]
    subprocess.run([*enter, "mount", "-t", "tmpfs", "none", str(folder)], check=True)
    try:
        run = bpsh(it, "-p", "0-2", str(program), "-n")
    finally:
        subprocess.run([*enter, "umount", str(folder)], check=True)
    assert run.returncode == 125
    assert sorted(run.stdout.splitlines()) == ["  0: n0", "  2: n2"]
    (line,) = run.stderr.splitlines()
    assert line.startswith("  1: bpfs: process ")
    assert line.endswith(f" cannot run on node 1: {program}: No such file or directory")
    assert outcomes(it, NODES) == {0: "ok", 1: "ENOENT", 2: "ok"}


def test_nodes_that_do_not_admit_the_user_are_left_out(it: VirtualCluster) -> None:
    it.write("nodes/1/mode", "100")
    try:
        run = bpsh(it, "-p", "0-2", "id", "-u", **USER, cwd="/")
    finally:
        it.write("nodes/1/mode", "111")
    assert run.returncode == 255
    assert sorted(run.stdout.splitlines()) == ["  0: 1234", "  2: 1234"]
    assert run.stderr.startswith("  1: bpsh: node 1: Permission denied")


def test_a_program_with_more_rights_than_its_caller_goes_to_each_by_itself(it: VirtualCluster) -> None:
    before = it.read("procs/onexec")
    run = bpsh(it, "0-2", "su", "--version", **USER, cwd="/")
    assert (run.returncode, run.stderr, len(set(run.stdout.splitlines()))) == (0, "", 1)
    assert it.read("procs/onexec") == before


@pytest.mark.parametrize(
    ("order", "sentence"),
    [
        ("", "Invalid argument"),
        ("1", "Invalid argument"),
        ("x 1:0", "Invalid argument"),
        ("{0} {1}", "Invalid argument"),
        ("{0} {1}:0:0:0", "Invalid argument"),
        ("{0} {1}:zero", "Invalid argument"),
        ("{0} {0}:0", "Invalid argument"),
        ("{0} {1}:0 {1}:1", "Invalid argument"),
        ("{0} {1}:77", "No such file or directory"),
        ("{0} {1}:-1", "Operation not supported"),
        ("4194304 {1}:0", "No such process"),
        ("{0} 4194304:0", "No such process"),
    ],
)
def test_nonsense_changes_nothing(it: VirtualCluster, order: str, sentence: str) -> None:
    with waiting(2) as shells:
        refused = echo(it, order.format(*(shell.pid for shell in shells)), "procs/onexec")
        assert refused.returncode != 0
        assert sentence in refused.stderr
        tell(shells[0], "exec uname -n")
        assert shells[0].communicate(timeout=60)[0] == f"{os.uname().nodename}\n"
        assert shells[1].poll() is None


def test_processes_of_others_are_not_to_be_had(it: VirtualCluster) -> None:
    with waiting(2) as (template, other):
        text = f"{template.pid} {other.pid}:0"
        refused = subprocess.run(
            ["bash", "-c", f"echo {text} > {it.mount}/procs/onexec"],
            capture_output=True,
            text=True,
            check=False,
            **USER,
        )
        assert "Permission denied" in refused.stderr


def test_who_has_children_is_left_with_them(it: VirtualCluster) -> None:
    with waiting(1) as (template,):
        parent = subprocess.Popen(["sh", "-c", "sleep 1000 & echo; wait"], stdout=subprocess.PIPE, process_group=0)
        try:
            assert parent.stdout is not None and parent.stdout.readline() == b"\n"
            refused = echo(it, f"{template.pid} {parent.pid}:0", "procs/onexec")
            assert "Operation not supported" in refused.stderr
            assert "has children" in it.read("procs/onexec").splitlines()[-1]
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
            parent.communicate()


def test_a_script_can_use_it(it: VirtualCluster) -> None:
    with waiting(3) as (template, *others):
        pairs = " ".join(f"{shell.pid}:{node}" for node, shell in enumerate(others))
        assert echo(it, f"{template.pid} {pairs}", "procs/onexec").returncode == 0
        tell(template, "exec sh -c 'read line; echo $line $$ $(uname -n); exit 7'")
        assert template.wait(60) == 0
        for node, shell in enumerate(others):
            assert shell.communicate("hello\n", timeout=60)[0] == f"hello {shell.pid} n{node}\n"
            assert shell.returncode == 7


def test_a_template_that_dies_takes_nobody_with_it(it: VirtualCluster) -> None:
    with waiting(2) as (template, other):
        assert echo(it, f"{template.pid} {other.pid}:0", "procs/onexec").returncode == 0
        template.kill()
        assert template.wait(60) == -signal.SIGKILL
        assert other.poll() is None
        assert (it.mount / "procs" / str(other.pid) / "state").read_text() == "running\n"
        assert (it.mount / "procs" / str(other.pid) / "node").read_text() == "-1\n"


def test_who_has_become_another_program_is_left_alone(it: VirtualCluster) -> None:
    with waiting(2) as (first, other), waiting(1) as (second,):
        for template, node in ((first, 0), (second, 1)):
            assert echo(it, f"{template.pid} {other.pid}:{node}", "procs/onexec").returncode == 0
        tell(first, "exec cat")
        node = it.mount / "procs" / str(other.pid) / "node"
        wait_until(lambda: node.read_text() == "0\n", "it runs on node 0")
        tell(second, "exec cat")
        assert second.wait(60) == 0
        wait_until(lambda: outcomes(it, 1) == {1: "EBUSY"}, "the second order finds it taken")
        assert other.communicate("still the first\n", timeout=60)[0] == "still the first\n"


def test_a_template_ends_with_its_tracer(it: VirtualCluster) -> None:
    # It must never run the program at home. Those that wait can be had by the next order.
    with waiting(2) as (template, other):
        assert echo(it, f"{template.pid} {other.pid}:0", "procs/onexec").returncode == 0
        status = Path(f"/proc/{template.pid}/status").read_text()
        os.kill(int(status.split("\nTracerPid:\t", 1)[1].split()[0]), signal.SIGKILL)
        assert template.wait(60) == -signal.SIGKILL
        with waiting(1) as (another,):
            assert echo(it, f"{another.pid} {other.pid}:1", "procs/onexec").returncode == 0
            tell(another, "exec uname -n")
            assert other.communicate(timeout=60)[0] == "n1\n"


def test_who_is_killed_while_he_waits_has_no_process_anywhere(it: VirtualCluster) -> None:
    with waiting(3) as (template, killed, other):
        assert echo(it, f"{template.pid} {killed.pid}:0 {other.pid}:1", "procs/onexec").returncode == 0
        killed.kill()
        killed.wait(60)
        tell(template, "exec cat")
        assert other.communicate("still here\n", timeout=60)[0] == "still here\n"
        assert outcomes(it, 2) == {0: "ESRCH", 1: "ok"}
        wait_until(lambda: not os.listdir(it.mount / "nodes/0/procs"), "nothing is left on node 0")


def test_many_in_one_order(it: VirtualCluster) -> None:
    # An order longer than other lines may be, and than a page.
    count = 400
    with waiting(2) as (template, other):
        words = [f"{template.pid}", f"{other.pid}:0", *(f"{4194304 - n}:{n % NODES}" for n in range(count))]
        refused = echo(it, " ".join(words), "procs/onexec")
        assert "Remote I/O error" in refused.stderr
        assert it.read("procs/onexec").splitlines()[-count].startswith("4194304 0 ESRCH ")
        tell(template, "exec uname -n")
        assert other.communicate(timeout=60)[0] == "n0\n"

"""bpsh by itself: options, programs, many nodes' input and output, exit codes and signals.

The migrate files of the plain tree take what is written and move nothing, so every command runs here: what moving adds
is checked in tests/cluster.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import leftovers

BPSH = str(Path(__file__).resolve().parents[2] / "bpfs" / "bin" / "bpsh")


@pytest.fixture
def bpsh(plain_tree: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs bpsh on the plain tree."""

    def run(*arguments: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "BPFS": str(plain_tree), **more}
        return subprocess.run(
            [BPSH, *arguments], input=stdin, capture_output=True, text=True, env=environment, check=False
        )

    return run


Bpsh = Callable[..., subprocess.CompletedProcess[str]]


@contextmanager
def started(tree: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """bpsh at work; killed in the end, if need be, and its commands with it."""
    environment = {**os.environ, "BPFS": str(tree)}
    bpsh = subprocess.Popen(
        [BPSH, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    children: list[int] = []
    try:
        yield bpsh
    finally:
        if bpsh.poll() is None:
            children = commands_of(bpsh.pid)
        bpsh.kill()
        for child in children:
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                pass  # hung up already
        bpsh.wait(60)
        for pipe in (bpsh.stdout, bpsh.stderr):
            assert pipe is not None
            pipe.close()


def commands_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(what: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_one_node_becomes_the_command(bpsh: Bpsh, plain_tree: Path) -> None:
    run = bpsh("2", "sh", "-c", "echo $$ $BPROC_RANK $BPROC_PROGNAME; cat; exit 7", stdin="in")
    pid, rest = run.stdout.split(" ", 1)
    assert (run.returncode, rest, run.stderr) == (7, "0 /usr/bin/sh\nin", "")
    # The process that asked to be moved is the one that ran the command.
    assert (plain_tree / "nodes/2/migrate").read_text().split("\n")[0] == f"{pid} onexec"


@pytest.mark.parametrize("spec", ["2", "n2", "master", "-1", "self"])
def test_options_stand_before_or_after_the_nodes(bpsh: Bpsh, spec: str) -> None:
    for arguments in (["-n", spec, "cat"], [spec, "-n", "cat"], ["-l", "me", spec, "-n", "--", "cat"]):
        run = bpsh(*arguments, stdin="unseen")
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["6", "true"], 255, "there is no node 6"),
        (["0-6", "true"], 255, "there is no node 6"),
        (["halt", "true"], 255, "no node is 'halt'"),
        (["0"], 2, "no command given (--help tells the options)"),
        ([], 2, "no nodes given (--help tells the options)"),
        (["0", "no-such-program"], 127, "no-such-program: command not found"),
        (["0", "/etc/passwd"], 126, "/etc/passwd: is no program that you may run"),
        (["0", "-O", "/missing/x", "true"], 125, "cannot open /missing/x on the node: Directory nonexistent"),
        (["-E/", "0", "true"], 125, "cannot open / on the node: Is a directory"),
        (["0", "--stdin", "/miss ing", "true"], 125, "cannot open /miss ing on the node: No such file"),
        (["--timeout", "x", "0", "true"], 2, "--timeout wants seconds: x (--help tells the options)"),
        (
            ["--fanout", "1", "0-1", "cat"],
            2,
            "--fanout below the number of nodes needs -n, or a file as standard input",
        ),
    ],
)
def test_errors_are_one_line(bpsh: Bpsh, arguments: list[str], code: int, sentence: str) -> None:
    run = bpsh(*arguments)
    assert (run.returncode, run.stdout, run.stderr) == (code, "", f"bpsh: {sentence}\n")


def test_no_cluster(bpsh: Bpsh) -> None:
    for spec in ("0", "all"):
        run = bpsh(spec, "true", BPFS="/nowhere")
        assert run.returncode == 255
        assert run.stderr == "bpsh: no cluster is mounted at /nowhere (bpcluster up starts one)\n"


def test_one_word_with_shell_characters_goes_to_a_shell(bpsh: Bpsh) -> None:
    assert bpsh("0", "echo a; echo b").stdout == "a\nb\n"
    assert bpsh("0", "--", "echo a; echo b").returncode == 127
    assert bpsh("0", "echo", "$HOME;").stdout == "$HOME;\n"


def test_exec_is_for_shells(bpsh: Bpsh) -> None:
    assert bpsh("0", "--", "exec", "echo", "a").stdout == "a\n"
    assert bpsh("0", "exec", "no-such-program").stderr == "bpsh: no-such-program: command not found\n"


def test_a_program_of_that_very_name_needs_no_shell(bpsh: Bpsh, tmp_path: Path) -> None:
    program = tmp_path / "odd name"
    program.write_text("echo without an interpreter line: $#\n")
    program.chmod(0o755)
    assert bpsh("0", str(program)).stdout == "without an interpreter line: 0\n"


def test_files_are_opened_by_the_command(bpsh: Bpsh, tmp_path: Path) -> None:
    (tmp_path / "in put").write_text("text\n")
    script = 'cat; echo oops >&2; echo "$1"'
    run = bpsh(
        "0",
        "-I",
        f"{tmp_path}/in put",
        "-O",
        f"{tmp_path}/out",
        "-E",
        f"{tmp_path}/err",
        "sh",
        "-c",
        script,
        "-",
        "a b",
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert (tmp_path / "out").read_text() == "text\na b\n"
    assert (tmp_path / "err").read_text() == "oops\n"


def test_nothing_goes_anywhere(bpsh: Bpsh) -> None:
    for spec in ("0", "0-2"):
        run = bpsh("-N", spec, "sh", "-c", "cat; echo out; echo err >&2; exit 4", stdin="in")
        assert (run.returncode, run.stdout, run.stderr) == (4, "", "")


# Several nodes.


def test_input_reaches_everybody_whole(bpsh: Bpsh) -> None:
    text = "".join(f"line {number}\n" for number in range(50_000))
    run = bpsh("-s", "0-2", "sh", "-c", "md5sum", stdin=text)
    assert run.returncode == 0
    assert len(set(run.stdout.splitlines())) == 1
    assert len(run.stdout.splitlines()) == 3


def test_who_reads_nothing_holds_up_nobody(bpsh: Bpsh) -> None:
    script = "if [ $BPROC_RANK = 1 ]; then exec <&-; exit 0; else wc -c; fi"
    assert bpsh("-L", "0-2", "sh", "-c", script, stdin="x" * 1_000_000).stdout == "1000000\n" * 2


def test_lines_never_mix(bpsh: Bpsh) -> None:
    script = 'for i in $(seq 300); do printf "%s-" $BPROC_RANK $BPROC_RANK; echo "$BPROC_RANK $i"; done'
    run = bpsh("-p", "0-5,0-5", "sh", "-c", script)
    lines = [re.fullmatch(r" {2}(\d): (\d+)-\2-\2 (\d+)", line) for line in run.stdout.splitlines()]
    assert all(lines)
    seen: dict[str, list[int]] = {}
    for line in lines:
        assert line is not None
        seen.setdefault(line[2], []).append(int(line[3]))
    assert len(seen) == 12
    assert all(numbers == list(range(1, 301)) for numbers in seen.values())


def test_prefix_on_both_outputs_and_unfinished_lines(bpsh: Bpsh) -> None:
    run = bpsh("-p", "7", "sh", "-c", "printf 'a\\nb'; printf c >&2")
    assert (run.stdout, run.stderr) == ("  7: a\n  7: b\n", "  7: c\n")


def test_long_lines_are_broken_at_the_limit(bpsh: Bpsh) -> None:
    run = bpsh("-p", "-b", "100", "0", "sh", "-c", "head -c 5000 /dev/zero | tr '\\0' x")
    assert run.stdout.replace("  0: ", "").replace("\n", "") == "x" * 5000


def test_one_after_another_with_dividers(bpsh: Bpsh) -> None:
    dashes = "-" * 69
    script = "[ $BPROC_RANK = 0 ] && sleep 0.2; echo $BPROC_RANK"
    assert bpsh("-d", "2,0", "sh", "-c", script).stdout == f"2\t{dashes}\n0\n0\t{dashes}\n1\n"


def test_same_output_is_told_once(bpsh: Bpsh) -> None:
    script = "case $BPROC_RANK in 2) echo odd;; 3) ;; *) printf even;; esac"
    dashes = "-" * 15
    assert bpsh("-g", "0-4", "sh", "-c", script).stdout == (
        f"{dashes}\n0-1,4 (3)\n{dashes}\neven\n{dashes}\n2 (1)\n{dashes}\nodd\n"
    )


def test_a_job_map_names_nodes_by_rank(bpsh: Bpsh, plain_tree: Path) -> None:
    run = bpsh("-n", "-s", "--map", "-1:0:0:2", "sh", "-c", "echo $BPROC_RANK")
    assert (run.returncode, run.stdout, run.stderr) == (0, "0\n1\n2\n3\n", "")
    assert len((plain_tree / "nodes/-1/migrate").read_text().splitlines()) == 1
    run = bpsh("--map", "0:up", "true")
    assert run.returncode == 2
    assert (
        run.stderr == "bpsh: --map wants numbers of nodes with colons between them: 0:up (--help tells the options)\n"
    )


@pytest.mark.parametrize("count", [63, 64, 65, 128, 130])
def test_many_nodes(bpsh: Bpsh, plain_tree: Path, count: int) -> None:
    for number in range(count):
        node = plain_tree / "nodes" / str(number)
        node.mkdir(exist_ok=True)
        (node / "migrate").write_text("")
    (plain_tree / "status").write_text("".join(f"{n} up 111 root root 10.0.0.1\n" for n in range(count)))
    run = bpsh("-a", "-p", "sh", "-c", "cksum; exit $((BPROC_RANK == 50))", stdin="x" * 100_000)
    assert (run.returncode, run.stderr) == (1, "")
    assert sorted(int(line.split(":")[0]) for line in run.stdout.splitlines()) == list(range(count))
    assert len({line.split(":")[1] for line in run.stdout.splitlines()}) == 1


def test_a_terminal_of_its_own(bpsh: Bpsh) -> None:
    script = "test -t 0 -a -t 1 -a -t 2 && ps -o sid= -p $$ | grep -qw $$ && stty -a | grep -q ' -echo ' && cat"
    for text in ("one\ntwo\n", "one\ntwo", ""):
        run = bpsh("-s", "-T", "0-1", "sh", "-c", script, stdin=text)
        assert (run.returncode, run.stdout, run.stderr) == (0, text * 2, "")
    run = bpsh("-n", "-T", "0", "sh", "-c", "cat; test -t 0 || test -t 1 && echo so", stdin="unseen")
    assert (run.returncode, run.stdout) == (0, "so\n")


def test_json(bpsh: Bpsh) -> None:
    script = "printf 'a\"\\\\\\n\\t\\303\\244\\377'; echo err >&2; [ $BPROC_RANK = 1 ] && kill -TERM $$; exit 3"
    run = bpsh("--json", "0-1", "sh", "-c", script)
    found = {entry["node"]: entry for entry in map(json.loads, run.stdout.splitlines())}
    assert [(found[n]["exit"], found[n]["signal"]) for n in (0, 1)] == [(3, None), (None, 15)]
    assert found[0]["stdout"] == 'a"\\\n\tä\udcff'
    assert found[0]["stderr"] == "err\n"


def test_the_largest_exit_code_counts(bpsh: Bpsh) -> None:
    assert bpsh("0-2", "sh", "-c", "exit $((BPROC_RANK * 2))").returncode == 4


def test_death_by_signal_is_told_and_counted(bpsh: Bpsh) -> None:
    script = "[ $BPROC_RANK = 1 ] && kill -KILL $$; exit 5"
    run = bpsh("0-2", "sh", "-c", script)
    assert (run.returncode, run.stderr) == (128 + 9, "bpsh: node 1: Killed\n")
    assert bpsh("--bproc-exit", "0-2", "sh", "-c", script).returncode == 255


def test_one_node_that_fails_is_named_and_the_others_go_on(bpsh: Bpsh, plain_tree: Path) -> None:
    (plain_tree / "nodes/1/migrate").unlink()
    run = bpsh("-p", "0-2", "echo", "done")
    assert run.returncode == 255
    assert sorted(run.stdout.splitlines()) == ["  0: done", "  2: done"]
    assert run.stderr == "  1: bpsh: there is no node 1\n"


def test_timeout(bpsh: Bpsh) -> None:
    script = "trap '' TERM; [ $BPROC_RANK = 0 ] || exec sleep 1000; while :; do sleep 0.05; done"
    run = bpsh("--timeout", "0.3", "0-1", "sh", "-c", script)
    assert run.returncode == 124
    assert sorted(run.stderr.splitlines()) == [f"bpsh: node {n}: timed out after 0.3 s" for n in (0, 1)]


def test_times(bpsh: Bpsh) -> None:
    assert re.fullmatch(r"  0: \d+\.\d{3} s\n", bpsh("-t", "0", "true").stderr)


def test_fanout_runs_no_more_at_a_time(bpsh: Bpsh, tmp_path: Path) -> None:
    script = f"mkdir {tmp_path}/$$; ls {tmp_path} | wc -l; sleep 0.05; rmdir {tmp_path}/$$"
    folder = tmp_path / "running"
    folder.mkdir()
    run = bpsh("-n", "--fanout", "2", "0-5,0-5", "sh", "-c", script.replace(str(tmp_path), str(folder)))
    counts = [int(line) for line in run.stdout.split()]
    assert len(counts) == 12
    assert max(counts) <= 2


def test_fanout_gives_everybody_the_whole_file(bpsh: Bpsh, plain_tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "input"
    file.write_text("skipped\n" + "x" * 100_000)
    with file.open() as stdin:
        os.lseek(stdin.fileno(), len("skipped\n"), os.SEEK_SET)
        run = subprocess.run(
            [BPSH, "--fanout", "2", "0-4", "wc", "-c"], stdin=stdin, capture_output=True, text=True,
            env={**os.environ, "BPFS": str(plain_tree)}, check=False,
        )  # fmt: skip
    assert run.stdout == "100000\n" * 5


def test_limits_and_signals_reach_the_command_as_they_were(bpsh: Bpsh) -> None:
    script = "ulimit -n; grep -E 'SigIgn|SigBlk' /proc/self/status"
    here = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    run = bpsh("-s", "0-1", "sh", "-c", script)
    assert run.stdout == here.stdout * 2


def test_signals_that_the_caller_has_blocked(plain_tree: Path) -> None:
    run = subprocess.run(
        [BPSH, "0-1", "grep", "SigBlk", "/proc/self/status"], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "BPFS": str(plain_tree)}, stdin=subprocess.DEVNULL,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGUSR1}),
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, "SigBlk:\t0000000000010200\n" * 2)


def test_a_reader_that_leaves_ends_it(plain_tree: Path) -> None:
    with started(plain_tree, "0-2", "yes") as bpsh:
        assert bpsh.stdout is not None
        assert bpsh.stdout.readline() == "y\n"
        bpsh.stdout.close()
        assert bpsh.wait(60) == 128 + signal.SIGPIPE


def test_a_signal_is_passed_on_once_and_ends_it(plain_tree: Path, tmp_path: Path) -> None:
    script = f"trap 'echo $BPROC_RANK >> {tmp_path}/got; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    with started(plain_tree, "0-1", "sh", "-c", script) as bpsh:
        assert bpsh.stdout is not None
        assert [bpsh.stdout.readline() for _ in range(2)] == ["up\n"] * 2
        bpsh.terminate()
        assert bpsh.wait(60) == -signal.SIGTERM
        assert sorted((tmp_path / "got").read_text().split()) == ["0", "1"]


def test_a_second_signal_kills_at_once(plain_tree: Path) -> None:
    with started(plain_tree, "0-1", "sh", "-c", "trap '' INT; echo up; while :; do sleep 0.05; done") as bpsh:
        assert bpsh.stdout is not None
        assert [bpsh.stdout.readline() for _ in range(2)] == ["up\n"] * 2
        bpsh.send_signal(signal.SIGINT)
        children = commands_of(bpsh.pid)
        assert len(children) == 2
        # Sent again until it is taken: two that come together are one.
        deadline = time.monotonic() + 60
        while bpsh.poll() is None:
            assert time.monotonic() < deadline
            bpsh.send_signal(signal.SIGINT)
            time.sleep(0.05)
        assert bpsh.returncode == -signal.SIGINT
        wait_for(lambda: not any(map(leftovers.alive, children)))


def read_until(terminal: int, text: bytes, times: int) -> None:
    seen = b""
    deadline = time.monotonic() + 60
    while seen.count(text) < times:
        assert select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0], seen
        seen += os.read(terminal, 4096)


def test_control_c_at_a_terminal_reaches_everybody(plain_tree: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["BPFS"] = str(plain_tree)
        os.execv(
            BPSH,
            ["bpsh", "-L", "0-1", "sh", "-c", "trap 'echo bye; exit 0' INT; echo up; while :; do sleep 0.05; done"],
        )
    ended = (0, 0)
    try:
        read_until(terminal, b"up", 2)
        os.write(terminal, b"\x03")
        read_until(terminal, b"bye", 2)
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            assert time.monotonic() < deadline, "it should have ended"
            time.sleep(0.01)
        assert os.waitstatus_to_exitcode(ended[1]) == -signal.SIGINT
    finally:
        os.close(terminal)
        if ended[0] == 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_the_terminal_of_the_node_has_our_keys_and_size(plain_tree: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["BPFS"] = str(plain_tree)
        script = (
            'stty size; until [ "$(stty size)" = "33 77" ]; do sleep 0.02; done; trap "echo heard; exit 3" INT; '
            "echo sized; cat"
        )
        os.execv("/bin/sh", ["sh", "-c", f"{BPSH} -T 0 bash -c '{script}' 2>&1 | cat"])
    ended = (0, 0)
    try:
        read_until(terminal, b"0 0", 1)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
        read_until(terminal, b"sized", 1)
        os.write(terminal, b"word\r")
        read_until(terminal, b"word", 2)  # the terminal's echo, and cat
        os.write(terminal, b"\x03")
        read_until(terminal, b"heard", 1)
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            assert time.monotonic() < deadline, "it should have ended"
            time.sleep(0.01)
    finally:
        os.close(terminal)
        if ended[0] == 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.parametrize("option", ["-T", "-L"])
def test_stopped_and_continued_with_all_its_commands(plain_tree: Path, option: str) -> None:
    def states(pids: list[int]) -> str:
        return "".join(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] for pid in pids)

    with started(plain_tree, option, "0-1", "sh", "-c", "echo up; exec sleep 1000") as bpsh:
        assert bpsh.stdout is not None
        assert [bpsh.stdout.readline(), bpsh.stdout.readline()] == ["up\n"] * 2
        everybody = [bpsh.pid, *commands_of(bpsh.pid)]
        # ^Z goes to the group; with -T the commands have terminals, and groups, of their own.
        for pid in everybody if option == "-L" else everybody[:1]:
            os.kill(pid, signal.SIGTSTP)
        wait_for(lambda: states(everybody) == "TTT")
        for pid in everybody if option == "-L" else everybody[:1]:
            os.kill(pid, signal.SIGCONT)
        wait_for(lambda: "T" not in states(everybody))


@pytest.mark.parametrize("arguments", ["0-1 echo a", "-g 0-1 echo a", "--json 0 echo a", "--help", "--expand 0"])
def test_output_that_is_lost_is_an_error(plain_tree: Path, arguments: str) -> None:
    run = subprocess.run(
        ["sh", "-c", f'exec "$0" {arguments} >/dev/full', BPSH], env={**os.environ, "BPFS": str(plain_tree)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (1, "bpsh: standard output: No space left on device\n")


def test_when_it_is_killed_the_commands_are_hung_up(plain_tree: Path) -> None:
    with started(plain_tree, "0-1", "sh", "-c", "echo $$; exec sleep 1000") as bpsh:
        assert bpsh.stdout is not None
        pids = [int(bpsh.stdout.readline()) for _ in range(2)]
        bpsh.kill()
        bpsh.wait(60)
        wait_for(lambda: not any(map(leftovers.alive, pids)))

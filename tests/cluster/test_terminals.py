"""Jobs that were started from a real terminal, and shells that move themselves: what a person at the keyboard sees."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios

import pytest

from tests.cluster.desk import PROMPT, Desk, desk, stat_of
from tests.cluster.virtual import VirtualCluster, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

HOME = os.uname().nodename


@pytest.fixture(scope="module")
def it(session_folder):
    with cluster(session_folder / "terminals", nodes=2) as made:
        yield made


@pytest.fixture
def at():
    with desk() as made:
        yield made


def move(it: VirtualCluster, pid: int, node: int) -> None:
    """Moves a process from another terminal."""
    command = f"echo {pid} > {it.mount}/nodes/{node}/migrate"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr + it.read(f"nodes/{node}/migrate")


def go(it: VirtualCluster, at: Desk, node: int, prompt: str = PROMPT) -> None:
    """The shell at the terminal moves itself."""
    assert at.run(f"echo $$ > {it.mount}/nodes/{node}/migrate", prompt=prompt) == ""


def lives(it: VirtualCluster, pid: int) -> bool:
    """Whether a process that is away runs, and so does its ghost."""
    return stat_of(pid)[0] in "RSD" and it.read(f"procs/{pid}/state") == "running\n"


def use_job_control(at: Desk, prompt: str = PROMPT) -> None:
    """A round of what job control offers, wherever the shell is."""
    # What a job prints first tells that it has the terminal: a key that comes before may be the shell's.
    at.type("sh -c 'echo be\"\"gun; exec sleep 1000'\r")
    at.see("begun\r\n")
    at.type("\x03")
    at.see("^C", prompt)
    assert at.run("echo $?", prompt=prompt) == "130\n"
    at.type("(echo be''gun; read line; echo got:$line:; exit 6)\r")
    at.see("begun")
    at.type("\x1a")
    at.see("Stopped", prompt)
    assert "Stopped" in at.run("jobs", prompt=prompt)
    at.type("fg\r")
    at.see("\n", "exit 6")
    at.await_turn()
    at.type("a line\r")
    at.see("a line\r\ngot:a line:\r\n", prompt)
    assert at.run("echo $?", prompt=prompt) == "6\n"
    at.run("sleep 1000 &", prompt=prompt)
    assert "Running" in at.run("jobs", prompt=prompt)
    assert at.run("kill %1; wait %1 2>&1; echo s=$?", prompt=prompt).endswith("s=143\n")
    at.type("cat\r")
    at.await_lines()
    at.type("one\r")
    at.see("one\r\none\r\n")
    at.type("\x04")
    at.see(prompt)
    assert at.run("echo $?", prompt=prompt) == "0\n"


def test_a_login_shell_goes_to_a_node_and_comes_home(it, at):
    go(it, at, 1)
    assert at.run("hostname; echo tty > /dev/tty; test -t 0 && tty | cut -c 1-9") == "n1\ntty\n/dev/pts/\n"
    assert at.shell.poll() is None and stat_of(at.shell.pid)[0] in "SR"
    use_job_control(at)
    assert "No such file" in at.run(f"echo $$ > {it.mount}/nodes/77/migrate")
    go(it, at, 0)
    assert at.run("hostname") == "n0\n"
    use_job_control(at)
    go(it, at, -1)
    assert at.run("hostname") == f"{HOME}\n"
    assert at.run("test -t 0 -a -t 2 && tty").startswith("/dev/")
    use_job_control(at)
    at.type("exit 3\r")
    wait_until(lambda: at.shell.poll() is not None, "the shell should end")
    assert at.shell.returncode == 3


def test_a_login_shell_ends_on_its_node(it, at):
    go(it, at, 0)
    at.type("exit 3\r")
    wait_until(lambda: at.shell.poll() is not None, "the shell should end")
    assert at.shell.returncode == 3


def test_a_shell_below_another_goes_to_a_node(it, at):
    at.type("PS1='be''low> ' bash --norc --noprofile -i\r")
    at.see("below> ")
    go(it, at, 1, "below> ")
    assert at.run("hostname", prompt="below> ") == "n1\n"
    use_job_control(at, "below> ")
    at.type("suspend\r")
    at.see("Stopped", PROMPT)
    assert at.run("hostname") == f"{HOME}\n"
    assert "Stopped" in at.run("jobs")
    at.type("fg\r")
    at.see("\n", "below> ")
    assert at.run("hostname", prompt="below> ") == "n1\n"
    go(it, at, -1, "below> ")
    assert at.run("hostname", prompt="below> ") == f"{HOME}\n"
    go(it, at, 0, "below> ")
    at.type("exit 4\r")
    at.see(PROMPT)
    assert at.status() == 4


# Says that it is there once it has settled, then answers lines.
ANSWERS = (
    "import sys; print('be' + 'gun', flush=True); [print('got', line.strip(), flush=True) for line in sys.stdin]; "
    "sys.exit(6)"
)


def answering(at: Desk) -> int:
    """Starts a job in the foreground; returns its pid."""
    at.type(f'{sys.executable} -I -S -c "{ANSWERS}"\r')
    at.see("begun\r\n")
    return at.foreground()


def test_a_job_that_is_moved_behaves_as_at_home(it, at):
    pid = answering(at)
    move(it, pid, 1)
    at.type("one\r")
    at.see("one\r\ngot one\r\n")  # echoed once
    at.type("\x1a")
    at.see("Stopped", PROMPT)
    wait_until(lambda: it.read(f"procs/{pid}/state") == "stopped\n", "it should stop on its node")
    at.type("fg\r")
    at.see("\n", "sys.exit(6)")
    at.await_turn()
    at.type("two\r")
    at.see("got two\r\n")
    move(it, pid, 0)
    at.type("three\r")
    at.see("got three\r\n")
    move(it, pid, -1)
    at.type("four\r")
    at.see("got four\r\n")
    move(it, pid, 1)
    at.type("\x04")
    at.see(PROMPT)
    assert at.status() == 6


def test_control_c_ends_a_job_that_was_moved(it, at):
    move(it, answering(at), 0)
    at.type("\x03")
    at.see("^C", PROMPT)
    assert at.status() == 130


def test_control_backslash_and_kill(it, at):
    move(it, answering(at), 0)
    at.type("\x1c")
    at.see("Quit", PROMPT)
    assert at.status() == 131
    pid = answering(at)
    move(it, pid, 1)
    at.type("\x1a")
    at.see("Stopped", PROMPT)
    at.run("kill %1")
    wait_until(lambda: stat_of(pid)[0] in "ZX", "it should be killed, stopped as it was")
    assert at.run(f"wait {pid}; echo s=$?").endswith("s=143\n")


def test_keys_reach_what_a_job_started_on_its_node(it, at, tmp_path):
    script = tmp_path / "job"
    script.write_text(
        f"echo $$ > {it.mount}/nodes/1/migrate\ntrap 'echo caught' INT\n"
        "sh -c 'echo begun; read line; echo got:$line:; exec sleep 1000'\necho on $(hostname)\n"
    )
    at.type(f"bash {script}\r")
    at.see("begun\r\n")
    at.type("\x1a")
    at.see("Stopped", PROMPT)
    at.type("fg\r")
    at.see("\n", f"bash {script}")
    at.await_turn()
    at.type("a line\r")
    at.see("got:a line:\r\n")
    at.type("\x03")
    at.see("^C", "caught\r\n", "on n1\r\n", PROMPT)
    assert at.status() == 0


def test_a_background_job_that_reads_is_stopped(it, at):
    pid = at.started("cat")
    # At home it is stopped already, and it moves as it is.
    wait_until(lambda: stat_of(pid)[0] == "T", "cat should stop")
    move(it, pid, 1)
    wait_until(lambda: stat_of(pid)[0] == "T", "its ghost should stand still, too")
    at.run("")
    at.type("fg\r")
    at.see("\n", "cat")
    at.await_turn()
    at.type("a line\r")
    at.see("a line\r\na line\r\n")
    at.type("\x1a")
    at.see("Stopped", PROMPT)
    at.run("bg")
    wait_until(lambda: stat_of(pid)[0] == "T", "it should stop again: it reads")
    at.type("fg\r")
    at.see("\n", "cat")
    at.await_turn()
    at.type("\x04")
    at.see(PROMPT)
    assert at.status() == 0


def test_tostop_stops_a_background_job_that_writes(it, at, tmp_path):
    script = tmp_path / "job"
    script.write_text(f"echo $$ > {it.mount}/nodes/1/migrate\necho written\nexit 5\n")
    at.run("stty tostop")
    pid = at.started(f"bash {script}")
    wait_until(lambda: stat_of(pid)[0] == "T", "it should stop")
    assert "\nwritten" not in at.run("")
    at.type("fg\r")
    at.see("\n", "\nwritten\r\n", PROMPT)
    assert at.status() == 5


def test_jobs_of_one_terminal_on_one_node_do_not_hurt_each_other(it, at):
    first = at.started("sleep 1000")
    move(it, first, 1)
    at.type("PS1='be''low> ' bash --norc --noprofile -i\r")
    at.see("below> ")
    below = at.foreground()
    go(it, at, 1, "below> ")
    use_job_control(at, "below> ")
    third = at.run("sleep 1000 & echo $!", prompt="below> ").split()[-1]
    at.run(f"kill {third}; wait", prompt="below> ")
    at.type("exit\r")
    at.see(PROMPT)
    assert stat_of(below)[0] in "XZ"
    wait_until(lambda: lives(it, first), "the first should live on")
    # The node has only the first left. A new one takes the terminal, goes, and comes again.
    second = answering(at)
    for node in (1, -1, 1):
        move(it, second, node)
        at.type(f"on {node}\r")
        at.see(f"got on {node}\r\n")
    at.type("\x03")
    at.see("^C", PROMPT)
    assert at.shell.poll() is None
    wait_until(lambda: lives(it, first), "the first should live on")
    os.kill(second_of(at, it), signal.SIGKILL)
    at.type("\r")
    at.see(PROMPT)
    wait_until(lambda: lives(it, first), "the first should live on")
    at.type("fg\r")
    wait_until(lambda: at.foreground() == first, "the job should have the terminal")
    at.type("\x03")
    at.see("^C", PROMPT)
    assert at.status() == 130


def second_of(at: Desk, it: VirtualCluster) -> int:
    """Another job in the foreground of the node, whose ghost is then killed."""
    pid = answering(at)
    move(it, pid, 1)
    return pid


def test_settings_seen_on_a_node_do_no_harm_at_home(it, at):
    go(it, at, 1)
    saved = at.run("stty -g").strip()
    go(it, at, -1)
    at.run(f"stty {saved}")
    assert at.run("stty -a").find("-extproc") >= 0
    use_job_control(at)


def test_typing_ahead(it, at):
    go(it, at, 1)
    lines = [f"echo line''{n}" for n in range(30)]
    at.type("\r".join(lines) + "\r")
    at.see(*[f"line{n}\r\n" for n in range(30)])
    at.run("")
    # Keys that come while a job runs go to the shell once it has ended, and to the job where it reads.
    at.type("sh -c 'echo be\"\"gun; read x; echo x=$x'\r")
    at.see("begun\r\n")
    at.type("for the job\recho for the ''shell\r")
    at.see("x=for the job\r\n", "for the shell\r\n", PROMPT)


def test_keys_come_one_by_one_while_jobs_come_and_go(it, at):
    go(it, at, 0)
    for n in range(8):
        for key in f"sh -c 'exit {n}'; echo st''{n}=$?\r":
            at.type(key)
    at.mark = 0
    at.see(*[f"st{n}={n}\r\n" for n in range(8)])


def test_settings_and_window_size(it, at, tmp_path):
    at.resize(33, 199)
    go(it, at, 1)
    assert at.run("stty size") == "33 199\n"
    at.type("stty -echo; echo hid''den; read x; stty echo; echo got $x\r")
    at.see("hidden\r\n")
    assert not at.local_modes() & termios.ECHO
    at.type("password\r")
    assert "password\r\n" not in at.see("got password\r\n", PROMPT).replace("got password\r\n", "")
    at.type('sh -c \'trap "stty size" WINCH; echo be""gun; while :; do read x; done\'\r')
    at.see("begun\r\n")
    at.resize(44, 188)
    at.see("44 188\r\n")
    at.type("\x03")
    at.see(PROMPT)
    assert at.run("stty size") == "44 188\n"
    go(it, at, -1)
    assert at.run("stty size") == "44 188\n"
    assert " echo " in at.run("stty -a")


def test_output_comes_in_order_and_before_the_prompt(it, at):
    go(it, at, 1)
    at.run("stty -onlcr; stty onlcr")
    wanted = "".join(f"{n}\n" for n in range(1, 3001))
    assert at.run("seq 3000") == wanted
    assert at.run("for n in 1 2 3 4 5 6; do echo out$n; echo err$n >&2; done") == "".join(
        f"out{n}\nerr{n}\n" for n in range(1, 7)
    )
    assert at.run("printf 'no newline'") == "no newline"


CURSES = """
import curses
def main(screen):
    screen.addstr(0, 0, "full " + "screen")
    screen.refresh()
    keys = ""
    while not keys.endswith("q"):
        keys += screen.getkey() + " "
        screen.addstr(1, 0, keys)
        screen.refresh()
        keys = keys.rstrip()
curses.wrapper(main)
print("keys" + "read")
"""


def test_a_full_screen_program(it, at, tmp_path):
    (tmp_path / "full.py").write_text(CURSES)
    at.type(f"TERM=xterm {sys.executable} {tmp_path}/full.py\r")
    at.see("full screen")
    pid = at.foreground()
    move(it, pid, 1)
    at.type("a")
    at.see("a")
    at.type("\x1bOA")
    at.see("KEY_UP")
    move(it, pid, 0)
    at.type("\x1bOB")
    at.see("KEY_DOWN")
    move(it, pid, -1)
    at.type("\x1bOC")
    at.see("KEY_RIGHT")
    move(it, pid, 0)
    at.type("q")
    at.see("keysread\r\n", PROMPT)
    assert at.local_modes() & termios.ICANON == 0  # the shell's line editor has it again
    go(it, at, 0)
    at.type(f"TERM=xterm {sys.executable} {tmp_path}/full.py\r")
    at.see("full screen")
    at.type("q")
    at.see("keysread\r\n", PROMPT)
    assert at.status() == 0


def test_a_terminal_that_hangs_up_takes_its_jobs_along(it, at, tmp_path):
    job = at.started("nohup sleep 1000 > /dev/null 2>&1")
    kept = at.started(f"bash -c 'trap \"\" HUP; echo $$ > {it.mount}/nodes/0/migrate; exec sleep 1000'")
    moved = at.started("sleep 1000")
    for pid in (job, moved):
        move(it, pid, 1)
    wait_until(lambda: str(kept) in os.listdir(it.mount / "nodes/0/procs"), "it should go")
    at.hang_up()
    wait_until(lambda: at.shell.poll() is not None, "the shell should be hung up")
    wait_until(lambda: stat_of(moved)[0] in "XZ", "the job should be hung up")
    for pid in (job, kept):
        wait_until(lambda pid=pid: lives(it, pid), "it should live on")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not (it.mount / f"procs/{pid}").exists(), "it should end")


def test_a_login_shell_on_a_node_is_hung_up(it, at):
    go(it, at, 1)
    at.hang_up()
    wait_until(lambda: at.shell.poll() is not None, "the shell should be hung up")
    wait_until(lambda: not (it.mount / f"procs/{at.shell.pid}").exists(), "its process should have ended")


def test_two_terminals_on_one_node(it, at):
    with desk() as other:
        for one in (at, other):
            go(it, one, 1)
        assert at.run("tty") != other.run("tty")
        for one in (at, other):
            one.type("sh -c 'echo be\"\"gun; exec sleep 1000'\r")
            one.see("begun\r\n")
        at.type("\x03")
        at.see("^C", PROMPT)
        other.type("\x1a")
        other.see("Stopped", PROMPT)
        other.run("kill %1")
    assert at.run("hostname") == "n1\n"

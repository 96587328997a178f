"""Full-screen programs on nodes, as a person sees them: on the screen of tmux."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.cluster.desk import PROMPT, Desk, desk, session, stat_of
from tests.cluster.test_commands import BPSH
from tests.cluster.virtual import VirtualCluster, cluster, wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed"),
]


@pytest.fixture(scope="module")
def it(session_folder):
    with cluster(session_folder / "screens", nodes=4) as made:
        yield made


class Screen:
    """A bash in a window of tmux."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        shell = "env PS1='ready> ' HISTFILE= INPUTRC=/dev/null bash --norc --noprofile -i"
        self.run("-f", "/dev/null", "new-session", "-d", "-x", "90", "-y", "24", shell)

    def run(self, *words: str) -> str:
        """A command of tmux."""
        words = ("tmux", "-S", self._socket, *words)
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout

    def type(self, *keys: str) -> None:
        self.run("send-keys", *keys)

    def shows(self, *texts: str) -> None:
        """Waits until all of these are on the screen."""
        wait_until(lambda: all(text in self.run("capture-pane", "-p") for text in texts), f"{texts} should be seen")


@pytest.fixture
def screen(tmp_path) -> Iterator[Screen]:
    it = Screen(str(tmp_path / "tmux"))
    try:
        it.shows("ready>")
        yield it
    except BaseException:
        print(it.run("capture-pane", "-p"))
        raise
    finally:
        it.run("kill-server")


def needs(program: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")


def on(it: VirtualCluster, node: int, command: str) -> str:
    return f"clear; BPFS={it.mount} {BPSH} {node} {command}"


def test_less(it, screen, tmp_path):
    needs("less")
    (tmp_path / "text").write_text("".join(f"line {n} of 500\n" for n in range(1, 501)))
    screen.type(on(it, 1, f"less {tmp_path}/text"), "Enter")
    screen.shows("line 1 of 500", "line 23 of 500")
    screen.type("G")
    screen.shows("line 500 of 500", "(END)")
    screen.type("/line 77 ", "Enter")
    screen.type("g", "/line 77 ", "Enter")
    screen.shows("line 77 of 500", "line 99 of 500")
    screen.type("q")
    screen.shows("ready>")


def test_vim_is_suspended_and_goes_on(it, screen, tmp_path):
    needs("vim")
    text = tmp_path / "text"
    screen.type(on(it, 1, f"vim -u NONE -i NONE -N {text}"), "Enter")
    screen.shows("~", "[New")
    screen.type("i", "first line", "Enter", "second")
    screen.shows("first line", "second")
    screen.type("Escape")
    screen.type("C-z")
    screen.shows("Stopped", "ready>")
    screen.type(on(it, 1, "sh -c 'echo be\"\"side it; read x; echo got $x'"), "Enter")
    screen.shows("beside it")
    screen.type("a line", "Enter")
    screen.shows("got a line", "ready>")
    screen.type("fg", "Enter")
    screen.shows("first line", "second", "~")
    screen.type("A", " line", "Escape")
    screen.shows("second line")
    screen.type(":wq", "Enter")
    wait_until(lambda: text.exists() and text.read_text() == "first line\nsecond line\n", "it should be written")
    screen.shows("ready>")


def test_top_follows_the_window(it, screen):
    needs("top")
    screen.type(on(it, 2, "top -d 0.2"), "Enter")
    screen.shows("top - ", "Tasks:", "COMMAND")
    rows = len(screen.run("capture-pane", "-p").splitlines())
    screen.run("resize-window", "-x", "85", "-y", "12")
    wait_until(lambda: len(screen.run("capture-pane", "-p").rstrip("\n").splitlines()) <= 12 < rows, "it should shrink")
    screen.shows("top - ", "COMMAND")
    screen.type("q")
    screen.shows("ready>")
    screen.type("clear; stty size", "Enter")
    screen.shows("12 85")


def group(leader: int, at: Desk) -> list[int]:
    return [pid for pid in session(at.shell.pid) if stat_of(pid)[1][1] == str(leader)]


def test_control_z_suspends_64_processes_and_bg_starts_them(it):
    with desk() as at:
        inner = f"for n in 0 1 2 3; do for i in $(seq 16); do {BPSH} $n sleep 1000 & done; done; wait"
        at.type(f"BPFS={it.mount} sh -c '{inner}'\r")
        wait_until(lambda: at.foreground() != at.shell.pid, "it should begin")
        leader = at.foreground()

        def away() -> list[int]:
            return [int(pid) for node in range(4) for pid in os.listdir(it.mount / f"nodes/{node}/procs")]

        def all_are(state: str) -> bool:
            return all(it.read(f"procs/{pid}/state") == state for pid in away())

        wait_until(lambda: len(away()) == 64 and len(group(leader, at)) == 65, "64 should be away")
        for node in range(4):
            assert len(os.listdir(it.mount / f"nodes/{node}/procs")) == 16
        for _ in range(2):
            at.type("\x1a")
            at.see("Stopped", PROMPT)
            wait_until(lambda: all_are("stopped\n"), "all should be suspended")
            wait_until(lambda: {stat_of(pid)[0] for pid in group(leader, at)} == {"T"}, "and their ghosts")
            at.run("bg")
            wait_until(lambda: all_are("running\n"), "all should run")
            assert "Running" in at.run("jobs")
            at.type("fg\r")
            at.see("sh -c")
            wait_until(lambda: at.foreground() == leader, "it should have the terminal")
        at.type("\x1a")
        at.see("Stopped", PROMPT)
        at.run("kill %1; bg")
        wait_until(lambda: not away(), "all should end")

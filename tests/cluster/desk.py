"""A person at a real terminal with an interactive bash: what they type, and what they see."""

from __future__ import annotations

import fcntl
import os
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

from tests.cluster.virtual import DEADLINE, wait_until

PROMPT = "ready> "


class Desk:
    """One terminal, 200 columns wide so that no line is broken, and its login shell.

    Attributes:
        shell: the bash, leader of the terminal's session.
        text: everything that was ever on the screen.
    """

    def __init__(self) -> None:
        self.master, slave = os.openpty()
        os.set_blocking(self.master, False)
        self.text = ""
        self.mark = 0
        self.resize(40, 200)

        def adopt() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        env = {**os.environ, "PS1": PROMPT, "TERM": "dumb", "HISTFILE": "", "INPUTRC": "/dev/null"}
        try:
            self.shell = subprocess.Popen(
                ["bash", "--norc", "--noprofile", "-i"],
                stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=adopt, env=env,
            )  # fmt: skip
        finally:
            os.close(slave)
        self.see(PROMPT)

    def type(self, keys: str) -> None:
        """Types keys; what `see` looks for comes after them."""
        self.mark = len(self.text)
        os.write(self.master, keys.encode())

    def see(self, *texts: str) -> str:
        """Waits until the texts are on the screen, in this order, after the last `type`; returns all from there."""
        deadline = time.monotonic() + DEADLINE
        while not self._shows(texts):
            left = deadline - time.monotonic()
            assert left > 0, f"{texts!r} are not in {self.text[self.mark :]!r}"
            if select.select([self.master], [], [], left)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"hung up; {texts!r} are not in {self.text[self.mark :]!r}") from None
        return self.text[self.mark :]

    def _shows(self, texts: tuple[str, ...]) -> bool:
        at = self.mark
        for text in texts:
            found = self.text.find(text, at)
            if found < 0:
                return False
            at = found + len(text)
        return True

    def run(self, command: str, *, prompt: str = PROMPT) -> str:
        """Has the shell run a command line; returns what it printed up to the next prompt, without carriage returns."""
        self.type(command + "\r")
        shown = self.see("\n", prompt).replace("\r", "")
        return shown.partition("\n")[2].rpartition(prompt)[0]

    def await_prompt(self, prompt: str = PROMPT) -> str:
        """Waits for the prompt after the last `type`."""
        return self.see(prompt)

    def await_lines(self) -> None:
        """Waits until the shell's line editor has given the terminal away: it does so after it has echoed the line."""
        self._until(lambda: self.local_modes() & termios.ICANON, "the terminal should be in line mode")

    def await_turn(self) -> None:
        """Waits until the shell has given the terminal to a job of `fg`: it does so after it has said to which."""
        self.await_lines()
        self._until(self._in_background, "the job should have the terminal")

    def _until(self, what: Callable[[], object], sentence: str) -> None:
        try:
            wait_until(what, sentence)
        except AssertionError as error:
            shown = os.read(self.master, 65536) if select.select([self.master], [], [], 0)[0] else b""
            raise AssertionError(f"{error}; the screen: {self.text[self.mark :]!r}, then {shown!r}") from None

    def _in_background(self) -> bool:
        """Whether the shell has given its terminal away where it is: of that its ghost says nothing."""
        _, group, _, _, front, *_ = stat_of(real_of(self.shell.pid))[1]
        return front != group

    def await_shell(self) -> None:
        """Waits until the shell has the terminal, and its line editor as well."""
        wait_until(
            lambda: self.foreground() == self.shell.pid and not self.local_modes() & termios.ICANON,
            "the shell should have the terminal",
        )

    def status(self) -> int:
        """`$?`"""
        return int(self.run("echo $?"))

    def started(self, command: str) -> int:
        """Starts a job in the background; returns its pid."""
        shown = self.run(command + " &")
        found = re.search(r"\[\d+\] (\d+)", shown)
        assert found, shown
        return int(found[1])

    def resize(self, rows: int, columns: int) -> None:
        """Changes the window's size."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def local_modes(self) -> int:
        """c_lflag of the terminal."""
        return int(termios.tcgetattr(self.master)[3])

    def foreground(self) -> int:
        """The process group that the terminal belongs to now."""
        return int(struct.unpack("i", fcntl.ioctl(self.master, termios.TIOCGPGRP, bytes(4)))[0])

    def hang_up(self) -> None:
        """Closes the window."""
        if self.master >= 0:
            os.close(self.master)
            self.master = -1

    def close(self) -> None:
        """Hangs up and kills whatever is left of the session."""
        self.hang_up()

        def gone() -> bool:
            self.shell.poll()
            found = session(self.shell.pid)
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            return not found

        wait_until(gone, "the session should end")
        self.shell.wait()


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        state, fields = stat_of(int(name))
        if state not in "ZX" and fields[2] == str(leader):
            found.append(int(name))
    return found


def real_of(pid: int) -> int:
    """The process on a node of this machine that has this pid there; the same pid where there is none, as at home."""
    for entry in Path("/proc").iterdir():
        try:
            fields = dict(line.split(":\t", 1) for line in (entry / "status").read_text().splitlines() if ":\t" in line)
        except OSError:  # no process, or not any more
            continue
        spaces = fields["NSpid"].split()
        if len(spaces) == 3 and spaces[-1] == str(pid) and not fields["Name"].startswith("nodeinit"):
            return int(entry.name)
    return pid


def stat_of(pid: int) -> tuple[str, list[str]]:
    """State, and the fields after it (ppid first), of a process; `X` for one that is not there."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "X", ["0"] * 8
    return state, fields


@contextmanager
def desk() -> Iterator[Desk]:
    """A desk, gone with all its jobs afterwards."""
    it = Desk()
    try:
        yield it
    except BaseException:
        print(f"--- the screen\n{it.text}")
        raise
    finally:
        it.close()


class Terminal:
    """A tmux of our own with one program in it."""

    def __init__(self, socket: Path, command: str, environment: dict[str, str]) -> None:
        """`socket`: a path for tmux's own."""
        self._tmux = ["tmux", "-f", "/dev/null", "-S", str(socket)]
        start = [*self._tmux, "new-session", "-d", "-x", "100", "-y", "20", command]
        subprocess.run(start, env=environment, check=True, timeout=60)

    def keys(self, *keys: str) -> None:
        """Types keys, by tmux's names."""
        subprocess.run([*self._tmux, "send-keys", *keys], check=True, timeout=60)

    def screen(self) -> str:
        """What is on the screen now; nothing once the program has ended."""
        return subprocess.run(
            [*self._tmux, "capture-pane", "-p"], capture_output=True, text=True, timeout=60, check=False
        ).stdout

    def close(self) -> None:
        """Ends it with its program."""
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, timeout=60, check=False)

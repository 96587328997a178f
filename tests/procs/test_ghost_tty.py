"""Jobs on a terminal: what a person at an interactive bash sees of a job that runs elsewhere."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import termios
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from bpfs.procs import ghost as ghosts
from bpfs.procs.ghost import Ghost, Signal
from bpfs.slave.relay import Relay, open_relay
from tests.procs.ghost_rig import PYTHON, Rig, Terminal, TerminalJob, eventually, external, open_rig

TTY = [external(0, "tty", os.O_RDWR, [0, 1, 2])]
PROMPT = "ready> "


class Desk:
    """An interactive bash on a terminal, in which ghosts are started as its jobs."""

    def __init__(self, rig: Rig, relay: Relay) -> None:
        self.rig, self.relay = rig, relay
        self.terminal = Terminal()
        self.control, number = Ghost.pair()
        self.number = fcntl.fcntl(number.fileno(), fcntl.F_DUPFD, 200)
        number.close()

        def adopt() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        slave = self.terminal.slave
        # No lease: what bash started is no child of ours, and ends with us.
        env = {**os.environ, "BPFS_CONTROL": str(self.number), "BPFS_LEASE": "0", "PS1": PROMPT, "TERM": "dumb"}
        env |= {"HISTFILE": "", "INPUTRC": "/dev/null"}
        self.bash = rig.popen(
            ["bash", "--norc", "--noprofile", "--noediting", "-i"],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=adopt, env=env,
            pass_fds=[self.number],
        )  # fmt: skip
        self.ghost: Ghost
        self.job: TerminalJob

    async def away(
        self,
        args: Sequence[str],
        suffix: str = "",
        controlling: bool = True,
        externals: Sequence[dict[str, Any]] = TTY,
    ) -> None:
        """Has bash start a job that runs elsewhere."""
        await self.terminal.see(PROMPT)
        self.terminal.type(f"{ghosts.EXECUTABLE} job{suffix}\n")
        pid = await eventually(self._ghost_pid, "bash starts the ghost")
        self.ghost = await self.rig.handle(pid, self.control)
        ends = await self.rig.join(self.ghost, self.relay, externals)
        self.job = await self.rig.terminal_job(ends, args, controlling)
        self.rig.nursery.start_soon(self.rig.play_master, self.ghost, self.job)

    def _ghost_pid(self) -> int:
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat") as file:
                    text = file.read()
            except OSError:
                continue
            if "(ghost)" in text and int(text.rpartition(")")[2].split()[1]) == self.bash.pid:
                return int(name)
        return 0

    async def status(self) -> str:
        """$? of the last command, as bash prints it."""
        self.terminal.type("echo status=$?=\n")
        await self.terminal.see("status=$?=")
        await self.terminal.see("\nstatus=")
        await self.terminal.see(PROMPT)
        return self.terminal.text[self.terminal.mark :].split("\nstatus=")[1].split("=")[0]


@asynccontextmanager
async def desk() -> AsyncIterator[Desk]:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        it = Desk(rig, relay)
        try:
            yield it
        finally:
            os.close(it.number)
            if it.bash.poll() is None:
                it.bash.kill()
            it.terminal.close()


async def test_lines_are_typed_echoed_and_ended_by_control_d() -> None:
    async with desk() as at:
        await at.away(["sh", "-c", "while read line; do echo got:$line:; done; exit 4"])
        at.terminal.type("one\n")
        await at.terminal.see("one\r\ngot:one:\r\n")  # echoed once, by the real terminal
        at.terminal.type("two x\x7fy\nthree\n")  # edited by it, too
        await at.terminal.see("got:two y:\r\ngot:three:\r\n")
        at.terminal.type("\x04")
        await at.terminal.see(PROMPT)
        assert await at.status() == "4"


async def test_control_c() -> None:
    async with desk() as at:
        await at.away(["sleep", "1000"])
        await eventually(lambda: os.path.exists(f"/proc/{at.job.pid}/exe") and exe(at.job.pid) == "sleep", "sleep runs")
        at.terminal.type("\x03")
        await at.terminal.see("^C")
        await at.terminal.see(PROMPT)
        assert await at.status() == "130"
        assert not at.rig.events(at.ghost, Signal)  # it went to the foreground group over there


async def test_control_c_reaches_what_the_job_started() -> None:
    async with desk() as at:
        await at.away(["sh", "-c", "trap 'echo shell-got-it' INT; echo sleeping; sleep 1000; echo on; read x"])
        await at.terminal.see("sleeping\r\n")
        await eventually(lambda: b"(sleep)" in children(at.job.pid), "sleep runs")
        at.terminal.type("\x03")
        await at.terminal.see("shell-got-it\r\non\r\n")
        at.terminal.type("\n")
        await at.terminal.see(PROMPT)


async def test_control_c_without_a_controlling_terminal_over_there() -> None:
    async with desk() as at:
        await at.away(["sleep", "1000"], controlling=False)
        await eventually(lambda: exe(at.job.pid) == "sleep", "sleep runs")
        at.terminal.type("\x03")
        await at.terminal.see(PROMPT)
        assert await at.status() == "130"


async def test_stop_list_background_foreground() -> None:
    async with desk() as at:
        await at.away(["sh", "-c", "echo begun; read line; echo got:$line:; exit 6"])
        await at.terminal.see("begun")
        at.terminal.type("\x1a")
        await at.terminal.see("Stopped")
        await at.terminal.see(PROMPT)
        assert at.ghost.state() == "T"
        at.terminal.type("jobs\n")
        await at.terminal.see("ghost job")
        await at.terminal.see(PROMPT)
        at.terminal.type("fg\n")
        await at.terminal.see("ghost job\r\n")
        at.terminal.type("hello\n")
        await at.terminal.see("got:hello:")
        await at.terminal.see(PROMPT)
        assert await at.status() == "6"


async def test_a_background_reader_is_stopped_and_reads_in_the_foreground() -> None:
    async with desk() as at:
        await at.away(["sh", "-c", "read line; echo got:$line:; exit 2"], suffix=" &")
        await at.terminal.see(PROMPT)
        await eventually(lambda: at.ghost.state() == "T", "SIGTTIN stops it")
        at.terminal.type("jobs\n")
        await at.terminal.see("Stopped")
        await at.terminal.see(PROMPT)
        at.terminal.type("fg\n")
        await at.terminal.see("job\r\n")
        at.terminal.type("hello\n")
        await at.terminal.see("got:hello:")
        await at.terminal.see(PROMPT)
        assert await at.status() == "2"


async def test_what_the_job_does_not_read_is_left_for_the_shell() -> None:
    async with desk() as at:
        await at.away(["sh", "-c", "echo begun; read first; while [ ! -e /proc/self/nothing ]; do sleep 1000; done"])
        await at.terminal.see("begun")
        at.terminal.type("for-the-job\necho for-the-$((1+1))-shell\n")
        await at.terminal.see("shell\r\n")
        await eventually(lambda: b"sleep" in children(at.job.pid), "the job has read its line")
        os.kill(at.job.pid, signal.SIGTERM)
        await at.terminal.see("for-the-2-shell")


async def test_settings_of_the_job_become_the_terminals_and_stay() -> None:
    async with desk() as at:
        await at.away(["sh", "-c", "stty -echo; echo hidden; read secret; stty echo; echo got:$secret:; stty quit ^X"])
        await at.terminal.see("hidden")
        assert not at.terminal.modes() & termios.ECHO
        at.terminal.type("password\n")
        await at.terminal.see("got:password:")
        assert "password\r\n" not in at.terminal.text[at.terminal.mark :].replace("got:password:\r\n", "")
        await at.terminal.see(PROMPT)
        assert termios.tcgetattr(at.terminal.slave)[6][termios.VQUIT] == b"\x18"
        assert at.terminal.modes() & termios.ECHO


KEYS = """
import os, select, termios, tty
old = termios.tcgetattr(0)
tty.setraw(0)
os.write(1, b"raw\\r\\n")
seen = b""
while not seen.endswith(b"q"):
    select.select([0], [], [])
    seen += os.read(0, 1)
termios.tcsetattr(0, termios.TCSADRAIN, old)
os.write(1, b"keys " + repr(seen).encode() + b"\\n")
"""


async def test_single_keys_in_raw_mode() -> None:
    async with desk() as at:
        await at.away([*PYTHON, KEYS])
        await at.terminal.see("raw\r\n")
        at.terminal.type("ab\x03\x1a\rq")
        await at.terminal.see("keys b'ab\\x03\\x1a\\rq'\r\n")
        await at.terminal.see(PROMPT)
        assert at.terminal.modes() & termios.ICANON


FOUR = """
import os, termios, tty
old = termios.tcgetattr(0)
tty.setcbreak(0)
new = termios.tcgetattr(0)
new[6][termios.VMIN] = 4
termios.tcsetattr(0, termios.TCSANOW, new)
os.write(1, b"begun\\n")
seen = os.read(0, 9)
termios.tcsetattr(0, termios.TCSANOW, old)
os.write(1, b"four " + repr(seen).encode() + b"\\n")
"""


async def test_a_reader_that_waits_for_several_keys() -> None:
    async with desk() as at:
        await at.away([*PYTHON, FOUR])
        await at.terminal.see("begun")
        for key in "abcd":
            at.terminal.type(key)
        await at.terminal.see("four b'abcd'")
        await at.terminal.see(PROMPT)


async def test_terminal_in_pipe_out() -> None:
    async with desk() as at:
        externals = [external(0, "tty", os.O_RDWR, [0, 2]), external(1, "pipe", os.O_WRONLY)]
        await at.away(["sh", "-c", "read x; echo $x; echo $x >&2; exit 3"], " | sed s/^/piped-/", externals=externals)
        at.terminal.type("words\n")
        await at.terminal.see("piped-words\r\n")
        await at.terminal.see("\r\nwords\r\n")
        await at.terminal.see(PROMPT)
        at.terminal.type("echo ${PIPESTATUS[*]}=\n")
        await at.terminal.see("3 0=")


LATE = """
import os, select, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.write(1, b"begun\\n")
select.select([0], [], [])
os.write(1, b"selected\\n")
signal.sigwait([signal.SIGUSR1])
os.write(1, b"got " + os.read(0, 100))
"""


async def test_unread_keys_survive_hold_and_resume() -> None:
    async with desk() as at:
        await at.away([*PYTHON, LATE])
        await at.terminal.see("begun")
        at.terminal.type("a line\n")
        await at.terminal.see("selected")
        held = await at.ghost.hold()
        assert held.kept == 2 + len("a line\n")
        await at.ghost.resume()
        at.job.send_signal(signal.SIGUSR1)
        await at.terminal.see("got a line\r\n")
        await at.terminal.see(PROMPT)


async def test_unread_keys_go_back_to_the_terminal_on_the_way_home() -> None:
    async with desk() as at:
        await at.away([*PYTHON, LATE])
        await at.terminal.see("begun")
        at.terminal.type("echo back\n")
        await at.terminal.see("selected")
        assert (await at.ghost.hold(home=True)).kept == 0
        await at.ghost.killed(signal.SIGTERM)
        await at.terminal.see("Terminated")
        await at.terminal.see("back\r\n" + PROMPT)


async def test_window_size() -> None:
    async with desk() as at:
        resize(at.terminal, 33, 99)
        await at.away(["sh", "-c", "trap 'stty size' WINCH; stty size; while :; do read x && echo $x; done"])
        await at.terminal.see("33 99\r\n")
        resize(at.terminal, 44, 111)
        await at.terminal.see("44 111\r\n")
        at.terminal.type("\x03")
        await at.terminal.see(PROMPT)


async def test_output_settings_are_applied_once() -> None:
    async with desk() as at:
        await at.away(["sh", "-c", r"printf 'a\nb\r\nc\rd\n'; stty -onlcr; printf 'e\nf\n\r'; stty onlcr; echo g"])
        await at.terminal.see("g\r\n")
        assert "a\r\nb\r\r\nc\rd\r\ne\nf\n\rg\r\n" in at.terminal.text


async def test_terminal_hangs_up() -> None:
    async with desk() as at:
        await at.away(["sh", "-c", "echo begun; cat; exit 0"])
        await at.terminal.see("begun")
        at.terminal.close()
        await eventually(lambda: at.job.returncode is not None, "the job is hung up")


@pytest.mark.slow
async def test_much_output() -> None:
    async with desk() as at:
        await at.away(["seq", "-f", "line %06.0f", "30000"])
        await at.terminal.see("line 030000\r\n")
        await at.terminal.see(PROMPT)
        lines = [f"line {n:06d}" for n in range(1, 30001)]
        assert "\r\n".join(lines) in at.terminal.text


def exe(pid: int) -> str:
    return os.path.basename(os.readlink(f"/proc/{pid}/exe"))


def children(pid: int) -> bytes:
    found = b""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                text = file.read()
        except OSError:
            continue
        if int(text.rpartition(b")")[2].split()[1]) == pid:
            found += text
    return found


def resize(terminal: Terminal, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

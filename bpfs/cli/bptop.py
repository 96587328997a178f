# SPDX-License-Identifier: GPL-2.0-or-later
"""bptop: a live view of the processes of all nodes.

It is drawn with curses, which comes with Python and starts at once: the well-kept toolkits take longer to be imported
than all else that happens here until the first screen, and more memory.
"""

from __future__ import annotations

import argparse
import curses
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from errno import ENOTTY

from bpfs.cli.bptopdata import Row, Sampler, View, Watcher
from bpfs.cli.common import make_parser, run
from bpfs.client import MASTER, Cluster
from bpfs.errors import BpfsError

PROG = "bptop"

_EPILOG = """\
Keys: q quit; arrows, PgUp, PgDn choose a process; k kills it, m moves it to another node; sort by P processor,
M memory, T time, N node, I pid, U user; R the other way round; a: processes of the master as well; space: look now;
h: these keys.
Exit code: 0; 1 when there is no cluster.
"""
_HELP = "q quit  k kill  m move  sort: P cpu M memory T time N node I pid U user, R reverse  a master's too  space now"

_TICK_MS = 100  # between looks at the keyboard, and for news
_ESCAPE, _ENTER, _ERASE = 27, (10, 13, curses.KEY_ENTER), (8, 127, curses.KEY_BACKSPACE)

_ORDERS: dict[str, tuple[str, Callable[[Row], object], bool]] = {
    "P": ("%CPU", lambda row: row.percent, True),
    "M": ("RES", lambda row: row.kilobytes, True),
    "T": ("TIME+", lambda row: row.seconds, True),
    "N": ("NODE", lambda row: MASTER - 1 if row.node is None else row.node, False),
    "I": ("PID", lambda row: row.pid, False),
    "U": ("USER", lambda row: row.user, False),
}
"""Sort orders: the key, its column, what counts, whether the largest comes first."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, "Shows the processes of all nodes, live.", _EPILOG)
    parser.add_argument("-d", "--delay", metavar="SECONDS", type=_seconds, default=2.0, help="between two looks (2)")
    parser.add_argument("-a", "--all", action="store_true", help="processes of the master as well")
    parser.add_argument("-o", "--sort", metavar="KEY", choices=list(_ORDERS), default="P", help="P M T N I or U")
    parser.add_argument("-b", "--batch", action="store_true", help="print, for programs and files")
    parser.add_argument("-n", "--count", metavar="N", type=int, default=0, help="so many looks, then end")
    parser.add_argument("--nodes", metavar="NODES", help="only what is on these nodes")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError("between 0.1 and 86400 seconds")
    return value


def _main(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    cluster = Cluster(options.mount)
    nodes = frozenset(cluster.expand(options.nodes)) if options.nodes else None
    sampler = Sampler(cluster, everything=options.all, nodes=nodes)
    if options.batch:
        return _print(sampler, options)
    _expect_terminal()
    # A signal ends us by an exception, so that the terminal is as it was before.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    curses.wrapper(
        lambda window: Screen(window, cluster, Watcher(sampler, options.delay), options.sort).run(options.count)
    )
    return 0


def _expect_terminal() -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise BpfsError(ENOTTY, "standard input and output are no terminal (-b prints for programs and files)")
    try:
        curses.setupterm()
    except curses.error:
        name = os.environ.get("TERM", "")
        raise BpfsError(ENOTTY, f"the terminal {name!r} is unknown here (-b prints for programs and files)") from None


def _print(sampler: Sampler, options: argparse.Namespace) -> int:
    sampler.look()  # what is used can only be told against an earlier look
    done = 0
    while not options.count or done < options.count:
        time.sleep(options.delay if done else min(options.delay, 0.5))
        view = sampler.look()
        rows = ordered(view.rows, options.sort)
        print("\n".join([summary(view), loads(view), header(), *map(line, rows)]), end="\n\n", flush=True)
        done += 1
    return 0


def ordered(rows: Sequence[Row], order: str, backwards: bool = False) -> list[Row]:
    """Returns the rows in an order of `_ORDERS`; what is alike by pid."""
    _, key, largest = _ORDERS[order]
    by_pid = sorted(rows, key=lambda row: row.pid)
    return sorted(by_pid, key=key, reverse=largest != backwards)  # type: ignore[arg-type]


def summary(view: View) -> str:
    """The first line."""
    if view.trouble:
        return f"{PROG} - {view.trouble}"
    count: dict[str, int] = {}
    for row in view.rows:
        count[row.state] = count.get(row.state, 0) + 1
    states = ", ".join(f"{number} {letter}" for letter, number in sorted(count.items()))
    clock = time.strftime("%H:%M:%S", time.localtime(view.when))
    return f"{PROG} - {clock}  nodes: {view.up} of {view.nodes} up  processes: {len(view.rows)}" + (
        f" ({states})" if states else ""
    )


def loads(view: View) -> str:
    """The second line."""
    return "load:  " + "  ".join(f"{number}: {load}" for number, load in view.loads)


def header(order: str = "") -> str:
    """The names of the columns, that of the order between > and <."""
    text = f"{'PID':>8} {'USER':<9} {'NODE':>5} S {'%CPU':>6} {'RES':>7} {'TIME+':>9} {'THR':>4} COMMAND"
    name = _ORDERS[order][0] if order else ""
    return text.replace(f" {name} ", f">{name}<", 1) if name else text


def line(row: Row) -> str:
    """A process."""
    node = "..." if row.node is None else "-" if row.node == MASTER else str(row.node)
    minutes, seconds = divmod(row.seconds, 60)
    return (
        f"{row.pid:>8} {row.user:<9.9} {node:>5} {row.state} {row.percent:>6.1f} {memory(row.kilobytes):>7} "
        f"{f'{minutes:.0f}:{seconds:05.2f}':>9} {row.threads:>4} {printable(row.command)}"
    )


def printable(text: str) -> str:
    """Without what would move the cursor."""
    return "".join(char if char.isprintable() else "?" for char in text)


def memory(kilobytes: int) -> str:
    """As top has it: kB, or with a unit from 10 MB on."""
    return str(kilobytes) if kilobytes < 10240 else f"{kilobytes / 1024:.0f}m" if kilobytes < 10 << 20 else (
        f"{kilobytes / (1 << 20):.1f}g"
    )  # fmt: skip


class Screen:
    """The terminal: what is shown, and what keys do."""

    def __init__(self, window: curses.window, cluster: Cluster, watcher: Watcher, order: str) -> None:
        self._window = window
        self._cluster = cluster
        self._watcher = watcher
        self._order = order
        self._backwards = False
        self._chosen = 0  # a pid: a process keeps the bar when others come and go
        self._rows: list[Row] = []
        self._first = 0
        self._message = ""

    def run(self, count: int) -> None:
        """Until q, or until there have been `count` looks."""
        curses.curs_set(0)
        self._window.timeout(_TICK_MS)
        shown: View | None = None
        looks = 0
        while True:
            view = self._watcher.view
            if view is not shown and (view.rows or view.nodes or view.trouble):
                looks += 1
                if count and looks > count:
                    return
            shown = view
            self._draw(view)
            try:
                key = self._window.getch()
            except KeyboardInterrupt:
                return
            if key == ord("q"):
                return
            if key >= 0:
                self._press(key)

    # -- drawing -----------------------------------------------------------------------------------------------

    def _draw(self, view: View) -> None:
        self._rows = ordered(view.rows, self._order, self._backwards)
        height, _ = self._window.getmaxyx()
        room = max(1, height - 4)
        at = self._place()
        self._first = max(0, min(self._first, at, len(self._rows) - room), at - room + 1)
        self._window.erase()
        self._put(0, summary(view), curses.A_BOLD)
        self._put(1, loads(view))
        self._put(2, self._message, curses.A_BOLD)
        self._put(3, header(self._order), curses.A_REVERSE)
        for number, row in enumerate(self._rows[self._first : self._first + room]):
            self._put(4 + number, line(row), curses.A_STANDOUT if self._first + number == at else 0)
        self._window.refresh()

    def _put(self, y: int, text: str, style: int = 0) -> None:
        height, width = self._window.getmaxyx()
        if y < height:
            text = text.ljust(width) if style & (curses.A_REVERSE | curses.A_STANDOUT) else text
            # The last cell of the screen cannot be written: the cursor has no place behind it.
            self._window.addnstr(y, 0, text, width - (y == height - 1), style)

    def _place(self) -> int:
        """Where the chosen process is now; the first takes the place of one that has gone."""
        for number, row in enumerate(self._rows):
            if row.pid == self._chosen:
                return number
        self._chosen = 0
        return 0

    def _row(self) -> Row | None:
        return self._rows[self._place()] if self._rows else None

    # -- keys --------------------------------------------------------------------------------------------------

    def _press(self, key: int) -> None:
        height, _ = self._window.getmaxyx()
        steps = {curses.KEY_UP: -1, curses.KEY_DOWN: 1, curses.KEY_PPAGE: 4 - height, curses.KEY_NPAGE: height - 4}
        letter = chr(key) if key < 128 else ""
        self._message = ""
        if key in steps and self._rows:
            at = max(0, min(len(self._rows) - 1, self._place() + steps[key]))
            self._chosen = self._rows[at].pid
        elif letter in _ORDERS and letter:
            self._order, self._backwards = letter, False
        elif letter == "R":
            self._backwards = not self._backwards
        elif letter == "a":
            self._watcher.sampler.everything ^= True
            self._watcher.hurry()
        elif letter == " ":
            self._watcher.hurry()
        elif letter in ("h", "?"):
            self._message = _HELP
        elif letter == "k":
            self._act("signal", "TERM", self._kill)
        elif letter == "m":
            self._act("node", "", self._move)

    def _act(self, what: str, default: str, act: Callable[[Row, str], str]) -> None:
        row = self._row()
        if row is None:
            return
        # Chosen by hand now: the process that is asked about is the one that is meant, whoever comes and goes.
        self._chosen = row.pid
        given = f" [{default}]" if default else ""
        answer = self._ask(f"{what} for {row.pid} {printable(row.command)[:30]}{given}: ")
        if answer is None or not (answer or default):
            return
        self._message = f"{row.pid} ..."
        self._put(2, self._message.ljust(80), curses.A_BOLD)
        self._window.refresh()
        try:
            self._message = act(row, answer or default)
        except OSError as error:
            self._message = str(error)
        self._watcher.hurry()

    def _kill(self, row: Row, name: str) -> str:
        self._cluster.procs[row.pid].write("signal", name)
        return f"{row.pid}: signal {name} sent"

    def _move(self, row: Row, spec: str) -> str:
        (node, *more) = self._cluster.expand(spec)
        if more:
            return f"'{spec}' are several nodes"
        self._cluster.nodes[node].migrate(row.pid)
        return f"{row.pid} is on {'the master' if node == MASTER else f'node {node}'} now"

    def _ask(self, question: str) -> str | None:
        """What is typed up to Enter; None after Escape."""
        text = ""
        curses.curs_set(1)
        try:
            while True:
                self._window.move(2, 0)
                self._window.clrtoeol()
                self._put(2, question + text, curses.A_BOLD)
                key = self._window.getch()
                if key in _ENTER:
                    return text.strip()
                if key in (_ESCAPE, 3):
                    return None
                if key in _ERASE:
                    text = text[:-1]
                elif 32 <= key < 127:
                    text += chr(key)
        except KeyboardInterrupt:
            return None
        finally:
            curses.curs_set(0)


if __name__ == "__main__":
    sys.exit(main())

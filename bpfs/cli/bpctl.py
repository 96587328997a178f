# SPDX-License-Identifier: GPL-2.0-or-later
"""bpctl: changes states, owners and modes of nodes, with BProc's options.

Every action is a write to a file of the node below /bpfs: see bpctl(8) for the same with echo.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from errno import EINVAL
from typing import Any

from bpfs.cli.common import EXIT_ERROR, make_parser, run
from bpfs.client import MASTER, Cluster, Node

PROG = "bpctl"

_EPILOG = """\
Actions are done in the order given, each on the nodes of the -S or -M before it (or else of the first one).
What a node refuses is said on stderr, and the others are done. Exit code: 0, 1 when anything was refused, 2 for a
command line that makes no sense.
"""


class _Append(argparse.Action):
    """Keeps the order of options of different kinds: a list of (kind, value)."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option_string: object = None
    ) -> None:
        value = self.const if self.nargs == 0 else values
        namespace.steps = [*(namespace.steps or []), (self.kind, value)]

    @property
    def kind(self) -> str:
        """The file that the option writes; "nodes" for a selection."""
        return {"select": "nodes", "mode": "mode", "user": "owner", "group": "group", "cache": "cache"}.get(
            self.dest, "state"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(PROG, _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, "Changes states, owners and modes of nodes.", _EPILOG)
    parser.set_defaults(steps=[])

    def option(group: Any, *letters: str, dest: str, **rest: Any) -> None:
        group.add_argument(*letters, dest=dest, action=_Append, default=argparse.SUPPRESS, **rest)

    nodes = parser.add_argument_group("which nodes")
    option(nodes, "-S", "--slave", dest="select", metavar="NODES", help="the nodes of this nodespec")
    option(nodes, "-M", "--master", dest="select", nargs=0, const="master", help="the master")
    state = parser.add_argument_group("state")
    option(state, "-s", "--state", dest="state", metavar="STATE", help="up, down, unavailable, error, ...")
    option(state, "-R", "--reboot", dest="state", nargs=0, const="reboot", help="start the nodes again")
    option(state, "-H", "--halt", dest="state", nargs=0, const="halt", help="halt the nodes")
    option(state, "-P", "--pwroff", dest="state", nargs=0, const="pwroff", help="power the nodes off")
    access = parser.add_argument_group("who may use the nodes")
    option(access, "-m", "--mode", dest="mode", metavar="MODE", type=_mode, help="the x bits in octal, e.g. 110")
    option(access, "-u", "--user", dest="user", metavar="USER", help="the owner, by name or number")
    option(access, "-g", "--group", dest="group", metavar="GROUP", help="the group, by name or number")
    other = parser.add_argument_group("other")
    option(
        other, "--cache-purge", dest="cache", nargs=0, const="purge",
        help="have the nodes drop what they keep of the master's files",
    )  # fmt: skip
    other.add_argument("-r", "--chroot", dest="chroot", metavar="DIR", help="not supported: always an error")
    other.add_argument("-f", dest="ignored", action="store_true", help="ignored, for old scripts")
    other.add_argument("--json", action="store_true", help="print what was done, for programs")
    return parser


# What EINVAL says, by file.
_MEANING = {
    "state": "no state, or none that it can be told to be in now",
    "owner": "there is no such user",
    "group": "there is no such group",
}


def _mode(text: str) -> str:
    if not text or set(text) - set("01234567"):
        raise argparse.ArgumentTypeError(f"'{text}' is not an octal mode such as 111")
    if int(text, 8) & ~0o111:
        raise argparse.ArgumentTypeError(f"'{text}' has other bits than the x bits, 111")
    return text


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.chroot is not None:
        # BProc's slave could be sent into another root; here a node's root belongs to its image.
        print(f"{PROG}: nodes cannot change their root directory", file=sys.stderr)
        return EXIT_ERROR
    steps: list[tuple[str, str]] = options.steps
    selections = [value for kind, value in steps if kind == "nodes"]
    if not selections:
        parser.error("no nodes given: -S NODES or -M")
    if len(selections) == len(steps):
        parser.error("nothing to do given: see --help")
    cluster = Cluster(options.mount)
    # All nodespecs are looked at before anything is changed.
    wanted = {spec: cluster.expand(spec) for spec in selections}
    current = wanted[selections[0]]
    done: list[dict[str, object]] = []
    for kind, value in steps:
        if kind == "nodes":
            current = wanted[value]
        else:
            done += apply_to_all([Node(cluster, number) for number in current], kind, value)
    if options.json:
        print(json.dumps(done))
    return EXIT_ERROR if any(entry["error"] for entry in done) else 0


AT_ONCE = 64  # nodes: a state takes one that hangs ten seconds and more, and the others are not to wait for that


def apply_to_all(nodes: list[Node], name: str, value: str) -> list[dict[str, object]]:
    """`apply` to many, states to many at once; what was refused is said in the order of the nodes."""
    if name != "state" or len(nodes) < 2:
        return [apply(node, name, value) for node in nodes]
    from concurrent.futures import ThreadPoolExecutor  # most calls do without

    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            return [_told(done) for done in pool.map(lambda node: _write(node, name, value), nodes)]
        except KeyboardInterrupt:  # the threads wait for nodes still, and would be waited for
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
            raise


def apply(node: Node, name: str, value: str, prog: str = PROG) -> dict[str, object]:
    """Writes one value to one file of a node, and says on stderr when that was refused."""
    return _told(_write(node, name, value), prog)


def _write(node: Node, name: str, value: str) -> dict[str, object]:
    error = ""
    try:
        node.write(name, value)
    except OSError as refused:
        error = str(refused)
        if refused.errno == EINVAL and name in _MEANING:
            error += f" ({_MEANING[name]})"
    return {"node": node.number, "file": name, "value": value, "error": error}


def _told(done: dict[str, object], prog: str = PROG) -> dict[str, object]:
    if done["error"]:
        print(f"{prog}: {'master' if done['node'] == MASTER else done['node']}: {done['error']}", file=sys.stderr)
    return done


if __name__ == "__main__":
    sys.exit(main())

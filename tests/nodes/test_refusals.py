"""Slaves that do not get in, as the real programs tell it: the reason on both sides."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from tests.nodes.simslave import KEY, SimulatedSlave, master

pytestmark = pytest.mark.slow

TOP = Path(__file__).parents[2]

RUN = "from bpfs.cli.bpslave import main; sys.exit(main(sys.argv[1:]))"
OTHER_VERSION = f"import sys, bpfs.wire.messages as m; m.VERSION = 99; {RUN}"

# What the slave is started under, its program, node number and key; what the slave says; what the master says.
CASES = {
    "two with one number": ([], f"import sys; {RUN}", "0", KEY, "refused: node 0 is connected already, from 127.0.0.1",
                            "refused: node 0 is connected already, from 127.0.0.1"),
    "a full master": ([], f"import sys; {RUN}", None, KEY, "refused: all 1 node numbers are taken",
                      "refused: all 1 node numbers are taken"),
    "another version": ([], OTHER_VERSION, None, KEY, "refused: the master speaks version",
                        "speaks version 99 of the protocol"),
    "another key": ([], f"import sys; {RUN}", None, b"quite another key, long enough",
                    "does not know the cluster key", "it has another cluster key"),
    "another architecture": (["setarch", "i686"], f"import sys; {RUN}", None, KEY,
                             "refused: its machine is 'i686', the master's is x86_64", "its machine is 'i686'"),
}  # fmt: skip


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """A slave that is about to be refused, again and again."""
    return subprocess.Popen(command, cwd=TOP, stdin=subprocess.DEVNULL)


def end(slave: subprocess.Popen[bytes]) -> None:
    """Ends it."""
    slave.terminate()
    slave.wait()


async def test_who_does_not_get_in_is_told_why_and_so_is_the_master(
    nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with master(nodes=1) as it:
        nursery.start_soon(SimulatedSlave(it.port, number=0).run)
        await it.wait_state(0, "up")
        with ExitStack() as stack:
            for name, (under, program, number, key, _, _) in CASES.items():
                folder = tmp_path / name.replace(" ", "-")
                folder.mkdir()
                (folder / "key").touch(0o600)
                (folder / "key").write_bytes(key)
                command = [*under, sys.executable, "-c", program, f"127.0.0.1:{it.port}", "--key", str(folder / "key")]
                command += ["--number", number] if number else []
                command += ["--no-mount", "--foreground", "--log", str(folder / "log")]
                stack.callback(end, start(command))

            def missing() -> list[str]:
                told = "\n".join(record.getMessage() for record in caplog.records)
                found = []
                for name, (*_, theirs, ours) in CASES.items():
                    log = tmp_path / name.replace(" ", "-") / "log"
                    if not log.exists() or theirs not in log.read_text():
                        found.append(f"the slave of {name!r} does not say {theirs!r}")
                    if ours not in told:
                        found.append(f"the master does not say {ours!r}")
                return found

            with trio.move_on_after(60):
                while missing():
                    await trio.sleep(0.02)
            assert missing() == []
        assert it.state(0) == "up" and it.cluster.nodes.numbers == [-1, 0]
        assert it.cluster.logs.text(0).count("was refused: node 0 is connected already") == 1
        nursery.cancel_scope.cancel()

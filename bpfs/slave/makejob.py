"""Jobs that are made of an image which many share: all that one takes on this node, in one request of the master's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from errno import EOPNOTSUPP
from typing import Any

import trio

from bpfs.engines import WorkerChannel, Workers, pack_call, unpack_reply
from bpfs.errors import BpfsError
from bpfs.slave.enginehost import EngineHost, HeldFds
from bpfs.slave.images import Images
from bpfs.slave.jobs import Jobs
from bpfs.slave.relay import Ends
from bpfs.slave.stdio import StdioHost, name_ends
from bpfs.wire.messages import JobMade, MakeJob
from engine.bearing import Bearing
from engine.execorder import NULL

BORN = 5.0  # seconds: it takes half a millisecond, or as long as other births here
BUSY = 0.0005  # seconds between attempts while there is another birth
EXPECTED = 1.0  # seconds for which jobwatch surely watches for a job that it was told of (IDLE_MS of jobwatch.c)


class JobMaker:
    """Serves MakeJob."""

    def __init__(
        self, jobs: Jobs, stdio: StdioHost, engines: EngineHost, workers: Workers, held: HeldFds, images: Images
    ) -> None:
        self._jobs = jobs
        self._space = jobs.space
        self._stdio = stdio
        self._engines = engines
        self._workers = workers
        self._held = held
        self._images = images

    async def make(self, message: MakeJob) -> JobMade:
        """Handler: make a job's ends, join them to its ghost, and have the process born, or built by a worker."""
        self._engines.expect_jobs()
        began = trio.current_time()
        image = message.image or await self._images.take(message.name)
        ends = await self._stdio.join(message)
        try:
            if message.keys is not None:
                return await self._bear(message, message.keys, image, ends)
            return await self._build(message, image, ends)
        except BaseException:
            await self._stdio.drop(message.stream)
            raise
        finally:
            ends.close()
            if trio.current_time() - began > EXPECTED:
                self._engines.expect_jobs()

    async def _bear(self, message: MakeJob, keys: tuple[int, ...], order: bytes, ends: Ends) -> JobMade:
        ids = (message.pid, message.ppid, message.pgid, message.sid)
        try:
            table = _patch(order, message.patches)
            self._jobs.ordered.add(message.pid)
            with _descriptors(keys, ends) as fds:
                bearing = await self._begin(ids, message.uid, table, fds)
            with trio.CancelScope(shield=True), trio.move_on_after(BORN):
                await trio.lowlevel.wait_readable(bearing.status)
            trio.lowlevel.notify_closing(bearing.status)
            return JobMade(self._space.settle(bearing), (), (), name_ends(ends))
        except (OSError, KeyError) as error:
            raise BpfsError(EOPNOTSUPP, f"it cannot be born here: {error}") from None

    async def _begin(self, ids: tuple[int, int, int, int], uid: int, table: bytes, fds: list[int]) -> Bearing:
        end = trio.current_time() + BORN
        while True:
            try:
                return self._space.bear(ids, uid, table, fds)
            except BlockingIOError:
                if trio.current_time() > end:
                    raise
            await trio.sleep(BUSY)

    async def _build(self, message: MakeJob, image: bytes, ends: Ends) -> JobMade:
        named = name_ends(ends)
        body = pack_call(
            "make",
            {
                "place": {"init": self._space.init, "strict": message.strict}, "pid": message.pid, "ppid": message.ppid,
                "pgid": message.pgid, "sid": message.sid, "front": message.front != 0,
                "terminal": (message.session and ends.terminal) or "", "image": image,
                "patches": message.patches, "random": message.random,
                "externals": {key: index for index, key in enumerate(ends.job)},
            },
        )  # fmt: skip
        channel = WorkerChannel(self._workers.open_socket(comes_back=True))
        fds: list[int] = []
        try:
            answer, fds = await channel.exchange(body, list(ends.job.values()))
            reply = unpack_reply(answer)
            files = tuple(int(number) for number in reply["files"])
        except BaseException:
            channel.close()
            for fd in fds:
                os.close(fd)
            raise
        self._workers.give_back(channel.detach())
        return JobMade(int(reply["hostpid"]), files, tuple(self._held.hold(fd) for fd in fds), named)


@contextmanager
def _descriptors(keys: Sequence[int], ends: Ends) -> Iterator[list[int]]:
    with ExitStack() as stack:

        def null(access: int) -> int:
            fd = os.open("/dev/null", access | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return fd

        yield [ends.job[key] if key > NULL else null(NULL - key) for key in keys]


def _patch(content: bytes, patches: Sequence[Any]) -> bytes:
    changed = bytearray(content)
    for offset, text in patches:
        if not 0 <= offset <= len(changed) - len(text):
            raise OSError(EOPNOTSUPP, "a change lies outside of it")
        changed[offset : offset + len(text)] = text
    return bytes(changed)

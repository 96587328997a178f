"""Jobs that are made of an image which many share: all that one takes on this node, in one request of the master's."""

from __future__ import annotations

import os

import trio

from bpfs.engines import WorkerChannel, Workers, pack_call, unpack_reply
from bpfs.slave.enginehost import EngineHost, HeldFds
from bpfs.slave.images import Images
from bpfs.slave.relay import Ends
from bpfs.slave.stdio import StdioHost, name_ends
from bpfs.wire.messages import JobMade, MakeJob

EXPECTED = 1.0  # seconds for which jobwatch surely watches for a job that it was told of (IDLE_MS of jobwatch.c)


class JobMaker:
    """Serves MakeJob."""

    def __init__(
        self, init: int, stdio: StdioHost, engines: EngineHost, workers: Workers, held: HeldFds, images: Images
    ) -> None:
        """`init` is the HostPid of the job space's init."""
        self._init = init
        self._stdio = stdio
        self._engines = engines
        self._workers = workers
        self._held = held
        self._images = images

    async def make(self, message: MakeJob) -> JobMade:
        """Handler: make a job's ends, join them to its ghost, and have a worker build the process around them."""
        self._engines.expect_jobs()
        began = trio.current_time()
        image = message.image or await self._images.take(message.name)
        ends = await self._stdio.join(message)
        try:
            return await self._build(message, image, ends)
        except BaseException:
            await self._stdio.drop(message.stream)
            raise
        finally:
            ends.close()
            if trio.current_time() - began > EXPECTED:
                self._engines.expect_jobs()

    async def _build(self, message: MakeJob, image: bytes, ends: Ends) -> JobMade:
        named = name_ends(ends)
        body = pack_call(
            "make",
            {
                "place": {"init": self._init, "strict": message.strict}, "pid": message.pid, "ppid": message.ppid,
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

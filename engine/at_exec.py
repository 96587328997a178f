"""A worker's operations on a process that runs elsewhere from its next exec on: engine/worker.py.

What stands at its exec mostly need not be copied: an order to make that exec (engine/execorder.py) has the same come
about elsewhere. From the moment such an order is told, the process ends with us: who has it may have the program run.
"""

import contextlib
import functools
import os
import signal
import time

from engine import dump, execorder, note
from engine.linux import ptrace
from engine.onexec import Armed, end
from engine.operation import ORDER, Reply
from engine.source import Source, contents_of, question


class AtExec(Source):
    """Those of `Source`, and of a process that is waited for."""

    _armed: Armed | None = None
    _ordered = False  # it ends with us

    def arm(self, request: Reply, fds: list[int]) -> Reply:
        """Seize a process that is to be stopped at its next exec; and `look` at it, but where an `order` is wanted."""
        if self._frozen is not None or self._armed is not None:
            raise OSError(16, f"{ORDER}: a process is held already")
        self._armed = Armed(int(request["pid"]))
        return {} if request.get("order") else self.look(request, fds)

    def wait_exec(self, request: Reply, fds: list[int]) -> Reply:
        """Wait for that exec; the process is frozen and settled then.

        With the arguments of `inspect` that comes next, whose work is done before it comes.

        Returns:
            With `order`, and where there can be one: `order`, table and keys of engine/execorder.py, the paths of its
            `files`, and `process` and `externals` as `inspect` gives them. `stay` comes before any other operation but
            `make_ghost_ready` and `become_ghost` then.
        """
        if self._armed is None:
            raise OSError(22, f"{ORDER}: nothing is armed")
        armed, self._armed = self._armed, None
        self._frozen = armed.wait(self._control)
        self._frozen_at, self._settled = time.monotonic(), True
        if request.get("order"):
            return self._order(request)
        self.afterwards = functools.partial(self._inspect_ahead, request)
        return {}

    def _order(self, request: Reply) -> Reply:
        frozen = self._held()
        seen = self._inspection = dump.inspect(
            frozen, request.get("unlike"), family=True, at_home=True, contents=contents_of(request), bare=True
        )
        order = None
        if not seen.refusals:
            image = self._image = dump.build(seen)
            told = self._told()
            order = execorder.write(frozen, image, seen.externals, told["process"]["cmdline"])
        if order is None:
            self._inspection = self._image = None
            return {}
        ptrace.ptrace(ptrace.SETOPTIONS, frozen.pid, 0, ptrace.O_TRACESYSGOOD | ptrace.O_EXITKILL)
        frozen.options, self._ordered = ptrace.O_EXITKILL, True
        return told | {"order": [order.table, order.keys], "files": execorder.files_of(image)}

    def make_ghost_ready(self, request: Reply, fds: list[int]) -> Reply:
        """Do for `become_ghost` what can be done before. fds, `env`: as there."""
        self._held()
        if self._image is None or len(fds) != 2:
            raise OSError(22, f"{ORDER}: make_ghost_ready wants an ordered process and two descriptors")
        self._make_ghost_ready(self._image, request, fds)
        return {}

    def stay(self, request: Reply, fds: list[int]) -> Reply:
        """The order was of no use: the process moves in another way."""
        frozen = self._held()
        self._take_back()
        self._passed = self._ready = self._inspection = self._image = None
        frozen.options, self._ordered = 0, False
        ptrace.ptrace(ptrace.SETOPTIONS, frozen.pid, 0, ptrace.O_TRACESYSGOOD)
        return {}

    def _inspect_ahead(self, request: Reply) -> None:
        with contextlib.suppress(OSError):  # `inspect` will meet it again, and say so
            seen = self.inspect(request, [])
            if self.afterwards is not None:
                self.afterwards()
            self._seen = (question(request), seen)
        self.afterwards = None

    def end(self, request: Reply, fds: list[int]) -> Reply:
        """End the frozen process: `message` on its standard error, exit with `code`."""
        frozen = self._held()
        self._forget()
        end(frozen, int(request["code"]), bytes(request["message"]))
        note.erase()
        return {}

    def _forget(self) -> None:
        self._ordered = False
        super()._forget()

    def undo(self) -> bool:
        """As of `Source`."""
        if self._ordered:
            os.kill(self._held().pid, signal.SIGKILL)
        armed = self._armed is not None
        return super().undo() or armed

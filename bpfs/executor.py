# SPDX-License-Identifier: GPL-2.0-or-later
"""A `concurrent.futures.Executor` whose workers are Python processes on nodes.

::

    from bpfs.client import Cluster
    from bpfs.executor import NodeExecutor

    with NodeExecutor(Cluster(), "allup") as pool:
        print(list(pool.map(math.factorial, range(20))))

Functions, arguments and results travel by pickle, as with `ProcessPoolExecutor`: functions are found by their module,
so the program's main module needs its `if __name__ == "__main__"`. What a function prints is on stderr. The workers are
started with bpsh(1) at once, and serve until `shutdown`; the others go on when one is lost.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from multiprocessing import spawn
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import IO, Any, NamedTuple, ParamSpec, TypeVar

from bpfs.client import Cluster, bpsh_command

__all__ = ["NodeExecutor", "NodeLost", "RemoteTraceback"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_START = "import sys; sys.path[:0] = [{top!r}]; from bpfs.executor import serve; serve()"
_HELLO = b"bpfs worker\n"
_NOBODY = "all workers have ended"


class NodeLost(BrokenExecutor):
    """The worker that ran the call is gone: its node went down, or it was killed. The call may have begun."""

    def __init__(self, node: int) -> None:
        super().__init__(f"the worker on node {node} has ended in the middle of the call")
        self.node = node


class RemoteTraceback(Exception):
    """Why a call failed on its node, in the words of its traceback; the cause of the exception itself."""


class _Call(NamedTuple):
    future: Future[Any]
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Worker:
    """One Python process on a node."""

    def __init__(self, cluster: Cluster, node: int) -> None:
        start = _START.format(top=str(Path(__file__).resolve().parent.parent))
        self._process = subprocess.Popen(
            [*bpsh_command(node), sys.executable, "-c", start],
            env={**os.environ, "BPFS": str(cluster.mount)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self.usable = self._from.readline() == _HELLO
        if self.usable:
            prepared = spawn.get_preparation_data("bpfs")
            prepared.pop("authkey", None)  # a secret, and good for nothing there
            self.usable = self._send(pickle.dumps(prepared))

    def _send(self, data: bytes) -> bool:
        try:
            self._to.write(len(data).to_bytes(8) + data)
            self._to.flush()
        except OSError:
            return False
        return True

    def call(self, data: bytes) -> tuple[bool, Any] | None:
        """Returns whether the call succeeded and what came of it; None where the worker is gone."""
        answer = _receive(self._from) if self._send(data) else None
        if answer is None:
            self.usable = False
            return None
        good, result, words = pickle.loads(answer)
        if not good:
            result.__cause__ = RemoteTraceback(words)
        return good, result

    def close(self) -> None:
        """The end of its input ends it."""
        try:
            self._to.close()
        except OSError:
            pass  # what could not be sent is of no use to a worker that is gone
        self._from.close()
        self._process.wait()


class NodeExecutor(Executor):
    """Runs calls on nodes, each worker one at a time; who is free takes the next.

    Args:
        cluster: whose nodes.
        nodes: a nodespec; a node that is named twice has two workers.

    Raises:
        NodespecError: the sentence says which term is wrong.
        ValueError: it names no node.
    """

    def __init__(self, cluster: Cluster, nodes: str = "allup") -> None:
        places = cluster.expand(nodes)
        if not places:
            raise ValueError(f"{nodes!r} names no node")
        self._cluster = cluster
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._lock = Lock()
        self._closed = False
        self._living = len(places)
        self._threads = [Thread(target=self._serve, args=(node,), name=f"node {node}", daemon=True) for node in places]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Has a call made on some node.

        Raises:
            RuntimeError: after `shutdown`.
            BrokenExecutor: all workers have ended.
        """
        future: Future[_T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if not self._living:
                raise BrokenExecutor(_NOBODY)
            self._calls.put(_Call(future, fn, args, kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more calls; returns when all are done, unless told not to wait."""
        with self._lock:
            for call in self._take_all() if cancel_futures else ():
                call.future.cancel()
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._calls.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _take_all(self) -> list[_Call]:
        # The marks of the end stay in the queue.
        found: list[_Call | None] = []
        try:
            while True:
                found.append(self._calls.get_nowait())
        except Empty:
            for _ in range(found.count(None)):
                self._calls.put(None)
            return [call for call in found if call is not None]

    def _serve(self, node: int) -> None:
        try:
            worker = _Worker(self._cluster, node)
            try:
                while worker.usable and (call := self._calls.get()) is not None:
                    if call.future.set_running_or_notify_cancel():
                        _make(call, worker, node)
            finally:
                worker.close()
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._living -= 1
            left = [] if self._living else self._take_all()
        for call in left:
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(BrokenExecutor(_NOBODY))


def _make(call: _Call, worker: _Worker, node: int) -> None:
    try:
        answer = worker.call(pickle.dumps((call.function, call.args, call.kwargs)))
    except Exception as error:  # pickle runs the objects' own code, which may raise anything
        call.future.set_exception(error)
        return
    if answer is None:
        call.future.set_exception(NodeLost(node))
    elif answer[0]:
        call.future.set_result(answer[1])
    else:
        call.future.set_exception(answer[1])


# -- on the node ------------------------------------------------------------------------------------------------------


def _receive(stream: IO[bytes]) -> bytes | None:
    # None at the end, and where the rest is missing.
    head = stream.read(8)
    if len(head) < 8:
        return None
    data = stream.read(size := int.from_bytes(head))
    return data if len(data) == size else None


def serve() -> None:
    """What a worker does: calls that come on stdin, answers on what was stdout."""
    with os.fdopen(os.dup(0), "rb") as calls, os.fdopen(os.dup(1), "wb") as answers:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        os.dup2(2, 1)
        answers.write(_HELLO)
        answers.flush()
        prepared = _receive(calls)
        if prepared is None:
            return
        spawn.prepare(pickle.loads(prepared))
        while (data := _receive(calls)) is not None:
            answer = _answer(data)
            answers.write(len(answer).to_bytes(8) + answer)
            answers.flush()


def _answer(data: bytes) -> bytes:
    try:
        function, args, kwargs = pickle.loads(data)
        return pickle.dumps((True, function(*args, **kwargs), ""))
    except BaseException as error:
        words = traceback.format_exc()
        try:
            return pickle.dumps((False, error, words))
        except Exception:  # exceptions may hold anything
            return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}"), words))

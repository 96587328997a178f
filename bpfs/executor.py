# SPDX-License-Identifier: GPL-2.0-or-later
"""A `concurrent.futures.Executor` whose workers are Python processes on nodes.

    from bpfs.executor import NodeExecutor

    with NodeExecutor(nodes="allup") as executor:
        squares = list(executor.map(pow, range(100), [2] * 100))

Functions, arguments and results travel by pickle, as with `ProcessPoolExecutor`: functions are found by their module,
so the program's main module needs its `if __name__ == "__main__"`. What a function prints is on stderr. Each worker is
started with bpsh(1) when there is work for it, and serves until `shutdown`.
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


class NodeLost(BrokenExecutor):
    """The worker that ran the call is gone: its node went down, or it was killed. The call may have begun."""

    def __init__(self, node: int) -> None:
        super().__init__(f"the worker on node {node} has ended in the middle of the call")
        self.node = node


class RemoteTraceback(Exception):
    """Why a call failed on its node, in the words of its traceback; the cause of the exception that was raised there."""


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
        nodes: a nodespec; a node that is named twice has twice as many workers.
        cluster: which cluster; without it the one of $BPFS, or of /bpfs.
        per_node: workers on each of them.

    Raises:
        BpfsError: no cluster is there.
        NodespecError: the sentence says which term is wrong.
        ValueError: that makes no worker at all.
    """

    def __init__(self, nodes: str = "allup", *, cluster: Cluster | None = None, per_node: int = 1) -> None:
        self._cluster = cluster or Cluster()
        places = self._cluster.expand(nodes) * per_node
        if not places:
            raise ValueError(f"no node is {nodes!r}, or no worker wanted")
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._lock = Lock()
        self._closed = False
        self._serving = len(places)
        self._threads = [Thread(target=self._serve, args=(node,), name=f"node {node}", daemon=True) for node in places]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Has a call made on some node.

        Raises:
            RuntimeError: after `shutdown`.
            BrokenExecutor: no node is left.
        """
        future: Future[_T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if not self._serving:
                raise BrokenExecutor("no node is left to run on")
            self._calls.put(_Call(future, fn, args, kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more calls; returns when all are done, unless told not to wait."""
        with self._lock:
            if cancel_futures:
                for call in self._left():
                    call.future.cancel()
            if not self._closed:
                self._closed = True
                self._calls.put(None)  # whoever takes it puts it back for the next
        if wait:
            for thread in self._threads:
                thread.join()

    def _left(self) -> list[_Call]:
        # The mark of the end stays where it is.
        calls, ended = [], False
        try:
            while True:
                call = self._calls.get_nowait()
                if call is None:
                    ended = True
                else:
                    calls.append(call)
        except Empty:
            if ended:
                self._calls.put(None)
            return calls

    def _serve(self, node: int) -> None:
        worker = None
        try:
            while (call := self._calls.get()) is not None:
                if not call.future.set_running_or_notify_cancel():
                    continue
                try:
                    data = pickle.dumps((call.function, call.args, call.kwargs))
                except Exception as error:
                    call.future.set_exception(error)
                    continue
                if worker is None or not worker.usable:
                    if worker is not None:
                        worker.close()
                    worker = _Worker(self._cluster, node)
                    if not worker.usable:
                        self._hand_on(call)
                        return
                _make(call, data, worker, node)
            self._calls.put(None)
        finally:
            if worker is not None:
                worker.close()
            self._leave()

    def _hand_on(self, call: _Call) -> None:
        # This node cannot be used. A future that is running stays so, so the call goes on under a future of its own.
        again: Future[Any] = Future()
        again.add_done_callback(lambda done: _copy(done, call.future))
        self._calls.put(call._replace(future=again))
        with self._lock:
            if self._closed:
                for _ in range(1):
                    self._calls.put(None)

    def _leave(self) -> None:
        with self._lock:
            self._serving -= 1
            left = [] if self._serving else self._left()
        for call in left:
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(BrokenExecutor("no node is left to run on"))


def _make(call: _Call, data: bytes, worker: _Worker, node: int) -> None:
    try:
        answer = worker.call(data)
    except Exception as error:  # what came back cannot be unpickled here
        call.future.set_exception(error)
        return
    if answer is None:
        call.future.set_exception(NodeLost(node))
    elif answer[0]:
        call.future.set_result(answer[1])
    else:
        call.future.set_exception(answer[1])


def _copy(done: Future[Any], to: Future[Any]) -> None:
    error = done.exception() if not done.cancelled() else BrokenExecutor("shut down before a node was found for it")
    if error is not None:
        to.set_exception(error)
    else:
        to.set_result(done.result())


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

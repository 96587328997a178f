"""One move at a time: the process that traces, dumps and rebuilds, driven over a SEQPACKET socket.

Requests are msgpack maps with an `op`, replies `{"ok": True, …}` or `{"ok": False, "errno", "text", "refusals"}`. The
end of the socket undoes what is under way: a source is released untouched, a half-built process is killed, a ghost is a
ghost again. The operations: engine/source.py, engine/at_exec.py, engine/destination.py, engine/keeper.py,
engine/batch.py.
"""

import errno
import os
import socket
from collections.abc import Callable

from engine.at_exec import AtExec
from engine.batch import Copies, Original
from engine.destination import Destination
from engine.keeper import Giver, Keeper, bear_ghost
from engine.linux import packets
from engine.linux.mman import warm_up
from engine.operation import FDS, Reply, report, sentence
from engine.source import Source
from engine.stream import Aborted


def serve(control: socket.socket) -> bool:
    """Serve requests until the socket ends, then undo.

    Returns:
        Whether nothing was left to undo and nothing had failed.
    """
    clean = True
    source, destination = AtExec(control), Destination(control)
    keeper, giver = Keeper(control), Giver(control)
    original, copies = Original(control), Copies()
    operations: dict[str, Callable[[Reply, list[int]], Reply]] = {
        "hello": _hello,
        "look": source.look,
        "obstacles": source.obstacles,
        "family": source.family,
        "find_kin": source.find_kin,
        "give_kin": source.give_kin,
        "end_kin": source.end_kin,
        "watch": source.watch,
        "copy": source.copy,
        "unwatch": source.unwatch,
        "give_files": source.give_files,
        "foresee": source.foresee,
        "freeze": source.freeze,
        "arm": source.arm,
        "wait_exec": source.wait_exec,
        "stay": source.stay,
        "make_ghost_ready": source.make_ghost_ready,
        "end": source.end,
        "inspect": source.inspect,
        "send": source.send,
        "pledge": source.pledge,
        "release": source.release,
        "become_ghost": source.become_ghost,
        "vanish": source.vanish,
        "owing": source.owing,
        "prepare": destination.prepare,
        "gather": destination.gather,
        "take_files": destination.take_files,
        "listen": destination.listen,
        "take_kin": destination.take_kin,
        "hand_out": destination.hand_out,
        "keep_kin": destination.keep_kin,
        "borrow": destination.borrow,
        "sweep": destination.sweep,
        "stage": destination.stage,
        "receive": destination.receive,
        "complete": destination.complete,
        "follow": destination.follow,
        "resume": destination.resume,
        "filled": destination.filled,
        "give_up": destination.give_up,
        "discard": destination.discard,
        "keep": keeper.keep,
        "keep_image": keeper.keep_image,
        "keep_done": keeper.keep_done,
        "load": giver.load,
        "load_as": giver.load_as,
        "give": giver.give,
        "bear": bear_ghost,
        "arm_template": original.arm_template,
        "wait_template": original.wait_template,
        "image": original.image,
        "end_template": original.end_template,
        "become_ghost_of": original.become_ghost_of,
        "refuse": original.refuse,
        "make": copies.make,
    }
    try:
        while (packet := _next(control, source, destination)) is not None:
            request, fds = packet
            try:
                reply = _answer(operations, request, fds)
                source.explain(reply)
            finally:
                for fd in fds:
                    os.close(fd)
            clean = clean and reply["ok"]
            _reply(control, reply)
            if source.afterwards is not None:
                afterwards, source.afterwards = source.afterwards, None
                _try(afterwards)
    except OSError:
        clean = False  # the daemon is gone
    finally:
        for one in (source, destination, keeper, giver, original):
            clean = not _try(one.undo) and clean
    return clean


def _hello(request: Reply, fds: list[int]) -> Reply:
    """Answer; `warm`: and be ready for work that is in a hurry."""
    if request.get("warm"):
        warm_up()
    return {"pid": os.getpid()}


def _try(work: Callable[[], object]) -> bool:
    """Do something whose failure must not keep us from what comes next. Returns what it does, or True."""
    try:
        return bool(work())
    except Exception as error:
        report(error)
        return True


def _reply(control: socket.socket, reply: Reply) -> None:
    passed = reply.pop(FDS, [])
    try:
        try:
            packets.send(control, reply, passed)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            packets.send(control, _failure(error))
    finally:
        for fd in passed:
            os.close(fd)


def _next(control: socket.socket, source: Source, destination: Destination) -> tuple[Reply, list[int]] | None:
    """The next request; memory that goes after a process does so meanwhile."""
    work = source.work or destination.work
    if work is not None:
        work.run(control)
    return packets.receive(control)


def _answer(operations: dict[str, Callable[[Reply, list[int]], Reply]], request: Reply, fds: list[int]) -> Reply:
    try:
        operation = operations.get(request.get("op", ""))
        if operation is None:
            raise OSError(22, f"no such operation: {request.get('op')!r}")
        return {"ok": True} | operation(request, fds)
    except Aborted:
        raise
    except OSError as error:
        return _failure(error)
    except Exception as error:  # a defect of ours must not leave a process frozen: the daemon will undo
        report(error)
        return _failure(error)


def _failure(error: Exception) -> Reply:
    code = error.errno if isinstance(error, OSError) else 0
    return {"ok": False, "errno": code or errno.EIO, "text": sentence(error), "refusals": []}

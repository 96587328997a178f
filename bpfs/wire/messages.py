"""Every message that master and slave exchange, in one place.

A message is a frozen dataclass with a number of its own. Fields travel by position, so the rules of change are:
numbers are never reused, and any change of fields is a new `VERSION`. Peers of different versions refuse each other
in the handshake.

Direction is noted as `slave -> master`, `master -> slave` or `both`; a *request* names its reply, everything else
is a notice. Field types are those the codec can check: int, float, bool, str, bytes, ``tuple[T, ...]``, ``T |
None``, and `Plain` (any value of msgpack, bounded by the frame).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast, dataclass_transform

VERSION = 19
"""Raised with every change of a message. Both sides must have the same."""

Plain: TypeAlias = Any
"""A value that msgpack can carry; the receiver checks it by itself."""


class Message:
    """Base of all messages; `number` is the type's number on the wire."""

    __slots__ = ()
    number: int = 0


REGISTRY: dict[int, type[Message]] = {}


@dataclass_transform(frozen_default=True)
def _message(number: int) -> Callable[[type], type]:
    """Make a class a frozen dataclass and enter it into the registry."""

    def register(cls: type) -> type:
        made: Any = dataclass(frozen=True, slots=True)(cls)
        assert number not in REGISTRY, f"message number {number} is used twice"
        made.number = number
        REGISTRY[number] = made
        return cast(type, made)

    return register


# -- handshake: 1-9 --------------------------------------------------------------------------------


@_message(1)
class Hello(Message):
    """slave -> master: first frame of a slave's connection."""

    version: int
    nonce: bytes  # 32 random bytes, never used twice


@_message(2)
class Challenge(Message):
    """master -> slave: the master proves the key and asks for the same."""

    version: int
    nonce: bytes
    proof: bytes  # HMAC-SHA256 of the role "master" and both nonces


@_message(3)
class Join(Message):
    """slave -> master: the slave's proof and what it is."""

    proof: bytes  # HMAC-SHA256 of the role "slave" and both nonces
    wanted: int | None  # node number the slave was told to have; None: master decides
    macs: tuple[str, ...]  # hardware addresses, for `node` lines of the configuration
    hostname: str
    kernel: str
    machine: bytes  # 16 random bytes, drawn by the slave's supervisor, the same over all its new starts
    real: bool  # the node image's init says that this machine may be rebooted
    facts: bytes  # of engine/facts.py: its kernel's vDSO and its CPU
    arch: str  # as uname -m
    resumes: bytes = b""  # Welcome.cluster of the master whose jobs still live here; empty: none do
    generation: int = 0  # and its Welcome.generation
    told: int = 0  # number of the last report (JobReport, JobEvents) over an earlier link: those over this one go on
    returns: bool = False  # that master may be the one of now: it is the slave that was started anew


@_message(4)
class Welcome(Message):
    """master -> slave: you are in."""

    node: int
    lease: float  # seconds
    heartbeat: float  # seconds between heartbeats of the slave
    block_first: int  # the pids that this node hands out itself:
    block_last: int  # ... first to last, both included
    mount: str  # where the tree is mounted
    cluster: bytes  # 16 bytes: the same as long as each master takes up the jobs of the one before
    boot: bytes  # the master's boot id: a slave that has the same one shares its clocks
    monotonic: int  # the master's CLOCK_MONOTONIC at this moment, ns
    boottime: int  # and CLOCK_BOOTTIME
    onlost: str  # what a real node does when it has not found a master for ...
    onlost_after: float  # ... seconds: wait, reboot or halt; continue: what any node does when its lease is over
    taken: tuple[int, ...] = ()  # pids of these that processes elsewhere have ...
    owners: tuple[int, ...] = ()  # ... and their real uids
    generation: int = 0  # which of these masters this is
    heard: int = 0  # number of the last report of an earlier link that this master has had; 0: it had none


@_message(5)
class Refused(Message):
    """master -> slave: you are not in; the connection is closed later.

    A `parked` connection stays open until the reason has gone: its end says "try again at once".
    """

    reason: str
    parked: bool


@_message(6)
class StreamOpen(Message):
    """slave -> master: first frame of a byte stream (stdio of a job); raw bytes follow at once."""

    token: bytes  # one-time, 32 bytes, handed out by the master over the slave's link


@_message(7)
class Ready(Message):
    """slave -> master: job space and engine are there; the node may become up."""

    init: int  # HostPid of the node's init as the slave's engine workers see it; 0: no job space
    real: bool
    door: int  # TCP port where other nodes get images that it holds; 0: none


@_message(9)
class Resumed(Message):
    """slave -> master: after Ready, of a slave that has kept its jobs: from now on it tells of the present."""

    alive: tuple[int, ...]  # pids of all jobs
    stopped: tuple[int, ...]  # those of them that are stopped
    broken: tuple[int, ...]  # streams that nobody has the other end of
    held: tuple[int, ...]  # handles of all descriptors that the slave holds for its master


# -- life: 10-19 -----------------------------------------------------------------------------------


@_message(10)
class Heartbeat(Message):
    """slave -> master: I live. The lease counts from the moment this was *sent*, once the answer has come."""

    count: int


@_message(11)
class HeartbeatSeen(Message):
    """master -> slave: heartbeat `count` arrived; your lease runs anew from when you sent it."""

    count: int
    taken: int = 0  # JobReports and JobEvents of this link that the master has dealt with


@_message(12)
class Sample(Message):
    """slave -> master: figures of the node, at a low rate and only when they changed."""

    load: str  # one line as in /proc/loadavg
    memory: tuple[tuple[str, int], ...]  # (key of /proc/meminfo, kB)
    cpus: int
    uptime: float  # seconds
    kernel: str
    mhz: float  # clock of the first processor when the slave started; 0: not told
    processors: tuple[tuple[int, ...], ...]  # a line `cpuN` of /proc/stat each: N, then ticks of 1/100 s, see proc(5)
    busy: tuple[float, ...]  # of each of them, the share of the last seconds that it was not idle
    counters: tuple[tuple[str, int], ...]  # the lines of one number below them, `ctxt` and so on


@_message(13)
class Fence(Message):
    """master -> slave, request (reply Done): kill all jobs; `then` tells what next.

    `afresh`: start as a new incarnation; `reboot`, `halt`, `pwroff`: the machine where it is a real node, the
    daemon elsewhere. The answer comes when no job lives any more.
    """

    reason: str
    then: str


@_message(14)
class Leaving(Message):
    """slave -> master: no job lives here any more, I am going; no lease need be waited for."""

    reason: str


@_message(15)
class Done(Message):
    """both: the reply that says nothing but "done"."""


@_message(16)
class Fault(Message):
    """slave -> master: the node cannot hold jobs (no job space, no engine): it becomes `error`."""

    reason: str


@_message(17)
class SetClock(Message):
    """master -> slave, request (reply Done): set the clock of a real node; EOPNOTSUPP elsewhere."""

    realtime_ns: int


@_message(18)
class ReadClock(Message):
    """master -> slave, request (reply ClockIs)."""


@_message(19)
class ClockIs(Message):
    """slave -> master: CLOCK_REALTIME there."""

    realtime_ns: int


@_message(8)
class SlewClock(Message):
    """master -> slave, request (reply Done): have the clock of a real node gain this, little by little."""

    gain_ns: int


# -- engine: 20-29 ---------------------------------------------------------------------------------


@_message(20)
class EngineOpen(Message):
    """master -> slave, request (reply Done): give this session a worker. The master chooses the number."""

    session: int


@_message(21)
class EngineCall(Message):
    """master -> slave, request (reply EngineReply): one request to the session's worker.

    `fds` are handles of descriptors that the slave holds (see RelayAttached); they are passed to the worker in this
    order, and closed by the slave.
    """

    session: int
    body: bytes  # msgpack map, opaque to the slave
    fds: tuple[int, ...] = ()


@_message(22)
class EngineReply(Message):
    """slave -> master: the worker's answer; `fds` are handles of descriptors that came with it."""

    body: bytes
    fds: tuple[int, ...] = ()


@_message(23)
class EngineClose(Message):
    """master -> slave: end the session; the worker undoes what was not finished."""

    session: int


@_message(25)
class FdClose(Message):
    """master -> slave: close held descriptors."""

    fds: tuple[int, ...]


@_message(26)
class FdWhere(Message):
    """master -> slave, request (reply FdIsWhere): how far held descriptors of files have got, and close them."""

    fds: tuple[int, ...]


@_message(27)
class FdIsWhere(Message):
    """slave -> master: for each its offset in bytes and the file's st_ino; -1 and 0 where it has none."""

    offsets: tuple[int, ...]
    inodes: tuple[int, ...]


@_message(28)
class Names(Message):
    """master -> slave: where nodes are; all of them the first time, what has changed since afterwards."""

    addresses: tuple[tuple[int, str], ...]  # of nodes that have been seen, by number


# -- jobs: 30-39 -----------------------------------------------------------------------------------


@_message(30)
class JobReport(Message):
    """slave -> master: a packet of the node's init (struct report of nodeinit.c). Strictly in order."""

    kind: int  # engine.jobspace.Kind: CHILD, SIGNAL, FAILED
    pid: int
    reporter: int
    code: int  # CLD_... of siginfo
    status: int  # exit code or signal number
    uid: int
    utime_us: int
    stime_us: int
    maxrss_kb: int
    value: int  # of a queued signal
    sender: int


@_message(31)
class Signal(Message):
    """master -> slave, request (reply Done): send a signal to a job; ESRCH when it is not there."""

    pid: int
    sig: int
    si_code: int
    si_pid: int
    si_uid: int
    value: int


@_message(32)
class KillAll(Message):
    """master -> slave, request (reply Done): kill every job of the node; the answer comes when none lives."""


@_message(33)
class HostPidOf(Message):
    """master -> slave, request (reply HostPidIs): the pid of a job as the slave's engine workers see it."""

    pid: int


@_message(34)
class HostPidIs(Message):
    """slave -> master: 0 when there is no such process in the job space."""

    hostpid: int


@_message(35)
class DropPlaceholder(Message):
    """master -> slave: the process that this placeholder stands for has ended."""

    pid: int


MM_FILES = frozenset({"cmdline", "environ", "maps", "smaps_rollup"})
"""Files of /proc/PID whose reader waits for the process's memory map: never to be read by a daemon's main thread."""

JOBS_AT_ONCE = 100
"""Jobs in one JobsStatus: the answer is far below a frame's limit, and takes a node about 5 ms."""

PROC_FILES = frozenset({"stat", "status", "statm", "io", "limits", "wchan", "mountinfo"}) | MM_FILES
"""Files of /proc/PID that a node tells."""


@_message(36)
class JobStatus(Message):
    """master -> slave, request (reply JobStatusIs): text of files of /proc/PID of a job."""

    pid: int
    names: tuple[str, ...]  # of PROC_FILES


@_message(37)
class JobStatusIs(Message):
    """slave -> master: one text per name asked for."""

    texts: tuple[bytes, ...]


@_message(43)
class JobsStatus(Message):
    """master -> slave, request (reply JobsStatusAre): files of /proc/PID of `JOBS_AT_ONCE` jobs at most."""

    pids: tuple[int, ...]
    names: tuple[str, ...]  # of PROC_FILES, and none of MM_FILES


@_message(44)
class JobsStatusAre(Message):
    """slave -> master: a text per name for one pid after the other; all empty for a job that has ended."""

    texts: tuple[bytes, ...]


@_message(38)
class JobEvents(Message):
    """slave -> master: a packet of jobwatch (engine/jobwatch.py): what jobs forked, became, and how they ended."""

    records: bytes


@_message(39)
class StandIn(Message):
    """master -> slave, request (reply Done): what a process did whose stand-in is a child of a job here."""

    pid: int
    code: int  # CLD_... of siginfo
    status: int  # exit code or signal number
    heard: int  # of a stop: how many SIGCONTs to its stand-in had been passed on before


@_message(45)
class StandInLeads(Message):
    """master -> slave, request (reply Done): a process whose stand-in is a child of a job here leads a group now."""

    pid: int
    session: bool  # and a session, too


@_message(46)
class JobCall(Message):
    """slave -> master, request (reply JobCallIs): a strict job sends a signal, to whoever is not on its node."""

    pid: int  # the sender
    target: int  # as kill(2) has it: a process, -1 or a negative group
    sig: int
    si_code: int
    value: int


@_message(47)
class JobCallIs(Message):
    """master -> slave."""

    sent: int  # to so many processes
    error: int  # where that is 0: the errno


@_message(48)
class GhostOf(Message):
    """slave -> master, request (reply Done): come back when this job, of which JobEvents told just now, has a ghost.

    ESRCH: it will not have one.
    """

    pid: int


@_message(49)
class AskFree(Message):
    """slave -> master, request (reply AreFree): which of these pids, which it keeps, no process has any more."""

    pids: tuple[int, ...]


@_message(53)
class AreFree(Message):
    """master -> slave."""

    pids: tuple[int, ...]


# -- tree: 40-45 -----------------------------------------------------------------------------------


@_message(40)
class FsRequest(Message):
    """slave -> master, request (reply FsReply): one operation on the tree by a caller on the node.

    Which fields an operation uses is the business of bpfs.tree on both sides.
    """

    op: str
    path: tuple[str, ...]
    handle: int
    offset: int
    size: int
    data: bytes
    pid: int  # cluster pid of the caller
    uid: int
    gid: int
    value: Plain = None


@_message(41)
class FsReply(Message):
    """master -> slave: what the operation gave."""

    handle: int = 0
    data: bytes = b""
    value: Plain = None


# -- view of the master's files: 60-69 --------------------------------------------------------------


@_message(60)
class ViewOpen(Message):
    """slave -> master, request (reply ViewOpened): a stream to the master's server of files (bpfs.view.protocol)."""


@_message(61)
class ViewOpened(Message):
    """master -> slave: the slave connects to the master's port and sends StreamOpen(token)."""

    token: bytes
    cache_limit: int  # bytes that objects may take on the node


@_message(62)
class CacheCall(Message):
    """master -> slave, request (reply CacheReply): a verb for the node's object store; EOPNOTSUPP where it has none."""

    verb: str  # status, purge, prestage, libraries
    argument: str


@_message(63)
class CacheReply(Message):
    """slave -> master: what the verb gives."""

    text: str


# -- stdio: 50-59 ----------------------------------------------------------------------------------


@_message(50)
class RelayAttach(Message):
    """master -> slave, request (reply RelayAttached): join a job's stdio to its ghost.

    The slave connects to the master's port, sends StreamOpen(token), makes pipes or a terminal for the channels,
    and gives both to its iorelay.
    """

    stream: int
    token: bytes
    channels: Plain  # a list a channel: number, kind, access, externals (engine/descriptors/external.py);
    # empty for a stream that is there already and wants but a new connection
    uid: int  # whose the ends are, so that /dev/stdin and its like open for him
    gid: int
    session: int  # the terminal is this session's controlling one, which its jobs on a node share; 0: it is not
    front: int  # the process group of the job, where that is in the terminal's foreground; else 0


@_message(51)
class RelayAttached(Message):
    """slave -> master: handles of the job's ends, one an external, for EngineCall.fds."""

    fds: tuple[int, ...]
    keys: tuple[int, ...]  # of the externals, in the order of `fds`
    ends: Plain  # a list an external: st_dev and st_ino of its end, number of its channel
    terminal: str  # path of the job's terminal on the node; empty where it has none


@_message(55)
class MakeJob(Message):
    """master -> slave, request (reply JobMade): make a process of an image that many share, and let it run.

    With its stdio as RelayAttach has it.
    """

    pid: int
    ppid: int
    pgid: int
    sid: int
    session: int  # this and `front`: as in RelayAttach
    front: int
    stream: int
    token: bytes
    channels: Plain
    uid: int
    gid: int
    image: bytes  # engine/batch.py; empty: it is held by `name`, see HoldImage
    name: bytes
    keys: tuple[int, ...] | None  # it is an order (engine/execorder.py) with these externals; None: it is an image
    patches: Plain  # [offset, bytes] of what differs from one process to another
    random: int  # offset of the bytes that shall be random; -1: none
    strict: bool  # see JobCall


@_message(56)
class JobMade(Message):
    """slave -> master: it runs."""

    hostpid: int
    files: tuple[int, ...]  # numbers of its regular files, and as many
    handles: tuple[int, ...]  # ... handles of the same open files
    ends: Plain  # as in RelayAttached


@_message(52)
class RelayDetach(Message):
    """master -> slave, request (reply Done)."""

    stream: int


@_message(54)
class RelayLost(Message):
    """slave -> master: the stream broke."""

    stream: int
    reason: str


# -- images that many share: 70-79 ------------------------------------------------------------------

NAME = 32
"""Bytes of an image's name: 256 random bits, for who knows the name may have the image."""


@_message(70)
class HoldImage(Message):
    """master -> slave: MakeJob will name this image, and other nodes may ask for it (bpfs/slave/images.py)."""

    name: bytes
    image: bytes  # empty: it is to be had from ...
    sources: tuple[tuple[str, int], ...]  # ... the first of these addresses and doors that answers, or from AskImage
    timeout: float  # seconds of silence after which the next of them is asked


@_message(71)
class DropImage(Message):
    """master -> slave: nobody will ask for this image any more."""

    name: bytes


@_message(72)
class AskImage(Message):
    """slave -> master, request (reply ImageIs): an image that no other node gives; ENOENT when it is of no use now."""

    name: bytes


@_message(73)
class ImageIs(Message):
    """master -> slave."""

    image: bytes


# -- figures that are asked for: 80-89 ----------------------------------------------------------------


@_message(80)
class Figure(Message):
    """master -> slave, request (reply FigureIs): one of bpfs/figures.py."""

    name: str


@_message(81)
class FigureIs(Message):
    """slave -> master."""

    text: str

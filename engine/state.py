"""State of a frozen process and its threads: read from outside where the kernel shows it, injected where it does
not.
"""

import ctypes
import errno
import os
import struct
from typing import Any, Final

from engine import image as img
from engine import switches
from engine.freeze import Frozen, Thread
from engine.linux import process_vm, procfs, ptrace
from engine.linux.libc import syscall
from engine.linux.x86_64 import NR, Registers
from engine.restart import prime_of
from engine.runner import Calls

# <linux/prctl.h>
PR_SET_PDEATHSIG: Final = 1
PR_GET_PDEATHSIG: Final = 2
PR_GET_DUMPABLE: Final = 3
PR_SET_DUMPABLE: Final = 4
PR_SET_NAME: Final = 15
PR_CAPBSET_DROP: Final = 24
PR_GET_SECUREBITS: Final = 27
PR_SET_SECUREBITS: Final = 28
PR_SET_TIMERSLACK: Final = 29
PR_GET_TIMERSLACK: Final = 30
PR_SET_MM: Final = 35
PR_SET_MM_MAP: Final = 14
PR_SET_CHILD_SUBREAPER: Final = 36
PR_GET_CHILD_SUBREAPER: Final = 37
PR_SET_NO_NEW_PRIVS: Final = 38
PR_GET_TID_ADDRESS: Final = 40
PR_SET_THP_DISABLE: Final = 41
PR_GET_THP_DISABLE: Final = 42
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_RAISE: Final = 2
PR_TIMER_CREATE_RESTORE_IDS: Final = 77
PR_MCE_KILL: Final = 33
PR_MCE_KILL_SET: Final = 1
PR_MCE_KILL_GET: Final = 34
PR_SET_MEMORY_MERGE: Final = 67
PR_GET_MEMORY_MERGE: Final = 68
MCE_DEFAULT: Final = 2
PR_SET_VMA: Final = 0x53564D41
# <asm-generic/mman.h>
_MS_INVALIDATE: Final = 2
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4

# <linux/membarrier.h>: what to ask, and to register for what is asked. Global barriers are for all anyway.
_BARRIERS: Final = {1 << 3: 1 << 4, 1 << 5: 1 << 6, 1 << 7: 1 << 8}
_BARRIER_REGISTRATIONS: Final = 1 << 9  # Linux 6.3

_F_GETFD: Final = 1
_IOPRIO_WHO_PROCESS: Final = 1

ACTION_SIZE: Final = 32  # struct kernel_sigaction: handler, flags, restorer, mask
SIGNALS: Final = 64
LIMITS: Final = 16  # RLIMIT_CPU … RLIMIT_RTTIME


class Asked:
    """Answers of the process itself, from one batch of injected calls."""

    actions: dict[int, bytes]
    itimers: list[bytes]
    brk: int
    dumpable: int
    death_signal: int
    securebits: int
    timer_slack: int
    subreaper: int
    thp_disabled: int
    lock_future: int
    personality: int
    barriers: int
    memory_merge: int
    machine_checks: int
    altstack: bytes
    clear_tid: int
    switches: list[int]
    timers: list[list[Any]]
    cloexec: dict[int, bool]


def ask(frozen: Frozen, flags: int, doubtful: list[int]) -> Asked:
    """Run the batch.

    Args:
        flags: of its first thread, in /proc/PID/stat.
        doubtful: descriptors of which /proc may be wrong about close-on-exec.

    Raises:
        OSError: a call failed, or the process ended.
    """
    injection = frozen.open_injection()
    calls = Calls(injection)
    unlike_default = int(frozen.status["SigCgt"], 16) | int(frozen.status["SigIgn"], 16)
    wanted = [n for n in range(1, SIGNALS + 1) if unlike_default >> (n - 1) & 1]
    actions = calls.data(bytes(ACTION_SIZE * len(wanted)))
    for i, number in enumerate(wanted):
        calls.add("rt_sigaction", number, 0, actions + i * ACTION_SIZE, 8)
    words = calls.data(bytes(8 * 8))
    timers = calls.data(bytes(32 * 3))
    for which in range(3):
        calls.add("getitimer", which, timers + 32 * which)
    stack = calls.data(bytes(24))
    calls.add("sigaltstack", 0, stack)
    calls.add("prctl", PR_GET_TID_ADDRESS, words, must=False)
    calls.add("prctl", PR_GET_PDEATHSIG, words + 8)
    calls.add("prctl", PR_GET_CHILD_SUBREAPER, words + 16)
    numbers = [
        calls.add("brk", 0),
        calls.add("prctl", PR_GET_DUMPABLE),
        calls.add("prctl", PR_GET_SECUREBITS),
        calls.add("prctl", PR_GET_TIMERSLACK),
        calls.add("prctl", PR_GET_THP_DISABLE, 0, 0, 0, 0),
        calls.add("personality", 0xFFFFFFFF),
        calls.add("prctl", PR_MCE_KILL_GET, 0, 0, 0, 0),
    ]
    switched = switches.ask(calls, flags)
    merge = calls.add("prctl", PR_GET_MEMORY_MERGE, 0, 0, 0, 0, must=False)  # without KSM there is no such thing
    registered = calls.add("membarrier", _BARRIER_REGISTRATIONS, 0, 0, must=False)
    # Older kernels do not tell; but a barrier is no harm, and is refused to who has not registered for it.
    barriers = {calls.add("membarrier", ask, 0, 0, must=False): register for ask, register in _BARRIERS.items()}
    # The scratch was mapped like any memory of the process: mlockall(MCL_FUTURE) has locked it, and then this fails.
    locked = calls.add("msync", injection.base, 4096, _MS_INVALIDATE, must=False)
    posix = _posix_timers(frozen)
    settings = calls.data(bytes(32 * len(posix)))
    overruns = []
    for i, timer in enumerate(posix):
        calls.add("timer_gettime", timer.identifier, settings + 32 * i)
        overruns.append(calls.add("timer_getoverrun", timer.identifier))
    descriptors = [calls.add("fcntl", fd, _F_GETFD, label=f"descriptor {fd}") for fd in doubtful]
    results = calls.run()
    raw = calls.read(actions, settings + 32 * len(posix) - actions)

    def at(address: int, length: int) -> bytes:
        return raw[address - actions : address - actions + length]

    asked = Asked()
    asked.actions = {n: at(actions + i * ACTION_SIZE, ACTION_SIZE) for i, n in enumerate(wanted)}
    asked.itimers = [at(timers + 32 * i, 32) for i in range(3)]
    asked.altstack = at(stack, 24)
    asked.clear_tid, death, subreaper = struct.unpack("<QQQ", at(words, 24))
    asked.death_signal, asked.subreaper = death & 0xFF, subreaper & 1
    (
        asked.brk, asked.dumpable, asked.securebits, asked.timer_slack, asked.thp_disabled, asked.personality,
        asked.machine_checks,
    ) = (results[i] for i in numbers)  # fmt: skip
    asked.switches = switched()
    asked.memory_merge = int(results[merge] == 1)
    granted = sum(register for index, register in barriers.items() if results[index] == 0)
    asked.barriers = granted if results[registered] < 0 else results[registered]
    asked.lock_future = _lock_future(frozen, injection.base) if results[locked] == -errno.EBUSY else 0
    asked.cloexec = {fd: bool(results[i]) for fd, i in zip(doubtful, descriptors, strict=True)}
    asked.timers = [
        [
            t.identifier,
            t.notify,
            t.signal,
            t.value,
            t.tid,
            t.clock,
            at(settings + 32 * i, 32),
            max(results[overruns[i]], 0),
        ]
        for i, t in enumerate(posix)
    ]
    return asked


def _lock_future(frozen: Frozen, base: int) -> int:
    scratch = next(vma for vma in procfs.parse_smaps(procfs.read(f"{frozen.live}/smaps")) if vma.start == base)
    return _MCL_FUTURE | (_MCL_ONFAULT if "lf" in scratch.flags else 0)


def _posix_timers(frozen: Frozen) -> list[procfs.PosixTimer]:
    try:
        return procfs.parse_timers(procfs.read(f"/proc/{frozen.pid}/timers"))
    except FileNotFoundError:  # a kernel without CONFIG_CHECKPOINT_RESTORE
        return []


def ask_thread(frozen: Frozen, thread: Thread) -> tuple[bytes, int, int, list[int]]:
    """(stack_t, clear_child_tid, timer slack in ns, switches) of a thread that is not the leader. Raises OSError."""
    flags = procfs.parse_stat(procfs.read(f"/proc/{frozen.pid}/task/{thread.tid}/stat")).flags
    injection = frozen.open_injection().for_thread(thread.tid, thread.registers, thread.mask)
    calls = Calls(injection)
    answer = calls.data(bytes(32))
    calls.add("sigaltstack", 0, answer)
    calls.add("prctl", PR_GET_TID_ADDRESS, answer + 24, must=False)
    slack = calls.add("prctl", PR_GET_TIMERSLACK)
    switched = switches.ask(calls, flags)
    results = calls.run()
    raw, own = calls.read(answer, 32), switched()
    injection.finish()
    return raw[:24], int.from_bytes(raw[24:], "little"), results[slack], own


def leave_rseq(frozen: Frozen, registers: Registers, rseq: tuple[int, int, int, int]) -> None:
    """A critical section that the freeze interrupted is aborted, as the kernel would (rseq(2)): the new CPU has
    another id.
    """
    if not rseq[0]:
        return
    pointer = int.from_bytes(process_vm.read(frozen.pid, rseq[0] + 8, 8), "little")
    if pointer:
        # struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip
        _, _, start, length, abort = struct.unpack("<IIQQQ", process_vm.read(frozen.pid, pointer, 32))
        if start <= registers.pc < start + length:
            registers.pc = abort


def thread_state(
    frozen: Frozen, thread: Thread, inner: int, altstack: bytes, clear_tid: int, slack: int, own_switches: list[int]
) -> img.ThreadState:
    """What the image carries of one thread.

    Args:
        inner: its tid in its own namespace.
    """
    tid = thread.tid
    cpus = os.sched_getaffinity(tid)
    with open(f"/proc/{frozen.pid}/task/{tid}/comm", "rb", buffering=0) as file:
        comm = file.read().removesuffix(b"\n")
    registers = thread.registers.copy()
    prime = prime_of(frozen, thread, registers)
    rseq = ptrace.rseq_configuration(tid)
    leave_rseq(frozen, registers, rseq)
    return img.ThreadState(
        tid=inner,
        registers=bytes(registers),
        xstate=ptrace.get_xstate(tid),
        mask=thread.mask,
        altstack=altstack,
        robust=_robust_list(tid),
        clear_tid=clear_tid,
        rseq=list(rseq),
        comm=comm,
        pending=ptrace.queued_signals(tid, shared=False),
        policy=_scheduling(tid),
        affinity=[] if len(cpus) >= (os.cpu_count() or 1) else sorted(cpus),
        prime=prime,
        io_priority=syscall(NR["ioprio_get"], _IOPRIO_WHO_PROCESS, tid),
        timer_slack=slack,
        switches=own_switches,
    )


def _robust_list(tid: int) -> list[int]:
    head, length = ctypes.c_uint64(), ctypes.c_uint64()
    syscall(NR["get_robust_list"], tid, ctypes.addressof(head), ctypes.addressof(length))
    return [head.value, length.value]


def _scheduling(tid: int) -> bytes:
    buffer = ctypes.create_string_buffer(56)  # struct sched_attr, version 1
    syscall(NR["sched_getattr"], tid, ctypes.addressof(buffer), 56, 0)
    return buffer.raw


def credentials(status: dict[str, str]) -> dict[str, Any]:
    """From `/proc/PID/status`: ids (real, effective, saved, fs), groups, capability sets as integers."""
    return {
        "uids": [int(x) for x in status["Uid"].split()],
        "gids": [int(x) for x in status["Gid"].split()],
        "groups": [int(x) for x in status["Groups"].split()],
        **{key: int(status[name], 16) for key, name in _SETS.items()},
        "no_new_privs": int(status.get("NoNewPrivs", "0")),
    }


_SETS: Final = {
    "inheritable": "CapInh",
    "permitted": "CapPrm",
    "effective": "CapEff",
    "bounding": "CapBnd",
    "ambient": "CapAmb",
}


def limits(pid: int) -> list[list[int]]:
    """Soft and hard limits by RLIMIT_ number."""
    return [list(pair) for pair in procfs.read_limits(pid)]

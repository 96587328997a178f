"""Rebuild a process from its image inside a stopped Target, whole, so that one detach makes it run."""

import bisect
import contextlib
import ctypes
import functools
import operator
import os
import resource
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from engine import binder, cpu, nameless, note, state, strict, sysv, timers, vdso
from engine import image as img
from engine.descriptors import Placed, Row, after_placed, at_resume, close_all, rebuild
from engine.descriptors.paths import is_fuse
from engine.image import Image, ImageError, Region
from engine.lending import Lending
from engine.linux import process_vm, procfs, ptrace
from engine.linux.credentials import Credentials
from engine.linux.libc import syscall
from engine.linux.x86_64 import NR, Registers
from engine.memory import receive_pages
from engine.mending import mend
from engine.restart import prime
from engine.restore_files import begins_in_root, open_all
from engine.restore_state import credential_rows, process_rows, signal_rows
from engine.restore_threads import Threads
from engine.runner import RESUME_DATA, SCRATCH_SIZE, TRAP_SIGNALS, Calls
from engine.staging import Keep, Stage
from engine.stream import Stream
from engine.target import Target

_MAP_FIXED_NOREPLACE: Final = 0x100000
_MREMAP_MOVE_FIXED: Final = 3
_PROT_WRITE: Final = 2
_F_DUPFD_CLOEXEC: Final = 1030
_TOP: Final = 0x7FFFFFFFF000

_TIOCSPGRP: Final = 0x5410  # <asm-generic/ioctls.h>
_NO_FILE: Final = 0xFFFFFFFF
_FILES_FOLLOWED: Final = 32  # descriptors that a daemon keeps of one process


def _kind_of_memory(region: Region) -> str:
    return "huge pages (hugetlb)" if region.flags & nameless.MAP_HUGETLB else "memory"


class Builder:
    """One rebuilding, step by step: `begin`, `pages`, `complete`, then `resume` or the target's `discard`.

    Attributes:
        front: the group that it has put in front of its terminal, and which is here when it runs; 0: none.
    """

    front = 0

    def __init__(
        self,
        target: Target,
        image: Image,
        externals: dict[int, int],
        ghost: dict[int, int] | None = None,
        ahead: tuple[Stage, Keep] | None = None,
        books: Lending | None = None,
        strict: int = 0,
        given: Mapping[tuple[int, int], int] | None = None,
    ) -> None:
        self._strict_by = strict  # host pid of the nodeinit of a job that is to be strict
        self._given = given or {}  # shared memory of the source that others have as well
        self._books = Lending(False) if books is None else books  # files that are not here
        self._ahead = ahead  # memory that is there already, and what of it is kept
        self.target, self.image, self.externals = target, image, externals
        self.ghost_numbers = ghost or {}
        self._opened: list[int] = []
        self._threads = Threads(target, image)
        self._high = 0
        self._set = False  # only has to be let go
        self._numbers: list[int] = []  # of the image's files in the process
        self._arrived = time.monotonic() - image.frozen_ns / 1e9
        self._placed: list[tuple[int, int, bool]] = []  # number in the process now, number wanted, close-on-exec
        self._made: list[Placed] = []
        self._foreign: vdso.Foreign | None = None
        self._limits_before: list[tuple[int, int]] = []
        self._look_up()

    def _look_up(self) -> None:
        self._bounds = [r.start for r in self.image.regions]
        self._writable = [bool(nameless.widened(self.image, r) & _PROT_WRITE) for r in self.image.regions]

    # ---- memory layout ----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Everything up to the pages: files and descriptors, mappings. Wants no more of the image than META.

        Raises:
            ImageError: the image does not fit this machine.
            OSError: a file is missing or another one than on the source; names it.
        """
        image, target = self.image, self.target
        if image.vdso != vdso.DIGEST:
            base = target.injection.base
            self._foreign = vdso.Foreign(image, target.special, [(base, base + SCRATCH_SIZE)])
            self._look_up()
        local = self._opened = open_all(image, target.pid, self._credentials(), self._books)
        rebuilt = self._rebuild_descriptors()
        for index, fd in nameless.make(image, rebuilt, self._given).items():
            os.dup2(fd, local[index], inheritable=False)
            os.close(fd)
        target.move_scratch([(r.start, r.end) for r in image.regions] + [(s[1], s[2]) for s in image.special])
        calls = Calls(target.injection)
        numbers, check = target.add_fds(calls, local + [p.local_fd for p in rebuilt])
        self._placed = [
            (number, p.target_fd, p.cloexec) for number, p in zip(numbers[len(local) :], rebuilt, strict=True)
        ]
        if target.in_place or self._ahead is not None:  # what fails up to here leaves a ghost as it was
            calls.run()
            check()
            calls, check = Calls(target.injection), lambda: None
        target.injection.trap = self._choose_trap()
        target.injection.write_slot()
        target.begin_rebuilding()
        if target.in_place:
            target.unmap_all(calls)
        if self._ahead is not None:
            stage, keep = self._ahead
            stage.settle(calls, image, keep)
            calls.run()
            kinds = {r.start: r.flags for r in image.regions}
            mend(target.injection, [(start, end, kinds[start]) for start, end in keep.regions])
            calls = Calls(target.injection)
            stage.protect(calls, image, keep)
            stage.forget()
        self._move_special(calls)
        self._map_regions(calls, numbers)
        self._numbers = numbers
        try:
            calls.run()
        except OSError:
            check()  # it may say why
            raise
        check()
        target.injection.vdso = target.special["[vdso]"][0]

    def _fit_cpu(self) -> None:
        image = self.image
        if image.cpu == cpu.packed():
            return
        try:
            source, own = cpu.unpack(image.cpu), cpu.here()
            in_use = functools.reduce(operator.or_, (cpu.used(thread.xstate) for thread in image.threads))
            lacks = [] if image.fresh else cpu.missing(source, own, in_use)
            if lacks:
                raise OSError(95, cpu.sentence(lacks))
            for thread in image.threads:
                thread.xstate = cpu.convert(thread.xstate, source.parts, own)
        except ValueError as error:
            raise ImageError(str(error)) from error

    def _choose_trap(self) -> int:
        # It must not be pending (it would be taken for our stop) nor have an action (it would run, should we die).
        # What is queued may have come after META.
        queued = [info for thread in self.image.threads for info in thread.pending] + self.image.shared_pending
        busy, unfit = self.image.busy_signals, {info[0] for info in queued} | self.target.pending()
        return next((n for n in TRAP_SIGNALS if not busy >> (n - 1) & 1 and n not in unfit), 0)

    def _credentials(self) -> Credentials:
        c = self.image.credentials
        return Credentials(c["uids"][3], c["gids"][3], tuple(c["groups"]), c["effective"])

    def _rebuild_descriptors(self) -> list[Placed]:
        who = self._credentials()
        target = self.target
        self._made = rebuild(
            self.image.descriptors,
            self.externals,
            target.pid,
            who,
            target.pid,
            ghost=self.ghost_numbers if target.home else None,
        )
        return self._made

    def _move_special(self, calls: Calls) -> None:
        target = self.target
        wanted = {name: (start, end) for name, start, end in self.image.special}
        if set(wanted) != set(target.special) or any(
            wanted[n][1] - wanted[n][0] != s[1] - s[0] for n, s in target.special.items()
        ):
            raise ImageError("it comes from a kernel with another vDSO layout")
        moves = [(name, span, wanted[name]) for name, span in target.special.items() if span != wanted[name]]
        if any(a[0] < b[1] and b[0] < a[1] for _, a, _ in moves for _, _, b in moves):
            moves = self._hop(calls, moves)
        for name, (start, end), (to, _) in moves:
            calls.add("mremap", start, end - start, end - start, _MREMAP_MOVE_FIXED, to, label=f"moving {name}")
        target.special = wanted

    def _hop(self, calls: Calls, moves: list[Any]) -> list[Any]:
        # Old and new places overlap: by way of a hole far from both.
        from engine.freeze import find_hole

        spans = [(r.start, r.end) for r in self.image.regions] + [m[1] for m in moves] + [m[2] for m in moves]
        base = self.target.injection.base
        hole = find_hole([*spans, (base, base + 0x40000)], sum(s[1] - s[0] for _, s, _ in moves), 0x100000000)
        result = []
        for name, (start, end), wanted in moves:
            size = end - start
            calls.add("mremap", start, size, size, _MREMAP_MOVE_FIXED, hole, label=f"moving {name}")
            result.append((name, (hole, hole + size), wanted))
            hole += size
        return result

    def _map_regions(self, calls: Calls, numbers: list[int]) -> None:
        kept = set(self._ahead[1].regions) if self._ahead is not None else set()
        for r in self.image.regions:
            size = r.end - r.start
            fd = numbers[r.file] if r.file >= 0 else -1
            what = os.fsdecode(self.image.files[r.file].path) if r.file >= 0 else _kind_of_memory(r)
            prot, flags = nameless.widened(self.image, r), r.flags | _MAP_FIXED_NOREPLACE
            if (r.start, r.end) not in kept:
                calls.add("mmap", r.start, size, prot, flags, fd, r.offset, label=f"mapping {what}")
            for advice in r.advice:
                calls.add("madvise", r.start, size, advice, must=False)
            if r.name:
                calls.add("prctl", state.PR_SET_VMA, 0, r.start, size, calls.data(r.name + b"\0"), must=False)

    def _describe(self, calls: Calls) -> None:
        image = self.image
        self._add_map(calls, _NO_FILE)
        self._add_map(calls, self._numbers[image.exe])
        calls.add("fchdir", self._numbers[image.cwd], label=f"cwd {os.fsdecode(image.files[image.cwd].path)}")

    def _add_map(self, calls: Calls, exe: int) -> None:
        # struct prctl_mm_map (<linux/prctl.h>): addresses, auxv, exe_fd. A ghost that runs as a user may not set
        # exe_fd.
        image = self.image
        sc, ec, stack, sd, ed, sb, args, arge, envs, enve = image.mm
        addresses = struct.pack("<11Q", sc, ec, sd, ed, sb, image.brk, stack, args, arge, envs, enve)
        data = addresses + struct.pack("<QII", calls.data(image.auxv), len(image.auxv), exe)
        must = exe == _NO_FILE or not self.target.home
        row = (state.PR_SET_MM, state.PR_SET_MM_MAP, calls.data(data), len(data), 0)
        calls.add("prctl", *row, must=must, label="memory map" if exe == _NO_FILE else "exe")

    # ---- pages --------------------------------------------------------------------------------------------

    def pages(self, receive: Callable[[memoryview], None]) -> None:
        """Fill the pages. `receive` fills a buffer wholly or raises."""
        target = self.target
        receive_pages(target.pid, target.injection.memory, img.runs_of(self.image), self._is_writable, receive)

    def borrow(self, stream: Stream) -> None:
        """After the pages: get from the source what files are not here. Raises OSError."""
        if self._books:
            self._books.fill(stream)

    def _is_writable(self, address: int) -> bool:
        index = bisect.bisect_right(self._bounds, address) - 1
        return index >= 0 and self._writable[index]

    def _settle_vdso(self, foreign: vdso.Foreign) -> None:
        # Not before the pages are there: those of a relic that gives way would be written over the real one.
        target, image = self.target, self.image
        stacks = [Registers.from_buffer_copy(thread.registers) for thread in image.threads]
        foreign.check_frames(target.pid, [(r, self._end_of_mapping(r.stack)) for r in stacks])
        home = foreign.home()
        if home is not None:
            calls = Calls(target.injection)
            for name, (start, end) in target.special.items():
                size = end - start
                calls.add("mremap", start, size, size, _MREMAP_MOVE_FIXED, home[name][0], label=f"moving {name}")
            calls.run()
            target.special = home
            target.injection.vdso = home["[vdso]"][0]
        foreign.patch(target.pid, target.injection.memory, target.injection.vdso)

    def _end_of_mapping(self, address: int) -> int:
        index = bisect.bisect_right(self._bounds, address) - 1
        return max(self.image.regions[index].end, address) if index >= 0 else address

    # ---- the rest -----------------------------------------------------------------------------------------

    def complete(self) -> None:
        """All other state; afterwards only `resume` is left."""
        image, target = self.image, self.target
        self._fit_cpu()
        if target.injection.trap != (trap := self._choose_trap()):
            target.injection.trap = trap
            target.injection.write_slot()
        leader = image.threads[0]
        if self._foreign is not None:
            self._settle_vdso(self._foreign)
        if image.cpu != cpu.packed() and not image.fresh:
            self._widen_binders()
        self._outside()
        calls = Calls(target.injection)
        self._limits_before = procfs.read_limits(target.pid)
        self._describe(calls)
        sysv.attach_rows(calls, image)
        nameless.narrow(image, lambda *span: calls.add("mprotect", *span))
        for r in image.regions:
            if r.lock:
                calls.add("mlock2", r.start, r.end - r.start, r.lock - 1, must=False)
            if r.sealed:
                calls.add("mseal", r.start, r.end - r.start, 0, must=False)
        if image.lock_future:
            calls.add("mlockall", image.lock_future, must=False)
        self._place_descriptors(calls)
        if begins_in_root(image, target.pid):
            folder = os.fsdecode(image.files[image.cwd].path)
            text = f"bpfs: {os.uname().nodename} has no folder {folder}: the program begins in /\n".encode(
                errors="replace"
            )
            calls.add("write", 2, calls.data(text), len(text), must=False)
        process_rows(calls, image)
        signal_rows(calls, image, everything=target.in_place)
        self._limit_rows(calls)
        if len(image.threads) > 1:
            calls.run()
            self._threads.create()
            calls = Calls(target.injection)
        if image.timers:
            timers.restore(target.injection, image)
        if self._strict_by:
            calls = self._make_strict(calls)
        credential_rows(calls, image)
        if not self._strict_by:
            self._queue(calls)
        calls.run()
        if not self._strict_by:
            self._threads.complete()
        injection = target.injection
        registers = Registers.from_buffer_copy(leader.registers)
        ptrace.set_xstate(target.pid, leader.xstate)
        injection.registers, injection.mask = registers, leader.mask

    def _make_strict(self, calls: Calls) -> Calls:
        """While it has the right to, and when nothing is left to do that is going to be handed over."""
        self._queue(calls)
        calls.run()
        self._threads.complete()
        strict.put_on(self.target, self._strict_by)
        return Calls(self.target.injection)

    def _widen_binders(self) -> None:
        target, image = self.target, self.image
        objects = [r.start for r in image.regions if r.file >= 0 and not r.offset]
        running = [Registers.from_buffer_copy(thread.registers).pc for thread in image.threads]
        binder.widen(target.pid, target.injection.memory, objects, running, cpu.here())

    def _outside(self) -> None:
        target, image = self.target, self.image
        leader = image.threads[0]
        with contextlib.suppress(OSError):  # scheduling is a matter of the node's own rights and CPUs
            policy = ctypes.create_string_buffer(leader.policy, 56)
            syscall(NR["sched_setattr"], target.pid, ctypes.addressof(policy), 0)
        if leader.affinity:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(target.pid, leader.affinity)
        with contextlib.suppress(OSError):
            syscall(NR["ioprio_set"], 1, target.pid, leader.io_priority)
        with contextlib.suppress(OSError), open(f"/proc/{target.pid}/oom_score_adj", "w") as file:
            file.write(str(image.oom_score_adj))
        with contextlib.suppress(OSError), open(f"/proc/{target.pid}/coredump_filter", "w") as file:
            file.write(hex(image.core_filter))

    def _limit_rows(self, calls: Calls) -> None:
        # By the process itself, while it still has the rights that the worker may lack towards it.
        now = self._limits_before
        for which, (soft, hard) in enumerate(self.image.limits):
            if (soft, hard) != now[which] or which == resource.RLIMIT_NOFILE:
                calls.add("prlimit64", 0, which, calls.data(struct.pack("<QQ", soft, hard)), 0, must=False)

    def _place_descriptors(self, calls: Calls) -> None:
        # By way of numbers above all others, so that no step overwrites what a later one needs.
        target = self.target
        wanted = sorted({want for _, want, _ in self._placed})
        self._high = max([*wanted, *target.own_fds, 2]) + 1
        soft, hard = self._limits_before[resource.RLIMIT_NOFILE]
        need = self._high + len(self._placed) + 2
        if need > soft:
            raised = calls.data(struct.pack("<QQ", max(need, soft), max(need, hard)))
            calls.add("prlimit64", 0, resource.RLIMIT_NOFILE, raised, 0, label="room for descriptors")
        high = self._high + target.keep_above(calls, self._high)
        for i, (number, _, _) in enumerate(self._placed):
            calls.add("fcntl", number, _F_DUPFD_CLOEXEC, high + i, label="descriptors")
        for i, (_, want, cloexec) in enumerate(self._placed):
            calls.add("dup3", high + i, want, os.O_CLOEXEC if cloexec else 0, label=f"descriptor {want}")
        at = 0
        for number in [*wanted, self._high]:
            if number > at:
                calls.add("close_range", at, number - 1, 0)
            at = number + 1
        calls.add("close_range", high, 0xFFFFFFFF, 0)
        self._add_rows(calls, after_placed(self.image.descriptors, self.image.pid, self.image.pgid))

    @staticmethod
    def _add_rows(calls: Calls, rows: list[Row]) -> None:
        for r in rows:
            arguments = [calls.data(a) if isinstance(a, bytes) else a for a in r.arguments]
            calls.add(r.number, *arguments, must=r.must, label=r.label)

    def _queue(self, calls: Calls) -> None:
        pid = self.image.pid
        for info in self.image.threads[0].pending:
            calls.add("rt_tgsigqueueinfo", pid, pid, info[0], calls.data(info), must=False)
        for info in self.image.shared_pending:
            calls.add("rt_sigqueueinfo", pid, info[0], calls.data(info), must=False)

    def get_set(self) -> None:
        """What `resume` would do that need not wait for it. Raises OSError when it was killed meanwhile.

        Only where it can do without a way back: its end is one with this worker's up to then.
        """
        image = self.image
        waits = len(image.threads) > 1 or image.threads[0].prime or self.front or at_resume(image.descriptors)
        if not self.target.in_place and not waits:
            self._leave()

    def _leave(self) -> None:
        injection = self.target.injection
        injection.leave()
        note.erase()
        injection.finish()
        self._set = True

    def resume(self) -> int:
        """Let it run. Returns its host pid. Raises OSError when it was killed meanwhile."""
        target = self.target
        target.before_resume(self._high)
        if not self._set:
            self._wake()
        if self.image.stopped or target.injection.stopped_by:
            os.kill(target.pid, 19)
        self._threads.detach()
        ptrace.detach(target.pid)
        target.close()
        return target.pid

    def _wake(self) -> None:
        target = self.target
        injection = target.injection
        for r in at_resume(self.image.descriptors):  # few: POSIX locks
            data = next((a for a in r.arguments if isinstance(a, bytes)), b"")
            process_vm.write(target.pid, injection.base + RESUME_DATA, data or b"\0")
            arguments = [injection.base + RESUME_DATA if isinstance(a, bytes) else a for a in r.arguments]
            injection.call_raw(r.number, *arguments)
        if self.front:
            self._put_in_front()
        elapsed, scratch = time.monotonic() - self._arrived, injection.base + RESUME_DATA
        self._threads.finish(elapsed, scratch)
        leader = self.image.threads[0]
        if leader.prime:
            prime(injection, leader.prime, elapsed, scratch)
        self._leave()

    def _put_in_front(self) -> None:
        """It leads the session, and its signals are blocked yet: the kernel lets it."""
        pid, injection = self.target.pid, self.target.injection
        scratch = injection.base + RESUME_DATA
        process_vm.write(pid, scratch, b"/dev/tty\0" + bytes(7) + struct.pack("<i", self.front))
        number = injection.call_raw(NR["open"], scratch, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK, 0)
        if number >= 0:
            injection.call_raw(NR["ioctl"], number, _TIOCSPGRP, scratch + 16)
            injection.call_raw(NR["close"], number)

    def take_files(self) -> dict[int, int]:
        """Our descriptors of the process's regular files, by its own number; the caller's from now on.

        They tell, after its end, how far it has read and written: whoever shares these files at home goes on there. A
        file
        with a lock is left out, since our descriptor would keep the lock; so is what a FUSE server (our daemon) serves.
        """
        plain = [
            e for e in self.image.descriptors if e.get("of", e["kind"]) == "file" and "pos" in e and not e.get("locks")
        ]
        numbers = {entry["fds"][0][0] for entry in plain}
        made = [placed for placed in self._made if placed.target_fd in numbers][:_FILES_FOLLOWED]
        return {
            placed.target_fd: os.dup(placed.local_fd)
            for placed in made
            if not is_fuse(b"/proc/self/fd/%d" % placed.local_fd)
        }

    def close(self) -> None:
        """Close the files the worker opened."""
        self._books.close()
        for fd in self._opened:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._opened = []
        close_all(self._made)
        self._made = []

"""Everything that cannot move, by name. The last row of the table: it matches whatever no other kind knows."""

from __future__ import annotations

import os

from engine.descriptors.model import Entry, Kind, Probe, Refusal, Source, Target

_NAMES = {
    b"anon_inode:[io_uring]": "is an io_uring",
    b"anon_inode:[userfaultfd]": "is a userfaultfd",
    b"anon_inode:[fanotify]": "is a fanotify group",
    b"anon_inode:[perf_event]": "is a performance counter (perf_event_open)",
    b"anon_inode:bpf-map": "is a BPF map",
    b"anon_inode:bpf-prog": "is a BPF program",
    b"anon_inode:bpf_link": "is a BPF link",
    b"anon_inode:kvm-vm": "is a virtual machine (KVM)",
    b"anon_inode:seccomp notify": "is a seccomp listener",
    b"anon_inode:[landlock-ruleset]": "is a Landlock rule set",
    b"anon_inode:[fscontext]": "is a file-system context",
}
_NAMESPACES = tuple(b"%b:[" % name for name in b"mnt net pid uts ipc user cgroup time".split())


def _refuse(_: Source, probe: Probe) -> Entry:
    if probe.link in _NAMES:
        raise Refusal(_NAMES[probe.link])
    if probe.link.startswith(b"anon_inode:kvm-vcpu"):
        raise Refusal("is a virtual processor (KVM)")
    if probe.link.startswith(_NAMESPACES):
        raise Refusal(f"is a namespace ({os.fsdecode(probe.link)})")
    raise Refusal(f"is of a kind that cannot move ({os.fsdecode(probe.link)})")


def _never(_: Target, entry: Entry) -> int:
    raise ValueError(f"a descriptor of kind {entry['kind']} is never built")


KINDS = (Kind("other", lambda _, __: True, _refuse, _never),)

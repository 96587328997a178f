"""The Python mirror of the C header (bpfs/procs/csrc/mux.h)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpfs.errors import BpfsError, ProtocolError
from bpfs.wire import mux
from bpfs.wire.mux import ChanKind, Ctl, Packet, channels_of, ghost_table, unpack
from tests.procs.ghost_rig import external

SOURCES = Path(mux.__file__).resolve().parent.parent / "procs" / "csrc"


def test_sizes_and_numbers_are_those_of_the_header(tmp_path: Path) -> None:
    program = tmp_path / "layout"
    subprocess.run(["make", "-s", "-C", SOURCES, "layout", f"OUT={program}"], check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    header = {name: int(value) for name, value in map(str.split, lines)}
    mirror = {f"C_{member.name}": member.value for member in Ctl}
    mirror |= {f"K_{member.name}": member.value for member in ChanKind}
    mirror |= {"MAX_CHANS": mux.MAX_CHANS, "MAX_FDS": mux.MAX_FDS, "ctl": mux.MAX_PACKET, "ctl.head": mux.HEAD_BYTES}
    mirror |= {"chan_record": mux.RECORD_BYTES, "ctl.value": mux.HEAD_BYTES - 8, "frame": 8, "birth": mux.BIRTH.size}
    assert mirror == header


@given(st.integers(0, 2**32 - 1), st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=4064))
def test_packets_come_back(kind: int, number: int, value: int, text: bytes) -> None:
    packet = Packet(kind, number, -1, 0, number, value, text)
    assert unpack(packet.pack()) == packet


@given(st.binary(max_size=100))
def test_any_bytes_are_a_packet_or_an_error(data: bytes) -> None:
    try:
        assert unpack(data).pack()[: len(data)][32:] == data[32:]
    except ProtocolError:
        assert len(data) < mux.HEAD_BYTES


def test_terminals_are_one_channel_and_come_first() -> None:
    channels = channels_of(
        [external(5, "pipe", os.O_RDONLY), external(2, "tty", os.O_WRONLY), external(0, "tty", os.O_RDWR, [0, 9])]
    )
    assert [(c.number, c.kind, c.access, c.fds) for c in channels] == [
        (0, ChanKind.TTY, os.O_RDWR, [0, 2, 9]),
        (1, ChanKind.PIPE, os.O_RDONLY, [5]),
    ]
    # The ghost works with the first descriptor: one that reads and writes.
    assert ghost_table(channels)[:8] == bytes([0, 1, 2, 3, 0, 0, 0, 0])


def test_too_much_is_refused() -> None:
    with pytest.raises(BpfsError):
        channels_of(external(fd, "pipe", os.O_RDONLY) for fd in range(65))
    with pytest.raises(BpfsError):
        Packet(1, text=bytes(4065)).pack()

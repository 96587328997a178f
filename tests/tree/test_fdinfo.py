# SPDX-License-Identifier: GPL-2.0-or-later
"""What fdinfo tells of a descriptor is what fstat(2) and lseek(2) would tell."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bpfs.fdinfo import inode_and_offset


def test_inode_and_offset(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    fd = os.open(file, os.O_RDONLY)
    try:
        os.read(fd, 7)
        assert inode_and_offset(fd) == (os.fstat(fd).st_ino, 7)
    finally:
        os.close(fd)
    with pytest.raises(OSError):
        inode_and_offset(fd)

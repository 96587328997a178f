"""The configuration file: what it understands, and how it complains."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpfs import config
from bpfs.config import KEYWORDS, Config, NodeEntry, parse
from bpfs.errors import ConfigError

WHOLE = """
# A cluster as ClusterWare would write it.
interface eth1
nodes 32
iprange 192.168.1.100 192.168.1.131   # for nodes
bprocport 2223
lease 12.5
pingtimeout 20
key "/etc/beowulf/my key"
mount /srv/bpfs
node 00:50:8B:D3:47:A5
node off
node 7 00:50:8b:d3:07:8b 00:50:8b:d3:07:8c
node 00:50:8b:d3:6f:30
"""


def test_whole_file():
    read = parse(WHOLE, "config")
    assert (read.interface, read.nodes, read.port) == ("eth1", 32, 2223)
    assert read.ranges == [("192.168.1.100", "192.168.1.131")]
    assert (read.lease, read.silence) == (12.5, 20)
    assert (read.key, read.mount) == (Path("/etc/beowulf/my key"), "/srv/bpfs")
    assert [entry.number for entry in read.entries] == [0, 1, 7, 8]
    assert read.entries[2] == NodeEntry(7, ("00:50:8b:d3:07:8b", "00:50:8b:d3:07:8c"))


def test_numbers_by_hardware_address():
    read = parse(WHOLE, "config")
    assert read.number_for(("00:00:00:00:00:01", "00:50:8b:d3:07:8c")) == 7
    assert read.number_for(("00:00:00:00:00:01",)) is None


def test_empty_file_is_the_defaults():
    assert parse("", "config") == Config()


def test_master_waits_longer_than_any_lease():
    for lease in (0.1, 1, 30, 86400):
        assert parse(f"lease {lease}", "config").silence >= lease + 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("\ninterfac eth1", "f:2: unknown keyword 'interfac'; the nearest known one is 'interface'"),
        ("pingtimout 3", "f:1: unknown keyword 'pingtimout'; the nearest known one is 'pingtimeout'"),
        ("nodes", "f:1: write: nodes COUNT"),
        ("nodes 3 4", "f:1: write: nodes COUNT"),
        ("nodes many", "f:1: nodes must be a number from 1 to 100000, not 'many'"),
        ("bprocport 65536", "f:1: bprocport must be a number from 0 to 65535, not '65536'"),
        ("iprange 10.0.0.9 10.0.0.1", "f:1: 10.0.0.9 comes after 10.0.0.1"),
        ("iprange 10.0.0.300", "f:1: '10.0.0.300' is no network address"),
        ("iprange 10.0.0.1 ::1", "f:1: 10.0.0.1 and ::1 are not of the same kind"),
        ("node zebra", "f:1: 'zebra' is no hardware address"),
        ("node 00:00:00:00:00:01\nnode 00:00:00:00:00:01", "f:2: 00:00:00:00:00:01 belongs to node 0 already"),
        ("node 3 off\nnode 3 off", "f:2: node 3 is there already"),
        ("lease never", "f:1: lease must be seconds from 0.1 to 86400, not 'never'"),
        ("lease nan", "f:1: lease must be seconds from 0.1 to 86400, not 'nan'"),
        ("lease 30\npingtimeout 30", "f: pingtimeout (30) must be more than lease (30)"),
        ("mount bpfs", "f:1: the mount point must be an absolute path, not 'bpfs'"),
        ("contentlimit 1G", "f:1: contentlimit must be at most 192M, not 1G"),
        ('key "half', "f:1: no closing quotation"),
    ],
)
def test_complaints(text, complaint):
    with pytest.raises(ConfigError) as caught:
        parse(text, "f")
    assert str(caught.value) == complaint


@given(st.text())
def test_any_text_is_read_or_refused(text):
    try:
        parse(text, "f")
    except ConfigError as error:
        assert "\n" not in str(error)


@given(st.sampled_from(sorted(KEYWORDS)), st.lists(st.text(max_size=20), max_size=4))
def test_any_arguments_are_read_or_refused(keyword, words):
    try:
        parse(f"{keyword} {' '.join(words)}", "f")
    except ConfigError as error:
        assert "\n" not in str(error)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        config.read(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no UTF-8 text"):
        config.read(tmp_path / "binary")

"""The object store on a real directory, and what of the master's files is let out."""

from __future__ import annotations

import hashlib
import mmap
import os
from errno import EBADMSG, EISDIR, ELOOP, ENOENT, ENOTDIR
from pathlib import Path

import pytest

from bpfs.view.exports import DEFAULT, Exports
from bpfs.view.files import Digests, Files
from bpfs.view.store import Store


def put(store: Store, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    os.close(store.put(digest, len(data), iter([data])))
    return digest


def read(store: Store, digest: str) -> bytes:
    fd = store.open(digest)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


def has(store: Store, digest: str) -> bool:
    return (store.directory / digest).exists()


def test_objects_come_whole_or_not_at_all(tmp_path):
    store = Store(tmp_path / "objects", 0)
    digest = put(store, b"content")
    assert read(store, digest) == b"content"
    with pytest.raises(OSError) as caught:
        store.put(digest, 7, iter([b"contenT"]))
    assert caught.value.errno == EBADMSG
    assert sorted(os.listdir(store.directory)) == [digest]
    assert read(store, digest) == b"content"


def test_a_store_finds_what_an_earlier_one_left_and_checks_it(tmp_path):
    first = Store(tmp_path, 0)
    good, bad = put(first, b"good"), put(first, b"bad")
    (tmp_path / bad).chmod(0o644)
    (tmp_path / bad).write_bytes(b"bat")
    (tmp_path / ".part-9").write_bytes(b"half")
    store = Store(tmp_path, 0)
    assert (store.objects, store.size) == (2, 7)
    assert read(store, good) == b"good"
    with pytest.raises(FileNotFoundError):
        store.open(bad)
    assert os.listdir(tmp_path) == [good]
    assert (store.statistics.damaged, store.objects) == (1, 1)


def test_the_oldest_go_first_and_never_what_is_open_or_mapped(tmp_path):
    store = Store(tmp_path, 4 * 1000)
    opened, mapped, old, used = (put(store, bytes([n]) * 1000) for n in range(4))
    fd = store.open(opened)
    other = store.open(mapped)
    memory = mmap.mmap(other, 1000, prot=mmap.PROT_READ)
    os.close(other)
    read(store, used)
    new = put(store, bytes([9]) * 1000)
    assert [has(store, it) for it in (opened, mapped, old, used, new)] == [True, True, False, True, True]
    assert store.purge() == 2
    assert [has(store, it) for it in (opened, mapped)] == [True, True]
    memory.close()
    os.close(fd)
    assert store.purge() == 2 and os.listdir(tmp_path) == []


def test_nothing_outside_of_the_exports_is_served(tmp_path):
    shown = tmp_path / "shown"
    (shown / "sub").mkdir(parents=True)
    (shown / "file").write_text("x")
    (tmp_path / "hidden").write_text("secret")
    (shown / "link").symlink_to(tmp_path / "hidden")
    (shown / "folder").symlink_to(tmp_path)
    os.mkfifo(shown / "fifo")
    files = Files(Exports([str(shown), "/etc"], [str(shown / "sub/never")]))
    os.close(files.open(f"{shown}/file"))
    refused = {
        f"{tmp_path}/hidden": ENOENT,
        f"{shown}/../hidden": ENOENT,
        f"{shown}/sub/../../hidden": ENOENT,
        f"{shown}/./file": ENOENT,
        f"{shown}/link": ELOOP,
        f"{shown}/folder/hidden": ELOOP,
        f"{shown}/file/x": ENOTDIR,
        f"{shown}/sub": EISDIR,
        f"{shown}/sub/never": ENOENT,
        "/etc/shadow": ENOENT,
        "/etc/beowulf/key": ENOENT,
        "shown/file": ENOENT,
        "": ENOENT,
        "/root/.bashrc": ENOENT,
    }
    for path, errno in refused.items():
        with pytest.raises(OSError) as caught:
            os.close(files.open(path))
        assert caught.value.errno == errno, path
    with pytest.raises(OSError, match="no regular file"):
        files.open(f"{shown}/fifo")
    assert [name for name, _ in files.list(str(tmp_path))] == ["shown"]
    assert "shadow" not in [name for name, _ in files.list("/etc")]
    with pytest.raises(FileNotFoundError):
        files.list("/proc")


def test_the_default_shows_programs_and_no_secrets():
    exports = Exports()
    for path in ("/usr/bin/true", "/lib64/ld-linux-x86-64.so.2", "/etc/ld.so.cache", "/etc/python3.11/x"):
        assert exports.holds(path), path
    for path in ("/etc/shadow", "/etc/ssh/ssh_host_rsa_key", "/root", "/home", "/etc/beowulf/key", "/usrx", "/var/lib"):
        assert not exports.shows(path), path
    assert exports.leads("/etc") and not exports.holds("/etc")
    assert set(Exports(["default", "/srv/x"]).patterns) == {*DEFAULT, "/srv/x"}
    assert not Exports(["/etc"]).shows("/etc/shadow-")


def test_slashes_wild_cards_and_odd_names():
    exports = Exports(["/", "/srv/a?/x*/sub"], ["/data/secret"])
    for path in ("/", "//", "/a\nb", "/data", "/data/secrets", "/data/secret\n", "/etc/ssh/x_keys", "/srv/[a]"):
        assert exports.holds(path), path
    for path in ("/data/secret", "//data//secret/", "/etc//shadow", "/etc/ssh//x_key/", "/etc/shadow/x"):
        assert not exports.shows(path), path
    wild = Exports(["/srv/a?/x*/sub", "/srv/[b]"])
    for path in ("/srv/ab/x/sub", "/srv/ab/xyz/sub/file", "/srv/[b]"):
        assert wild.holds(path), path
    for path in ("/", "/srv", "/srv/ab", "/srv/ab/xyz"):
        assert wild.leads(path) and not wild.holds(path), path
    for path in ("/srv/a/x/sub", "/srv/ab/x/y/sub", "/srv/abc", "/srv/ab/x/subs", "/srv/b", "/sr"):
        assert not wild.shows(path), path


def test_a_digest_is_computed_once_and_not_kept_of_what_has_just_changed(tmp_path):
    digests, path = Digests(), tmp_path / "file"
    path.write_text("one")
    fd = os.open(path, os.O_RDONLY)
    try:
        first, status = digests.of(fd)
        assert first == hashlib.sha256(b"one").hexdigest()
        assert digests.known(status) == ""  # it is too young: another change might leave the same times
        settled = Path("/usr/bin/env")
        again = os.open(settled, os.O_RDONLY)
        digest, status = digests.of(again)
        os.close(again)
        assert digests.known(status) == digest == hashlib.sha256(settled.read_bytes()).hexdigest()
    finally:
        os.close(fd)

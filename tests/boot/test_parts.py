"""The parts of network boot that need no machine: frames, texts, requests, archives, modules."""

from __future__ import annotations

import hashlib
import shutil
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boot import cpio, dhcp, httpd, manifest, pxe, rarp, signature
from boot.directory import UNKNOWN_MOST, Assign, Directory
from boot.elf import Elf, NotElf
from boot.errors import BootError
from boot.kernel import plain
from boot.node.network import common_prefix

MAC = bytes.fromhex("525400000001")
SERVER = bytes.fromhex("525400000099")


def test_a_request_and_its_answer() -> None:
    asked = rarp.parse(rarp.request(MAC))
    assert asked is not None and asked.operation is rarp.Operation.REQUEST and asked.target == MAC
    told = rarp.parse(rarp.reply(SERVER, bytes([10, 0, 0, 1]), MAC, bytes([10, 0, 0, 7])))
    assert told is not None and told.operation is rarp.Operation.REPLY
    assert (told.target, told.address, told.sender_address) == (MAC, bytes([10, 0, 0, 7]), bytes([10, 0, 0, 1]))


@given(st.binary(max_size=80))
def test_no_frame_is_too_odd(frame: bytes) -> None:
    rarp.parse(frame)


@given(st.binary(max_size=28), st.integers(0, 42))
def test_a_frame_that_was_changed_is_no_other_kind(noise: bytes, where: int) -> None:
    frame = rarp.request(MAC)
    changed = rarp.parse(frame[:where] + noise + frame[where + len(noise) :])
    assert changed is None or (changed.target != bytes(6) and not changed.target[0] & 1)


@given(st.binary(max_size=300))
def test_no_request_is_too_odd(head: bytes) -> None:
    try:
        request = httpd.parse(head + b"\r\n\r\n")
    except httpd.Refused as refusal:
        assert refusal.status in (400, 405)
    else:
        assert request.method in ("GET", "HEAD") and request.start >= 0


@pytest.mark.parametrize(
    ("head", "start", "end"),
    [
        (b"GET /a HTTP/1.1\r\n\r\n", 0, None),
        (b"GET /a HTTP/1.1\r\nrange: bytes=5-\r\n\r\n", 5, None),
        (b"GET /a HTTP/1.1\r\nRange: bytes=5-9\r\n\r\n", 5, 10),
        (b"GET /a HTTP/1.1\r\nRange: bytes=-9\r\n\r\n", 0, None),
    ],
)
def test_ranges(head: bytes, start: int, end: int | None) -> None:
    request = httpd.parse(head)
    assert (request.start, request.end) == (start, end)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("keys") / "bootkey"
    signature.ensure_key(path)
    return path, signature.public_key(path)


PXE = (
    b"\1\1\6\0" + bytes(24) + MAC + bytes(10 + 192) + bytes([99, 130, 83, 99]) + b"\x35\1\1"
    b"\x3c\x09PXEClient\x5d\2\0\0\xff"
)  # fmt: skip


@given(st.binary(max_size=400))
def test_no_datagram_is_too_odd(data: bytes) -> None:
    assert dhcp.parse(data) is None
    pxe.parse_request(data)
    pxe.parse_request(b"\0\1" + data + b"\0")


@given(st.integers(0, len(PXE)), st.binary(max_size=40))
def test_a_changed_request_is_another_sound_one_or_none(where: int, noise: bytes) -> None:
    packet = dhcp.parse(PXE[:where] + noise + PXE[where + len(noise) :])
    if packet is not None:
        answer = dhcp.reply(packet, SERVER[:4], MAC[:4], bytes(4), "undionly.kpxe")
        assert len(answer) >= 300 and answer[0] == 2 and dhcp.parse(answer) is None  # servers do not answer each other


def test_who_is_answered_by_dhcp() -> None:
    packet = dhcp.parse(PXE)
    assert packet is not None and (packet.client, packet.mac) == (dhcp.Client.BIOS, MAC)
    assert dhcp.parse(PXE.replace(b"PXEClient", b"MSFT 5.0.")) is None
    assert dhcp.parse(PXE.replace(b"\x5d\2\0\0", b"\x5d\2\0\6")) is None  # a 32-bit UEFI: nothing here runs there


def test_what_is_read_of_a_tftp_request() -> None:
    assert pxe.parse_request(b"\0\1/a\0OCTET\0blksize\x009999\0tsize\x000\0") == ("a", {"blksize": 1428, "tsize": 0})
    assert pxe.parse_request(b"\0\1a\0octet\0blksize\x007\0") == ("a", {})
    for other in (b"\0\2a\0octet\0", b"\0\1a\0netascii\0", b"\0\1a\0octet", b"\0\1a\0"):
        assert pxe.parse_request(other) is None


def test_a_text_is_believed_with_its_proof_only(keys: tuple[Path, bytes], tmp_path: Path) -> None:
    private, public = keys
    text = manifest.signed({"node": "3", "append": "quiet panic=10"}, partial(signature.sign, path=private))
    assert manifest.check(text, public, "text")["append"] == "quiet panic=10"
    zeros = text.rpartition(b"proof ")[0] + b"proof " + bytes(len(public)).replace(b"\0", b"0") + b"\n"
    for wrong in (text.replace(b"3", b"4", 1), text[:-2], b"", b"proof ", text + b"x y\n", zeros):
        with pytest.raises(BootError):
            manifest.check(wrong, public, "text")
    odd = b"3" if public.endswith(b"1") else b"1"
    for other in (public[:-1] + odd, public[:64], b"", b"x"):
        with pytest.raises(BootError):
            manifest.check(text, other, "text")


@given(st.binary(max_size=400), st.binary(max_size=400))
def test_no_signature_is_too_odd(data: bytes, proof: bytes) -> None:
    for odd in (proof, proof.hex().encode(), b"-" + proof.hex().encode()):
        assert not signature.verify(data, odd, b"f" * 768)


def test_the_boot_key_is_made_once_and_is_its_owners(keys: tuple[Path, bytes], tmp_path: Path) -> None:
    private, public = keys
    signature.ensure_key(private)
    assert signature.public_key(private) == public and stat.S_IMODE(private.stat().st_mode) == 0o600
    open_to_all = tmp_path / "open"
    open_to_all.write_bytes(private.read_bytes())
    open_to_all.chmod(0o644)
    with pytest.raises(BootError, match="can be read by others"):
        signature.public_key(open_to_all)


@pytest.mark.parametrize("text", ["", "name 5", f"a/b 5 {'0' * 64}", f"name x {'0' * 64}", f"name 5 {'0' * 63}"])
def test_a_manifest_that_says_nothing_of_use(text: str) -> None:
    with pytest.raises(BootError):
        manifest.Blob.parse(text, "kernel")


def test_an_archive_is_the_same_whatever_the_order() -> None:
    entries = [cpio.file("a/b", b"one"), cpio.link("c", "a/b"), cpio.file("a/d", b"", 0o755)]
    assert cpio.archive(entries) == cpio.archive(reversed(entries))
    with pytest.raises(ValueError):
        cpio.archive([cpio.file("a", b"1"), cpio.file("a", b"2")])


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_an_archive_is_read_by_others(tmp_path: Path) -> None:
    entries = [cpio.file("a/b", b"one", 0o600), cpio.link("c", "a/b"), cpio.directory("tmp", 0o1777)]
    subprocess.run(["cpio", "-idm", "--quiet"], input=cpio.archive(entries), cwd=tmp_path, check=True)
    assert (tmp_path / "c").read_bytes() == b"one"
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "tmp").stat().st_mode) == 0o1777


def test_a_program_without_its_symbols_still_runs(tmp_path: Path) -> None:
    program = Path(shutil.which("true") or "/bin/true").resolve()
    small = tmp_path / "true"
    small.write_bytes(Elf(program.read_bytes()).loadable())
    small.chmod(0o755)
    assert subprocess.run([small], check=False).returncode == 0


@given(st.binary(max_size=200))
def test_no_elf(noise: bytes) -> None:
    for data in (noise, b"\x7fELF\x02\x01" + noise):
        try:
            Elf(data).needed()
        except (NotElf, ValueError, IndexError):
            pass


def test_names_of_modules() -> None:
    assert plain("virtio-net.ko.xz") == plain("virtio_net") == "virtio_net"


@pytest.mark.parametrize(("one", "other", "bits"), [("10.0.0.1", "10.0.0.2", 30), ("10.0.0.1", "10.0.1.1", 23)])
def test_the_smallest_network_with_both(one: str, other: str, bits: int) -> None:
    assert common_prefix(one, other) == bits


def _directory(assign: Assign) -> Directory:
    numbers = {"52:54:00:00:00:01": 4}

    def append(mac: str) -> int:
        numbers[mac] = 5
        return 5

    return Directory(numbers, lambda number: f"10.0.0.{number}", assign, append, lambda number: {"node": str(number)})


def test_what_becomes_of_unknown_machines() -> None:
    assert _directory(Assign.LOCKED).number("52:54:00:00:00:01") == 4
    locked, manual, append = (_directory(assign) for assign in (Assign.LOCKED, Assign.MANUAL, Assign.APPEND))
    for number in range(2 * UNKNOWN_MOST):
        mac = f"52:54:00:00:{number >> 8:02x}:{number & 255:02x}"
        if number != 1:
            assert locked.number(mac) is None and manual.number(mac) is None
    assert not locked.unknown and len(manual.unknown) == UNKNOWN_MOST
    assert append.number("52:54:00:00:00:07") == 5 and append.by_address("10.0.0.5") == 5


def test_the_same_text_is_compiled_to_the_same_bytes() -> None:
    program = (
        "import sys; from boot import python; import hashlib;"
        "text = open(python.__file__).read();"
        "sys.stdout.write(hashlib.sha256(python.compiled_text(text, 'x')).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True,
            cwd=Path(__file__).parents[2],
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(digests) == 1 and len(digests.pop()) == len(hashlib.sha256().hexdigest())

"""The boot server as bpmaster starts it, asked by the very code that runs on a booting node, over a real network."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot import signature
from bpfs.config import read
from tests.boot.lab import ADDRESS, TOP, Lab, mac, python
from tests.cluster.virtual import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

KNOWN, ELSEWHERE, STRANGER = 0, 1, 7


@pytest.fixture(scope="module")
def lab(session_folder: Path) -> Iterator[Lab]:
    lab = Lab(session_folder / "bootd", machines=2, config="pxe br0")
    try:
        lab.open()
        lab.make_small_images()
        lab.start()
        for number in (KNOWN, STRANGER):
            lab.add_client(number)
        yield lab
    finally:
        lab.close()


def blob(lab: Lab, what: str) -> Path:
    """The file of the present kernel or image."""
    (found,) = lab.images.glob(f"{what}-*")
    return found


def test_a_node_gets_kernel_image_and_its_own_text(lab: Lab) -> None:
    done = lab.client(KNOWN, "boot", lab.public())
    assert done.returncode == 0, done.stderr
    kernel, image, proofs = done.stdout.splitlines()
    data = blob(lab, "kernel").read_bytes()
    assert kernel == f"{hashlib.sha256(data).hexdigest()} {len(data)}"
    assert int(image.split()[1]) > blob(lab, "image").stat().st_size and proofs == "1"
    assert lab.read("nodes/0/state") == "boot\n"
    wait_until(lambda: lab.read("nodes/0/reason") == "fetching image 100 %\n", "no progress is shown")
    assert f"{mac(KNOWN)} asked, and is 10.54.0.10" in lab.read("nodes/0/log")


def test_a_node_believes_nobody_without_the_key(lab: Lab, tmp_path: Path) -> None:
    signature.ensure_key(tmp_path / "other")
    done = lab.client(KNOWN, "boot", signature.public_key(tmp_path / "other").decode())
    assert done.returncode == 1 and "not signed with this cluster's boot key" in done.stderr


def test_what_was_damaged_on_its_way_is_not_taken(lab: Lab) -> None:
    path = blob(lab, "image")
    good = path.read_bytes()
    try:
        path.write_bytes(good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])
        done = lab.client(KNOWN, "boot", lab.public())
    finally:
        path.write_bytes(good)
    assert done.returncode == 1 and "the image was damaged on its way, 3 times" in done.stderr


def test_a_stranger_is_listed_and_gets_nothing(lab: Lab) -> None:
    assert lab.client(STRANGER, "ask", "0.6").stdout == ""
    wait_until(lambda: mac(STRANGER) in lab.read("boot/unknown"), "the stranger is not listed")
    # With a node's address it is still not the node's machine; with none of ours it is nobody.
    for address in ("10.54.0.11", "10.54.0.200"):
        done = lab.client(STRANGER, "http", address, r"GET /node HTTP/1.1\r\n\r\n")
        assert done.stdout == "HTTP/1.1 403 Forbidden\n", done.stderr


ODD = {
    r"GET /../config HTTP/1.1\r\n\r\n": "HTTP/1.1 404 Not Found",
    r"GET /%2e%2e/key HTTP/1.1\r\n\r\n": "HTTP/1.1 404 Not Found",
    r"GET //etc/passwd HTTP/1.1\r\n\r\n": "HTTP/1.1 404 Not Found",
    r"GET /phase1.img HTTP/1.1\r\n\r\n": "HTTP/1.1 404 Not Found",
    r"GET http://10.54.0.1/manifest HTTP/1.1\r\n\r\n": "HTTP/1.1 404 Not Found",
    r"POST /manifest HTTP/1.1\r\n\r\n": "HTTP/1.1 405 Method Not Allowed",
    r"\x00\xff\x16\x03\r\n\r\n": "HTTP/1.1 400 Bad Request",
    r"GET /manifest": "nothing",
    "x" * 20000: "nothing",
    r"GET /manifest HTTP/1.1\r\n\r\n": "HTTP/1.1 200 OK",
}


def test_odd_requests_get_a_status_and_no_file(lab: Lab) -> None:
    done = lab.client(STRANGER, "http", "10.54.0.200", *ODD)
    assert done.stdout.splitlines() == list(ODD.values()), done.stderr


def test_of_drivers_there_are_those_that_the_list_names(lab: Lab) -> None:
    listed = blob(lab, "driver").name
    (lab.images / "driver-decoy").write_bytes(b"no driver")
    requests = {
        rf"GET /{listed} HTTP/1.1\r\n\r\n": "HTTP/1.1 200 OK",
        r"GET /driver-decoy HTTP/1.1\r\n\r\n": "HTTP/1.1 404 Not Found",
        rf"GET /{blob(lab, 'drivers').name} HTTP/1.1\r\n\r\n": "HTTP/1.1 200 OK",
    }
    done = lab.client(STRANGER, "http", "10.54.0.200", *requests)
    assert done.stdout.splitlines() == list(requests.values()), done.stderr


def test_ranges(lab: Lab) -> None:
    path = blob(lab, "kernel")
    size = path.stat().st_size
    requests = {
        rf"GET /{path.name} HTTP/1.1\r\nRange: bytes={size - 1}-\r\n\r\n": "HTTP/1.1 206 Partial Content",
        rf"GET /{path.name} HTTP/1.1\r\nRange: bytes={size}-\r\n\r\n": "HTTP/1.1 416 Range Not Satisfiable",
        rf"HEAD /{path.name} HTTP/1.1\r\n\r\n": "HTTP/1.1 200 OK",
    }
    done = lab.client(STRANGER, "http", "10.54.0.200", *requests)
    assert done.stdout.splitlines() == list(requests.values()), done.stderr


def test_a_flood_of_frames_ends_nothing(lab: Lab) -> None:
    done = lab.client(STRANGER, "noise", "3000")
    assert done.returncode == 0, done.stderr
    assert lab.client(KNOWN, "ask", "20").stdout == "10.54.0.10\n"
    assert len(lab.read("boot/unknown").splitlines()) <= 256


ROMS = {
    "bios": "10.54.0.10 undionly.kpxe", "uefi": "10.54.0.10 ipxe.efi", "http": "10.54.0.10 http://10.54.0.1:933/ipxe.efi",
    "ipxe": "10.54.0.10 http://10.54.0.1:933/phase1.ipxe",
}  # fmt: skip


def test_network_cards_are_told_what_they_can_boot(lab: Lab) -> None:
    for kind, answer in ROMS.items():
        done = lab.client(KNOWN, "rom", kind, "20")
        assert done.stdout == f"{answer}\n", done.stderr
    assert "its bios gets undionly.kpxe" in lab.read("nodes/0/log")
    # An installed system that asks for an address is none of ours, and a stranger's card is listed only.
    assert lab.client(KNOWN, "rom", "system", "0.6").stdout == ""
    assert lab.client(STRANGER, "rom", "bios", "0.6").stdout == ""
    wait_until(lambda: mac(STRANGER) in lab.read("boot/unknown"), "the stranger is not listed")


def test_nobody_is_answered_on_an_interface_that_was_not_named(lab: Lab) -> None:
    lab.add_client(ELSEWHERE, beside="10.55.0.1/24")  # a machine that is a node, with a cable to the wrong switch
    assert lab.client(ELSEWHERE, "ask", "1").stdout == ""
    assert lab.client(ELSEWHERE, "rom", "bios", "1").stdout == ""
    lab.drop_client(ELSEWHERE)
    assert lab.client(KNOWN, "rom", "bios", "20").stdout == f"{ROMS['bios']}\n"


def test_boot_programs_are_handed_out_by_tftp_and_http_and_nothing_else(lab: Lab) -> None:
    content = os.urandom(400_000)
    (lab.images / "undionly.kpxe").write_bytes(content)
    done = lab.client(KNOWN, "tftp", "10.54.0.10", "undionly.kpxe", "20")
    assert done.stdout == f"{hashlib.sha256(content).hexdigest()} {len(content)}\n", done.stderr
    for name in ("../key", "/etc/passwd", "manifest"):
        assert lab.client(KNOWN, "tftp", "10.54.0.10", name, "0.3").stdout == "nothing\n"
    assert lab.client(STRANGER, "tftp", "10.54.0.200", "undionly.kpxe", "0.3").stdout == "nothing\n"
    done = lab.client(KNOWN, "http", "10.54.0.10", r"GET /undionly.kpxe HTTP/1.1\r\n\r\n")
    assert done.stdout == "HTTP/1.1 200 OK\n"


def test_a_node_whose_machine_is_off_is_woken(lab: Lab) -> None:
    with lab.start_client(STRANGER, "wake", "20") as client:
        try:
            lab.write("nodes/1/state", "up")
            assert client.communicate(timeout=30)[0] == f"{mac(1)}\n"
        finally:
            client.kill()
    assert lab.read("nodes/1/state") == "boot\n" and lab.read("nodes/1/reason") == "its machine was told to start\n"


def test_a_booted_node_passes_kernel_and_image_on(lab: Lab, session_folder: Path) -> None:
    folder = session_folder / "seed"
    peer = "10.54.0.10"
    arguments = [peer, ADDRESS, "933", str(folder)]
    lab.client(KNOWN, "http", peer, r"GET /peers HTTP/1.1\r\n\r\n")  # gives it its address
    # A stranger cannot announce itself.
    assert lab.client(STRANGER, "http", "10.54.0.200", r"GET /seed HTTP/1.1\r\n\r\n").stdout.startswith("HTTP/1.1 403")
    lab.add_client(1)
    with subprocess.Popen(
        ["ip", "netns", "exec", f"{lab.name}c{KNOWN}", *python("boot.node.seed", *arguments)], cwd=TOP
    ) as seed:
        try:
            wait_until(lambda: (folder / "manifest").exists(), "the node has not fetched what it is to pass on")
            wait_until(lambda: peer in lab.peers(STRANGER), "the node has not announced itself")
            # The master may lose its own: the peer has them.
            here = [blob(lab, what) for what in ("kernel", "image")]
            for path in here:
                path.rename(path.with_name(f"hidden-{path.name}"))
            try:
                done = lab.client(1, "boot", lab.public())
            finally:
                for path in here:
                    path.with_name(f"hidden-{path.name}").rename(path)
            assert done.returncode == 0, done.stderr
            # The master is told how far it is.
            wait_until(lambda: lab.read("nodes/1/reason").startswith("fetching kernel"), "no progress is shown")
            assert "it passes kernel and image on" in lab.read("nodes/0/log")
            # What a peer has damaged is fetched from the master.
            (damaged,) = folder.glob("image-*")
            content = damaged.read_bytes()
            damaged.write_bytes(bytes([content[0] ^ 1]) + content[1:])
            done = lab.client(1, "boot", lab.public())
            assert done.returncode == 0 and "the image was damaged on its way" in done.stderr
        finally:
            seed.kill()
    # It is gone, and nobody knows yet.
    done = lab.client(1, "boot", lab.public())
    assert done.returncode == 0 and f"{peer} does not pass the kernel on: Connection refused" in done.stderr


def test_a_killed_server_is_started_again(lab: Lab) -> None:
    before = lab.log().count("nodes can boot")
    (server,) = lab.processes("bpfs.cli.bpbootd")
    server.send_signal(signal.SIGKILL)
    wait_until(lambda: lab.log().count("nodes can boot") > before, "the boot server is not started again")
    assert lab.client(KNOWN, "ask", "20").stdout == "10.54.0.10\n"


def test_an_unknown_machine_gets_the_next_number_where_that_is_wanted(lab: Lab) -> None:
    lab.configure("nodeassign append\npxe br0")
    lab.reload()
    try:
        assert lab.client(STRANGER, "ask", "20").stdout == "10.54.0.12\n"
        wait_until((lab.mount / "nodes/2").exists, "the new node is not there")
        assert read(lab.config).number_for((mac(STRANGER),)) == 2
        assert lab.read("nodes/2/state") == "boot\n" and mac(STRANGER) not in lab.read("boot/unknown")
        # Locked again, who is no node is not even listed.
        lab.configure("nodeassign locked\npxe br0")
        lab.reload()
        wait_until(lambda: lab.client(STRANGER, "ask", "0.6").stdout == "", "who is no node any more is answered")
        assert mac(STRANGER) not in lab.read("boot/unknown")
    finally:
        lab.configure("pxe br0")
        lab.reload()

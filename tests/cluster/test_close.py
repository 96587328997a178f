"""`PID close`: sockets that cannot travel are closed on the way, here and there."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.moving import echo, place
from tests.cluster.virtual import cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# Connects to argv[1]; on a line, tells which of its descriptors are open and what its epoll set and its pair still do.
HOLDER = """
import json, os, select, socket, sys
tcp = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.1", 0))
listening = socket.create_server(("127.0.0.1", 0))
twin = os.dup(tcp.fileno())
one, other = socket.socketpair()
poll = select.epoll()
for end in (tcp, one):
    poll.register(end.fileno(), select.EPOLLIN)
print(json.dumps([listening.getsockname()[1]]), flush=True)
for line in sys.stdin:
    found = []
    for fd in (tcp.fileno(), udp.fileno(), listening.fileno(), twin):
        try:
            os.fstat(fd)
            found.append("open")
        except OSError as error:
            found.append(error.errno)
    other.send(b"x")
    events = poll.poll(5)
    print(json.dumps([found, [fd == one.fileno() for fd, _ in events], one.recv(9).decode()]), flush=True)
"""


@pytest.fixture(scope="module")
def it(session_folder):
    with cluster(session_folder / "close", nodes=1) as made:
        yield made


@contextmanager
def holder(port: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline())[0]
    finally:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[str]) -> list[object]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("what is left?\n")
    process.stdin.flush()
    answer: list[object] = json.loads(process.stdout.readline())
    return answer


def test_sockets_are_refused_by_name_or_closed_when_asked(it):
    with socket.create_server(("127.0.0.1", 0)) as server, holder(server.getsockname()[1]) as (process, listens):
        peer, _ = server.accept()
        peer.settimeout(60)
        assert echo(it, process.pid, "nodes/0/migrate").returncode == 1
        reasons = it.read(f"procs/{process.pid}/cantmove")
        assert all(word in reasons for word in ("a TCP socket", "a UDP socket", "a listening TCP socket")), reasons
        assert ask(process)[0] == ["open"] * 4

        done = echo(it, f"{process.pid} close", "nodes/0/migrate")
        assert done.returncode == 0, done.stderr + it.read("nodes/0/migrate")
        assert place(it, process.pid) == "0"
        assert ask(process) == [[9, 9, 9, 9], [True], "x"]  # EBADF; the pair and its place in the epoll set are kept
        assert peer.recv(1) == b"", "the other end has not seen the end"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", listens), timeout=60)
        assert echo(it, process.pid, "nodes/-1/migrate").returncode == 0
        assert ask(process) == [[9, 9, 9, 9], [True], "x"]


def test_nonsense_after_the_number_is_refused(it):
    with socket.create_server(("127.0.0.1", 0)) as server, holder(server.getsockname()[1]) as (process, _):
        for words in ("shut", "close close", "close onexec now"):
            done = echo(it, f"{process.pid} {words}", "nodes/0/migrate")
            assert "Invalid argument" in done.stderr
        wait_until(lambda: ask(process)[0] == ["open"] * 4, "its sockets are closed")

"""What is kept of directories, and for how long."""

from __future__ import annotations

from bpfs.view.beside import KEPT, Beside
from bpfs.view.protocol import Attributes, Entry

ENTRY = Entry(Attributes(*range(8)), "", "", b"")


def test_all_is_asked_for_with_the_second_name_and_once() -> None:
    beside = Beside()
    assert [beside.is_due("/a"), beside.is_due("/b"), beside.is_due("/a")] == [False, False, True]
    beside.keep("/a", {"name": ENTRY})
    assert not beside.is_due("/a") and beside.of("/a") == {"name": ENTRY}
    beside.keep("/b", None)  # too much
    assert not beside.is_due("/b") and beside.of("/b") is None


def test_what_has_changed_is_forgotten() -> None:
    beside = Beside()
    for directory in ("/", "/a", "/a/b", "/ab"):
        beside.keep(directory, {"name": ENTRY})
    beside.forget("/a")
    assert [beside.of(name) is None for name in ("/", "/a", "/a/b", "/ab")] == [False, True, False, False]
    beside.forget_below("/a")
    assert [beside.of(name) is None for name in ("/", "/a", "/a/b", "/ab")] == [False, True, True, False]
    beside.forget_below("/")
    assert beside.of("/") is None and beside.of("/ab") is None


def test_it_is_bounded() -> None:
    beside = Beside()
    for number in range(200):
        beside.keep(f"/{number}", {str(name): ENTRY for name in range(500)})
    left = [number for number in range(200) if beside.of(f"/{number}") is not None]
    assert left == list(range(200 - len(left), 200)) and 0 < len(left) * 501 <= KEPT

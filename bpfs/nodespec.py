# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodespecs: the short way in which every command names nodes.

A nodespec is a list of terms, separated by commas or white space. The nodes come out in the order in which they are
named, each as often as it is named; the terms that stand for many nodes give them in order of their numbers.

=================  ==============================================================================
``5 n5 .5``        one node
``5-10``           a range; every node in it must exist
``5-``             all nodes from 5 on
``-1 master``      the master
``self``           the node that the caller is on
``10.0.0.7``       the node with this address
``all``            all nodes (the master is none of them)
``up allup``       the nodes in this state; any state will do
``notup !up``      the nodes not in this state; also ``allnotup``, ``all!up``
``@file``          the terms in a file, ``#`` starting a comment
=================  ==============================================================================

bpsh, which is written in C for its start-up time, has the same grammar in csrc/nodespec.h; a test holds both together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from errno import EINVAL, ENOENT
from typing import NamedTuple

from bpfs.errors import BpfsError

MASTER = -1

STATES = ("down", "boot", "unavailable", "up", "error", "reboot", "halt", "pwroff")
"""The states that are states even while no node is in them."""

_SEPARATORS = re.compile(r"[, \t\r\n]+")
_RANGE = re.compile(r"[n.]?([0-9]+)(-(?:[n.]?([0-9]+))?)?")
_MASTER = re.compile(r"[n.]?-1|master")
_ADDRESS = re.compile(r"[0-9]+\.[0-9.]+|[0-9a-fA-F]*:[0-9a-fA-F:.]+")

_DIGITS = 9  # of the longest number that is looked up at all
_SHOWN = 40  # characters of a wrong word that a message repeats


class NodespecError(BpfsError):
    """A nodespec is wrong (EINVAL), or names what does not exist (ENOENT); the sentence names it."""


class Candidate(NamedTuple):
    """What a nodespec can tell nodes apart by."""

    number: int
    state: str
    address: str = ""


def read_file(path: str) -> str:
    """Reads the file of an ``@file`` term.

    Raises:
        OSError: as open(2) and read(2).
    """
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def expand(
    spec: str, nodes: Iterable[Candidate], *, current: int = MASTER, read: Callable[[str], str] = read_file
) -> list[int]:
    """Returns the numbers of the nodes that a nodespec names.

    Args:
        spec: the nodespec.
        nodes: all nodes that there are; whether the master is among them makes no difference.
        current: the node that ``self`` stands for.
        read: how to get at the text of a file.

    Raises:
        NodespecError: EINVAL or ENOENT, with a sentence that names the term or the node.
    """
    slaves = sorted((node for node in nodes if node.number >= 0), key=lambda node: node.number)
    found: list[int] = []
    term = ""
    for term in _terms(spec, read):
        found += _term(term, slaves, current)
    if not term:
        raise NodespecError(EINVAL, "the nodespec is empty")
    return found


def _terms(spec: str, read: Callable[[str], str], *, in_file: str = "") -> Iterator[str]:
    for term in filter(None, _SEPARATORS.split(spec)):
        if not term.startswith("@"):
            yield term
        elif term == "@":
            raise NodespecError(EINVAL, "'@' names no file")
        elif in_file:
            raise NodespecError(EINVAL, f"{in_file}: a file of nodes cannot name another file")
        else:
            try:
                text = read(term[1:])
            except OSError as error:
                raise NodespecError(error.errno or EINVAL, f"{term[1:]}: {error.strerror}") from None
            yield from _terms(re.sub(r"#[^\n]*", "", text), read, in_file=term[1:])


def _term(term: str, slaves: Sequence[Candidate], current: int) -> list[int]:
    if _MASTER.fullmatch(term):
        return [MASTER]
    if term == "self":
        return [current]
    if term == "all":
        return [node.number for node in slaves]
    if match := _RANGE.fullmatch(term):
        return _range(term, match, [node.number for node in slaves])
    if _ADDRESS.fullmatch(term):
        numbers = [node.number for node in slaves if node.address == term]
        if not numbers:
            raise NodespecError(ENOENT, f"no node has the address {term[:_SHOWN]}")
        return numbers[:1]
    return _state(term, slaves)


def _range(term: str, match: re.Match[str], numbers: Sequence[int]) -> list[int]:
    first = _number(match[1])
    if match[2] is None:
        wanted = range(first, first + 1)
    elif match[3] is None:
        tail = [number for number in numbers if number >= first]
        if not tail:
            raise NodespecError(ENOENT, f"there is no node {first} or above")
        return tail
    else:
        wanted = range(first, _number(match[3]) + 1)
        if not wanted:
            raise NodespecError(EINVAL, f"the range {term[:_SHOWN]} runs backwards")
    known = set(numbers)
    for number in wanted:
        if number not in known:
            raise NodespecError(ENOENT, f"there is no node {number}")
    return list(wanted)


def _number(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise NodespecError(ENOENT, f"there is no node {digits[:_SHOWN]}")
    return int(digits)


def _state(term: str, slaves: Sequence[Candidate]) -> list[int]:
    word = term.removeprefix("all")
    state = word.removeprefix("!") if word.startswith("!") else word.removeprefix("not")
    if state not in STATES and state not in {node.state for node in slaves}:
        raise NodespecError(EINVAL, f"'{term[:_SHOWN]}' is no node, range, state or file of nodes")
    inverted = state != word
    return [node.number for node in slaves if (node.state == state) != inverted]


def fold(numbers: Iterable[int]) -> str:
    """Returns the shortest nodespec for these numbers in this order: ``[0, 1, 2, 5, -1]`` gives ``0-2,5,master``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number >= 1 and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(
        "master" if first == MASTER else str(first) if first == last else f"{first}-{last}" for first, last in runs
    )

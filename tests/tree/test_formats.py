# SPDX-License-Identifier: GPL-2.0-or-later
"""Formats and parsers: whatever is written, the answer is a value or EINVAL."""

from __future__ import annotations

import errno
import pwd

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpfs.errors import BpfsError
from bpfs.tree.base import TEXT_LIMIT, one_line
from bpfs.tree.formats import (
    ID_LIMIT,
    group_name,
    key_values,
    lines,
    number_of_name,
    parse_group,
    parse_number,
    parse_permissions,
    parse_user,
    permissions,
    user_name,
)


@given(st.binary(max_size=64) | st.text(max_size=20).map(str.encode))
def test_one_line_is_one_stripped_line(data: bytes) -> None:
    try:
        line = one_line(data)
    except BpfsError as error:
        assert error.code == errno.EINVAL
    else:
        assert line == line.strip() != ""
        assert len(line.splitlines()) == 1
        assert "\0" not in line


def test_one_line_has_a_limit() -> None:
    assert one_line(b"x" * TEXT_LIMIT) == "x" * TEXT_LIMIT
    with pytest.raises(BpfsError):
        one_line(b"x" * (TEXT_LIMIT + 1))


@given(st.text(max_size=15))
def test_parse_number_knows_plain_numbers_only(text: str) -> None:
    try:
        number = parse_number(text, -5, 10**9)
    except BpfsError as error:
        assert error.code == errno.EINVAL
    else:
        assert -5 <= number <= 10**9
        assert number == int(text)
        assert text.isascii()


@given(st.integers(-(10**12), 10**12))
def test_parse_number_keeps_the_range(number: int) -> None:
    if -1 <= number <= 2**31 - 1:
        assert parse_number(str(number), -1, 2**31 - 1) == number
    else:
        with pytest.raises(BpfsError):
            parse_number(str(number), -1, 2**31 - 1)


@pytest.mark.parametrize("name", ["07", "+7", "-0", "00", "", "-", "7 ", "٧", "1_0", "7\n", "99999999999"])
def test_a_number_has_one_name(name: str) -> None:
    assert number_of_name(name) is None


@given(st.integers(-(10**9), 10**9))
def test_names_of_numbers(number: int) -> None:
    assert number_of_name(str(number)) == number


@given(st.integers(0, 0o777))
def test_permissions_mirror(mode: int) -> None:
    assert parse_permissions(permissions(mode)) == mode


@pytest.mark.parametrize("text", ["", "8", "7777", "a+x", "0o7", "-1", "01777"])
def test_bad_permissions(text: str) -> None:
    with pytest.raises(BpfsError):
        parse_permissions(text)


def test_names_of_users_are_those_of_the_system() -> None:
    for entry in pwd.getpwall():
        assert parse_user(entry.pw_name) == entry.pw_uid
        assert user_name(entry.pw_uid) == pwd.getpwuid(entry.pw_uid).pw_name
    assert parse_group("root") == 0
    assert group_name(0) == "root"
    assert user_name(3999999999) == "3999999999"
    assert parse_user("3999999999") == 3999999999


@pytest.mark.parametrize("text", ["nobody-has-this-name", "-1", str(ID_LIMIT + 1), "4294967295", "root:x"])
def test_users_that_are_none(text: str) -> None:
    for parse in (parse_user, parse_group):
        with pytest.raises(BpfsError) as caught:
            parse(text)
        assert caught.value.code == errno.EINVAL


def test_texts() -> None:
    assert lines([1, "two"]) == "1\ntwo\n"
    assert lines([]) == ""
    assert key_values([("a", 1), ("b", "x y")]) == key_values({"a": 1, "b": "x y"}) == "a 1\nb x y\n"

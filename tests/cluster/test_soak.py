"""The short form of the soak; `python -m tests.cluster.soak` is the long one.

Without forks: a master that is killed may still lose sight of a child whose parent moves or has just moved.
"""

import os

import pytest

from tests.cluster.soak import soak

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_nothing_is_lost_or_doubled_in_some_seconds_of_everything_at_once(session_folder):
    counts = soak(session_folder / "soak", seconds=12, seed=int.from_bytes(os.urandom(3), "little"), forks=False)
    assert counts["move"] > 5

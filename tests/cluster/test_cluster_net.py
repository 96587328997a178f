"""Nodes with network namespaces of their own, and what happens when the cable is pulled."""

from __future__ import annotations

import os

import pytest

from tests.cluster.virtual import cluster, comm, living, set_link

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_a_cut_node_fences_itself_and_comes_back(tmp_path):
    with cluster(tmp_path / "m", "--netns", "--lease", "3", nodes=3) as it:
        addresses = [it.read(f"nodes/{number}/address") for number in range(3)]
        assert len(set(addresses)) == 3
        assert len({os.readlink(f"/proc/{it.slave(number)}/ns/net") for number in range(3)}) == 3
        life = it.slave(1)
        jobs = {pid: started for pid, started in it.processes().items() if comm(pid) == "nodeinit"}
        others = {pid for number in (0, 2) for pid in it.inits(number)}
        set_link(it.leg(1), up=False)
        it.wait_state(1, "down")
        # The master says down only when the node's lease is surely over: nothing of it lives.
        assert set(living(jobs)) == others
        assert it.read("nodes/1/reason").startswith("silent for ")
        assert "no answer from the master for 3 s" in it.log("n1")
        assert it.state(0) == it.state(2) == "up"
        set_link(it.leg(1), up=True)
        it.wait_state(1, "up")
        assert it.slave(1) not in (0, life)


def test_a_short_cut_is_no_harm(tmp_path):
    with cluster(tmp_path / "m", "--netns", "--lease", "60", nodes=1) as it:
        life, status = it.slave(0), it.read("status")
        for _ in range(5):
            set_link(it.leg(0), up=False)
            set_link(it.leg(0), up=True)
        # TCP delivers what was lost: a request and its answer get through.
        it.write("nodes/0/state", "unavailable")
        it.write("nodes/0/state", "up")
        assert it.slave(0) == life and it.read("status") == status

"""What a process has used, out of its /proc files."""

from __future__ import annotations

import os

from bpfs.tree.formats import key_values

TICK = os.sysconf("SC_CLK_TCK")  # utime and stime of /proc/PID/stat are in these, see proc(5)


def render(files: dict[str, bytes]) -> str:
    """`key value` lines out of /proc/PID/stat and status."""
    stat = files["stat"].decode(errors="replace").rpartition(")")[2].split()
    memory = dict(
        line.split(":", 1) for line in files["status"].decode(errors="replace").splitlines() if line.startswith("Vm")
    )
    return key_values(
        {
            "utime_s": f"{int(stat[11]) / TICK:.2f}",
            "stime_s": f"{int(stat[12]) / TICK:.2f}",
            "minflt": stat[7],
            "majflt": stat[9],
            "maxrss_kb": memory.get("VmHWM", "0").split()[0],
            "rss_kb": memory.get("VmRSS", "0").split()[0],
            "threads": stat[17],
        }
    )

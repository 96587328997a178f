# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m tests.benchmarks [NAME...]``: prints figures as a table, each beside what it is compared with.

A benchmark is a module ``bench_NAME.py`` of this folder with a function ``rows()`` that yields `Row` objects. Figures
are medians of several rounds, because the machine does other things as well; ratios are of figures of the same run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.frame import Row

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """All benchmarks there are."""
    return sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


def machine() -> str:
    """One line about what the figures were measured on."""
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    model = models[0] if models else platform.machine()
    return f"{len(os.sched_getaffinity(0))} x {model}, Linux {platform.release()}, Python {platform.python_version()}"


def show(name: str, rows: Iterator[Row]) -> None:
    """Prints a benchmark's table, each line as soon as it is known."""
    print(f"\n{name}\n{'':44} {'figure':>12} {'compared with':>14}  {'ratio':>7}")
    for row in rows:
        compared = f"{row.baseline:.4g} {row.unit}" if row.baseline else ""
        ratio = f"{row.value / row.baseline:.2f}" if row.baseline else ""
        note = f"  {row.note}" if row.note else ""
        print(f"{row.what:44} {f'{row.value:.4g} {row.unit}':>12} {compared:>14}  {ratio:>7}{note}", flush=True)


def main() -> int:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Prints figures as a table.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {' '.join(names())}; default: all")
    chosen = parser.parse_args().names or names()
    unknown = set(chosen) - set(names())
    if unknown:
        parser.error(f"no such benchmark: {' '.join(sorted(unknown))}; there are: {' '.join(names())}")
    print(machine())
    for name in chosen:
        show(name, importlib.import_module(f"tests.benchmarks.bench_{name}").rows())
    return 0


if __name__ == "__main__":
    sys.exit(main())

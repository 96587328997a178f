"""Hatchling build hook: builds the C helpers and the pages for man(1), and marks the wheel as a Linux one.

The helpers are static programs that never link against Python, so one wheel serves every Python 3: its tag is
py3-none-linux_x86_64 rather than that of one interpreter. Hatchling keeps the mode bits, so they stay executable.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

WHEEL_TAG = "py3-none-linux_x86_64"

# Commands written in C: they belong on the PATH beside the Python ones.
C_COMMANDS = ("bpsh",)


class HelperBuildHook(BuildHookInterface[Any]):
    """Runs make before anything is packed."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds the helpers and adds them to the wheel.

        Args:
            version: "standard" for a wheel to install, "editable" for a link to this tree.
            build_data: what hatchling packs; changed in place.

        Raises:
            RuntimeError: make failed; its own words are on stderr.
        """
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        make = ["make", "-s", "-C", str(root / "mountscripts"), f"PYTHON={sys.executable}", "helpers"]
        made = subprocess.run(make, check=False)
        if made.returncode != 0:
            raise RuntimeError(f"the C helpers could not be built (make exit code {made.returncode})")
        build_data["tag"] = WHEEL_TAG
        build_data["pure_python"] = False
        if version == "standard":
            for command in C_COMMANDS:
                program = root / "bpfs" / "bin" / command
                if program.exists():
                    build_data["shared_scripts"][str(program)] = command
            for page in (root / "build" / "man").glob("man?/*"):
                build_data["shared_data"][str(page)] = f"share/man/{page.parent.name}/{page.name}"

"""Tables of kernel modules: what each needs, which devices it drives, and, where it travels apart, in which file.

An image and the boot server's list of drivers say it in the same lines:

    module NAME FILE NEED...        FILE is below /lib/modules
    alias NAME PATTERN              of the devices that it drives
    always NAME                     is loaded whatever the hardware
    parcel NAME BLOB SIZE DIGEST    is fetched from the boot server
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from boot.errors import BootError
from boot.manifest import Blob

IMAGE, FETCHED = "lib/modules/tables/image", "lib/modules/tables/drivers"
"""Where an image has the table of what is in it, and phase 2's the one of what phase 1 has fetched."""

_WILD = re.compile(r"[*?\[]")


@dataclass(slots=True)
class Table:
    """Modules by name.

    Attributes:
        files: below /lib/modules.
        needs: what has to be loaded before.
        aliases: pattern and name.
        always: what is loaded whatever the hardware.
        parcels: what the boot server has of them.
    """

    files: dict[str, str] = field(default_factory=dict)
    needs: dict[str, list[str]] = field(default_factory=dict)
    aliases: list[tuple[str, str]] = field(default_factory=list)
    always: list[str] = field(default_factory=list)
    parcels: dict[str, Blob] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Table:
        """Read the lines of one or more tables. Raises BootError."""
        table = cls()
        for line in text.splitlines():
            kind, _, rest = line.partition(" ")
            name, _, value = rest.partition(" ")
            if kind == "module" and value:
                table.files[name], *table.needs[name] = value.split()
            elif kind == "alias":
                table.aliases.append((value, name))
            elif kind == "always":
                table.always.append(name)
            elif kind == "parcel":
                table.parcels[name] = Blob.parse(value, f"driver {name}")
            else:
                raise BootError(f"{line[:80]!r} makes no sense in a table of modules")
        return table

    def lines(self, names: Iterable[str] | None = None) -> str:
        """The table, or what of it is about these modules; the same for the same table."""
        chosen = self.files.keys() if names is None else self.files.keys() & set(names)
        found = [" ".join(["module", name, self.files[name], *self.needs[name]]) for name in chosen]
        found += [f"alias {name} {pattern}" for pattern, name in self.aliases if name in chosen]
        found += [f"always {name}" for name in self.always if name in chosen]
        found += [f"parcel {name} {blob}" for name, blob in self.parcels.items() if name in chosen]
        return "".join(line + "\n" for line in sorted(found))

    def drivers(self, devices: Iterable[str]) -> list[str]:
        """The modules that drive these devices (contents of modalias), each with and after what it needs."""
        wild = [(pattern[: found.start()] if (found := _WILD.search(pattern)) else pattern, pattern, name)
                for pattern, name in self.aliases]  # fmt: skip
        ordered: dict[str, None] = {}
        for device in sorted(devices):
            for start, pattern, name in wild:
                # Comparing starts first: one device of some hundred is meant by one pattern of some thousand.
                if device.startswith(start) and fnmatchcase(device, pattern):
                    self._add(name, ordered)
        return list(ordered)

    def _add(self, name: str, ordered: dict[str, None]) -> None:
        if name not in ordered and name in self.files:
            for need in self.needs[name]:
                self._add(need, ordered)
            ordered[name] = None

"""Which master of its cluster this one is: the first, or the next after one that was killed, whose jobs it takes up.

The run directory keeps who the last was. A master that ends in peace has ended all jobs, and leaves nothing there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from bpfs.rundir import RunDir
from bpfs.wire.messages import Join

FILE = "cluster"
"""Identity in hexadecimal, and generation."""


@dataclass(frozen=True, slots=True)
class Succession:
    """This master among those of its cluster.

    Attributes:
        identity: 16 bytes, the same for all that follow one another.
        generation: 1 for the first.
    """

    identity: bytes = field(default_factory=lambda: os.urandom(16))
    generation: int = 1

    @classmethod
    def next(cls, rundir: RunDir) -> Succession:
        """Who comes after the last one; not entered yet."""
        words = (rundir.read(FILE) or "").split()
        try:
            identity, generation = bytes.fromhex(words[0]), int(words[1])
        except (ValueError, IndexError):
            return cls()
        return cls(identity, generation + 1)

    @property
    def follows(self) -> bool:
        """Whether there was one before."""
        return self.generation > 1

    def enter(self, rundir: RunDir) -> None:
        """From now on this one is the last."""
        rundir.write(FILE, f"{self.identity.hex()} {self.generation}\n")

    def end(self, rundir: RunDir) -> None:
        """No job is left to be taken up."""
        (rundir.path / FILE).unlink(missing_ok=True)

    def is_own(self, join: Join) -> bool:
        """Whether the jobs that a slave has kept are those of this very master."""
        return join.resumes == self.identity and join.generation == self.generation

    def takes_up(self, join: Join) -> bool:
        """Whether the jobs that a slave has kept are those of a master before this one."""
        return join.resumes == self.identity and join.generation < self.generation

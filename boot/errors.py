"""What can go wrong in this room, for a person."""

from __future__ import annotations


class BootError(Exception):
    """One sentence, no full stop, naming the object."""

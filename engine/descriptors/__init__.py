"""Descriptors of a process: what they are (`inspect`), and making them anew for another (`rebuild`).

One small module a kind; a new kind is a module and a line in the table below.
"""

from engine.descriptors.inspection import Descriptors, inspect, look
from engine.descriptors.model import Row
from engine.descriptors.rebuilding import Placed, after_placed, at_resume, close_all, rebuild

__all__ = ["Descriptors", "Placed", "Row", "after_placed", "at_resume", "close_all", "inspect", "look", "rebuild"]

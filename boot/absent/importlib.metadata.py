"""Versions of packages: a node image has no such records, and pyfuse3 asks for its own at its start."""


class PackageNotFoundError(ModuleNotFoundError):
    """No package is known."""


def version(name: str) -> str:
    """Raises PackageNotFoundError."""
    raise PackageNotFoundError(name)

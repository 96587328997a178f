"""The table of kinds. The first that matches a description gets it, so the order matters."""

from typing import Final

from engine.descriptors import (
    devices,
    epoll,
    eventfd,
    external,
    inotify,
    kin,
    memfd,
    other,
    paths,
    pidfd,
    pipes,
    signalfd,
    sockets,
    timerfd,
)
from engine.descriptors.model import Kind

KINDS: Final[tuple[Kind, ...]] = (
    *paths.KINDS[:1],  # O_PATH descriptors of anything
    *external.KINDS,
    *memfd.KINDS,
    *paths.KINDS[1:],
    *devices.KINDS,
    *pipes.KINDS,
    *sockets.KINDS,
    *eventfd.KINDS,
    *timerfd.KINDS,
    *signalfd.KINDS,
    *epoll.KINDS,
    *inotify.KINDS,
    *pidfd.KINDS,
    *kin.KINDS,
    *other.KINDS,
)
BY_NAME: Final[dict[str, Kind]] = {kind.name: kind for kind in KINDS}

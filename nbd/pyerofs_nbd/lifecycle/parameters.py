"""The parameters of a server process.  Cheap to import: its parent process has no event loop."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

from pyerofs_nbd.devices.recovery import Record
from pyerofs_nbd.options import Behaviour

HANDED_OVER = 3  # exit status: another process serves the devices now


@dataclass
class Part:
    """One of the devices that are attached together."""

    path: str | None  # of its recovery file; None where there is none (ioctl)
    record: Record
    lock: int = -1  # a descriptor that holds the file's lock
    index: int = -1
    connection: socket.socket | None = None


@dataclass
class ServerParameters:
    """The parameters of a server process.

    ``known``: the parts of devices that are attached already, in the order of their recovery files;
    None for new devices: ``record`` is the template and ``name`` the name of their files."""

    record: Record
    name: str = ""
    known: list[Part] | None = None
    takeover: bool = False  # the old server sends locks and connections together
    recoverable: bool = True  # whether the driver keeps identifiers
    ioctl: bool = False
    wanted: int | None = None  # with ioctl: which device
    behaviour: Behaviour = field(default_factory=Behaviour)
    keep: list[int] = field(default_factory=list)  # descriptors

    @property
    def new(self) -> bool:
        return self.known is None

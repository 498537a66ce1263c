"""The messages between the processes that manage devices, and their order.

Attaching: the *attacher* is the command; the *holder* is the server that it has forked.

    attacher                              holder
                                          opens the sources, writes the recovery files
                          <- Ready
    attaches the devices
    Attached ->                           (with each connection, and for a takeover each lock)
                          <- Serving
    configures the devices, mounts
    Live ->                               goes on without its parent, or with ``stay`` as its child

A holder that fails sends Failed instead.  If the attacher closes the channel before Live, the holder
detaches the devices that were attached for it.

Afterwards: any process of the same user or root connects to the holder's socket.

    client                                holder
    StatusAsked ->
                          <- Status
    TakeoverAsked ->                      sends the replies that are under way
                          <- Devices      (with each connection and each lock)
    Taken ->                              ends (but continues if the client closes the channel)

A message is one JSON object in one packet.  Processes of different versions of pyerofs exchange these
objects, so their form must not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

Packet: TypeAlias = dict[str, Any]


class Message(Protocol):
    """A message between processes."""

    def packet(self) -> Packet:
        """The message's JSON object."""


@dataclass(frozen=True)
class Offer:
    """One device that a holder can serve."""

    path: str | None  # of its recovery file; None where there is none
    size: int  # bytes


@dataclass(frozen=True)
class Ready:
    """The holder can serve.  ``attached``: the numbers of the devices that the holder has attached
    itself, by ioctl; otherwise -1 for each."""

    offers: list[Offer]
    attached: list[int]

    def packet(self) -> Packet:
        offers = [{"path": offer.path, "size": offer.size} for offer in self.offers]
        return {"ready": offers, "attached": self.attached}


@dataclass(frozen=True)
class Attached:
    """The devices' numbers, in the order of the offers."""

    indices: list[int]

    def packet(self) -> Packet:
        return {"attached": self.indices}


@dataclass(frozen=True)
class Serving:
    """The holder answers requests."""

    def packet(self) -> Packet:
        return {"serving": True}


@dataclass(frozen=True)
class Live:
    """Attaching has succeeded.  ``stay``: the attacher stays the holder's parent."""

    stay: bool

    def packet(self) -> Packet:
        return {"live": True, "stay": self.stay}


@dataclass(frozen=True)
class Failed:
    """The holder ends.  ``error``: one line for the user."""

    error: str

    def packet(self) -> Packet:
        return {"error": self.error}


@dataclass(frozen=True)
class StatusAsked:
    """Asks the holder for its Status."""

    def packet(self) -> Packet:
        return {"ask": "status"}


@dataclass(frozen=True)
class Status:
    """The holder's counters so far."""

    pid: int
    requests: int
    bytes: int  # sent to the devices
    failures: int
    fetched: int | None  # bytes over the network; None if all sources are local
    verified: bool | None  # whether all sources with a digest are verified; None without any

    def packet(self) -> Packet:
        return {
            "pid": self.pid,
            "requests": self.requests,
            "bytes": self.bytes,
            "failures": self.failures,
            "fetched": self.fetched,
            "verified": self.verified,
        }


@dataclass(frozen=True)
class TakeoverAsked:
    """Asks the holder to hand its devices over."""

    def packet(self) -> Packet:
        return {"ask": "takeover"}


@dataclass(frozen=True)
class Devices:
    """The devices handed over: each one's number and the path of its recovery file."""

    devices: list[tuple[int, str | None]]

    def packet(self) -> Packet:
        return {"devices": [list(device) for device in self.devices]}


@dataclass(frozen=True)
class Taken:
    """The new holder serves."""

    def packet(self) -> Packet:
        return {"taken": True}


@dataclass(frozen=True)
class Unknown:
    """A packet that is no known message."""

    def packet(self) -> Packet:
        return {}


def parse(packet: object) -> Message:
    """The message that a JSON value encodes; Unknown if it encodes none."""
    try:
        return _parse(packet)
    except (KeyError, TypeError, ValueError):
        return Unknown()


def _parse(packet: Any) -> Message:
    match packet:
        case {"error": error}:
            return Failed(str(error))
        case {"ready": offers, "attached": attached}:
            return Ready([Offer(o["path"], int(o["size"])) for o in offers], list(attached))
        case {"attached": indices}:
            return Attached([int(index) for index in indices])
        case {"serving": True}:
            return Serving()
        case {"live": True}:
            return Live(bool(packet.get("stay")))
        case {"ask": "status"}:
            return StatusAsked()
        case {"ask": "takeover"}:
            return TakeoverAsked()
        case {"devices": devices}:
            return Devices([(int(index), path) for index, path in devices])
        case {"taken": True}:
            return Taken()
        case {"pid": pid, "requests": requests, "bytes": sent, "failures": failures}:
            return Status(
                pid, requests, sent, failures, packet.get("fetched"), packet.get("verified")
            )
        case _:
            return Unknown()

"""What processes that look after devices say to each other, and in which order.

Attaching: the *attacher* is the command; the *holder* is the server that it has forked.

    attacher                              holder
                                          opens the sources, writes the recovery files
                          <- Ready
    attaches the devices
    Attached ->                           (with each connection, and for a takeover each lock)
                          <- Serving
    configures the devices, mounts
    Live ->                               goes on without its parent, or with ``stay`` as its child

A holder that fails says Failed instead.  One whose attacher hangs up before Live detaches the devices
that were attached for it.

Afterwards: any process of the same user or root connects to the holder's socket.

    client                                holder
    StatusAsked ->
                          <- Status
    TakeoverAsked ->                      sends the replies that are under way
                          <- Devices      (with each connection and each lock)
    Taken ->                              ends; it serves on where the client hangs up instead

A message is one JSON object in one packet.  Holders of other versions of pyerofs understand these
objects, so their form does not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

Packet: TypeAlias = dict[str, Any]


class Message(Protocol):
    """Something that can be sent."""

    def packet(self) -> Packet:
        """Its JSON object."""


@dataclass(frozen=True)
class Offer:
    """One device that a holder can serve."""

    path: str | None  # of its recovery file; None where there is none
    size: int  # bytes


@dataclass(frozen=True)
class Ready:
    """The holder can serve.  ``attached``: the numbers of devices that it has attached itself, by
    ioctl; else -1."""

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
    """All is well.  ``stay``: the attacher goes on as the holder's parent."""

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
    """How is it going?"""

    def packet(self) -> Packet:
        return {"ask": "status"}


@dataclass(frozen=True)
class Status:
    """What a holder has done so far."""

    pid: int
    requests: int
    bytes: int  # sent to the devices
    failures: int
    fetched: int | None  # bytes over the network; None where nothing is far away
    verified: bool | None  # whether all sources with a digest are; None where none has one

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
    """Hand the devices over."""

    def packet(self) -> Packet:
        return {"ask": "takeover"}


@dataclass(frozen=True)
class Devices:
    """What is handed over: each device's number and the path of its recovery file."""

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
    """A packet that makes no sense here."""

    def packet(self) -> Packet:
        return {}


def parse(packet: object) -> Message:
    """The message that a JSON value stands for; Unknown where it stands for none."""
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

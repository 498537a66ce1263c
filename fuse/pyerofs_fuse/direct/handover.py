"""Restart a mount in place: what the running program hands to the one that it executes.

Descriptors are inherited; all else is JSON in a file in memory, passwords included, which no other
user can read.  A program that can't use what it finds there ends, and the old servers go on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pyerofs.sources.spec import Access
from pyerofs_fuse.options import RESUME, Options

FORMAT = 1


@dataclass(frozen=True)
class Handover:
    """The state of a mount as JSON values.  ``fuse``, ``guard``, ``images`` and ``record`` are
    descriptors; the other fields are those of Job, Mounted, Init, Predecessor, FarImage and Live."""

    options: dict[str, Any]
    spec: dict[str, Any]
    access: dict[str, Any]
    first: list[str]
    fuse: int
    guard: int | None
    images: list[int]  # none of an image that each server opens
    record: int | None
    where: str
    device: str | None
    init: list[int]
    known: dict[str, Any] | None
    servers: list[int]
    poisoned: list[int]
    since: int
    restarts: int

    @property
    def descriptors(self) -> list[int]:
        """All that the new program has to inherit."""
        return [fd for fd in (self.fuse, self.guard, *self.images, self.record) if fd is not None]


def plain(record: Options | Access, without: str) -> dict[str, Any]:
    """The fields of a record except one, which is no JSON value."""
    return {f.name: getattr(record, f.name) for f in fields(record) if f.name != without}


def execute(program: Sequence[str], handover: Handover, shown: Sequence[str]) -> None:
    """Replace the running program by ``program``, which takes over.  ``shown``: words that tell users
    of ps(1) what it does.  Raises OSError, with nothing changed."""
    memory = os.memfd_create("handover")
    try:
        os.write(memory, json.dumps({"format": FORMAT} | asdict(handover)).encode())
        for fd in (memory, *handover.descriptors):
            os.set_inheritable(fd, True)
        os.execv(program[0], [*program, f"{RESUME}{memory}", *shown])
    finally:
        for fd in handover.descriptors:
            os.set_inheritable(fd, False)
        os.close(memory)


def received(memory: int) -> Handover:
    """What was handed over in the file with the given descriptor, which is closed.

    Raises OSError; ValueError or TypeError if this program can't use it."""
    with open(memory, "rb") as f:
        f.seek(0)
        found = json.loads(f.read())
    if found.pop("format", None) != FORMAT:
        raise ValueError("the running mount has another format than this version of pyerofs reads")
    handover = Handover(**found)
    for fd in handover.descriptors:
        os.set_inheritable(fd, False)
    return handover

"""The one place that turns what a user names into sources."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import BinaryIO, cast

from pyerofs.sources.base import Source
from pyerofs.sources.file import FileObjectSource, FileSource
from pyerofs.sources.slice import SliceSource

Openable = str | os.PathLike[str] | BinaryIO | Source


def open_source(what: Openable) -> Source:
    """A source for a path, a seekable binary file object, or a source itself.

    Raises SourceError."""
    if isinstance(what, (str, os.PathLike)):
        return FileSource(what)
    if hasattr(what, "read_at"):
        return cast(Source, what)
    return FileObjectSource(what)


def open_sources(what: Openable, offset: int, devices: Sequence[Openable]) -> list[Source]:
    """The primary device, from ``offset`` on, and the extra ones.  Raises SourceError, with none
    left open."""
    opened: list[Source] = []
    try:
        primary = open_source(what)
        opened.append(primary)
        if offset:
            opened[0] = SliceSource(primary, offset)
        for device in devices:  # one by one: should one fail, those before it must be closed
            opened.append(open_source(device))  # noqa: PERF401
    except BaseException:
        for source in opened:
            source.close()
        raise
    return opened

"""Where a file has holes, for ``base:allocation``."""

from __future__ import annotations

import errno
import os

from pyerofs_nbd.server.protocol import STATE_HOLE, STATE_ZERO

MAX_EXTENTS = 1024  # in one answer, 8 KiB; the client asks again for the rest
NOWHERE = 1 << 62

Extent = tuple[int, int]  # length in bytes, state


def extents(fd: int, offset: int, length: int, *, limit: int = MAX_EXTENTS) -> list[Extent]:
    """The state of consecutive ranges from ``offset`` on: at least one, at most ``limit``, never more
    than ``length`` bytes in all.  Ranges of unknown state count as data.  May block."""
    found: list[Extent] = []
    at, end = offset, offset + length
    while at < end and len(found) < limit:
        data = min(_data(fd, at), end)
        if data > at:
            found.append((data - at, STATE_HOLE | STATE_ZERO))
            at = data
        else:
            hole = min(_hole(fd, at), end)
            found.append((hole - at, 0))
            at = hole
    return found


def _data(fd: int, offset: int) -> int:
    """Where data begins, from ``offset`` on."""
    try:
        return max(os.lseek(fd, offset, os.SEEK_DATA), offset)
    except OSError as e:
        if e.errno != errno.ENXIO:
            return offset
        # a hole up to the file's end; but bytes beyond the end of a file that has shrunk count as
        # data, so that reading them reports the error
        return max(os.fstat(fd).st_size, offset)


def _hole(fd: int, offset: int) -> int:
    """Where the data at ``offset`` ends."""
    try:
        found = os.lseek(fd, offset, os.SEEK_HOLE)
    except OSError:
        return NOWHERE
    return found if found > offset else NOWHERE

"""A trio for pyfuse3 that looks twice before it waits.

Between two requests pyfuse3 waits in ``trio.lowlevel.wait_readable``: a round through the scheduler
and epoll, although the next request of a busy client usually arrives within microseconds.  Here that
wait first asks the kernel directly, for a moment so short that nobody else notices, and only then
goes the long way.  After a number of requests in a row it goes there anyway, so that other tasks run.

pyfuse3 lets its trio be replaced like this; it does so itself to run on asyncio.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

import pyfuse3
import trio

MOMENT = 30e-6  # seconds: about what a client needs to send its next request
IN_A_ROW = 64  # requests until other tasks get a turn
SELECT_LIMIT = 1024  # select(2) can't look at descriptors from here on


class _Lowlevel:
    """trio.lowlevel with another ``wait_readable``."""

    def __init__(self, busy: Callable[[], bool]) -> None:
        self._busy = busy
        self._row = 0
        self.fd = -1  # what was waited for last

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        """Return once ``fd`` is readable.  A checkpoint only if that takes a while."""
        self.fd = fd
        self._row += 1
        if self._row < IN_A_ROW and fd < SELECT_LIMIT:
            moment = 0.0 if self._busy() else MOMENT
            if select.select([fd], (), (), moment)[0]:
                return
        self._row = 0
        await trio.lowlevel.wait_readable(fd)


class _Trio:
    """trio with another ``lowlevel``."""

    def __init__(self, busy: Callable[[], bool]) -> None:
        self.lowlevel = _Lowlevel(busy)

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


def enable(busy: Callable[[], bool]) -> Callable[[], bool]:
    """Make pyfuse3 wait eagerly from now on, except while ``busy()``: other tasks then wait for
    something that trio has to tell them.  Returns a function that tells whether no request waits to
    be received."""
    replacement = _Trio(busy)
    pyfuse3.trio = replacement  # type: ignore[attr-defined]

    def idle() -> bool:
        fd = replacement.lowlevel.fd
        return 0 <= fd < SELECT_LIMIT and not select.select([fd], (), (), 0)[0]

    return idle

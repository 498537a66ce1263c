"""A trio for pyfuse3 that looks twice before it waits, and that knows whose turn it is.

Between two requests pyfuse3 waits in ``trio.lowlevel.wait_readable``: a round through the scheduler
and epoll, although the next request of a busy client usually arrives within microseconds.  Here that
wait first asks the kernel directly, for a moment so short that nobody else notices, and only then
goes the long way.  After a number of requests in a row it goes there anyway, so that other tasks run.
Where several processes serve the mount, it also waits until it is this one's turn to receive.

pyfuse3 lets its trio be replaced like this; it does so itself to run on asyncio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyfuse3
import trio

from pyerofs_fuse.processes.turns import Turns, readable, readable_soon

MOMENT = 60e-6  # seconds: more than a busy client needs to send its next request
IN_A_ROW = 64  # requests until other tasks get a turn


class _Lowlevel:
    """trio.lowlevel with another ``wait_readable``."""

    def __init__(self, turns: Turns, busy: Callable[[], bool]) -> None:
        self._turns = turns
        self._busy = busy
        self._row = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        """Return once ``fd`` is readable and it is our turn to read it.  A checkpoint only if that
        takes a while."""
        turns = self._turns
        turns.queue = fd
        self._row += 1
        moment = 0.0 if self._busy() else MOMENT
        while True:
            if not turns.mine:
                readable(turns.fd, moment)
                while not turns.take():
                    self._row = 0
                    await trio.lowlevel.wait_readable(turns.fd)
            if self._row < IN_A_ROW and readable_soon(fd, moment):
                return
            self._row = 0
            await trio.lowlevel.wait_readable(fd)
            if turns.mine:  # another task may have passed it on meanwhile
                return

    def notify_closing(self, fd: int) -> None:
        """Wake whoever waits for ``fd``, or for the turn to."""
        trio.lowlevel.notify_closing(fd)
        if self._turns.shared:
            trio.lowlevel.notify_closing(self._turns.fd)


class _Lock:
    """trio.Lock, but who gives it back may take it again at once: no checkpoint, and no task switch
    for each request while one task can answer them all.  Whoever waited gets it when that yields."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._taken:
            await self._waiting.park()
        self._taken = True

    async def __aexit__(self, *_: object) -> None:
        self._taken = False
        if self._waiting:
            self._waiting.unpark()


class _Trio:
    """trio with another ``lowlevel``, and another ``Lock``, of which pyfuse3 needs one."""

    Lock = _Lock

    def __init__(self, lowlevel: _Lowlevel) -> None:
        self.lowlevel = lowlevel

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


def enable(turns: Turns, busy: Callable[[], bool]) -> None:
    """Make pyfuse3 wait eagerly from now on, except while ``busy()``: other tasks then wait for
    something that trio has to tell them."""
    pyfuse3.trio = _Trio(_Lowlevel(turns, busy))  # type: ignore[attr-defined]

"""A replacement of trio in pyfuse3 that polls before it waits, and receives only in turn.

Between two requests pyfuse3 waits in ``trio.lowlevel.wait_readable``: a pass through the scheduler
and epoll, although the next request of a busy client usually arrives within microseconds.  The
``wait_readable`` here first polls the descriptor, for too short a time to delay other tasks, and
only then waits in trio.  After IN_A_ROW requests it waits in trio anyway, so that other tasks run.  If
several processes serve the mount, it also waits until this process has the turn to receive.

pyfuse3 allows this replacement of its trio; it does so itself to run on asyncio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyfuse3
import trio

from pyerofs_fuse.processes.turns import Turns, readable, readable_soon

MOMENT = 60e-6  # seconds: more than a busy client needs to send its next request
IN_A_ROW = 64  # requests until other tasks run


class _Lowlevel:
    """trio.lowlevel with another ``wait_readable``."""

    def __init__(self, turns: Turns, busy: Callable[[], bool]) -> None:
        self._turns = turns
        self._busy = busy
        self._row = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        """Return once ``fd`` is readable and this process has the turn.  A checkpoint only if polling
        does not suffice."""
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
            if turns.mine:  # another task may have passed the turn on meanwhile
                return

    def notify_closing(self, fd: int) -> None:
        """Wake the tasks that wait for ``fd`` or for the turn."""
        trio.lowlevel.notify_closing(fd)
        if self._turns.shared:
            trio.lowlevel.notify_closing(self._turns.fd)


class _Lock:
    """An unfair trio.Lock: the task that releases it may take it again at once, without a checkpoint,
    so one task can answer many requests without task switches.  A waiting task gets the lock when the
    other one yields."""

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
    """trio with ``lowlevel`` and ``Lock`` replaced (pyfuse3 uses one Lock)."""

    Lock = _Lock

    def __init__(self, lowlevel: _Lowlevel) -> None:
        self.lowlevel = lowlevel

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


def enable(turns: Turns, busy: Callable[[], bool]) -> None:
    """Make pyfuse3 poll from now on, except while ``busy()``: other tasks then wait for events that
    only trio delivers."""
    pyfuse3.trio = _Trio(_Lowlevel(turns, busy))  # type: ignore[attr-defined]

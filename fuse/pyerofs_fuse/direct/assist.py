"""Have other servers answer requests while the first one is busy with a long one.

The kernel wakes the servers that read /dev/fuse one after another, and a process that has slept for
long wakes slowly.  So only the first server reads all the time.  The others sleep until it *rings*:
when requests wait behind a READ that it is about to answer, or when that will take long.
"""

from __future__ import annotations

import mmap
import os

from pyerofs.system.readiness import reading

LINGER = 1  # milliseconds that an assistant looks for another request before it sleeps
LONG_NS = 150_000  # of decoding: about twice what it takes to wake an assistant


class Bell:
    """Wakes assistants; made before the fork."""

    def __init__(self, fd: int, assistants: int) -> None:
        """``fd``: /dev/fuse."""
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self._asleep = mmap.mmap(-1, max(assistants, 1))  # 1 for each assistant that sleeps
        self._reading = reading(fd)

    def ring(self, cost: float) -> None:
        """Wake an assistant that sleeps, if requests wait or ``cost`` (nanoseconds that the one in hand
        takes) is high."""
        asleep = self._asleep
        if 1 in asleep and (cost > LONG_NS or self._reading.poll(0)):
            os.eventfd_write(self._event, 1)

    def wait(self, number: int) -> None:
        """Called by an assistant, numbered from 0: wait until there is a request to read, or was one
        a moment ago."""
        asleep = self._asleep
        while not self._reading.poll(LINGER):
            asleep[number] = 1
            try:
                os.eventfd_read(self._event)
            finally:
                asleep[number] = 0

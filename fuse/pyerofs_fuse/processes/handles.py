"""Shared memory of the processes that serve a mount: above all, the number of handles of each file.

A file's handle is its node id, so any process can answer for it without a table of handles.  Only the
number of handles matters, and which process is storing the file's data in the page cache (see
``Operations._store``).  A count is changed by the process that has just received OPEN or RELEASE,
while it still has the turn: one process at a time.  Files may share a count; it is then too high,
which is harmless.  Inodes for which an error was logged are marked, too.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

SLOTS = 65_521  # a prime


class Handles:
    """Handle counts, stores in progress, and marks of logged errors."""

    def __init__(self, processes: int = 1) -> None:
        """Must be called before the fork."""
        self.processes = processes
        self._counts = memoryview(mmap.mmap(-1, 4 * SLOTS)).cast("I")
        # for each process, slot + 1 of the file that it is storing, or 0
        self._storing = memoryview(mmap.mmap(-1, 4 * processes)).cast("I")
        self._reported = mmap.mmap(-1, SLOTS + 1)
        self.me = 0  # which process this is

    def count(self, node: int) -> int:
        """An upper bound for the number of handles on a file, open or opening."""
        return self._counts[node % SLOTS]

    def opened(self, node: int) -> None:
        self._counts[node % SLOTS] += 1

    def closed(self, node: int) -> None:
        self._counts[node % SLOTS] -= 1

    @contextmanager
    def storing(self, node: int) -> Iterator[None]:
        """Announce a store, which delays the replies to OPEN of the file.  Enter *before* reading the
        count: an earlier open is then counted, and a later one sees the announcement and waits."""
        self._storing[self.me] = node % SLOTS + 1
        try:
            yield
        finally:
            self._storing[self.me] = 0

    def is_stored_by_others(self, node: int) -> bool:
        """Whether another process is storing the file (or one that shares its count)."""
        return node % SLOTS + 1 in self._storing

    def first_error(self, nid: int | None) -> bool:
        """Mark an error of an inode; returns whether it is the first one (of those with this mark)."""
        slot = SLOTS if nid is None else nid % SLOTS
        first = not self._reported[slot]
        self._reported[slot] = 1
        return first

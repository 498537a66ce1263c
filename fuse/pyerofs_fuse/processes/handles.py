"""What all processes that serve a mount have to know: above all, how many handles a file has.

A file's handle is its node id, so any process can answer for it and nothing has to be remembered;
only how many there are matters, and who is putting the file's data into the kernel's page cache (see
``Operations._store``).  Both lie in shared memory.  The counts are changed by the process that has
just received OPEN or RELEASE, while it still is its turn: one at a time.  Files may share a count; it
is then too high, which is harmless.  Besides, inodes are marked about which an error was logged.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

SLOTS = 65_521  # a prime


class Handles:
    """The counts, and what is being stored."""

    def __init__(self, processes: int = 1) -> None:
        """Made before the fork."""
        self.processes = processes
        self._counts = memoryview(mmap.mmap(-1, 4 * SLOTS)).cast("I")
        # slot + 1 of each process
        self._storing = memoryview(mmap.mmap(-1, 4 * processes)).cast("I")
        self._reported = mmap.mmap(-1, SLOTS + 1)
        self.me = 0  # which process this is

    def count(self, node: int) -> int:
        """At least as many as there are handles on a file, open or opening."""
        return self._counts[node % SLOTS]

    def opened(self, node: int) -> None:
        self._counts[node % SLOTS] += 1

    def closed(self, node: int) -> None:
        self._counts[node % SLOTS] -= 1

    @contextmanager
    def storing(self, node: int) -> Iterator[None]:
        """Whoever opens the file meanwhile waits with its answer.  Enter, and only then look at the
        count: whoever counts first is seen, whoever counts later sees us."""
        self._storing[self.me] = node % SLOTS + 1
        try:
            yield
        finally:
            self._storing[self.me] = 0

    def is_stored_by_others(self, node: int) -> bool:
        """Whether another process is storing the file (or one that shares its count)."""
        return node % SLOTS + 1 in self._storing

    def first_error(self, nid: int | None) -> bool:
        """Whether there was no error yet of an inode (or of one that shares its mark)."""
        slot = SLOTS if nid is None else nid % SLOTS
        first = not self._reported[slot]
        self._reported[slot] = 1
        return first

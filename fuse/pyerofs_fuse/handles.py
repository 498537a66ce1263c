"""How many handles there are on each file, counted for all processes that serve a mount.

A file's handle is its node id, so any process can answer for it and nothing has to be remembered;
only how many there are matters (see ``Operations._store``).  The counts lie in shared memory.  They
are changed by the process that has just received OPEN or RELEASE, while it still is its turn: one at
a time.  Files may share a count; it is then too high, which is harmless.
"""

from __future__ import annotations

import mmap

SLOTS = 65_521  # a prime


class Handles:
    """The counts."""

    def __init__(self) -> None:
        """Made before the fork."""
        self._counts = memoryview(mmap.mmap(-1, 4 * SLOTS)).cast("I")

    def count(self, node: int) -> int:
        """At least as many as there are handles on a file, open or opening."""
        return self._counts[node % SLOTS]

    def opened(self, node: int) -> None:
        self._counts[node % SLOTS] += 1

    def closed(self, node: int) -> None:
        self._counts[node % SLOTS] -= 1

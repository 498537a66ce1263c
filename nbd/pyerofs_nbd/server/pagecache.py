"""Which parts of a file are in the kernel's page cache, so that sending them won't wait for a disk.

``sendfile`` blocks while it reads from a disk, and has no RWF_NOWAIT.  ``cachestat(2)`` (Linux 6.5)
counts the cached pages of a range exactly, in 3 us for 256 KiB.  On older kernels single bytes are
probed with ``preadv2(RWF_NOWAIT)``; at 1 us each that is too slow for every page, so one byte in
16 KiB (the least that read-ahead fills) and the last one are probed.  mincore would tell, too, but it
needs a memory map, and accessing a mapped file that has shrunk is fatal.
"""

from __future__ import annotations

import mmap
import os

from pyerofs.system.libc import CacheStat

STEP = 16 << 10
RWF_NOWAIT = getattr(os, "RWF_NOWAIT", None)


class PageCache:
    """Queries the page cache for the files of one export.  Not thread-safe."""

    def __init__(self) -> None:
        self._byte = bytearray(1)
        self._stat: CacheStat | None = None  # None: single bytes are probed
        try:
            self._stat = CacheStat()
        except (OSError, AttributeError):
            pass

    def holds(self, fd: int, offset: int, length: int) -> bool:
        """Whether a range lies within the file and is in the page cache; False if that is unknown."""
        try:
            # (pages may remain in memory beyond the end of a truncated file)
            if os.lseek(fd, 0, os.SEEK_END) < offset + length:
                return False
        except OSError:
            return False
        if self._stat is not None:
            start = offset & -mmap.PAGESIZE
            span = offset + length - start
            cached = self._stat.cached(fd, start, span)
            if cached is not None:
                return cached >= -(-span // mmap.PAGESIZE)
            self._stat = None  # an older kernel, or a sandbox that blocks cachestat
        return self._probe(fd, offset, length)

    def mistrust(self) -> None:
        """Stop using cachestat: its counts were wrong, as on stacked file systems."""
        self._stat = None

    def _probe(self, fd: int, offset: int, length: int) -> bool:
        if RWF_NOWAIT is None:
            return False
        last = offset + length - 1
        try:
            return all(
                os.preadv(fd, [self._byte], at, RWF_NOWAIT)
                for at in (*range(offset, last, STEP), last)
            )
        except OSError:
            return False

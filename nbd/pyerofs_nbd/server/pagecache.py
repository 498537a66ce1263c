"""Which parts of a file are in the kernel's page cache, so that sending them won't wait for a disk.

``sendfile`` blocks while it reads from a disk, and has no RWF_NOWAIT.  ``cachestat(2)`` (Linux 6.5)
counts the cached pages of a range exactly, in 3 us for 256 KiB; older kernels are asked for single
bytes with ``preadv2(RWF_NOWAIT)``, 1 us each, too much for every page: one in 16 KiB, which is the
least that reading ahead fills, and the last.  Memory maps and mincore would tell too, but maps of
files that shrink are fatal.
"""

from __future__ import annotations

import mmap
import os

from pyerofs.system.libc import CacheStat

STEP = 16 << 10
RWF_NOWAIT = getattr(os, "RWF_NOWAIT", None)


class PageCache:
    """Asks about the files of one export.  Not for several threads."""

    def __init__(self) -> None:
        self._byte = bytearray(1)
        self._stat: CacheStat | None = None  # None: single bytes are tried
        try:
            self._stat = CacheStat()
        except (OSError, AttributeError):
            pass

    def holds(self, fd: int, offset: int, length: int) -> bool:
        """Whether a range is there and can be had without waiting for the disk; False where that can't
        be told."""
        try:
            # (pages may remain in memory beyond the end of a file that was cut)
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
            self._stat = None  # an older kernel, or a sandbox
        return self._probe(fd, offset, length)

    def mistrust(self) -> None:
        """Its counts were wrong, as those of stacked file systems are: do without them."""
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

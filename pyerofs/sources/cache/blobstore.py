"""The stored segments of one blob: verified ones on disk, which all origins share; claimed ones on
disk, from one origin only; and in memory those that the disk does not take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from pyerofs.errors import IntegrityError
from pyerofs.sources.base import Buffer, check_range
from pyerofs.sources.cache.blobfiles import FILLING, extent_of, segments_of
from pyerofs.sources.cache.memorystore import MemoryStore
from pyerofs.sources.cache.store import Claimed, DiskStore, Verified
from pyerofs.system.private import PrivateDirectory

log = logging.getLogger("pyerofs")


class BlobStore:
    """The segments of one blob.  Thread-safe.  Also a Source for the stored segments.

    ``digest``: the digest that the whole blob must have; None if none is known."""

    def __init__(
        self,
        name: str,
        size: int,
        digest: str | None,
        *,
        verified: Verified | None = None,
        claimed: Callable[[], Claimed] | None = None,
        settled: tuple[PrivateDirectory, str] | None = None,
        storing: Callable[[int], AbstractContextManager[bool]] = lambda _: nullcontext(True),
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """``claimed`` opens the origin's blob on disk and may raise OSError; None: no such blob.
        ``settled``: the directory and name for the blob once it is verified.  ``storing`` yields
        whether so many bytes may be written to disk within its block.  ``close`` is called when the
        store is closed."""
        self.name = name
        self.size = size
        self.digest = digest
        self.count = segments_of(size)
        self._verified = verified
        self._open_claimed = claimed
        self._claimed: Claimed | None = None
        self._settled = settled
        self._storing = storing
        self._close = close
        self._memory = MemoryStore(size, name)
        self._frozen: Claimed | None = None
        self.error: IntegrityError | None = None  # set once the blob is wrong; every read raises it
        self._warned = False
        # a whole pass of this process matched the digest, with a part of the blob in memory
        self._proven = False
        self._disks: tuple[DiskStore, ...] = () if verified is None else (verified,)
        if verified is None or not verified.complete:
            self._writable()

    # reading -----------------------------------------------------------------------------

    def peek(self, offset: int, length: int) -> Buffer | None:
        """The bytes of a range if they are checked and need not block; else None."""
        for disk in self._disks:
            if (data := disk.peek(offset, length)) is not None:
                return data
        return self._memory.peek(offset, length) if length > 0 else None

    def read(self, offset: int, length: int) -> Buffer | None:
        """The bytes of a range, checked; None if they are missing or damaged, or neither one file nor
        memory has all of them.  Blocks."""
        for disk in self._disks:
            try:
                if (data := disk.read(offset, length)) is not None:
                    return data
            except OSError as e:
                log.warning("%s: can't read from the cache: %s", self.name, e.strerror)
        return self._memory.peek(offset, length)

    def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        data = self.read(offset, length)
        if data is None:
            raise IntegrityError(f"{self.name}: the cached data at offset {offset} is damaged")
        return data

    def missing(self, first: int, last: int) -> list[int]:
        """The segments from ``first`` to ``last`` that are not stored."""
        return [n for n in range(first, last + 1) if not self.has(n)]

    def has(self, number: int) -> bool:
        return any(disk.has(number) for disk in self._disks) or self._memory.has(number)

    def present(self) -> int:
        """About how many segments are stored: those of the fuller file, and those in memory."""
        return max((d.present() for d in self._disks), default=0) + self._memory.present()

    def check(self, first: int, last: int) -> None:
        """Check stored segments before a reader gets to them.  Blocks.  Raises OSError."""
        for disk in self._disks:
            disk.check([n for n in disk.unchecked(first, last) if disk.has(n)])

    def unchecked(self, first: int, last: int) -> bool:
        """Whether this process has not checked some of these segments on disk, stored or not."""
        return any(disk.unchecked(first, last) for disk in self._disks)

    @property
    def complete(self) -> bool:
        """Whether a whole pass has found the blob right in one file."""
        return any(disk.complete for disk in self._disks)

    @property
    def verified(self) -> bool:
        """Whether a whole pass found that the blob matches its digest."""
        return self._proven or (self.digest is not None and self.complete)

    @property
    def backing(self) -> tuple[int, int] | None:
        for disk in self._disks:
            if (backing := disk.backing) is not None:
                return backing
        return None

    def adopt(self, verified: Verified | None) -> None:
        """Use a verified blob that was found after this store was made; None: there is none."""
        if verified is not None:
            self._verified = verified
            self._disks = (verified, *self._disks)

    # writing -----------------------------------------------------------------------------

    def _writable(self) -> Claimed | None:
        """The claimed blob on disk, opened at the first call; None if it can't be opened."""
        if self._claimed is None and self._open_claimed is not None:
            try:
                self._claimed = self._open_claimed()
                self._disks = (*self._disks, self._claimed)
            except OSError as e:
                self._warn(e)
            self._open_claimed = None
        return self._claimed

    def put(self, number: int, data: Buffer) -> None:
        """Store a segment, on disk if there is room, else in memory.  Blocks.  Raises IntegrityError if
        the blob is known to be wrong, or memory held other bytes of this segment before."""
        if self.error is not None:
            raise self.error
        disk = None if self._frozen is not None else self._writable()
        if disk is not None and not self._memory.knows(number):
            try:
                with self._storing(len(data)) as room:
                    if room:
                        disk.put(number, data)
                        return
            except OSError as e:
                self._warn(e)
        self._memory.put(number, data)

    def _warn(self, e: OSError) -> None:
        if not self._warned:
            self._warned = True
            where = f"{e.filename}: " if e.filename else ""
            log.warning("%s: %s%s; keeping new data in memory only", self.name, where, e.strerror)

    def forget(self, number: int) -> bool:
        """Drop a segment whose bytes were found wrong.  Returns whether fetching it again may bring
        other bytes: if the blob is verified, only if the disk has damaged them."""
        if self.verified:
            damaged = [d for d in self._disks if d.has(number) and d.segment(number) is None]
            return bool(damaged)
        for disk in self._disks:
            disk.forget(number)
        self._memory.forget(number)
        return True

    @contextmanager
    def claimed(self, first: int, last: int) -> Iterator[bool]:
        """Lock segments that this process is about to fetch; yields False at once if another process
        has locked some of them."""
        disk = self._writable()
        if disk is None:
            yield True
            return
        with disk.claimed(first, last) as ours:
            yield ours

    # verifying ---------------------------------------------------------------------------

    @property
    def ripe(self) -> bool:
        """Whether every segment is on disk, and no whole pass has checked the blob yet."""
        disk = self._claimed
        if disk is None or disk.state != FILLING or self.complete:
            return False
        return sum(d.present() for d in self._disks) >= self.count and all(
            any(d.has(n) for d in self._disks) for n in range(self.count)
        )

    def settle(self) -> bool | None:
        """Check the whole blob against its digest.  Blocks while it reads every segment.

        True: the blob matches, or has no digest and is undamaged.  False: it does not match; all of its
        segments are dropped.  None: it can't be checked now.  Raises OSError."""
        disk = self._claimed
        if disk is None:
            return None
        if self._verified is not None:  # the verified blob has lost segments: copy the rest of them
            for number in range(self.count):
                if not disk.has(number) and (data := self._verified.segment(number)) is not None:
                    disk.put(number, data)
        right = disk.settle(self.digest, self._settled)
        if right is False:
            self.condemn()
        return right

    def freeze(self) -> bool:
        """Keep all processes from adding to the blob on disk, so that a whole pass can verify the blob
        while memory holds a part of it.  False if a process is writing, or the file system has no
        locks.  Raises OSError."""
        if self._claimed is not None and self._frozen is None:
            self._frozen = self._claimed.frozen()
            return self._frozen is not None
        return True

    def proven(self) -> None:
        """Record that a whole pass over the frozen blob matched its digest."""
        self._proven = True

    def condemn(self, error: IntegrityError | None = None) -> None:
        """Record that the blob is wrong: drop all of its segments, and have every later read raise
        ``error`` (default: the blob does not match its digest)."""
        self.error = error or IntegrityError(
            f"{self.name}: does not match its digest {self.digest}"
        )
        if self._claimed is not None:
            self._claimed.discard()
        self._disks = ()
        self._memory.clear()

    def extent(self, number: int) -> tuple[int, int]:
        """Offset and length of a segment in bytes."""
        return extent_of(self.size, number)

    def close(self) -> None:
        """Close the files and drop the segments in memory.  Idempotent."""
        for disk in (self._verified, self._claimed, self._frozen):
            if disk is not None:
                disk.close()
        self._memory.clear()
        self._close()

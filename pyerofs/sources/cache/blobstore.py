"""All that is kept of one blob: verified segments, which everybody shares; claimed ones, of its own
origin only; and in memory what the disk does not take."""

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
    """The segments of one blob.  Thread-safe.  Also a Source, of those that are there.

    ``digest``: what all bytes together must be; None where nothing says so."""

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
        """``claimed`` opens the blob of its origin on disk, where there is to be one; it may raise
        OSError.  ``settled``: where it goes once its digest was checked.  ``storing``: whether the
        cache may grow by so many bytes, while they are written.  ``close``: called at the end."""
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
        self.error: IntegrityError | None = None  # why nothing of it is handed out any more
        self._warned = False
        self._proven = False  # by a whole pass of this process, over what memory can't hold
        self._disks: tuple[DiskStore, ...] = () if verified is None else (verified,)
        if verified is None or not verified.complete:
            self._writable()

    # reading -----------------------------------------------------------------------------

    def peek(self, offset: int, length: int) -> Buffer | None:
        """A range if that takes no waiting."""
        for disk in self._disks:
            if (found := disk.peek(offset, length)) is not None:
                return found
        return self._memory.peek(offset, length) if length > 0 else None

    def read(self, offset: int, length: int) -> Buffer | None:
        """A range, checked; None if it is not there (any more), or not in one place.  Blocks."""
        for disk in self._disks:
            try:
                if (found := disk.read(offset, length)) is not None:
                    return found
            except OSError as e:
                log.warning("%s: the cache can't be read: %s", self.name, e.strerror)
        return self._memory.peek(offset, length)

    def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        found = self.read(offset, length)
        if found is None:
            raise IntegrityError(f"{self.name}: what the cache holds at {offset} is damaged")
        return found

    def missing(self, first: int, last: int) -> list[int]:
        """Which of these segments (``last`` included) are not there."""
        return [n for n in range(first, last + 1) if not self.has(n)]

    def has(self, number: int) -> bool:
        return any(disk.has(number) for disk in self._disks) or self._memory.has(number)

    def present(self) -> int:
        """How many segments are there, at least."""
        return max((d.present() for d in self._disks), default=0) + self._memory.present()

    def check(self, first: int, last: int) -> None:
        """Look at stored segments before a reader gets to them.  Blocks."""
        for disk in self._disks:
            disk.check([n for n in disk.unchecked(first, last) if disk.has(n)])

    def unchecked(self, first: int, last: int) -> bool:
        """Whether ``check`` would have something to do."""
        return any(disk.unchecked(first, last) for disk in self._disks)

    @property
    def complete(self) -> bool:
        """Whether all of it is in one file, and found right."""
        return any(disk.complete for disk in self._disks)

    @property
    def verified(self) -> bool:
        """Whether everything that is read is what the digest says."""
        return self._proven or (self.digest is not None and self.complete)

    @property
    def backing(self) -> tuple[int, int] | None:
        for disk in self._disks:
            if (found := disk.backing) is not None:
                return found
        return None

    def adopt(self, verified: Verified | None) -> None:
        """Take in a verified blob that has turned up, if one has."""
        if verified is not None:
            self._verified = verified
            self._disks = (verified, *self._disks)

    # writing -----------------------------------------------------------------------------

    def _writable(self) -> Claimed | None:
        """The claimed blob on disk, opened when it is first needed; None where there can be none."""
        if self._claimed is None and self._open_claimed is not None:
            try:
                self._claimed = self._open_claimed()
                self._disks = (*self._disks, self._claimed)
            except OSError as e:
                self._warn(e)
            self._open_claimed = None
        return self._claimed

    def put(self, number: int, data: Buffer) -> None:
        """Keep a segment: on disk where there is room, else in memory.  Blocks.  Raises IntegrityError
        where it is known to have been different before."""
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
            log.warning(
                "%s: %s%s; going on without keeping it on disk", self.name, where, e.strerror
            )

    def forget(self, number: int) -> bool:
        """Drop a segment that turned out wrong; whether fetching it again may bring other bytes."""
        if self.verified:  # then only the disk can be at fault
            damaged = [d for d in self._disks if d.has(number) and d.segment(number) is None]
            return bool(damaged)
        for disk in self._disks:
            disk.forget(number)
        self._memory.forget(number)
        return True

    @contextmanager
    def claimed(self, first: int, last: int) -> Iterator[bool]:
        """Hold a lock against other processes on segments that are about to be fetched; gives False
        at once where another one holds some of them."""
        disk = self._writable()
        if disk is None:
            yield True
            return
        with disk.claimed(first, last) as ours:
            yield ours

    # judging -----------------------------------------------------------------------------

    @property
    def ripe(self) -> bool:
        """Whether all of it is on disk, and it is still to be found out whether it is right."""
        disk = self._claimed
        if disk is None or disk.state != FILLING or self.complete:
            return False
        return sum(d.present() for d in self._disks) >= self.count and all(
            any(d.has(n) for d in self._disks) for n in range(self.count)
        )

    def settle(self) -> bool | None:
        """Find out whether it is right.  Blocks for as long as it takes to read everything.

        True: it is, and is shared from now on.  False: it is not, and nothing of it is kept.  None:
        that can't be told now.  Raises OSError."""
        disk = self._claimed
        if disk is None:
            return None
        if self._verified is not None:  # it has lost segments: put together what both have
            for number in range(self.count):
                if not disk.has(number) and (data := self._verified.segment(number)) is not None:
                    disk.put(number, data)
        found = disk.settle(self.digest, self._settled)
        if found is False:
            self.condemn()
        return found

    def freeze(self) -> bool:
        """From now on nobody adds to what is on disk, so that a whole pass proves something even where
        memory holds a part.  False where somebody is just writing.  Raises OSError."""
        if self._claimed is not None and self._frozen is None:
            self._frozen = self._claimed.frozen()
            return self._frozen is not None
        return True

    def proven(self) -> None:
        """Told that a whole pass over a frozen blob has found its digest."""
        self._proven = True

    def condemn(self, error: IntegrityError | None = None) -> None:
        """Told that it is wrong: nothing of it is kept or handed out any more.  ``error``: why, if not
        because of its digest."""
        self.error = error or IntegrityError(
            f"{self.name}: is not what its digest {self.digest} says"
        )
        if self._claimed is not None:
            self._claimed.discard()
        self._disks = ()
        self._memory.clear()

    def extent(self, number: int) -> tuple[int, int]:
        """Offset and length of a segment."""
        return extent_of(self.size, number)

    def close(self) -> None:
        """Let go; idempotent."""
        for disk in (self._verified, self._claimed, self._frozen):
            if disk is not None:
                disk.close()
        self._memory.clear()
        self._close()

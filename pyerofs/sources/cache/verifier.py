"""Check a whole blob against its digest."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable

import trio

from pyerofs.errors import SourceError
from pyerofs.sources.base import Buffer
from pyerofs.sources.cache.blobstore import BlobStore

log = logging.getLogger("pyerofs")

FREEZING = 200  # attempts, 50 ms apart, to lock other processes out for a whole pass


class Verifier:
    """Checks the digest of one blob: in the background once all of it is on disk, or on request."""

    def __init__(self, store: BlobStore, nursery: trio.Nursery) -> None:
        self._store = store
        self._nursery = nursery
        self._running: trio.Event | None = None  # set when the check in the background has ended

    def start(self) -> None:
        """Check in the background if the whole blob is on disk and was not checked yet."""
        if self._running is None and self._store.ripe:
            self._running = trio.Event()
            self._nursery.start_soon(self._check_disk, self._running)

    async def _check_disk(self, ended: trio.Event) -> None:
        name = self._store.name
        try:
            right = await trio.to_thread.run_sync(self._store.settle, abandon_on_cancel=True)
            if right:
                log.info("%s: complete%s", name, ", and verified" if self._store.verified else "")
            elif right is not None:
                log.info("%s", self._store.error)  # every later read raises this error
        except (SourceError, OSError) as e:
            log.warning("%s: can't read the cached blob to check it: %s", name, e)
        finally:
            self._running = None
            ended.set()

    async def finish(
        self,
        read_segment: Callable[[int], Awaitable[Buffer]],
        landed: Callable[[], Awaitable[None]],
    ) -> None:
        """Check the digest now.  Every segment must have been fetched once.  ``read_segment`` reads a
        segment; ``landed`` waits until the segments being fetched are stored.

        Raises IntegrityError if the blob does not match its digest, SourceError if that can't be
        checked."""
        self.start()
        while self._running is not None:
            await self._running.wait()
        store = self._store
        if not store.verified and store.error is None:
            await self._whole_pass(read_segment, landed)
        if store.error is not None:
            raise store.error

    async def _whole_pass(
        self,
        read_segment: Callable[[int], Awaitable[Buffer]],
        landed: Callable[[], Awaitable[None]],
    ) -> None:
        """Check a blob that does not fit on disk.  Segments that memory has dropped are fetched again,
        and must be the same as before."""
        store = self._store
        assert store.digest is not None
        for _ in range(FREEZING):  # another process may be writing a segment
            if await trio.to_thread.run_sync(store.freeze):
                break
            await trio.sleep(0.05)
        algorithm = store.digest.partition(":")[0]
        hasher = hashlib.new(algorithm)
        for number in range(store.count):
            data = await read_segment(number)
            await trio.to_thread.run_sync(hasher.update, data)
        await landed()
        if f"{algorithm}:{hasher.hexdigest()}" != store.digest:
            await trio.to_thread.run_sync(store.condemn)
        elif await trio.to_thread.run_sync(store.freeze):
            store.proven()
        else:
            raise SourceError(
                f"{store.name}: can't be verified while other processes fetch it; try again later"
            )

"""Gets what the parser misses: fetches and decodes it, pins it, and calls the parser again.

Calls that want the same data at the same time share one fetch or one decoding (single flight).
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from typing import Protocol, TypeVar, TypeVarTuple

import trio

from pyerofs.errors import ErofsError, IntegrityError
from pyerofs.format.memory import (
    Fault,
    FaultingMemory,
    NotDecoded,
    NotResident,
    Pcluster,
    cheap,
    decode_ns,
)
from pyerofs.format.model import ENCODED, PLAIN, Extent
from pyerofs.sources.base import QUICK_NS, AsyncSource, Buffer, Source

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MAX_FAULTS = 1024  # per parser call: a path through forty directories needs a few dozen
MAX_PINNED = 256 << 20  # bytes pinned for one parser call
BATCH_NS = 3_000_000  # of decoding, estimated, in one read-ahead job of a thread
MAX_BATCHES = 8  # read-ahead jobs at once, for all readers together


class Schedule(Protocol):
    """Decides how long an AsyncImage may block the event loop; only its front-end knows that."""

    @property
    def ahead(self) -> int | None:
        """Bytes to decode ahead of a sequential reader; None: derived from the cache size."""

    def may_block(self, ns: float) -> bool:
        """Whether the event loop may compute or wait for a disk for ``ns`` nanoseconds now, because
        no other task needs it.  Not asked about work that takes about as long as a thread hop."""


class Considerate:
    """The Schedule of an image whose event loop also runs unknown tasks: never permits blocking."""

    ahead: int | None = None

    def may_block(self, ns: float) -> bool:
        return False


CONSIDERATE = Considerate()


class Flight:
    """A single-flight operation: one task runs it, other tasks wait for its result."""

    __slots__ = ("done", "error", "result")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.result: Buffer | None = None
        self.error: ErofsError | None = None


class Pager:
    """Brings what a FaultingMemory lacks into it, for one event loop."""

    def __init__(
        self,
        sources: Sequence[AsyncSource],
        nursery: trio.Nursery,
        cache_size: int,
        schedule: Schedule,
    ) -> None:
        """``nursery``: runs the background tasks that decode ahead."""
        self._sources = tuple(sources)
        self._nursery = nursery
        self._may_block = schedule.may_block
        self._flights: dict[Hashable, Flight] = {}
        self._batches = 0
        self._decoders = trio.CapacityLimiter(os.cpu_count() or 1)
        self.memory = FaultingMemory(
            [s.peek for s in sources],
            [s.size for s in sources],
            [s.name for s in sources],
            cache_size,
            may_block=self._may_block,
            under_way=self._flights,
        )

    async def call(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Call a parser function; after each Fault, get the missing data and call it again."""
        try:
            return function(*args)
        except Fault as fault:
            return await self.resume(fault, function, *args)

    async def resume(self, fault: Fault, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Like ``call``, after a first call has raised ``fault``.  Raises ErofsError above
        MAX_FAULTS or MAX_PINNED."""
        memory = self.memory
        pins: dict[object, Buffer] = {}
        pinned = 0
        for _ in range(MAX_FAULTS):
            if isinstance(fault, NotResident):
                key: Hashable = (fault.device, fault.offset, fault.length)
                found: Buffer = await self._fetch(fault.device, fault.offset, fault.length)
            else:
                assert isinstance(fault, NotDecoded)
                key = fault.pcluster
                found = await self.decoded(fault.pcluster)
            pins[key] = found
            pinned += len(found)
            if pinned > MAX_PINNED:
                break
            try:
                with memory.pinned(pins):
                    return function(*args)
            except Fault as e:
                fault = e
        raise ErofsError(f"one operation needs more than {MAX_FAULTS} pieces or {MAX_PINNED} bytes")

    async def _fetch(self, device: int, offset: int, length: int) -> Buffer:
        source = self._sources[device]
        if source.blocking is not None and source.quick and self._may_block(QUICK_NS):
            return source.blocking.read_at(offset, length)
        return await self._once(
            (device, offset, length), lambda: source.read_at(offset, length), lambda _: True
        )

    async def decoded(self, pcluster: Pcluster) -> Buffer:
        """The decoded bytes of a pcluster; tasks that want it at the same time share one decoding."""
        found = self.memory.pclusters.get(pcluster.key)
        if found is not None and len(found) >= pcluster.length:
            return found
        return await self._once(
            pcluster.key,
            lambda: self._decode(pcluster),
            lambda result: len(result) >= pcluster.length,
        )

    async def _decode(self, pcluster: Pcluster) -> Buffer:
        memory = self.memory
        try:
            encoded = memory.encoded(pcluster)
        except NotResident as e:
            source = self._sources[e.device]
            if e.window:
                encoded = await self.call(memory.encoded, pcluster)
            elif source.blocking is None or (source.quick and self._may_block(QUICK_NS)):
                encoded = await self._fetch(e.device, e.offset, e.length)
            else:  # read and decode in one thread job
                try:
                    return await trio.to_thread.run_sync(
                        self._read_and_decode, source.blocking, pcluster, limiter=self._decoders
                    )
                except IntegrityError:  # a damaged cache on disk: fetch the bytes again
                    encoded = await self._fetch(e.device, e.offset, e.length)
        except Fault:
            encoded = await self.call(memory.encoded, pcluster)
        if memory.decodes_here(pcluster):
            return memory.decode(pcluster, encoded)
        return await trio.to_thread.run_sync(
            memory.decode, pcluster, encoded, limiter=self._decoders
        )

    def _read_and_decode(self, source: Source, pcluster: Pcluster) -> Buffer:
        encoded = source.read_at(pcluster.address, pcluster.size)
        return self.memory.decode(pcluster, encoded)

    def decode_ahead(self, pclusters: Iterable[Pcluster]) -> None:
        """Start decoding in worker threads.  Never waits or raises.

        Best effort: it skips pclusters of remote sources, pclusters beyond MAX_BATCHES jobs, and
        pclusters that decode faster than a thread hop takes.  Errors are dropped; a later read of
        the pcluster meets them again."""
        batch: list[Pcluster] = []
        asked: set[Hashable] = set()  # extents may share a pcluster
        cost = 0.0
        for pcluster in pclusters:
            if cheap(pcluster) or pcluster.device < 0:
                continue
            if self._sources[pcluster.device].blocking is None:
                continue
            key = pcluster.key
            if key in asked or key in self._flights or self.memory.holds(pcluster):
                continue
            if self._batches >= MAX_BATCHES:
                break
            asked.add(key)
            batch.append(pcluster)
            cost += decode_ns(pcluster)
            if cost >= BATCH_NS:
                self._start_batch(batch)
                batch, cost = [], 0.0
        if batch:
            self._start_batch(batch)

    def hint(self, found: list[Extent]) -> None:
        """Hint the extents' ranges to the sources, one hint per run of adjacent ranges."""
        row: tuple[int, int, int] | None = None  # device, start, end
        for extent in found:
            if extent.kind not in (ENCODED, PLAIN) or extent.device < 0:
                continue
            end = extent.address + (extent.size or extent.length)
            if row is not None and row[0] == extent.device and row[2] == extent.address:
                row = (row[0], row[1], end)
                continue
            if row is not None:
                self._sources[row[0]].will_need(row[1], row[2] - row[1])
            row = (extent.device, extent.address, end)
        if row is not None:
            self._sources[row[0]].will_need(row[1], row[2] - row[1])

    def _start_batch(self, batch: list[Pcluster]) -> None:
        flights = []
        for pcluster in batch:
            flight = self._flights[pcluster.key] = Flight()
            flights.append((pcluster, flight))
        self._batches += 1
        self._nursery.start_soon(self._run_batch, flights)

    async def _run_batch(self, batch: list[tuple[Pcluster, Flight]]) -> None:
        def work() -> None:
            for pcluster, flight in batch:
                source = self._sources[pcluster.device].blocking
                assert source is not None
                try:
                    flight.result = self._read_and_decode(source, pcluster)
                except Exception:  # of any kind: a later read of the pcluster raises it again
                    continue

        try:
            await trio.to_thread.run_sync(work, limiter=self._decoders)
        finally:
            self._batches -= 1
            for pcluster, flight in batch:
                del self._flights[pcluster.key]
                flight.done.set()

    async def _once(
        self, key: Hashable, get: Callable[[], Awaitable[T]], enough: Callable[[T], bool]
    ) -> T:
        """Single flight: if another task is running ``get`` for this key, wait for it; then raise
        its ErofsError, or use its result if ``enough(result)``.  Otherwise run ``get``."""
        flights = self._flights
        while (flight := flights.get(key)) is not None:
            await flight.done.wait()
            if flight.error is not None:
                raise flight.error
            result: T = flight.result  # type: ignore[assignment]
            if result is not None and enough(result):
                return result
            # the other task was cancelled, or its result is too short: try again
        flight = flights[key] = Flight()
        try:
            result = await get()
            flight.result = result  # type: ignore[assignment]
            return result
        except ErofsError as e:
            flight.error = e
            raise
        finally:
            del flights[key]
            flight.done.set()

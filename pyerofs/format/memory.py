"""The parser's access to the image: caches of metadata and of decoded pclusters.

The parser is synchronous and reads through a ``Memory``.  There are two kinds.  ``BlockingMemory``
fetches and decodes missing data in the calling thread.  ``FaultingMemory`` never waits: like a page
fault, it raises a ``Fault`` that names the missing data; the caller gets that data and calls the
parser again.

Metadata is cached in *windows*, aligned pieces of a device; decoded pclusters are cached whole or,
first, as a prefix (see ``Memory.enough``).  Both caches are bounded in bytes.  This module depends
on sources and the decoder, not on inodes.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from pyerofs.errors import CorruptImage
from pyerofs.format.codecs import STOP_EARLY, DecodeError, Decoder
from pyerofs.format.ondisk import (
    ALG_DEFLATE,
    ALG_INTERLACED,
    ALG_LZ4,
    ALG_LZMA,
    ALG_NAMES,
    ALG_ZSTD,
    PCLUSTER_MAX_DSIZE,
    PCLUSTER_MAX_SIZE,
)
from pyerofs.sources.base import Buffer, Source, data_from

WINDOW_BITS = 16  # 64 KiB: one request for hundreds of inodes, small beside the cache
WINDOW_SIZE = 1 << WINDOW_BITS
DEFAULT_CACHE_SIZE = 64 << 20

METABOX = -1  # pseudo device: offsets inside the metabox inode
DEVICES = 8192  # > superblock.MAX_DEVICES: packs window index and device into one key

Key = TypeVar("Key")
Value = TypeVar("Value", bound=Sized)


PclusterKey: TypeAlias = tuple[int, int, int, int, int]


class Pcluster(NamedTuple):
    """A physical cluster: the location of its encoded bytes, and how to decode them."""

    device: int  # a device number, or METABOX
    address: int  # byte offset there
    size: int  # encoded bytes, padding included
    algorithm: int
    shift: int  # INTERLACED only: how many bytes at the end are the first when decoded
    length: int  # decoded bytes needed
    partial: bool  # may decode to more than ``length``
    nid: int  # the inode that refers to it, for messages

    @property
    def key(self) -> PclusterKey:
        """The fields that determine the decoded bytes; deduplicated files share them."""
        return self[:5]

    def corrupt(self, what: str) -> CorruptImage:
        where = "metabox " if self.device == METABOX else ""
        return CorruptImage(f"{where}pcluster: {what}", offset=self.address, nid=self.nid)


class Fault(Exception):
    """Data is not in memory.  Not an error: never leaves the package."""


class NotResident(Fault):
    """``length`` bytes at ``offset`` of a device are not in memory; ``window``: they may be cached."""

    def __init__(self, device: int, offset: int, length: int, window: bool) -> None:
        super().__init__(device, offset, length)
        self.device = device
        self.offset = offset
        self.length = length
        self.window = window


class NotDecoded(Fault):
    """A pcluster is not in the cache of decoded pclusters."""

    def __init__(self, pcluster: Pcluster) -> None:
        super().__init__(pcluster)
        self.pcluster = pcluster


class ByteCache(Generic[Key, Value]):
    """A least-recently-used cache bounded by the bytes of its values, their ``len``.  Thread-safe."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._items: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        value = self._items.get(key)
        if value is not None:
            try:
                self._items.move_to_end(key)
            except KeyError:  # evicted by another thread in between; the value is still valid
                pass
        return value

    def put(self, key: Key, value: Value) -> None:
        with self._lock:
            old = self._items.pop(key, None)
            if old is not None:
                self.used -= len(old)
            self._items[key] = value
            self.used += len(value)
            while self.used > self.capacity and self._items:
                _, gone = self._items.popitem(last=False)
                self.used -= len(gone)

    def __contains__(self, key: Key) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)


class Memory(ABC):
    """Base of both kinds: the caches of windows and of decoded pclusters, and access to them."""

    def __init__(self, sizes: Sequence[int], names: Sequence[str], cache_size: int) -> None:
        """``sizes`` (bytes) and ``names`` of the devices, the primary one first.  ``cache_size``:
        bytes, a quarter for windows, a sixteenth for parts of indexes, the rest for decoded
        pclusters."""
        self.sizes = tuple(sizes)
        self._names = tuple(names)
        self.windows: ByteCache[int, Buffer] = ByteCache(max(cache_size // 4, WINDOW_SIZE))
        self.parts_size = max(cache_size // 16, WINDOW_SIZE)  # for parts of indexes; see Volume
        self.pclusters: ByteCache[PclusterKey, Buffer] = ByteCache(
            cache_size - cache_size // 4 - cache_size // 16
        )
        self._decoder = Decoder()
        self._metabox_size = 0
        self._read_metabox: Callable[[int, int], Buffer] | None = None
        self._recent: tuple[int | None, Buffer] = (None, b"")  # key and window that were used last
        self.decodes = 0  # pclusters decoded so far

    def decode_with(self, decoder: Decoder) -> None:
        """Set the decoder once the superblock, which is itself read through this memory, is known."""
        self._decoder = decoder

    def add_metabox(self, size: int, read: Callable[[int, int], Buffer]) -> None:
        """Define the pseudo device METABOX, of ``size`` bytes, read with ``read(offset, length)``."""
        self._metabox_size = size
        self._read_metabox = read

    # metadata ---------------------------------------------------------------------------

    def at(self, device: int, offset: int, length: int) -> tuple[Buffer, int]:
        """A buffer with ``length`` bytes of metadata at ``offset``, and their position in the
        buffer.

        Raises CorruptImage if they reach beyond the device, SourceError, or Fault (FaultingMemory)."""
        key = (offset >> WINDOW_BITS) * DEVICES + device
        recent, window = self._recent
        if key != recent:
            window = self.windows.get(key) or self._window(device, offset >> WINDOW_BITS)
            self._recent = key, window
        pos = offset & WINDOW_SIZE - 1
        if offset >= 0 and pos + length <= len(window):
            return window, pos
        return self._across(device, offset, length), 0

    def _window(self, device: int, index: int) -> Buffer:
        size = self._metabox_size if device == METABOX else self.sizes[device]
        start = index << WINDOW_BITS
        if not 0 <= start < size:
            raise CorruptImage(f"reference beyond the end of {self._name(device)}", offset=start)
        length = min(WINDOW_SIZE, size - start)
        if device != METABOX:
            window = self._load(device, start, length, True)
        elif self._read_metabox is None:
            raise CorruptImage("inode in a metabox, but the image has none")
        else:
            window = self._read_metabox(start, length)
        self.windows.put(index * DEVICES + device, window)
        return window

    def _across(self, device: int, offset: int, length: int) -> Buffer:
        """Metadata that spans windows.  Callers limit ``length`` to what the format allows."""
        size = self._metabox_size if device == METABOX else self.sizes[device]
        if offset < 0 or length < 0 or offset + length > size:
            raise CorruptImage(
                f"{length} bytes reach beyond the end of {self._name(device)} ({size} bytes)",
                offset=offset,
            )
        pieces = []
        end = offset + length
        while offset < end:
            n = min(end, (offset | WINDOW_SIZE - 1) + 1) - offset
            window, pos = self.at(device, offset, n)
            pieces.append(window[pos : pos + n])
            offset += n
        return b"".join(pieces)

    def bytes_at(self, device: int, offset: int, length: int) -> bytes:
        """A copy of ``length`` bytes of metadata.  Raises as ``at`` does."""
        buffer, pos = self.at(device, offset, length)
        return bytes(buffer[pos : pos + length])

    def resident(self, device: int, offset: int, length: int) -> bytes | None:
        """A copy of ``length`` bytes of metadata if they are in the cache; otherwise None.  Never
        reads."""
        pieces = []
        end = offset + length
        while offset < end:
            window = self.windows.get((offset >> WINDOW_BITS) * DEVICES + device)
            if window is None:
                return None
            pos = offset & WINDOW_SIZE - 1
            piece = window[pos : min(pos + end - offset, WINDOW_SIZE)]
            if not piece:
                return None
            pieces.append(piece)
            offset += len(piece)
        return b"".join(pieces)

    # data -------------------------------------------------------------------------------

    def raw(self, device: int, offset: int, length: int) -> Buffer:
        """File data as stored on a device.  Not cached.  Raises as ``at`` does."""
        self.check_bounds(device, offset, length)
        return self._load(device, offset, length, False)

    def check_bounds(self, device: int, offset: int, length: int) -> None:
        """Raise CorruptImage unless data lies within a device."""
        size = self._metabox_size if device == METABOX else self.sizes[device]
        if offset < 0 or offset + length > size:
            raise CorruptImage(
                f"data beyond the end of {self._name(device)} ({size} bytes)", offset=offset
            )

    def data_from(self, device: int, offset: int) -> int:
        """The next offset, from ``offset`` on, where a device may hold non-zero bytes (like
        SEEK_DATA), as far as its source can tell without reading."""
        return offset

    def decoded(self, pcluster: Pcluster) -> Buffer:
        """The decoded bytes of a pcluster, at least ``pcluster.length`` of them."""
        found = self.pclusters.get(pcluster.key)
        if found is not None and len(found) >= pcluster.length:
            return found
        return self._decode(pcluster)

    def first(self, pcluster: Pcluster, need: int) -> Buffer:
        """At least the first ``need`` decoded bytes of a pcluster, with no more work than is
        ``enough``."""
        found = self.pclusters.get(pcluster.key)
        if found is not None and len(found) >= need:
            return found
        return self._decode(self.enough(pcluster, need))

    def enough(self, pcluster: Pcluster, need: int) -> Pcluster:
        """The pcluster reduced to its first ``need`` decoded bytes, if that is less work.

        Where the cache has fewer than that, all of it is decoded, so that no prefix is decoded
        repeatedly."""
        if need < pcluster.length and pcluster.algorithm in STOP_EARLY:
            found = self.pclusters.get(pcluster.key)
            if found is None or len(found) >= need:
                return Pcluster(*pcluster.key, need, True, pcluster.nid)
        return pcluster

    def holds(self, pcluster: Pcluster) -> bool:
        """Whether the cache holds the decoded bytes that ``decoded`` would return."""
        found = self.pclusters.get(pcluster.key)
        return found is not None and len(found) >= pcluster.length

    def encoded(self, pcluster: Pcluster) -> Buffer:
        """The encoded bytes of a pcluster."""
        if pcluster.device == METABOX:
            return self.bytes_at(METABOX, pcluster.address, pcluster.size)
        return self.raw(pcluster.device, pcluster.address, pcluster.size)

    def decode(self, pcluster: Pcluster, data: Buffer) -> Buffer:
        """Decode ``data`` and cache the result.  CPU-bound, thread-safe.  Raises CorruptImage."""
        if pcluster.size > PCLUSTER_MAX_SIZE or pcluster.length > PCLUSTER_MAX_DSIZE:
            raise pcluster.corrupt(f"{pcluster.size} bytes for {pcluster.length}")
        try:
            out = self._decoder(
                pcluster.algorithm, data, pcluster.length, pcluster.partial, pcluster.shift
            )
        except DecodeError as e:
            raise pcluster.corrupt(str(e)) from None
        if len(out) < pcluster.length:
            name = ALG_NAMES[pcluster.algorithm]
            raise pcluster.corrupt(f"{name}: {len(out)} bytes instead of {pcluster.length}")
        self.decodes += 1
        self.pclusters.put(pcluster.key, out)
        return out

    def _name(self, device: int) -> str:
        return "the metabox" if device == METABOX else self._names[device]

    @abstractmethod
    def _load(self, device: int, offset: int, length: int, window: bool) -> Buffer:
        """Read bytes of a device that are not cached; ``window``: the caller caches them."""

    @abstractmethod
    def _decode(self, pcluster: Pcluster) -> Buffer:
        """Decode a pcluster that is not in the cache."""


class BlockingMemory(Memory):
    """Reads and decodes in the calling thread."""

    def __init__(self, sources: Sequence[Source], cache_size: int = DEFAULT_CACHE_SIZE) -> None:
        super().__init__([s.size for s in sources], [s.name for s in sources], cache_size)
        self._sources = tuple(sources)

    def _load(self, device: int, offset: int, length: int, window: bool) -> Buffer:
        return self._sources[device].read_at(offset, length)

    def _decode(self, pcluster: Pcluster) -> Buffer:
        return self.decode(pcluster, self.encoded(pcluster))

    def data_from(self, device: int, offset: int) -> int:
        return data_from(self._sources[device], offset)


Peek = Callable[[int, int], Buffer | None]

# Nanoseconds to decode one byte, measured on a slow machine; a thread hop costs about 60 us.
_NS_PER_BYTE = {ALG_LZ4: 0.4, ALG_ZSTD: 1.2, ALG_DEFLATE: 2.5, ALG_LZMA: 18.0, ALG_INTERLACED: 0.1}
INLINE_NS = 100_000


def decode_ns(pcluster: Pcluster) -> float:
    """Estimated nanoseconds to decode a pcluster."""
    return estimate_ns(pcluster.algorithm, pcluster.length)


def estimate_ns(algorithm: int, length: int) -> float:
    """Estimated nanoseconds to decode ``length`` bytes."""
    return length * _NS_PER_BYTE.get(algorithm, 100.0)


def cheap(pcluster: Pcluster) -> bool:
    """Whether decoding takes less than INLINE_NS, so that the event loop may do it."""
    return decode_ns(pcluster) < INLINE_NS


class FaultingMemory(Memory):
    """Returns data that is in memory, decodes cheap pclusters, raises a Fault for everything else.

    For the thread of one event loop."""

    def __init__(
        self,
        peeks: Sequence[Peek],
        sizes: Sequence[int],
        names: Sequence[str],
        cache_size: int,
        *,
        may_block: Callable[[float], bool] = lambda ns: False,
        under_way: Container[object] = (),
    ) -> None:
        """``peeks``: the ``peek`` of each device's source.  ``may_block(ns)``: whether the event
        loop may block for ``ns`` nanoseconds now.  ``under_way``: keys of pclusters being decoded
        by a task or thread."""
        super().__init__(sizes, names, cache_size)
        self._peeks = tuple(peeks)
        self._pins: Mapping[object, Buffer] = {}
        self._may_block = may_block
        self._under_way = under_way

    @contextmanager
    def pinned(self, pins: Mapping[object, Buffer]) -> Iterator[None]:
        """Within the block, use ``pins`` first: data fetched for one parser call, keyed by (device,
        offset, length) or by Pcluster.  Pins guarantee progress however small the caches are."""
        self._pins = pins
        try:
            yield
        finally:
            self._pins = {}

    def _load(self, device: int, offset: int, length: int, window: bool) -> Buffer:
        if self._pins and (pinned := self._pins.get((device, offset, length))) is not None:
            return pinned
        data = self._peeks[device](offset, length)
        if data is None:
            raise NotResident(device, offset, length, window)
        return data

    def decodes_here(self, pcluster: Pcluster) -> bool:
        """Whether the event loop decodes a pcluster: if it is cheap or ``may_block`` permits."""
        ns = decode_ns(pcluster)
        return ns < INLINE_NS or self._may_block(ns)

    def _decode(self, pcluster: Pcluster) -> Buffer:
        if (pinned := self._pins.get(pcluster)) is not None:
            return pinned
        if pcluster.key in self._under_way or not self.decodes_here(pcluster):
            raise NotDecoded(pcluster)
        return self.decode(pcluster, self.encoded(pcluster))


__all__ = [
    "DEFAULT_CACHE_SIZE",
    "METABOX",
    "WINDOW_SIZE",
    "BlockingMemory",
    "ByteCache",
    "Fault",
    "FaultingMemory",
    "Memory",
    "NotDecoded",
    "NotResident",
    "Pcluster",
    "cheap",
    "decode_ns",
]

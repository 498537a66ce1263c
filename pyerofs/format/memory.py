"""What the parser may look at: parts of the devices and decoded pclusters that are in memory.

The parser is synchronous and reads through a ``Memory``.  There are two kinds.  ``BlockingMemory``
fetches and decodes what is missing on the spot, in the calling thread.  ``FaultingMemory`` never
blocks: it raises a ``Fault`` that says what is missing, its caller gets that by whatever means and
calls the parser again, like a page fault.

Metadata is kept in *windows*, aligned pieces of a device; decoded pclusters are kept whole.  Both
caches are bounded in bytes.  This module knows sources and the decoder, and nothing of inodes.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
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
DEVICES = 8192  # more than an image can have (superblock.MAX_DEVICES): a window's key is one number

Key = TypeVar("Key")
Value = TypeVar("Value", bound=Buffer)


PclusterKey: TypeAlias = tuple[int, int, int, int, int]


class Pcluster(NamedTuple):
    """A physical cluster: encoded bytes somewhere, and how to decode them."""

    device: int  # a device number, or METABOX
    address: int  # byte offset there
    size: int  # encoded bytes, padding included
    algorithm: int
    shift: int  # INTERLACED only: how many of the last bytes come first
    length: int  # decoded bytes that are wanted
    partial: bool  # it may decode to more than ``length``
    nid: int  # the inode that refers to it, for messages

    @property
    def key(self) -> PclusterKey:
        """All that its decoded bytes depend on: deduplicated files share them."""
        return self[:5]

    def corrupt(self, what: str) -> CorruptImage:
        where = "metabox " if self.device == METABOX else ""
        return CorruptImage(f"{where}pcluster: {what}", offset=self.address, nid=self.nid)


class Fault(Exception):
    """Something is not in memory.  Not an error: never leaves the package."""


class NotResident(Fault):
    """``length`` bytes at ``offset`` of a device are missing; ``window`` if they may be kept."""

    def __init__(self, device: int, offset: int, length: int, window: bool) -> None:
        super().__init__(device, offset, length)
        self.device = device
        self.offset = offset
        self.length = length
        self.window = window


class NotDecoded(Fault):
    """A pcluster is missing."""

    def __init__(self, pcluster: Pcluster) -> None:
        super().__init__(pcluster)
        self.pcluster = pcluster


class ByteCache(Generic[Key, Value]):
    """A least-recently-used cache bounded by the bytes of its values.  Thread-safe."""

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
            except KeyError:  # evicted by another thread in between; the value is good
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
    """Common to both kinds: the windows, the decoded pclusters and how to look into them."""

    def __init__(self, sizes: Sequence[int], names: Sequence[str], cache_size: int) -> None:
        """``sizes`` and ``names``: of each device, the primary one first."""
        self.sizes = tuple(sizes)
        self._names = tuple(names)
        self.windows: ByteCache[int, Buffer] = ByteCache(max(cache_size // 4, WINDOW_SIZE))
        self.pclusters: ByteCache[PclusterKey, Buffer] = ByteCache(cache_size - cache_size // 4)
        self._decoder = Decoder()
        self._metabox_size = 0
        self._read_metabox: Callable[[int, int], Buffer] | None = None
        self.decodes = 0  # pclusters decoded so far

    def decode_with(self, decoder: Decoder) -> None:
        """Decode as the image's superblock wants it, which has been read through this memory."""
        self._decoder = decoder

    def add_metabox(self, size: int, read: Callable[[int, int], Buffer]) -> None:
        """Have the pseudo device METABOX, of ``size`` bytes, read by ``read(offset, length)``."""
        self._metabox_size = size
        self._read_metabox = read

    # metadata ---------------------------------------------------------------------------

    def at(self, device: int, offset: int, length: int) -> tuple[Buffer, int]:
        """A buffer and the position in it where ``length`` bytes of metadata at ``offset`` start.

        Raises CorruptImage when they reach beyond the device, or a Fault."""
        index = offset >> WINDOW_BITS
        window = self.windows.get(index * DEVICES + device)
        if window is None:
            window = self._window(device, index)
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
        """Bytes that span windows.  Callers bound ``length`` by what the format allows."""
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
        """Metadata as bytes of its own."""
        buffer, pos = self.at(device, offset, length)
        return bytes(buffer[pos : pos + length])

    # data -------------------------------------------------------------------------------

    def raw(self, device: int, offset: int, length: int) -> Buffer:
        """File data as it lies on a device.  Not kept."""
        if offset < 0 or offset + length > self.sizes[device]:
            raise CorruptImage(
                f"data beyond the end of {self._name(device)} ({self.sizes[device]} bytes)",
                offset=offset,
            )
        return self._load(device, offset, length, False)

    def data_from(self, device: int, offset: int) -> int:
        """Where a device has its next bytes that may be other than zeros, from ``offset`` on, as far as
        its source can tell without reading."""
        return offset

    def decoded(self, pcluster: Pcluster) -> Buffer:
        """The decoded bytes of a pcluster, at least ``pcluster.length`` of them."""
        found = self.pclusters.get(pcluster.key)
        if found is not None and len(found) >= pcluster.length:
            return found
        return self._decode(pcluster)

    def enough(self, pcluster: Pcluster, need: int) -> Pcluster:
        """The first ``need`` bytes of a pcluster, where that is less work than all of it.  Who looks
        into it for the second time gets all of it, lest its beginning be decoded over and over."""
        if (
            need < pcluster.length
            and pcluster.algorithm in STOP_EARLY
            and pcluster.key not in self.pclusters
        ):
            return pcluster._replace(length=need, partial=True)
        return pcluster

    def holds(self, pcluster: Pcluster) -> bool:
        """Whether ``decoded`` would answer from the cache."""
        found = self.pclusters.get(pcluster.key)
        return found is not None and len(found) >= pcluster.length

    def encoded(self, pcluster: Pcluster) -> Buffer:
        """The encoded bytes of a pcluster."""
        if pcluster.device == METABOX:
            return self.bytes_at(METABOX, pcluster.address, pcluster.size)
        return self.raw(pcluster.device, pcluster.address, pcluster.size)

    def decode(self, pcluster: Pcluster, data: Buffer) -> Buffer:
        """Decode ``data`` and keep the result.  CPU-bound, safe in any thread."""
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
        """Bytes of a device that are not in memory; ``window`` if they are to be kept."""

    @abstractmethod
    def _decode(self, pcluster: Pcluster) -> Buffer:
        """A pcluster that is not in the cache."""


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
    """About how long decoding takes, in nanoseconds."""
    return pcluster.length * _NS_PER_BYTE.get(pcluster.algorithm, 100.0)


def cheap(pcluster: Pcluster) -> bool:
    """Whether decoding takes so little time that the event loop may do it."""
    return decode_ns(pcluster) < INLINE_NS


class FaultingMemory(Memory):
    """Answers from memory, decodes what is cheap, raises Faults for the rest.

    For one event loop's thread."""

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
        """``may_block``: whether the event loop may work for so many nanoseconds now.  ``under_way``:
        the keys of pclusters that a task or thread is decoding."""
        super().__init__(sizes, names, cache_size)
        self._peeks = tuple(peeks)
        self._pins: Mapping[object, Buffer] = {}
        self._may_block = may_block
        self._under_way = under_way

    @contextmanager
    def pinned(self, pins: Mapping[object, Buffer]) -> Iterator[None]:
        """Within, answer from ``pins`` first: what was fetched for one parser call, by (device, offset,
        length) or Pcluster.  So the call makes progress however small the caches are."""
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
        """Whether a pcluster is decoded on the event loop, as things are."""
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

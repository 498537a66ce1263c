"""Parts of a file's lcluster index, decoded at once, for files that are read more than once.

To map an offset, ``zmap`` decodes three or four entries one by one, from as many packs.  A ``Part``
holds the entries of a thousand lclusters in arrays.  It finds a pcluster by the same rules in a
third of the time, and is decoded in the time that zmap takes for two offsets.

A part answers only what it is sure of.  What is unusual, be it damage or a pcluster that reaches
beyond the part, it leaves to ``zmap``, which raises all errors.  So a map has the same extents and
errors with and without parts, and a damaged entry does no harm to what lies beside it.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from typing import TypeAlias

from pyerofs.format.memory import ByteCache, Memory
from pyerofs.format.model import CompressionMap, Inode
from pyerofs.format.ondisk import (
    ADVISE_BIG_PCLUSTER_1,
    ADVISE_BIG_PCLUSTER_2,
    LAYOUT_COMPRESSED_FULL,
    LCLUSTER_HEAD1,
    LCLUSTER_NONHEAD,
    LI_D0_CBLKCNT,
    LI_PARTIAL_REF,
)

# Lclusters in a part: 4 MiB of a file, if they are 4 KiB.  With more, the second look-up would take
# longer; with fewer, more pclusters would reach beyond their part.
PART = 1024
MARGIN = 64  # lclusters on both sides that a part has as well, so that few pclusters do

# Decoding a part takes as long as ``zmap`` takes to map COST offsets, and each lookup in a part saves
# about one.  A file whose parts don't fit into the cache has them decoded again and again.  So it has a
# credit of CREDIT offsets, 3 ms, which decoding reduces and lookups restore; without credit, ``zmap``
# maps alone.
COST = 2
CREDIT = 256

# The head's lcluster and kind; where its data starts and ends in the file; its first block, and how
# many blocks it has (0 for a tail, which lies elsewhere); whether it decodes to more than that.
Found: TypeAlias = tuple[int, int, int, int, int, int, bool]


class Part(ABC):
    """The entries of some lclusters; ``i`` counts them from ``first`` on."""

    __slots__ = ("backs", "big", "first", "kinds", "offsets")

    first: int  # lcluster
    big: bool  # a pcluster may have several blocks
    kinds: Sequence[int]  # of entries, in the lowest two bits
    offsets: Sequence[int]  # of a head: the byte in its lcluster where its data starts
    backs: Sequence[int]  # of a NONHEAD, as stored: the distance back, or a number of blocks

    @abstractmethod
    def back(self, i: int) -> int:
        """The distance from a NONHEAD back towards its head; 0 if it has none."""

    @abstractmethod
    def ahead(self, i: int) -> int:
        """The distance from a NONHEAD ahead towards the next head; 0 if it has none."""

    @abstractmethod
    def block(self, i: int) -> int:
        """The first block of a head; -1 if it can't be told."""

    @abstractmethod
    def __len__(self) -> int:
        """Bytes of memory, for the cache of parts."""

    def find(self, z: CompressionMap, size: int, offset: int) -> Found | None:
        """The pcluster that covers ``offset`` in a file of ``size`` bytes, as ``zmap`` finds it.  None
        if the part is not sure.  ``offset``: of one of the part's own lclusters."""
        bits = z.lcluster_bits
        i = self._head(bits, offset)
        if i < 0:
            return None
        head, kind, block = self.first + i, self.kinds[i], self.block(i)
        end, blocks = size, 0
        if head != z.tail_head:
            end = self._end(bits, size, i + 1)
            blocks = self._count(z, size, i) if end >= 0 else -1
        if block < 0 or blocks < 0:
            return None
        start = head << bits | self.offsets[i]
        return head, kind & 3, start, end, block, blocks, bool(kind & LI_PARTIAL_REF)

    def _head(self, bits: int, offset: int) -> int:
        """The head of the pcluster that covers an offset; -1 if it can't be told."""
        kinds = self.kinds
        i = (offset >> bits) - self.first
        if kinds[i] & 3 != LCLUSTER_NONHEAD:
            if offset & (1 << bits) - 1 >= self.offsets[i]:
                return i
            if not self._sound(bits, i):
                return -1
            i -= 1
        while i >= 0 and kinds[i] & 3 == LCLUSTER_NONHEAD:
            i -= self.back(i) or len(kinds)
        return i if i >= 0 and not self.offsets[i] >> bits else -1

    def _end(self, bits: int, size: int, i: int) -> int:
        """Where the data of the next head from ``i`` on starts, or the file's end; -1 if it can't be
        told."""
        kinds = self.kinds
        while (lcn := self.first + i) << bits < size:
            if i >= len(kinds):
                return -1
            if kinds[i] & 3 != LCLUSTER_NONHEAD:
                return min(lcn << bits | self.offsets[i], size) if self._sound(bits, i) else -1
            ahead = self.ahead(i)
            if not ahead:
                return -1
            i += ahead
        return size

    def _sound(self, bits: int, i: int) -> bool:
        """Whether a head is one that ``zmap`` would not refuse."""
        return not self.offsets[i] >> bits and (not self.big or self.block(i) >= 0)

    def _count(self, z: CompressionMap, size: int, i: int) -> int:
        """How many blocks a head's pcluster has, if the next entry is in the part; -1 if it can't be
        told."""
        head1 = self.kinds[i] & 3 == LCLUSTER_HEAD1
        if not z.advise & (ADVISE_BIG_PCLUSTER_1 if head1 else ADVISE_BIG_PCLUSTER_2):
            return 1
        i += 1
        if self.first + i << z.lcluster_bits >= size or self.kinds[i] & 3 != LCLUSTER_NONHEAD:
            return 1
        count = self.backs[i]
        return (count & ~LI_D0_CBLKCNT or -1) if count & LI_D0_CBLKCNT else -1


Parts: TypeAlias = ByteCache[tuple[int, int], Part]  # by nid, and number of the part in the file


def part(memory: Memory, parts: Parts, inode: Inode, z: CompressionMap, lcn: int) -> Part | None:
    """The part that has a lcluster of its own.  None if its entries are not in memory, since nothing
    is fetched for it, or if parts have cost the file more than they have saved."""
    number = lcn // PART
    found = parts.get((inode.nid, number))
    if found is not None:
        z.credit = min(z.credit + 1, CREDIT)
    elif z.credit > 0:
        decode = _full if inode.layout == LAYOUT_COMPRESSED_FULL else _compact
        low, high = max(number * PART - MARGIN, 0), (number + 1) * PART + MARGIN
        found = decode(memory, inode, z, low, high)
        if found is not None:
            z.credit -= COST
            parts.put((inode.nid, number), found)
    return found


def _little(numbers: array[int]) -> array[int]:
    """Numbers that were stored little-endian."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


# --- full indexes -----------------------------------------------------------------------------


class _Full(Part):
    """Entries of 8 bytes."""

    __slots__ = ("_aheads",)

    def __init__(self, first: int, data: bytes, big: bool) -> None:
        self.first = first
        self.big = big
        fields = memoryview(_little(array("H", data)))
        self.kinds = fields[::4]
        self.offsets = fields[1::4]
        self.backs = fields[2::4]
        self._aheads = fields[3::4]

    def __len__(self) -> int:
        return 8 * len(self.kinds)

    def back(self, i: int) -> int:
        back = self.backs[i]
        return int(self.big) if back & LI_D0_CBLKCNT else back

    def ahead(self, i: int) -> int:
        if self.backs[i] & LI_D0_CBLKCNT and not self.big:
            return 0
        return self._aheads[i] or 1  # images of mkfs before 1.0 may have no distance ahead

    def block(self, i: int) -> int:
        return self.backs[i] | self._aheads[i] << 16


def _full(memory: Memory, inode: Inode, z: CompressionMap, low: int, high: int) -> Part | None:
    """The entries of lclusters from ``low`` up to ``high`` or the last."""
    data = memory.resident(inode.device, z.base + 8 * low, 8 * (min(high, z.total) - low))
    if data is None:
        return None
    return _Full(low, data, bool(z.advise & (ADVISE_BIG_PCLUSTER_1 | ADVISE_BIG_PCLUSTER_2)))


# --- compact indexes --------------------------------------------------------------------------


def pack_of(z: CompressionMap, lcn: int) -> tuple[int, int, int]:
    """For a compact entry: the offset of its pack, the pack's number of entries, the entry's number
    in it."""
    at = z.base
    if lcn < z.initial_4b:
        return at + (lcn >> 1) * 8, 2, lcn & 1
    at += z.initial_4b * 4
    lcn -= z.initial_4b
    if lcn < z.middle_2b:
        return at + (lcn >> 4) * 32, 16, lcn & 15
    at += z.middle_2b * 2
    lcn -= z.middle_2b
    return at + (lcn >> 1) * 8, 2, lcn & 1


class _Compact(Part):
    """Packs of 16 entries, and packs of two before and behind them."""

    __slots__ = ("_blocks", "_places", "_wide")

    kinds: bytes
    _wide: range  # entries in packs of 16
    _places: bytes  # of entries in their packs, counted so that the last one is at 15
    _blocks: array[int]  # of packs, at half the number of a pack's last entry

    def __init__(
        self, first: int, before: bytes, packs: bytes, behind: bytes, bits: int, big: bool
    ) -> None:
        """``packs``: those of 16, between packs of two.  ``bits``: of an entry, below its kind."""
        self.first = first
        self.big = big
        words, more = array("I", before), array("I", behind)
        entries = bytearray(words[::2].tobytes() + _spread(packs) + more[::2].tobytes())
        highs = entries[1::2]
        self.kinds = bytes(highs.translate(_KINDS[bits]))
        entries[1::2] = highs.translate(_LOWS[bits])
        self.offsets = self.backs = _little(array("H", entries))
        self._blocks = _little(words[1::2] + array("I", packs) + more[1::2])
        pairs, count = len(before) // 8, len(packs) // 32
        self._wide = range(2 * pairs, 2 * pairs + 16 * count)
        self._places = _PAIR * pairs + _WIDE * count + _PAIR * (len(behind) // 8)

    def __len__(self) -> int:
        return 6 * len(self.kinds)

    def back(self, i: int) -> int:
        low = self.backs[i]
        if low & LI_D0_CBLKCNT:
            return int(self.big)
        if self._places[i] < 15:
            return low
        # the last entry stores the distance ahead: derive the distance back from the one before it
        if self.kinds[i - 1] != LCLUSTER_NONHEAD:
            return 1
        low = self.backs[i - 1]
        return 2 if low & LI_D0_CBLKCNT else low + 1

    def ahead(self, i: int) -> int:
        if self.backs[i] & LI_D0_CBLKCNT and not self.big:
            return 0
        count = 16 - self._places[i]
        rest = self.kinds[i : i + count]
        if heads := rest.lstrip(_NONHEADS):
            return len(rest) - len(heads)
        last = self.backs[i + count - 1]  # the pack's last entry gives the distance from there
        return count if last & LI_D0_CBLKCNT else count + last - 1

    def block(self, i: int) -> int:
        kinds, lows, big = self.kinds, self.backs, self.big
        stop = i + 16 - self._places[i]
        start = stop - (16 if i in self._wide else 2)
        before = 0 if big else 1
        while i > start:  # count the blocks before this one in the pack
            i -= 1
            low = lows[i]
            if kinds[i] != LCLUSTER_NONHEAD:
                before += 1
            elif not big:
                i -= low
                before += i >= start
            elif low & LI_D0_CBLKCNT:
                i -= 1
                before += low & ~LI_D0_CBLKCNT
            elif low <= 1:
                return -1
            else:
                i -= low - 2
        return self._blocks[stop // 2 - 1] + before & 0xFFFFFFFF


_NONHEADS = bytes([LCLUSTER_NONHEAD])
_PAIR = bytes((14, 15))  # the places of entries in a pack of two
_WIDE = bytes(range(16))

# By the bits of an entry below its kind, for each high byte of an entry: its kind; what is below.
_KINDS = {n: bytes(high >> n - 8 & 3 for high in range(256)) for n in (12, 13, 14)}
_LOWS = {n: bytes(high & (1 << n - 8) - 1 for high in range(256)) for n in (12, 13, 14)}


def _spread(packs: bytes) -> bytes:
    """The entries of packs of 16, moved from 14 bits each to 16.

    All at once, with a long integer for a vector: the upper 8 entries of every pack move to where
    they belong, then the upper 4 of every 8, then 2 of 4 and 1 of 2."""
    entries = int.from_bytes(packs, "little")
    for lower, upper, bits in _STEPS:
        entries = entries & lower | (entries & upper) << bits
    return entries.to_bytes(len(packs), "little")


def _step(count: int) -> tuple[int, int, int]:
    """For ``_spread``: masks of the lower and the upper half of every ``count`` entries, and by how
    many bits the upper half moves."""
    half = 14 * count // 2
    once = ((1 << half) - 1).to_bytes(2 * count, "little")
    lower = int.from_bytes(once * (_MOST // count), "little")
    return lower, lower << half, count


_MOST = PART + 2 * MARGIN + 32  # entries in a part, with those that fill its first and last pack
_STEPS = tuple(_step(count) for count in (16, 8, 4, 2))


def _compact(memory: Memory, inode: Inode, z: CompressionMap, low: int, high: int) -> Part | None:
    """The packs of lclusters from ``low`` up to ``high`` or the last."""
    first, last = z.initial_4b, z.initial_4b + z.middle_2b  # of those in packs of 16
    low -= low - first & 15 if low else 0
    high = min(high + (first - high & 15), z.total + (z.total & 1))
    start, end = pack_of(z, low)[0], pack_of(z, high)[0]
    data = memory.resident(inode.device, start, end - start)
    if data is None:
        return None
    one = 4 * max(min(first, high) - low, 0)
    two = one + 2 * max(min(last, high) - max(first, low), 0)
    big, bits = bool(z.advise & ADVISE_BIG_PCLUSTER_1), max(z.lcluster_bits, 12)
    return _Compact(low, data[:one], data[one:two], data[two:], bits, big)

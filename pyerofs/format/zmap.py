"""Map a logical offset of a compressed file to its extent: pcluster, fragment or inline tail.

A compressed file is a sequence of *logical clusters* (lclusters, usually one block each).  Its
index has one entry per lcluster.  A HEAD1, HEAD2 or PLAIN entry says that a pcluster's data starts
within the lcluster, at which byte, and where the pcluster lies.  A NONHEAD entry gives the
distances back to its head and forward to the next one.  The index consists of 8-byte entries (full)
or of packs of 2- and 4-byte entries that share a block address (compact).  48-bit images may use
extent records instead.

Sources: the kernel's Documentation/filesystems/erofs.rst; the behaviour of Linux 6.18 and
erofs-utils 1.9.3.  Every loop is bounded: by MAX_STEPS, or by progress through the index.
"""

from __future__ import annotations

from typing import NamedTuple

from pyerofs.errors import CorruptImage, UnsupportedFeature
from pyerofs.format import lclusters, ondisk
from pyerofs.format.lclusters import CREDIT, Found, pack_of
from pyerofs.format.model import ENCODED, FRAGMENT, HOLE, META, PLAIN, CompressionMap, Extent, Inode
from pyerofs.format.ondisk import (
    ADVISE_BIG_PCLUSTER_1,
    ADVISE_BIG_PCLUSTER_2,
    ADVISE_COMPACTED_2B,
    ADVISE_EXTENTS,
    ADVISE_FRAGMENT_PCLUSTER,
    ADVISE_INLINE_PCLUSTER,
    ADVISE_INTERLACED_PCLUSTER,
    ALG_INTERLACED,
    EXTENT_PLEN_MASK,
    EXTENT_PLEN_PARTIAL,
    FRAGMENT_INODE_BIT,
    LCLUSTER_HEAD1,
    LCLUSTER_HEAD2,
    LCLUSTER_NONHEAD,
    LCLUSTER_PLAIN,
    LI_D0_CBLKCNT,
    PCLUSTER_MAX_DSIZE,
    PCLUSTER_MAX_SIZE,
)
from pyerofs.format.volume import Volume
from pyerofs.sources.base import Buffer

# A decoded pcluster has at most 12 MiB in lclusters of at least 512 bytes.
MAX_STEPS = PCLUSTER_MAX_DSIZE >> ondisk.MIN_BLKSZBITS

_HEADER = ondisk.MAP_HEADER.unpack_from  # a MapHeader's fields
_INDEX = ondisk.LCLUSTER_INDEX.unpack_from
_RECORD_OF_16 = ondisk.EXTENT_RECORD_16.unpack_from
_RECORD_OF_32 = ondisk.EXTENT_RECORD_32.unpack_from

# Packs of a compact index, by number of entries: bytes, bits per entry, mask with a 1 per entry.
_PACKS = {2: (8, 16, 0x10001), 16: (32, 14, sum(1 << 14 * n for n in range(16)))}


class Lcluster(NamedTuple):
    """One index entry, decoded.  Heads: ``offset`` and ``block``; NONHEAD: the distances."""

    kind: int
    offset: int = 0  # byte in the lcluster where the pcluster's data starts
    block: int = 0  # the pcluster's first block
    partial: bool = False
    back: int = 0  # lclusters back towards the head
    ahead: int = 0  # lclusters ahead towards the next head
    blocks: int = 0  # the pcluster's size, if this entry has it; else 0


def map_at(vol: Volume, inode: Inode, offset: int) -> Extent:
    """The whole extent of a compressed file that covers ``offset`` (< inode.size).

    Raises CorruptImage, UnsupportedFeature, or Fault (FaultingMemory only)."""
    z = inode.zmap or header(vol, inode)
    last = z.last
    if last is not None and last.start <= offset < last.end:
        return last
    if z.record_size:
        extent = _map_record(vol, inode, z, offset)
    else:
        extent = _map_index(vol, inode, z, offset)
    if not extent.start <= offset < extent.end:
        raise CorruptImage(
            f"extent {extent.start}..{extent.end} does not cover {offset}", nid=inode.nid
        )
    if extent.kind == ENCODED:
        _check(inode, extent)
    z.last = extent
    return extent


def header(vol: Volume, inode: Inode) -> CompressionMap:
    """Read the map header after the inode, locate an inline or fragment tail, and cache both in
    ``inode.zmap``."""
    at = (inode.data + 7) & ~7
    buffer, pos = vol.memory.at(inode.device, at, 8)
    low, advise, algorithms, bits = _HEADER(buffer, pos)
    z = CompressionMap()
    z.base = at + 8
    z.advise = advise
    z.lcluster_bits = vol.sb.block_bits + (bits & 15)
    z.algorithms = (algorithms & 15, algorithms >> 4)
    z.record_size = z.extents = z.inline_size = z.inline_address = 0
    z.fragment = z.tail_head = -1
    z.pack = (-1, 0, 0)
    z.last = None
    z.whole = bool(bits >> FRAGMENT_INODE_BIT)
    if z.whole:
        address = int.from_bytes(buffer[pos : pos + 8], "little") ^ 1 << 63
        z.last = Extent(0, inode.size, FRAGMENT, address=address)
        inode.zmap = z
        return z
    if inode.layout == ondisk.LAYOUT_COMPRESSED_FULL and advise & ADVISE_EXTENTS:
        shift = advise >> ondisk.ADVISE_EXTRECSZ_SHIFT & ondisk.ADVISE_EXTRECSZ_MASK
        z.record_size = 4 << shift
        z.extents = low | algorithms << 32 | bits << 40
        z.base = (z.base + z.record_size - 1) & ~(z.record_size - 1)
        z.running = (-1, 0)
        inode.zmap = z
        return z
    z.credit = CREDIT
    z.total = -(-inode.size >> z.lcluster_bits)
    if inode.layout == ondisk.LAYOUT_COMPRESSED_COMPACT:
        if z.lcluster_bits > 14:
            raise UnsupportedFeature(f"compact index of 2^{z.lcluster_bits}, nid {inode.nid}")
        if bool(z.advise & ADVISE_BIG_PCLUSTER_1) != bool(z.advise & ADVISE_BIG_PCLUSTER_2):
            raise CorruptImage("big pclusters for one head type only", offset=at, nid=inode.nid)
        # the kernel counts entries in blocks here; lclusters of compact indexes are blocks
        z.initial_4b = (32 - z.base % 32) // 4 & 7
        z.middle_2b = 0
        total = -(-inode.size >> vol.sb.block_bits)
        z.total = total
        if z.advise & ADVISE_COMPACTED_2B and z.initial_4b < total:
            z.middle_2b = (total - z.initial_4b) & ~15
            if z.lcluster_bits > 12 and z.middle_2b:
                raise UnsupportedFeature(f"2-byte index of 2^{z.lcluster_bits}, nid {inode.nid}")
    else:
        z.base += 8  # full indexes start 8 bytes after the header
    if z.advise & ADVISE_FRAGMENT_PCLUSTER:
        z.fragment = low
    elif z.advise & ADVISE_INLINE_PCLUSTER:
        z.inline_size = low >> 16
    if inode.size and (z.fragment >= 0 or z.inline_size):
        _find_tail(vol, inode, z)
    inode.zmap = z
    return z


def _find_tail(vol: Volume, inode: Inode, z: CompressionMap) -> None:
    """Find the lcluster in which the last extent starts, and the inline data after the last entry."""
    lcn = (inode.size - 1) >> z.lcluster_bits
    entry = _load(vol, inode, z, lcn)
    if z.inline_size:
        z.inline_address = _index_end(z, lcn, inode.layout)
        mask = vol.sb.block_size - 1
        if (z.inline_address & mask) + z.inline_size > mask + 1:
            raise CorruptImage(
                f"inline pcluster of {z.inline_size} bytes crosses its block",
                offset=z.inline_address,
                nid=inode.nid,
            )
    if entry.kind == LCLUSTER_NONHEAD:
        lcn, entry = _look_back(vol, inode, z, lcn, entry.back)
    elif (inode.size - 1) & (1 << z.lcluster_bits) - 1 < entry.offset:
        lcn, entry = _look_back(vol, inode, z, lcn, 1)
    z.tail_head = lcn
    if z.fragment >= 0 and inode.layout == ondisk.LAYOUT_COMPRESSED_FULL:
        z.fragment |= entry.block << 32  # full indexes: 64-bit fragment offsets


def index_range(vol: Volume, inode: Inode) -> tuple[int, int]:
    """Where a compressed file's map header starts and its index ends, as offsets on its device."""
    z = inode.zmap or header(vol, inode)
    start = (inode.data + 7) & ~7
    if z.whole:
        return start, start + 16  # mkfs leaves 8 bytes of an index that it abandoned
    if z.record_size > 8:
        return start, z.base + z.extents * z.record_size
    if z.record_size:
        records = -(-inode.size >> z.lcluster_bits)
        return start, z.base + records * z.record_size + (8 if z.record_size == 4 else 0)
    return start, _index_end(z, max(z.total - 1, 0), inode.layout)


# --- lcluster indexes -------------------------------------------------------------------------


def _map_index(vol: Volume, inode: Inode, z: CompressionMap, offset: int) -> Extent:
    if z.fragment >= 0 and z.tail_head == 0:
        return Extent(0, inode.size, FRAGMENT, address=z.fragment)
    found = None
    if z.last is not None:
        part = lclusters.part(vol.memory, vol.parts, inode, z, offset >> z.lcluster_bits)
        if part is not None:
            found = part.find(z, inode.size, offset)
    if found is None:
        found = _find(vol, inode, z, offset)
    lcn, kind, start, end, block, blocks, partial = found
    length = end - start
    tail = lcn == z.tail_head
    if not tail:
        size = blocks << vol.sb.block_bits
        device, address = vol.locate(0, block << vol.sb.block_bits, inode.nid)
    elif z.fragment >= 0:
        return Extent(start, length, FRAGMENT, address=z.fragment)
    else:
        device, address, size = inode.device, z.inline_address, z.inline_size
    if kind != LCLUSTER_PLAIN:
        algorithm = _algorithm(vol, inode, z.algorithms[kind == LCLUSTER_HEAD2])
        return Extent(start, length, ENCODED, device, address, size, algorithm, partial)
    if length > size:
        raise CorruptImage(
            f"{length} plain bytes in a pcluster of {size}", offset=address, nid=inode.nid
        )
    if z.advise & ADVISE_INTERLACED_PCLUSTER:
        return Extent(start, length, ENCODED, device, address, size, ALG_INTERLACED)
    return Extent(start, length, META if tail else PLAIN, device, address, size)


def _find(vol: Volume, inode: Inode, z: CompressionMap, offset: int) -> Found:
    """The pcluster that covers ``offset``, by single entries of the index."""
    bits = z.lcluster_bits
    lcn = offset >> bits
    entry = _load(vol, inode, z, lcn)
    if entry.kind == LCLUSTER_NONHEAD:
        lcn, entry = _look_back(vol, inode, z, lcn, entry.back)
    elif offset & (1 << bits) - 1 < entry.offset:
        lcn, entry = _look_back(vol, inode, z, lcn, 1)
    end, blocks = inode.size, 0
    if lcn != z.tail_head:
        following = None
        if (lcn + 1) << bits < inode.size:
            following = _load(vol, inode, z, lcn + 1)
        blocks = _encoded_blocks(inode, z, lcn, entry.kind, following)
        end = _end(vol, inode, z, lcn + 1, following)
    start = lcn << bits | entry.offset
    return lcn, entry.kind, start, end, entry.block, blocks, entry.partial


def _load(vol: Volume, inode: Inode, z: CompressionMap, lcn: int) -> Lcluster:
    if inode.layout == ondisk.LAYOUT_COMPRESSED_FULL:
        entry = _load_full(vol, inode, z, lcn)
    else:
        entry = _load_compact(vol, inode, z, lcn)
    if entry.offset >> z.lcluster_bits:
        raise CorruptImage(f"lcluster {lcn} starts at byte {entry.offset}", nid=inode.nid)
    return entry


def _load_full(vol: Volume, inode: Inode, z: CompressionMap, lcn: int) -> Lcluster:
    buffer, pos = vol.memory.at(inode.device, z.base + 8 * lcn, 8)
    advise, offset, value = _INDEX(buffer, pos)
    kind = advise & 3
    if kind != LCLUSTER_NONHEAD:
        return Lcluster(kind, offset, value, bool(advise & ondisk.LI_PARTIAL_REF))
    back, ahead = value & 0xFFFF, value >> 16
    if back & LI_D0_CBLKCNT:
        if not z.advise & (ADVISE_BIG_PCLUSTER_1 | ADVISE_BIG_PCLUSTER_2):
            raise CorruptImage(f"block count in lcluster {lcn}", nid=inode.nid)
        return Lcluster(kind, 0, 0, False, 1, ahead or 1, back & ~LI_D0_CBLKCNT)
    # images of mkfs before 1.0 may have no distance ahead
    return Lcluster(kind, 0, 0, False, back, ahead or 1)


def _load_compact(vol: Volume, inode: Inode, z: CompressionMap, lcn: int) -> Lcluster:
    if lcn >= z.total:
        raise CorruptImage(f"lcluster {lcn} of {z.total}", nid=inode.nid)
    at, count, i = pack_of(z, lcn)
    size, width, every = _PACKS[count]
    low_bits = max(z.lcluster_bits, 12)
    low_mask = (1 << low_bits) - 1
    known, bits, heads = z.pack
    if known != at:
        buffer, pos = vol.memory.at(inode.device, at, size)
        bits = int.from_bytes(buffer[pos : pos + size], "little")
        kinds = bits >> low_bits
        heads = every & ~(kinds >> 1 & ~kinds)  # all kinds but 0b10, NONHEAD
        z.pack = (at, bits, heads)
    value = bits >> width * i
    low, kind = value & low_mask, value >> low_bits & 3
    big = z.advise & ADVISE_BIG_PCLUSTER_1

    if kind == LCLUSTER_NONHEAD:
        following = heads >> width * i
        if following:  # the lowest set bit marks the next head
            ahead = ((following & -following).bit_length() - 1) // width
        else:  # the pack's last entry gives the distance from there
            last = bits >> width * (count - 1) & low_mask
            ahead = count - i
            if not last & LI_D0_CBLKCNT:
                ahead = max(ahead + last - 1, 1)
        if low & LI_D0_CBLKCNT:
            if not big:
                raise CorruptImage(f"block count in lcluster {lcn}", nid=inode.nid)
            return Lcluster(kind, 0, 0, False, 1, ahead, low & ~LI_D0_CBLKCNT)
        if i + 1 != count:
            return Lcluster(kind, 0, 0, False, low, ahead)
        # the last entry stores the distance ahead: derive the distance back from the one before it
        value = bits >> width * (i - 1)
        low = value & low_mask
        if value >> low_bits & 3 != LCLUSTER_NONHEAD:
            low = 0
        elif low & LI_D0_CBLKCNT:
            low = 1
        return Lcluster(kind, 0, 0, False, low + 1, ahead)

    # a head: the pack ends with the block of its first pcluster; count the blocks before this one
    before = 0 if big else 1
    offset = low
    while i > 0:
        i -= 1
        value = bits >> width * i
        low, other = value & low_mask, value >> low_bits & 3
        if other != LCLUSTER_NONHEAD:
            before += 1
        elif not big:
            i -= low
            if i >= 0:
                before += 1
        elif low & LI_D0_CBLKCNT:
            i -= 1
            before += low & ~LI_D0_CBLKCNT
        elif low <= 1:
            raise CorruptImage(f"distance {low} in the pack of lcluster {lcn}", nid=inode.nid)
        else:
            i -= low - 2
    block = (bits >> 8 * size - 32) + before
    return Lcluster(kind, offset, block & 0xFFFFFFFF)


def _index_end(z: CompressionMap, lcn: int, layout: int) -> int:
    """The offset after the last lcluster's entry (or its whole pack), where inline data starts."""
    if layout == ondisk.LAYOUT_COMPRESSED_FULL:
        return z.base + 8 * lcn + 8
    at, count, _ = pack_of(z, lcn)
    return at + (32 if count == 16 else 8)


def _look_back(
    vol: Volume, inode: Inode, z: CompressionMap, lcn: int, distance: int
) -> tuple[int, Lcluster]:
    for _ in range(MAX_STEPS):
        if not 0 < distance <= lcn:
            break
        lcn -= distance
        entry = _load(vol, inode, z, lcn)
        if entry.kind != LCLUSTER_NONHEAD:
            return lcn, entry
        distance = entry.back
    raise CorruptImage(f"lcluster {lcn} leads back by {distance} to no head", nid=inode.nid)


def _encoded_blocks(
    inode: Inode, z: CompressionMap, lcn: int, kind: int, following: Lcluster | None
) -> int:
    """The size in blocks of the pcluster whose head is at ``lcn``."""
    big = ADVISE_BIG_PCLUSTER_1 if kind == LCLUSTER_HEAD1 else ADVISE_BIG_PCLUSTER_2
    if not z.advise & big or following is None or following.kind != LCLUSTER_NONHEAD:
        return 1
    if following.back != 1 or not following.blocks:
        raise CorruptImage(f"no block count after lcluster {lcn}", nid=inode.nid)
    return following.blocks


def _end(vol: Volume, inode: Inode, z: CompressionMap, lcn: int, following: Lcluster | None) -> int:
    """The logical offset of the next head at or after ``lcn``, or the file's end."""
    entry = following
    for _ in range(MAX_STEPS):
        if entry is None:
            return inode.size
        if entry.kind != LCLUSTER_NONHEAD:
            return min(lcn << z.lcluster_bits | entry.offset, inode.size)
        lcn += entry.ahead
        if lcn << z.lcluster_bits >= inode.size:
            return inode.size
        entry = _load(vol, inode, z, lcn)
    raise CorruptImage(f"no end of the extent before lcluster {lcn}", nid=inode.nid)


# --- extent records ---------------------------------------------------------------------------


def _map_record(vol: Volume, inode: Inode, z: CompressionMap, offset: int) -> Extent:
    if z.record_size <= 8:
        start, end, plen, address, last = _fixed_record(vol, inode, z, offset)
    else:
        start, end, plen, address, last = _search_record(vol, inode, z, offset)
    length = end - start
    if last and z.advise & ADVISE_FRAGMENT_PCLUSTER:
        fragment = plen | (address << 32 if z.record_size > 4 else 0)
        return Extent(start, length, FRAGMENT, address=fragment & (1 << 64) - 1)
    size = plen & EXTENT_PLEN_MASK
    if not size:
        return Extent(start, length, HOLE)
    device, address = vol.locate(0, address, inode.nid)
    form = plen >> ondisk.EXTENT_PLEN_FMT_SHIFT
    partial = bool(plen & EXTENT_PLEN_PARTIAL)
    if form:
        algorithm = _algorithm(vol, inode, form - 1)
        return Extent(start, length, ENCODED, device, address, size, algorithm, partial)
    if length > size:
        raise CorruptImage(
            f"{length} plain bytes in a pcluster of {size}", offset=address, nid=inode.nid
        )
    aligned = not (address | size) & vol.sb.block_size - 1
    if z.advise & ADVISE_INTERLACED_PCLUSTER and aligned:
        return Extent(start, length, ENCODED, device, address, size, ALG_INTERLACED)
    return Extent(start, length, PLAIN, device, address, size)


Record = tuple[int, int, int, int, bool]  # start, end, encoded length word, address, is the last


def _fixed_record(vol: Volume, inode: Inode, z: CompressionMap, offset: int) -> Record:
    """Read a record of 4 or 8 bytes; there is one per lcluster.

    Records of 8 bytes hold length and address.  Records of 4 bytes hold the length only: the
    pclusters are contiguous, from an address stored before the records."""
    bits = z.lcluster_bits
    lcn = offset >> bits
    memory = vol.memory
    if z.record_size == 8:
        word = memory.bytes_at(inode.device, z.base + 8 * lcn, 8)
        plen = int.from_bytes(word[:4], "little")
        address = int.from_bytes(word[4:], "little")
    else:
        known, address = z.running
        if known < 0 or lcn < known:
            known, address = 0, int.from_bytes(memory.bytes_at(inode.device, z.base, 8), "little")
        records = z.base + 8
        while known < lcn:
            n = min(lcn - known, 8192)
            words = memory.bytes_at(inode.device, records + 4 * known, 4 * n)
            for i in range(0, 4 * n, 4):
                address += int.from_bytes(words[i : i + 4], "little") & EXTENT_PLEN_MASK
            known += n
            z.running = (known, address)
        plen = int.from_bytes(memory.bytes_at(inode.device, records + 4 * lcn, 4), "little")
    end = min((lcn + 1) << bits, inode.size)
    return lcn << bits, end, plen, address, (lcn + 1) << bits >= inode.size


def _search_record(vol: Volume, inode: Inode, z: CompressionMap, offset: int) -> Record:
    """Find a record of 16 or 32 bytes by binary search; records are sorted by their logical offset."""
    unpack = _RECORD_OF_32 if z.record_size > 16 else _RECORD_OF_16
    low, high = 0, z.extents
    start, end, plen, address = inode.size, inode.size, 0, 0
    buffer: Buffer = b""
    first, last = 0, -1  # the positions of records that lie in the buffer
    while low < high:
        middle = (low + high) // 2
        pos = middle * z.record_size
        if not first <= pos <= last:
            buffer, skip = vol.memory.at(inode.device, z.base + pos, z.record_size)
            first = pos - skip
            last = first + len(buffer) - z.record_size
        length, place, at = unpack(buffer, pos - first)
        if at > offset:
            high = middle
            if at > end:
                raise CorruptImage(f"extent record {middle} is out of order", nid=inode.nid)
            end = at
        else:
            low = middle + 1
            start, plen, address = at, length, place
    if start >= end:
        raise CorruptImage(f"no extent record covers {offset}", nid=inode.nid)
    return start, end, plen, address, low >= z.extents


def _algorithm(vol: Volume, inode: Inode, algorithm: int) -> int:
    """Return ``algorithm``; raise CorruptImage if the superblock does not list it."""
    if not vol.sb.algorithms >> algorithm & 1:
        raise CorruptImage(
            f"compression algorithm {algorithm}, which the superblock does not list",
            nid=inode.nid,
        )
    return algorithm


def _check(inode: Inode, extent: Extent) -> None:
    """Raise CorruptImage if a pcluster exceeds the format's size limits."""
    if extent.size > PCLUSTER_MAX_SIZE or extent.length > PCLUSTER_MAX_DSIZE:
        raise CorruptImage(
            f"pcluster of {extent.size} bytes for {extent.length}",
            offset=extent.address,
            nid=inode.nid,
        )

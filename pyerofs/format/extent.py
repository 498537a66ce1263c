"""Map a range of any file to the extents that hold it.

Flat files are consecutive blocks, perhaps with an inline tail; chunk-based files have a table of
chunk addresses; compressed files are mapped by ``zmap``.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyerofs.errors import CorruptImage
from pyerofs.format import ondisk, zmap
from pyerofs.format.model import HOLE, META, NULL_BLOCK, PLAIN, Extent, Inode
from pyerofs.format.volume import Volume

CHUNKS_AT_ONCE = 4096  # chunk addresses decoded per step: 32 KiB of indexes


def extents(vol: Volume, inode: Inode, offset: int, length: int) -> Iterator[Extent]:
    """The extents that overlap ``[offset, offset + length)``, uncut, in order, up to the file's
    end.

    Consecutive chunks that are adjacent on their device are merged into one extent.  Raises
    CorruptImage, UnsupportedFeature, DeviceMissing, or Fault (FaultingMemory only)."""
    end = min(offset + length, inode.size)
    if offset >= end:
        return iter(())
    if inode.is_compressed:
        return _compressed(vol, inode, offset, end)
    if inode.layout == ondisk.LAYOUT_CHUNK_BASED:
        return _chunks(vol, inode, offset, end)
    return _flat(vol, inode, offset, end)


def _compressed(vol: Volume, inode: Inode, offset: int, end: int) -> Iterator[Extent]:
    extent = zmap.map_at(vol, inode, offset)
    yield extent
    while (offset := extent.end) < end:
        extent = zmap.map_at(vol, inode, offset)
        if extent.start != offset:
            raise CorruptImage(f"extents overlap at byte {offset}", nid=inode.nid)
        yield extent


def _flat(vol: Volume, inode: Inode, offset: int, end: int) -> Iterator[Extent]:
    bits = vol.sb.block_bits
    if inode.start == NULL_BLOCK:
        yield Extent(0, inode.size, HOLE)
        return
    tail = inode.size  # where the inline part starts
    if inode.layout == ondisk.LAYOUT_FLAT_INLINE:
        tail = (inode.size - 1) >> bits << bits
    if offset < tail:
        device, address = vol.locate(0, inode.start << bits, inode.nid)
        yield Extent(0, tail, PLAIN, device, address)
    if end > tail:
        mask = vol.sb.block_size - 1
        if (inode.data & mask) + inode.size - tail > mask + 1:
            raise CorruptImage(
                f"inline tail of {inode.size - tail} bytes crosses its block",
                offset=inode.data,
                nid=inode.nid,
            )
        yield Extent(tail, inode.size - tail, META, inode.device, inode.data)


def _chunks(vol: Volume, inode: Inode, offset: int, end: int) -> Iterator[Extent]:
    bits = vol.sb.block_bits + (inode.chunk_format & ondisk.CHUNK_BLKBITS_MASK)
    unit = 8 if inode.chunk_format & ondisk.CHUNK_INDEXES else 4
    table = (inode.data + unit - 1) & ~(unit - 1)
    chunk, last = offset >> bits, (end - 1) >> bits
    run: Extent | None = None
    while chunk <= last:
        n = min(last + 1 - chunk, CHUNKS_AT_ONCE)
        buffer, pos = vol.memory.at(inode.device, table + unit * chunk, unit * n)
        records = memoryview(buffer)[pos : pos + unit * n]
        for device, address in _addresses(vol, inode, records):
            start = chunk << bits
            length = min(1 << bits, inode.size - start)
            chunk += 1
            if device < 0:
                new = Extent(start, length, HOLE)
                joins = run is not None and run.kind == HOLE
            else:
                new = Extent(start, length, PLAIN, device, address)
                joins = (
                    run is not None
                    and run.kind == PLAIN
                    and run.device == device
                    and run.address + run.length == address
                )
            if run is not None and joins:
                run = run._replace(length=run.length + length)
                continue
            if run is not None:
                yield run
            run = new
    if run is not None:
        yield run


def _addresses(vol: Volume, inode: Inode, records: memoryview) -> Iterator[tuple[int, int]]:
    """(device, byte address) of each chunk; (-1, 0) for holes."""
    bits = vol.sb.block_bits
    if not inode.chunk_format & ondisk.CHUNK_INDEXES:
        for (block,) in ondisk.BLOCK_MAP_ENTRY.iter_unpack(records):
            if block == ondisk.NULL_ADDR_32:
                yield -1, 0
            else:
                yield vol.locate(0, block << bits, inode.nid)
        return
    wide = inode.chunk_format & ondisk.CHUNK_48BIT
    null = ondisk.NULL_ADDR_48 if wide else ondisk.NULL_ADDR_32
    mask = vol.sb.device_mask
    for high, device, low in ondisk.CHUNK_INDEX.iter_unpack(records):
        block = (low | high << 32) & null
        if block == null:
            yield -1, 0
        else:
            yield vol.locate(device & mask, block << bits, inode.nid)

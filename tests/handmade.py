"""Build EROFS images by hand: the legal ones that mkfs.erofs never writes.

An image is *pieces*, bytes by their offset with zeros between them, so that terabytes cost
nothing: ``Sparse`` is a source over pieces, ``save`` makes a sparse file of them.  Inodes are made
with whatever follows them (``inline``, ``plain``, ``chunks``, ``indexed``, ``extents``); ``build``
places them behind the superblock, one after another, in one directory.
"""

from __future__ import annotations

import random
import stat
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyerofs.format import ondisk
from pyerofs.format.crc32c import crc32c
from pyerofs.sources.base import check_range

Pieces = dict[int, bytes]

REGULAR = stat.S_IFREG | 0o644
DIRECTORY = stat.S_IFDIR | 0o755
EPOCH = 1_700_000_000
PAGE = 4096
METADATA = 4096  # where inodes start, unless blocks are larger
DEVICE_TABLE = 2048
META_BLKADDR = 40  # offset in the superblock
BIG = ondisk.ADVISE_BIG_PCLUSTER_1 | ondisk.ADVISE_BIG_PCLUSTER_2
FILE_TYPES = {
    stat.S_IFREG: ondisk.FT_REG_FILE,
    stat.S_IFDIR: ondisk.FT_DIR,
    stat.S_IFCHR: ondisk.FT_CHRDEV,
    stat.S_IFBLK: ondisk.FT_BLKDEV,
    stat.S_IFLNK: ondisk.FT_SYMLINK,
}


class Sparse:
    """A source of pieces, with zeros between them."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.name = "handmade"
        self.size = end_of(pieces)
        self.backing = None

    def peek(self, offset: int, length: int) -> bytes | None:
        return self.read_at(offset, length) if offset + length <= self.size else None

    def read_at(self, offset: int, length: int) -> bytes:
        check_range(self.name, self.size, offset, length)
        found = bytearray(length)
        for at, data in self.pieces.items():
            first, last = max(at, offset), min(at + len(data), offset + length)
            if first < last:
                found[first - offset : last - offset] = data[first - at : last - at]
        return bytes(found)

    def close(self) -> None:
        pass


def end_of(pieces: Pieces) -> int:
    """The end of the last piece, rounded up to a page as devices are."""
    end = max(at + len(data) for at, data in pieces.items())
    return end + -end % PAGE


def save(pieces: Pieces, path: Path) -> None:
    """Write pieces to a sparse file.  Raises OSError where the file system can't hold it."""
    with path.open("wb") as f:
        f.truncate(end_of(pieces))
        for at, data in pieces.items():
            f.seek(at)
            f.write(data)


def text(length: int, seed: int = 0) -> bytes:
    """Compressible bytes, no two lines of them alike."""
    lines = (b"%d: line %d of a text\n" % (seed, i) for i in range(length // 16 + 1))
    return b"".join(lines)[:length]


def noise(length: int, seed: int = 0) -> bytes:
    """Incompressible bytes."""
    return random.Random(seed).randbytes(length)


# --- inodes ---------------------------------------------------------------------------------


def inode(
    layout: int,
    size: int,
    u: int,
    body: bytes = b"",
    *,
    align: int = 1,
    mode: int = REGULAR,
    nlink: int = 1,
    high: int | None = None,
    xattrs: bytes = b"",
    extended: bool = False,
) -> bytes:
    """An inode and what follows it: xattrs, and an aligned body.

    ``u`` is i_u and ``high`` i_nb; compact inodes have either that or a link count."""
    known = high is not None and not extended  # the link count is 1
    i_format = layout << ondisk.I_LAYOUT_SHIFT | extended | (ondisk.I_BIT4 if known else 0)
    icount = (len(xattrs) - 8) // 4 if xattrs else 0
    if extended:
        record = ondisk.INODE_EXTENDED.pack(
            i_format, icount, mode, high or 0, size, u, 1000, 70000, EPOCH - 1, 5, nlink
        )
    else:
        nb = nlink if high is None else high
        record = ondisk.INODE_COMPACT.pack(i_format, icount, mode, nb, size, 7, u, 1, 2)
    front = record + xattrs
    return front + bytes(-len(front) % align) + body


def inline(data: bytes, **fields: Any) -> bytes:
    """A flat inode with its data, less than a block, behind it."""
    return inode(ondisk.LAYOUT_FLAT_INLINE, len(data), 0, data, **fields)


def plain(size: int, block: int, **fields: Any) -> bytes:
    """A flat inode with its data from a block on; ``high`` are the block's bits from 32 on."""
    return inode(ondisk.LAYOUT_FLAT_PLAIN, size, block, **fields)


def chunks(size: int, places: Sequence[tuple[int, int]], form: int = 0) -> bytes:
    """A file of chunks of one block each: the device id and the block of each."""
    index = b"".join(
        ondisk.CHUNK_INDEX.pack(block >> 32, device, block & 0xFFFFFFFF) for device, block in places
    )
    form |= ondisk.CHUNK_INDEXES
    return inode(ondisk.LAYOUT_CHUNK_BASED, size, form, index, align=8)


# --- compressed files -----------------------------------------------------------------------


def indexed(
    size: int,
    entries: Sequence[bytes],
    advise: int = 0,
    *,
    head2: int = 0,
    bits: int = 0,
    blocks: int = 1,
    **fields: Any,
) -> bytes:
    """A compressed file with a full index of ``head``, ``first`` and ``nonhead`` entries.

    HEAD1 is LZ4, ``head2`` the other algorithm; lclusters have ``1 << bits`` blocks."""
    header = ondisk.MAP_HEADER.pack(0, advise, ondisk.ALG_LZ4 | head2 << 4, bits)
    body = header + bytes(8) + b"".join(entries)
    return inode(ondisk.LAYOUT_COMPRESSED_FULL, size, blocks, body, align=8, **fields)


def head(kind: int, offset: int, block: int, partial: bool = False) -> bytes:
    """The entry of a lcluster in which the data of a pcluster starts."""
    advise = kind | (ondisk.LI_PARTIAL_REF if partial else 0)
    return ondisk.LCLUSTER_INDEX.pack(advise, offset, block)


def nonhead(back: int, ahead: int) -> bytes:
    """The entry of a lcluster in which none starts: how far away the heads around it are."""
    return ondisk.LCLUSTER_INDEX.pack(ondisk.LCLUSTER_NONHEAD, 0, back | ahead << 16)


def first(blocks: int, ahead: int) -> bytes:
    """The nonhead entry behind a head: it has the pcluster's number of blocks."""
    return nonhead(ondisk.LI_D0_CBLKCNT | blocks, ahead)


class Lead(NamedTuple):
    """A pcluster of a file: where its data starts there, and where it lies."""

    start: int
    kind: int  # LCLUSTER_HEAD1 ...
    block: int
    blocks: int = 1


def lclusters(size: int, leads: Sequence[Lead], big: bool) -> list[tuple[Lead | None, int, int]]:
    """The entries of an index, for blocks and lclusters of 4 KiB: of a head the pcluster, of others
    None, the distance back or the number of blocks, and the distance ahead.

    No two pclusters start in the same lcluster; those of several blocks cover two or more."""
    found: list[tuple[Lead | None, int, int]] = []
    ends = [lead.start >> 12 for lead in leads[1:]] + [-(-size >> 12)]
    for lead, end in zip(leads, ends, strict=True):
        found.append((lead, 0, 0))
        for back in range(1, count := end - (lead.start >> 12)):
            low = ondisk.LI_D0_CBLKCNT | lead.blocks if big and back == 1 else min(back, 0x7FF)
            found.append((None, low, min(count - back, 0x7FF)))
    return found


def fully(size: int, leads: Sequence[Lead], big: bool, **fields: Any) -> bytes:
    """A compressed file with a full index of its pclusters; HEAD2 is DEFLATE."""
    entries = [
        head(lead.kind, lead.start & 4095, lead.block) if lead else nonhead(back, ahead)
        for lead, back, ahead in lclusters(size, leads, big)
    ]
    return indexed(size, entries, BIG if big else 0, head2=ondisk.ALG_DEFLATE, **fields)


def compactly(
    size: int, leads: Sequence[Lead], big: bool, sixteens: bool = True, **fields: Any
) -> bytes:
    """A compressed file with a compact index; HEAD2 is DEFLATE.  ``sixteens``: with packs of 16.

    In a pack, pclusters have to follow one another."""
    entries = lclusters(size, leads, big)
    advise = (BIG if big else 0) | (ondisk.ADVISE_COMPACTED_2B if sixteens else 0)
    header = ondisk.MAP_HEADER.pack(0, advise, ondisk.ALG_LZ4 | ondisk.ALG_DEFLATE << 4, 0)
    before = len(inode(0, 0, 0, header, align=8, **fields))  # packs of 16 are aligned to 32 bytes
    front = (32 - before % 32) // 4 % 8
    wide = (len(entries) - front) // 16 * 16 if sixteens and len(entries) > front else 0
    body = header
    at = 0
    while at < len(entries):
        count, bits = (16, 14) if front <= at < front + wide else (2, 16)
        body += _pack(entries, at, count, bits, big)
        at += count
    return inode(ondisk.LAYOUT_COMPRESSED_COMPACT, size, 1, body, align=8, **fields)


def _pack(
    entries: Sequence[tuple[Lead | None, int, int]], at: int, count: int, bits: int, big: bool
) -> bytes:
    """Some entries, and the block from which those of the heads among them are counted."""
    value = base = 0
    for i, (lead, back, ahead) in reversed(list(enumerate(entries[at : at + count]))):
        if lead:
            entry = lead.kind << 12 | lead.start & 4095
            base = lead.block - (not big)
        else:
            counts = back & ondisk.LI_D0_CBLKCNT
            entry = ondisk.LCLUSTER_NONHEAD << 12 | (
                ahead if i + 1 == count and not counts else back
            )
            if counts and not i:
                base -= back & ~ondisk.LI_D0_CBLKCNT
        value |= entry << bits * i
    size = count * bits // 8
    return value.to_bytes(size, "little") + (base & 0xFFFFFFFF).to_bytes(4, "little")


def extents(
    size: int, record_size: int, records: Sequence[tuple[int, int, int]], advise: int = 0
) -> bytes:
    """A compressed file with extent records: (logical offset, ``plen``, byte address) each.

    Records of 4 and 8 bytes imply the offset, those of 4 all addresses but the first."""
    advise |= ondisk.ADVISE_EXTENTS
    advise |= (record_size.bit_length() - 3) << ondisk.ADVISE_EXTRECSZ_SHIFT
    count = len(records) if record_size > 8 else 0
    # inodes lie at multiples of 32, and the header at 32 more: this aligns the records
    body = ondisk.MAP_HEADER.pack(count, advise, 0, 0).ljust(record_size, b"\0")
    if record_size == 4:
        body += struct.pack("<Q", records[0][2])
    for start, word, address in records:  # shorter records are the beginning of the longest
        body += struct.pack("<IQQ12x", word, address, start)[:record_size]
    return inode(ondisk.LAYOUT_COMPRESSED_FULL, size, 1, body, align=8)


def plen(length: int, algorithm: int | None = None, partial: bool = False) -> int:
    """An extent's encoded length, with the algorithm; none: stored bytes."""
    form = 0 if algorithm is None else algorithm + 1
    flag = ondisk.EXTENT_PLEN_PARTIAL if partial else 0
    return length | flag | form << ondisk.EXTENT_PLEN_FMT_SHIFT


# --- extended attributes and directories ----------------------------------------------------


def xattr(index: int, name: bytes, value: bytes) -> bytes:
    """An entry: ``index`` stands for the name's prefix."""
    entry = ondisk.XATTR_ENTRY.pack(len(name), index, len(value)) + name + value
    return entry + bytes(-len(entry) % 4)


def xattrs(inlined: bytes, shared: Sequence[int] = ()) -> bytes:
    """What an inode has of xattrs: entries, and the offsets of others in the shared area."""
    ids = b"".join(struct.pack("<I", offset // 4) for offset in shared)
    return ondisk.XATTR_IBODY_HEADER.pack(0, len(shared)) + ids + inlined


def directory(entries: Mapping[bytes, tuple[int, int]], block: int) -> bytes:
    """The data of a directory of (nid, file type) by name, in directory blocks of a given size."""
    blocks: list[dict[bytes, tuple[int, int]]] = [{}]
    room = block
    for name, target in sorted(entries.items()):
        room -= ondisk.DIRENT.size + len(name)
        if room < 0:
            blocks.append({})
            room = block - ondisk.DIRENT.size - len(name)
        blocks[-1][name] = target
    data = b""
    for names in blocks:
        data += bytes(-len(data) % block)
        start = len(names) * ondisk.DIRENT.size
        for name, (nid, file_type) in names.items():
            data += ondisk.DIRENT.pack(nid, start, file_type)
            start += len(name)
        data += b"".join(names)
    return data


# --- the whole ------------------------------------------------------------------------------


def build(
    files: Mapping[bytes, bytes],
    data: Mapping[int, bytes] | None = None,
    *,
    block_bits: int = 12,
    incompat: int = 0,
    compat: int = 0,
    first_nid: int = 2,
    elsewhere: Mapping[bytes, tuple[int, int]] | None = None,
    hidden: Collection[bytes] = (),
    configs: Mapping[int, bytes] | None = None,
    devices: Sequence[tuple[int, int]] = (),
    **fields: Any,
) -> Pieces:
    """An image with ``files`` (inodes by name) in its root directory, and ``data`` by block.

    ``elsewhere``: directory entries of inodes that are part of the data; ``hidden``: names that the
    root does not have, of directories that others lead to; ``configs``: records by
    compression algorithm; ``devices``: (blocks, first block) of each extra one; ``fields``: of the
    superblock, where they differ from what follows from the rest."""
    size = 1 << block_bits
    block_number = fields.pop("meta_blkaddr", -(-METADATA // size))
    meta = block_number << block_bits
    pieces = {block << block_bits: content for block, content in (data or {}).items()}
    entries = dict(elsewhere or {})
    at = meta + 32 * first_nid
    for name, content in files.items():
        if at % size + len(content) > size:  # what lies behind an inode must not cross a block
            at += -at % size
        mode = int.from_bytes(content[4:6], "little")
        if name not in hidden:
            entries[name] = (at - meta) // 32, FILE_TYPES[stat.S_IFMT(mode)]
        pieces[at] = content
        at += len(content) + -len(content) % 32
    at += -at % size
    root = (at - meta) // 32
    entries[b"."] = entries[b".."] = root, ondisk.FT_DIR
    pieces[at] = inline(directory(entries, size), mode=DIRECTORY, nlink=2)

    if devices:
        incompat |= ondisk.INCOMPAT_DEVICE_TABLE
        fields |= {"extra_devices": len(devices), "devt_slotoff": DEVICE_TABLE // 128}
        pieces[DEVICE_TABLE] = b"".join(_device_slot(*device) for device in devices)
    end = ondisk.SUPER_BASE_SIZE + ondisk.SB_EXTSLOT_SIZE * fields.get("sb_extslots", 0)
    if configs:
        incompat |= ondisk.INCOMPAT_COMPR_CFGS
        fields["available_compr_algs"] = sum(1 << n for n in configs)
        pieces[ondisk.SUPER_OFFSET + end] = b"".join(
            struct.pack("<H", len(c)) + c + bytes(-(2 + len(c)) % 4)
            for _, c in sorted(configs.items())
        )
    blocks = end_of(pieces) >> block_bits
    values: dict[str, Any] = dict.fromkeys(ondisk.SuperBlock._fields, 0) | {
        "magic": ondisk.SUPER_MAGIC,
        "feature_compat": compat | ondisk.COMPAT_SB_CHKSUM | ondisk.COMPAT_MTIME,
        "feature_incompat": incompat,
        "blkszbits": block_bits,
        "rootnid_2b": root,
        "inos": len(entries) - 1,
        "epoch": EPOCH,
        "fixed_nsec": 123_456_789,
        "blocks_lo": blocks & 0xFFFFFFFF,
        "uuid": bytes(range(16)),
        "volume_name": b"handmade",
        "reserved": b"",
    }
    if incompat & ondisk.INCOMPAT_48BIT:
        values |= {"rootnid_8b": root, "rootnid_2b": blocks >> 32}
    raw = bytearray(ondisk.SUPERBLOCK.pack(*ondisk.SuperBlock(**values | fields))[:end])
    struct.pack_into("<I", raw, META_BLKADDR, block_number)
    pieces[ondisk.SUPER_OFFSET] = bytes(raw)
    covered = size - ondisk.SUPER_OFFSET if size > ondisk.SUPER_OFFSET else size
    checksum = crc32c(Sparse(pieces).read_at(ondisk.SUPER_OFFSET, covered))
    struct.pack_into("<I", raw, 4, checksum)
    pieces[ondisk.SUPER_OFFSET] = bytes(raw)
    return pieces


def _device_slot(blocks: int, uniaddr: int) -> bytes:
    low = 0xFFFFFFFF
    return ondisk.DEVICE_SLOT.pack(b"", blocks & low, uniaddr & low, blocks >> 32, uniaddr >> 32)

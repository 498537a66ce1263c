"""Build EROFS images by hand: the legal ones that mkfs.erofs never writes.

An image is *pieces*, bytes by their offset with zeros between them, so that terabytes cost nothing:
``Sparse`` is a source over pieces, ``save`` makes a sparse file of them.  Inodes are made with
whatever follows them (``inline``, ``plain``, ``chunks``, ``indexed``, ``extents``); ``build`` places
them behind the superblock, one after another, in one directory.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyerofs import ondisk
from pyerofs.crc32c import crc32c
from pyerofs.sources.base import check_range

Pieces = dict[int, bytes]

REGULAR = stat.S_IFREG | 0o644
DIRECTORY = stat.S_IFDIR | 0o755
EPOCH = 1_700_000_000
METADATA = 4096  # where it starts, or at the second block if blocks are larger
DEVICE_TABLE = 2048
FILE_TYPES = {
    stat.S_IFREG: ondisk.FT_REG_FILE,
    stat.S_IFDIR: ondisk.FT_DIR,
    stat.S_IFCHR: ondisk.FT_CHRDEV,
    stat.S_IFBLK: ondisk.FT_BLKDEV,
    stat.S_IFLNK: ondisk.FT_SYMLINK,
}


class Sparse:
    """A source of pieces, zeros between them and up to ``size``."""

    def __init__(self, pieces: Pieces, size: int = 0) -> None:
        self.pieces = pieces
        self.name = "handmade"
        self.size = size or end_of(pieces)

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
    return -(-max(at + len(data) for at, data in pieces.items()) // 4096) * 4096


def save(pieces: Pieces, path: Path) -> None:
    """Write pieces to a sparse file.  Raises OSError where the file system can't hold it."""
    with path.open("wb") as f:
        for at, data in pieces.items():
            f.seek(at)
            f.write(data)
        f.truncate(end_of(pieces))


def text(length: int, seed: int = 0) -> bytes:
    """Compressible bytes, no two lines of them alike."""
    lines = (b"%d: line %d of a text\n" % (seed, i) for i in range(length // 16 + 1))
    return b"".join(lines)[:length]


def noise(length: int, seed: int = 0) -> bytes:
    """Incompressible bytes."""
    return b"".join(
        struct.pack("<I", crc32c(struct.pack("<II", seed, i))) for i in range(-(-length // 4))
    )[:length]


# --- inodes -----------------------------------------------------------------------------------


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
    bit4: bool = False,
) -> bytes:
    """An inode and what follows it; its ``body`` aligned.  ``u`` and ``high``: i_u, and i_nb where
    it is not the link count of a compact inode."""
    i_format = layout << ondisk.I_LAYOUT_SHIFT | bit4 << 4 | extended
    icount = (len(xattrs) - 8) // 4 if xattrs else 0
    if extended:
        record = ondisk.INODE_EXTENDED.pack(
            i_format, icount, mode, high or 0, size, u, 0, 1000, 70000, EPOCH - 1, 5, nlink
        )
    else:
        nb = nlink if high is None else high
        record = ondisk.INODE_COMPACT.pack(i_format, icount, mode, nb, size, 7, u, 0, 1, 2, 0)
    front = record + xattrs
    return front + bytes(-len(front) % align) + body


def inline(data: bytes, **fields: Any) -> bytes:
    """A flat file of less than a block, behind its inode."""
    return inode(ondisk.LAYOUT_FLAT_INLINE, len(data), 0, data, **fields)


def plain(size: int, block: int, **fields: Any) -> bytes:
    """A flat file that starts at a block; ``high`` are the block's bits from 32 on."""
    return inode(ondisk.LAYOUT_FLAT_PLAIN, size, block, **fields)


def chunks(size: int, places: Sequence[tuple[int, int]], bits: int = 0, form: int = 0) -> bytes:
    """A file of (device id, block) chunks of ``1 << bits`` blocks; ``form``: CHUNK_48BIT."""
    index = b"".join(
        ondisk.CHUNK_INDEX.pack(block >> 32, device, block & 0xFFFFFFFF) for device, block in places
    )
    form |= ondisk.CHUNK_INDEXES | bits
    return inode(ondisk.LAYOUT_CHUNK_BASED, size, form, index, align=8)


# --- compressed files -------------------------------------------------------------------------


def indexed(
    size: int, blocks: int, entries: Sequence[bytes], advise: int = 0, algorithms: int = 0,
    **fields: Any,
) -> bytes:  # fmt: skip
    """A compressed file with a full index: ``head``, ``nonhead`` and ``first_nonhead`` entries."""
    body = ondisk.MAP_HEADER.pack(0, advise, algorithms, 0) + bytes(8) + b"".join(entries)
    return inode(ondisk.LAYOUT_COMPRESSED_FULL, size, blocks, body, align=8, **fields)


def head(kind: int, offset: int, block: int, partial: bool = False) -> bytes:
    """The entry of a lcluster in which the data of a pcluster starts."""
    advise = kind | (ondisk.LI_PARTIAL_REF if partial else 0)
    return ondisk.LCLUSTER_INDEX.pack(advise, offset, block)


def nonhead(back: int, ahead: int) -> bytes:
    """The entry of a lcluster in which none starts: how far it is to the heads around it."""
    return ondisk.LCLUSTER_INDEX.pack(ondisk.LCLUSTER_NONHEAD, 0, back | ahead << 16)


def first_nonhead(blocks: int, ahead: int) -> bytes:
    """The entry behind a head whose pcluster has some other number of blocks than one."""
    return nonhead(ondisk.LI_D0_CBLKCNT | blocks, ahead)


def extents(
    size: int, record_size: int, records: Sequence[tuple[int, int, int]], *,
    advise: int = 0, lcluster_bits: int = 0, blocks: int = 1,
) -> bytes:  # fmt: skip
    """A compressed file with extent records: (logical offset, length word, byte address) each.

    Records of 4 and 8 bytes imply the offset, those of 4 all addresses but the first."""
    advise |= ondisk.ADVISE_EXTENTS
    advise |= {4: 0, 8: 1, 16: 2, 32: 3}[record_size] << ondisk.ADVISE_EXTRECSZ_SHIFT
    count = len(records) if record_size > 8 else 0
    header = ondisk.MAP_HEADER.pack(count, advise, 0, lcluster_bits)
    # inodes lie at multiples of 32, and the header at 32 more: this aligns the records
    body = header + bytes(max(record_size, 8) - 8)
    if record_size == 4:
        body += struct.pack("<Q", records[0][2])
    for start, word, address in records:  # the short records are the long one's beginning
        body += struct.pack("<IQQ12x", word, address, start)[:record_size]
    return inode(ondisk.LAYOUT_COMPRESSED_FULL, size, blocks, body, align=8)


def length_word(length: int, algorithm: int | None = None, partial: bool = False) -> int:
    """The first word of an extent record; no algorithm: stored bytes."""
    form = 0 if algorithm is None else algorithm + 1
    return length | partial << 27 | form << ondisk.EXTENT_PLEN_FMT_SHIFT


# --- extended attributes and directories ------------------------------------------------------


def xattr(index: int, name: bytes, value: bytes) -> bytes:
    """An entry: ``index`` stands for the name's prefix."""
    entry = ondisk.XATTR_ENTRY.pack(len(name), index, len(value)) + name + value
    return entry + bytes(-len(entry) % 4)


def xattr_body(inlined: Sequence[bytes], shared: Sequence[int] = ()) -> bytes:
    """What an inode has of xattrs: entries, and the places of others in the shared area."""
    ids = b"".join(struct.pack("<I", n) for n in shared)
    return ondisk.XATTR_IBODY_HEADER.pack(0, len(shared)) + ids + b"".join(inlined)


def directory(entries: Mapping[bytes, tuple[int, int]], block: int) -> bytes:
    """The data of a directory of (nid, file type) by name, in blocks of a given size."""
    blocks: list[list[tuple[bytes, int, int]]] = [[]]
    room = block
    for name, (nid, file_type) in sorted(entries.items()):
        needed = ondisk.DIRENT.size + len(name)
        if needed > room:
            blocks.append([])
            room = block
        blocks[-1].append((name, nid, file_type))
        room -= needed
    return b"".join(_directory_block(b).ljust(block, b"\0") for b in blocks[:-1]) + (
        _directory_block(blocks[-1])
    )


def _directory_block(entries: Sequence[tuple[bytes, int, int]]) -> bytes:
    records, names = b"", b""
    for name, nid, file_type in entries:
        start = len(entries) * ondisk.DIRENT.size + len(names)
        records += ondisk.DIRENT.pack(nid, start, file_type)
        names += name
    return records + names


# --- the whole --------------------------------------------------------------------------------


def build(
    files: Mapping[bytes, bytes],
    data: Mapping[int, bytes] | None = None,
    *,
    block_bits: int = 12,
    incompat: int = 0,
    compat: int = 0,
    first_nid: int = 2,
    elsewhere: Mapping[bytes, tuple[int, int]] | None = None,
    configs: Mapping[int, bytes] | None = None,
    devices: Sequence[tuple[int, int]] = (),
    **fields: Any,
) -> Pieces:
    """An image with ``files`` (inodes by name) in its root directory, and ``data`` by block.

    ``elsewhere``: directory entries of inodes that the caller placed; ``configs``: records by
    compression algorithm; ``devices``: (blocks, first block) of each extra one; ``fields``: of the
    superblock, where they differ from what this function makes of the rest."""
    size = 1 << block_bits
    meta = fields.setdefault("meta_blkaddr", -(-METADATA // size)) << block_bits
    pieces = {block << block_bits: content for block, content in (data or {}).items()}
    entries = dict(elsewhere or {})
    at = meta + 32 * first_nid
    for name, content in files.items():
        if at % size + len(content) > size:  # what lies behind an inode must not cross a block
            at += -at % size
        mode = int.from_bytes(content[4:6], "little")
        entries[name] = (at - meta) // 32, FILE_TYPES[stat.S_IFMT(mode)]
        pieces[at] = content
        at += -(-len(content) // 32) * 32
    at += -at % size
    root = (at - meta) // 32
    entries[b"."] = entries[b".."] = root, ondisk.FT_DIR
    pieces[at] = inline(directory(entries, size), mode=DIRECTORY, nlink=2)

    if devices:
        incompat |= ondisk.INCOMPAT_DEVICE_TABLE
        fields |= {"extra_devices": len(devices), "devt_slotoff": DEVICE_TABLE // 128}
        pieces[DEVICE_TABLE] = b"".join(_device_slot(*device) for device in devices)
    end = ondisk.SUPER_OFFSET + ondisk.SUPER_BASE_SIZE + 16 * fields.get("sb_extslots", 0)
    if configs:
        incompat |= ondisk.INCOMPAT_COMPR_CFGS
        fields["available_compr_algs"] = sum(1 << n for n in configs)
        for _, config in sorted(configs.items()):
            end += -end % 4
            pieces[end] = struct.pack("<H", len(config)) + config
            end += 2 + len(config)

    blocks = end_of(pieces) >> block_bits
    if incompat & ondisk.INCOMPAT_48BIT:
        fields = {"rootnid_8b": root, "rootnid_2b": blocks >> 32, **fields}
    default = {
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
    record = ondisk.SuperBlock(**{**dict.fromkeys(ondisk.SuperBlock._fields, 0), **default, **fields})
    raw = bytearray(ondisk.SUPERBLOCK.pack(*record))[: ondisk.SUPER_BASE_SIZE + 16 * record.sb_extslots]
    pieces[ondisk.SUPER_OFFSET] = bytes(raw)
    covered = size - ondisk.SUPER_OFFSET if size > ondisk.SUPER_OFFSET else size
    raw[4:8] = struct.pack("<I", crc32c(Sparse(pieces).read_at(ondisk.SUPER_OFFSET, covered)))
    pieces[ondisk.SUPER_OFFSET] = bytes(raw)
    return pieces


def _device_slot(blocks: int, first: int) -> bytes:
    low = 0xFFFFFFFF
    return ondisk.DEVICE_SLOT.pack(b"tag", blocks & low, first & low, blocks >> 32, first >> 32)

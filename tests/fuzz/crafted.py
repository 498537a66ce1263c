"""Images made by hand: good ones with what mkfs.erofs hardly writes, and hostile directories."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import lz4.block

from pyerofs.format import ondisk
from tests import handmade as hm

BLOCK = 512
DATA = 200  # first block of data
CONFIGS = {
    ondisk.ALG_LZ4: ondisk.LZ4_CFGS.pack(65535, 16),
    ondisk.ALG_DEFLATE: ondisk.DEFLATE_CFGS.pack(15),
}
BIG = ondisk.ADVISE_BIG_PCLUSTER_1 | ondisk.ADVISE_BIG_PCLUSTER_2


def flattened(pieces: hm.Pieces) -> bytes:
    """A handmade image as bytes."""
    source = hm.Sparse(pieces)
    return bytes(source.read_at(0, source.size))


def _padded(stream: bytes) -> bytes:
    return stream.rjust(-(-len(stream) // BLOCK) * BLOCK, b"\0")


def _lz4(data: bytes) -> bytes:
    return _padded(lz4.block.compress(data, mode="high_compression", store_size=False))


def _deflate(data: bytes) -> bytes:
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return _padded(encoder.compress(data) + encoder.flush())


def records() -> bytes:
    """Extent records of all four sizes: two pclusters, stored bytes and a hole in each file; and a
    file that is two pclusters many times."""
    stored = bytearray()
    files = {}

    def store(stream: bytes) -> int:
        """Add a pcluster; returns its address."""
        stored.extend(stream)
        return DATA * BLOCK + len(stored) - len(stream)

    for size in (4, 8, 16, 32):
        step = BLOCK if size <= 8 else 3000  # shorter records are about one lcluster each
        one, two = _lz4(hm.text(step, seed=size)), _deflate(hm.text(step, seed=1))
        rows = [
            (0, hm.plen(len(one), ondisk.ALG_LZ4), store(one)),
            (step, hm.plen(len(two), ondisk.ALG_DEFLATE), store(two)),
            (2 * step, hm.plen(BLOCK), store(hm.noise(BLOCK))),
            (2 * step + BLOCK, 0, 0),
        ]
        files[b"records of %d" % size] = hm.extents(2 * (step + BLOCK), size, rows)
    rows, step = [], 80_000  # large enough to be decoded ahead
    for seed in range(2):
        stream = _deflate(hm.text(step, seed=seed))
        word, address = hm.plen(len(stream), ondisk.ALG_DEFLATE), store(stream)
        rows += [((3 * seed + i) * step, word, address) for i in range(3)]
    files[b"again and again"] = hm.extents(6 * step, 16, rows)
    return flattened(
        hm.build(
            files,
            {DATA: bytes(stored)},
            block_bits=9,
            incompat=ondisk.INCOMPAT_48BIT | ondisk.INCOMPAT_LZ4_0PADDING,
            configs=CONFIGS,
        )
    )


def indexes() -> bytes:
    """Full indexes: two heads, big and partial pclusters, stored bytes, chunks, holes, xattrs."""
    big, small = _lz4(hm.text(6000)), _deflate(hm.text(1500, seed=1))
    one, two = DATA, DATA + len(big) // BLOCK
    big_blocks, small_blocks = len(big) // BLOCK, len(small) // BLOCK
    entries = [hm.head(ondisk.LCLUSTER_HEAD1, 0, one), hm.first(big_blocks, 10)]
    entries += [hm.nonhead(i, 11 - i) for i in range(2, 11)]
    entries += [hm.head(ondisk.LCLUSTER_HEAD2, 6000 % BLOCK, two), hm.first(small_blocks, 3)]
    entries += [hm.nonhead(2, 2), hm.nonhead(3, 1)]
    partial = [
        hm.head(ondisk.LCLUSTER_HEAD2, 0, two, partial=True),
        hm.head(ondisk.LCLUSTER_PLAIN, 0, two + small_blocks),
    ]
    xattrs = hm.xattr(1, b"name", b"value") + hm.xattr(6, b"long", b"x" * 100)
    null = ondisk.NULL_ADDR_32
    files = {
        b"big": hm.indexed(7500, entries, BIG, head2=ondisk.ALG_DEFLATE),
        b"partial": hm.indexed(800, partial, head2=ondisk.ALG_DEFLATE),
        b"chunks": hm.chunks(2000, [(0, one), (0, null), (0, two), (0, one)]),
        b"hole": hm.plain(1 << 40, null, high=0xFFFF, extended=True),
        b"inline": hm.inline(b"inline", xattrs=hm.xattrs(xattrs)),
    }
    return flattened(
        hm.build(
            files,
            {one: big + small + hm.noise(BLOCK)},
            block_bits=9,
            incompat=ondisk.INCOMPAT_48BIT
            | ondisk.INCOMPAT_LZ4_0PADDING
            | ondisk.INCOMPAT_CHUNKED_FILE
            | ondisk.INCOMPAT_FRAGMENTS
            | ondisk.INCOMPAT_DEVICE_TABLE,
            configs=CONFIGS,
        )
    )


GOOD = {"handmade-records": records, "handmade-indexes": indexes}


def directories(children: Sequence[Sequence[int]]) -> bytes:
    """An image with directories by number; each has those of ``children`` (two at most), as ``a``
    and ``b``.  The root has number 0, as ``top``."""
    first = 256  # behind the root
    pieces = hm.build({}, elsewhere={b"top": (first, ondisk.FT_DIR)})
    found = {}
    for number, below in enumerate(children):
        names = (b"a", b"b")
        entries = {
            name: (first + 2 * child, ondisk.FT_DIR)
            for name, child in zip(names, below, strict=False)
        }
        content = hm.directory(entries or {b".": (first, ondisk.FT_DIR)}, 4096)
        record = hm.inline(content, mode=hm.DIRECTORY, nlink=2)
        assert len(record) <= 64
        found[hm.METADATA + 32 * (first + 2 * number)] = record
    return flattened(pieces | found)


def single(file: bytes, incompat: int) -> bytes:
    """An image with one file, which may be an inode of any size, as ``file``."""
    first = 4096
    pieces = hm.build(
        {}, block_bits=9, incompat=incompat, elsewhere={b"file": (first, ondisk.FT_REG_FILE)}
    )
    return flattened(pieces | {hm.METADATA + 32 * first: file})

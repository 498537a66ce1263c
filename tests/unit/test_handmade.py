"""Legal images that mkfs.erofs never writes, made by hand and, where possible, shown to the kernel.

Each case says what its files contain.  The library must read that, and, where a kernel that knows
all features can mount the image, show everything exactly as the kernel does."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lz4.block
import pytest

import pyerofs
from pyerofs.format import ondisk
from pyerofs.sources.local.buffer import MemorySource
from pyerofs.sources.local.concat import ConcatSource
from pyerofs.sources.local.file import FileSource
from tests import handmade as hm
from tests.helpers import entries_of
from tests.manifests import differences, golden

LZ4, DEFLATE = ondisk.ALG_LZ4, ondisk.ALG_DEFLATE
CONFIGS = {LZ4: ondisk.LZ4_CFGS.pack(65535, 16), DEFLATE: ondisk.DEFLATE_CFGS.pack(15)}
PLAIN, HEAD1, _, HEAD2 = range(4)
IN_METABOX = 1 << ondisk.NID_METABOX_BIT
COMPRESSED = (  # padded LZ4 and big pclusters, HEAD2, partial references
    ondisk.INCOMPAT_LZ4_0PADDING | ondisk.INCOMPAT_DEVICE_TABLE | ondisk.INCOMPAT_FRAGMENTS
)
BIG = ondisk.ADVISE_BIG_PCLUSTER_1 | ondisk.ADVISE_BIG_PCLUSTER_2
INTERLACED = ondisk.ADVISE_INTERLACED_PCLUSTER
BEYOND = 1 << 32  # the first block that 32 bits can't name


@dataclass(frozen=True)
class Case:
    """An image, its extra devices and what files of it contain."""

    image: hm.Pieces
    contents: dict[str, bytes]
    devices: tuple[hm.Pieces, ...] = ()

    def open(self) -> pyerofs.Image:
        return pyerofs.open(
            hm.Sparse(self.image), devices=[hm.Sparse(pieces) for pieces in self.devices]
        )


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    """Register a case for the tests that all of them must pass."""
    CASES[make.__name__] = make
    return make


def by_lz4(data: bytes) -> bytes:
    found: bytes = lz4.block.compress(data, mode="high_compression", store_size=False)
    return found


def by_deflate(data: bytes) -> bytes:
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return encoder.compress(data) + encoder.flush()


def padded(stream: bytes) -> bytes:
    """A pcluster: a stream right-aligned in whole blocks."""
    return bytes(-len(stream) % 4096) + stream


def chain(lclusters: int) -> list[bytes]:
    """The nonhead entries of a pcluster of one block in some lclusters."""
    return [hm.nonhead(i, lclusters - i) for i in range(1, lclusters)]


# --- the images -----------------------------------------------------------------------------


@case
def lz4_left_aligned() -> Case:
    # runs of literals and matches whose lengths need more bytes, cut at many places
    data = hm.text(3000) + hm.noise(700) + bytes(5000) + hm.noise(300) + hm.text(3288)
    stream = by_lz4(data)
    two = hm.text(20000, seed=2)
    here, there = by_lz4(two[:9000]), by_lz4(two[9000:])
    stored = hm.noise(4096, seed=1)
    files = {
        b"zeros behind it": hm.indexed(12288, [hm.head(HEAD1, 0, 100), *chain(3)]),
        b"rubbish behind it": hm.indexed(12288, [hm.head(HEAD1, 0, 101), *chain(3)]),
        b"two": hm.indexed(
            20000,
            [hm.head(HEAD1, 0, 102), *chain(2), hm.head(HEAD1, 9000 - 8192, 103), *chain(3)],
        ),
        b"stored": hm.indexed(4196, [hm.head(PLAIN, 0, 104), hm.head(HEAD1, 0, 100)]),
    }
    contents = {
        "zeros behind it": data,
        "rubbish behind it": data,
        "two": two,
        "stored": stored + data[:100],
    }
    for size in range(1, 12288, 409):  # all shorter than what the pcluster decodes to
        lclusters = -(-size // 4096)
        files[b"first %d" % size] = hm.indexed(size, [hm.head(HEAD1, 0, 101), *chain(lclusters)])
        contents[f"first {size}"] = data[:size]
    blocks = {
        100: stream,
        101: (stream + b"\xff\x11" * 2048)[:4096],
        102: (here + hm.noise(4096))[:4096],
        103: there,
        104: stored,
    }
    return Case(hm.build(files, blocks), contents)


@case
def metabox_shared_xattrs() -> Case:
    one, two = hm.xattr(1, b"shared", b"in the metabox"), hm.xattr(6, b"other", b"S" * 30)
    both = hm.xattrs(hm.xattr(1, b"own", b"inline"), [0, len(one)])
    metabox = hm.inline(b"inside", xattrs=both).ljust(512, b"\0") + one + two
    image = hm.build(
        {
            b"metabox": hm.plain(len(metabox), 100, mode=stat.S_IFREG),
            b"outside": hm.inline(b"outside", xattrs=both, extended=True),
        },
        {100: metabox},
        block_bits=9,
        incompat=ondisk.INCOMPAT_METABOX,
        compat=ondisk.COMPAT_SHARED_EA_IN_METABOX,
        sb_extslots=1,
        metabox_nid=2,
        xattr_blkaddr=1,  # of the metabox
        elsewhere={b"inside": (IN_METABOX | 0, ondisk.FT_REG_FILE)},
    )
    return Case(image, {"inside": b"inside", "outside": b"outside", "metabox": metabox})


@case
def root_in_metabox() -> Case:
    inner = {b".": (IN_METABOX | 0, 2), b"..": (IN_METABOX | 0, 2), b"file": (2, 1)}
    metabox = hm.inline(hm.directory(inner, 4096), mode=hm.DIRECTORY, nlink=2)
    image = hm.build(
        {b"metabox": hm.inline(metabox)},
        incompat=ondisk.INCOMPAT_METABOX | ondisk.INCOMPAT_48BIT,
        sb_extslots=1,
        metabox_nid=2,
        rootnid_8b=IN_METABOX | 0,
    )
    return Case(image, {"file": metabox})


@case
def device_ids_with_other_bits() -> Case:
    one, two, three = ({0: hm.noise(8192, seed)} for seed in (1, 2, 3))
    # three devices: two bits of an id count.  No chunk continues the sector numbers of the one
    # before it on another device: readahead of Linux 6.18 would join the two in one request
    places = [(0xFFF1, 0), (0x8002, 0), (0x0007, 0), (4, 100), (0x7FFE, 1), (0xFFF3, 1)]
    content = (
        one[0][:4096] + two[0][:4096] + three[0][:4096]
        + hm.text(4096) + two[0][4096:] + three[0][4096:4106]
    )  # fmt: skip
    image = hm.build(
        {b"file": hm.chunks(5 * 4096 + 10, places)},
        {100: hm.text(4096)},
        incompat=ondisk.INCOMPAT_CHUNKED_FILE,
        devices=[(2, 0)] * 3,
    )
    return Case(image, {"file": content}, (one, two, three))


def wide_files() -> dict[bytes, bytes]:
    """Files in 512-byte blocks of which some lie beyond those that 32 bits can name."""
    null = ondisk.NULL_ADDR_48
    places = [(0, BEYOND + 5), (0, null), (0, BEYOND + 4)]
    low = 0xFFFFFFFF
    return {
        b"chunks": hm.chunks(1300, places, form=ondisk.CHUNK_48BIT),
        b"compact": hm.plain(700, 7, high=1),
        b"extended": hm.plain(700, 8, high=1, extended=True),
        b"tail": hm.inode(ondisk.LAYOUT_FLAT_INLINE, 700, 9, b"t" * 188, high=1),
        b"links": hm.plain(600, 100, nlink=3),  # its i_nb is no part of an address
        b"hole compact": hm.plain(2000, low, high=0xFFFF),
        b"hole extended": hm.plain(2000, low, high=0xFFFF, extended=True),
        b"hole links": hm.plain(2000, low, nlink=2),
    }


@case
def addresses_of_48_bits() -> Case:
    far, near = hm.text(4096), hm.text(600, seed=1)
    image = hm.build(
        wide_files(),
        {BEYOND + 4: far, 100: near},
        block_bits=9,
        incompat=ondisk.INCOMPAT_48BIT | ondisk.INCOMPAT_CHUNKED_FILE,
    )
    contents = {
        "chunks": far[512:1024] + bytes(512) + far[:276],
        "compact": far[1536:2236],
        "extended": far[2048:2748],
        "tail": far[2560:3072] + b"t" * 188,
        "links": near,
        "hole compact": bytes(2000),
        "hole extended": bytes(2000),
        "hole links": bytes(2000),
    }
    return Case(image, contents)


def far_device_files() -> dict[bytes, bytes]:
    places = [(1, 1), (0, BEYOND + 64)]  # by device id, and by address in the unified space
    return {
        b"chunks": hm.chunks(1000, places, form=ondisk.CHUNK_48BIT),
        b"flat": hm.plain(700, 65, high=1),
    }


FAR_DEVICE: dict[str, Any] = {
    "block_bits": 9,
    "incompat": ondisk.INCOMPAT_48BIT | ondisk.INCOMPAT_CHUNKED_FILE,
    "devices": [(8, BEYOND + 64)],
}


@case
def device_mapped_beyond_32_bits() -> Case:
    data = hm.text(4096)
    contents = {"chunks": data[512:1024] + data[:488], "flat": data[512:1212]}
    return Case(hm.build(far_device_files(), **FAR_DEVICE), contents, ({0: data},))


@case
def flat_image_of_a_far_device() -> Case:
    found = device_mapped_beyond_32_bits()
    (device,) = found.devices
    return Case(found.image | {(BEYOND + 64) * 512: device[0]}, found.contents)


@case
def full_index() -> Case:
    data = hm.noise(4096) + hm.text(30000, seed=7)
    other = hm.text(12288)
    start, end = padded(by_lz4(data[:20000])), padded(by_deflate(data[20000:]))
    wide = padded(by_lz4(data[:16384]))
    small = padded(by_lz4(other))
    assert [len(p) // 4096 for p in (start, end, wide, small)] == [2, 1, 2, 1]
    first = [hm.head(HEAD1, 0, 100), hm.first(2, 3), hm.nonhead(2, 2), hm.nonhead(3, 1)]
    second = hm.head(HEAD2, 20000 - 16384, 110)
    files = {
        b"heads": hm.indexed(
            34096, [*first, second, hm.first(1, 4), *chain(5)[1:]], BIG, head2=DEFLATE, blocks=3
        ),
        b"one kind is big": hm.indexed(
            34096, [*first, second, *chain(5)], ondisk.ADVISE_BIG_PCLUSTER_1, head2=DEFLATE
        ),
        b"partial": hm.indexed(
            5700,
            [hm.head(HEAD1, 0, 111, partial=True), hm.head(HEAD2, 904, 110, partial=True)],
            head2=DEFLATE,
        ),
        b"whole": hm.indexed(12288, [hm.head(HEAD1, 0, 111), *chain(3)]),
        b"early": hm.indexed(  # mkfs before 1.0 left out the distance ahead
            12288, [hm.head(HEAD1, 0, 111), hm.nonhead(1, 0), hm.nonhead(2, 0)]
        ),
        b"early and big": hm.indexed(
            20000, [*first[:1], hm.first(2, 0), *[hm.nonhead(i, 0) for i in (2, 3, 4)]], BIG
        ),
        b"wide": hm.indexed(  # lclusters of two blocks
            20000,
            [hm.head(HEAD1, 0, 112), hm.first(2, 1), hm.head(HEAD1, 0, 111, partial=True)],
            BIG,
            bits=1,
        ),
        b"stored": hm.indexed(
            12288, [hm.head(PLAIN, 0, 120), hm.first(3, 2), hm.nonhead(2, 1)], BIG
        ),
    }
    stored = hm.noise(12288, seed=1)
    contents = {
        "heads": data,
        "one kind is big": data,
        "partial": other[:5000] + data[20000:20700],
        "whole": other,
        "early": other,
        "early and big": data[:20000],
        "wide": data[:16384] + other[:3616],
        "stored": stored,
    }
    blocks = {100: start, 110: end, 111: small, 112: wide, 120: stored}
    return Case(hm.build(files, blocks, incompat=COMPRESSED, configs=CONFIGS), contents)


@case
def extent_records() -> Case:
    data, stored = hm.text(12288), hm.noise(4096)
    one, two, all_ = by_lz4(data[:4096]), by_lz4(data[8192:]), by_deflate(data)
    # nothing is aligned: streams lie one after another from some byte on
    at_one, at_all = 100 * 4096 + 100, 200 * 4096 + 17
    at_stored, at_two = at_one + len(one), at_one + len(one) + 4096
    regular = [
        (0, hm.plen(len(one), LZ4), at_one),
        (4096, hm.plen(4096), at_stored),
        (8192, 0, 0),
        (12288, hm.plen(len(two), LZ4), at_two),
    ]
    odd = [
        (0, hm.plen(len(all_), DEFLATE, partial=True), at_all),
        (1000, 0, 0),
        (7000, hm.plen(2000), at_stored + 3),
        (9000, hm.plen(len(all_), DEFLATE), at_all),
    ]
    cut = [*regular[:3], (12288, hm.plen(len(two), LZ4, partial=True), at_two)]
    files = {b"cut": hm.extents(12388, 4, cut), b"hole": hm.extents(9000, 8, [(0, 0, 0)] * 3)}
    files |= {b"regular %d" % n: hm.extents(16384, n, regular) for n in (4, 8, 16, 32)}
    files |= {b"odd %d" % n: hm.extents(9000 + 12288, n, odd) for n in (16, 32)}
    whole = data[:4096] + stored + bytes(4096) + data[8192:]
    contents = {"cut": whole[:12388], "hole": bytes(9000)}
    contents |= {f"regular {n}": whole for n in (4, 8, 16, 32)}
    contents |= {f"odd {n}": data[:1000] + bytes(6000) + stored[3:2003] + data for n in (16, 32)}
    image = hm.build(files, incompat=COMPRESSED | ondisk.INCOMPAT_48BIT, configs=CONFIGS)
    return Case(image | {at_one: one + stored + two, at_all: all_}, contents)


@case
def pclusters_on_a_device() -> Case:
    data, stored = hm.text(12288), hm.noise(4096)
    stream = by_lz4(data)
    files = {
        b"indexed": hm.indexed(
            16384, [hm.head(HEAD1, 0, 60), *chain(3), hm.head(PLAIN, 0, 61)], blocks=2
        ),
        b"extents": hm.extents(
            16384,
            16,
            [(0, hm.plen(len(stream), LZ4), 62 * 4096 + 5), (12288, hm.plen(4096), 61 * 4096)],
        ),
    }
    image = hm.build(
        files, incompat=COMPRESSED | ondisk.INCOMPAT_48BIT, configs=CONFIGS, devices=[(3, 60)]
    )
    device = {0: padded(stream), 4096: stored, 8192: bytes(5) + stream}
    return Case(image, {"indexed": data + stored, "extents": data + stored}, (device,))


def rotated(data: bytes, start: int, blocks: int) -> bytes:
    """An interlaced pcluster: what comes before the first block boundary of the file lies at the
    pcluster's end, the rest at its beginning."""
    before = 4096 - start % 4096
    assert len(data) > before
    return data[before:].ljust(blocks * 4096 - before, b"\xee") + data[:before]


@case
def interlaced() -> Case:
    lead, stored = hm.text(5120), hm.noise(12288)
    head = hm.head(HEAD1, 0, 100)
    stream = by_lz4(lead)
    at = 101 * 4096 - len(stream)
    several = [hm.first(3, 2), hm.nonhead(2, 1)]
    files = {
        b"aligned": hm.indexed(12288, [hm.head(PLAIN, 0, 110), *several], BIG | INTERLACED),
        b"odd": hm.indexed(14336, [head, hm.head(PLAIN, 1024, 120), *several], BIG | INTERLACED),
        b"one block": hm.indexed(8192, [head, hm.head(PLAIN, 1024, 130)], BIG | INTERLACED),
        b"extent": hm.extents(
            17408, 16, [(0, hm.plen(len(stream), LZ4), at), (5120, hm.plen(12288), 140 * 4096)],
            INTERLACED,
        ),
        b"extent at some byte": hm.extents(
            17408, 16, [(0, hm.plen(len(stream), LZ4), at), (5120, hm.plen(12288), 150 * 4096 + 9)],
            INTERLACED,  # aligned extents only
        ),
    }  # fmt: skip
    blocks = {
        100: padded(stream),
        110: rotated(stored, 0, 3),
        120: rotated(stored[:9216], 5120, 3),
        130: stored[:3072].rjust(4096, b"\xee"),  # all of it before the boundary
        140: rotated(stored, 5120, 3),
        150: bytes(9) + stored,
    }
    contents = {
        "aligned": stored,
        "odd": lead + stored[:9216],
        "one block": lead + stored[:3072],
        "extent": lead + stored,
        "extent at some byte": lead + stored,
    }
    incompat = COMPRESSED | ondisk.INCOMPAT_48BIT
    return Case(hm.build(files, blocks, incompat=incompat, configs=CONFIGS), contents)


@case
def odd_inodes() -> Case:
    files = {
        b"nid 0": hm.plain(9, 100),
        b"nid 1": hm.plain(5000, 101),
        b"device": hm.inode(0, 0, 0xFFFFFFFF, mode=stat.S_IFCHR | 0o600),
        b"extended device": hm.inode(0, 0, 0xFFFFFFFF, mode=stat.S_IFBLK | 0o600, extended=True),
        b"hole": hm.plain(3 << 20, 0xFFFFFFFF),
    }
    data = hm.text(5000)
    image = hm.build(files, {100: b"contents", 101: data}, first_nid=0)
    return Case(image, {"nid 0": b"contents\0", "nid 1": data, "hole": bytes(3 << 20)})


@case
def nids_beyond_31_bits() -> Case:
    files = {b"file": hm.inline(b"far"), b"link": hm.inline(b"file", mode=stat.S_IFLNK | 0o777)}
    image = hm.build(files, first_nid=(1 << 31) + 128, incompat=ondisk.INCOMPAT_48BIT)
    return Case(image, {"file": b"far"})


@case
def metadata_beyond_31_bits() -> Case:
    # Linux takes meta_blkaddr as unsigned (erofs-utils 1.9.3 does not)
    image = hm.build({b"file": hm.inline(b"far")}, block_bits=9, meta_blkaddr=1 << 31)
    return Case(image, {"file": b"far"})


@case
def unknown_compatible_feature() -> Case:
    return Case(hm.build({b"file": hm.inline(b"data")}, compat=1 << 30), {"file": b"data"})


# --- what the library must read -------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_content(name: str) -> None:
    found = CASES[name]()
    with found.open() as image:
        wrong = [path for path, content in found.contents.items() if image.read(path) != content]
        assert wrong == []


@pytest.mark.parametrize("name", CASES)
def test_content_in_pieces(name: str) -> None:
    found = CASES[name]()
    for path, content in found.contents.items():
        step = max(len(content) // 7, 1)
        for at in range(len(content) - 1, -1, -step):  # backwards, with nothing known before
            with found.open() as image:
                assert image.read(path, at, 1500) == content[at : at + 1500], (path, at)


@pytest.mark.parametrize("name", CASES)
def test_extents_cover_files(name: str) -> None:
    found = CASES[name]()
    with found.open() as image:
        for path, content in found.contents.items():
            end = 0
            for extent in image.extents(path):
                assert extent.start == end, path
                end = extent.end
            assert end == len(content), path


def test_shared_xattrs_in_metabox() -> None:
    with metabox_shared_xattrs().open() as image:
        expected = {
            "user.own": b"inline", "user.shared": b"in the metabox", "security.other": b"S" * 30,
        }  # fmt: skip
        assert image.xattrs("inside") == image.xattrs("outside") == expected
        assert image.getxattr("outside", "security.other") == b"S" * 30


def test_holes_are_seen_as_such() -> None:
    with odd_inodes().open() as image:
        assert [(e.kind, e.length) for e in image.extents("hole")] == [(0, 3 << 20)]
    with extent_records().open() as image:
        assert [e.start for e in image.extents("odd 16") if e.kind == 0] == [1000]


def test_first_nids_are_ordinary() -> None:
    with odd_inodes().open() as image:
        assert [image.lookup(f"nid {n}").nid for n in (0, 1)] == [0, 1]
        assert image.inode(0).size == 9


@pytest.mark.parametrize("path", ["device", "extended device"])
def test_rdev_of_ones(path: str) -> None:
    with odd_inodes().open() as image:
        assert image.stat(path).st_rdev == os.makedev(0xFFF, 0xFFFFF)


def test_inode_numbers_without_a_metabox() -> None:
    with nids_beyond_31_bits().open() as image:
        inode = image.lookup("file")
        assert image.stat(inode).st_ino == inode.nid == (1 << 31) + 128


def test_48_bit_block_count() -> None:
    with addresses_of_48_bits().open() as image:
        assert image.superblock.total_blocks == BEYOND + 16
        assert image.superblock.root_nid == image.root.nid


def test_compressed_blocks_beyond_32_bits() -> None:
    # Linux 6.18 drops the high bits; later ones show them
    entries = [hm.head(HEAD1, 0, 100)]
    files = {
        b"compact": hm.indexed(100, entries, blocks=3, high=1),
        b"extended": hm.indexed(100, entries, blocks=3, high=1, extended=True),
        b"links": hm.indexed(100, entries, blocks=3, nlink=2),
    }
    image = hm.build(files, {100: by_lz4(bytes(100))}, incompat=ondisk.INCOMPAT_48BIT)
    with Case(image, {}).open() as opened:
        blocks = [opened.stat(name).st_blocks for name in ("compact", "extended", "links")]
        assert blocks == [(BEYOND + 3) * 8, (BEYOND + 3) * 8, 3 * 8]


def test_the_last_addresses_of_48_bits() -> None:
    """The largest block is the null address; the one before it is 2**60 bytes away."""
    last = ondisk.NULL_ADDR_48 - 1
    files = {
        b"chunks": hm.chunks(5000, [(0, last), (0, ondisk.NULL_ADDR_48)], form=ondisk.CHUNK_48BIT),
        b"flat": hm.plain(4000, 0xFFFFFFFE, high=0xFFFF),
    }
    incompat = ondisk.INCOMPAT_48BIT | ondisk.INCOMPAT_CHUNKED_FILE
    data = hm.text(4096)
    with Case(hm.build(files, {last: data}, incompat=incompat), {}).open() as image:
        assert image.read("chunks") == data + bytes(904)
        assert image.read("flat") == data[:4000]
        assert image.superblock.blocks == ondisk.NULL_ADDR_48


@pytest.mark.parametrize("bits", [1, 4])
def test_directory_blocks_of_several_blocks(bits: int) -> None:
    image = directory_blocks(bits)
    with Case(image, {}).open() as opened:
        names = opened.listdir("many")
        assert names == [f"name {i:03}" for i in range(600)]
        assert {opened.lookup(f"many/{name}").nid for name in names} == {2}
        assert not opened.exists("many/name")
        assert opened.superblock.directory_block_size == 4096 << bits


def directory_blocks(bits: int) -> hm.Pieces:
    names = {b"name %03d" % i: (2, ondisk.FT_REG_FILE) for i in range(600)}
    data = hm.directory(names, 4096 << bits)
    many = hm.plain(len(data), 100, mode=hm.DIRECTORY, nlink=2)
    return hm.build({b"file": hm.inline(b"data"), b"many": many}, {100: data}, dirblkbits=bits)


def test_unknown_compatible_feature_is_named() -> None:
    with unknown_compatible_feature().open() as image:
        assert "compat:0x40000000" in image.superblock.feature_names


def unknown_incompatible_feature() -> hm.Pieces:
    return hm.build({}, incompat=0x400)


def bad_checksum() -> hm.Pieces:
    image = hm.build({})
    raw = bytearray(image[ondisk.SUPER_OFFSET])
    raw[24] ^= 1  # of the epoch
    return image | {ondisk.SUPER_OFFSET: bytes(raw)}


def test_unknown_incompatible_feature_is_refused() -> None:
    with pytest.raises(pyerofs.UnsupportedFeature, match="0x400"):
        Case(unknown_incompatible_feature(), {}).open()


def test_bad_checksum_is_refused() -> None:
    with pytest.raises(pyerofs.CorruptImage, match="checksum") as caught:
        Case(bad_checksum(), {}).open()
    assert caught.value.offset == ondisk.SUPER_OFFSET + 4


# --- a tar index and its tar as one flat image ------------------------------------------------

TAR_INDEX = golden("tar-index")


def tar_index_flat() -> bytes:
    (tar,) = TAR_INDEX.devices
    with pyerofs.open(TAR_INDEX.image) as image:
        start = image.superblock.devices[0].uniaddr * image.superblock.block_size
    return TAR_INDEX.image.read_bytes().ljust(start, b"\0") + tar.read_bytes()


def test_flat_tar_index() -> None:
    with pyerofs.open(MemorySource(tar_index_flat())) as image:
        assert differences(TAR_INDEX, entries_of(image)) == []


def test_concatenated_tar_index() -> None:
    parts = [FileSource(path) for path in (TAR_INDEX.image, *TAR_INDEX.devices)]
    with pyerofs.open(ConcatSource(parts)) as image:
        assert differences(TAR_INDEX, entries_of(image)) == []


# --- the kernel agrees --------------------------------------------------------------------------


class Shown(NamedTuple):
    """What an entry looks like; ``content``: names in a directory, a link's target, or a digest."""

    stat: pyerofs.Stat
    content: str | list[str]
    xattrs: dict[str, bytes]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def by_library(image: pyerofs.Image, path: str) -> Shown:
    inode = image.lookup(path, follow_symlinks=False)
    content: str | list[str] = ""
    if inode.is_dir:
        # readdir(3) passes over entries whose inode number is 0
        content = [entry.name for entry in image.scandir(inode) if entry.dirent.nid]
    elif inode.is_symlink:
        content = image.readlink(inode)
    elif inode.is_file:
        content = digest(image.read(inode))
    return Shown(image.stat(inode), content, image.xattrs(inode))


def by_kernel(path: Path) -> Shown:
    found = path.lstat()
    content: str | list[str] = ""
    if stat.S_ISDIR(found.st_mode):
        content = os.listdir(path)
    elif stat.S_ISLNK(found.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(found.st_mode):
        content = digest(path.read_bytes())
    fields = (getattr(found, field) for field in pyerofs.Stat._fields)
    names = os.listxattr(path, follow_symlinks=False)
    xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    return Shown(pyerofs.Stat(*fields), content, xattrs)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def why_no_kernel() -> str | None:
    """Why this machine can't mount what this module makes, if it can't."""
    if os.geteuid():
        return "mounting needs root"
    if not all(shutil.which(tool) for tool in ("losetup", "mount", "umount")):
        return "losetup, mount or umount is missing"
    drivers = Path("/proc/filesystems")
    if not drivers.exists() or "\terofs\n" not in drivers.read_text():
        return "this kernel has no erofs driver"
    if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (6, 18):
        return "kernels before 6.18 lack some features"
    if run("losetup", "--find").returncode:
        return "no loop devices"
    return None


NO_KERNEL = why_no_kernel()
needs_kernel = pytest.mark.skipif(NO_KERNEL is not None, reason=str(NO_KERNEL))


@contextmanager
def mounted(found: Case, directory: Path) -> Iterator[Path]:
    """Mount a case.  Raises OSError if the kernel refuses it."""
    with ExitStack() as stack:
        loops = []
        for number, pieces in enumerate((found.image, *found.devices)):
            path = directory / f"device{number}"
            try:
                hm.save(pieces, path)
            except OSError as e:
                pytest.skip(f"no sparse file of {hm.end_of(pieces)} bytes here: {e.strerror}")
            stack.callback(path.unlink)
            loop = run("losetup", "--find", "--show", "--read-only", path).stdout.strip()
            assert loop, "no loop device left"
            stack.callback(run, "losetup", "--detach", loop)
            loops.append(loop)
        where = directory / "mounted"
        where.mkdir()
        options = ",".join(["ro", *(f"device={loop}" for loop in loops[1:])])
        result = run("mount", "-t", "erofs", "-o", options, loops[0], where)
        if result.returncode:
            raise OSError(result.stderr.strip())
        stack.callback(unmount, where)
        yield where


def unmount(where: Path) -> None:
    assert run("umount", where).returncode == 0, f"{where} is still mounted"


@needs_kernel
@pytest.mark.parametrize("name", CASES)
def test_kernel_shows_the_same(name: str, tmp_path: Path) -> None:
    compare_with_kernel(CASES[name](), tmp_path)


@needs_kernel
def test_kernel_shows_the_same_tar_index(tmp_path: Path) -> None:
    compare_with_kernel(Case({0: tar_index_flat()}, {}), tmp_path)


def compare_with_kernel(found: Case, directory: Path) -> None:
    with mounted(found, directory) as where, found.open() as image:
        for path in entries_of(image):
            assert by_library(image, path) == by_kernel(where / path), path
        room = os.statvfs(where)
        assert (room.f_blocks, room.f_bsize) == (
            image.superblock.total_blocks,
            image.superblock.block_size,
        )


@needs_kernel
@pytest.mark.parametrize(
    "image",
    [
        pytest.param(unknown_incompatible_feature(), id="unknown incompatible feature"),
        pytest.param(bad_checksum(), id="bad checksum"),
        pytest.param(directory_blocks(1), id="directory blocks of two blocks"),
    ],
)
def test_kernel_refuses(image: hm.Pieces, tmp_path: Path) -> None:
    """What the library refuses, and the one thing that only it reads."""
    with pytest.raises(OSError, match="mount"), mounted(Case(image, {}), tmp_path):
        pass

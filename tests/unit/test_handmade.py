"""Legal images that mkfs.erofs never writes, made by hand and, where possible, shown to the kernel.

Each case says what its files contain.  The library must read that, and, where a kernel that knows
all features can mount the image, show everything exactly as the kernel does."""

from __future__ import annotations

import hashlib
import json
import os
import platform
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
from tests import handmade as hm

import pyerofs
from pyerofs import ondisk
from pyerofs.sources.concat import ConcatSource
from pyerofs.sources.file import FileSource
from pyerofs.sources.memory import MemorySource

IMAGES = Path(__file__).parent.parent / "images"

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


def padded(stream: bytes, blocks: int = 1) -> bytes:
    """A pcluster: a stream right-aligned in some blocks, of which its padding is less than one."""
    assert (blocks - 1) * 4096 < len(stream) <= blocks * 4096
    return stream.rjust(blocks * 4096, b"\0")


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
    places = [(0xFFF1, 0), (0x8002, 0), (0x0007, 1), (4, 100), (0x7FFE, 1), (0xFFF3, 0)]
    content = (
        one[0][:4096] + two[0][:4096] + three[0][4096:]
        + hm.text(4096) + two[0][4096:] + three[0][:10]
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
    stored = hm.noise(12288, seed=1)
    first, rest = by_lz4(data[:20000]), by_deflate(data[20000:])
    blocks = {
        100: padded(first, 2),
        110: padded(rest),
        111: padded(by_lz4(other)),
        112: padded(by_lz4(data[:8192]), 2),
        114: padded(by_lz4(data[8192:]), 2),
        120: stored,
    }
    count = hm.first(2, 3), hm.nonhead(2, 2), hm.nonhead(3, 1)
    files = {
        b"heads": hm.indexed(
            34096,
            [hm.head(HEAD1, 0, 100), *count, hm.head(HEAD2, 20000 - 16384, 110), hm.first(1, 4)]
            + chain(5)[1:],
            BIG,
            head2=DEFLATE,
            blocks=3,
        ),
        b"one head is big": hm.indexed(
            34096,
            [hm.head(HEAD1, 0, 100), *count, hm.head(HEAD2, 20000 - 16384, 110), *chain(5)],
            ondisk.ADVISE_BIG_PCLUSTER_1,
            head2=DEFLATE,
            blocks=3,
        ),
        b"partial": hm.indexed(
            5700,
            [hm.head(HEAD1, 0, 111, partial=True), hm.head(HEAD2, 904, 110, partial=True)],
            head2=DEFLATE,
        ),
        b"whole": hm.indexed(12288, [hm.head(HEAD1, 0, 111), *chain(3)]),
        b"old": hm.indexed(  # early mkfs left out the distance ahead
            12288, [hm.head(HEAD1, 0, 111), hm.nonhead(1, 0), hm.nonhead(2, 0)]
        ),
        b"lclusters of two blocks": hm.indexed(
            34096,
            [hm.head(HEAD1, 0, 112), hm.head(HEAD1, 0, 114), hm.first(2, 3)] + chain(4)[1:],
            BIG,
            bits=1,
        ),
        b"stored": hm.indexed(
            12288, [hm.head(PLAIN, 0, 120), hm.first(3, 2), hm.nonhead(2, 1)], BIG
        ),
    }
    # a pcluster of two blocks needs its count: the lcluster behind the first head above is a head
    files.pop(b"lclusters of two blocks")
    contents = {
        "heads": data,
        "one head is big": data,
        "partial": other[:5000] + data[20000:20700],
        "whole": other,
        "old": other,
        "stored": stored,
    }
    return Case(hm.build(files, blocks, incompat=COMPRESSED, configs=CONFIGS), contents)

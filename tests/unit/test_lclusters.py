"""Maps of compressed files: the same with parts of the index as by single entries, and as promised."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyerofs
from pyerofs import Image
from pyerofs.errors import ErofsError
from pyerofs.format import directory, lclusters, ondisk, zmap
from pyerofs.format import inode as inodes
from pyerofs.format.lclusters import COST, CREDIT, PART
from pyerofs.format.memory import WINDOW_SIZE, FaultingMemory, NotResident
from pyerofs.format.model import ENCODED, PLAIN, Extent, Inode
from pyerofs.format.volume import Volume
from pyerofs.sources import MemorySource
from tests import handmade as hm
from tests.helpers import open_golden
from tests.manifests import Manifest, all_manifests, golden

BLOCK = 4096
HEADS = {
    ondisk.LCLUSTER_HEAD1: ondisk.ALG_LZ4,
    ondisk.LCLUSTER_HEAD2: ondisk.ALG_DEFLATE,
}
CONFIGS = {
    ondisk.ALG_LZ4: ondisk.LZ4_CFGS.pack(65535, 16),
    ondisk.ALG_DEFLATE: ondisk.DEFLATE_CFGS.pack(15),
}
FEATURES = ondisk.INCOMPAT_LZ4_0PADDING | ondisk.INCOMPAT_DEVICE_TABLE

Outcome = Extent | tuple[str, str]


def mapped(image: Image, inode: Inode, offset: int) -> Outcome:
    """The extent at an offset, or the error."""
    try:
        return zmap.map_at(image.volume, inode, offset)
    except ErofsError as e:
        return type(e).__name__, str(e)


def used(image: Image, inode: Inode) -> None:
    """Have the next look-up be neither the file's first one nor that of the same extent again."""
    z = inode.zmap
    if z is not None and not z.whole:
        z.last = Extent(-1, 0, 0)


def check(image: Image, nid: int, offsets: Iterable[int]) -> int:
    """Compare the map of a file that was used with that of one that was not; how many errors."""
    inode = image.inode(nid)
    errors = 0
    for offset in offsets:
        want = mapped(image, image.inode(nid), offset)
        mapped(image, inode, offset)
        used(image, inode)
        assert mapped(image, inode, offset) == want
        errors += not isinstance(want, Extent)
    return errors


def compressed(image: Image) -> list[Inode]:
    """All compressed inodes."""
    found, seen = [], set()
    sb = image.superblock
    todo = [image.root.nid, *(nid for nid in (sb.packed_nid, sb.metabox_nid) if nid)]
    while todo:
        nid = todo.pop()
        if nid not in seen:
            seen.add(nid)
            inode = image.inode(nid)
            if inode.is_compressed and inode.size:
                found.append(inode)
            if inode.is_dir:
                todo += [entry.nid for entry in directory.entries(image.volume, inode)]
    return found


def around(extents: list[Extent]) -> list[int]:
    """The first, the second, the middle and the last byte of extents."""
    return sorted(
        {
            offset
            for e in extents
            for offset in (e.start, e.start + 1, e.start + e.length // 2, e.end - 1)
            if offset < e.end
        }
    )


# --- images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("want", all_manifests(), ids=str)
def test_golden_images(want: Manifest) -> None:
    with open_golden(want) as image:
        for inode in compressed(image):
            extents = list(image.extents(inode))
            choose = random.Random(inode.nid)
            anywhere = [choose.randrange(inode.size) for _ in range(20)]
            assert check(image, inode.nid, around(extents) + anywhere) == 0


@st.composite
def files(draw: st.DrawFn) -> tuple[int, list[hm.Lead], bool]:
    """A size, pclusters, and whether they may have several blocks."""
    choose = random.Random(draw(st.integers(0, 1 << 32)))
    big = draw(st.booleans())
    longest = draw(st.sampled_from([BLOCK, 3 * BLOCK, 20 * BLOCK, 1 << 20]))
    leads, at, block = [], 0, 1000
    for _ in range(draw(st.integers(1, 700))):
        length = BLOCK + choose.randrange(longest)
        spans = (at + length >> 12) - (at >> 12)  # lclusters from its own to the next one's
        blocks = choose.randint(1, 16) if big and spans > 1 else 1
        kind = choose.choice([*HEADS, ondisk.LCLUSTER_PLAIN])
        if kind == ondisk.LCLUSTER_PLAIN and length > blocks * BLOCK:
            kind = ondisk.LCLUSTER_HEAD1
        leads.append(hm.Lead(at, kind, block, blocks))
        at += length
        block += blocks
        if at > 14 << 20:
            break
    return at, leads, big


def image_of(inode: bytes) -> Image:
    return pyerofs.open(hm.Sparse(hm.build({b"x": inode}, incompat=FEATURES, configs=CONFIGS)))


def expected(size: int, leads: list[hm.Lead]) -> list[Extent]:
    """What the map has to be."""
    ends = [lead.start for lead in leads[1:]] + [size]
    return [
        Extent(lead.start, end - lead.start, PLAIN, 0, lead.block * BLOCK, lead.blocks * BLOCK)
        if lead.kind == ondisk.LCLUSTER_PLAIN
        else Extent(
            lead.start,
            end - lead.start,
            ENCODED,
            0,
            lead.block * BLOCK,
            lead.blocks * BLOCK,
            HEADS[lead.kind],
        )
        for lead, end in zip(leads, ends, strict=True)
    ]


@pytest.mark.parametrize("form", ["full", "compact", "pairs"])
@given(file=files(), words=st.integers(0, 8))
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
def test_files_of_any_pclusters(
    form: str, file: tuple[int, list[hm.Lead], bool], words: int
) -> None:
    """At any alignment of the index, which decides how many packs of two it begins with."""
    size, leads, big = file
    xattrs = bytes(12 + 4 * words) if words else b""
    if form == "full":
        made = hm.fully(size, leads, big, xattrs=xattrs)
    else:
        made = hm.compactly(size, leads, big, form == "compact", xattrs=xattrs)
    with image_of(made) as image:
        inode = image.lookup("/x")
        want = expected(size, leads)
        assert list(image.extents(inode)) == want
        for extent in random.Random(size).sample(want, min(len(want), 60)):
            for offset in around([extent]):
                assert mapped(image, inode, offset) == extent
                assert mapped(image, image.inode(inode.nid), offset) == extent


def regular(length: int, count: int, blocks: int = 1) -> tuple[int, list[hm.Lead]]:
    """The size and the pclusters of a file, all alike."""
    leads = [
        hm.Lead(i * length, ondisk.LCLUSTER_HEAD1, 1000 + i * blocks, blocks) for i in range(count)
    ]
    return length * count, leads


@pytest.mark.parametrize("make", [hm.fully, hm.compactly])
@pytest.mark.parametrize("length", [9 << 20, 12 << 20])
def test_pclusters_longer_than_a_part(make: Callable[..., bytes], length: int) -> None:
    """And than distances can tell."""
    size, leads = regular(length, 3, 2)
    with image_of(make(size, leads, True)) as image:
        nid = image.lookup("/x").nid
        assert list(image.extents("/x")) == expected(size, leads)
        anywhere = [random.Random(length).randrange(size) for _ in range(200)]
        assert check(image, nid, around(expected(size, leads)) + anywhere) == 0


# --- damage -----------------------------------------------------------------------------------


def damaged(image: bytes, first: int, last: int, choose: random.Random) -> bytes:
    """Bits flipped, bytes set, pieces copied in part of an image."""
    out = bytearray(image)
    for _ in range(choose.choice((1, 1, 1, 2, 3, 8))):
        at, kind = choose.randrange(first, last), choose.randrange(4)
        if kind == 0:
            out[at] ^= 1 << choose.randrange(8)
        elif kind == 1:
            out[at] = choose.choice((0, 1, 2, 8, 16, 32, 128, 255))
        elif kind == 2:
            out[at] = choose.randrange(256)
        else:
            piece = out[choose.randrange(first, last) :][: choose.choice((2, 4, 8, 32))]
            out[at : at + len(piece)] = piece
    return bytes(out)


@pytest.mark.parametrize(
    "name",
    [
        "lz4",
        "lz4hc-C64k",
        "lz4-legacy",
        "lz4-b512",
        "b16k-lz4",
        "dedupe-lz4",
        "ztail-zstd",
        "frag-lz4",
        "extents-lz4",
    ],
)
def test_damaged_maps(name: str) -> None:
    """Whatever is damaged, there are the same extents and the same errors."""
    want = golden(name)
    data, choose = want.image.read_bytes(), random.Random(name)
    ranges = []
    with open_golden(want) as image:
        for inode in compressed(image):
            if inode.size > 2 * BLOCK and not inode.device:
                first, last = zmap.index_range(image.volume, inode)
                ranges.append((inode.nid, first + 8, last))
    errors = 0
    for _ in range(120):
        nid, first, last = choose.choice(ranges)
        try:
            image = pyerofs.open(MemorySource(damaged(data, first, last, choose)))
        except ErofsError:
            continue
        with image:
            size = min(image.inode(nid).size, 1 << 20)
            errors += check(image, nid, [choose.randrange(size) for _ in range(40)])
    assert errors > 100


@pytest.mark.parametrize("make", [hm.fully, hm.compactly])
@pytest.mark.parametrize("big", [False, True])
def test_damage_harms_only_its_own_readers(make: Callable[..., bytes], big: bool) -> None:
    """A head with a bad offset, in the middle of a part: what does not need it is read as ever."""
    size, leads = regular(5 * BLOCK, 300, 2 if big else 1)
    inode = bytearray(make(size, leads, big))
    with image_of(bytes(inode)) as image:
        start, end = zmap.index_range(image.volume, image.lookup("/x"))
        middle = len(inode) - (end - start) // 2
    inode[middle : middle + 32] = b"\xff" * 32
    with image_of(bytes(inode)) as image:
        nid, want = image.lookup("/x").nid, expected(size, leads)
        bad = check(image, nid, around(want))
        assert 0 < bad < 4 * 16
        used_one = image.inode(nid)
        good = [mapped(image, used_one, e.start) == e for e in want]
        assert len(good) - sum(good) < 16


# --- promises ---------------------------------------------------------------------------------


def test_the_first_look_up_decodes_no_part() -> None:
    size, leads = regular(3 * BLOCK, 100)
    with image_of(hm.compactly(size, leads, False)) as image:
        inode, parts = image.lookup("/x"), image.volume.parts
        for offset, count in ((0, 0), (10, 0), (size - 1, 1), (size // 2, 1)):
            mapped(image, inode, offset)
            assert len(parts) == count


class Counted(hm.Sparse):
    """Keeps what was read."""

    def __init__(self, pieces: hm.Pieces) -> None:
        super().__init__(pieces)
        self.reads: list[int] = []

    def read_at(self, offset: int, length: int) -> bytes:
        self.reads.append(offset)
        return super().read_at(offset, length)


def large(make: Callable[..., bytes]) -> tuple[Counted, int]:
    """A file whose index lies in several windows, and its size."""
    size, leads = regular(3 * BLOCK, 40_000)
    pieces = hm.build({b"x": make(size, leads, False)}, incompat=FEATURES, configs=CONFIGS)
    return Counted(pieces), size


@pytest.mark.parametrize("make", [hm.fully, hm.compactly])
def test_nothing_is_read_for_a_part(make: Callable[..., bytes]) -> None:
    """Only the windows with the entries that zmap asks for, although the part needs another one."""
    source, size = large(make)
    with pyerofs.open(source) as image:
        nid = image.lookup("/x").nid
        start, end = zmap.index_range(image.volume, image.lookup("/x"))
        assert end - start > 2 * WINDOW_SIZE
        entry = (end - start) * BLOCK // size  # bytes
        border = (WINDOW_SIZE - start % WINDOW_SIZE) // entry  # entries in the first window

        used_one = image.inode(nid)
        source.reads.clear()
        near = [(border - 40) * BLOCK, (border - 20) * BLOCK]
        assert all(isinstance(mapped(image, used_one, offset), Extent) for offset in near)
        assert not source.reads
        assert isinstance(mapped(image, used_one, (border + 40) * BLOCK), Extent)
        assert len(source.reads) == 1

        def peek(offset: int, length: int) -> bytes | None:
            return source.peek(offset, length) if offset <= start else None

        memory = FaultingMemory([peek], [source.size], ["x"], 64 << 20)
        volume = Volume(image.superblock, memory)
        other = inodes.load(volume, nid)
        for offset in near:
            zmap.map_at(volume, other, offset)
        with pytest.raises(NotResident) as fault:
            zmap.map_at(volume, other, (border + 40) * BLOCK)
        assert fault.value.offset == start // WINDOW_SIZE * WINDOW_SIZE + WINDOW_SIZE


@pytest.mark.parametrize("make", [hm.fully, hm.compactly])
def test_parts_that_do_not_fit_into_the_cache(
    make: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take no more memory than they may, and are decoded only as often as they pay."""
    name = "_full" if make is hm.fully else "_compact"
    decode, decoded = getattr(lclusters, name), []

    def counted(*args: Any) -> Any:
        decoded.append(args)
        return decode(*args)

    monkeypatch.setattr(lclusters, name, counted)
    source, size = large(make)
    choose, count = random.Random(1), 3000
    with pyerofs.open(source, cache_size=6 << 20) as image:
        parts, inode = image.volume.parts, image.lookup("/x")
        for _ in range(count):
            assert isinstance(mapped(image, inode, choose.randrange(size)), Extent)
        assert parts.used <= parts.capacity == (6 << 20) // 16
        held = len(parts) * PART * BLOCK / size  # the share of the file that they map
        assert 0 < held < 0.6
        assert CREDIT / COST <= len(decoded) <= (CREDIT + 1.2 * held * count) / COST

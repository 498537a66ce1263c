"""Where everything lies in a good image: the byte offset of each field that a mutator may want.

The image is walked with the library itself.  Metadata that is stored compressed (the metabox,
compressed directories, long xattr prefixes) has no bytes of its own to change, so ``flatten`` first
gives such inodes an uncompressed copy of their data at the image's end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from struct import Struct, calcsize
from typing import NamedTuple

import pyerofs
from pyerofs.errors import ErofsError
from pyerofs.format import data, directory, lclusters, ondisk
from pyerofs.format.crc32c import crc32c
from pyerofs.format.extent import extents
from pyerofs.format.memory import METABOX
from pyerofs.format.model import ENCODED, FRAGMENT, META, PLAIN, Inode
from pyerofs.image import Image
from pyerofs.sources import MemorySource
from tests.fuzz import crafted

IMAGES = Path(__file__).parent.parent / "images"
PER_INODE = 128  # index entries, dirents … taken of each inode: a few are as good as all


class Field(NamedTuple):
    """``width`` bits, from bit ``shift`` on, of ``size`` little-endian bytes at offset ``at``."""

    label: str
    at: int
    size: int
    shift: int
    width: int
    nid: int  # the inode it belongs to; 0 = none

    def get(self, image: bytes) -> int:
        """The field's value."""
        word = int.from_bytes(image[self.at : self.at + self.size], "little")
        return word >> self.shift & (1 << self.width) - 1

    def put(self, image: bytes, value: int) -> bytes:
        """The field's bytes once it has another value (its low ``width`` bits)."""
        word = int.from_bytes(image[self.at : self.at + self.size], "little")
        mask = (1 << self.width) - 1
        word = word & ~(mask << self.shift) | (value & mask) << self.shift
        return word.to_bytes(self.size, "little")


class Subject:
    """A good image: its bytes, its extra devices, its fields by label, and telling numbers."""

    def __init__(self, name: str, image: bytes, devices: Sequence[bytes] = ()) -> None:
        self.name = name
        self.image = image
        self.devices = tuple(devices)
        self.fields: dict[str, list[Field]] = {}
        survey = _Survey(self.open())
        for field in survey.fields():
            if 0 <= field.at <= len(image) - field.size:
                self.fields.setdefault(field.label, []).append(field)
        self.labels = sorted(self.fields)
        sb = survey.sb
        self.numbers = (  # what a field may be set to, to refer to something that exists
            *(n | high for n in survey.nids for high in (0, 1 << 63)),
            *(sb.root_nid, sb.packed_nid, sb.metabox_nid) * (1 + len(survey.nids) // 8),
            *(len(image) + d >> shift for d in (-1, 0, 1) for shift in (0, sb.block_bits, 5)),
            sb.block_size,
            sb.meta_blkaddr,
            sb.xattr_blkaddr,
        )

    def open(self) -> Image:
        """The image, opened."""
        return open_bytes(self.image, self.devices)


def open_bytes(image: bytes, devices: Sequence[bytes] = (), cache_size: int = 8 << 20) -> Image:
    """An image whose devices are in memory."""
    return pyerofs.open(
        MemorySource(image), devices=[MemorySource(d) for d in devices], cache_size=cache_size
    )


@cache
def names() -> tuple[str, ...]:
    """All subjects' names: the handmade and the golden images, and ``…+flat`` for those that
    ``flatten`` changes."""
    found = [*crafted.GOOD]
    for path in sorted(IMAGES.glob("*.erofs")):
        image, devices = _golden(path.stem)
        found.append(path.stem)
        if flatten(image, devices) != image:
            found.append(f"{path.stem}+flat")
    return tuple(found)


@cache
def subject(name: str) -> Subject:
    """The subject of a name."""
    if name in crafted.GOOD:
        return Subject(name, crafted.GOOD[name]())
    stem, _, flat = name.partition("+")
    image, devices = _golden(stem)
    return Subject(name, flatten(image, devices) if flat else image, devices)


def _golden(stem: str) -> tuple[bytes, list[bytes]]:
    manifest = json.loads((IMAGES / f"{stem}.json").read_text("utf-8"))
    image = (IMAGES / f"{stem}.erofs").read_bytes()[manifest.get("offset", 0) :]
    return image, [(IMAGES / name).read_bytes() for name in manifest["devices"]]


def seal(image: bytes) -> bytes:
    """The image with a superblock checksum that fits, if it carries one that can be made to."""
    base = ondisk.SUPER_OFFSET
    if len(image) < base + ondisk.SUPER_BASE_SIZE or not image[base + 8] & ondisk.COMPAT_SB_CHKSUM:
        return image
    bits = image[base + 12]
    if not ondisk.MIN_BLKSZBITS <= bits <= ondisk.MAX_BLKSZBITS:
        return image
    length = (1 << bits) - base if 1 << bits > base else 1 << bits
    covered = image[base : base + 4] + bytes(4) + image[base + 8 : base + length]
    return image[: base + 4] + crc32c(covered).to_bytes(4, "little") + image[base + 8 :]


def flatten(image: bytes, devices: Sequence[bytes] = ()) -> bytes:
    """The image with its compressed metadata uncompressed: a copy at its end, which the inode, now
    a flat one, refers to.  The metabox first: other inodes lie in it."""
    with open_bytes(image, devices) as opened:
        metabox = opened.volume.metabox
        if metabox is not None and metabox.is_compressed:
            image = seal(_flat_inode(image, opened, metabox))
    with open_bytes(image, devices) as opened:
        vol = opened.volume
        wanted = [inode for inode in _reachable(opened) if inode.is_dir]
        if vol.sb.packed_nid and vol.sb.xattr_prefix_count:
            wanted.append(opened.inode(vol.sb.packed_nid))
        for inode in wanted:
            if inode.is_compressed:
                image = _flat_inode(image, opened, inode)
    return seal(image)


def _flat_inode(image: bytes, opened: Image, inode: Inode) -> bytes:
    vol = opened.volume
    at = _address(opened, *vol.inode_position(inode.nid))
    assert at is not None
    block = -(-len(image) >> vol.sb.block_bits)
    iformat = image[at] & ~(ondisk.I_LAYOUT_MASK << ondisk.I_LAYOUT_SHIFT)
    content = bytes(data.read(vol, inode, 0, inode.size))
    out = bytearray(image.ljust(block << vol.sb.block_bits, b"\0"))
    out += content.ljust(-(-len(content) >> vol.sb.block_bits) << vol.sb.block_bits, b"\0")
    out[at] = iformat
    if iformat & ondisk.I_EXTENDED_BIT or (iformat & ondisk.I_BIT4 and not inode.is_dir):
        out[at + 6 : at + 8] = bytes(2)  # high bits of the block
    out[at + 16 : at + 20] = block.to_bytes(4, "little")
    return bytes(out)


def _reachable(opened: Image) -> Iterator[Inode]:
    """Every inode, once."""
    seen = set()
    special = [nid for nid in (opened.superblock.packed_nid, opened.superblock.metabox_nid) if nid]
    todo = [opened.root.nid, *special]
    while todo:
        nid = todo.pop()
        if nid in seen:
            continue
        seen.add(nid)
        inode = opened.inode(nid)
        yield inode
        if inode.is_dir:
            todo += [e.nid for e in directory.entries(opened.volume, inode)]


def _address(opened: Image, device: int, offset: int) -> int | None:
    """Where in the image a byte of metadata lies; None if it is compressed."""
    if device == METABOX:
        metabox = opened.volume.metabox
        return None if metabox is None else _address_in(opened, metabox, offset)
    return None if device else offset


def _address_in(opened: Image, inode: Inode, offset: int) -> int | None:
    """Where in the image a byte of a file lies; None if it is compressed or elsewhere."""
    for extent in extents(opened.volume, inode, offset, 1):
        if extent.kind in (PLAIN, META):
            return _address(opened, extent.device, extent.address + offset - extent.start)
    return None


def _columns(struct: Struct) -> Iterator[tuple[int, int]]:
    """(offset, size) of each field of a struct, without the padding."""
    at = 0
    for count, code in re.findall(r"(\d*)([a-zA-Z])", struct.format):
        size = calcsize(f"<{count}{code}")
        if code != "x":
            yield at, size
        at += size


_CONFIGS = (
    ("lz4", ondisk.LZ4_CFGS, ("max_distance", "max_pclusterblks")),
    ("lzma", ondisk.LZMA_CFGS, ("dict_size", "format")),
    ("deflate", ondisk.DEFLATE_CFGS, ("windowbits",)),
    ("zstd", ondisk.ZSTD_CFGS, ("format", "windowlog")),
)


class _Survey:
    """Finds the fields of one image."""

    def __init__(self, opened: Image) -> None:
        self.opened = opened
        self.vol = opened.volume
        self.sb = opened.superblock
        self.inodes = list(_reachable(opened))
        self.nids = [inode.nid for inode in self.inodes]
        self._shared: set[int] = set()  # xattr entries and pclusters that are listed already

    def fields(self) -> Iterator[Field]:
        """All fields, one inode after another."""
        yield from self._superblock()
        for inode in self.inodes:
            device, offset = self.vol.inode_position(inode.nid)
            buffer, pos = self.vol.memory.at(device, offset, 1)
            if buffer[pos] & ondisk.I_EXTENDED_BIT:
                record: tuple[Struct, Iterable[str]] = (
                    ondisk.INODE_EXTENDED, ondisk.InodeExtended._fields,
                )  # fmt: skip
            else:
                record = ondisk.INODE_COMPACT, ondisk.InodeCompact._fields
            kind = "dir" if inode.is_dir else "file" if inode.is_file else "other"
            special = {self.sb.packed_nid: "packed", self.sb.metabox_nid: "metabox"}
            kind = special.get(inode.nid, kind) if inode.nid else kind
            yield from self._record(f"{kind}-inode", *record, device, offset, inode.nid)
            yield from self._xattrs(inode)
            if inode.is_compressed:
                yield from self._compressed(inode)
            elif inode.layout == ondisk.LAYOUT_CHUNK_BASED:
                yield from self._chunks(inode)
            if inode.is_dir:
                yield from self._dirents(inode)

    def _field(
        self, label: str, device: int, offset: int, size: int, nid: int = 0, *bits: int
    ) -> Iterator[Field]:
        at = _address(self.opened, device, offset)
        if at is not None:
            shift, width = bits or (0, 8 * size)
            yield Field(label, at, size, shift, width, nid)

    def _record(
        self, label: str, struct: Struct, names: Iterable[str], device: int, offset: int, nid: int
    ) -> Iterator[Field]:
        for (at, size), name in zip(_columns(struct), names, strict=True):
            yield from self._field(f"{label}.{name}", device, offset + at, size, nid)

    def _superblock(self) -> Iterator[Field]:
        base = ondisk.SUPER_OFFSET
        names: tuple[str, ...] = ondisk.SuperBlock._fields
        yield from self._record("superblock", ondisk.SUPERBLOCK, names, 0, base, 0)
        raw = ondisk.SuperBlock._make(ondisk.SUPERBLOCK.unpack_from(self.vol.memory.bytes_at(
            0, base, ondisk.SUPERBLOCK.size
        )))  # fmt: skip
        if raw.feature_incompat & ondisk.INCOMPAT_COMPR_CFGS:
            at = base + self.sb.size
            for algorithm, (name, struct, names) in enumerate(_CONFIGS):
                if self.sb.algorithms >> algorithm & 1:
                    at = (at + 3) & ~3
                    yield from self._field("config.length", 0, at, 2)
                    yield from self._record(f"config.{name}", struct, names, 0, at + 2, 0)
                    at += 2 + int.from_bytes(self.vol.memory.bytes_at(0, at, 2), "little")
        for i in range(len(self.sb.devices)):
            at = (raw.devt_slotoff + i) * ondisk.DEVICE_SLOT.size
            fields = ondisk.DeviceSlot._fields
            yield from self._record("device", ondisk.DEVICE_SLOT, fields, 0, at, 0)
        yield from self._prefixes()

    def _prefixes(self) -> Iterator[Field]:
        holder = None
        if not self.sb.feature_compat & ondisk.COMPAT_PLAIN_XATTR_PFX:
            nid = self.sb.metabox_nid or self.sb.packed_nid
            holder = self.opened.inode(nid) if nid else None
        at = self.sb.xattr_prefix_start
        for _ in range(self.sb.xattr_prefix_count):
            at = (at + 3) & ~3
            where = at if holder is None else _address_in(self.opened, holder, at)
            if where is None:
                return
            length = int.from_bytes(self.vol.memory.bytes_at(0, where, 2), "little")
            yield from self._field("xattr-prefix.length", 0, where, 2)
            yield from self._field("xattr-prefix.index", 0, where + 2, 1)
            yield from self._field("xattr-prefix.infix", 0, where + 3, 4)
            at += 2 + length

    def _xattrs(self, inode: Inode) -> Iterator[Field]:
        if not inode.xattr_size:
            return
        device, nid, memory = inode.device, inode.nid, self.vol.memory
        header = ondisk.XATTR_IBODY_HEADER
        yield from self._record(
            "xattr", header, ("filter", "shared_count"), device, inode.xattrs, nid
        )
        at, end = inode.xattrs + header.size, inode.xattrs + inode.xattr_size
        shared = header.unpack(memory.bytes_at(device, inode.xattrs, header.size))[1]
        base = self.sb.xattr_blkaddr << self.sb.block_bits
        area = METABOX if self.sb.feature_compat & ondisk.COMPAT_SHARED_EA_IN_METABOX else 0
        for _ in range(shared):
            yield from self._field("xattr.shared_id", device, at, 4, nid)
            entry = base + 4 * int.from_bytes(memory.bytes_at(device, at, 4), "little")
            if entry not in self._shared:
                self._shared.add(entry)
                yield from self._xattr_entry("shared-xattr", area, entry, nid)
            at += 4
        while at < end:
            yield from self._xattr_entry("xattr", device, at, nid)
            name_len, _, size = ondisk.XATTR_ENTRY.unpack(memory.bytes_at(device, at, 4))
            at += (4 + name_len + size + 3) & ~3

    def _xattr_entry(self, label: str, device: int, at: int, nid: int) -> Iterator[Field]:
        names = ("e_name_len", "e_name_index", "e_value_size")
        yield from self._record(label, ondisk.XATTR_ENTRY, names, device, at, nid)
        yield from self._field(f"{label}.name", device, at + 4, 4, nid)

    def _chunks(self, inode: Inode) -> Iterator[Field]:
        bits = self.sb.block_bits + (inode.chunk_format & ondisk.CHUNK_BLKBITS_MASK)
        if inode.chunk_format & ondisk.CHUNK_INDEXES:
            names: tuple[str, ...] = ("startblk_hi", "device_id", "startblk_lo")
            struct = ondisk.CHUNK_INDEX
        else:
            names, struct = ("blkaddr",), ondisk.BLOCK_MAP_ENTRY
        table = -(-inode.data // struct.size) * struct.size
        for i in range(min(-(-inode.size >> bits), PER_INODE)):
            at = table + i * struct.size
            yield from self._record("chunk", struct, names, inode.device, at, inode.nid)

    def _dirents(self, inode: Inode) -> Iterator[Field]:
        size, names = self.sb.directory_block_size, ondisk.DirentRecord._fields
        for start in range(0, inode.size, size):
            block = _address_in(self.opened, inode, start)
            if block is None:
                continue
            first = int.from_bytes(self.vol.memory.bytes_at(0, block + 8, 2), "little")
            for at in range(block, block + min(first, 12 * PER_INODE), 12):
                yield from self._record("dirent", ondisk.DIRENT, names, 0, at, inode.nid)
                name = int.from_bytes(self.vol.memory.bytes_at(0, at + 8, 2), "little")
                yield from self._field("dirent.name", 0, block + name, 1, inode.nid)

    def _compressed(self, inode: Inode) -> Iterator[Field]:
        device, nid = inode.device, inode.nid
        at = (inode.data + 7) & ~7
        fields = ondisk.MapHeader._fields
        yield from self._record("map", ondisk.MAP_HEADER, fields, device, at, nid)
        yield from self._field("map.whole", device, at, 8, nid)  # of a file that is one fragment
        found = []
        try:
            for extent in extents(self.vol, inode, 0, inode.size):
                found.append(extent)
                if len(found) == PER_INODE:
                    break
        except ErofsError:  # a device that is not there
            pass
        z = inode.zmap
        assert z is not None
        if z.record_size:
            yield from self._records(inode, len(found))
        elif found and (found[0].kind != FRAGMENT or z.fragment >= 0):  # not one whole fragment
            yield from self._indexes(inode)
        for extent in found:
            if extent.kind == ENCODED and extent.address not in self._shared:
                self._shared.add(extent.address)
                name = ondisk.ALG_NAMES[extent.algorithm]
                yield from self._stream(name, extent.device, extent.address, extent.size, nid)

    def _records(self, inode: Inode, count: int) -> Iterator[Field]:
        z = inode.zmap
        assert z is not None
        names = ("plen", "pstart_lo", "pstart_hi", "lstart_lo", "lstart_hi")
        base = z.base
        if z.record_size == 4:
            yield from self._field("extent.first", inode.device, base, 8, inode.nid)
            base += 8
        for i in range(count):
            at = base + i * z.record_size
            for word, name in enumerate(names[: z.record_size // 4]):
                yield from self._field(f"extent.{name}", inode.device, at + 4 * word, 4, inode.nid)

    def _indexes(self, inode: Inode) -> Iterator[Field]:
        z, device, nid = inode.zmap, inode.device, inode.nid
        assert z is not None
        full = inode.layout == ondisk.LAYOUT_COMPRESSED_FULL
        low = max(z.lcluster_bits, 12)
        for lcn in range(min(-(-inode.size >> z.lcluster_bits), PER_INODE)):
            if full:
                at = z.base + 8 * lcn
                names = ("di_advise", "di_clusterofs", "blkaddr")
                yield from self._record("lcluster", ondisk.LCLUSTER_INDEX, names, device, at, nid)
                yield from self._field("lcluster.delta0", device, at + 4, 2, nid)
                yield from self._field("lcluster.delta1", device, at + 6, 2, nid)
                continue
            at, count, i = lclusters.pack_of(z, lcn)
            size, width = (32, 14) if count == 16 else (8, 16)
            yield from self._field("compact.value", device, at, size, nid, width * i, low)
            yield from self._field("compact.type", device, at, size, nid, width * i + low, 2)
            if i + 1 == count:
                yield from self._field("compact.blkaddr", device, at + size - 4, 4, nid)

    def _stream(self, name: str, device: int, at: int, size: int, nid: int) -> Iterator[Field]:
        """The first bytes of an encoded stream, where its headers are, and its last."""
        if device > 0:
            return
        padding = self.vol.memory.bytes_at(device, at, size)
        skip = size - len(padding.lstrip(b"\0"))
        for i in (*range(skip, min(skip + 12, size)), *range(max(skip, size - 4), size)):
            yield from self._field(f"stream.{name}", device, at + i, 1, nid)

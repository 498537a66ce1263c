"""``pyerofs dump``: account for every byte of an image.

Every reachable structure claims its range; an unclaimed range is padding (zeros), slack (the rest
of a block) or unaccounted.  Ranges may overlap where the image shares bytes: a pcluster to which
several files refer is listed once, with their number.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

from pyerofs.cli.common import open_image, print_json, printable
from pyerofs.errors import CorruptImage, ErofsError
from pyerofs.format import inode as inodes
from pyerofs.format import ondisk, tree, xattr, zmap
from pyerofs.format.extent import extents
from pyerofs.format.model import ENCODED, FRAGMENT, META, PLAIN, Inode
from pyerofs.format.tree import Place
from pyerofs.format.volume import Volume
from pyerofs.image import Image
from pyerofs.units import format_size

PIECE = 1 << 20


class Named(NamedTuple):
    """An entry of the tree, whose path is built on demand."""

    place: Place
    name: bytes
    before: str = ""  # text before the path

    def __str__(self) -> str:
        return self.before + tree.shown_path(self.place, self.name)


class Region(NamedTuple):
    """A range of the primary device."""

    start: int
    end: int
    what: str
    detail: str | Named = ""

    @property
    def order(self) -> tuple[int, int, str]:
        return self[:3]


def dump(args: argparse.Namespace) -> int:
    """Print the regions in order."""
    with open_image(args) as image:
        regions = list(account(image))
    if args.json:
        print_json([r._asdict() | {"detail": str(r.detail)} for r in regions])
        return 0
    totals: dict[str, int] = {}
    for r in regions:
        print(
            f"{r.start:#012x} {r.end - r.start:>10} {r.what:<22} {printable(str(r.detail))}".rstrip()
        )
        totals[r.what] = totals.get(r.what, 0) + r.end - r.start
    print()
    for what, n in sorted(totals.items(), key=lambda item: -item[1]):
        print(f"{format_size(n):>12}  {what}")
    return 0


def account(image: Image) -> Iterator[Region]:
    """All regions of the primary device sorted by start, gaps included."""
    size = image.volume.memory.sizes[0]
    at = 0
    claims = sorted((_within(r, size) for r in _claims(image)), key=lambda r: r.order)
    for region in _merge(claims):
        if region.start > at:
            yield from _gap(image, at, region.start)
        yield region
        at = max(at, region.end)
    if at < size:
        yield from _gap(image, at, size)


def _within(region: Region, size: int) -> Region:
    """The region, or an error region if it reaches beyond the end of the image (``size``)."""
    if region.end <= size:
        return region
    detail = f"{region.detail}: {region.what} reaches beyond the end, to {region.end:#x}"
    return Region(min(region.start, size), size, "error", detail)


def _merge(regions: list[Region]) -> Iterator[Region]:
    """Merge regions with the same range and type into one."""
    held: Region | None = None
    users = 0
    for region in regions:
        if held is not None and region.order == held.order:
            users += 1
            continue
        if held is not None:
            yield _shared(held, users)
        held, users = region, 1
    if held is not None:
        yield _shared(held, users)


def _shared(region: Region, users: int) -> Region:
    if users == 1:
        return region
    return region._replace(detail=f"{region.detail} and {users - 1} more")


def _gap(image: Image, start: int, end: int) -> Iterator[Region]:
    """An unclaimed range: padding (zeros), slack (the rest of a block) or unaccounted."""
    if _is_zero(image, start, end):
        yield Region(start, end, "padding")
        return
    # mkfs may leave stale buffer contents in the rest of a block
    slack = end - start <= -start % image.superblock.block_size
    yield Region(start, end, "slack" if slack else "unaccounted")


def _is_zero(image: Image, start: int, end: int) -> bool:
    """Whether a range is all zeros.  Holes of a sparse image file are not read."""
    at = start
    while at < end:
        at = image.volume.memory.data_from(0, at)
        if at >= end:
            return True
        if bytes(image.volume.memory.raw(0, at, min(PIECE, end - at))).strip(b"\0"):
            return False
        at += PIECE
    return True


def _claims(image: Image) -> Iterator[Region]:
    vol, sb = image.volume, image.superblock
    yield Region(0, ondisk.SUPER_OFFSET, "boot area")
    end = ondisk.SUPER_OFFSET + sb.size
    yield Region(ondisk.SUPER_OFFSET, end, "superblock")
    if sb.feature_incompat & ondisk.INCOMPAT_COMPR_CFGS:
        for algorithm, name in ondisk.ALG_NAMES.items():
            if sb.algorithms >> algorithm & 1:
                end = (end + 3) & ~3
                length = int.from_bytes(vol.memory.bytes_at(0, end, 2), "little")
                yield Region(end, end + 2 + length, "compression config", name)
                end += 2 + length
    if sb.devices:
        raw = vol.memory.bytes_at(0, ondisk.SUPER_OFFSET, 128)
        first = ondisk.SuperBlock._make(
            ondisk.SUPERBLOCK.unpack(raw.ljust(ondisk.SUPERBLOCK.size, b"\0"))
        ).devt_slotoff
        for number in range(len(sb.devices)):
            at = (first + number) * ondisk.DEVICE_SLOT.size
            yield Region(at, at + ondisk.DEVICE_SLOT.size, "device slot", str(number + 1))
    if sb.xattr_prefix_count and xattr.prefixes_in_plain(vol):
        at = sb.xattr_prefix_start
        for number in range(sb.xattr_prefix_count):
            at = (at + 3) & ~3
            length = int.from_bytes(vol.memory.bytes_at(0, at, 2), "little")
            yield Region(at, at + 2 + length, "xattr name prefix", str(number))
            at += 2 + length
    budget = Budget(vol)
    for path, inode in _inodes(image):
        try:
            yield from _inode(image, path, inode, budget)
        except ErofsError as e:
            at = vol.inode_position(inode.nid)[1]
            yield Region(at, at, "error", f"{path}: {e}")


class Budget:
    """A limit on extents: each needs at least one byte of metadata, unless tables overlap.  With
    overlapping tables a small image could claim more extents than can be listed."""

    def __init__(self, vol: Volume) -> None:
        self._left = vol.memory.sizes[0] + (vol.metabox.size if vol.metabox is not None else 0)

    def spend(self, n: int, inode: Inode) -> None:
        """Count ``n`` extents.  Raises CorruptImage above the limit."""
        self._left -= n
        if self._left < 0:
            raise CorruptImage(
                "more extents than the image can describe: tables overlap", nid=inode.nid
            )


def _inodes(image: Image) -> Iterator[tuple[str | Named, Inode]]:
    """Each inode once, with (one of) its paths."""
    vol = image.volume
    if vol.metabox is not None:
        yield "<metabox inode>", vol.metabox
    if vol.sb.packed_nid:
        yield "<packed inode>", inodes.load(vol, vol.sb.packed_nid)
    yield "/", image.root
    seen: set[int] = set()
    for place, entry, inode in tree.walk(vol, image.root):
        if entry.nid not in seen:
            seen.add(entry.nid)
            yield Named(place, entry.name), inode


def _inode(image: Image, path: str | Named, inode: Inode, budget: Budget) -> Iterator[Region]:
    vol = image.volume
    _, at = vol.inode_position(inode.nid)
    if inode.device == 0:  # inside the metabox, offsets are not those of the image
        nid = f"nid {inode.nid} "
        detail = nid + path if isinstance(path, str) else path._replace(before=nid)
        yield Region(at, inode.xattrs, "inode", detail)
        if inode.xattr_size:
            yield Region(inode.xattrs, inode.data, "inline xattrs", path)
    for device, start, size in xattr.shared_ranges(vol, inode):
        if device == 0:
            yield Region(start, start + size, "shared xattr")
    if not (inode.is_file or inode.is_dir or inode.is_symlink) or not inode.size:
        return
    what = "directory" if inode.is_dir else "link target" if inode.is_symlink else "data"
    if inode.layout == ondisk.LAYOUT_CHUNK_BASED and inode.device == 0:
        unit = 8 if inode.chunk_format & ondisk.CHUNK_INDEXES else 4
        bits = vol.sb.block_bits + (inode.chunk_format & ondisk.CHUNK_BLKBITS_MASK)
        table = (inode.data + unit - 1) & ~(unit - 1)
        chunks = -(-inode.size >> bits)
        yield Region(table, table + unit * chunks, "chunk table", path)
    if inode.is_compressed and inode.device == 0:
        start, end = zmap.index_range(vol, inode)
        yield Region(start, end, "compression index", path)
    mask = vol.sb.block_size - 1
    for e in extents(vol, inode, 0, inode.size):
        budget.spend(1, inode)
        if e.device != 0 or e.kind == FRAGMENT:
            continue
        if e.kind == ENCODED:
            name = ondisk.ALG_NAMES[e.algorithm]
            yield Region(e.address, e.address + e.size, f"pcluster {name}", path)
        elif e.kind == PLAIN:
            length = e.size or e.length
            end = e.address + length
            if not e.size:  # the rest of a flat file's last block belongs to it
                end = max(end, min((end + mask) & ~mask, vol.memory.sizes[0]))
            yield Region(e.address, end, what, path)
        elif e.kind == META:
            yield Region(e.address, e.address + (e.size or e.length), f"inline {what}", path)

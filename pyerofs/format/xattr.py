"""Extended attributes: inline ones after the inode, shared ones in an area of their own.

An entry holds a name index (a well-known prefix, or a long prefix of the image) and the rest of the
name.  An image may have a name filter: a bitmap of 32 hash values in each inode's header, where a
set bit means that no name of the inode has that hash.  Most absent names then need no search.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyerofs.errors import CorruptImage, UnsupportedFeature
from pyerofs.format import inode as inodes
from pyerofs.format.data import read
from pyerofs.format.memory import METABOX
from pyerofs.format.model import Inode
from pyerofs.format.ondisk import (
    COMPAT_PLAIN_XATTR_PFX,
    COMPAT_SHARED_EA_IN_METABOX,
    NAME_LEN,
    XATTR_ENTRY,
    XATTR_FILTER_SEED,
    XATTR_IBODY_HEADER,
    XATTR_LONG_PREFIX,
    XATTR_PREFIXES,
)
from pyerofs.format.volume import Volume

HEADER = XATTR_IBODY_HEADER.size


def items(vol: Volume, inode: Inode) -> Iterator[tuple[bytes, bytes]]:
    """All (full name, value) pairs, in the image's order.  Attributes whose name index has no
    public prefix are left out, as in the kernel."""
    for index, suffix, value_at, device, size in _entries(vol, inode):
        name = _full_name(vol, index, suffix)
        if name is not None:
            yield name, vol.memory.bytes_at(device, value_at, size)


def names(vol: Volume, inode: Inode) -> list[bytes]:
    """All full names."""
    found = (_full_name(vol, index, suffix) for index, suffix, *_ in _entries(vol, inode))
    return [name for name in found if name is not None]


def get(vol: Volume, inode: Inode, name: bytes) -> bytes | None:
    """The value of one attribute, or None."""
    if not inode.xattr_size or filtered_out(vol, inode, name):
        return None
    for index, suffix, value_at, device, size in _entries(vol, inode):
        if name.endswith(suffix) and _full_name(vol, index, suffix) == name:
            return vol.memory.bytes_at(device, value_at, size)
    return None


def name_filter(vol: Volume, inode: Inode) -> int | None:
    """The inode's name filter; None if the inode has no attributes or the image has no filters."""
    if not inode.xattr_size or not vol.sb.xattr_filter:
        return None
    buffer, pos = vol.memory.at(inode.device, inode.xattrs, HEADER)
    bits: int = XATTR_IBODY_HEADER.unpack_from(buffer, pos)[0]
    return bits


def filter_bit(name: bytes) -> int | None:
    """The number (0 to 31) of a name's filter bit; None for names without a public prefix."""
    for index, prefix in XATTR_PREFIXES.items():
        if name.startswith(prefix):
            return xxh32(name[len(prefix) :], XATTR_FILTER_SEED + index) & 31
    return None


def filtered_out(vol: Volume, inode: Inode, name: bytes) -> bool:
    """Whether the name filter rules out that an inode has an attribute ``name``."""
    bits = name_filter(vol, inode)
    if not bits:
        return False
    bit = filter_bit(name)
    return bit is None or bool(bits >> bit & 1)


def digest_prefix(vol: Volume) -> bytes | None:
    """The full name of the attribute that holds content digests; None if the image defines none."""
    if vol.sb.ishare_prefix is None:
        return None
    return _full_name(vol, XATTR_LONG_PREFIX | vol.sb.ishare_prefix, b"")


# name index, rest of the name, value's offset, device, size
Entry = tuple[int, bytes, int, int, int]


def shared_ranges(vol: Volume, inode: Inode) -> list[tuple[int, int, int]]:
    """(device, offset, size) of each shared entry that an inode refers to."""
    device, base = _shared_area(vol)
    found = []
    for number in _shared_ids(vol, inode):
        _, size = _entry(vol, device, base + 4 * number, inode, None)
        found.append((device, base + 4 * number, size))
    return found


def prefixes_in_plain(vol: Volume) -> bool:
    """Whether the long name prefixes lie in plain metadata, not inside a special inode."""
    plain = vol.sb.feature_compat & COMPAT_PLAIN_XATTR_PFX
    return bool(plain) or (vol.metabox is None and not vol.sb.packed_nid)


def _shared_area(vol: Volume) -> tuple[int, int]:
    """The device and the byte offset to which the ids of shared xattrs are relative."""
    in_metabox = vol.sb.feature_compat & COMPAT_SHARED_EA_IN_METABOX
    return METABOX if in_metabox else 0, vol.sb.xattr_blkaddr << vol.sb.block_bits


def _shared_ids(vol: Volume, inode: Inode) -> list[int]:
    """The ids of the shared entries that an inode refers to: offsets in units of 4 bytes."""
    if not inode.xattr_size:
        return []
    if inode.xattr_size == HEADER:
        raise UnsupportedFeature(f"xattr header without xattrs, nid {inode.nid}")
    buffer, pos = vol.memory.at(inode.device, inode.xattrs, HEADER)
    count: int = XATTR_IBODY_HEADER.unpack_from(buffer, pos)[1]
    at = inode.xattrs + HEADER
    if 4 * count > inode.xattr_size - HEADER:
        raise CorruptImage(f"{count} shared xattrs do not fit", offset=at, nid=inode.nid)
    ids = vol.memory.bytes_at(inode.device, at, 4 * count)
    return [int.from_bytes(ids[i : i + 4], "little") for i in range(0, len(ids), 4)]


def _entries(vol: Volume, inode: Inode) -> Iterator[Entry]:
    if not inode.xattr_size:
        return
    shared = _shared_ids(vol, inode)
    at, end = inode.xattrs + HEADER + 4 * len(shared), inode.data
    while at < end:
        entry, size = _entry(vol, inode.device, at, inode, end)
        yield entry
        at += size
    device, base = _shared_area(vol)
    for number in shared:
        yield _entry(vol, device, base + 4 * number, inode, None)[0]


def _entry(vol: Volume, device: int, at: int, inode: Inode, end: int | None) -> tuple[Entry, int]:
    buffer, pos = vol.memory.at(device, at, 4)
    name_len, index, value_size = XATTR_ENTRY.unpack_from(buffer, pos)
    size = (4 + name_len + value_size + 3) & ~3
    if end is not None and at + size > end:
        raise CorruptImage("xattr reaches beyond its inode's", offset=at, nid=inode.nid)
    suffix = vol.memory.bytes_at(device, at + 4, name_len)
    return (index, suffix, at + 4 + name_len, device, value_size), size


def _full_name(vol: Volume, index: int, suffix: bytes) -> bytes | None:
    if index & XATTR_LONG_PREFIX:
        prefixes = vol.prefixes
        if prefixes is None:
            prefixes = vol.prefixes = _load_prefixes(vol)
        number = index & ~XATTR_LONG_PREFIX
        if number >= len(prefixes):
            return None
        index, infix = prefixes[number]
        suffix = infix + suffix
    prefix = XATTR_PREFIXES.get(index)
    if prefix is None or len(prefix) + len(suffix) > NAME_LEN:
        return None
    return prefix + suffix


def _load_prefixes(vol: Volume) -> tuple[tuple[int, bytes], ...]:
    """(name index, infix) of each long prefix, from length-prefixed (u16), 4-byte aligned records.
    They lie in the metabox, else in the packed inode, else (or if a feature bit says so) in plain
    metadata."""
    sb = vol.sb
    holder: Inode | None = None
    if not prefixes_in_plain(vol):
        holder = vol.metabox or vol.packed or inodes.load(vol, sb.packed_nid)

    def get_bytes(at: int, length: int) -> bytes:
        if holder is None:
            return vol.memory.bytes_at(0, at, length)
        data = bytes(read(vol, holder, at, length))
        if len(data) < length:
            raise CorruptImage("xattr name prefixes end too early", nid=holder.nid)
        return data

    found = []
    at = sb.xattr_prefix_start
    for _ in range(sb.xattr_prefix_count):
        at = (at + 3) & ~3
        length = int.from_bytes(get_bytes(at, 2), "little")
        if not 1 <= length <= NAME_LEN + 1:
            raise CorruptImage(f"xattr name prefix of {length} bytes", offset=at)
        record = get_bytes(at + 2, length)
        found.append((record[0], record[1:]))
        at += 2 + length
    return tuple(found)


def xxh32(data: bytes, seed: int) -> int:
    """The 32-bit xxHash, as the name filter uses it."""
    p1, p2, p3, p4, p5 = 2654435761, 2246822519, 3266489917, 668265263, 374761393
    mask = 0xFFFFFFFF

    def rotate(value: int, by: int) -> int:
        return (value << by | value >> 32 - by) & mask

    n = len(data)
    at = 0
    if n >= 16:
        lanes = [(seed + p1 + p2) & mask, (seed + p2) & mask, seed & mask, (seed - p1) & mask]
        while at + 16 <= n:
            for i in range(4):
                word = int.from_bytes(data[at : at + 4], "little")
                lanes[i] = rotate((lanes[i] + word * p2) & mask, 13) * p1 & mask
                at += 4
        h = sum(rotate(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18), strict=True))
    else:
        h = seed + p5
    h = (h + n) & mask
    while at + 4 <= n:
        word = int.from_bytes(data[at : at + 4], "little")
        h = rotate((h + word * p3) & mask, 17) * p4 & mask
        at += 4
    for byte in data[at:]:
        h = rotate((h + byte * p5) & mask, 11) * p1 & mask
    h = (h ^ h >> 15) * p2 & mask
    h = (h ^ h >> 13) * p3 & mask
    return h ^ h >> 16

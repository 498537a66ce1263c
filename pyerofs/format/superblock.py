"""Decode and validate the superblock, its compression configurations and the device table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyerofs.errors import CorruptImage, UnsupportedFeature
from pyerofs.format import ondisk
from pyerofs.format.crc32c import crc32c
from pyerofs.format.recognise import recognise
from pyerofs.sources.base import Buffer

if TYPE_CHECKING:
    from uuid import UUID

MAX_DEVICES = 4096  # bounds the device table (512 KiB); real images use a few dozen

MAX_TIME = 1 << 62  # seconds; leaves room for the times that inodes add to the epoch

Reader = Callable[[int, int], Buffer]


@dataclass(frozen=True, slots=True)
class Device:
    """A slot of the device table: an extra device that holds file data."""

    tag: bytes  # often a digest; without trailing NULs
    blocks: int
    uniaddr: int  # its first block in the unified address space; 0 = not mapped


@dataclass(frozen=True, slots=True)
class Superblock:
    """A decoded superblock.  Sizes in bytes, times in seconds since 1970."""

    block_bits: int
    directory_block_bits: int
    size: int  # of the superblock itself, extension slots included
    feature_compat: int
    feature_incompat: int
    checksum: int
    root_nid: int
    packed_nid: int  # 0 = none
    metabox_nid: int  # 0 = none
    inodes: int
    blocks: int  # of the primary device
    meta_blkaddr: int
    xattr_blkaddr: int
    epoch: int
    fixed_nsec: int
    build_time: int
    uuid_bytes: bytes
    volume_name: bytes
    algorithms: int  # bit per compression algorithm
    lz4_max_distance: int
    lz4_max_pcluster_blocks: int
    lzma_dict_size: int
    deflate_window_bits: int
    zstd_window_log: int
    xattr_prefix_count: int
    xattr_prefix_start: int  # byte offset in the inode or area that holds the prefixes
    xattr_filter: bool
    ishare_prefix: int | None  # index of the long prefix that names content digests
    devices: tuple[Device, ...]

    @property
    def uuid(self) -> UUID:
        from uuid import UUID  # takes longer to import than a superblock to decode

        return UUID(bytes=self.uuid_bytes)

    @property
    def block_size(self) -> int:
        return 1 << self.block_bits

    @property
    def directory_block_size(self) -> int:
        return 1 << self.directory_block_bits

    @property
    def total_blocks(self) -> int:
        """Blocks of the primary and all extra devices, as statfs reports them."""
        return self.blocks + sum(d.blocks for d in self.devices)

    @property
    def device_mask(self) -> int:
        """The bits of a chunk's device id that are significant; higher bits may be set and are
        ignored."""
        return (1 << len(self.devices).bit_length()) - 1

    @property
    def zero_padded(self) -> bool:
        return bool(self.feature_incompat & ondisk.INCOMPAT_LZ4_0PADDING)

    @property
    def feature_names(self) -> list[str]:
        """The names of all feature bits that are set; unknown compat bits as ``compat:0x…``."""
        names = [n for bit, n in ondisk.COMPAT_NAMES.items() if self.feature_compat & bit]
        names += [n for bit, n in ondisk.INCOMPAT_NAMES.items() if self.feature_incompat & bit]
        unknown = self.feature_compat & ~sum(ondisk.COMPAT_NAMES)
        if unknown:
            names.append(f"compat:{unknown:#x}")
        return names


def load(read: Reader, available: int) -> Superblock:
    """Read and check the superblock.  ``read(offset, length)`` reads the primary device, which has
    ``available`` bytes.  Raises CorruptImage or UnsupportedFeature; exceptions of ``read``
    propagate."""
    base = ondisk.SUPER_OFFSET
    raw, size = _load_record(read, available)
    if not -MAX_TIME < raw.epoch < MAX_TIME or raw.fixed_nsec >= 1_000_000_000:
        raise CorruptImage(f"time {raw.epoch} s + {raw.fixed_nsec} ns", offset=base + 24)
    wide = bool(raw.feature_incompat & ondisk.INCOMPAT_48BIT)
    root_nid, blocks = raw.rootnid_2b, raw.blocks_lo
    if wide and raw.rootnid_8b:
        root_nid, blocks = raw.rootnid_8b, raw.blocks_lo | raw.rootnid_2b << 32
    metabox_nid = 0
    if raw.feature_incompat & ondisk.INCOMPAT_METABOX:
        if size < ondisk.SUPER_BASE_SIZE + ondisk.SB_EXTSLOT_SIZE:
            raise CorruptImage("metabox without the superblock slot that names it", offset=base)
        metabox_nid = raw.metabox_nid
    for what, nid in (("packed", raw.packed_nid), ("metabox", metabox_nid)):
        if nid >> ondisk.NID_METABOX_BIT:
            raise CorruptImage(f"{what} inode inside the metabox", nid=nid)
    ishare = None
    if raw.feature_compat & ondisk.COMPAT_ISHARE_XATTRS:
        ishare = raw.ishare_xattr_prefix_id
        if ishare >= raw.xattr_prefix_count:
            raise CorruptImage(
                f"digest xattr prefix {ishare} of {raw.xattr_prefix_count}", offset=base + 105
            )
    configs = _load_configs(read, raw, base + size)
    return Superblock(
        block_bits=raw.blkszbits,
        directory_block_bits=raw.blkszbits + raw.dirblkbits,
        size=size,
        feature_compat=raw.feature_compat,
        feature_incompat=raw.feature_incompat,
        checksum=raw.checksum,
        root_nid=root_nid,
        packed_nid=raw.packed_nid,
        metabox_nid=metabox_nid,
        inodes=raw.inos,
        blocks=blocks,
        meta_blkaddr=raw.meta_blkaddr,
        xattr_blkaddr=raw.xattr_blkaddr,
        epoch=raw.epoch,
        fixed_nsec=raw.fixed_nsec,
        build_time=raw.epoch + raw.build_time,
        uuid_bytes=raw.uuid,
        volume_name=raw.volume_name.split(b"\0", 1)[0],
        xattr_prefix_count=raw.xattr_prefix_count,
        xattr_prefix_start=raw.xattr_prefix_start << 2,
        xattr_filter=bool(raw.feature_compat & ondisk.COMPAT_XATTR_FILTER)
        and not raw.xattr_filter_reserved,
        ishare_prefix=ishare,
        devices=_load_devices(read, raw, wide),
        **configs,
    )


def _load_record(read: Reader, available: int) -> tuple[ondisk.SuperBlock, int]:
    """Read the record and do the first checks; returns it and its size, extension slots included."""
    base = ondisk.SUPER_OFFSET
    if available < base + ondisk.SUPER_BASE_SIZE:
        what = recognise(read, available)
        raise CorruptImage(
            f"{what or f'only {available} bytes'}, too short for a superblock", offset=0
        )
    head = bytes(read(base, min(ondisk.SUPERBLOCK.size, available - base)))
    head = head.ljust(ondisk.SUPERBLOCK.size, b"\0")
    raw = ondisk.SuperBlock._make(ondisk.SUPERBLOCK.unpack(head))
    if raw.magic != ondisk.SUPER_MAGIC:
        what = recognise(read, available)
        raise CorruptImage(
            f"no EROFS superblock: {what or 'is it something else, or does it need --offset?'}",
            offset=base,
        )
    if not ondisk.MIN_BLKSZBITS <= raw.blkszbits <= ondisk.MAX_BLKSZBITS:
        raise CorruptImage(f"block size of 2^{raw.blkszbits} bytes", offset=base + 12)
    unknown = raw.feature_incompat & ~ondisk.ALL_INCOMPAT
    if unknown:
        raise UnsupportedFeature(
            f"the image needs unknown incompatible features {unknown:#x}; use a newer pyerofs"
        )
    size = ondisk.SUPER_BASE_SIZE + raw.sb_extslots * ondisk.SB_EXTSLOT_SIZE
    if base + size > available:
        raise CorruptImage(f"superblock of {size} bytes in an image of {available}", offset=base)
    if size < ondisk.SUPERBLOCK.size:  # fields beyond its end are absent
        raw = ondisk.SuperBlock._make(
            ondisk.SUPERBLOCK.unpack(head[:size].ljust(ondisk.SUPERBLOCK.size, b"\0"))
        )
    if raw.feature_compat & ondisk.COMPAT_SB_CHKSUM:
        _verify_checksum(read, available, raw)
    if raw.blkszbits + raw.dirblkbits > ondisk.MAX_BLKSZBITS + 4:
        raise CorruptImage(f"directory blocks of 2^{raw.dirblkbits} blocks", offset=base + 90)
    return raw, size


def _verify_checksum(read: Reader, available: int, raw: ondisk.SuperBlock) -> None:
    block = 1 << raw.blkszbits
    length = block - ondisk.SUPER_OFFSET if block > ondisk.SUPER_OFFSET else block
    if ondisk.SUPER_OFFSET + length > available:
        raise CorruptImage("image ends within the superblock's block", offset=available)
    data = bytearray(read(ondisk.SUPER_OFFSET, length))
    data[4:8] = bytes(4)
    found = crc32c(data)
    if found != raw.checksum:
        raise CorruptImage(
            f"superblock checksum is {raw.checksum:#010x}, its content gives {found:#010x}",
            offset=ondisk.SUPER_OFFSET + 4,
        )


def _load_configs(read: Reader, raw: ondisk.SuperBlock, at: int) -> dict[str, int]:
    """The compression configurations: length-prefixed (u16) records after the superblock, one for
    each algorithm whose bit is set, in the order of the bits."""
    found = {
        "algorithms": 1 << ondisk.ALG_LZ4,
        "lz4_max_distance": 0,
        "lz4_max_pcluster_blocks": 1,
        "lzma_dict_size": 8 << 20,
        "deflate_window_bits": 15,
        "zstd_window_log": 20,
    }
    if not raw.feature_incompat & ondisk.INCOMPAT_COMPR_CFGS:
        found["lz4_max_distance"] = raw.available_compr_algs
        return found
    found["algorithms"] = raw.available_compr_algs
    unknown = raw.available_compr_algs & ~ondisk.ALL_COMPR_ALGS
    if unknown:
        raise UnsupportedFeature(f"the image uses unknown compression algorithms {unknown:#x}")
    for algorithm in range(ondisk.ALL_COMPR_ALGS.bit_length()):
        if not raw.available_compr_algs >> algorithm & 1:
            continue
        at = (at + 3) & ~3
        length = int.from_bytes(read(at, 2), "little")
        data = bytes(read(at + 2, length))
        where = at
        at += 2 + length
        if algorithm == ondisk.ALG_LZ4 and length >= ondisk.LZ4_CFGS.size:
            distance, blocks = ondisk.LZ4_CFGS.unpack_from(data)
            if blocks << raw.blkszbits > ondisk.PCLUSTER_MAX_SIZE:
                raise CorruptImage(f"LZ4 pclusters of {blocks} blocks", offset=where)
            found["lz4_max_distance"] = distance
            found["lz4_max_pcluster_blocks"] = blocks or 1
        elif algorithm == ondisk.ALG_LZMA and length >= ondisk.LZMA_CFGS.size:
            size, layout = ondisk.LZMA_CFGS.unpack_from(data)
            if layout or not 4096 <= size <= 8 << 20:
                raise UnsupportedFeature(f"LZMA format {layout} with a dictionary of {size} bytes")
            found["lzma_dict_size"] = size
        elif algorithm == ondisk.ALG_DEFLATE and length >= ondisk.DEFLATE_CFGS.size:
            (bits,) = ondisk.DEFLATE_CFGS.unpack_from(data)
            if bits > 15:
                raise UnsupportedFeature(f"DEFLATE window of 2^{bits} bytes")
            found["deflate_window_bits"] = bits
        elif algorithm == ondisk.ALG_ZSTD and length >= ondisk.ZSTD_CFGS.size:
            layout, log = ondisk.ZSTD_CFGS.unpack_from(data)
            if layout or log > 10:
                raise UnsupportedFeature(f"Zstandard format {layout}, window log {log + 10}")
            found["zstd_window_log"] = log + 10
        else:
            raise CorruptImage(
                f"{ondisk.ALG_NAMES[algorithm]} configuration of {length} bytes", offset=where
            )
    return found


def _load_devices(read: Reader, raw: ondisk.SuperBlock, wide: bool) -> tuple[Device, ...]:
    if not raw.feature_incompat & ondisk.INCOMPAT_DEVICE_TABLE:
        return ()
    count = raw.extra_devices
    if count > MAX_DEVICES:
        raise UnsupportedFeature(f"{count} extra devices (pyerofs reads up to {MAX_DEVICES})")
    table = read(raw.devt_slotoff * ondisk.DEVICE_SLOT.size, count * ondisk.DEVICE_SLOT.size)
    devices = []
    for fields in ondisk.DEVICE_SLOT.iter_unpack(table):
        slot = ondisk.DeviceSlot._make(fields)
        devices.append(
            Device(
                tag=slot.tag.rstrip(b"\0"),
                blocks=slot.blocks_lo | (slot.blocks_hi << 32 if wide else 0),
                uniaddr=slot.uniaddr_lo | (slot.uniaddr_hi << 32 if wide else 0),
            )
        )
    return tuple(devices)

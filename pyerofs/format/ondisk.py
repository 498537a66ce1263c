"""The EROFS on-disk format: records, constants and feature bits.  Declarations only, no logic.

Everything is little-endian.  Sources: the kernel's Documentation/filesystems/erofs.rst and the
format header shared by the kernel and erofs-utils (1.9.3).  docs/format.md explains how the parts
fit together; here each field is explained once.  Each record is a NamedTuple with the field names
of the disk and a ``struct.Struct`` beside it; ``Record._make(STRUCT.unpack_from(buf, pos))`` decodes.

This module imports nothing of the package.
"""

from __future__ import annotations

import stat
from struct import Struct
from typing import NamedTuple

SUPER_MAGIC = 0xE0F5E1E2
SUPER_OFFSET = 1024  # room for boot sectors before the superblock
SUPER_BASE_SIZE = 128  # each extension slot adds SB_EXTSLOT_SIZE
SB_EXTSLOT_SIZE = 16

MIN_BLKSZBITS = 9
MAX_BLKSZBITS = 16  # 64 KiB; the kernel mounts blocks up to its page size only

# --- feature bits ---------------------------------------------------------------------------

COMPAT_SB_CHKSUM = 0x01  # the superblock's block carries a crc32c
COMPAT_MTIME = 0x02  # inode times are mtimes (ctimes before)
COMPAT_XATTR_FILTER = 0x04  # inodes carry a bloom filter of their xattr names
COMPAT_SHARED_EA_IN_METABOX = 0x08  # shared xattrs lie in the metabox
COMPAT_PLAIN_XATTR_PFX = 0x10  # long xattr prefixes lie in plain metadata
COMPAT_ISHARE_XATTRS = 0x20  # one xattr prefix names content digests (page cache sharing)

COMPAT_NAMES = {
    COMPAT_SB_CHKSUM: "sb_chksum",
    COMPAT_MTIME: "mtime",
    COMPAT_XATTR_FILTER: "xattr_filter",
    COMPAT_SHARED_EA_IN_METABOX: "shared_ea_in_metabox",
    COMPAT_PLAIN_XATTR_PFX: "plain_xattr_pfx",
    COMPAT_ISHARE_XATTRS: "ishare_xattrs",
}

INCOMPAT_LZ4_0PADDING = 0x001  # compressed data is right-aligned in its blocks, zeros before it
INCOMPAT_COMPR_CFGS = 0x002  # compression configurations follow the superblock (or big pclusters)
INCOMPAT_CHUNKED_FILE = 0x004
INCOMPAT_DEVICE_TABLE = 0x008  # extra devices (or the second algorithm HEAD2)
INCOMPAT_ZTAILPACKING = 0x010  # a file's last pcluster may lie behind its inode
INCOMPAT_FRAGMENTS = 0x020  # tails in the packed inode (or deduplicated pclusters)
INCOMPAT_XATTR_PREFIXES = 0x040
INCOMPAT_48BIT = 0x080
INCOMPAT_METABOX = 0x100  # inodes inside one compressed special inode

INCOMPAT_NAMES = {
    INCOMPAT_LZ4_0PADDING: "lz4_0padding",
    INCOMPAT_COMPR_CFGS: "compr_cfgs/big_pcluster",
    INCOMPAT_CHUNKED_FILE: "chunked_file",
    INCOMPAT_DEVICE_TABLE: "device_table/compr_head2",
    INCOMPAT_ZTAILPACKING: "ztailpacking",
    INCOMPAT_FRAGMENTS: "fragments/dedupe",
    INCOMPAT_XATTR_PREFIXES: "xattr_prefixes",
    INCOMPAT_48BIT: "48bit",
    INCOMPAT_METABOX: "metabox",
}
ALL_INCOMPAT = 0x1FF

# --- superblock -----------------------------------------------------------------------------


class SuperBlock(NamedTuple):
    magic: int
    checksum: int  # crc32c from SUPER_OFFSET to the block's end, this field taken as zero
    feature_compat: int
    blkszbits: int
    sb_extslots: int
    rootnid_2b: int  # 48-bit images with rootnid_8b: high 16 bits of the block count
    inos: int
    epoch: int  # seconds added to compact inodes' times
    fixed_nsec: int  # nanoseconds of compact inodes
    blocks_lo: int
    meta_blkaddr: int  # inode n lies at meta_blkaddr blocks + 32 * n
    xattr_blkaddr: int  # start block of the shared xattrs
    uuid: bytes
    volume_name: bytes
    feature_incompat: int
    available_compr_algs: int  # bit per algorithm; without COMPR_CFGS: LZ4's largest distance
    extra_devices: int
    devt_slotoff: int  # device table's start in units of 128 bytes
    dirblkbits: int  # directory block = block << dirblkbits
    xattr_prefix_count: int
    xattr_prefix_start: int  # in units of 4 bytes
    packed_nid: int  # the inode that holds fragments
    xattr_filter_reserved: int  # the name filter is only used while this is zero
    ishare_xattr_prefix_id: int
    reserved: bytes
    build_time: int  # seconds after epoch at which the image was built
    rootnid_8b: int
    reserved2: int
    metabox_nid: int
    reserved3: int


SUPERBLOCK = Struct("<IIIBBHQqIIII16s16sIHHHBBIQBB2sIQQQQ")

# --- devices --------------------------------------------------------------------------------


class DeviceSlot(NamedTuple):
    tag: bytes  # digest or name, NUL padded
    blocks_lo: int
    uniaddr_lo: int  # first block of this device in the unified address space, 0 = not mapped
    blocks_hi: int
    uniaddr_hi: int


DEVICE_SLOT = Struct("<64sIIHH52x")

# --- inodes ---------------------------------------------------------------------------------

ISLOT_BITS = 5  # nids count 32-byte slots
NID_METABOX_BIT = 63  # set in a nid: the inode lies in the metabox
NID_MASK = (1 << NID_METABOX_BIT) - 1

LAYOUT_FLAT_PLAIN = 0  # consecutive blocks
LAYOUT_COMPRESSED_FULL = 1  # 8-byte lcluster indexes, or extent records
LAYOUT_FLAT_INLINE = 2  # consecutive blocks, the last one behind the inode
LAYOUT_COMPRESSED_COMPACT = 3  # packed lcluster indexes
LAYOUT_CHUNK_BASED = 4
LAYOUT_MAX = 5
LAYOUT_NAMES = ("flat_plain", "compressed_full", "flat_inline", "compressed_compact", "chunk_based")

I_EXTENDED_BIT = 0x01
I_LAYOUT_SHIFT = 1
I_LAYOUT_MASK = 0x07
I_BIT4 = 0x10  # compact non-directories: nlink is 1; directories: no "." entry
I_ALL = 0x1F


class InodeCompact(NamedTuple):
    i_format: int
    i_xattr_icount: int  # 4-byte units of inline xattrs, plus one for a header of 12 bytes
    i_mode: int
    i_nb: int  # nlink, or bits 32.. of i_u where nlink is known
    i_size: int
    i_mtime: int  # seconds after epoch
    i_u: int  # block count, start block, device number or chunk format
    # 4 bytes: i_ino, a number for 32-bit stat, not used
    i_uid: int
    i_gid: int
    # 4 bytes: reserved


INODE_COMPACT = Struct("<HHHHIII4xHH4x")


class InodeExtended(NamedTuple):
    i_format: int
    i_xattr_icount: int
    i_mode: int
    i_nb: int
    i_size: int
    i_u: int
    # 4 bytes: i_ino
    i_uid: int
    i_gid: int
    i_mtime: int  # seconds since 1970
    i_mtime_nsec: int
    i_nlink: int
    # 16 bytes: reserved


INODE_EXTENDED = Struct("<HHHHQI4xIIqII16x")

# --- chunk-based files ----------------------------------------------------------------------

CHUNK_BLKBITS_MASK = 0x1F
CHUNK_INDEXES = 0x20  # 8-byte indexes instead of 4-byte block addresses
CHUNK_48BIT = 0x40
CHUNK_ALL = 0x7F
CHUNK_INDEX = Struct("<HHI")  # startblk_hi, device_id, startblk_lo
BLOCK_MAP_ENTRY = Struct("<I")
NULL_ADDR_32 = 0xFFFFFFFF
NULL_ADDR_48 = 0xFFFFFFFFFFFF

# --- directories ----------------------------------------------------------------------------


class DirentRecord(NamedTuple):
    nid: int
    nameoff: int  # from the directory block's start; the first one tells how many records there are
    file_type: int


DIRENT = Struct("<QHBx")
NAME_LEN = 255

FT_UNKNOWN, FT_REG_FILE, FT_DIR, FT_CHRDEV, FT_BLKDEV, FT_FIFO, FT_SOCK, FT_SYMLINK = range(8)
MODE_OF_FT = {  # the type of a directory entry -> that part of an inode's mode
    FT_REG_FILE: stat.S_IFREG,
    FT_DIR: stat.S_IFDIR,
    FT_CHRDEV: stat.S_IFCHR,
    FT_BLKDEV: stat.S_IFBLK,
    FT_FIFO: stat.S_IFIFO,
    FT_SOCK: stat.S_IFSOCK,
    FT_SYMLINK: stat.S_IFLNK,
}

# --- extended attributes --------------------------------------------------------------------

XATTR_IBODY_HEADER = Struct("<IB7x")  # name filter (bit set = name absent), shared count
XATTR_ENTRY = Struct("<BBH")  # name length, name index, value size
XATTR_LONG_PREFIX = 0x80
XATTR_FILTER_SEED = 0x25BBE08F
XATTR_PREFIXES = {  # name index -> prefix
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}

# --- compressed files -----------------------------------------------------------------------

PCLUSTER_MAX_SIZE = 1 << 20  # encoded
PCLUSTER_MAX_DSIZE = 12 << 20  # decoded

ALG_LZ4, ALG_LZMA, ALG_DEFLATE, ALG_ZSTD = range(4)
# Not on disk, where an algorithm has 4 bits: how this parser names pclusters of stored bytes.
ALG_SHIFTED = 16
ALG_INTERLACED = 17  # rotated within the block, so that they keep their logical offset
ALG_NAMES = {
    ALG_LZ4: "lz4",
    ALG_LZMA: "lzma",
    ALG_DEFLATE: "deflate",
    ALG_ZSTD: "zstd",
    ALG_SHIFTED: "plain",
    ALG_INTERLACED: "interlaced",
}
ALL_COMPR_ALGS = 0x0F

ADVISE_COMPACTED_2B = 0x01  # compact indexes: 2-byte packs in the middle
ADVISE_EXTENTS = 0x01  # full indexes: extent records instead
ADVISE_BIG_PCLUSTER_1 = 0x02
ADVISE_BIG_PCLUSTER_2 = 0x04
ADVISE_INLINE_PCLUSTER = 0x08
ADVISE_INTERLACED_PCLUSTER = 0x10
ADVISE_FRAGMENT_PCLUSTER = 0x20
ADVISE_EXTRECSZ_SHIFT = 1
ADVISE_EXTRECSZ_MASK = 0x3
FRAGMENT_INODE_BIT = 7  # of h_clusterbits: the whole file is a fragment


class MapHeader(NamedTuple):
    h_lo: int  # fragment offset; or inline size in its high half; or extent count, low part
    h_advise: int
    h_algorithmtype: int  # HEAD1 in bits 0-3, HEAD2 in bits 4-7; extent count bits 32-39
    h_clusterbits: int  # lcluster bits above the block's; extent count bits 40-47


MAP_HEADER = Struct("<IHBB")

LCLUSTER_PLAIN, LCLUSTER_HEAD1, LCLUSTER_NONHEAD, LCLUSTER_HEAD2 = range(4)
LI_PARTIAL_REF = 1 << 15
LI_D0_CBLKCNT = 1 << 11
LCLUSTER_INDEX = Struct("<HHI")  # di_advise, di_clusterofs, block address or two deltas

EXTENT_RECORD_16 = Struct("<IQI")  # encoded length word, address, logical offset
EXTENT_RECORD_32 = Struct("<IQQ12x")
EXTENT_PLEN_MASK = (PCLUSTER_MAX_SIZE << 1) - 1
EXTENT_PLEN_PARTIAL = 1 << 27
EXTENT_PLEN_FMT_SHIFT = 28

LZ4_CFGS = Struct("<HH10x")  # max_distance, max_pclusterblks
LZMA_CFGS = Struct("<IH8x")  # dict_size, format
DEFLATE_CFGS = Struct("<B5x")  # windowbits
ZSTD_CFGS = Struct("<BB4x")  # format, windowlog - 10

assert SUPERBLOCK.size == 144
assert DEVICE_SLOT.size == 128
assert INODE_COMPACT.size == 32
assert INODE_EXTENDED.size == 64
assert XATTR_IBODY_HEADER.size == 12
assert XATTR_ENTRY.size == 4
assert CHUNK_INDEX.size == 8
assert DIRENT.size == 12
assert MAP_HEADER.size == 8
assert LCLUSTER_INDEX.size == 8
assert EXTENT_RECORD_16.size == 16
assert EXTENT_RECORD_32.size == 32
assert LZ4_CFGS.size == 14
assert LZMA_CFGS.size == 14
assert DEFLATE_CFGS.size == 6
assert ZSTD_CFGS.size == 6

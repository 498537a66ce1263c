"""The parser's data types: inodes, extents, directory entries.  Records with little logic.

This module imports only ``ondisk``.
"""

from __future__ import annotations

import os
import stat as st
from typing import NamedTuple

from pyerofs.format import ondisk

NULL_BLOCK = -1  # ``Inode.start`` of a flat file that is one hole

_COMPRESSED = (ondisk.LAYOUT_COMPRESSED_FULL, ondisk.LAYOUT_COMPRESSED_COMPACT)

HOLE, PLAIN, META, ENCODED, FRAGMENT = range(5)
KIND_NAMES = ("hole", "plain", "inline", "encoded", "fragment")


class Extent(NamedTuple):
    """A range of a file and where its bytes are.

    ========  =============================================================================
    kind      what ``device`` and ``address`` mean
    ========  =============================================================================
    HOLE      nothing: zeros
    PLAIN     bytes as they are, on a device (0 = primary)
    META      bytes as they are, in metadata: on device 0 or METABOX
    ENCODED   a pcluster of ``size`` bytes to decode with ``algorithm``, on a device or METABOX
    FRAGMENT  bytes at ``address`` of the packed inode
    ========  =============================================================================
    """

    start: int  # logical offset in the file
    length: int
    kind: int
    device: int = 0
    address: int = 0
    size: int = 0
    algorithm: int = 0
    partial: bool = False  # the pcluster decodes to more than ``length``

    @property
    def end(self) -> int:
        return self.start + self.length


class Dirent(NamedTuple):
    """A directory entry.  ``cookie``: the byte position of the next entry in the directory.
    Cookies increase along the directory and never change, so they serve as seek offsets."""

    name: bytes
    nid: int
    file_type: int
    cookie: int


class CompressionMap:
    """The decoded header of a compressed file's index, with cached results of the mapping.

    ``base``: byte offset of the index, after the header, on the inode's device."""

    __slots__ = (
        "advise",
        "algorithms",
        "base",
        "credit",
        "extents",
        "fragment",
        "initial_4b",
        "inline_address",
        "inline_size",
        "last",
        "lcluster_bits",
        "middle_2b",
        "pack",
        "record_size",
        "running",
        "tail_head",
        "total",
        "whole",
    )

    whole: bool  # the whole file is a fragment: there is no index
    advise: int
    lcluster_bits: int
    algorithms: tuple[int, int]  # HEAD1, HEAD2
    base: int
    record_size: int  # of an encoded extent; 0 = lcluster indexes
    extents: int  # number of encoded extents, where records carry their logical offset
    total: int  # number of lclusters
    initial_4b: int  # compact: leading 4-byte entries, up to 32-byte alignment
    middle_2b: int  # compact: 2-byte entries after them
    pack: tuple[int, int, int]  # compact: the pack read last: offset, bits, mask with a 1 per head
    inline_size: int  # ztailpacking: encoded bytes behind the index; 0 = none
    inline_address: int
    fragment: int  # offset in the packed inode of the tail; -1 = none
    tail_head: int  # lcluster in which the inline or fragment tail starts; -1 = none
    running: tuple[int, int]  # 4-byte extents: a lcluster, and the address where its data starts
    last: Extent | None  # the extent mapped last
    credit: int  # lcluster indexes: what decoding parts of it may cost, see lclusters.CREDIT


class Inode:
    """A decoded inode.  Immutable except for ``zmap``, which is loaded on first use.

    The layout-dependent field (``union``) is stored raw and interpreted on use, because decoding
    inodes is most of the cost of listing a directory."""

    __slots__ = (
        "data",
        "device",
        "flags",
        "gid",
        "layout",
        "mode",
        "mtime",
        "mtime_nsec",
        "nid",
        "nlink",
        "size",
        "uid",
        "union",
        "wide",
        "xattr_size",
        "xattrs",
        "zmap",
    )

    nid: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    mtime: int  # seconds since 1970
    mtime_nsec: int
    layout: int
    flags: int  # the format field
    union: int  # i_u, extended by i_nb to 48 bits where ``wide``
    wide: bool
    device: int  # where the inode lies: 0 or METABOX
    xattrs: int  # byte offset of the inline xattrs there
    xattr_size: int  # 0 = none
    data: int  # byte offset after the xattrs: inline tail, chunk table or compression map
    zmap: CompressionMap | None

    @property
    def is_dir(self) -> bool:
        return self.mode & 0o170000 == 0o040000

    @property
    def is_file(self) -> bool:
        return self.mode & 0o170000 == 0o100000

    @property
    def is_symlink(self) -> bool:
        return self.mode & 0o170000 == 0o120000

    @property
    def is_compressed(self) -> bool:
        return self.layout in _COMPRESSED

    @property
    def mtime_ns(self) -> int:
        return self.mtime * 1_000_000_000 + self.mtime_nsec

    @property
    def dot_omitted(self) -> bool:
        """Whether the directory has no ``.`` entry."""
        return self.is_dir and bool(self.flags & ondisk.I_BIT4)

    @property
    def start(self) -> int:
        """The first block of a flat file, or NULL_BLOCK if the whole file is a hole."""
        null = ondisk.NULL_ADDR_48 if self.wide else ondisk.NULL_ADDR_32
        if self.layout == ondisk.LAYOUT_FLAT_PLAIN and self.union == null:
            return NULL_BLOCK
        return self.union

    @property
    def blocks(self) -> int:
        """The number of blocks that a compressed file's pclusters occupy."""
        return self.union

    @property
    def chunk_format(self) -> int:
        """Chunk size and table format of a chunk-based file."""
        return self.union & 0xFFFF

    @property
    def rdev(self) -> int:
        """The device number, encoded as by os.makedev; 0 unless the inode is a device."""
        if self.mode & 0o170000 not in (0o020000, 0o060000):
            return 0
        # on disk: 12 bits of major in the middle of 20 bits of minor
        raw = self.union & 0xFFFFFFFF
        return os.makedev(raw >> 8 & 0xFFF, raw & 0xFF | raw >> 12 & 0xFFF00)

    def __repr__(self) -> str:
        return f"<Inode {self.nid} {st.filemode(self.mode)} {self.size} bytes>"

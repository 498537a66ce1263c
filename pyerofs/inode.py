"""nid -> Inode: the compact (32-byte) and the extended (64-byte) record."""

from __future__ import annotations

from pyerofs import ondisk
from pyerofs.errors import CorruptImage, UnsupportedFeature
from pyerofs.model import NULL_BLOCK, Inode
from pyerofs.volume import Volume

_COMPACT = ondisk.INODE_COMPACT.unpack_from
_EXTENDED = ondisk.INODE_EXTENDED.unpack_from

MAX_SIZE = (1 << 63) - 1


def load(vol: Volume, nid: int) -> Inode:
    """Read an inode.  Raises CorruptImage, UnsupportedFeature, or a Fault of the memory."""
    device, offset = vol.inode_position(nid)
    buffer, pos = vol.memory.at(device, offset, 32)
    iformat = buffer[pos] | buffer[pos + 1] << 8
    if iformat & ~ondisk.I_ALL:
        raise UnsupportedFeature(f"inode format {iformat:#x} of nid {nid} at {offset:#x}")
    inode = Inode.__new__(Inode)
    inode.nid = nid
    inode.layout = layout = iformat >> ondisk.I_LAYOUT_SHIFT & ondisk.I_LAYOUT_MASK
    if layout >= ondisk.LAYOUT_MAX:
        raise UnsupportedFeature(f"data layout {layout} of nid {nid} at {offset:#x}")
    wide = True  # whether i_nb extends i_u to 48 bits
    if iformat & ondisk.I_EXTENDED_BIT:
        if pos + 64 > len(buffer):
            buffer, pos = vol.memory.at(device, offset, 64)
        (
            _, icount, mode, nb, inode.size, iu, _,
            inode.uid, inode.gid, inode.mtime, inode.mtime_nsec, inode.nlink,
        ) = _EXTENDED(buffer, pos)  # fmt: skip
        end = offset + 64
        if inode.size > MAX_SIZE:
            raise CorruptImage(f"size of {inode.size} bytes", offset=offset, nid=nid)
    else:
        (
            _, icount, mode, nb, inode.size, mtime, iu, _, inode.uid, inode.gid, _,
        ) = _COMPACT(buffer, pos)  # fmt: skip
        end = offset + 32
        inode.mtime = vol.sb.epoch + mtime
        inode.mtime_nsec = vol.sb.fixed_nsec
        if iformat & ondisk.I_BIT4 and mode & 0o170000 != 0o040000:
            inode.nlink = 1
        else:
            inode.nlink = nb
            wide = False
    inode.mode = mode
    inode.device = device
    inode.xattrs = end
    # the header of 12 bytes counts as one unit of 4
    inode.xattr_size = icount * 4 + 8 if icount else 0
    inode.data = end + inode.xattr_size
    inode.dot_omitted = False
    inode.rdev = inode.blocks = inode.chunk_format = 0
    inode.start = NULL_BLOCK
    inode.zmap = None

    kind = mode & 0o170000
    if kind == 0o040000 or kind == 0o100000 or kind == 0o120000:
        if kind == 0o040000:
            inode.dot_omitted = bool(iformat & ondisk.I_BIT4)
        if layout == ondisk.LAYOUT_CHUNK_BASED:
            inode.chunk_format = iu & 0xFFFF
            if inode.chunk_format & ~ondisk.CHUNK_ALL:
                raise UnsupportedFeature(
                    f"chunk format {inode.chunk_format:#x} of nid {nid} at {offset:#x}"
                )
        elif layout == ondisk.LAYOUT_FLAT_PLAIN or layout == ondisk.LAYOUT_FLAT_INLINE:
            start = iu | nb << 32 if wide else iu
            null = ondisk.NULL_ADDR_48 if wide else ondisk.NULL_ADDR_32
            if layout != ondisk.LAYOUT_FLAT_PLAIN or start != null:
                inode.start = start
        else:
            inode.blocks = iu | nb << 32 if wide else iu
    elif kind == 0o020000 or kind == 0o060000:
        # the kernel's 32-bit encoding: 12 bits of major in the middle of 20 of minor
        major, minor = (iu >> 8) & 0xFFF, (iu & 0xFF) | (iu >> 12 & 0xFFF00)
        inode.rdev = (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & ~0xFF) << 12
    elif kind != 0o010000 and kind != 0o140000:
        raise CorruptImage(f"file type {mode:#o}", offset=offset, nid=nid)
    return inode

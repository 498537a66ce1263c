"""Load inodes by nid, from compact (32-byte) or extended (64-byte) records."""

from __future__ import annotations

from pyerofs.errors import CorruptImage, UnsupportedFeature
from pyerofs.format import ondisk
from pyerofs.format.model import Inode
from pyerofs.format.volume import Volume

_COMPACT = ondisk.INODE_COMPACT.unpack_from
_EXTENDED = ondisk.INODE_EXTENDED.unpack_from
_NEW = Inode.__new__

MAX_SIZE = (1 << 63) - 1
FILE_TYPES = {0o010000, 0o020000, 0o040000, 0o060000, 0o100000, 0o120000, 0o140000}


def load(vol: Volume, nid: int) -> Inode:
    """Read an inode.  Raises CorruptImage, UnsupportedFeature, or Fault (FaultingMemory only)."""
    device, offset = vol.inode_position(nid)
    buffer, pos = vol.memory.at(device, offset, 32)
    flags = buffer[pos]
    inode = _NEW(Inode)
    if flags & ondisk.I_EXTENDED_BIT:
        if pos + 64 > len(buffer):
            buffer, pos = vol.memory.at(device, offset, 64)
        (
            flags, icount, mode, nb, inode.size, union,
            inode.uid, inode.gid, inode.mtime, inode.mtime_nsec, inode.nlink,
        ) = _EXTENDED(buffer, pos)  # fmt: skip
        inode.union = union | nb << 32
        inode.wide = True
        end = offset + 64
        if inode.size > MAX_SIZE:
            raise CorruptImage(f"size of {inode.size} bytes", offset=offset, nid=nid)
        if inode.mtime_nsec >= 1_000_000_000:
            raise CorruptImage(f"{inode.mtime_nsec} nanoseconds", offset=offset, nid=nid)
    else:
        (
            flags, icount, mode, nb, inode.size, mtime, union, inode.uid, inode.gid,
        ) = _COMPACT(buffer, pos)  # fmt: skip
        inode.mtime = vol.sb.epoch + mtime
        inode.mtime_nsec = vol.sb.fixed_nsec
        if flags & ondisk.I_BIT4 and mode & 0o170000 != 0o040000:
            inode.nlink = 1
            inode.union = union | nb << 32
            inode.wide = True
        else:
            inode.nlink = nb
            inode.union = union
            inode.wide = False
        end = offset + 32
    inode.nid = nid
    inode.mode = mode
    inode.flags = flags
    inode.device = device
    inode.xattrs = end
    if icount:  # the header of 12 bytes counts as one unit of 4
        inode.xattr_size = icount = icount * 4 + 8
        inode.data = end + icount
    else:
        inode.xattr_size = 0
        inode.data = end
    inode.zmap = None
    inode.layout = layout = flags >> ondisk.I_LAYOUT_SHIFT & ondisk.I_LAYOUT_MASK
    if layout >= ondisk.LAYOUT_CHUNK_BASED or flags > ondisk.I_ALL:
        _check_layout(inode, offset)
    if mode & 0o170000 not in FILE_TYPES:
        raise CorruptImage(f"file type {mode:#o}", offset=offset, nid=nid)
    return inode


def _check_layout(inode: Inode, offset: int) -> None:
    """Refuse formats, layouts and chunk formats that are not defined yet."""
    if inode.flags & ~ondisk.I_ALL:
        raise UnsupportedFeature(f"inode format {inode.flags:#x}, nid {inode.nid} at {offset:#x}")
    if inode.layout >= ondisk.LAYOUT_MAX:
        raise UnsupportedFeature(f"data layout {inode.layout}, nid {inode.nid} at {offset:#x}")
    special = not (inode.is_file or inode.is_dir or inode.is_symlink)
    if not special and inode.chunk_format & ~ondisk.CHUNK_ALL:
        raise UnsupportedFeature(
            f"chunk format {inode.chunk_format:#x}, nid {inode.nid} at {offset:#x}"
        )

"""Read file data through a Memory: map, fetch, decode, cut, join.

The synchronous API reads everything with ``read``.  The asynchronous API uses it for metadata
(directories, long symlinks, the packed inode, the metabox), and the other functions here for file
data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TypeAlias

from pyerofs.errors import CorruptImage, ErofsError
from pyerofs.format import inode as inodes
from pyerofs.format.extent import extents
from pyerofs.format.memory import Pcluster
from pyerofs.format.model import ENCODED, FRAGMENT, HOLE, META, PLAIN, Extent, Inode
from pyerofs.format.ondisk import ALG_INTERLACED
from pyerofs.format.volume import Volume
from pyerofs.sources.base import Buffer

MAX_READ = 1 << 31  # bytes per call; the result has to fit in memory


def read(vol: Volume, inode: Inode, offset: int, length: int, sparse: bool = False) -> Buffer:
    """Up to ``length`` bytes at ``offset``; fewer only at the file's end.  Not copied if the range
    lies within one pcluster.

    ``sparse``: the bytes that follow are unlikely to be read soon, so decode only what is needed.

    Raises ErofsError above MAX_READ, CorruptImage, SourceError, or Fault (FaultingMemory only)."""
    return joined([piece(vol, inode, *cut, sparse) for cut in cuts(vol, inode, offset, length)])


Cut: TypeAlias = tuple[Extent, int, int]  # an extent, the first byte to use of it, and how many


def cuts(vol: Volume, inode: Inode, offset: int, length: int) -> Iterator[Cut]:
    """The part of each extent that ``read`` needs, in order.  Raises as ``read`` does."""
    end = min(offset + length, inode.size)
    if offset >= end:
        return
    if end - offset > MAX_READ:
        raise ErofsError(
            f"read of {end - offset} bytes of nid {inode.nid}; read at most {MAX_READ} at once"
        )
    for extent in extents(vol, inode, offset, length):
        start = max(offset, extent.start)
        yield extent, start - extent.start, min(end, extent.end) - start


def joined(parts: Sequence[Buffer]) -> Buffer:
    """Concatenate buffers; a single one is returned without a copy."""
    return parts[0] if len(parts) == 1 else b"".join(parts)


def piece(
    vol: Volume, inode: Inode, extent: Extent, skip: int, length: int, sparse: bool = False
) -> Buffer:
    """``length`` bytes of an extent, starting at its byte ``skip``.  ``sparse`` and errors as for
    ``read``."""
    kind = extent.kind
    if kind == ENCODED:
        memory, wanted, end = vol.memory, pcluster(vol, inode, extent), skip + length
        decoded = memory.first(wanted, end) if sparse else memory.decoded(wanted)
        return decoded if length == len(decoded) else memoryview(decoded)[skip:end]
    if kind == PLAIN and inode.is_file and inode is not vol.packed:
        return vol.memory.raw(extent.device, extent.address + skip, length)
    if kind in (META, PLAIN):  # metadata (directories, links, inline tails) is cached
        buffer, pos = vol.memory.at(extent.device, extent.address + skip, length)
        return memoryview(buffer)[pos : pos + length]
    if kind == HOLE:
        return bytes(length)
    packed = packed_inode(vol, inode)
    data = read(vol, packed, extent.address + skip, length, sparse)
    check_fragment(inode, len(data), length)
    return data


def check_fragment(inode: Inode, found: int, length: int) -> None:
    """Raise CorruptImage if the packed inode has fewer bytes (``found``) than a fragment claims."""
    if found < length:
        raise CorruptImage("fragment beyond the packed inode's end", nid=inode.nid)


def check_map(vol: Volume, inode: Inode) -> None:
    """Check that the extents of a file or link cover it and lie within what they say has their bytes:
    a device, the metabox or the packed inode.  Reads none of these bytes.  Raises as ``read`` does."""
    for _, length, kind, device, address, size, _, _ in extents(vol, inode, 0, inode.size):
        if kind == ENCODED:
            vol.memory.check_bounds(device, address, size)
        elif kind == FRAGMENT:
            check_fragment(inode, packed_inode(vol, inode).size - address, length)
        elif kind != HOLE:
            vol.memory.check_bounds(device, address, length)


def pcluster(vol: Volume, inode: Inode, extent: Extent) -> Pcluster:
    """The pcluster to which an ENCODED extent refers."""
    shift = 0
    if extent.algorithm == ALG_INTERLACED:
        # the first bytes, up to the end of the extent's first block, are stored last
        block = vol.sb.block_size
        shift = block - (extent.start & block - 1)
    return Pcluster(
        extent.device,
        extent.address,
        extent.size,
        extent.algorithm,
        shift,
        extent.length,
        extent.partial,
        inode.nid,
    )


def packed_inode(vol: Volume, inode: Inode) -> Inode:
    """The packed inode, which holds the fragments of ``inode``.  Raises CorruptImage, or Fault."""
    packed = vol.packed
    if packed is None:
        if not vol.sb.packed_nid:
            raise CorruptImage("fragment, but the image has no packed inode", nid=inode.nid)
        packed = inodes.load(vol, vol.sb.packed_nid)
        if not packed.is_file:
            raise CorruptImage("packed inode is not a file", nid=packed.nid)
        vol.packed = packed
    if inode.nid == packed.nid:
        raise CorruptImage("fragment inside the packed inode", nid=inode.nid)
    return packed


def attach_metabox(vol: Volume) -> None:
    """Load the metabox inode, if the image has one, and let the memory read through it."""
    if vol.sb.metabox_nid:
        metabox = inodes.load(vol, vol.sb.metabox_nid)
        if not metabox.is_file:
            raise CorruptImage("metabox inode is not a file", nid=metabox.nid)
        vol.metabox = metabox
        vol.memory.add_metabox(metabox.size, partial(read, vol, metabox))

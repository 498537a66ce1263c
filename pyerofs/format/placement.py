"""The positions of an image's extra devices when the image is served as one block device."""

from __future__ import annotations

from pyerofs.format import superblock
from pyerofs.format.superblock import Reader


def flat_layout(read: Reader, size: int) -> list[tuple[int, int]] | None:
    """(offset, size) in bytes of each extra device within the image's unified address space, in the
    order of the device table.  None if the image has no extra devices, does not map all of them, or
    maps them onto each other.  The primary device lies at 0.

    ``read(offset, length)`` reads the primary device, which has ``size`` bytes.  Raises
    CorruptImage or UnsupportedFeature; exceptions of ``read`` propagate."""
    found = superblock.load(read, size)
    if not found.devices or not all(d.uniaddr and d.blocks for d in found.devices):
        return None
    scale = found.block_bits
    places = [(d.uniaddr << scale, d.blocks << scale) for d in found.devices]
    end = found.blocks << scale
    for start, length in sorted(places):
        if start < end:
            return None
        end = start + length
    return places

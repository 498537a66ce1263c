"""The parser's context: everything that its functions need to know about one image."""

from __future__ import annotations

from pyerofs.errors import CorruptImage, DeviceMissing, ErofsError
from pyerofs.format.codecs import Decoder
from pyerofs.format.lclusters import Parts
from pyerofs.format.memory import METABOX, ByteCache, Memory
from pyerofs.format.model import Inode
from pyerofs.format.ondisk import ISLOT_BITS, NID_MASK, NID_METABOX_BIT
from pyerofs.format.superblock import Superblock


class Volume:
    """One image: its superblock, the Memory to read it through, its special inodes once loaded.

    ``extra_devices``: how many extra devices were given.  With 0, data on an extra device is read
    from the primary device (a flat image), at the block to which the extra device's slot maps it.
    Raises ErofsError if any other number differs from the device table's."""

    __slots__ = (
        "_inodes",
        "extra_devices",
        "known",
        "memory",
        "metabox",
        "packed",
        "parts",
        "prefixes",
        "root",
        "sb",
    )

    def __init__(self, sb: Superblock, memory: Memory, extra_devices: int = 0) -> None:
        if extra_devices and extra_devices != len(sb.devices):
            raise ErofsError(
                f"the image has {len(sb.devices)} extra devices, {extra_devices} were given"
                " (pass each with --device, in order)"
            )
        self.sb = sb
        self._inodes = sb.meta_blkaddr << sb.block_bits  # where the inode with nid 0 would lie
        self.memory = memory
        self.extra_devices = extra_devices
        self.parts: Parts = ByteCache(memory.parts_size)
        self.metabox: Inode | None = None
        self.packed: Inode | None = None
        self.root: Inode | None = None
        self.known: dict[tuple[int, bytes], Inode] = {}  # cache of path look-ups
        self.prefixes: tuple[tuple[int, bytes], ...] | None = None  # long xattr prefixes
        memory.decode_with(Decoder(sb.zero_padded, sb.lzma_dict_size))

    @property
    def missing_devices(self) -> int:
        """How many extra devices were neither given nor appended to the image."""
        if self.extra_devices:
            return 0
        size = self.memory.sizes[0]
        return sum(
            not slot.uniaddr or slot.uniaddr << self.sb.block_bits >= size
            for slot in self.sb.devices
        )

    def inode_position(self, nid: int) -> tuple[int, int]:
        """The (pseudo) device and the byte offset of an inode."""
        if nid >> NID_METABOX_BIT:
            return METABOX, (nid & NID_MASK) << ISLOT_BITS
        return 0, self._inodes + (nid << ISLOT_BITS)

    def locate(self, device: int, address: int, nid: int) -> tuple[int, int]:
        """Translate a device id and byte address of the image to those of an available source.

        Raises CorruptImage, or DeviceMissing if no source has the device.  ``nid``: for messages."""
        if device:
            if device > len(self.sb.devices):
                raise CorruptImage(f"device {device} of {len(self.sb.devices)}", nid=nid)
            if self.extra_devices:
                return device, address
            slot = self.sb.devices[device - 1]
            if not slot.uniaddr:
                raise DeviceMissing(
                    f"nid {nid} lies on extra device {device}, which was not given (use --device)"
                )
            mapped = address + (slot.uniaddr << self.sb.block_bits)
            if mapped >= self.memory.sizes[0]:
                raise DeviceMissing(
                    f"nid {nid} lies on extra device {device}, which was neither given (use"
                    " --device) nor appended to the image"
                )
            return 0, mapped
        if self.extra_devices:
            block = address >> self.sb.block_bits
            for number, slot in enumerate(self.sb.devices, 1):
                if slot.uniaddr and slot.uniaddr <= block < slot.uniaddr + slot.blocks:
                    return number, address - (slot.uniaddr << self.sb.block_bits)
        return 0, address

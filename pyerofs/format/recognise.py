"""Recognise files that are not EROFS images, and suggest what to do with them."""

from __future__ import annotations

from collections.abc import Callable

Reader = Callable[[int, int], bytes | bytearray | memoryview]

_UNPACK = "is compressed; unpack it first ({})"
_MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x1f\x8b", f"it {_UNPACK.format('gzip: gunzip, or gzip -d')}"),
    (0, b"\xfd7zXZ\0", f"it {_UNPACK.format('xz: unxz, or xz -d')}"),
    (0, b"\x28\xb5\x2f\xfd", f"it {_UNPACK.format('zstd: unzstd, or zstd -d')}"),
    (0, b"BZh", f"it {_UNPACK.format('bzip2: bunzip2, or bzip2 -d')}"),
    (0, b"\x04\x22\x4d\x18", f"it {_UNPACK.format('lz4: unlz4, or lz4 -d')}"),
    (0, b"\x3a\xff\x26\xed", "it is an Android sparse image, which is read from local files only"),
    (0, b"PK\x03\x04", "it is a zip archive; take the image out of it first"),
    (0, b"hsqs", "it is a squashfs image"),
    (0, b"ANDROID!", "it is an Android boot image"),
    (0, b"\x7fELF", "it is an ELF file, a program or library"),
    (0, b"QFI\xfb", "it is a qcow2 disk image; convert it first (qemu-img convert -O raw)"),
    (257, b"ustar", "it is a tar archive; take the image out of it first"),
    (510, b"\x55\xaa", "it is a disk with partitions; --offset says where the one with EROFS begins"),
    (1080, b"\x53\xef", "it is an ext4 (or ext2, ext3) file system"),
    (1024, b"\x10\x20\xf5\xf2", "it is an f2fs file system"),
    (0, b"XFSB", "it is an XFS file system"),
    (65600, b"_BHRfS_M", "it is a btrfs file system"),
    (32769, b"CD001", "it is an ISO 9660 image"),
    (4096, b"\x67\x44\x6c\x61",
     "it is an Android super image, of logical partitions; take one out of it first (lpunpack)"),
)  # fmt: skip
_LOOK = 4096  # bytes checked for being all zeros


def recognise(read: Reader, size: int) -> str:
    """The kind of a file without an EROFS superblock, as the end of a sentence; "" if unknown.

    ``read(offset, length)`` reads the file, which has ``size`` bytes; its exceptions propagate."""
    if not size:
        return "it is empty"
    for at, magic, text in _MAGICS:
        if at + len(magic) <= size and bytes(read(at, len(magic))) == magic:
            return text
    if not bytes(read(0, min(_LOOK, size))).strip(b"\0"):
        return "it begins with zeros only; does it need --offset?"
    return ""

"""CRC-32C (Castagnoli) for the superblock's checksum: at most 64 KiB, once per image."""

from __future__ import annotations

from pyerofs.sources.base import Buffer

_POLYNOMIAL = 0x82F63B78  # reflected


def _make_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


def crc32c(data: Buffer, crc: int = 0xFFFFFFFF) -> int:
    """The kernel's ``crc32c(crc, data)``: no inversion before or after."""
    table = _make_table()
    for byte in bytes(data):
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc

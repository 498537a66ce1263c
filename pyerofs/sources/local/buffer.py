"""A source over bytes in memory."""

from __future__ import annotations

from pyerofs.sources.base import Buffer, check_range, within


class MemorySource:
    """``bytes`` or another contiguous buffer."""

    def __init__(self, data: Buffer, *, name: str = "memory") -> None:
        self._data = data if isinstance(data, bytes) else bytes(data)
        self.name = name
        self.size = len(self._data)
        self.backing = None

    def peek(self, offset: int, length: int) -> Buffer | None:
        return self._data[offset : offset + length] if within(self.size, offset, length) else None

    def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        return self._data[offset : offset + length]

    def close(self) -> None:
        pass

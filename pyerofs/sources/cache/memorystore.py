"""Fetched segments in memory, for one process."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from pyerofs.errors import IntegrityError
from pyerofs.sources.base import SEGMENT_BITS, Buffer

MEMORY_SEGMENTS = 64  # of 1 MiB


class MemoryStore:
    """The most recently used segments of a blob, at most ``capacity`` of them.

    The SHA-256 of a dropped segment is remembered: fetched again, the segment must be the same."""

    def __init__(self, size: int, name: str, capacity: int = MEMORY_SEGMENTS) -> None:
        self.size = size
        self._name = name
        self._capacity = capacity
        self._segments: OrderedDict[int, Buffer] = OrderedDict()
        self._digests: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def peek(self, offset: int, length: int) -> Buffer | None:
        parts = []
        end = offset + length
        for number in range(offset >> SEGMENT_BITS, (end - 1 >> SEGMENT_BITS) + 1):
            with self._lock:
                data = self._segments.get(number)
                if data is None:
                    return None
                self._segments.move_to_end(number)
            start = number << SEGMENT_BITS
            parts.append(memoryview(data)[max(offset - start, 0) : end - start])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def present(self) -> int:
        """The number of segments in memory."""
        return len(self._segments)

    def has(self, number: int) -> bool:
        return number in self._segments

    def knows(self, number: int) -> bool:
        """Whether a segment is in memory, or was dropped from it."""
        return number in self._digests

    def put(self, number: int, data: Buffer) -> None:
        """Store a segment.  Raises IntegrityError if it differs from the one that was dropped."""
        digest = hashlib.sha256(data).digest()
        with self._lock:
            if self._digests.setdefault(number, digest) != digest:
                raise IntegrityError(
                    f"{self._name}: the server sent other bytes than before at offset"
                    f" {number << SEGMENT_BITS} (their digests differ), so no bytes of it are used"
                )
            self._segments[number] = data
            while len(self._segments) > self._capacity:
                self._segments.popitem(last=False)

    def forget(self, number: int) -> None:
        """Drop a wrong segment, and its SHA-256."""
        with self._lock:
            self._segments.pop(number, None)
            self._digests.pop(number, None)

    def clear(self) -> None:
        self._segments.clear()

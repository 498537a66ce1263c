"""A source that shows several others one after another: an index followed by its data."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from pyerofs.sources.base import Buffer, Source, check_range, within


class ConcatSource:
    """The bytes of ``parts`` in order.  Owns them."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = tuple(parts)
        self._starts = [0, *accumulate(p.size for p in self._parts)]
        self.size = self._starts.pop()
        self.backing = None
        self.name = " + ".join(p.name for p in self._parts)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[Source, int, int]]:
        end = offset + length
        i = bisect_right(self._starts, offset) - 1
        while offset < end:
            part, start = self._parts[i], self._starts[i]
            n = min(end, start + part.size) - offset
            if n:
                yield part, offset - start, n
            offset += n
            i += 1

    def peek(self, offset: int, length: int) -> Buffer | None:
        if not within(self.size, offset, length):
            return None
        found = []
        for part, at, n in self._pieces(offset, length):
            data = part.peek(at, n)
            if data is None:
                return None
            found.append(data)
        return found[0] if len(found) == 1 else b"".join(found)

    def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        found = [part.read_at(at, n) for part, at, n in self._pieces(offset, length)]
        return found[0] if len(found) == 1 else b"".join(found)

    def close(self) -> None:
        for part in self._parts:
            part.close()

"""An image and its extra devices as one block device."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from pyerofs.errors import ErofsError, SourceError
from pyerofs.format.placement import flat_layout
from pyerofs.sources.base import AsyncSource, Buffer, check_range, within

SECTOR = 512  # a device's size is a multiple of this


class FlatSource(AsyncSource):
    """Sources at given offsets, in order, and zeros between them and up to ``size``.  Owns them."""

    def __init__(self, parts: Sequence[tuple[int, int, AsyncSource]], size: int) -> None:
        """``parts``: (offset, bytes to show, source); none may overlap."""
        self._parts = sorted(parts, key=lambda part: part[0])
        self._starts = [start for start, _, _ in self._parts]
        self.size = size
        self.name = " + ".join(source.name for _, _, source in parts)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[AsyncSource | None, int, int]]:
        """(source, offset within it, length); no source for zeros."""
        end = offset + length
        i = bisect_right(self._starts, offset) - 1
        while offset < end:
            if i >= 0:
                start, shown, source = self._parts[i]
                n = min(end, start + shown) - offset
                if n > 0:
                    yield source, offset - start, n
                    offset += n
            i += 1
            following = self._starts[i] if i < len(self._starts) else self.size
            if (n := min(end, following) - offset) > 0:
                yield None, 0, n
                offset += n

    def peek(self, offset: int, length: int) -> Buffer | None:
        if not within(self.size, offset, length):
            return None
        found = []
        for source, at, n in self._pieces(offset, length):
            data = bytes(n) if source is None else source.peek(at, n)
            if data is None:
                return None
            found.append(data)
        return found[0] if len(found) == 1 else b"".join(found)

    def will_need(self, offset: int, length: int) -> None:
        if within(self.size, offset, length):
            for source, at, n in self._pieces(offset, length):
                if source is not None:
                    source.will_need(at, n)

    async def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        found = [
            bytes(n) if source is None else await source.read_at(at, n)
            for source, at, n in self._pieces(offset, length)
        ]
        return found[0] if len(found) == 1 else b"".join(found)

    async def forget(self, offset: int, length: int) -> bool:
        found = False
        for source, at, n in self._pieces(offset, length):
            if source is not None:
                found |= await source.forget(at, n)
        return found

    async def aclose(self) -> None:
        for _, _, source in self._parts:
            await source.aclose()


class _Missing(Exception):
    """Raised for bytes that have to be read first."""


async def combine(sources: Sequence[AsyncSource]) -> AsyncSource | None:
    """One flat device in place of several if the image maps its extra devices; else None.

    Raises SourceError if the mapping can't be read or does not fit the sources."""
    primary, *extra = sources
    have: dict[tuple[int, int], Buffer] = {}

    def read(offset: int, length: int) -> Buffer:
        if (offset, length) not in have:
            raise _Missing(offset, length)
        return have[offset, length]

    while True:
        try:
            places = flat_layout(read, primary.size)
            break
        except _Missing as e:
            offset, length = e.args
            have[offset, length] = await primary.read_at(offset, length)
        except SourceError:
            raise
        except ErofsError as e:
            raise SourceError(
                f"{primary.name}: {e}; so its extra devices can't be placed"
            ) from None
    if places is None:
        return None
    if len(places) != len(extra):
        raise SourceError(
            f"{primary.name}: has {len(places)} extra devices, but {len(extra)} were given"
        )
    parts = [(0, min(primary.size, places[0][0]), primary)]
    for (offset, size), source in zip(places, extra, strict=True):
        parts.append((offset, min(size, source.size), source))
    return FlatSource(parts, max(offset + size for offset, size in places))


def whole(source: AsyncSource) -> AsyncSource:
    """The source, padded with zeros to a whole sector, in which a device has to end."""
    if source.size % SECTOR == 0:
        return source
    return FlatSource([(0, source.size, source)], source.size + -source.size % SECTOR)

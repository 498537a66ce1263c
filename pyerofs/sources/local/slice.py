"""A source that shows a part of another one: an image at an offset in a file."""

from __future__ import annotations

from pyerofs.errors import SourceError
from pyerofs.sources.base import (
    AsyncSource,
    Buffer,
    Source,
    Wrapper,
    check_range,
    data_from,
    hint,
    within,
)


class SliceSource:
    """``length`` bytes of ``inner`` from ``offset`` (to its end by default).  Owns ``inner``."""

    def __init__(self, inner: Source, offset: int, length: int | None = None) -> None:
        if offset < 0 or offset > inner.size:
            raise SourceError(f"{inner.name}: offset {offset} is outside its {inner.size} bytes")
        self._inner = inner
        self._offset = offset
        self.size = inner.size - offset if length is None else length
        self.name = f"{inner.name} at {offset}"
        check_range(inner.name, inner.size, offset, self.size)

    def peek(self, offset: int, length: int) -> Buffer | None:
        if not within(self.size, offset, length):
            return None
        return self._inner.peek(self._offset + offset, length)

    def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        return self._inner.read_at(self._offset + offset, length)

    def will_need(self, offset: int, length: int) -> None:
        """See ``AsyncSource.will_need``."""
        hint(self._inner, self._offset + offset, length)

    def data_from(self, offset: int) -> int:
        """See ``FileSource.data_from``."""
        return min(data_from(self._inner, self._offset + offset) - self._offset, self.size)

    @property
    def backing(self) -> tuple[int, int] | None:
        found = self._inner.backing
        return None if found is None else (found[0], found[1] + self._offset)

    def close(self) -> None:
        self._inner.close()


class AsyncSlice(Wrapper):
    """SliceSource for an AsyncSource: ``inner`` from ``offset`` on.  Owns ``inner``."""

    def __init__(self, inner: AsyncSource, offset: int) -> None:
        if offset < 0 or offset > inner.size:
            raise SourceError(f"{inner.name}: offset {offset} is outside its {inner.size} bytes")
        super().__init__(inner)
        self._offset = offset
        self.size = inner.size - offset
        self.name = f"{inner.name} at {offset}"

    def peek(self, offset: int, length: int) -> Buffer | None:
        if not within(self.size, offset, length):
            return None
        return self.inner.peek(self._offset + offset, length)

    async def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        return await self.inner.read_at(self._offset + offset, length)

    def will_need(self, offset: int, length: int) -> None:
        self.inner.will_need(self._offset + offset, length)

    @property
    def blocking(self) -> Source | None:
        inner = self.inner.blocking
        return None if inner is None else SliceSource(inner, self._offset)

    @property
    def backing(self) -> tuple[int, int] | None:
        found = self.inner.backing
        return None if found is None else (found[0], found[1] + self._offset)

    async def forget(self, offset: int, length: int) -> bool:
        return await self.inner.forget(self._offset + offset, length)

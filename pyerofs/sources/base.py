"""The two protocols that every source of bytes follows, and their contract.

- Ranges are half open: ``read_at(offset, length)`` is about ``[offset, offset + length)``.
- ``read_at`` returns exactly ``length`` bytes or raises; there is no cursor; calls may run
  concurrently, from any thread (``Source``) or task (``AsyncSource``).
- ``peek`` never blocks: the bytes if they are in memory already, otherwise None.  It may always
  answer None, and it answers None rather than report an error.
- ``size`` is known from the start and does not change.

A ``Source`` is a protocol: any object with these members will do, and two more that are asked for by
``hint`` and ``data_from``.  An ``AsyncSource`` is a base class: five members make one, capabilities
have defaults, and a ``Wrapper`` overrides what it changes.  tests/contract.py is what each one proves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from pyerofs.errors import SourceError, TruncatedRead

if TYPE_CHECKING:
    from pyerofs.sources.spec import SourceSpec

Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_BLOB = 1 << 44  # bytes: what ext4 holds in a file; a larger claim is a mistake or an attack
# what is fetched, kept and checked as one: requests cost far more than bytes, 64 of 32 KiB take 40
# times as long as one of 2 MiB
SEGMENT_BITS = 20
SEGMENT = 1 << SEGMENT_BITS
QUICK_NS = 300_000  # nanoseconds: an SSD's answer; going through a thread costs a third of that


class NoRoom(SourceError):
    """A file system is full."""


class Source(Protocol):
    """Bytes to be read by threads."""

    @property
    def name(self) -> str:
        """How messages call this source: a path, a URL.  Never holds a secret."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    def peek(self, offset: int, length: int) -> Buffer | None:
        """The bytes if they can be had without blocking."""

    def read_at(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes; blocks.  Raises SourceError."""

    @property
    def backing(self) -> tuple[int, int] | None:
        """(descriptor, offset): a file whose bytes from there on are this source's, for sendfile and
        SEEK_DATA; None where the bytes come from elsewhere or have to be looked at first."""

    def close(self) -> None:
        """Release what is held.  Idempotent; reads afterwards raise."""


class Verifiable(Protocol):
    """Bytes that are claimed until a digest of all of them was checked."""

    @property
    def digest(self) -> str | None:
        """What all bytes together have to be; None where nothing says so."""

    @property
    def verified(self) -> bool:
        """Whether what is read is known to be what the digest says."""

    @property
    def whole(self) -> bool:
        """Whether all of it has been fetched."""

    async def verify(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Fetch what is missing, and check the digest.  ``progress``: as in ``Access``.

        Raises IntegrityError where it is wrong, SourceError where bytes can't be had."""


@runtime_checkable
class VerifiableSource(Protocol):
    """The same for threads."""

    @property
    def verified(self) -> bool:
        """Whether what is read is known to be what the digest says."""

    @property
    def whole(self) -> bool:
        """Whether all of it has been fetched."""

    def verify(self) -> None:
        """Fetch what is missing, and check the digest.  Blocks; raises SourceError."""


class Hinted:
    """Capability: a source that can be told what will be read."""

    def will_need(self, offset: int, length: int) -> None:
        """A hint that a range is wanted soon.  Never blocks or raises; does nothing by default."""


class Near:
    """Capability: bytes that this machine has."""

    @property
    def blocking(self) -> Source | None:
        """The same bytes for worker threads, where that costs nothing; else None."""
        return None

    @property
    def backing(self) -> tuple[int, int] | None:
        """As for a Source.  May change from None to a value when a download is complete."""
        return None

    @property
    def quick(self) -> bool:
        """Whether ``blocking`` has lately answered within QUICK_NS, so that an event loop which has
        nothing else to do may as well wait for it."""
        return False


class Fetched:
    """Capability: bytes that came from elsewhere."""

    @property
    def pinned(self) -> SourceSpec | None:
        """A spec that names exactly these bytes, by digest; None where there is none."""
        return None

    @property
    def verifiable(self) -> Verifiable | None:
        """What can check these bytes by a digest of all of them; None where there is no digest."""
        return None

    async def forget(self, offset: int, length: int) -> bool:
        """Drop what a cache holds of a range: its bytes were found to be wrong.  True if reading it
        again may bring other bytes."""
        return False


class AsyncSource(Hinted, Near, Fetched, ABC):
    """Bytes to be read by trio tasks.  Derive from it: what a kind of source can't do besides reading
    has its answer here."""

    name: str  # how messages call this source; never holds a secret
    size: int  # bytes in all

    @abstractmethod
    def peek(self, offset: int, length: int) -> Buffer | None:
        """The bytes if they can be had without waiting.  May be called from any thread."""

    @abstractmethod
    async def read_at(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes.  A checkpoint; raises SourceError; cancellable."""

    @abstractmethod
    async def aclose(self) -> None:
        """Release what is held.  Idempotent."""

    def status(self) -> dict[str, Any]:
        """For people: ``name`` and ``size``; far sources add what was fetched and cached."""
        return {"name": self.name, "size": self.size}


class Wrapper(AsyncSource):
    """A source that shows another one, which it owns.  What is not overridden is the other one's."""

    def __init__(self, inner: AsyncSource) -> None:
        self.name = inner.name
        self.size = inner.size
        self.inner = inner

    def peek(self, offset: int, length: int) -> Buffer | None:
        return self.inner.peek(offset, length)

    async def read_at(self, offset: int, length: int) -> Buffer:
        return await self.inner.read_at(offset, length)

    async def aclose(self) -> None:
        await self.inner.aclose()

    def will_need(self, offset: int, length: int) -> None:
        self.inner.will_need(offset, length)

    @property
    def blocking(self) -> Source | None:
        return self.inner.blocking

    @property
    def backing(self) -> tuple[int, int] | None:
        return self.inner.backing

    @property
    def quick(self) -> bool:
        return self.inner.quick

    @property
    def pinned(self) -> SourceSpec | None:
        return self.inner.pinned

    @property
    def verifiable(self) -> Verifiable | None:
        return self.inner.verifiable

    def status(self) -> dict[str, Any]:
        return self.inner.status()

    async def forget(self, offset: int, length: int) -> bool:
        return await self.inner.forget(offset, length)


def hint(source: Source, offset: int, length: int) -> None:
    """Tell a blocking source that a range is wanted soon, if it has ``will_need``."""
    will_need = getattr(source, "will_need", None)
    if will_need is not None:
        will_need(offset, length)


def data_from(source: Source, offset: int) -> int:
    """Where a blocking source has its next bytes that may be other than zeros, from ``offset`` on;
    ``offset`` itself where the source has no ``data_from``."""
    look = getattr(source, "data_from", None)
    return offset if look is None else int(look(offset))


def within(size: int, offset: int, length: int) -> bool:
    """Whether ``[offset, offset + length)`` lies within ``size`` bytes."""
    return offset >= 0 and length >= 0 and offset + length <= size


def check_range(name: str, size: int, offset: int, length: int) -> None:
    """Raise TruncatedRead unless a range lies within ``size`` bytes."""
    if not within(size, offset, length):
        raise TruncatedRead(
            f"{name}: bytes {offset}..{offset + length} asked for, but it ends at {size}"
        )

"""The two interfaces for sources of bytes, and their contract.

- Ranges are half open: ``read_at(offset, length)`` is about ``[offset, offset + length)``.
- ``read_at`` returns exactly ``length`` bytes or raises; there is no cursor; calls may run
  concurrently, from any thread (``Source``) or task (``AsyncSource``).
- ``peek`` never blocks and never raises: it returns the bytes if they are in memory already, else
  None.  It may always return None.
- ``size`` is known from the start and does not change.

A ``Source`` is a protocol: any object with its members will do.  The functions ``hint`` and
``data_from`` call two optional members.  An ``AsyncSource`` is a base class: a subclass needs five
members, and capabilities have defaults; a ``Wrapper`` overrides what it changes.  tests/contract.py
checks the contract.
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
# the unit of fetching, storing and checking.  Requests cost far more than bytes: 64 of 32 KiB take 40
# times as long as one of 2 MiB
SEGMENT_BITS = 20
SEGMENT = 1 << SEGMENT_BITS
QUICK_NS = 300_000  # nanoseconds in which an SSD answers; handing a read to a thread costs a third


class NoRoom(SourceError):
    """A file system is full."""


class Source(Protocol):
    """Bytes to be read by threads."""

    @property
    def name(self) -> str:
        """The source's name in messages, such as a path or a URL.  Holds no secret."""

    @property
    def size(self) -> int:
        """The number of bytes."""

    def peek(self, offset: int, length: int) -> Buffer | None:
        """The bytes of a range if that needs no blocking; else None."""

    def read_at(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes; blocks.  Raises SourceError."""

    @property
    def backing(self) -> tuple[int, int] | None:
        """(descriptor, offset) of a file whose bytes from that offset on are this source's, for
        sendfile and SEEK_DATA; None if the bytes come from elsewhere or must be checked first."""

    def close(self) -> None:
        """Release all resources.  Idempotent; later reads raise."""


class Verifiable(Protocol):
    """Bytes that are claimed until their digest is checked."""

    @property
    def digest(self) -> str | None:
        """The digest that all bytes together must have; None if none is known."""

    @property
    def verified(self) -> bool:
        """Whether the bytes are known to match the digest."""

    @property
    def whole(self) -> bool:
        """Whether all bytes are known to have been fetched."""

    async def verify(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Fetch the missing bytes, and check the digest.  ``progress``: as in ``Access``.

        Raises IntegrityError if the bytes do not match the digest, SourceError if they can't be
        fetched."""


@runtime_checkable
class VerifiableSource(Protocol):
    """The same as Verifiable, for threads."""

    @property
    def verified(self) -> bool:
        """Whether the bytes are known to match the digest."""

    @property
    def whole(self) -> bool:
        """Whether all bytes are known to have been fetched."""

    def verify(self) -> None:
        """Fetch the missing bytes, and check the digest.  Blocks.  Raises SourceError."""


class Hinted:
    """Capability: a source that takes hints of later reads."""

    def will_need(self, offset: int, length: int) -> None:
        """A hint that a range is wanted soon.  Never blocks or raises; does nothing by default."""


class Near:
    """Capability: bytes that are on this machine."""

    @property
    def blocking(self) -> Source | None:
        """The same bytes as a Source for worker threads, if it exists already; else None."""
        return None

    @property
    def backing(self) -> tuple[int, int] | None:
        """As for a Source.  May change from None to a value when a download is complete."""
        return None

    @property
    def quick(self) -> bool:
        """Whether reads of ``blocking`` have lately taken less than QUICK_NS, so that an idle event
        loop may call it without a thread."""
        return False


class Fetched:
    """Capability: bytes that came from a server or an OCI layout."""

    @property
    def pinned(self) -> SourceSpec | None:
        """A spec that names exactly these bytes, by digest; None if there is none."""
        return None

    @property
    def verifiable(self) -> Verifiable | None:
        """The object that checks the digest of these bytes; None if they have no digest."""
        return None

    async def forget(self, offset: int, length: int) -> bool:
        """Drop the cached bytes of a range, which were found wrong.  True if reading the range again
        may bring other bytes."""
        return False


class AsyncSource(Hinted, Near, Fetched, ABC):
    """Bytes to be read by trio tasks.  Derive from it and override the capabilities that the source
    has; the defaults are for a source without them."""

    name: str  # the source's name in messages; holds no secret
    size: int  # bytes

    @abstractmethod
    def peek(self, offset: int, length: int) -> Buffer | None:
        """The bytes of a range if that needs no waiting; else None.  May be called from any thread."""

    @abstractmethod
    async def read_at(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes.  A checkpoint; raises SourceError; cancellable."""

    @abstractmethod
    async def aclose(self) -> None:
        """Release all resources.  Idempotent."""

    def status(self) -> dict[str, Any]:
        """The status for ``pyerofs mounts``: ``name`` and ``size``; remote sources add what was fetched
        and cached."""
        return {"name": self.name, "size": self.size}


class Wrapper(AsyncSource):
    """An AsyncSource over another one, which it owns.  Members that a subclass does not override are
    those of the other source."""

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
    """The first offset, from ``offset`` on, at which a blocking source may have bytes other than zeros;
    ``offset`` itself if the source has no ``data_from``."""
    look = getattr(source, "data_from", None)
    return offset if look is None else int(look(offset))


def within(size: int, offset: int, length: int) -> bool:
    """Whether ``[offset, offset + length)`` lies within ``size`` bytes."""
    return offset >= 0 and length >= 0 and offset + length <= size


def check_range(name: str, size: int, offset: int, length: int) -> None:
    """Raise TruncatedRead unless a range lies within ``size`` bytes."""
    if not within(size, offset, length):
        raise TruncatedRead(
            f"{name}: bytes {offset}..{offset + length} requested, but the source ends at {size}"
        )

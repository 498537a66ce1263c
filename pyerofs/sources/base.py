"""The two protocols that every source of bytes follows, and their contract.

- Ranges are half open: ``read_at(offset, length)`` is about ``[offset, offset + length)``.
- ``read_at`` returns exactly ``length`` bytes or raises; there is no cursor; calls may run
  concurrently, from any thread (``Source``) or task (``AsyncSource``).
- ``peek`` never blocks: the bytes if they are in memory already, otherwise None.  It may always
  answer None, and it answers None rather than report an error.
- ``size`` is known from the start and does not change.

This module imports only ``pyerofs.errors`` and names types.
"""

from __future__ import annotations

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


class AsyncSource(Protocol):
    """Bytes to be read by trio tasks."""

    @property
    def name(self) -> str:
        """How messages call this source."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    def peek(self, offset: int, length: int) -> Buffer | None:
        """The bytes if they can be had without waiting."""

    def will_need(self, offset: int, length: int) -> None:
        """A hint that a range is wanted soon.  Never blocks or raises; may do nothing."""

    @property
    def blocking(self) -> Source | None:
        """The same bytes for worker threads, where that costs nothing; else None."""

    @property
    def backing(self) -> tuple[int, int] | None:
        """As for a Source.  May change from None to a value when a download is complete."""

    @property
    def quick(self) -> bool:
        """Whether ``blocking`` has lately answered within QUICK_NS, so that an event loop which has
        nothing else to do may as well wait for it."""

    @property
    def pinned(self) -> SourceSpec | None:
        """The same bytes by a name that can't come to mean others; None where there is no such."""

    def status(self) -> dict[str, Any]:
        """For people: ``name`` and ``size``; remote sources tell what was fetched and cached."""

    async def read_at(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes.  A checkpoint; raises SourceError; cancellable."""

    async def forget(self, offset: int, length: int) -> bool:
        """Told that what was read here is wrong.  True if reading it again may bring other bytes:
        what a cache held is dropped."""

    async def aclose(self) -> None:
        """Release what is held.  Idempotent."""


@runtime_checkable
class Verifiable(Protocol):
    """A source whose bytes are claimed until a digest of all of them was checked."""

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


def verifiable(source: AsyncSource) -> Verifiable | None:
    """What of a source, below what only shows a part of it, can check a digest."""
    while (inner := getattr(source, "inner", None)) is not None:
        source = inner
    return source if isinstance(source, Verifiable) and source.digest is not None else None


def within(size: int, offset: int, length: int) -> bool:
    """Whether ``[offset, offset + length)`` lies within ``size`` bytes."""
    return offset >= 0 and length >= 0 and offset + length <= size


def check_range(name: str, size: int, offset: int, length: int) -> None:
    """Raise TruncatedRead unless a range lies within ``size`` bytes."""
    if not within(size, offset, length):
        raise TruncatedRead(
            f"{name}: bytes {offset}..{offset + length} asked for, but it ends at {size}"
        )

"""Layers that are one zstd stream: decompressed while fetched, into the cache or an unnamed file.

A plain zstd stream can only be read from its start, so these layers are never fetched in parts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import BinaryIO, cast

import trio

from pyerofs.errors import IntegrityError, SourceError
from pyerofs.sources.base import NoRoom
from pyerofs.sources.cache.cachedir import CacheDir, temporary_file
from pyerofs.sources.cache.fetcher import Remote
from pyerofs.sources.net.transport import Pace
from pyerofs.sources.oci.manifest import Descriptor
from pyerofs.sources.spec import Access

PIECE = 1 << 20
MAX_WINDOW = 1 << 27  # of a zstd stream: what the format's own tools accept by default


class Unpacker:
    """Decompresses a stream, piece by piece, into a file, and computes both digests."""

    def __init__(
        self, fd: int, algorithms: tuple[str, str], name: str, room: Callable[[int], bool]
    ) -> None:
        """``algorithms``: of the digests before and after decompression.  ``room``: whether this
        number of further bytes may be written."""
        import zstandard

        self.size = 0
        self._name = name
        self._room = room
        self.before = hashlib.new(algorithms[0])
        self.after = hashlib.new(algorithms[1])
        self._fd = fd
        self._error = zstandard.ZstdError
        # a stream_writer emits its output piece by piece: a small input may expand to gigabytes
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._zstd = decompressor.stream_writer(cast(BinaryIO, self))

    def feed(self, data: bytes) -> None:
        """Decompress a piece.  Blocks.  Raises SourceError."""
        self.before.update(data)
        try:
            self._zstd.write(data)
        except self._error as e:
            raise IntegrityError(f"{self._name}: is no zstd stream ({e})") from None

    def write(self, data: bytes) -> int:
        """Called by the decompressor with its output.  Raises SourceError."""
        if not self._room(len(data)):
            raise SourceError(f"{self._name}: unpacks to more than may be kept (--cache-limit)")
        self.after.update(data)
        out = memoryview(data)
        try:
            while out:
                n = os.pwrite(self._fd, out, self.size)
                self.size += n
                out = out[n:]
        except OSError as e:
            raise NoRoom(f"{self._name}: can't be unpacked: {e.strerror}") from None
        return len(data)


async def unpack(
    blob: Remote,
    layer: Descriptor,
    diff_id: str | None,
    cache: CacheDir | None,
    access: Access,
) -> tuple[int, int]:
    """Decompress a layer into an unnamed file, in the cache if there is one; returns its descriptor
    and length.

    Both digests are verified (``diff_id`` is None if the image does not state it).  At most
    ``access.cache_limit`` bytes; continues as long as data arrives.  Raises SourceError."""
    fd = temporary_file(cache)
    before, after = layer.digest.partition(":")[0], (diff_id or "sha256:").partition(":")[0]
    try:
        room = cache.spool_room if cache is not None else _at_most(access.cache_limit)
        unpacker = Unpacker(fd, (before, after), blob.name, room)
        pace = Pace(access.timeout)
        done = 0
        with pace.scope:
            async with (
                aclosing(blob.stream(0, layer.size, pace)) as chunks,
                aclosing(_gathered(chunks, blob.name)) as pieces,
            ):
                async for piece in pieces:
                    await trio.to_thread.run_sync(unpacker.feed, piece)
                    done += len(piece)
                    pace.advance(len(piece))
                    if access.progress is not None:
                        access.progress(blob.name, done, layer.size)
        if pace.scope.cancelled_caught:
            raise SourceError(f"{blob.name}: nothing more came within {access.timeout:g} seconds")
        if f"{before}:{unpacker.before.hexdigest()}" != layer.digest:
            raise IntegrityError(f"{blob.name}: is not what its digest says")
        if diff_id is not None and f"{after}:{unpacker.after.hexdigest()}" != diff_id:
            raise IntegrityError(f"{blob.name}: unpacked, it does not have the digest {diff_id}")
        return fd, unpacker.size
    except BaseException:
        os.close(fd)
        raise


def _at_most(limit: int) -> Callable[[int], bool]:
    """A ``room`` that grants ``limit`` bytes in all."""
    left = limit

    def room(n: int) -> bool:
        nonlocal left
        left -= n
        return left >= 0

    return room


async def _gathered(
    chunks: AsyncIterator[tuple[int, bytes]], name: str
) -> AsyncGenerator[bytes, None]:
    """Join chunks to larger pieces, which are worth a thread; bytes sent twice are left out."""
    buffer = bytearray()
    at = 0
    async for offset, chunk in chunks:
        if offset > at:
            raise SourceError(f"{name}: its bytes come in no order")
        fresh = chunk[at - offset :] if offset < at else chunk
        buffer += fresh
        at += len(fresh)
        if len(buffer) >= PIECE:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)

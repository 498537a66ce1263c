"""Android sparse images, read in place: chunks of raw data, of a repeated word, or without content.

A header is followed by chunks, each with a header of its own: raw data, a pattern of four bytes that
fills the chunk, "don't care" blocks (zeros here), or a checksum.  Checksums are ignored: they cover
all bytes before them, but only parts are read.  (Android's libsparse, sparse_format.h.)
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections.abc import Generator, Iterator

from pyerofs.errors import SourceError
from pyerofs.sources.base import Buffer, Source, check_range, within

MAGIC = b"\x3a\xff\x26\xed"
_HEADER = struct.Struct("<4s4H4I")  # magic, major, minor, sizes of both headers, block size, counts
_CHUNK = struct.Struct("<HHII")  # type, reserved, blocks, bytes with this header
RAW, FILL, DONT_CARE, CRC32 = range(0xCAC1, 0xCAC5)
MAX_BLOCK = 64 << 20  # bytes; far more than any real image has
WINDOW = 64 << 10  # bytes per read of headers that lie close together
HOLE = -1

Piece = tuple[int, int, bytes]  # length; offset in the file, or HOLE; fill pattern


class Table:
    """Maps the image's bytes to the file's.  Made by ``parse``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.size = 0  # bytes of the image
        self._starts = array("Q")  # of chunks, in the image
        self._places = array("q")  # of their data in the file, or HOLE
        self._words = array("I")  # the pattern of chunks without data
        self.raw = 0  # bytes that have data

    def add(self, length: int, place: int, word: int = 0) -> None:
        """Append a chunk.  Consecutive holes or equal patterns are merged."""
        if place != HOLE or not self._starts or (self._places[-1], self._words[-1]) != (HOLE, word):
            self._starts.append(self.size)
            self._places.append(place)
            self._words.append(word)
        self.size += length

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """The pieces that a range consists of."""
        number = bisect_right(self._starts, offset) - 1
        while length:
            start, place = self._starts[number], self._places[number]
            end = self._starts[number + 1] if number + 1 < len(self._starts) else self.size
            n = min(end - offset, length)
            if place == HOLE:
                word = struct.pack("<I", self._words[number])
                skip = (offset - start) % 4
                yield n, HOLE, word[skip:] + word[:skip]
            else:
                yield n, place + offset - start, b""
            offset += n
            length -= n
            number += 1


def parse(name: str, file_size: int) -> Generator[tuple[int, int], Buffer, Table]:
    """A generator that yields each (offset, length) to read, is sent the bytes, and returns the table.

    Raises SourceError if the headers contradict each other or the file."""

    def wrong(what: str) -> SourceError:
        return SourceError(f"{name}: is a damaged Android sparse image: {what}")

    if file_size < _HEADER.size:
        raise wrong("it ends within its header")
    head = yield 0, _HEADER.size
    _, major, _, head_size, chunk_size, block, blocks, chunks, _ = _HEADER.unpack(head)
    if major != 1 or head_size < _HEADER.size or chunk_size < _CHUNK.size:
        raise wrong(f"version {major}, headers of {head_size} and {chunk_size} bytes")
    if not block or block % 4 or block > MAX_BLOCK:
        raise wrong(f"blocks of {block} bytes")
    if head_size + chunks * chunk_size > file_size:
        raise wrong(f"{chunks} chunks do not fit in {file_size} bytes")
    table = Table(name)
    at = head_size
    window, window_at = memoryview(b""), 0
    for number in range(chunks):
        if at + chunk_size > file_size:
            raise wrong(f"it ends before chunk {number} of {chunks}")
        if not window_at <= at <= window_at + len(window) - _CHUNK.size - 4:
            window_at = at
            window = memoryview((yield at, min(WINDOW, file_size - at)))
        kind, _, count, total = _CHUNK.unpack_from(window, at - window_at)
        data, length = total - chunk_size, count * block
        if data != {RAW: length, FILL: 4, DONT_CARE: 0, CRC32: 4}.get(kind, -1):
            raise wrong(f"chunk {number} is of type {kind:#x}, {count} blocks and {total} bytes")
        if at + total > file_size:
            raise wrong(f"it ends within chunk {number} of {chunks}")
        if kind == RAW:
            table.add(length, at + chunk_size)
            table.raw += length
        elif kind == FILL:
            word_at = at + chunk_size - window_at
            if word_at + 4 > len(window):
                window_at, word_at = at, chunk_size
                window = memoryview((yield at, min(max(WINDOW, total), file_size - at)))
            table.add(length, HOLE, int.from_bytes(window[word_at : word_at + 4], "little"))
        elif kind == DONT_CARE:
            table.add(length, HOLE)
        at += total
    if table.size != blocks * block:
        raise wrong(f"its chunks have {table.size // block} blocks, not {blocks}")
    if not table.size:
        raise wrong("it has no blocks")
    return table


class SparseSource:
    """The image that a sparse image encodes.  Owns ``inner``."""

    backing = None  # the file's bytes are not the image's

    def __init__(self, inner: Source) -> None:
        """Read the headers.  Raises SourceError if they are invalid."""
        steps = parse(inner.name, inner.size)
        try:
            wanted = next(steps)
            while True:
                wanted = steps.send(inner.read_at(*wanted))
        except StopIteration as e:
            self._table: Table = e.value
        self.name = inner.name
        self.size = self._table.size
        self._inner = inner

    def peek(self, offset: int, length: int) -> Buffer | None:
        if length <= 0 or not within(self.size, offset, length):
            return None
        found = []
        for n, place, pattern in self._table.pieces(offset, length):
            data = _filled(n, pattern) if place == HOLE else self._inner.peek(place, n)
            if data is None:
                return None
            found.append(data)
        return found[0] if len(found) == 1 else b"".join(found)

    def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        found = [
            _filled(n, pattern) if place == HOLE else self._inner.read_at(place, n)
            for n, place, pattern in self._table.pieces(offset, length)
        ]
        return found[0] if len(found) == 1 else b"".join(found)

    def will_need(self, offset: int, length: int) -> None:
        """Pass a hint on for the pieces that have data."""
        hint = getattr(self._inner, "will_need", None)
        if hint is not None and within(self.size, offset, length):
            for n, place, _ in self._table.pieces(offset, length):
                if place != HOLE:
                    hint(place, n)

    def data_from(self, offset: int) -> int:
        """The next offset at which bytes may not be zero; the size if there is none."""
        at = offset
        while at < self.size:
            n, place, pattern = next(self._table.pieces(at, self.size - at))
            if place != HOLE or pattern.strip(b"\0"):
                break
            at += n
        return at

    def close(self) -> None:
        self._inner.close()


def _filled(length: int, pattern: bytes) -> bytes:
    if not pattern.strip(b"\0"):
        return bytes(length)
    return (pattern * (length // 4 + 1))[:length]


def unsparsed(source: Source) -> Source:
    """The source itself, or if it is a sparse image, the image that it encodes.  Raises SourceError,
    with the source closed."""
    try:
        if source.size >= len(MAGIC) and bytes(source.read_at(0, len(MAGIC))) == MAGIC:
            return SparseSource(source)
        return source
    except BaseException:
        source.close()
        raise

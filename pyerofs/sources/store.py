"""Where fetched segments are kept: on disk for all processes, or in memory for this one.

A blob on disk is two files.  ``KEY.data`` is as large as the blob and sparse.  ``KEY.map`` is a header,
then eight bytes for each segment of 1 MiB: a mark that it is there, and its CRC-32.  Data is written
before the mark; a reader checks the CRC the first time it meets a segment.  So whatever a crash, a full
disk or another process leaves behind is never taken for what was fetched.

Nothing is ever truncated or punched out under a reader: a blob goes by unlinking, and only while
nobody holds the shared lock on its map that each user takes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

from pyerofs.errors import SourceError
from pyerofs.sources.base import Buffer
from pyerofs.sources.file import FileSource

# requests cost far more than bytes: 64 of 32 KiB take 40 times as long as one of 2 MiB
SEGMENT_BITS = 20
SEGMENT = 1 << SEGMENT_BITS
MEMORY_SEGMENTS = 64  # kept by a MemoryStore

MAP_MAGIC = b"PYEROFSM"
_HEADER = struct.Struct("<8sIIQI")  # magic, version, segment size, blob size, state
HEADER_SIZE = 4096
VERSION = 1
STATE_OFFSET = 24
FILLING, COMPLETE, BAD = range(3)
_MARK = struct.Struct("<II")  # PRESENT, CRC-32
PRESENT = 0x50524553

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid


def _checksum() -> Callable[[Buffer], int]:
    """CRC-32; isal's is ten times as fast as zlib's."""
    try:
        from isal.isal_zlib import crc32
    except ImportError:
        return zlib.crc32
    return cast(Callable[[Buffer], int], crc32)


def segments_of(size: int) -> int:
    """How many segments a blob has."""
    return (size + SEGMENT - 1) >> SEGMENT_BITS


class Store(Protocol):
    """Keeps segments of one blob."""

    size: int

    def peek(self, offset: int, length: int) -> Buffer | None:
        """A range if that takes no waiting."""

    def read(self, offset: int, length: int) -> Buffer | None:
        """A range, checked; None if some of it is not there (any more).  May block."""

    def present(self) -> int:
        """How many segments are there."""

    def missing(self, first: int, last: int) -> list[int]:
        """Which of these segments (``last`` included) are not there."""

    def put(self, number: int, data: Buffer) -> None:
        """Keep a segment.  May block.  Raises OSError where there is no room."""

    def forget(self, number: int) -> None:
        """Drop a segment that turned out wrong."""

    @property
    def complete(self) -> bool:
        """Whether everything is there, and was found to be right."""

    def close(self) -> None:
        """Let go of it."""


class MemoryStore:
    """The segments used last, at most ``capacity`` of them."""

    complete = False

    def __init__(self, size: int, capacity: int = MEMORY_SEGMENTS) -> None:
        self.size = size
        self._capacity = capacity
        self._segments: OrderedDict[int, Buffer] = OrderedDict()
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

    read = peek

    def present(self) -> int:
        return len(self._segments)

    def missing(self, first: int, last: int) -> list[int]:
        return [n for n in range(first, last + 1) if n not in self._segments]

    def put(self, number: int, data: Buffer) -> None:
        with self._lock:
            self._segments[number] = data
            while len(self._segments) > self._capacity:
                self._segments.popitem(last=False)

    def forget(self, number: int) -> None:
        with self._lock:
            self._segments.pop(number, None)

    def close(self) -> None:
        self._segments.clear()


class DiskStore:
    """One blob's pair of files.  Thread-safe; shared with other processes."""

    def __init__(self, path: str, size: int, about: dict[str, Any]) -> None:
        """Open or make ``path``.data and ``path``.map.  ``about``: for people who list the cache.

        Raises OSError; SourceError where there is a blob of another size."""
        self.path = path
        self.size = size
        self.count = segments_of(size)
        self._checksum = _checksum()
        self._seen = bytearray(self.count)  # 1: there, and its checksum was right
        self._unseen = self.count
        self._lock = threading.Lock()
        self._map = _open_map(path, size, about)
        try:
            self._fd = os.open(path + ".data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(self._fd).st_size != size:
                    os.ftruncate(self._fd, size)
                self._file = FileSource(os.dup(self._fd), name=path + ".data")
            except BaseException:
                os.close(self._fd)
                raise
        except BaseException:
            os.close(self._map)
            raise
        self._state = self._read_state()
        self._recent: tuple[int, int, Buffer] = (0, 0, b"")  # the range that was checked last

    @property
    def state(self) -> int:
        """FILLING, COMPLETE or BAD."""
        return self._state

    @property
    def complete(self) -> bool:
        return self._state == COMPLETE

    @property
    def backing(self) -> tuple[int, int] | None:
        """The data file, once this process has checked all of it."""
        return (self._fd, 0) if self.complete and not self._unseen else None

    def _read_state(self) -> int:
        return int(_HEADER.unpack(os.pread(self._map, _HEADER.size, 0))[4])

    def set_state(self, state: int) -> None:
        """Tell all processes."""
        self._state = state
        os.pwrite(self._map, struct.pack("<I", state), STATE_OFFSET)

    def _mark(self, number: int) -> int | None:
        """The checksum that a segment must have, or None if it is not there."""
        found = os.pread(self._map, _MARK.size, HEADER_SIZE + number * _MARK.size)
        if len(found) < _MARK.size:
            return None
        mark, checksum = _MARK.unpack(found)
        return int(checksum) if mark == PRESENT else None

    def present(self) -> int:
        """How many segments are marked, whether right or not."""
        marks = os.pread(self._map, self.count * _MARK.size, HEADER_SIZE)
        return marks[:: _MARK.size].count(PRESENT & 0xFF)

    def extent(self, number: int) -> tuple[int, int]:
        """Offset and length of a segment."""
        start = number << SEGMENT_BITS
        return start, min(SEGMENT, self.size - start)

    def peek(self, offset: int, length: int) -> Buffer | None:
        if length <= 0 or offset < 0 or offset + length > self.size or self._state == BAD:
            return None
        start, end, recent = self._recent
        if start <= offset and offset + length <= end:
            return memoryview(recent)[offset - start : offset - start + length]
        seen = self._seen
        if self._unseen:
            for number in range(offset >> SEGMENT_BITS, (offset + length - 1 >> SEGMENT_BITS) + 1):
                if not seen[number]:
                    return None
        return self._file.peek(offset, length)

    def segment(self, number: int) -> Buffer | None:
        """A whole segment, checked; None if it is not there (any more).  Blocks."""
        offset, length = self.extent(number)
        data = bytearray(length)
        if not self._check_into(number, data):
            return None
        self._recent = (offset, offset + length, data)
        return data

    def check(self, numbers: list[int]) -> None:
        """Look at segments that nobody wants yet, so that they can be peeked at.  Blocks."""
        buffer = bytearray(SEGMENT)  # one for all: fresh memory costs as much as reading
        for number in numbers:
            if not self._seen[number]:
                self._check_into(number, memoryview(buffer)[: self.extent(number)[1]])

    def _check_into(self, number: int, buffer: bytearray | memoryview) -> bool:
        """Read a segment; whether it is what was stored.  One that is not is forgotten."""
        checksum = self._mark(number)
        if checksum is None:
            return False
        if self._read_state() == BAD:
            self._state = BAD
            return False
        offset = number << SEGMENT_BITS
        try:
            read = os.preadv(self._fd, [buffer], offset)
        except OSError:
            read = -1  # what the disk can't give back may still be had from afar
        if read != len(buffer) or self._checksum(buffer) != checksum:
            self.forget(number)
            return False
        self._saw(number, 1)
        return True

    def _saw(self, number: int, now: int) -> None:
        with self._lock:
            self._unseen += self._seen[number] - now
            self._seen[number] = now

    def read(self, offset: int, length: int) -> Buffer | None:
        first, last = offset >> SEGMENT_BITS, offset + length - 1 >> SEGMENT_BITS
        for number in range(first, last + 1):
            if not self._seen[number] and self.segment(number) is None:
                return None
        if self._state == BAD:
            return None
        start, end, recent = self._recent
        if start <= offset and offset + length <= end:
            return memoryview(recent)[offset - start : offset - start + length]
        try:
            return self._file.read_at(offset, length)
        except SourceError:
            return None

    def missing(self, first: int, last: int) -> list[int]:
        return [n for n in range(first, last + 1) if not self._seen[n] and self._mark(n) is None]

    def unchecked(self, first: int, last: int) -> list[int]:
        """Which of these segments this process has not looked at yet."""
        return [n for n in range(first, last + 1) if not self._seen[n]]

    def put(self, number: int, data: Buffer) -> None:
        offset, length = self.extent(number)
        assert len(data) == length
        checksum = self._checksum(data)
        view = memoryview(data)
        while view:
            n = os.pwrite(self._fd, view, offset)
            if n == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            view = view[n:]
            offset += n
        os.pwrite(self._map, _MARK.pack(PRESENT, checksum), HEADER_SIZE + number * _MARK.size)
        self._saw(number, 1)

    def forget(self, number: int) -> None:
        os.pwrite(self._map, bytes(_MARK.size), HEADER_SIZE + number * _MARK.size)
        if self._state == COMPLETE:
            self.set_state(FILLING)
        self._recent = (0, 0, b"")
        self._saw(number, 0)

    @contextmanager
    def claimed(self, first: int, last: int) -> Iterator[bool]:
        """Hold a lock against other processes on segments that are about to be fetched; gives False
        at once where another one holds some of them."""
        start, length = first << SEGMENT_BITS, (last - first + 1) << SEGMENT_BITS
        try:
            _lock(self._fd, fcntl.F_WRLCK, start, length)
        except BlockingIOError:
            yield False
            return
        except OSError:
            yield True  # a file system without locks: at worst something is fetched twice
            return
        try:
            yield True
        finally:
            _lock(self._fd, fcntl.F_UNLCK, start, length)

    def sync(self) -> None:
        """Have the data on the disk.  Blocks."""
        os.fdatasync(self._fd)

    def discard(self) -> None:
        """Tell everybody that the blob is wrong, and unlink it."""
        self.set_state(BAD)
        _unlink_same(self.path + ".data", self._fd)
        _unlink_same(self.path + ".map", self._map)

    def close(self) -> None:
        """Let go; idempotent."""
        if self._map >= 0:
            self._file.close()
            os.close(self._fd)
            os.close(self._map)
            self._map = self._fd = -1


def _lock(fd: int, kind: int, start: int, length: int) -> None:
    """A byte-range lock that belongs to the descriptor, not to the process."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def _open_map(path: str, size: int, about: dict[str, Any]) -> int:
    """The map's descriptor, locked against eviction."""
    while True:
        fd = os.open(path + ".map", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass  # somebody uses it already, or is about to: it will be whole
            else:
                _initialise(fd, size, about)
            fcntl.flock(fd, fcntl.LOCK_SH)
            header = os.pread(fd, _HEADER.size, 0)
            if os.fstat(fd).st_nlink and len(header) == _HEADER.size and not _is_bad(header):
                _check_header(header, path, size)
                os.utime(fd)  # the time of its last use, for eviction
                return fd
            # evicted or discarded in between, or whoever made it has died: once more
            _unlink_same(path + ".map", fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _initialise(fd: int, size: int, about: dict[str, Any]) -> None:
    """Write the header of a map that is new, or torn; nobody else uses it."""
    found = os.pread(fd, _HEADER.size, 0)
    if len(found) == _HEADER.size and found[:8] == MAP_MAGIC:
        return
    os.ftruncate(fd, 0)
    text = json.dumps(about | {"since": int(time.time())}).encode()
    room = HEADER_SIZE - _HEADER.size
    os.pwrite(fd, (text if len(text) < room else b"{}").ljust(room), _HEADER.size)
    os.pwrite(fd, _HEADER.pack(MAP_MAGIC, VERSION, SEGMENT, size, FILLING), 0)


def _check_header(header: bytes, path: str, size: int) -> None:
    """Raise SourceError where a map is not what we would have made."""
    _, version, segment, known, _ = _HEADER.unpack(header)
    if (version, segment) != (VERSION, SEGMENT):
        raise SourceError(
            f"{path}.map: made by another version of pyerofs; `pyerofs cache rm` helps"
        )
    if known != size:
        raise SourceError(f"{path}.map: is for {known} bytes, not {size}; `pyerofs cache rm` helps")


def _is_bad(header: bytes) -> bool:
    return len(header) == _HEADER.size and _HEADER.unpack(header)[4] == BAD


def _unlink_same(path: str, fd: int) -> None:
    """Unlink a file if it is still the one that is open."""
    try:
        if os.path.samestat(os.stat(path), os.fstat(fd)):
            os.unlink(path)
    except OSError:
        pass


def read_header(path: str) -> tuple[int, int, dict[str, Any]] | None:
    """(size, state, about) of a map file, or None if it is none."""
    try:
        with open(path, "rb") as f:
            head = f.read(HEADER_SIZE)
        magic, _, _, size, state = _HEADER.unpack_from(head)
        about = json.loads(head[_HEADER.size :].rstrip(b"\0 ") or b"{}")
    except (OSError, ValueError, struct.error):
        return None
    return (size, state, about) if magic == MAP_MAGIC and isinstance(about, dict) else None

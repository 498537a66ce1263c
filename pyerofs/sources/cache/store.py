"""Fetched segments on disk, for all processes.

A blob is two files (``blobfiles``): its data, and a map that marks the segments that are there and
has the CRC-32 of each.  Data is written before its mark, and a process checks the CRC of a segment
before it uses the segment for the first time.  So whatever a crash, a full disk or another process
leaves behind is never taken for what was fetched.

The CRC tells damage, not deceit.  A blob is first *claimed*: filled with what its server sent.  One
whose digest was found right over a whole pass becomes *verified*: nothing is ever added to it again,
it can only lose segments that turn out damaged.  ``Claimed.settle`` makes that step; while it looks,
and ever after, ``put`` is refused to everybody who still has the blob open.

Nothing is ever truncated or punched out under a reader: a blob goes by unlinking, and only while
nobody holds the shared lock on its map that each user takes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyerofs.errors import SourceError
from pyerofs.sources.base import SEGMENT, SEGMENT_BITS, Buffer
from pyerofs.sources.cache.blobfiles import (
    BAD,
    COMPLETE,
    FILLING,
    HEADER_SIZE,
    MARK,
    NO_LOCKS,
    PRESENT,
    STATE,
    STATE_OFFSET,
    checksum_function,
    extent_of,
    lock,
    lock_names,
    move_pair,
    open_existing,
    open_map,
    parse_header,
    segments_of,
    unlink_pair,
    write_header,
)
from pyerofs.sources.local.file import FileSource
from pyerofs.system.private import PrivateDirectory, Untrusted


class DiskStore:
    """One blob's pair of files, for reading.  Thread-safe; shared with other processes."""

    def __init__(self, folder: PrivateDirectory, name: str, map_fd: int, size: int) -> None:
        """Takes over ``map_fd``, on which the shared lock is held.  Raises OSError."""
        self.folder = folder
        self.name = name
        self.size = size
        self.count = segments_of(size)
        self._map = map_fd
        self._fd = -1
        self._checksum = checksum_function()
        # 1: there, and its checksum was right; the kernel gives pages as they are written to
        self._seen = mmap.mmap(-1, max(self.count, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._unseen = self.count
        self._lock = threading.Lock()
        self._recent: tuple[int, int, Buffer] = (0, 0, b"")  # the range that was checked last
        try:
            self._fd = folder.open_file(f"{name}.data", os.O_RDWR | os.O_CREAT)
            if os.fstat(self._fd).st_size != size:
                os.ftruncate(self._fd, size)
            self._file = FileSource(os.dup(self._fd), name=os.path.join(folder.path, name))
            self._state = self._read_state()
        except BaseException:
            self._close_descriptors()
            raise

    @property
    def state(self) -> int:
        """FILLING, COMPLETE or BAD, as last seen."""
        return self._state

    @property
    def complete(self) -> bool:
        """Whether all of it is here and was found right."""
        return self._state == COMPLETE

    @property
    def backing(self) -> tuple[int, int] | None:
        """The data file, once this process has checked all of it."""
        return (self._fd, 0) if self.complete and not self._unseen else None

    def _read_state(self) -> int:
        return int(STATE.unpack(os.pread(self._map, STATE.size, STATE_OFFSET))[0])

    def _set_state(self, state: int) -> None:
        """Tell all processes."""
        self._state = state
        os.pwrite(self._map, STATE.pack(state), STATE_OFFSET)

    def _mark(self, number: int) -> int | None:
        """The checksum that a segment must have, or None if it is not there."""
        found = os.pread(self._map, MARK.size, HEADER_SIZE + number * MARK.size)
        if len(found) < MARK.size:
            return None
        mark, checksum = MARK.unpack(found)
        return int(checksum) if mark == PRESENT else None

    def present(self) -> int:
        """How many segments are marked, whether right or not.  Reads what is not a hole of the map."""
        found = 0
        at, end = HEADER_SIZE, HEADER_SIZE + self.count * MARK.size
        while at < end:
            try:
                at = max(at, os.lseek(self._map, at, os.SEEK_DATA) // MARK.size * MARK.size)
            except OSError:
                break  # only holes from here on
            marks = os.pread(self._map, min(SEGMENT, end - at), at)
            if not marks:
                break
            found += marks[:: MARK.size].count(PRESENT & 0xFF)
            at += SEGMENT
        return found

    def peek(self, offset: int, length: int) -> Buffer | None:
        """A range if that takes no waiting."""
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
        offset, length = extent_of(self.size, number)
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
                self._check_into(number, memoryview(buffer)[: extent_of(self.size, number)[1]])

    def _check_into(self, number: int, buffer: bytearray | memoryview) -> bool:
        """Read a segment; whether it is what was stored.  One that is not is forgotten."""
        checksum = self._mark(number)
        if checksum is None:
            return False
        if self._read_state() == BAD:
            self._state = BAD
            return False
        try:
            read = os.preadv(self._fd, [buffer], number << SEGMENT_BITS)
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
        """A range, checked; None if some of it is not there (any more).  Blocks."""
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

    def has(self, number: int) -> bool:
        """Whether a segment is there, right or not."""
        return bool(self._seen[number]) or self._mark(number) is not None

    def unchecked(self, first: int, last: int) -> list[int]:
        """Which of these segments this process has not looked at yet."""
        return [n for n in range(first, last + 1) if not self._seen[n]]

    def forget(self, number: int) -> None:
        """Drop a segment that turned out wrong."""
        os.pwrite(self._map, bytes(MARK.size), HEADER_SIZE + number * MARK.size)
        self._recent = (0, 0, b"")
        self._saw(number, 0)

    def close(self) -> None:
        """Let go; idempotent."""
        if self._map >= 0:
            self._file.close()
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        for fd in (self._fd, self._map):
            if fd >= 0:
                os.close(fd)
        self._map = self._fd = -1


class Verified(DiskStore):
    """A blob whose digest was checked over a whole pass.  It can lose segments, never gain any."""

    @classmethod
    def open(cls, folder: PrivateDirectory, name: str) -> Verified | None:
        """The blob of that name; None if there is none, or what is there can't be believed.

        Raises OSError."""
        map_fd = open_existing(folder, name)
        if map_fd is None:
            return None
        try:
            header = parse_header(os.pread(map_fd, HEADER_SIZE, 0))
            if header is None or header[1] != COMPLETE:
                folder.unlink_same(f"{name}.map", map_fd)
                os.close(map_fd)
                return None
            os.utime(map_fd)  # the time of its last use, for eviction
        except BaseException:
            os.close(map_fd)
            raise
        try:
            return cls(folder, name, map_fd, header[0])
        except Untrusted:  # something else in the place of its data
            unlink_pair(folder, name)
            return None

    @property
    def complete(self) -> bool:
        return self._state == COMPLETE and self._whole

    def __init__(self, folder: PrivateDirectory, name: str, map_fd: int, size: int) -> None:
        super().__init__(folder, name, map_fd, size)
        self._whole = self.present() == self.count

    def forget(self, number: int) -> None:
        super().forget(number)
        self._whole = False


class Claimed(DiskStore):
    """A blob as its server claims it to be.  Several processes may fill it together."""

    def __init__(
        self,
        folder: PrivateDirectory,
        name: str,
        size: int,
        about: dict[str, Any],
        *,
        vouched: bool,
    ) -> None:
        """Open or make it.  ``about``: for people who list the cache.  ``vouched``: there is a digest
        that can tell whether it is right.  Raises OSError."""
        self.about = about
        self._vouched = vouched
        self._writers = 0  # threads of this process that write; they share one lock
        map_fd = open_map(folder, name, size, about)
        super().__init__(folder, name, map_fd, size)
        lock_names(map_fd, fcntl.F_UNLCK)  # which ``open_map`` has locked

    def put(self, number: int, data: Buffer) -> None:
        """Keep a segment.  Blocks.  Raises OSError where there is no room, or where the blob must not
        change any more."""
        offset, length = extent_of(self.size, number)
        assert len(data) == length
        checksum = self._checksum(data)
        view = memoryview(data)
        with self._writing():
            while view:
                n = os.pwrite(self._fd, view, offset)
                if n == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                view = view[n:]
                offset += n
            os.pwrite(self._map, MARK.pack(PRESENT, checksum), HEADER_SIZE + number * MARK.size)
        self._saw(number, 1)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the lock that keeps ``settle`` from looking.  Raises OSError where it is looking, or has
        settled what the blob is."""
        with self._lock:
            if not self._writers:
                self._lock_header(fcntl.F_RDLCK)
                if self._read_state() != FILLING:
                    self._lock_header(fcntl.F_UNLCK)
                    raise OSError(errno.EROFS, "the blob is settled")
            self._writers += 1
        try:
            yield
        finally:
            with self._lock:
                self._writers -= 1
                if not self._writers:
                    self._lock_header(fcntl.F_UNLCK)

    def _lock_header(self, kind: int) -> bool:
        """Whether the lock was got (True) or the file system has none.  Raises BlockingIOError."""
        try:
            lock(self._map, kind, 0, 1)
        except OSError as e:
            if e.errno in NO_LOCKS:
                return False
            raise
        return True

    def forget(self, number: int) -> None:
        super().forget(number)
        if not self._vouched and self._state == COMPLETE:
            self._set_state(FILLING)

    @contextmanager
    def claimed(self, first: int, last: int) -> Iterator[bool]:
        """Hold a lock against other processes on segments that are about to be fetched; gives False
        at once where another one holds some of them."""
        start, length = first << SEGMENT_BITS, (last - first + 1) << SEGMENT_BITS
        try:
            lock(self._fd, fcntl.F_WRLCK, start, length)
        except BlockingIOError:
            yield False
            return
        except OSError:
            yield True  # a file system without locks: at worst something is fetched twice
            return
        try:
            yield True
        finally:
            lock(self._fd, fcntl.F_UNLCK, start, length)

    def settle(
        self, digest: str | None, verified: tuple[PrivateDirectory, str] | None
    ) -> bool | None:
        """Read all of it, to find out what it is.  Blocks for as long as that takes.

        True: it has the digest (or there is none to have); it is on the disk, and where a place for
        ``verified`` blobs is given, it is there.  False: it is wrong, and gone.  None: some of it is
        missing, somebody writes, or there are no locks, and it stays as it is.  Raises OSError."""
        place = None if verified is None else (verified[0].copy(), verified[1])
        own = self.frozen()
        if own is None:
            return None
        try:
            found = _digest_of(own, (digest or "sha256:").partition(":")[0])
            if found is None:
                return None
            if digest not in (None, found):
                own.discard()
                self._state = BAD
                return False
            os.fdatasync(own._fd)
            if place is not None:
                lock_names(own._map, fcntl.F_WRLCK)  # nobody opens one file here, and one there
                move_pair(own.folder, own.name, *place)
            own._set_state(COMPLETE)
            self._state = COMPLETE
            return True
        finally:
            own.close()

    def frozen(self) -> Claimed | None:
        """The same blob once more, with the lock that keeps everybody from adding to it, until it is
        closed.  It has descriptors of its own, to which the lock belongs.

        None where somebody is just writing, or the file system has no locks.  Raises OSError."""
        folder = self.folder.copy()  # the caller may close its own meanwhile
        own = Claimed(folder, self.name, self.size, self.about, vouched=self._vouched)
        try:
            same = os.path.samestat(os.fstat(own._map), os.fstat(self._map))
            if same and own._lock_header(fcntl.F_WRLCK):
                return own
        except BlockingIOError:
            pass
        except BaseException:
            own.close()
            raise
        own.close()
        return None

    def discard(self) -> None:
        """Tell everybody that the blob is wrong, and unlink it."""
        self._set_state(BAD)
        self.folder.unlink_same(f"{self.name}.data", self._fd)
        self.folder.unlink_same(f"{self.name}.map", self._map)


def _digest_of(store: DiskStore, algorithm: str) -> str | None:
    """The digest of all segments; None where one is missing or spoiled."""
    found = hashlib.new(algorithm)
    for number in range(store.count):
        data = store.segment(number)
        if data is None:
            return None
        found.update(data)
    return f"{algorithm}:{found.hexdigest()}"


def keep_verified(
    folder: PrivateDirectory, name: str, fd: int, size: int, about: dict[str, Any]
) -> None:
    """Put a file, whose digest its caller has checked, among the verified blobs: the very file where it
    lies on the same file system, else a copy.  Blocks; raises OSError, with nothing left."""
    checksum = checksum_function()
    new = f".{name}"
    try:
        unlink_pair(folder, new)  # of a process that died
        linked = _linked(fd, folder, f"{new}.data")
        with (
            open(folder.open_file(f"{new}.data", os.O_RDWR | os.O_CREAT), "r+b", 0) as data_file,
            open(folder.open_file(f"{new}.map", os.O_RDWR | os.O_CREAT), "r+b", 0) as map_file,
        ):
            write_header(map_file.fileno(), size, COMPLETE, about)
            for number in range(segments_of(size)):
                offset, length = extent_of(size, number)
                data = os.pread(fd, length, offset)
                if not linked and os.pwrite(data_file.fileno(), data, offset) != length:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                mark = MARK.pack(PRESENT, checksum(data))
                os.pwrite(map_file.fileno(), mark, HEADER_SIZE + number * MARK.size)
            os.fdatasync(data_file.fileno())
        move_pair(folder, new, folder, name)
    except OSError:
        unlink_pair(folder, new)
        raise


def _linked(fd: int, folder: PrivateDirectory, name: str) -> bool:
    """Give an open file a name in a directory, where that can be done."""
    try:
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder.fd, follow_symlinks=True)
    except OSError:
        return False
    return True

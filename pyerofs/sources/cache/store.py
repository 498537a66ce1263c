"""A blob of the cache on disk, shared by all processes.

A blob is two files (``blobfiles``): its data, and a map that marks the stored segments and holds the
CRC-32 of each.  A segment's data is written before its mark, and each process checks the CRC of a
segment before its first use of the segment.  So no process uses a segment that a crash, a full disk
or another process has damaged.

The CRC detects damage, not forgery.  A blob is *claimed* first: filled with the bytes that its server
sent.  Once a whole pass finds that the blob matches its digest, the blob is *verified*: no segment is
ever added to it, and damaged ones are dropped.  ``Claimed.settle`` makes that step; during the pass
and afterwards, ``put`` raises OSError in every process that has the blob open.

A blob is removed by unlinking its files, never by truncating them, so a reader keeps the files that
it has open.  Eviction skips a blob in use: each user holds a shared lock on the map.
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
    """The two files of one blob, for reading.  Thread-safe; other processes may use the same files."""

    def __init__(self, folder: PrivateDirectory, name: str, map_fd: int, size: int) -> None:
        """Takes ownership of ``map_fd``, which holds the shared lock.  Raises OSError."""
        self.folder = folder
        self.name = name
        self.size = size
        self.count = segments_of(size)
        self._map = map_fd
        self._fd = -1
        self._checksum = checksum_function()
        # a byte per segment: 1 if this process has checked its CRC.  Pages are allocated when written
        self._seen = mmap.mmap(-1, max(self.count, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._unseen = self.count
        self._lock = threading.Lock()
        self._recent: tuple[int, int, Buffer] = (0, 0, b"")  # start, end, data of the last segment
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
        """FILLING, COMPLETE or BAD, as this process last read it."""
        return self._state

    @property
    def complete(self) -> bool:
        """Whether a whole pass has found the blob right."""
        return self._state == COMPLETE

    @property
    def backing(self) -> tuple[int, int] | None:
        """The data file, once this process has checked every segment."""
        return (self._fd, 0) if self.complete and not self._unseen else None

    def _read_state(self) -> int:
        return int(STATE.unpack(os.pread(self._map, STATE.size, STATE_OFFSET))[0])

    def _set_state(self, state: int) -> None:
        """Set the state for all processes."""
        self._state = state
        os.pwrite(self._map, STATE.pack(state), STATE_OFFSET)

    def _mark(self, number: int) -> int | None:
        """The CRC-32 that a segment must have; None if the segment is not stored."""
        mark_record = os.pread(self._map, MARK.size, HEADER_SIZE + number * MARK.size)
        if len(mark_record) < MARK.size:
            return None
        mark, checksum = MARK.unpack(mark_record)
        return int(checksum) if mark == PRESENT else None

    def present(self) -> int:
        """The number of stored segments, damaged ones included.  Skips holes in the map."""
        marked = 0
        at, end = HEADER_SIZE, HEADER_SIZE + self.count * MARK.size
        while at < end:
            try:
                at = max(at, os.lseek(self._map, at, os.SEEK_DATA) // MARK.size * MARK.size)
            except OSError:
                break  # only holes from here on
            marks = os.pread(self._map, min(SEGMENT, end - at), at)
            if not marks:
                break
            marked += marks[:: MARK.size].count(PRESENT & 0xFF)
            at += SEGMENT
        return marked

    def peek(self, offset: int, length: int) -> Buffer | None:
        """The bytes of a range if this process has checked them and need not block; else None."""
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
        """A whole segment, checked; None if it is missing or damaged.  Blocks."""
        offset, length = extent_of(self.size, number)
        data = bytearray(length)
        if not self._check_into(number, data):
            return None
        self._recent = (offset, offset + length, data)
        return data

    def check(self, numbers: list[int]) -> None:
        """Check segments in advance, so that ``peek`` finds them.  Blocks."""
        buffer = bytearray(SEGMENT)  # one for all: allocating memory costs as much as reading
        for number in numbers:
            if not self._seen[number]:
                self._check_into(number, memoryview(buffer)[: extent_of(self.size, number)[1]])

    def _check_into(self, number: int, buffer: bytearray | memoryview) -> bool:
        """Read a segment; returns whether it is stored and undamaged.  Forgets a damaged one."""
        checksum = self._mark(number)
        if checksum is None:
            return False
        if self._read_state() == BAD:
            self._state = BAD
            return False
        try:
            read = os.preadv(self._fd, [buffer], number << SEGMENT_BITS)
        except OSError:
            read = -1  # a segment that the disk can't read is fetched again
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
        """The bytes of a range, checked; None if a segment is missing or damaged.  Blocks."""
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
        """Whether a segment is stored; the segment may be damaged."""
        return bool(self._seen[number]) or self._mark(number) is not None

    def unchecked(self, first: int, last: int) -> list[int]:
        """The segments from ``first`` to ``last`` that this process has not checked."""
        return [n for n in range(first, last + 1) if not self._seen[n]]

    def forget(self, number: int) -> None:
        """Drop a segment that is damaged or wrong."""
        os.pwrite(self._map, bytes(MARK.size), HEADER_SIZE + number * MARK.size)
        self._recent = (0, 0, b"")
        self._saw(number, 0)

    def close(self) -> None:
        """Close the files, and release the lock with them.  Idempotent."""
        if self._map >= 0:
            self._file.close()
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        for fd in (self._fd, self._map):
            if fd >= 0:
                os.close(fd)
        self._map = self._fd = -1


class Verified(DiskStore):
    """A blob that matched its digest in a whole pass.  It can lose segments, but never gains any."""

    @classmethod
    def open(cls, folder: PrivateDirectory, name: str) -> Verified | None:
        """Open the verified blob ``name``; None if there is none.  Removes files that are not one.

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
        except Untrusted:  # the data file is a link, or another user's file
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
    """A blob with the bytes that its server sent.  Several processes may fill it together."""

    def __init__(
        self,
        folder: PrivateDirectory,
        name: str,
        size: int,
        about: dict[str, Any],
        *,
        vouched: bool,
    ) -> None:
        """Open the files, or create them.  ``about``: key and name, for listing the cache.
        ``vouched``: the blob has a digest to check.  Raises OSError."""
        self.about = about
        self._has_digest = vouched
        self._has_lost = False  # a segment, since a whole pass checked the blob
        self._writers = 0  # threads of this process that write, under one shared lock
        map_fd = open_map(folder, name, size, about)
        super().__init__(folder, name, map_fd, size)
        lock_names(map_fd, fcntl.F_UNLCK)  # ``open_map`` took this lock

    def put(self, number: int, data: Buffer) -> None:
        """Store a segment.  Blocks.  Raises OSError if the disk is full, while ``settle`` checks the
        blob, and afterwards."""
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
        """Hold the shared lock on the header, which keeps ``settle`` from starting.  Raises OSError
        while ``settle`` holds the exclusive lock, and once the blob is settled."""
        with self._lock:
            if not self._writers:
                self._lock_header(fcntl.F_RDLCK)
                if self._read_state() != FILLING:
                    self._lock_header(fcntl.F_UNLCK)
                    raise OSError(errno.EROFS, "the cached blob accepts no more data")
            self._writers += 1
        try:
            yield
        finally:
            with self._lock:
                self._writers -= 1
                if not self._writers:
                    self._lock_header(fcntl.F_UNLCK)

    def _lock_header(self, kind: int) -> bool:
        """Lock the header; False if the file system has no locks.  Raises BlockingIOError if another
        descriptor holds a conflicting lock."""
        try:
            lock(self._map, kind, 0, 1)
        except OSError as e:
            if e.errno in NO_LOCKS:
                return False
            raise
        return True

    @property
    def complete(self) -> bool:
        return self._state == COMPLETE and not self._has_lost

    def forget(self, number: int) -> None:
        super().forget(number)
        if self._state == COMPLETE:
            if self._has_digest:
                self._has_lost = True  # what is fetched in its place was not checked
            else:
                self._set_state(FILLING)

    @contextmanager
    def claimed(self, first: int, last: int) -> Iterator[bool]:
        """Lock segments that this process is about to fetch; yields False at once if another process
        has locked some of them."""
        start, length = first << SEGMENT_BITS, (last - first + 1) << SEGMENT_BITS
        try:
            lock(self._fd, fcntl.F_WRLCK, start, length)
        except BlockingIOError:
            yield False
            return
        except OSError:
            yield True  # a file system without locks: two processes may fetch the same segment
            return
        try:
            yield True
        finally:
            lock(self._fd, fcntl.F_UNLCK, start, length)

    def settle(
        self, digest: str | None, verified: tuple[PrivateDirectory, str] | None
    ) -> bool | None:
        """Check the whole blob against its digest.  Blocks while it reads every segment.

        True: the blob matches (or ``digest`` is None), is synced to disk, and was moved to the
        directory and name in ``verified``, if given.  False: it does not match, and was unlinked.
        None: no result, since a segment is missing or damaged, a process is writing, or the file
        system has no locks.  Raises OSError."""
        place = None if verified is None else (verified[0].copy(), verified[1])
        own = self.frozen()
        if own is None:
            return None
        try:
            computed = _digest_of(own, (digest or "sha256:").partition(":")[0])
            if computed is None:
                return None
            if digest not in (None, computed):
                own.discard()
                self._state = BAD
                return False
            os.fdatasync(own._fd)
            if place is not None:
                # else a process could open one file before the move, and the other after it
                lock_names(own._map, fcntl.F_WRLCK)
                move_pair(own.folder, own.name, *place)
            own._set_state(COMPLETE)
            self._state = COMPLETE
            return True
        finally:
            own.close()

    def frozen(self) -> Claimed | None:
        """Open the blob again with the exclusive lock on its header: no process can add a segment
        until the returned object is closed.

        None if a process is writing, or the file system has no locks.  Raises OSError."""
        folder = self.folder.copy()  # the caller may close its folder meanwhile
        own = Claimed(folder, self.name, self.size, self.about, vouched=self._has_digest)
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
        """Mark the blob BAD for all processes that have it open, and unlink its files."""
        self._set_state(BAD)
        self.folder.unlink_same(f"{self.name}.data", self._fd)
        self.folder.unlink_same(f"{self.name}.map", self._map)


def _digest_of(store: DiskStore, algorithm: str) -> str | None:
    """The digest of all segments; None if one is missing or damaged."""
    hasher = hashlib.new(algorithm)
    for number in range(store.count):
        data = store.segment(number)
        if data is None:
            return None
        hasher.update(data)
    return f"{algorithm}:{hasher.hexdigest()}"


def keep_verified(
    folder: PrivateDirectory, name: str, fd: int, size: int, about: dict[str, Any]
) -> None:
    """Store a file as a verified blob; the caller has checked its digest.  Links the file if possible,
    else copies it.  Blocks.  Raises OSError, and leaves no files then."""
    checksum = checksum_function()
    new = f".{name}"
    try:
        unlink_pair(folder, new)  # left by a process that died
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
    """Link an open file into a directory; False if that is not possible."""
    try:
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder.fd, follow_symlinks=True)
    except OSError:
        return False
    return True

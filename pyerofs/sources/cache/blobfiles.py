"""The two files of a blob in the cache: format, locks, opening and moving.

``NAME.data`` is sparse and as large as the blob.  ``NAME.map`` is a header, then eight bytes for each
segment of 1 MiB: a mark if the segment is stored, and its CRC-32.  The header holds the blob's size,
which never changes, and its state.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any, cast

from pyerofs.sources.base import MAX_BLOB, SEGMENT, SEGMENT_BITS, Buffer
from pyerofs.system.private import PrivateDirectory, Untrusted

MAP_MAGIC = b"PYEROFSM"
VERSION = 2
_HEADER = struct.Struct("<8sIIQII")  # magic, version, segment size, blob size, their CRC-32, state
_FIXED = 24  # bytes of the header that the CRC-32 covers
STATE = struct.Struct("<I")
STATE_OFFSET = 28
HEADER_SIZE = 4096  # bytes; those behind _HEADER are JSON, for listing the cache
# states are words, so that a flipped bit does not turn one into another
FILLING, COMPLETE, BAD = (int.from_bytes(word, "little") for word in (b"FILL", b"DONE", b"BAD!"))
MARK = struct.Struct("<II")  # PRESENT, CRC-32
PRESENT = 0x50524553

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def segments_of(size: int) -> int:
    """The number of segments of a blob of ``size`` bytes."""
    return (size + SEGMENT - 1) >> SEGMENT_BITS


def extent_of(size: int, number: int) -> tuple[int, int]:
    """Offset and length in bytes of a segment of a blob of ``size`` bytes."""
    start = number << SEGMENT_BITS
    return start, min(SEGMENT, size - start)


def checksum_function() -> Callable[[Buffer], int]:
    """A function for the CRC-32: isal's, ten times as fast as zlib's, if it is installed."""
    try:
        from isal.isal_zlib import crc32
    except ImportError:
        return zlib.crc32
    return cast(Callable[[Buffer], int], crc32)


def lock(fd: int, kind: int, start: int, length: int) -> None:
    """Set or release a byte-range lock that belongs to the descriptor, not to the process.  Does not
    wait: raises BlockingIOError if another descriptor holds a conflicting lock."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def unlink_pair(folder: PrivateDirectory, name: str) -> None:
    """Unlink both files of a blob; a missing one is skipped.  Raises OSError."""
    for suffix in (".data", ".map"):
        folder.unlink(name + suffix)


def move_pair(folder: PrivateDirectory, name: str, to: PrivateDirectory, new_name: str) -> None:
    """Move both files of a blob, the map last: without a map there is no blob.  Raises OSError."""
    for suffix in (".data", ".map"):
        folder.rename(name + suffix, to, new_name + suffix)


def lock_names(map_fd: int, kind: int) -> None:
    """Lock the names of a claimed blob's files: shared while a process opens both files, exclusive
    while it moves both.  Blocks.  Does nothing on a file system without locks."""
    try:
        flock = _FLOCK.pack(kind, os.SEEK_SET, 1, 1, 0)
        fcntl.fcntl(map_fd, fcntl.F_OFD_SETLKW, flock)
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise


def open_existing(folder: PrivateDirectory, name: str) -> int | None:
    """Open a blob's map with the shared lock, which prevents eviction; None if there is no map.
    Blocks.  Raises OSError."""
    while True:
        try:
            fd = folder.open_file(f"{name}.map", os.O_RDWR)
        except FileNotFoundError:
            return None
        except Untrusted:
            folder.unlink(f"{name}.map")  # a link, or another user's file in this user's directory
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # evicted meanwhile


def open_map(folder: PrivateDirectory, name: str, size: int, about: dict[str, Any]) -> int:
    """Open a blob's map, or create it.  Its header is valid; the descriptor holds the shared lock,
    which prevents eviction, and the shared lock of ``lock_names``.  Blocks.  Raises OSError."""
    while True:
        for suffix in (".map", ".data"):
            try:
                os.close(folder.open_file(name + suffix, os.O_RDWR))
            except FileNotFoundError:
                pass
            except Untrusted:
                folder.unlink(name + suffix)
        fd = folder.open_file(f"{name}.map", os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass  # another process uses the map, or is initialising it
            else:
                _initialise(fd, size, about)
            fcntl.flock(fd, fcntl.LOCK_SH)
            lock_names(fd, fcntl.F_RDLCK)
            header = parse_header(os.pread(fd, HEADER_SIZE, 0))
            good = header is not None and header[:2] in ((size, FILLING), (size, COMPLETE))
            if good and folder.leads_to(f"{name}.map", fd):
                os.utime(fd)  # the time of its last use, for eviction
                return fd
            # evicted, moved, discarded or damaged meanwhile, or its creator died: try again
            folder.unlink_same(f"{name}.map", fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _initialise(fd: int, size: int, about: dict[str, Any]) -> None:
    """Make a new or damaged map empty and write its header.  The caller holds the exclusive lock."""
    header = parse_header(os.pread(fd, HEADER_SIZE, 0))
    if header is not None and header[0] == size and header[1] in (FILLING, COMPLETE):
        return
    os.ftruncate(fd, 0)
    write_header(fd, size, FILLING, about)


def write_header(fd: int, size: int, state: int, about: dict[str, Any]) -> None:
    """Write the header of a map.  Raises OSError."""
    text = json.dumps(about | {"since": int(time.time())}).encode()
    room = HEADER_SIZE - _HEADER.size
    fixed = _HEADER.pack(MAP_MAGIC, VERSION, SEGMENT, size, 0, 0)[:_FIXED]
    header = fixed + STATE.pack(zlib.crc32(fixed)) + STATE.pack(state)
    os.pwrite(fd, header + (text if len(text) < room else b"{}").ljust(room), 0)


def parse_header(data: bytes) -> tuple[int, int, dict[str, Any]] | None:
    """(size, state, about) from the first bytes of a map; None if they are no valid header."""
    if len(data) < HEADER_SIZE:
        return None
    magic, version, segment, size, checksum, state = _HEADER.unpack_from(data)
    if (magic, version, segment) != (MAP_MAGIC, VERSION, SEGMENT):
        return None
    if zlib.crc32(data[:_FIXED]) != checksum or size > MAX_BLOB:
        return None
    try:
        about = json.loads(data[_HEADER.size : HEADER_SIZE].rstrip(b"\0 ") or b"{}")
    except (ValueError, RecursionError):
        about = {}
    return size, state, about if isinstance(about, dict) else {}

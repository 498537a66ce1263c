"""The two files of a blob in the cache: their format, their locks, how they are opened and moved.

``NAME.data`` is as large as the blob and sparse.  ``NAME.map`` is a header, then eight bytes for each
segment of 1 MiB: a mark that the segment is there, and its CRC-32.  The header says how large the blob
is and in which state; the state alone changes.
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
_FIXED = 24  # bytes of the header that the CRC-32 is of
STATE = struct.Struct("<I")
STATE_OFFSET = 28
HEADER_SIZE = 4096  # the rest of it is JSON, for people who list the cache
# far apart, so that damage does not make one of another
FILLING, COMPLETE, BAD = (int.from_bytes(word, "little") for word in (b"FILL", b"DONE", b"BAD!"))
MARK = struct.Struct("<II")  # PRESENT, CRC-32
PRESENT = 0x50524553

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def segments_of(size: int) -> int:
    """How many segments a blob has."""
    return (size + SEGMENT - 1) >> SEGMENT_BITS


def extent_of(size: int, number: int) -> tuple[int, int]:
    """Offset and length of a segment of a blob."""
    start = number << SEGMENT_BITS
    return start, min(SEGMENT, size - start)


def checksum_function() -> Callable[[Buffer], int]:
    """CRC-32; isal's is ten times as fast as zlib's."""
    try:
        from isal.isal_zlib import crc32
    except ImportError:
        return zlib.crc32
    return cast(Callable[[Buffer], int], crc32)


def lock(fd: int, kind: int, start: int, length: int) -> None:
    """A byte-range lock that belongs to the descriptor, not to the process."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def unlink_pair(folder: PrivateDirectory, name: str) -> None:
    """Remove both files of a blob, as far as they are there.  Raises OSError."""
    for suffix in (".data", ".map"):
        folder.unlink(name + suffix)


def move_pair(folder: PrivateDirectory, name: str, to: PrivateDirectory, new_name: str) -> None:
    """Move both files of a blob: the map, which makes it one, comes last."""
    for suffix in (".data", ".map"):
        folder.rename(name + suffix, to, new_name + suffix)


def lock_names(map_fd: int, kind: int) -> None:
    """Hold the two files of a claimed blob together: shared while both are opened, exclusively while
    both are moved.  Waits."""
    try:
        flock = _FLOCK.pack(kind, os.SEEK_SET, 1, 1, 0)
        fcntl.fcntl(map_fd, fcntl.F_OFD_SETLKW, flock)
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise


def open_existing(folder: PrivateDirectory, name: str) -> int | None:
    """The map's descriptor, locked against eviction; None where there is none."""
    while True:
        try:
            fd = folder.open_file(f"{name}.map", os.O_RDWR)
        except FileNotFoundError:
            return None
        except Untrusted:
            folder.unlink(f"{name}.map")  # the directory is ours, so we may
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # evicted meanwhile


def open_map(folder: PrivateDirectory, name: str, size: int, about: dict[str, Any]) -> int:
    """The descriptor of a map with a header that makes sense, locked against eviction; and its names
    are locked against being moved."""
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
                pass  # another process uses it already, or is about to: it will be whole
            else:
                _initialise(fd, size, about)
            fcntl.flock(fd, fcntl.LOCK_SH)
            lock_names(fd, fcntl.F_RDLCK)
            header = parse_header(os.pread(fd, HEADER_SIZE, 0))
            good = header is not None and header[:2] in ((size, FILLING), (size, COMPLETE))
            if good and folder.leads_to(f"{name}.map", fd):
                os.utime(fd)  # the time of its last use, for eviction
                return fd
            # evicted, moved, discarded or damaged in between, or its maker has died: once more
            folder.unlink_same(f"{name}.map", fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _initialise(fd: int, size: int, about: dict[str, Any]) -> None:
    """Write the header of a map that is new, torn or damaged; nobody else uses it."""
    found = parse_header(os.pread(fd, HEADER_SIZE, 0))
    if found is not None and found[0] == size and found[1] in (FILLING, COMPLETE):
        return
    os.ftruncate(fd, 0)
    write_header(fd, size, FILLING, about)


def write_header(fd: int, size: int, state: int, about: dict[str, Any]) -> None:
    """Make the header of a map."""
    text = json.dumps(about | {"since": int(time.time())}).encode()
    room = HEADER_SIZE - _HEADER.size
    fixed = _HEADER.pack(MAP_MAGIC, VERSION, SEGMENT, size, 0, 0)[:_FIXED]
    header = fixed + STATE.pack(zlib.crc32(fixed)) + STATE.pack(state)
    os.pwrite(fd, header + (text if len(text) < room else b"{}").ljust(room), 0)


def parse_header(data: bytes) -> tuple[int, int, dict[str, Any]] | None:
    """(size, state, about) in the beginning of a map; None where it is none, or is damaged."""
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

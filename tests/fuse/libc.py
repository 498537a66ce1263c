"""System calls that Python has no function for."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MS_RDONLY, MS_REMOUNT = 1, 32
AT_FDCWD = -100
HANDLE_BYTES = 128  # MAX_HANDLE_SZ

_libc = ctypes.CDLL(None, use_errno=True)
_libc.getdents64.restype = ctypes.c_ssize_t
_libc.opendir.restype = ctypes.c_void_p
_libc.readdir64.restype = ctypes.c_void_p
_libc.telldir.restype = ctypes.c_long
for _name in ("readdir64", "telldir", "rewinddir", "closedir"):
    getattr(_libc, _name).argtypes = [ctypes.c_void_p]
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
for _name in ("getxattr", "listxattr"):
    getattr(_libc, _name).restype = ctypes.c_ssize_t

_DIRENT = struct.Struct("=QqHB")  # and the name, up to a NUL


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def mount(source: Path, where: Path, kind: str, options: str) -> None:
    """mount(2), read-only."""
    words = os.fsencode(source), os.fsencode(where), kind.encode(), MS_RDONLY, options.encode()
    _checked(_libc.mount(*words))


def unmount(where: Path) -> None:
    """umount2(2) without flags."""
    _checked(_libc.umount2(os.fsencode(where), 0))


def remount(where: Path) -> None:
    """Change nothing about a read-only mount, but make the kernel forget its inodes."""
    _checked(_libc.mount(None, os.fsencode(where), None, MS_RDONLY | MS_REMOUNT, None))


def handle_of(path: Path) -> bytes:
    """name_to_handle_at(2), links not followed: a ``struct file_handle``."""
    header = struct.pack("=Ii", HANDLE_BYTES, 0)
    handle = ctypes.create_string_buffer(header, len(header) + HANDLE_BYTES)
    mount_id = ctypes.c_int()
    words = os.fsencode(path), handle, ctypes.byref(mount_id)
    _checked(_libc.name_to_handle_at(AT_FDCWD, *words, 0))
    return handle.raw


def open_by_handle(mount: int, handle: bytes, flags: int) -> int:
    """open_by_handle_at(2): a descriptor."""
    return _checked(_libc.open_by_handle_at(mount, handle, flags))


class Dirent(NamedTuple):
    """A raw directory entry, but for where the next one is."""

    name: str
    ino: int
    type: int


def getdents(path: Path, size: int = 32768) -> list[Dirent]:
    """All entries of a directory in its order, got with a buffer of some size."""
    buffer = ctypes.create_string_buffer(size)
    found = []
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while length := _checked(_libc.getdents64(fd, buffer, ctypes.c_size_t(size))):
            at = 0
            while at < length:
                record, record_length = _dirent(buffer.raw[at:length])
                found.append(record)
                at += record_length
    finally:
        os.close(fd)
    return found


def _dirent(data: bytes) -> tuple[Dirent, int]:
    ino, _, length, file_type = _DIRENT.unpack_from(data)
    name = data[_DIRENT.size : length].partition(b"\0")[0]
    return Dirent(os.fsdecode(name), ino, file_type), length


class DirectoryStream:
    """opendir(3), readdir, telldir, seekdir and rewinddir; a context manager."""

    def __init__(self, path: Path) -> None:
        stream = _libc.opendir(os.fsencode(path))
        if not stream:
            _checked(-1)
        self._stream = stream

    def __enter__(self) -> DirectoryStream:
        return self

    def __exit__(self, *_: object) -> None:
        _libc.closedir(self._stream)

    def __iter__(self) -> Iterator[Dirent]:
        """The entries from here to the end."""
        while address := _libc.readdir64(self._stream):
            length = _DIRENT.unpack(ctypes.string_at(address, _DIRENT.size))[2]
            yield _dirent(ctypes.string_at(address, length))[0]

    def tell(self) -> int:
        return int(_libc.telldir(self._stream))

    def seek(self, position: int) -> None:
        _libc.seekdir(self._stream, position)

    def rewind(self) -> None:
        _libc.rewinddir(self._stream)


def getxattr(path: Path, name: str, size: int) -> int:
    """getxattr(2) into a buffer of some size: how long the value is."""
    buffer = ctypes.create_string_buffer(max(size, 1))
    words = os.fsencode(path), name.encode(), buffer, ctypes.c_size_t(size)
    return _checked(_libc.getxattr(*words))


def listxattr(path: Path, size: int) -> int:
    """listxattr(2) into a buffer of some size: how long the list is."""
    buffer = ctypes.create_string_buffer(max(size, 1))
    return _checked(_libc.listxattr(os.fsencode(path), buffer, ctypes.c_size_t(size)))

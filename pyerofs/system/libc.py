"""Functions of the C library and system calls that Python does not provide."""

from __future__ import annotations

import ctypes
import os

PR_SET_PDEATHSIG = 1  # linux/prctl.h
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8  # sys/mount.h, as those below
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS = 1, 2, 4, 8, 16
MS_DIRSYNC, MS_NOATIME, MS_NODIRATIME = 128, 1024, 2048
MS_RELATIME, MS_STRICTATIME = 1 << 21, 1 << 24
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
SYS_CACHESTAT = 451  # the same on all architectures


def _call(name: str, *arguments: object) -> None:
    """Call a function that returns 0 or sets errno; releases the GIL.  Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def signal_when_parent_dies(number: int) -> None:
    """Have the kernel send this process a signal when the thread that forked it ends: prctl(2).  The
    parent may have died already, so compare getppid() afterwards."""
    _call("prctl", PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def mount(source: str, where: str, kind: str, flags: int, data: str) -> None:
    """mount(2).  Blocks while the file system reads its superblock.  Raises OSError."""
    words = [os.fsencode(word) for word in (source, where, kind)]
    _call("mount", *words, ctypes.c_ulong(flags), os.fsencode(data))


def unmount(where: str, *, detach: bool = False) -> None:
    """umount2(2) of a mount point, without following a link.  ``detach``: even while it is in use.

    Raises OSError."""
    _call("umount2", os.fsencode(where), UMOUNT_NOFOLLOW | (MNT_DETACH if detach else 0))


def keep_freed_memory() -> None:
    """Let glibc's allocator keep up to 256 MiB of freed memory.  No effect with other C libraries.

    Otherwise a process that decodes much returns each pcluster's memory to the kernel and takes a
    page fault for each page of the next, which can take as long as decoding LZ4."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 256 << 20)
        libc.mallopt(M_MMAP_THRESHOLD, 64 << 20)
    except (OSError, AttributeError):
        pass


class _Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _Counts(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recent")
    ]


class CacheStat:
    """cachestat(2), Linux 6.5, with preallocated arguments.  Not thread-safe."""

    def __init__(self) -> None:
        """Raises OSError or AttributeError if the C library has no syscall(2)."""
        self._syscall = ctypes.CDLL(None).syscall
        self._range = _Range()
        self._counts = _Counts()
        self._arguments = ctypes.byref(self._range), ctypes.byref(self._counts)

    def cached(self, fd: int, offset: int, length: int) -> int | None:
        """The number of a range's pages in the page cache; None if the kernel can't tell."""
        self._range.offset, self._range.length = offset, length
        if self._syscall(SYS_CACHESTAT, fd, *self._arguments, 0):
            return None
        return int(self._counts.cached)

"""Local sources: regular files, block devices and Python file objects.

Images are never memory-mapped: a file that shrinks would kill the process with SIGBUS, and a page
fault on a slow disk would stop every thread.  Instead ``peek`` asks the kernel for bytes that are
in its page cache (``preadv2`` with RWF_NOWAIT) and ``read_at`` blocks in ``pread``.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from typing import BinaryIO

from pyerofs.errors import SourceError, TruncatedRead, file_error
from pyerofs.sources.base import Buffer, check_range, within
from pyerofs.system import mountinfo

RWF_NOWAIT = getattr(os, "RWF_NOWAIT", None)


class FileSource:
    """A regular file or block device, by path or by descriptor (which is then owned)."""

    def __init__(self, path: str | os.PathLike[str] | int, *, name: str | None = None) -> None:
        """Open it for reading.  Raises SourceError when that fails or it is another kind of file."""
        self._fd = -1
        if isinstance(path, int):
            self._fd = path
            self.name = name or f"fd {path}"
        else:
            self.name = name or os.fsdecode(path)
            try:
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as e:
                raise file_error(e, self.name) from None
        try:
            mode = os.fstat(self._fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                kind = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
                raise SourceError(f"{self.name}: is {kind}, not an image")
            # st_size is 0 for block devices; the end of either kind is where SEEK_END leads
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as e:
            self.close()
            raise SourceError(f"{self.name}: {e.strerror}") from None
        except SourceError:
            self.close()
            raise
        self._nowait = RWF_NOWAIT

    @property
    def descriptor(self) -> int:
        """The open descriptor; -1 after ``close``."""
        return self._fd

    @property
    def backing(self) -> tuple[int, int] | None:
        return self._fd, 0

    def peek(self, offset: int, length: int) -> Buffer | None:
        """Bytes from the page cache; None if they are not there or the kernel can't tell."""
        if self._nowait is None or not within(self.size, offset, length):
            return None
        buffer = bytearray(length)
        try:
            n = os.preadv(self._fd, [buffer], offset, self._nowait)
        except BlockingIOError:
            return None
        except OSError as e:
            if e.errno == errno.EOPNOTSUPP:
                # tmpfs can't do RWF_NOWAIT; but its pages are memory, a plain read does not block
                self._nowait = 0 if _in_memory(self._fd) else None
                return self.peek(offset, length)
            return None
        return buffer if n == length else None

    def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        try:
            data = os.pread(self._fd, length, offset)
            while len(data) < length:
                more = os.pread(self._fd, length - len(data), offset + len(data))
                if not more:
                    raise TruncatedRead(f"{self.name}: shrank to {offset + len(data)} bytes")
                data += more
        except OSError as e:
            raise SourceError(f"{self.name}: read at {offset}: {e.strerror}") from None
        return data

    def will_need(self, offset: int, length: int) -> None:
        """Have the kernel start reading a range from the disk."""
        try:
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass  # only a hint

    def data_from(self, offset: int) -> int:
        """The next offset at which the file stores data; the size if there is none.  The bytes before
        it are zeros."""
        try:
            return max(offset, os.lseek(self._fd, offset, os.SEEK_DATA))
        except OSError as e:
            return self.size if e.errno == errno.ENXIO else offset

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def _in_memory(fd: int) -> bool:
    """Whether a descriptor's file system keeps its files in memory."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return False
    mount = mountinfo.of_file(fd)
    return mount is not None and mount.kind in ("tmpfs", "ramfs")


class FileObjectSource:
    """A seekable binary file object; reads take turns under a lock.  The object is not closed."""

    def __init__(self, fileobj: BinaryIO) -> None:
        self._file = fileobj
        self._lock = threading.Lock()
        self.backing = None
        self.name = str(getattr(fileobj, "name", "") or type(fileobj).__name__)
        try:
            self.size = fileobj.seek(0, os.SEEK_END)
        except Exception as e:  # whatever the object raises: zlib.error, LZMAError ...
            raise SourceError(f"{self.name}: can't find its end: {e}") from None

    def peek(self, offset: int, length: int) -> Buffer | None:
        return None

    def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        try:
            with self._lock:
                self._file.seek(offset)
                data = self._file.read(length)
                while len(data) < length and (more := self._file.read(length - len(data))):
                    data += more
        except Exception as e:  # whatever the object raises: zlib.error, LZMAError ...
            raise SourceError(f"{self.name}: read at {offset}: {e or type(e).__name__}") from None
        if len(data) < length:
            raise TruncatedRead(f"{self.name}: ended at {offset + len(data)}")
        return data

    def close(self) -> None:
        pass

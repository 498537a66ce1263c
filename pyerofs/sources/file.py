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

from pyerofs.errors import SourceError, TruncatedRead
from pyerofs.sources.base import Buffer, check_range

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
                raise SourceError(f"{self.name}: {e.strerror}") from None
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

    def fileno(self) -> int:
        """The descriptor, for callers that want ``sendfile`` or ``lseek(SEEK_DATA)``."""
        return self._fd

    def peek(self, offset: int, length: int) -> Buffer | None:
        """Bytes that the kernel has cached; None otherwise or where it can't tell."""
        if self._nowait is None or offset + length > self.size:
            return None
        buffer = bytearray(length)
        try:
            n = os.preadv(self._fd, [buffer], offset, self._nowait)
        except BlockingIOError:
            return None
        except OSError as e:
            if e.errno == errno.EOPNOTSUPP:
                # tmpfs can't do RWF_NOWAIT; its pages are memory, so a plain read does not block
                self._nowait = 0
                return self.peek(offset, length) if self._on_tmpfs() else None
            return None
        return buffer if n == length else None

    def _on_tmpfs(self) -> bool:
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            self._nowait = None
            return False
        try:  # tmpfs and ramfs have no device behind them
            major = os.major(os.fstat(self._fd).st_dev)
        except OSError:
            major = -1
        if major != 0:
            self._nowait = None
        return major == 0

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

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class FileObjectSource:
    """A seekable binary file object; reads take turns under a lock.  The object is not closed."""

    def __init__(self, fileobj: BinaryIO) -> None:
        self._file = fileobj
        self._lock = threading.Lock()
        self.name = str(getattr(fileobj, "name", repr(fileobj)))
        try:
            self.size = fileobj.seek(0, os.SEEK_END)
        except (OSError, ValueError) as e:
            raise SourceError(f"{self.name}: not seekable: {e}") from None

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
        except (OSError, ValueError, EOFError) as e:
            raise SourceError(f"{self.name}: read at {offset}: {e}") from None
        if len(data) < length:
            raise TruncatedRead(f"{self.name}: ended at {offset + len(data)}")
        return data

    def close(self) -> None:
        pass

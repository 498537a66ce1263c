"""The exceptions of pyerofs.

    Exception
     +-- ErofsError                 anything pyerofs reports on purpose
          +-- CorruptImage          the image contradicts the format (names offset and/or nid)
          +-- UnsupportedFeature    valid or newer format that this version can't read (names it)
          +-- DeviceMissing         a file lies on an extra device that was not given
          +-- NotFound              no such name                    (also a FileNotFoundError)
          +-- NotADirectory         a path goes through a file      (also a NotADirectoryError)
          +-- IsADirectory          file data of a directory        (also an IsADirectoryError)
          +-- NotASymlink           link target of something that is not a link
          +-- NotAFile              file data of a fifo, socket or device
          +-- TooManySymlinks       more than 40 links in one path
          +-- NoSuchXattr           no extended attribute of that name
          +-- SourceError           the bytes behind the image could not be read
               +-- SourceNotFound   there is no such file           (also a FileNotFoundError)
               +-- SourceDenied     no permission to read the file  (also a PermissionError)
               +-- SourceThroughFile   its path goes through a file (also a NotADirectoryError)
               +-- TruncatedRead    the source ended before the requested bytes
               +-- IntegrityError   bytes that contradict a digest, a checksum or a dm-verity tree
               +-- ChangedError     the image changed on its server while it was being read
               +-- RegistryError    a registry or an OCI layout lacks the requested item
               +-- AuthenticationError   a server requires credentials, or rejects them

Every message is one line: what failed, where and, if possible, a remedy.  A message may quote names
and words from a hostile image or server; every ErofsError passes its message through ``one_line``,
which makes it harmless to a terminal.

This module imports nothing of the package.
"""

from __future__ import annotations

import errno

MAX_MESSAGE = 4000  # characters: more than any path and reason need, less than a screen


def one_line(message: str) -> str:
    """A message as one line of printable characters: control characters, line ends and lone
    surrogates become escapes; a message longer than MAX_MESSAGE loses its middle."""
    if len(message) > MAX_MESSAGE:
        half = MAX_MESSAGE // 2
        message = f"{message[:half]} [...] {message[-half:]}"
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


class ErofsError(Exception):
    """Base of all errors raised by pyerofs.  ``errno``: the error of a corresponding file system
    call."""

    errno: int | None = errno.EIO

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class CorruptImage(ErofsError):
    """The image contradicts the EROFS format.

    ``offset`` (bytes from the image's start, or None) and ``nid`` (inode, or None) say where.
    """

    errno = errno.EUCLEAN

    def __init__(self, what: str, *, offset: int | None = None, nid: int | None = None) -> None:
        self.what = what
        self.offset = offset
        self.nid = nid
        where = []
        if nid is not None:
            where.append(f"nid {nid}")
        if offset is not None:
            where.append(f"offset {offset:#x}")
        super().__init__(f"corrupt image: {what}" + (f" ({', '.join(where)})" if where else ""))

    def __reduce__(self) -> tuple[object, ...]:
        return _corrupt_image, (type(self), self.what, self.offset, self.nid)


def _corrupt_image(
    kind: type[CorruptImage], what: str, offset: int | None, nid: int | None
) -> CorruptImage:
    """Unpickles a CorruptImage."""
    return kind(what, offset=offset, nid=nid)


class UnsupportedFeature(ErofsError):
    """The image needs a feature that this version of pyerofs does not know; the message names it."""

    errno = errno.EOPNOTSUPP


class DeviceMissing(ErofsError):
    """A file lies on an extra device that was neither given nor appended to the image."""


class _PathError(ErofsError, OSError):
    """An error about one path: an ErofsError that is also the matching builtin OSError."""

    text = "error"

    def __init__(self, path: str | bytes) -> None:
        self.path = path
        shown = path.decode("utf-8", "backslashreplace") if isinstance(path, bytes) else path
        OSError.__init__(self, type(self).errno, f"{self.text}: {shown!r}")

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[type[_PathError], tuple[str | bytes]]:
        return type(self), (self.path,)


class NotFound(_PathError, FileNotFoundError):
    errno = errno.ENOENT
    text = "no such file or directory in the image"


class NotADirectory(_PathError, NotADirectoryError):
    errno = errno.ENOTDIR
    text = "not a directory"


class IsADirectory(_PathError, IsADirectoryError):
    errno = errno.EISDIR
    text = "is a directory"


class NotASymlink(_PathError):
    errno = errno.EINVAL
    text = "not a symbolic link"


class NotAFile(_PathError):
    errno = errno.EINVAL
    text = "not a regular file"


class TooManySymlinks(_PathError):
    errno = errno.ELOOP
    text = "too many levels of symbolic links"


class NoSuchXattr(_PathError):
    errno = errno.ENODATA
    text = "no such extended attribute"


class SourceError(ErofsError):
    """The bytes behind an image could not be read; the message names the source and the range."""


class _OfAFile(OSError):
    """Makes a SourceError also the builtin OSError about a file."""

    def __init__(self, message: str = "", filename: str | None = None) -> None:
        OSError.__init__(self, type(self).errno, one_line(message))
        self.filename = filename

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[1], self.filename)


class SourceNotFound(_OfAFile, SourceError, FileNotFoundError):
    """There is no such file."""

    errno = errno.ENOENT


class SourceDenied(_OfAFile, SourceError, PermissionError):
    """There is no permission to read the file."""

    errno = errno.EACCES


class SourceThroughFile(_OfAFile, SourceError, NotADirectoryError):
    """The path goes through something that is not a directory."""

    errno = errno.ENOTDIR


_OF_FILES: dict[type[OSError], type[SourceError]] = {
    FileNotFoundError: SourceNotFound,
    PermissionError: SourceDenied,
    NotADirectoryError: SourceThroughFile,
}


def file_error(e: OSError, name: str) -> SourceError:
    """The SourceError for an OSError that opening the file ``name`` has raised."""
    kind = _OF_FILES.get(type(e))
    message = f"{name}: {e.strerror}"
    return SourceError(message) if kind is None else kind(message, name)  # type: ignore[call-arg]


class TruncatedRead(SourceError):
    """A source ended before the requested bytes."""


class IntegrityError(SourceError):
    """Bytes do not match their digest, checksum or hash tree."""


class ChangedError(SourceError):
    """The content behind a URL has changed since the image was opened."""


class RegistryError(SourceError):
    """A registry, index or manifest lacks the requested item, or is invalid."""


class AuthenticationError(SourceError):
    """A server requires credentials, or rejects those that were sent."""

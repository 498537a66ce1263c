"""The exceptions of pyerofs.

    Exception
     +-- ErofsError                 anything pyerofs reports on purpose
          +-- CorruptImage          the image contradicts the format (names offset and/or nid)
          +-- UnsupportedFeature    valid or newer format that this version can't read (names it)
          +-- DeviceMissing         a file lies on an extra device that was not given
          +-- NotFound              no such name                    (also a FileNotFoundError)
          +-- NotADirectory         a path goes through a file      (also a NotADirectoryError)
          +-- IsADirectory          file data asked of a directory  (also an IsADirectoryError)
          +-- NotASymlink           link target asked of another type
          +-- NotAFile              file data asked of a fifo, socket or device
          +-- TooManySymlinks       more than 40 links in one path
          +-- NoSuchXattr           no extended attribute of that name
          +-- SourceError           the bytes behind the image could not be had
               +-- SourceNotFound   there is no such file           (also a FileNotFoundError)
               +-- SourceDenied     it may not be read              (also a PermissionError)
               +-- SourceThroughFile   its path goes through a file (also a NotADirectoryError)
               +-- TruncatedRead    the source ended before the bytes that were asked for
               +-- IntegrityError   bytes that contradict a digest, a checksum or a dm-verity tree
               +-- ChangedError     the image changed on its server while it was being read
               +-- RegistryError    a registry or an OCI layout lacks what was asked for
               +-- AuthenticationError   a server refuses us, or our credentials

Every message is one line that says what, where and, if something can be done, what to do.  Names and
words in it may come from a hostile image or server; ``one_line`` makes them harmless to a terminal, and
every ErofsError applies it to its message.

This module imports nothing of the package.
"""

from __future__ import annotations

import errno

MAX_MESSAGE = 4000  # characters: more than any path and reason need, less than a screen


def one_line(message: str) -> str:
    """A message as one line of printable characters: control characters, line ends and lone surrogates
    become escapes; the middle of what is longer than MAX_MESSAGE is left out."""
    if len(message) > MAX_MESSAGE:
        half = MAX_MESSAGE // 2
        message = f"{message[:half]} [...] {message[-half:]}"
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


class ErofsError(Exception):
    """Base of all errors raised by pyerofs.  ``errno`` is what a file system call would answer."""

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
    """What a SourceError needs to be the builtin error about a file, too."""

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
    """The file may not be read."""

    errno = errno.EACCES


class SourceThroughFile(_OfAFile, SourceError, NotADirectoryError):
    """The path goes through something that is no directory."""

    errno = errno.ENOTDIR


_OF_FILES: dict[type[OSError], type[SourceError]] = {
    FileNotFoundError: SourceNotFound,
    PermissionError: SourceDenied,
    NotADirectoryError: SourceThroughFile,
}


def file_error(e: OSError, name: str) -> SourceError:
    """What the failure to open a file means."""
    kind = _OF_FILES.get(type(e))
    message = f"{name}: {e.strerror}"
    return SourceError(message) if kind is None else kind(message, name)  # type: ignore[call-arg]


class TruncatedRead(SourceError):
    """A source ended before the bytes that were asked for."""


class IntegrityError(SourceError):
    """Bytes are not those that a digest, checksum or hash tree says they must be."""


class ChangedError(SourceError):
    """What a URL leads to is no longer what it was when the image was opened."""


class RegistryError(SourceError):
    """A registry, index or manifest has not got what was asked for, or makes no sense."""


class AuthenticationError(SourceError):
    """A server asks for credentials, or refuses those it got."""

"""Directories that only their owner can write to, and the files in them.

Guards against files planted by other users of this machine: every name is opened relative to an
open directory, never through a link, and the opened file's type and owner are checked before use.
"""

from __future__ import annotations

import errno
import os
import stat

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OTHER_TYPES = (errno.ELOOP, errno.ENXIO, errno.EISDIR)  # open(2) of a link, socket, directory
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Untrusted(OSError):
    """A file or directory of another user, of the wrong type, or that other users can write to."""

    def __init__(self, why: str, name: str) -> None:
        super().__init__(errno.EPERM, why, name)


class PrivateDirectory:
    """An open directory that only ``owner`` can write to.

    Methods block and raise OSError; Untrusted for a file or directory that fails the checks.  The
    descriptor is closed with the object."""

    def __init__(self, fd: int, path: str, owner: int) -> None:
        """Takes ownership of ``fd``.  ``path``: for messages.  Raises Untrusted."""
        self.fd = fd
        self.path = path
        self.owner = owner
        try:
            _check(os.fstat(fd), owner, path)
        except OSError:
            self.close()
            raise

    @classmethod
    def open(
        cls, path: str, *, create: bool = True, owner: int | None = None, links: bool = False
    ) -> PrivateDirectory:
        """Open the directory of ``owner`` (default: the effective user) at a path.  ``create``:
        make a missing one, with mode 0700.  A link at the path's end is followed only if ``links``
        is set and the link belongs to the owner."""
        owner = os.geteuid() if owner is None else owner
        if create:
            os.makedirs(os.path.dirname(path) or "/", exist_ok=True)
            _make(path, None)
        found = os.lstat(path)
        follow = os.O_NOFOLLOW
        if stat.S_ISLNK(found.st_mode):
            if not links or found.st_uid != owner:
                raise Untrusted(f"is a link that belongs to uid {found.st_uid}", path)
            follow = 0
        return cls(os.open(path, _DIRECTORY | follow), path, owner)

    def copy(self) -> PrivateDirectory:
        """The same directory with a descriptor of its own."""
        return PrivateDirectory(os.dup(self.fd), self.path, self.owner)

    def subdirectory(self, name: str, *, create: bool = True) -> PrivateDirectory:
        """Open a directory in this one, of the same owner, never through a link.  ``create``: make
        a missing one, with mode 0700."""
        if create:
            _make(name, self.fd)
        path = os.path.join(self.path, name)
        fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self.fd)
        return PrivateDirectory(fd, path, self.owner)

    def open_file(self, name: str, flags: int) -> int:
        """Open a regular file; returns its descriptor.  With O_CREAT a missing file is made, with
        mode 0600.

        Never waits, as opening a fifo would."""
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        path = os.path.join(self.path, name)
        try:
            fd = os.open(name, flags, 0o600, dir_fd=self.fd)
        except OSError as e:
            if e.errno in _OTHER_TYPES:
                raise Untrusted("is no regular file", path) from None
            raise OSError(e.errno, e.strerror, path) from None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise Untrusted("is no regular file", path)
            _check(status, self.owner, path)
        except OSError:
            os.close(fd)
            raise
        return fd

    def names(self) -> list[str]:
        """The names in the directory, unsorted."""
        return os.listdir(self.fd)

    def read(self, name: str, limit: int) -> bytes:
        """The content of a file, at most ``limit`` bytes."""
        fd = self.open_file(name, os.O_RDONLY)
        with open(fd, "rb") as f:
            return f.read(limit)

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file atomically."""
        temporary = f".new-{os.urandom(8).hex()}"
        fd = self.open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            with open(fd, "wb") as f:
                f.write(data)
            self.rename(temporary, self, name)
        except OSError:
            self.unlink(temporary)
            raise

    def rename(self, name: str, to: PrivateDirectory, new_name: str) -> None:
        """Move a file, replacing an existing one."""
        os.rename(name, new_name, src_dir_fd=self.fd, dst_dir_fd=to.fd)

    def unlink(self, name: str) -> bool:
        """Remove a name; returns whether it existed.  Links are removed, not followed."""
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            return False
        return True

    def leads_to(self, name: str, fd: int) -> bool:
        """Whether a name refers to the file that is open as ``fd``.  Links are not followed."""
        try:
            found = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(fd))

    def unlink_same(self, name: str, fd: int) -> None:
        """Remove a name if it still refers to the file that is open as ``fd``.  Best effort."""
        try:
            if self.leads_to(name, fd):
                os.unlink(name, dir_fd=self.fd)
        except OSError:
            pass

    def temporary(self) -> int:
        """Create a file without a name; returns its descriptor."""
        try:
            return os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
        except OSError:  # not every file system supports O_TMPFILE
            name = f".new-{os.urandom(8).hex()}"
            fd = self.open_file(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            self.unlink(name)
            return fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def _make(name: str, parent: int | None) -> None:
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        pass


def _check(status: os.stat_result, owner: int, path: str) -> None:
    """Raise Untrusted unless ``owner`` owns the file and is the only one with write permission."""
    if status.st_uid != owner:
        raise Untrusted(f"belongs to uid {status.st_uid}, not to {owner}", path)
    if status.st_mode & _OTHERS_WRITE:
        mode = stat.S_IMODE(status.st_mode)
        raise Untrusted(f"others can write to it (mode {mode:04o})", path)

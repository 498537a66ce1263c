"""``pyerofs.Path``: a path inside an image that behaves like pathlib's.

    root = pyerofs.Path(image)
    for conf in (root / "etc").glob("*.conf"):
        print(conf, conf.read_text())

It implements ``importlib.resources.abc.Traversable`` and the reading half of pathlib.
"""

from __future__ import annotations

import fnmatch
import io
import posixpath
from collections.abc import Iterator
from typing import IO, Any

from pyerofs.errors import ErofsError
from pyerofs.format.model import Inode
from pyerofs.format.tree import Stat
from pyerofs.image import Image


class Path:
    """A path inside an open image.  Immutable, hashable; equal if image and path are."""

    __slots__ = ("_path", "image")

    def __init__(self, image: Image, path: str = "/") -> None:
        self.image = image
        self._path = "/" + "/".join(p for p in path.split("/") if p not in ("", "."))

    # the path itself --------------------------------------------------------------------

    def __str__(self) -> str:
        return self._path

    def __repr__(self) -> str:
        return f"pyerofs.Path({self._path!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Path):
            return NotImplemented
        return self.image is other.image and self._path == other._path

    def __lt__(self, other: Path) -> bool:
        return self._path < other._path

    def __hash__(self) -> int:
        return hash((id(self.image), self._path))

    def __truediv__(self, name: str) -> Path:
        return self.joinpath(name)

    def joinpath(self, *names: str) -> Path:
        """This path followed by others; an absolute one starts again at the image's root."""
        return Path(self.image, posixpath.join(self._path, *names))

    @property
    def name(self) -> str:
        """The last component; empty for the root."""
        return posixpath.basename(self._path)

    @property
    def stem(self) -> str:
        """The last component without its suffix."""
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        """The last component's suffix, with its dot."""
        return posixpath.splitext(self.name)[1]

    @property
    def parts(self) -> tuple[str, ...]:
        """The components, the first being ``/``."""
        return ("/", *filter(None, self._path.split("/")))

    @property
    def parent(self) -> Path:
        """The path without its last component; the root's parent is the root."""
        return Path(self.image, posixpath.dirname(self._path))

    @property
    def parents(self) -> tuple[Path, ...]:
        """All ancestors, nearest first."""
        ancestors = []
        here = self
        while here._path != "/":
            here = here.parent
            ancestors.append(here)
        return tuple(ancestors)

    def relative_to(self, other: Path) -> str:
        """This path relative to ``other``.  Raises ValueError if ``other`` is no ancestor."""
        base = other._path.rstrip("/") + "/"
        if self == other:
            return "."
        if not self._path.startswith(base):
            raise ValueError(f"{self._path!r} is not below {other._path!r}")
        return self._path[len(base) :]

    def match(self, pattern: str) -> bool:
        """Whether the last components match a pattern like ``lib/*.so``."""
        wanted = pattern.strip("/").split("/")
        have = [p for p in self._path.split("/") if p]
        if len(wanted) > len(have) or (pattern.startswith("/") and len(wanted) != len(have)):
            return False
        return all(
            fnmatch.fnmatchcase(h, w) for h, w in zip(have[-len(wanted) :], wanted, strict=True)
        )

    # inodes -----------------------------------------------------------------------------

    def inode(self, *, follow_symlinks: bool = True) -> Inode:
        """The inode at this path.  Raises NotFound, NotADirectory, TooManySymlinks."""
        return self.image.lookup(self._path, follow_symlinks=follow_symlinks)

    def stat(self, *, follow_symlinks: bool = True) -> Stat:
        """Stat of the inode at this path, as the kernel's driver shows it."""
        return self.image.stat(self._path, follow_symlinks=follow_symlinks)

    def lstat(self) -> Stat:
        """Like ``stat``, but does not follow a link."""
        return self.stat(follow_symlinks=False)

    def exists(self) -> bool:
        return self.image.exists(self._path)

    def is_dir(self) -> bool:
        return self._is("is_dir")

    def is_file(self) -> bool:
        return self._is("is_file")

    def is_symlink(self) -> bool:
        return self._is("is_symlink", follow=False)

    def _is(self, what: str, *, follow: bool = True) -> bool:
        try:
            return bool(getattr(self.inode(follow_symlinks=follow), what))
        except OSError as e:
            if isinstance(e, ErofsError):
                return False  # no such path, or a dangling link
            raise

    def readlink(self) -> str:
        """The target of a symbolic link.  Raises NotASymlink."""
        return self.image.readlink(self._path)

    def resolve(self) -> Path:
        """The path with all links followed.  Raises NotFound if a component is missing."""
        here: list[str] = []
        todo = self._path.strip("/").split("/")[::-1]
        self.inode()  # raises for loops and missing components
        while todo:
            name = todo.pop()
            if name in ("", "."):
                continue
            if name == "..":
                here = here[:-1]
                continue
            path = "/" + "/".join([*here, name])
            inode = self.image.lookup(path, follow_symlinks=False)
            if inode.is_symlink:
                target = self.image.readlink(inode)
                if target.startswith("/"):
                    here = []
                todo += target.split("/")[::-1]
            else:
                here.append(name)
        return Path(self.image, "/".join(here))

    def xattrs(self) -> dict[str, bytes]:
        """All extended attributes of the inode at this path; follows a link."""
        return self.image.xattrs(self._path)

    # directories ------------------------------------------------------------------------

    def iterdir(self) -> Iterator[Path]:
        """The paths of a directory's entries."""
        return (self / entry.name for entry in self.image.scandir(self._path))

    def glob(self, pattern: str) -> Iterator[Path]:
        """The paths below this one that match ``pattern``, sorted by directory.  ``**`` matches any
        depth, and does not follow links to directories.  Raises ValueError unless the pattern is
        relative and not empty."""
        parts = [p for p in pattern.split("/") if p]
        if not parts or pattern.startswith("/"):
            raise ValueError(f"not a relative pattern: {pattern!r}")
        seen = set()
        for path in self._glob(parts):
            if path not in seen:
                seen.add(path)
                yield path

    def rglob(self, pattern: str) -> Iterator[Path]:
        """``glob`` with ``**/`` in front."""
        return self.glob(f"**/{pattern}")

    def _glob(self, parts: list[str]) -> Iterator[Path]:
        if not parts:
            yield self
            return
        first, rest = parts[0], parts[1:]
        if first == "**":
            yield from self._glob(rest)
            if self.is_dir():
                for entry in self.image.scandir(self._path):
                    if entry.is_dir():
                        yield from (self / entry.name)._glob(parts)
        elif not any(c in first for c in "*?["):
            child = self / first
            if rest or self.image.exists(child._path, follow_symlinks=False):
                yield from child._glob(rest)
        elif self.is_dir():
            for entry in self.image.scandir(self._path):
                if fnmatch.fnmatchcase(entry.name, first):
                    yield from (self / entry.name)._glob(rest)

    def walk(self) -> Iterator[tuple[Path, list[str], list[str]]]:
        """(path, names of directories, names of others) of each directory below, parents first."""
        for path, directories, others in self.image.walk(self._path):
            names = [e.name for e in directories]
            yield Path(self.image, path), names, [e.name for e in others]
            directories[:] = [e for e in directories if e.name in names]

    # file data --------------------------------------------------------------------------

    def open(
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """Open for reading, as text (``"r"``) or bytes (``"rb"``).  Raises ValueError for other
        modes."""
        if set(mode) - set("rbt") or mode.count("r") != 1 or ("b" in mode and "t" in mode):
            raise ValueError(f"mode {mode!r}: images are read-only, use 'r' or 'rb'")
        file = self.image.open(self._path)
        if "b" in mode:
            return file
        return io.TextIOWrapper(file, encoding or "utf-8", errors, newline)

    def read_bytes(self) -> bytes:
        """The whole content of a file."""
        return self.image.read(self._path)

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """The whole content of a file as text (UTF-8 by default)."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

"""An fsspec file system: ``fsspec.open("erofs://etc/os-release", fo="system.erofs")``.

Registered under the entry point ``erofs``; needs the extra ``pyerofs[fsspec]``.  Like fsspec's own
archive file systems, it takes the image as ``fo``: a path, a URL of another fsspec file system, or an
open binary file.  Chained URLs work, too: ``erofs://etc/os-release::https://host/system.erofs``.
"""

from __future__ import annotations

import io
from typing import Any

import fsspec
from fsspec.archive import AbstractArchiveFileSystem

from pyerofs import image
from pyerofs.format import tree
from pyerofs.format.model import Inode
from pyerofs.image import BUFFER_SIZE, DirEntry, ErofsFile


class _File(io.BufferedReader):
    """A buffered file with the attribute ``size``, which fsspec expects."""

    def __init__(self, raw: ErofsFile) -> None:
        tree.require_file(raw.inode, raw.inode)
        super().__init__(raw, BUFFER_SIZE)
        self.size = raw.inode.size


class ErofsFileSystem(AbstractArchiveFileSystem):  # type: ignore[misc]
    """The files of an EROFS image, read-only."""

    root_marker = ""
    protocol = "erofs"
    cachable = False

    def __init__(
        self,
        fo: Any = "",
        target_protocol: str | None = None,
        target_options: dict[str, Any] | None = None,
        offset: int = 0,
        devices: list[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """``fo``: the image; ``offset`` and ``devices`` as for ``pyerofs.open``."""
        super().__init__(self, **kwargs)
        self._opened: Any = None
        if isinstance(fo, str) and ("://" in fo or target_protocol):
            self._opened = fsspec.open(
                fo, mode="rb", protocol=target_protocol, **(target_options or {})
            )
            fo = self._opened.open()
        self._image = image.open(fo, offset=offset, devices=devices or ())

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        """A path without a leading slash, the form that fsspec's own methods compare and join."""
        if isinstance(path, list):
            return [cls._strip_protocol(p) for p in path]
        return super()._strip_protocol(path).lstrip("/")

    def close(self) -> None:
        """Close the image and the file that it was read from."""
        self._image.close()
        if self._opened is not None:
            self._opened.close()

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """fsspec's description of a path; does not follow a link at its end."""
        path = self._strip_protocol(path).strip("/")
        return self._describe(path, self._image.lookup(path, follow_symlinks=False))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """The entries of a directory, or the file itself if the path is not a directory."""
        path = self._strip_protocol(path).strip("/")
        inode = self._image.lookup(path)
        if not inode.is_dir:
            rows = [self._describe(path, inode)]
        else:
            rows = [self._entry(path, e) for e in self._image.scandir(path)]
        return rows if detail else [row["name"] for row in rows]

    def _entry(self, parent: str, entry: DirEntry) -> dict[str, Any]:
        return self._describe(f"{parent}/{entry.name}".lstrip("/"), entry.inode)

    def _describe(self, path: str, inode: Inode) -> dict[str, Any]:
        description: dict[str, Any] = {
            "name": path,
            "size": inode.size if inode.is_file else 0,
            "type": "directory" if inode.is_dir else "file" if inode.is_file else "other",
            "mode": inode.mode,
            "uid": inode.uid,
            "gid": inode.gid,
            "mtime": inode.mtime_ns / 1e9,
            "ino": tree.inode_number(self._image.volume, inode.nid),
            "nlink": inode.nlink,
        }
        if inode.is_symlink:
            description |= {"type": "link", "islink": True}
            description["destination"] = self._image.readlink(inode)
        return description

    def exists(self, path: str, **kwargs: Any) -> bool:
        return self._image.exists(self._strip_protocol(path))

    def isdir(self, path: str) -> bool:
        return self.exists(path) and self._image.lookup(self._strip_protocol(path)).is_dir

    def isfile(self, path: str) -> bool:
        return self.exists(path) and self._image.lookup(self._strip_protocol(path)).is_file

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode != "rb":
            raise ValueError(f"mode {mode!r}: images are read-only, use 'rb'")
        inode = self._image.lookup(self._strip_protocol(path))
        return _File(ErofsFile(self._image, inode))

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        """A range of a file; negative positions count from its end."""
        inode = self._image.lookup(self._strip_protocol(path))
        start, end, _ = slice(start, end).indices(inode.size)
        return self._image.read(inode, start, max(end - start, 0))

"""The synchronous API: open an image, inspect it, read files.

Thread-safe: any number of threads may use one Image.  Nothing is ever written.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NoReturn, TypeAlias, TypeVar, cast

from pyerofs.errors import NotADirectory, NotFound, TooManySymlinks
from pyerofs.format import data, extent, superblock, tree
from pyerofs.format import inode as inodes
from pyerofs.format.memory import DEFAULT_CACHE_SIZE, BlockingMemory
from pyerofs.format.model import Dirent, Extent, Inode
from pyerofs.format.tree import PathLike, Stat
from pyerofs.format.volume import Volume
from pyerofs.sources.base import Source, VerifiableSource
from pyerofs.sources.open import Openable, open_sources
from pyerofs.sources.spec import Access

Target: TypeAlias = PathLike | Inode  # an Inode is accepted wherever a path is

T = TypeVar("T")

BUFFER_SIZE = 64 << 10


def open(
    what: Openable,
    *,
    offset: int = 0,
    devices: Sequence[Openable] = (),
    cache_size: int = DEFAULT_CACHE_SIZE,
    access: Access | None = None,
) -> Image:
    """Open an EROFS image.

    ``what`` is a path (regular file or block device), a URL (``https://…``), a layer in a registry
    (``oci://REFERENCE``) or an OCI layout (``oci-layout:DIR``), a SourceSpec, a seekable binary
    file object (not closed), or a Source (closed with the image).  The image starts at byte
    ``offset`` of ``what``.  ``devices``: the image's extra devices, in the order of its device
    table.  ``cache_size``: bytes of metadata and decoded data to cache in memory.  ``access``: how
    to access remote sources: password, timeout, the cache on disk.

    Raises SourceError, CorruptImage, UnsupportedFeature; ErofsError for a wrong number of devices."""
    sources = open_sources(what, offset, devices, access)
    try:
        return Image(sources, cache_size)
    except BaseException:
        for source in sources:
            source.close()
        raise


class DirEntry:
    """An entry of a directory, like os.DirEntry."""

    __slots__ = ("_image", "_inode", "_parent", "dirent", "name")

    def __init__(self, image: Image, parent: str, dirent: Dirent) -> None:
        self._image = image
        self._inode: Inode | None = None
        self.dirent = dirent
        self.name = tree.decode(dirent.name)
        self._parent = parent

    @property
    def path(self) -> str:
        """The entry's path, below the path that was listed."""
        return f"{self._parent.rstrip('/')}/{self.name}"

    @property
    def inode(self) -> Inode:
        """The entry's own inode; links are not followed."""
        if self._inode is None:
            self._inode = self._image.inode(self.dirent.nid)
        return self._inode

    def stat(self) -> Stat:
        """The entry's own stat; links are not followed."""
        return self._image.stat(self.inode)

    def is_dir(self) -> bool:
        return self.inode.is_dir

    def is_file(self) -> bool:
        return self.inode.is_file

    def is_symlink(self) -> bool:
        return self.inode.is_symlink

    def __fspath__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        return f"<DirEntry {self.path!r}>"


class Image:
    """An open EROFS image.  Made by ``pyerofs.open``.

    Paths are str, bytes or os.PathLike; a leading ``/`` is optional; an Inode is accepted wherever
    a path is.  Names are returned as str, with undecodable bytes as surrogate escapes.  All methods
    block; they raise CorruptImage or SourceError if the image or its source is at fault."""

    def __init__(self, sources: Sequence[Source], cache_size: int = DEFAULT_CACHE_SIZE) -> None:
        self.sources = tuple(sources)
        self._closed = False
        memory = BlockingMemory(self.sources, cache_size)
        sb = superblock.load(lambda at, n: memory.bytes_at(0, at, n), memory.sizes[0])
        self.volume = Volume(sb, memory, len(self.sources) - 1)
        data.attach_metabox(self.volume)
        self.root = tree.root(self.volume)

    @property
    def superblock(self) -> superblock.Superblock:
        """The decoded superblock: block size, features, label, times, devices …"""
        return self.volume.sb

    @property
    def closed(self) -> bool:
        """Whether the image is closed."""
        return self._closed

    def close(self) -> None:
        """Close the image's sources.  Idempotent.  Later reads raise ValueError."""
        self._closed = True
        if hasattr(self, "volume"):
            self.volume.memory = cast(BlockingMemory, _Closed())
            self.volume.known.clear()
        for source in self.sources:
            source.close()

    def verify(self, *, rest: bool = True) -> None:
        """Check the digests of the image's blobs.  Blobs of registries and OCI layouts have
        digests; local files and URLs have none and are skipped.

        Blocks until all blobs are fetched; with ``rest=False``, checks only those that are complete
        already.  Raises IntegrityError if a digest does not match: then no data read so far can be
        trusted."""
        for source in self.sources:
            if isinstance(source, VerifiableSource) and (rest or source.whole):
                source.verify()

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # inodes -----------------------------------------------------------------------------

    def inode(self, nid: int) -> Inode:
        """The inode with a given nid."""
        return inodes.load(self.volume, nid)

    def lookup(self, path: Target, *, follow_symlinks: bool = True) -> Inode:
        """The inode at a path.  Raises NotFound, NotADirectory, TooManySymlinks."""
        if self._closed:
            raise ValueError("the image is closed")
        if isinstance(path, Inode):
            return path
        return tree.resolve(self.volume, tree.encode(path), follow_symlinks)

    def exists(self, path: Target, *, follow_symlinks: bool = True) -> bool:
        """Whether a path exists (False for dangling links)."""
        try:
            self.lookup(path, follow_symlinks=follow_symlinks)
        except (NotFound, NotADirectory, TooManySymlinks):
            return False
        return True

    def stat(self, path: Target, *, follow_symlinks: bool = True) -> Stat:
        """Stat of the inode at a path, as the kernel's driver shows it."""
        return tree.stat(self.volume, self.lookup(path, follow_symlinks=follow_symlinks))

    def readlink(self, path: Target) -> str:
        """The target of a symbolic link.  Raises NotASymlink."""
        inode = self.lookup(path, follow_symlinks=False)
        return tree.decode(tree.link_target(self.volume, inode))

    # extended attributes ----------------------------------------------------------------

    def xattrs(self, path: Target, *, follow_symlinks: bool = True) -> dict[str, bytes]:
        """All extended attributes, ``trusted.*`` included."""
        found = tree.xattrs(self.volume, self.lookup(path, follow_symlinks=follow_symlinks))
        return {tree.decode(name): value for name, value in found.items()}

    def getxattr(self, path: Target, name: str | bytes, *, follow_symlinks: bool = True) -> bytes:
        """One extended attribute.  Raises NoSuchXattr."""
        inode = self.lookup(path, follow_symlinks=follow_symlinks)
        return tree.get_xattr(self.volume, inode, tree.encode(name))

    # directories ------------------------------------------------------------------------

    def scandir(self, path: Target = "/") -> Iterator[DirEntry]:
        """The entries of a directory, one block at a time, in the image's (byte) order.  Raises
        NotADirectory."""
        parent = "" if isinstance(path, Inode) else tree.decode(tree.encode(path))
        inode = self.lookup(path)
        if not inode.is_dir:
            raise NotADirectory(tree.shown(inode, path))
        return self._while_open(DirEntry(self, parent, e) for e in tree.entries(self.volume, inode))

    def _while_open(self, items: Iterator[T]) -> Iterator[T]:
        for item in items:
            if self._closed:
                raise ValueError("the image is closed")
            yield item

    def listdir(self, path: Target = "/") -> list[str]:
        """The names in a directory."""
        return [e.name for e in self.scandir(path)]

    def walk(self, top: PathLike = "/") -> Iterator[tuple[str, list[DirEntry], list[DirEntry]]]:
        """(path, directories, others) of each directory below ``top``, parents first.

        Like os.walk, with DirEntries: directories that the caller removes from the list are not
        entered.  Raises CorruptImage if a directory contains itself (a hostile image)."""
        above = tree.decode(tree.encode(top))
        trail = tree.Trail(self.lookup(top))
        while (step := trail.next()) is not None:
            place, here = step
            path = place.below(above)
            directories: list[DirEntry] = []
            others: list[DirEntry] = []
            for dirent in self._while_open(tree.entries(self.volume, here)):
                entry = DirEntry(self, path, dirent)
                (directories if entry.is_dir() else others).append(entry)
            yield path, directories, others
            trail.enter([(e.dirent.name, e.inode) for e in directories])

    # file data --------------------------------------------------------------------------

    def open(self, path: Target) -> io.BufferedReader:
        """A seekable, buffered binary file.  Raises IsADirectory, NotAFile."""
        return _Reader(ErofsFile(self, self._file(path)), BUFFER_SIZE)

    def read(self, path: Target, offset: int = 0, length: int | None = None) -> bytes:
        """``length`` bytes of a file at ``offset``, by default all; fewer only at its end.

        At most 2 GiB at once (ErofsError).  Raises IsADirectory, NotAFile; ValueError for a
        negative offset or length."""
        inode = self._file(path)
        if length is None:
            length = inode.size
        if offset < 0 or length < 0:
            raise ValueError(f"negative offset or length: {offset}, {length}")
        return bytes(data.read(self.volume, inode, offset, length))

    def extents(self, path: Target) -> Iterator[Extent]:
        """The extent map of a file, directory or link: where each range of it lies."""
        inode = self.lookup(path)
        return self._while_open(extent.extents(self.volume, inode, 0, inode.size))

    def _file(self, path: Target) -> Inode:
        inode = self.lookup(path)
        tree.require_file(inode, path)
        return inode


class _Reader(io.BufferedReader):
    """A buffered file whose iteration, too, fails once its image is closed."""

    def __next__(self) -> bytes:
        if self.closed:
            raise ValueError("readline of closed file")
        return super().__next__()


class _Closed:
    """The memory of a closed image: any use raises ValueError."""

    def __getattr__(self, name: str) -> NoReturn:
        raise ValueError("the image is closed")


class ErofsFile(io.RawIOBase):
    """An unbuffered file in an image; ``Image.open`` wraps it in a BufferedReader."""

    def __init__(self, image: Image, inode: Inode) -> None:
        self._image = image
        self.inode = inode
        self._position = 0

    @property
    def closed(self) -> bool:
        """Whether the file or its image is closed."""
        return super().closed or self._image.closed

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.inode.size}
        if whence not in base:
            raise ValueError(f"invalid whence: {whence}")
        if base[whence] + offset < 0:
            raise ValueError(f"negative seek position {base[whence] + offset}")
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        found = data.read(self._image.volume, self.inode, self._position, len(buffer))
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)

    def readall(self) -> bytes:
        if self.closed:
            raise ValueError("read of closed file")
        found = data.read(self._image.volume, self.inode, self._position, self.inode.size)
        self._position += len(found)
        return bytes(found)

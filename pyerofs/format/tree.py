"""Paths, stat and listings for both APIs, as plain functions over a Volume.

Names and link targets are bytes here.  A path is resolved within the image only: an absolute link
target starts at the image's root, and ``..`` at the root stays there.
"""

from __future__ import annotations

import os
import stat as st
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple, NoReturn, TypeAlias

from pyerofs.errors import (
    CorruptImage,
    IsADirectory,
    NoSuchXattr,
    NotADirectory,
    NotAFile,
    NotASymlink,
    NotFound,
    TooManySymlinks,
)
from pyerofs.format import directory, xattr
from pyerofs.format import inode as inodes
from pyerofs.format.data import read
from pyerofs.format.model import Dirent, Inode
from pyerofs.format.volume import Volume

MAX_SYMLINKS = 40  # as Linux has it
MAX_KNOWN = 8192  # entries in the cache of path look-ups: some MiB
MAX_TARGET = 4096  # bytes of a link's target: PATH_MAX
MAX_DISORDER = 100  # out-of-order entries of a directory that are skipped before giving up
MAX_PATH = 4096  # bytes of a path that is displayed in full
ENDS = 14  # names displayed of a longer path, half from each end: 14 of 255 bytes fit MAX_PATH

PathLike: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class Stat(NamedTuple):
    """The result of stat(2) for an inode, as if the kernel's driver had mounted the image."""

    st_mode: int
    st_ino: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_size: int
    st_blksize: int
    st_blocks: int  # in units of 512 bytes
    st_rdev: int
    st_mtime_ns: int

    @property
    def st_mtime(self) -> float:
        return self.st_mtime_ns / 1e9

    @property
    def st_atime_ns(self) -> int:
        """The mtime: EROFS stores one time, which is used for all three."""
        return self.st_mtime_ns

    @property
    def st_ctime_ns(self) -> int:
        return self.st_mtime_ns


def encode(path: PathLike) -> bytes:
    """A path as bytes.  A str is encoded as UTF-8; surrogate escapes become the original bytes."""
    found = os.fspath(path)
    return found if isinstance(found, bytes) else found.encode("utf-8", "surrogateescape")


def decode(name: bytes) -> str:
    """The reverse of ``encode``."""
    return name.decode("utf-8", "surrogateescape")


def root(vol: Volume) -> Inode:
    """The root directory's inode.  Raises CorruptImage if it is not a directory."""
    found = inodes.load(vol, vol.sb.root_nid)
    if not found.is_dir:
        raise CorruptImage("root inode is not a directory", nid=found.nid)
    vol.root = found
    return found


def resolve(vol: Volume, path: bytes, follow: bool = True) -> Inode:
    """The inode at a path; ``follow``: also follow a symbolic link at the path's end.

    Raises NotFound, NotADirectory, TooManySymlinks, CorruptImage, SourceError, or Fault
    (FaultingMemory only)."""
    known = vol.known
    trail = [vol.root or root(vol)]  # from the root down to the current directory
    todo = path.split(b"/")[::-1]
    links = 0
    while todo:
        name = todo.pop()
        here = trail[-1]
        if not here.is_dir:
            raise NotADirectory(path)
        if not name or name == b".":
            continue
        if name == b"..":
            if len(trail) > 1:
                trail.pop()
            continue
        child = known.get((here.nid, name))
        if child is None:
            child = lookup(vol, here, name)
            if child is None:
                raise NotFound(path)
            if len(known) >= MAX_KNOWN:
                known.clear()
            known[here.nid, name] = child
        if child.is_symlink and (follow or todo):
            links += 1
            if links > MAX_SYMLINKS:
                raise TooManySymlinks(path)
            target = link_target(vol, child)
            if target.startswith(b"/"):
                del trail[1:]
            todo += target.split(b"/")[::-1]
            continue
        trail.append(child)
    if path.endswith(b"/") and not trail[-1].is_dir:
        raise NotADirectory(path)
    return trail[-1]


def lookup(vol: Volume, parent: Inode, name: bytes) -> Inode | None:
    """The inode of a directory's entry ``name``, or None if there is none."""
    found = directory.lookup(vol, parent, name)
    return None if found is None else inodes.load(vol, found[0])


def link_target(vol: Volume, inode: Inode) -> bytes:
    """The target of a symbolic link.  Raises NotASymlink, CorruptImage."""
    check_link(inode)
    target = bytes(read(vol, inode, 0, inode.size))
    if b"\0" in target:
        raise CorruptImage("NUL in a link target", nid=inode.nid)
    return target


def check_link(inode: Inode) -> None:
    """Raise NotASymlink, or CorruptImage if a link's target has a size that none can have."""
    if not inode.is_symlink:
        raise NotASymlink(f"nid {inode.nid}")
    if not 0 < inode.size <= MAX_TARGET:
        raise CorruptImage(f"link target of {inode.size} bytes", nid=inode.nid)


def entries(vol: Volume, parent: Inode) -> Iterator[Dirent]:
    """The entries of a directory without ``.`` and ``..``.

    Raises CorruptImage unless names are strictly increasing: look-ups would miss an entry out of
    order, and a small image could list the same names many times."""
    return orderly_entries(vol, parent, _give_up)


def orderly_entries(
    vol: Volume, parent: Inode, complain: Callable[[CorruptImage], object]
) -> Iterator[Dirent]:
    """Like ``entries``, but skips entries that are out of order and calls ``complain`` for each of
    them.  Raises NotADirectory; CorruptImage for more than MAX_DISORDER of them."""
    if not parent.is_dir:
        raise NotADirectory(f"nid {parent.nid}")
    last = b""
    bad = 0
    for entry in directory.entries(vol, parent):
        if entry.name <= last:
            error = disorder(entry.name, last, parent)
            bad += 1
            if bad > MAX_DISORDER:
                raise error
            complain(error)
            continue
        last = entry.name
        if last != b"." and last != b"..":
            yield entry


def _give_up(error: CorruptImage) -> NoReturn:
    raise error


def disorder(name: bytes, last: bytes, parent: Inode) -> CorruptImage:
    """The error for a name that does not sort after the one before it."""
    return CorruptImage(f"entry {name!r} after {last!r}", nid=parent.nid)


class Place:
    """A directory met on a walk: its name, and the Place of its parent.

    Paths are built on demand, because storing those of a deep tree would exhaust memory."""

    __slots__ = ("depth", "name", "parent")

    def __init__(self, parent: Place | None = None, name: bytes = b"") -> None:
        self.parent = parent
        self.name = name
        self.depth: int = 0 if parent is None else parent.depth + 1

    def names(self) -> list[bytes]:
        """The names of the directories from below the walk's start down to this one."""
        found = []
        here: Place = self
        while here.parent is not None:
            found.append(here.name)
            here = here.parent
        return found[::-1]

    def path(self, name: bytes = b"") -> bytes:
        """The path of entry ``name`` in this directory (default: of the directory itself), relative
        to the walk's start, without a leading slash."""
        return b"/".join([*self.names(), name] if name else self.names())

    def below(self, top: str) -> str:
        """This directory's path, for a walk that started at ``top``."""
        path = decode(self.path())
        return f"{top.rstrip('/')}/{path}" if path else top

    def shown(self, name: bytes = b"") -> bytes:
        """Like ``path``, for display: a deep path of more than MAX_PATH bytes is cut to its
        beginning and end."""
        names = self.names()
        if self.depth > ENDS and sum(map(len, names)) + len(names) > MAX_PATH:
            names = [*names[: ENDS // 2], b"[...]", *names[-ENDS // 2 :]]
        return b"/".join([*names, name] if name else names)


class Trail:
    """The directories still to visit on a depth-first walk, parents before children.

    ``next`` returns one and its Place; ``enter`` adds the subdirectories found in that one."""

    def __init__(self, start: Inode) -> None:
        self._todo: list[tuple[Place, Inode]] = [(Place(), start)]
        self._here = Place()
        self._seen: set[int] = set()

    def next(self) -> tuple[Place, Inode] | None:
        """The next directory, or None at the end.  Raises CorruptImage if a directory is reached a
        second time: no valid image has that, and a loop would never end."""
        if not self._todo:
            return None
        self._here, here = self._todo.pop()
        once(self._seen, here)
        return self._here, here

    def enter(self, directories: list[tuple[bytes, Inode]]) -> None:
        """Add the subdirectories of the directory that ``next`` returned last."""
        for name, inode in reversed(directories):
            self._todo.append((Place(self._here, name), inode))


def shown_path(place: Place, name: bytes = b"") -> str:
    """The path, for display, of entry ``name`` in ``place`` on a walk from the root."""
    return "/" + decode(place.shown(name))


def walk(vol: Volume, start: Inode) -> Iterator[tuple[Place, Dirent, Inode]]:
    """Yield (place, entry, inode) for everything below a directory; all entries of a directory come
    before the contents of its subdirectories.  Raises CorruptImage."""
    trail = Trail(start)
    while (step := trail.next()) is not None:
        place, here = step
        directories = []
        for entry in entries(vol, here):
            inode = inodes.load(vol, entry.nid)
            yield place, entry, inode
            if inode.is_dir:
                directories.append((entry.name, inode))
        trail.enter(directories)


def paths_of(vol: Volume, nids: Collection[int]) -> list[str]:
    """A path of each inode, in the order of ``nids``; inodes not in the tree are left out.  Walks
    the tree.  Raises CorruptImage."""
    wanted = set(nids)
    found: dict[int, str] = {}
    for place, entry, inode in walk(vol, vol.root or root(vol)):
        if inode.nid in wanted:
            found.setdefault(inode.nid, "/" + decode(place.path(entry.name)))
            if len(found) == len(wanted):
                break
    return [found[nid] for nid in nids if nid in found]


def once(seen: set[int], directory: Inode) -> None:
    """Add a directory to ``seen``; raise CorruptImage if it is in there already."""
    if directory.nid in seen:
        raise CorruptImage("directory reached twice", nid=directory.nid)
    seen.add(directory.nid)


def require_file(inode: Inode, path: PathLike | Inode) -> None:
    """Raise IsADirectory or NotAFile unless the inode has file data."""
    if inode.is_dir:
        raise IsADirectory(shown(inode, path))
    if not inode.is_file:
        raise NotAFile(shown(inode, path))


def shown(inode: Inode, path: PathLike | Inode) -> str:
    """The name of a lookup's target in messages: the path, or the nid if an Inode was given."""
    return f"nid {inode.nid}" if isinstance(path, Inode) else decode(encode(path))


def stat(vol: Volume, inode: Inode) -> Stat:
    """An inode's stat."""
    return Stat(
        inode.mode,
        inode_number(vol, inode.nid),
        inode.nlink,
        inode.uid,
        inode.gid,
        inode.size,
        vol.sb.block_size,
        blocks_512(vol, inode),
        inode.rdev,
        inode.mtime_ns,
    )


def blocks_512(vol: Volume, inode: Inode) -> int:
    """st_blocks, in units of 512 bytes: the blocks that a compressed file occupies, or the blocks
    that any other file's size needs."""
    bits = vol.sb.block_bits
    blocks = inode.blocks if inode.is_compressed else -(-inode.size >> bits)
    return blocks << bits - 9


def inode_number(vol: Volume, nid: int) -> int:
    """st_ino as the kernel's driver computes it: the nid; in images with a metabox, the nid's bit
    63 (in the metabox) moves to bit 31."""
    if not vol.sb.metabox_nid:
        return nid
    return nid << 1 & 0xFFFFFFFF00000000 | nid & 0x7FFFFFFF | nid >> 63 << 31


def nid_of(vol: Volume, number: int) -> int:
    """The reverse of ``inode_number``."""
    if not vol.sb.metabox_nid:
        return number
    return number >> 1 & 0x7FFFFFFF80000000 | number & 0x7FFFFFFF | (number >> 31 & 1) << 63


def file_type(inode: Inode) -> str:
    """``file``, ``directory``, ``symlink`` …, for messages and listings."""
    return _TYPES[st.S_IFMT(inode.mode)]


_TYPES = {
    st.S_IFREG: "file",
    st.S_IFDIR: "directory",
    st.S_IFLNK: "symlink",
    st.S_IFCHR: "character device",
    st.S_IFBLK: "block device",
    st.S_IFIFO: "fifo",
    st.S_IFSOCK: "socket",
}


def xattrs(vol: Volume, inode: Inode) -> dict[bytes, bytes]:
    """All extended attributes; of duplicate names the first counts, as in the kernel."""
    found: dict[bytes, bytes] = {}
    for name, value in xattr.items(vol, inode):
        found.setdefault(name, value)
    return found


def get_xattr(vol: Volume, inode: Inode, name: bytes) -> bytes:
    """The value of one extended attribute.  Raises NoSuchXattr."""
    value = xattr.get(vol, inode, name)
    if value is None:
        raise NoSuchXattr(name)
    return value

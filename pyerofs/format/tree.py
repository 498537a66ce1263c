"""Paths, stat and listings: what both APIs offer, as plain functions over a Volume.

Names and link targets are bytes here.  A path is resolved within the image only: an absolute link
target starts at the image's root, and ``..`` at the root stays there.
"""

from __future__ import annotations

import os
import stat as st
from collections.abc import Callable, Iterator
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
MAX_KNOWN = 8192  # names with their inodes that path look-ups remember: some MiB
MAX_TARGET = 4096  # bytes of a link's target: PATH_MAX
MAX_DISORDER = 100  # entries of a directory that are passed over one by one
MAX_PATH = 4096  # bytes of a path that people are shown in full
ENDS = 14  # names that they are shown of a longer one: as many of 255 bytes as there is room for

PathLike: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class Stat(NamedTuple):
    """What stat(2) shows for an inode when the kernel's driver has mounted the image."""

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
        """EROFS stores one time; it stands for all three."""
        return self.st_mtime_ns

    @property
    def st_ctime_ns(self) -> int:
        return self.st_mtime_ns


def encode(path: PathLike) -> bytes:
    """A path as bytes; str as UTF-8 with undecodable bytes as surrogate escapes."""
    found = os.fspath(path)
    return found if isinstance(found, bytes) else found.encode("utf-8", "surrogateescape")


def decode(name: bytes) -> str:
    """The reverse of ``encode``."""
    return name.decode("utf-8", "surrogateescape")


def root(vol: Volume) -> Inode:
    """The root directory.  Raises CorruptImage if it is something else."""
    found = inodes.load(vol, vol.sb.root_nid)
    if not found.is_dir:
        raise CorruptImage("root inode is not a directory", nid=found.nid)
    vol.root = found
    return found


def resolve(vol: Volume, path: bytes, follow: bool = True) -> Inode:
    """The inode that a path leads to; ``follow``: through a link at its end as well.

    Raises NotFound, NotADirectory, TooManySymlinks, CorruptImage, or a Fault of the memory."""
    known = vol.known
    trail = [vol.root or root(vol)]  # from the root down to where we are
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
    """The inode of one entry of a directory, or None."""
    found = directory.lookup(vol, parent, name)
    return None if found is None else inodes.load(vol, found[0])


def link_target(vol: Volume, inode: Inode) -> bytes:
    """Where a symbolic link points.  Raises NotASymlink, CorruptImage."""
    if not inode.is_symlink:
        raise NotASymlink(f"nid {inode.nid}")
    if not 0 < inode.size <= MAX_TARGET:
        raise CorruptImage(f"link target of {inode.size} bytes", nid=inode.nid)
    target = bytes(read(vol, inode, 0, inode.size))
    if b"\0" in target:
        raise CorruptImage("NUL in a link target", nid=inode.nid)
    return target


def entries(vol: Volume, parent: Inode) -> Iterator[Dirent]:
    """The entries of a directory without ``.`` and ``..``.

    Raises CorruptImage where a name does not come after the one before it: look-ups could not find it,
    and a small image could show the same names over and over."""
    return orderly_entries(vol, parent, _give_up)


def orderly_entries(
    vol: Volume, parent: Inode, complain: Callable[[CorruptImage], object]
) -> Iterator[Dirent]:
    """The same without those that are out of order; ``complain`` is told of each.  Raises CorruptImage
    where there are too many of them to go on."""
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
    """What is wrong with a name that does not come after the one before it."""
    return CorruptImage(f"entry {name!r} after {last!r}", nid=parent.nid)


class Place:
    """A directory on a walk: its name, and the place it is in.

    Paths are made when they are wanted: kept, those of a deep tree would fill the memory."""

    __slots__ = ("depth", "name", "parent")

    def __init__(self, parent: Place | None = None, name: bytes = b"") -> None:
        self.parent = parent
        self.name = name
        self.depth: int = 0 if parent is None else parent.depth + 1

    def names(self) -> list[bytes]:
        """From the top down."""
        found = []
        here: Place = self
        while here.parent is not None:
            found.append(here.name)
            here = here.parent
        return found[::-1]

    def path(self, name: bytes = b"") -> bytes:
        """The path of something in it: without a slash in front."""
        return b"/".join([*self.names(), name] if name else self.names())

    def below(self, top: str) -> str:
        """Its path, where the walk began at ``top``."""
        path = decode(self.path())
        return f"{top.rstrip('/')}/{path}" if path else top

    def shown(self, name: bytes = b"") -> bytes:
        """The same for people: of a path that no system call takes, the beginning and the end."""
        names = self.names()
        if self.depth > ENDS and sum(map(len, names)) + len(names) > MAX_PATH:
            names = [*names[: ENDS // 2], b"[...]", *names[-ENDS // 2 :]]
        return b"/".join([*names, name] if name else names)


class Trail:
    """The directories still to visit on a walk, parents before children, each below its own.

    ``next`` gives one, with its place; ``enter`` adds the directories found in that one."""

    def __init__(self, start: Inode) -> None:
        self._todo: list[tuple[Place, Inode]] = [(Place(), start)]
        self._here = Place()
        self._seen: set[int] = set()

    def next(self) -> tuple[Place, Inode] | None:
        """The next directory, or None at the end.  Raises CorruptImage where one is reached a second
        time: no image has that, and inside itself it would have no end."""
        if not self._todo:
            return None
        self._here, here = self._todo.pop()
        once(self._seen, here)
        return self._here, here

    def enter(self, directories: list[tuple[bytes, Inode]]) -> None:
        """Visit these, found in the directory that ``next`` gave last."""
        for name, inode in reversed(directories):
            self._todo.append((Place(self._here, name), inode))


def shown_path(place: Place, name: bytes = b"") -> str:
    """How people are told of something on a walk from the root."""
    return "/" + decode(place.shown(name))


def walk(vol: Volume, start: Inode) -> Iterator[tuple[Place, Dirent, Inode]]:
    """Everything below a directory, entry by entry, with the place it is in: the rest of a directory
    comes before what is below it.  Raises CorruptImage."""
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


def once(seen: set[int], directory: Inode) -> None:
    """Note a directory; raise CorruptImage if it has been seen before."""
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
    """How messages call what was asked for."""
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
    """st_blocks: what a compressed file occupies, what another one's size needs."""
    bits = vol.sb.block_bits
    blocks = inode.blocks if inode.is_compressed else -(-inode.size >> bits)
    return blocks << bits - 9


def inode_number(vol: Volume, nid: int) -> int:
    """st_ino as the kernel's driver makes it: the nid; with a metabox, its bit moves to bit 31."""
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
    """All extended attributes; the first of a name counts, as for the kernel."""
    found: dict[bytes, bytes] = {}
    for name, value in xattr.items(vol, inode):
        found.setdefault(name, value)
    return found


def get_xattr(vol: Volume, inode: Inode, name: bytes) -> bytes:
    """One extended attribute.  Raises NoSuchXattr."""
    value = xattr.get(vol, inode, name)
    if value is None:
        raise NoSuchXattr(name)
    return value

"""``pyerofs check``: read and verify everything in an image.

Opening the image verifies the superblock and its checksum.  Then every inode reachable from the
root is read: directories must be sorted, free of duplicates and loops, with entries whose types
match; link counts must equal the number of names; xattrs must parse and agree with the name filter;
every pcluster must decode to its length.  Problems are collected, not fatal.
"""

from __future__ import annotations

import argparse
import stat
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from pyerofs.cli.common import open_image, print_json, printable
from pyerofs.cli.workers import Threads, Workers, WorkersEnded, hire
from pyerofs.errors import CorruptImage, DeviceMissing, ErofsError
from pyerofs.format import data, directory, ondisk, tree, xattr
from pyerofs.format import inode as inodes
from pyerofs.format.extent import extents
from pyerofs.format.model import HOLE, Dirent, Inode
from pyerofs.format.tree import Place
from pyerofs.image import Image
from pyerofs.system.progress import Progress

PIECE = 4 << 20
BATCH_FILES = 64
BATCH_BYTES = 8 << 20
MAX_BAD = 100  # bad blocks or entries of a directory before the rest of it is skipped
MAX_PROBLEMS = 10_000  # further ones are dropped


def check(args: argparse.Namespace) -> int:
    """Check the image; exit status 1 if there are problems."""
    with open_image(args, whole=True) as image:
        progress = Progress("checking", image.superblock.inodes, quiet=args.quiet or args.json)
        checker = Checker(image, progress)
        try:
            checker.run()
        finally:
            progress.close()
    problems = sorted(checker.problems, key=lambda p: (p.path, p.what))
    if args.json:
        print_json(
            {
                "inodes": checker.inodes,
                "bytes": checker.bytes,
                "problems": [asdict(p) for p in problems],
            }
        )
        return 1 if problems else 0
    for problem in problems:
        print(f"{printable(problem.path)}: {problem.what}{problem.where}")
    print(
        f"{checker.inodes} inodes, {checker.bytes} bytes of file data,"
        f" {len(problems) or 'no'} problems"
    )
    return 1 if problems else 0


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem, with its path, nid and byte offset in the image, as far as known."""

    path: str
    what: str
    nid: int | None = None
    offset: int | None = None

    @property
    def where(self) -> str:
        parts = []
        if self.nid is not None:
            parts.append(f"nid {self.nid}")
        if self.offset is not None:
            parts.append(f"offset {self.offset:#x}")
        return f" ({', '.join(parts)})" if parts else ""


# path of a directory (None: not in a directory), (name, nid) of entries in it
FileGroup = tuple[bytes | None, list[tuple[bytes, int]]]
Found = tuple[list[Problem], int, int]  # problems, bytes, files on missing devices


class Checker:
    """One check of one image."""

    _workers: Workers[FileGroup, Found] | Threads[FileGroup, Found]  # check data and xattrs

    def __init__(self, image: Image, progress: Progress) -> None:
        self._image = image
        self._vol = image.volume
        self._progress = progress
        self._lock = threading.Lock()
        self._links: dict[int, int] = {}  # nid -> names found
        self._inodes: dict[int, tuple[Place, bytes, int]] = {}  # first name and link count, by nid
        self.problems: list[Problem] = []
        self.inodes = 0
        self.bytes = 0
        self.unread = 0  # files on missing devices

    def run(self) -> None:
        """Check everything; fills ``problems``."""
        self._workers = hire(self._batch, self._found, self._image.superblock.inodes)
        try:
            self._walk()
            self._special()
        except WorkersEnded:
            pass  # close raises the cause
        finally:
            results = self._workers.close()
        for problems, size, unread in results:
            self.problems += problems
            self.bytes += size
            self.unread += unread
        if self.unread:
            self._add("", f"{self.unread} files are on missing devices", None)
        del self.problems[MAX_PROBLEMS:]
        for nid, (place, name, nlink) in self._inodes.items():
            if self._links[nid] != nlink:
                self._add(
                    tree.shown_path(place, name),
                    f"link count {nlink}, {self._links[nid]} names found",
                    nid,
                )

    def _found(self) -> Found:
        return self.problems, self.bytes, self.unread

    def _add(self, path: str, what: str, nid: int | None, offset: int | None = None) -> None:
        with self._lock:
            if len(self.problems) < MAX_PROBLEMS:
                self.problems.append(Problem(path or "/", what, nid, offset))

    def _caught(self, path: str, e: Exception, nid: int) -> None:
        if isinstance(e, DeviceMissing):
            with self._lock:
                self.unread += 1
            return
        if isinstance(e, CorruptImage):
            self._add(path, e.what, e.nid if e.nid is not None else nid, e.offset)
        else:
            self._add(path, str(e), nid)

    def _walk(self) -> None:
        root = self._image.root
        stack: list[tuple[Place, Inode, int]] = [(Place(), root, root.nid)]
        seen: set[int] = set()
        while stack:
            place, here, parent = stack.pop()
            shown = place.shown()
            path = "/" + tree.decode(shown)
            self.inodes += 1
            self._progress.advance()
            try:
                tree.once(seen, here)
            except CorruptImage as e:
                self._caught(path, e, here.nid)
                continue
            self._xattrs(path, here)
            subdirectories = 0
            batch: list[tuple[bytes, int]] = []
            size = 0
            for entry in self._entries(path, here, parent):
                try:
                    child = inodes.load(self._vol, entry.nid)
                except ErofsError as e:
                    self._caught(tree.shown_path(place, entry.name), e, entry.nid)
                    continue
                if stat.S_IFMT(child.mode) != ondisk.MODE_OF_FT.get(entry.file_type):
                    found = tree.file_type(child)
                    self._add(
                        tree.shown_path(place, entry.name),
                        f"entry of type {entry.file_type} for a {found}",
                        child.nid,
                    )
                if child.is_dir:
                    subdirectories += 1
                    stack.append((Place(place, entry.name), child, here.nid))
                    continue
                names = self._links.get(child.nid, 0)
                self._links[child.nid] = names + 1
                if names:
                    continue
                self._inodes[child.nid] = (place, entry.name, child.nlink)
                batch.append((entry.name, child.nid))
                size += child.size
                if len(batch) >= BATCH_FILES or size >= BATCH_BYTES:
                    self._submit(shown, batch)
                    batch, size = [], 0
            self._submit(shown, batch)
            if here.nlink != subdirectories + 2 and here.nlink != 1:
                self._add(
                    path, f"link count {here.nlink}, {subdirectories} subdirectories", here.nid
                )

    def _entries(self, path: str, here: Inode, parent: int) -> Iterator[Dirent]:
        """A directory's entries except ``.`` and ``..``, which are checked here.  After MAX_BAD bad
        blocks or entries the rest of the directory is skipped."""
        last = highest = b""
        bad = 0
        dots = set()
        for index in range(-(-here.size // self._vol.sb.directory_block_size)):
            try:
                block = directory.block_entries(self._vol, here, index)
            except ErofsError as e:
                self._caught(path, e, here.nid)
                block = []
                bad += 1
            for entry in block:
                if entry.name <= last or entry.name == highest:
                    self._caught(path, tree.disorder(entry.name, last, here), here.nid)
                    bad += 1
                highest = max(highest, entry.name)
                last = entry.name
                if entry.name in (b".", b".."):
                    dots.add(entry.name)
                    if entry.nid != (here.nid if entry.name == b"." else parent):
                        name = entry.name.decode()
                        self._add(path, f"'{name}' leads to nid {entry.nid}", here.nid)
                else:
                    yield entry
            if bad >= MAX_BAD:
                break
        for dot in (b".", b".."):
            if dot not in dots and not (dot == b"." and here.dot_omitted):
                self._add(path, f"no '{dot.decode()}' entry", here.nid)

    def _special(self) -> None:
        """Check the packed and metabox inodes, which no directory contains."""
        sb = self._vol.sb
        for name, nid in ((b"<packed inode>", sb.packed_nid), (b"<metabox inode>", sb.metabox_nid)):
            if nid:
                self._submit(None, [(name, nid)])

    def _submit(self, here: bytes | None, names: list[tuple[bytes, int]]) -> None:
        if names:
            self._workers.submit((here, names))
            self.inodes += len(names)
            self._progress.advance(len(names))

    def _batch(self, batch: FileGroup, fd: int) -> None:
        """Check one batch, in a worker."""
        here, names = batch
        total = 0
        for name, nid in names:
            path = tree.decode(
                name if here is None else b"/%s/%s" % (here, name) if here else b"/" + name
            )
            try:
                inode = inodes.load(self._vol, nid)
            except ErofsError as e:
                self._caught(path, e, nid)
                continue
            self._xattrs(path, inode)
            total += self._data(path, inode)
        with self._lock:
            self.bytes += total

    def _data(self, path: str, inode: Inode) -> int:
        """Read a whole file or link; returns the size of its file data in bytes."""
        try:
            if inode.is_symlink:
                tree.link_target(self._vol, inode)
            if not inode.is_file:
                return 0
            for extent in extents(self._vol, inode, 0, inode.size):
                if extent.kind == HOLE:
                    continue
                for skip in range(0, extent.length, PIECE):
                    n = min(PIECE, extent.length - skip)
                    data.piece(self._vol, inode, extent, skip, n)
        except ErofsError as e:
            self._caught(path, e, inode.nid)
        return inode.size

    def _xattrs(self, path: str, inode: Inode) -> None:
        if not inode.xattr_size:
            return
        try:
            names = [name for name, _ in xattr.items(self._vol, inode)]
            for name in names:
                if xattr.filtered_out(self._vol, inode, name):
                    self._add(path, f"name filter denies xattr {name!r}", inode.nid)
            if len(set(names)) != len(names):
                self._add(path, "an xattr comes twice", inode.nid)
        except ErofsError as e:
            self._caught(path, e, inode.nid)

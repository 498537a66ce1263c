"""``pyerofs check``: read and verify everything in an image.

Opening the image verifies the superblock and its checksum.  Then every inode reachable from the
root is read: directories must be sorted, free of duplicates and loops, with entries whose types
match; link counts must equal the number of names; xattrs must parse and agree with the name filter;
every pcluster must decode to its length.  Problems are collected, not fatal.

With ``--metadata`` no file data and no link target is read: instead, the extents of a file must
cover it and lie within what holds its bytes.
"""

from __future__ import annotations

import argparse
import threading
from collections import Counter
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
    with open_image(args, whole=not args.metadata) as image:
        progress = Progress("checking", image.superblock.inodes, quiet=args.quiet or args.json)
        checker = Checker(image, progress, data=not args.metadata)
        try:
            checker.run()
        finally:
            progress.close()
    problems = sorted(checker.problems, key=lambda p: (p.path, p.what))
    if args.json:
        print_json(
            {
                "checked": "metadata" if args.metadata else "everything",
                "inodes": checker.inodes,
                "bytes": checker.bytes,
                "problems": [asdict(p) for p in problems],
            }
        )
        return 1 if problems else 0
    for problem in problems:
        print(f"{printable(problem.path)}: {problem.what}{problem.where}")
    print(
        f"{checker.inodes} inodes, {checker.bytes} bytes of file data"
        f"{' (not read)' if args.metadata else ''}, {len(problems) or 'no'} problems"
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
Found = tuple[list[Problem], int]  # problems, files on missing devices
Subdirectory = tuple[Place, Inode, int]  # the last: the nid that its ``..`` has to lead to


class Checker:
    """One check of one image."""

    _workers: Workers[FileGroup, Found] | Threads[FileGroup, Found]  # check data and xattrs

    def __init__(self, image: Image, progress: Progress, *, data: bool) -> None:
        """``data``: read all file data and link targets, too."""
        self._image = image
        self._vol = image.volume
        self._progress = progress
        self._read_data = data
        self._lock = threading.Lock()
        self._files: dict[int, tuple[Place, bytes, int]] = {}  # first name and link count, by nid
        self._further: Counter[int] = Counter()  # nid -> names found after the first
        self.problems: list[Problem] = []
        self.inodes = 0
        self.bytes = 0  # of all files
        self.unread = 0  # files on missing devices

    def run(self) -> None:
        """Check everything; fills ``problems``."""
        if self._read_data:
            self._share_work()
        else:
            self._walk()
            self._special()
        if self.unread:
            self._add("", f"{self.unread} files are on missing devices", None)
        del self.problems[MAX_PROBLEMS:]
        for nid, (place, name, nlink) in self._files.items():
            names = 1 + self._further.get(nid, 0)
            if nlink != names:
                path = tree.shown_path(place, name)
                self._add(path, f"link count {nlink}, {names} names found", nid)

    def _share_work(self) -> None:
        """Walk the tree here while workers read its files."""
        self._workers = hire(self._batch, self._found, self._image.superblock.inodes)
        try:
            self._walk()
            self._special()
        except WorkersEnded:
            pass  # close raises the cause
        finally:
            results = self._workers.close()
        for problems, unread in results:
            self.problems += problems
            self.unread += unread

    def _found(self) -> Found:
        return self.problems, self.unread

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

    # directories ------------------------------------------------------------------------

    def _walk(self) -> None:
        """Check all directories, and have all files checked."""
        root = self._image.root
        seen: set[int] = set()
        stack: list[Subdirectory] = [(Place(), root, root.nid)]
        while stack:
            place, here, parent = stack.pop()
            path = tree.shown_path(place)
            self.inodes += 1
            self._progress.advance()
            try:
                tree.once(seen, here)
            except CorruptImage as e:
                self._caught(path, e, here.nid)
                continue
            self._xattrs(path, here)
            found = self._directory(place, path, here, parent)
            if here.nlink != len(found) + 2 and here.nlink != 1:
                self._add(path, f"link count {here.nlink}, {len(found)} subdirectories", here.nid)
            stack += reversed(found)  # in the order of the image

    def _directory(self, place: Place, path: str, here: Inode, parent: int) -> list[Subdirectory]:
        """Check a directory's entries and have its files checked; returns its subdirectories."""
        shown = place.shown()
        found: list[Subdirectory] = []
        batch: list[tuple[bytes, Inode]] = []
        size = 0
        for name, nid, file_type, _ in self._entries(path, here, parent):
            try:
                child = inodes.load(self._vol, nid)
            except ErofsError as e:
                self._caught(tree.shown_path(place, name), e, nid)
                continue
            if child.mode & 0o170000 != ondisk.MODE_OF_FT.get(file_type):
                what = f"entry of type {file_type} for a {tree.file_type(child)}"
                self._add(tree.shown_path(place, name), what, nid)
            if child.is_dir:
                found.append((Place(place, name), child, here.nid))
            elif nid in self._files:
                self._further[nid] += 1
            else:
                self._files[nid] = (place, name, child.nlink)
                batch.append((name, child))
                size += child.size
                if len(batch) >= BATCH_FILES or size >= BATCH_BYTES:
                    self._submit(shown, batch)
                    batch, size = [], 0
        self._submit(shown, batch)
        return found

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
                name = entry.name
                if name <= highest:
                    if name <= last or name == highest:
                        self._caught(path, tree.disorder(name, last, here), here.nid)
                        bad += 1
                else:
                    highest = name
                last = name
                if name == b"." or name == b"..":
                    dots.add(name)
                    if entry.nid != (here.nid if name == b"." else parent):
                        what = f"'{name.decode()}' leads to nid {entry.nid}"
                        self._add(path, what, here.nid)
                else:
                    yield entry
            if bad >= MAX_BAD:
                break
        for dot in (b".", b".."):
            if dot not in dots and not (dot == b"." and here.dot_omitted):
                self._add(path, f"no '{dot.decode()}' entry", here.nid)

    # files ------------------------------------------------------------------------------

    def _special(self) -> None:
        """Check the packed and metabox inodes, which no directory contains."""
        sb = self._vol.sb
        for name, nid in ((b"<packed inode>", sb.packed_nid), (b"<metabox inode>", sb.metabox_nid)):
            if not nid:
                continue
            try:
                self._submit(None, [(name, inodes.load(self._vol, nid))])
            except ErofsError as e:
                self._caught(tree.decode(name), e, nid)

    def _submit(self, here: bytes | None, files: list[tuple[bytes, Inode]]) -> None:
        """Have the files of a directory checked: by the workers where data is read, otherwise at
        once, since sending a file to a worker takes about as long as checking its metadata."""
        if self._read_data and files:
            self._workers.submit((here, [(name, inode.nid) for name, inode in files]))
        for name, inode in files:
            if inode.is_file:
                self.bytes += inode.size
            if not self._read_data:
                self._file(here, name, inode)
        self.inodes += len(files)
        self._progress.advance(len(files))

    def _batch(self, batch: FileGroup, fd: int) -> None:
        """Check one batch, in a worker."""
        here, names = batch
        for name, nid in names:
            try:
                inode = inodes.load(self._vol, nid)
            except ErofsError as e:
                self._caught(_path(here, name), e, nid)
            else:
                self._file(here, name, inode)

    def _file(self, here: bytes | None, name: bytes, inode: Inode) -> None:
        """Check a file, link or special file, and its data where that is to be read."""
        if inode.xattr_size:
            self._xattrs(_path(here, name), inode)
        try:
            if inode.is_symlink:
                tree.check_link(inode)
            elif not inode.is_file:
                return
            if not self._read_data:
                data.check_map(self._vol, inode)
            elif inode.is_file:
                self._read(inode)
            else:
                tree.link_target(self._vol, inode)
        except ErofsError as e:
            self._caught(_path(here, name), e, inode.nid)

    def _read(self, inode: Inode) -> None:
        """Read all data of a file."""
        for extent in extents(self._vol, inode, 0, inode.size):
            if extent.kind == HOLE:
                continue
            for skip in range(0, extent.length, PIECE):
                data.piece(self._vol, inode, extent, skip, min(PIECE, extent.length - skip))

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


def _path(here: bytes | None, name: bytes) -> str:
    """The path, for display, of entry ``name`` in the directory ``here`` (None: not in any)."""
    return tree.decode(name if here is None else b"/%s/%s" % (here, name) if here else b"/" + name)

"""``pyerofs extract``: write the tree, or parts of it, to a directory.

Nothing is ever written outside the target directory.  Names come from the image and are checked to
be single path components; each file is created relative to an open directory, never through a link,
and over an existing file only with ``--overwrite``.  Owners, modes, xattrs and times are set
through a descriptor of the created file, so replacing its name has no effect.  Several threads or
processes write the files; hard links and the attributes of directories come last.
"""

from __future__ import annotations

import argparse
import errno
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import TypeVar, TypeVarTuple

from pyerofs.cli.common import open_image
from pyerofs.cli.directories import OPEN, Directories
from pyerofs.cli.messages import complain
from pyerofs.cli.workers import Threads, Workers, WorkersEnded, hire
from pyerofs.errors import DeviceMissing, ErofsError
from pyerofs.format import data, tree, xattr
from pyerofs.format.extent import extents
from pyerofs.format.model import HOLE, Inode
from pyerofs.format.tree import Place
from pyerofs.image import Image
from pyerofs.sources.base import Buffer
from pyerofs.system.progress import Progress

PIECE = 1 << 20  # bytes gathered for one write
BATCH_FILES = 64  # a job ends after this many files, or
BATCH_BYTES = 4 << 20  # after this many bytes
NOBODY = 0xFFFFFFFF  # chown(2) takes this id as "unchanged", so it can't be set


def extract(args: argparse.Namespace) -> int:
    """Extract; exit status 1 if anything could not be created."""
    with open_image(args, whole=not args.paths) as image:
        progress = Progress("extracting", image.superblock.inodes, quiet=args.quiet)
        try:
            root = os.open(args.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            os.makedirs(args.directory)
            root = os.open(args.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        extractor = Extractor(
            image,
            root,
            progress,
            overwrite=args.overwrite,
            owners=not args.no_same_owner,
            xattrs=not args.no_xattrs,
        )
        try:
            extractor.run([os.fsencode(p) for p in args.paths])
        finally:
            progress.close()
            os.close(root)
    for line in extractor.summary():
        complain(line)
    return 1 if extractor.failures else 0


FileGroup = tuple[bytes, list[tuple[bytes, int]]]  # path of a directory, (name, nid) of files in it
Found = tuple[int, Counter[str], set[int]]  # failures, skipped, made
Name = tuple[Place, bytes]
R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class Extractor:
    """One extraction.  ``failures`` counts files that could not be extracted; ``skipped`` counts,
    by kind, attributes and devices that could not be set or made, for lack of privileges or
    support."""

    def __init__(
        self,
        image: Image,
        root: int,
        progress: Progress,
        *,
        overwrite: bool,
        owners: bool,
        xattrs: bool,
    ) -> None:
        self._image = image
        self._vol = image.volume
        self._directories = Directories(root)
        self._progress = progress
        self._overwrite = overwrite
        self._owners = owners
        self._xattrs = xattrs
        self._lock = threading.Lock()
        self._workers: Workers[FileGroup, Found] | Threads[FileGroup, Found]
        self.failures = 0
        self.skipped: Counter[str] = Counter()
        self._first: dict[int, Name] = {}  # nid of a file with several links -> its first name
        self._made: set[int] = set()  # nids of the files that were created
        self._links: list[tuple[Place, bytes, int]] = []
        self._unfinished: list[tuple[Place, int]] = []  # directories without attributes, nids

    def run(self, paths: list[bytes]) -> None:
        """Extract the whole tree, or the given paths with their parents."""
        with closing(self._directories):
            self._make_all(paths)
            for place, name, nid in self._links:
                self._try(place.shown(name), self._link, place, name, nid)
            for place, nid in reversed(self._unfinished):
                self._try(place.shown(), self._finish_directory, place, nid)

    def _make_all(self, paths: list[bytes]) -> None:
        """Make everything but further names of files, and the attributes of directories."""
        self._workers = hire(self._batch, self._found, self._image.superblock.inodes)
        try:
            if not paths:
                self._walk(Place(), self._image.root)
            for path in paths:
                self._one(path)
        except WorkersEnded:
            pass  # close raises the cause
        finally:
            results = self._workers.close()
        for failures, skipped, made in results:
            self.failures += failures
            self.skipped += skipped
            self._made |= made

    def _found(self) -> Found:
        return self.failures, self.skipped, self._made

    def summary(self) -> Iterator[str]:
        """Lines for stderr about skipped attributes and failed files."""
        if self.skipped:
            counts = ", ".join(f"{n} {what}" for what, n in sorted(self.skipped.items()))
            hint = "" if os.geteuid() == 0 else " (not root)"
            yield f"could not set{hint}: {counts}"
        if self.failures:
            yield f"{self.failures} files could not be extracted"

    # walking ----------------------------------------------------------------------------

    def _one(self, path: bytes) -> None:
        """Extract one path; missing parents are created with default attributes."""
        inode = tree.resolve(self._vol, path, False)
        names = [n for n in path.split(b"/") if n not in (b"", b".")]
        if b".." in names:
            raise ErofsError(f"{os.fsdecode(path)}: a path with '..' can't be extracted")
        *parents, name = names or [b""]
        here = Place()
        for parent in parents:
            with self._directories.opened(here) as fd:
                self._make(fd, parent)
            here = Place(here, parent)
        if not inode.is_dir:
            with self._directories.opened(here) as fd:
                self._submit(fd, here, [(name, inode)])
            return
        if name:
            with self._directories.opened(here) as fd:
                self._make(fd, name)
            here = Place(here, name)
        self._walk(here, inode)

    def _make(self, parent: int, name: bytes) -> bool:
        """Make a directory in another; an existing one is accepted unless it is a link."""
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            os.close(os.open(name, OPEN, dir_fd=parent))
        return True

    def _walk(self, top: Place, inode: Inode) -> None:
        seen: set[int] = set()
        stack = [(top, inode)]
        while stack:
            place, inode = stack.pop()
            self._unfinished.append((place, inode.nid))
            self._progress.advance()
            found = self._try(place.shown(), self._enter, place, inode, seen)
            stack += reversed(found or [])  # in the order of the image

    def _enter(self, place: Place, inode: Inode, seen: set[int]) -> list[tuple[Place, Inode]]:
        """Submit the files of a directory to the workers; make its subdirectories, and return them."""
        tree.once(seen, inode)
        found: list[tuple[Place, Inode]] = []
        with self._directories.opened(place) as fd:
            try:
                for batch in self._batches(fd, place, inode, found):
                    self._submit(fd, place, batch)
            except ErofsError as e:  # entries before the error are extracted
                self._fail(place.shown(), e)
        return found

    def _batches(
        self, fd: int, place: Place, inode: Inode, found: list[tuple[Place, Inode]]
    ) -> Iterator[list[tuple[bytes, Inode]]]:
        """The files of a directory in batches; subdirectories are made, and added to ``found``."""
        batch: list[tuple[bytes, Inode]] = []
        size = 0
        try:
            here = place.shown()
            complain = partial(self._fail, here)
            for entry in tree.orderly_entries(self._vol, inode, complain):
                path = here + b"/" + entry.name if here else entry.name
                child = self._try(path, self._image.inode, entry.nid)
                if child is None:
                    continue
                if child.is_dir:
                    if self._try(path, self._make, fd, entry.name):
                        found.append((Place(place, entry.name), child))
                    continue
                batch.append((entry.name, child))
                size += child.size
                if len(batch) >= BATCH_FILES or size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        except ErofsError:
            yield batch
            raise
        yield batch

    def _submit(self, fd: int, here: Place, files: list[tuple[bytes, Inode]]) -> None:
        """Submit files of one directory to the workers; further names of a file become hard links."""
        batch = []
        for name, inode in files:
            if inode.nlink > 1 and self._first.setdefault(inode.nid, (here, name)) != (here, name):
                self._links.append((here, name, inode.nid))
            else:
                batch.append((name, inode.nid))
        if batch:
            self._workers.submit((here.shown(), batch), fd)
            with self._lock:
                self._progress.advance(len(batch))

    def _batch(self, batch: FileGroup, fd: int) -> None:
        """Extract one batch, in a worker."""
        here, names = batch
        for name, nid in names:
            path = here + b"/" + name if here else name
            if self._try(path, self._create, fd, name, nid):
                self._made.add(nid)

    # creating ---------------------------------------------------------------------------

    def _create(self, parent: int, name: bytes, nid: int) -> bool:
        """Create a file, link, fifo, socket or device.  Returns False if mknod(2) is not permitted."""
        inode = self._image.inode(nid)
        if self._overwrite:
            self._unlink(parent, name)
        if inode.is_file:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=parent)
            try:
                try:
                    self._write(fd, inode)
                except BaseException:
                    os.unlink(name, dir_fd=parent)  # leave no partial file
                    raise
                self._finish(fd, inode)
            finally:
                os.close(fd)
            return True
        if inode.is_symlink:
            os.symlink(tree.link_target(self._vol, inode), name, dir_fd=parent)
        else:
            try:
                os.mknod(name, stat.S_IFMT(inode.mode) | 0o600, inode.rdev, dir_fd=parent)
            except PermissionError:
                self._skip("devices")
                return False
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            _check_made(fd, inode)
            # this path leads to the open file itself, even if that is a symbolic link
            self._finish(f"/proc/self/fd/{fd}", inode)
        finally:
            os.close(fd)
        return True

    def _write(self, fd: int, inode: Inode) -> None:
        """Write the file's data; holes stay holes."""
        parts: list[Buffer] = []
        start = gathered = 0
        end = 0
        for extent in extents(self._vol, inode, 0, inode.size):
            if extent.kind == HOLE:
                continue
            skip = 0
            while skip < extent.length:
                n = min(extent.length - skip, PIECE)
                if parts and (gathered >= PIECE or end != extent.start + skip or len(parts) > 500):
                    _write_all(fd, parts, start)
                    parts, gathered = [], 0
                if not parts:
                    start = extent.start + skip
                parts.append(data.piece(self._vol, inode, extent, skip, n))
                gathered += n
                skip += n
                end = extent.start + skip
        if parts:
            _write_all(fd, parts, start)
        if end < inode.size:
            os.ftruncate(fd, inode.size)

    def _finish(self, what: int | str, inode: Inode) -> None:
        """Set all attributes of a file, given by its descriptor or the descriptor's path.

        The order matters: the owner first, because chown clears set-id bits and capabilities; then
        xattrs, which may need write permission; then mode and times."""
        mode = stat.S_IMODE(inode.mode)
        if not self._own(what, inode):
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
        self._set_xattrs(what, inode)
        if not inode.is_symlink:
            os.chmod(what, mode)
        os.utime(what, ns=(inode.mtime_ns, inode.mtime_ns))

    def _finish_directory(self, place: Place, nid: int) -> None:
        with self._directories.opened(place) as fd:
            self._finish(fd, self._image.inode(nid))

    def _own(self, what: int | str, inode: Inode) -> bool:
        """Set the owner.  Returns whether the file has the image's owner afterwards."""
        wanted = (inode.uid, inode.gid)
        if self._owners and NOBODY not in wanted:
            try:
                os.chown(what, *wanted)
            except PermissionError:
                pass
        status = os.stat(what)
        same = (status.st_uid, status.st_gid) == wanted
        if self._owners and not same:
            self._skip("owners")
        return same

    def _set_xattrs(self, what: int | str, inode: Inode) -> None:
        if not self._xattrs or not inode.xattr_size:
            return
        for name, value in xattr.items(self._vol, inode):
            try:
                os.setxattr(what, name, value)
            except (OSError, ValueError):  # ValueError: a name that no system call takes
                self._skip("xattrs")

    def _link(self, place: Place, name: bytes, nid: int) -> None:
        """Create a further name of a file as a hard link; create the file if that has failed before."""
        with self._directories.opened(place) as parent:
            if nid not in self._made:
                if self._create(parent, name, nid):
                    self._made.add(nid)
                    self._first[nid] = (place, name)
                return
            if self._overwrite:
                self._unlink(parent, name)
            first_place, first = self._first[nid]
            with self._directories.opened(first_place) as first_parent:
                os.link(
                    first, name, src_dir_fd=first_parent, dst_dir_fd=parent, follow_symlinks=False
                )

    def _unlink(self, parent: int, name: bytes) -> None:
        try:
            os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            pass

    # accounting -------------------------------------------------------------------------

    def _try(self, path: bytes, function: Callable[[*Ts], R], *args: *Ts) -> R | None:
        """Call ``function``; report an error with one file and return None, so that the others go
        on.

        Raises OSError if the target is full, over quota or read-only."""
        try:
            return function(*args)
        except (ErofsError, OSError, ValueError, OverflowError) as e:
            if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            self._fail(path, e)
            return None

    def _fail(self, path: bytes, e: Exception) -> None:
        with self._lock:
            self.failures += 1
            if isinstance(e, DeviceMissing):
                return  # already reported when the image was opened
            self._progress.close()
            reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            complain(f"{os.fsdecode(path) or '.'}: {reason}")

    def _skip(self, what: str) -> None:
        with self._lock:
            self.skipped[what] += 1


def _check_made(fd: int, inode: Inode) -> None:
    """Raise OSError if another user has replaced the file that was just created."""
    found = os.fstat(fd)
    if (
        stat.S_IFMT(found.st_mode) != stat.S_IFMT(inode.mode)
        or found.st_nlink != 1
        or found.st_rdev
        != (inode.rdev if stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode) else 0)
    ):
        raise OSError(errno.ESTALE, "was replaced by another process during the extraction")


def _write_all(fd: int, parts: list[Buffer], offset: int) -> None:
    """Write the parts one after another from ``offset`` on."""
    total = sum(len(p) for p in parts)
    done = os.pwritev(fd, parts, offset)
    if done < total:  # rare: a signal or a full disk, which the next call reports
        rest = memoryview(b"".join(parts))[done:]
        while rest:
            n = os.pwrite(fd, rest, offset + done)
            done += n
            rest = rest[n:]

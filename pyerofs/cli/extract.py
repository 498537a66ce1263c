"""``pyerofs extract``: the tree, or parts of it, as files.

Nothing is ever written outside the target directory.  Names come from the image and are checked to
be single path components; each is created relative to an open directory, never through a link, and
never over something that exists unless that is asked for.  Files are written by a few threads or
processes; links and the times of directories come last.
"""

from __future__ import annotations

import argparse
import errno
import os
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, TypeVarTuple

from pyerofs import data, tree, xattr
from pyerofs.cli.common import open_image
from pyerofs.cli.workers import Threads, Workers, WorkersEnded, hire
from pyerofs.errors import ErofsError
from pyerofs.extent import extents
from pyerofs.image import Image
from pyerofs.model import HOLE, Inode
from pyerofs.progress import Progress
from pyerofs.sources.base import Buffer

PIECE = 1 << 20  # bytes gathered for one write
BATCH_FILES = 64  # files, or
BATCH_BYTES = 4 << 20  # bytes, that make one job
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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
        print(f"pyerofs: {line}", file=sys.stderr)
    return 1 if extractor.failures else 0


Batch = tuple[bytes, list[tuple[bytes, int]]]  # path of a directory, names in it and nids
Found = tuple[int, Counter[str], dict[int, bytes]]  # failures, skipped, made
R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class Extractor:
    """One extraction.  ``failures`` counts what is missing afterwards, ``skipped`` what could not
    be set, for want of privileges or support."""

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
        self._root = root
        self._progress = progress
        self._overwrite = overwrite
        self._owners = owners
        self._xattrs = xattrs
        self._lock = threading.Lock()
        self._workers: Workers[Batch, Found] | Threads[Batch, Found]
        self.failures = 0
        self.skipped: Counter[str] = Counter()
        self._first: dict[int, bytes] = {}  # nid of a file with several links -> its first path
        self._made: dict[int, bytes] = {}  # and the path at which it was really created
        self._links: list[tuple[bytes, Inode]] = []
        self._directories: list[tuple[bytes, Inode]] = []

    def run(self, paths: list[bytes]) -> None:
        """Extract the whole tree, or the given paths with their parents."""
        self._workers = hire(self._batch, self._found, self._image.superblock.inodes)
        try:
            if not paths:
                self._walk(b"", self._image.root)
            for path in paths:
                self._one(path)
        except WorkersEnded:
            pass  # close tells why
        finally:
            results = self._workers.close()
        for failures, skipped, made in results:
            self.failures += failures
            self.skipped += skipped
            self._made |= made
        for path, inode in self._links:
            self._try(path, self._link, path, inode)
        for path, inode in reversed(self._directories):
            self._try(path, self._finish_directory, path, inode)

    def _found(self) -> Found:
        return self.failures, self.skipped, self._made

    def summary(self) -> Iterator[str]:
        """What a person should know afterwards."""
        if self.skipped:
            counts = ", ".join(f"{n} {what}" for what, n in sorted(self.skipped.items()))
            hint = "" if os.geteuid() == 0 else " (not root)"
            yield f"could not set{hint}: {counts}"
        if self.failures:
            yield f"{self.failures} files could not be extracted"

    # walking ----------------------------------------------------------------------------

    def _one(self, path: bytes) -> None:
        """Extract one path: its parents are made, with plain attributes, as needed."""
        inode = tree.resolve(self._vol, path, False)
        names = [n for n in path.split(b"/") if n not in (b"", b".")]
        if b".." in names:
            raise ErofsError(f"{os.fsdecode(path)}: '..' can't be extracted")
        *parents, name = names or [b""]
        base = b""
        for parent in parents:
            with self._opened(base) as fd:
                self._make(fd, parent)
            base += parent + b"/"
        if not inode.is_dir:
            self._submit(base, [(name, inode)])
            return
        if name:
            with self._opened(base) as fd:
                self._make(fd, name)
        self._walk(base + name + b"/" if name else b"", inode)

    def _make(self, parent: int, name: bytes) -> bool:
        """Make a directory in another; one that exists will do, if it is no link to one."""
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            os.close(os.open(name, _DIRECTORY, dir_fd=parent))
        return True

    def _open(self, path: bytes) -> int:
        """Open a directory below the target directory, never through a link."""
        fd = os.dup(self._root)
        for name in path.split(b"/"):
            if name:
                try:
                    deeper = os.open(name, _DIRECTORY, dir_fd=fd)
                finally:
                    os.close(fd)
                fd = deeper
        return fd

    @contextmanager
    def _opened(self, path: bytes) -> Iterator[int]:
        """The same for a ``with`` block."""
        fd = self._open(path)
        try:
            yield fd
        finally:
            os.close(fd)

    def _walk(self, top: bytes, inode: Inode) -> None:
        seen: set[int] = set()
        stack = [(top, inode)]
        while stack:
            path, inode = stack.pop()
            fd = self._try(path, self._open, path)
            if fd is None:
                continue
            self._directories.append((path, inode))
            self._progress.advance()
            try:
                tree.once(seen, inode)
                stack += self._entries(fd, path, inode)
            except ErofsError as e:
                self._fail(path, e)
            finally:
                os.close(fd)

    def _entries(self, fd: int, here: bytes, inode: Inode) -> list[tuple[bytes, Inode]]:
        """Have the files of a directory extracted; make its subdirectories, and return them."""
        found: list[tuple[bytes, Inode]] = []
        batch: list[tuple[bytes, Inode]] = []
        size = 0
        for entry in tree.entries(self._vol, inode):
            path = here + entry.name
            child = self._try(path, self._image.inode, entry.nid)
            if child is None:
                continue
            if child.is_dir:
                if self._try(path, self._make, fd, entry.name):
                    found.append((path + b"/", child))
                continue
            batch.append((entry.name, child))
            size += child.size
            if len(batch) >= BATCH_FILES or size >= BATCH_BYTES:
                self._submit(here, batch)
                batch, size = [], 0
        self._submit(here, batch)
        return found

    def _submit(self, here: bytes, files: list[tuple[bytes, Inode]]) -> None:
        """Give files of one directory to a worker; later names of the same file become links."""
        batch = []
        for name, inode in files:
            if inode.nlink > 1 and self._first.setdefault(inode.nid, here + name) != here + name:
                self._links.append((here + name, inode))
            else:
                batch.append((name, inode.nid))
        if batch:
            self._workers.submit((here, batch))
            with self._lock:
                self._progress.advance(len(batch))

    def _batch(self, batch: Batch) -> None:
        """What workers do."""
        here, names = batch
        fd = self._try(here, self._open, here)
        if fd is None:
            return
        try:
            for name, nid in names:
                self._try(here + name, self._create, fd, here, name, nid)
        finally:
            os.close(fd)

    # creating ---------------------------------------------------------------------------

    def _create(self, parent: int, here: bytes, name: bytes, nid: int) -> None:
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
                    os.unlink(name, dir_fd=parent)  # no half a file
                    raise
                self._finish(fd, inode)
            finally:
                os.close(fd)
            if inode.nlink > 1:
                self._made[nid] = here + name
            return
        if inode.is_symlink:
            os.symlink(tree.link_target(self._vol, inode), name, dir_fd=parent)
        else:
            try:
                os.mknod(name, stat.S_IFMT(inode.mode) | 0o600, inode.rdev, dir_fd=parent)
            except PermissionError:
                self._skip("devices")
                return
        self._finish_at(parent, name, inode)
        if inode.nlink > 1:
            self._made[nid] = here + name

    def _write(self, fd: int, inode: Inode) -> None:
        """The file's data; holes stay holes."""
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

    def _finish(self, fd: int, inode: Inode) -> None:
        """Owner first, which clears set-id bits and capabilities; then xattrs, which may need the
        permission to write; then mode and times."""
        mode = stat.S_IMODE(inode.mode)
        if not self._own(inode, fd):
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
        self._set_xattrs(inode, fd, follow=True)
        os.fchmod(fd, mode)
        os.utime(fd, ns=(inode.mtime_ns, inode.mtime_ns))

    def _finish_at(self, parent: int, name: bytes, inode: Inode) -> None:
        """The same for what can't be opened: links, fifos, sockets, devices."""
        if self._owners:
            try:
                os.chown(name, inode.uid, inode.gid, dir_fd=parent, follow_symlinks=False)
            except PermissionError:
                self._skip("owners")
        self._set_xattrs(inode, b"/proc/self/fd/%d/%s" % (parent, name), follow=False)
        if not inode.is_symlink:
            # a name that we have just made ourselves: nothing to follow
            os.chmod(name, stat.S_IMODE(inode.mode), dir_fd=parent)
        times = (inode.mtime_ns, inode.mtime_ns)
        os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)

    def _finish_directory(self, path: bytes, inode: Inode) -> None:
        with self._opened(path) as fd:
            self._finish(fd, inode)

    def _own(self, inode: Inode, fd: int) -> bool:
        if self._owners:
            try:
                os.fchown(fd, inode.uid, inode.gid)
                return True
            except PermissionError:
                self._skip("owners")
        return inode.uid == os.geteuid() and inode.gid == os.getegid()

    def _set_xattrs(self, inode: Inode, where: int | bytes, *, follow: bool) -> None:
        if not self._xattrs or not inode.xattr_size:
            return
        for name, value in xattr.items(self._vol, inode):
            try:
                if follow:
                    os.setxattr(where, name, value)
                else:
                    os.setxattr(where, name, value, follow_symlinks=False)
            except OSError as e:
                if e.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EACCES):
                    raise
                self._skip("xattrs")

    def _link(self, path: bytes, inode: Inode) -> None:
        """A further name of a file; its first, if that could not be created where it came first."""
        base, _, name = path.rpartition(b"/")
        with self._opened(base) as parent:
            made = self._made.get(inode.nid)
            if made is None:
                self._create(parent, path[: len(path) - len(name)], name, inode.nid)
                return
            if self._overwrite:
                self._unlink(parent, name)
            first_base, _, first = made.rpartition(b"/")
            with self._opened(first_base) as first_parent:
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
        """Call, and report what goes wrong with one file without giving up the others."""
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
            self._progress.close()
            reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            print(f"pyerofs: {os.fsdecode(path) or '.'}: {reason}", file=sys.stderr)

    def _skip(self, what: str) -> None:
        with self._lock:
            self.skipped[what] += 1


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

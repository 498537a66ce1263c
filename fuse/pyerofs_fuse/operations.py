"""FUSE operations (pyfuse3) over an AsyncImage: an adapter without knowledge of the format.

``Operations`` knows which other operations need the event loop, so it is also the image's Schedule.

Node ids are inode numbers, which encode nids, and file handles are node ids.  So no table of inodes
or handles is kept, and any serving process can answer any request.  Most operations are answered
from memory at once; one that has to wait does so in its own cancel scope, so that stopping the
daemon answers it with EIO.
"""

from __future__ import annotations

import errno
import functools
import logging
import stat
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Coroutine
from itertools import islice
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext

from pyerofs.aio import AsyncFile, AsyncImage, Pending
from pyerofs.errors import CorruptImage, ErofsError
from pyerofs.format import directory, tree, xattr
from pyerofs.format import inode as inodes
from pyerofs.format.memory import Fault
from pyerofs.format.model import Dirent, Inode
from pyerofs.format.ondisk import MODE_OF_FT, NAME_LEN
from pyerofs.sources.base import Buffer
from pyerofs_fuse.listings import Listing, Listings, Row, cookie_of
from pyerofs_fuse.processes.handles import Handles
from pyerofs_fuse.processes.turns import Turns

log = logging.getLogger("pyerofs-fuse")

FOREVER = 1e9  # seconds; the image can't change
ENTRIES_AT_ONCE = 128  # directory entries prepared at once: a fraction of a millisecond
MAX_DIRECTORIES = 1024  # directory inodes in the cache
STORE_SIZE = 128 << 10  # bytes: files up to this size are stored in the page cache when opened
MAX_STORED = 1 << 15  # stored files that are remembered; a forgotten one is only stored again
STORING = 50e-6  # seconds that storing a file takes, about
LONG_READ = 256 << 10  # bytes: during a read this long, another process receives requests
MAX_FILES = 1024  # recently opened files in the cache
MAX_RECORDED = 1 << 20  # opened files that are recorded

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
P = ParamSpec("P")

# FUSE reserves node id 1 for the root, 0 for "none".  An inode number of 0 or 1 is mapped to the
# upper end, where no nid can be (its inode would lie 2^68 bytes into the image).
_NODE_OF = {0: 2**64 - 2, 1: 2**64 - 1}
_NUMBER_OF = {node: number for number, node in _NODE_OF.items()}

_DOTS = (b".", b"..")


def answers(
    metadata: bool,
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Decorator: turn every exception of an operation into the errno that the kernel's driver would
    give: EUCLEAN for corrupt metadata, EIO for corrupt data.  Only FUSEError passes, because any
    other exception would end the mount."""

    def wrap(operation: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(operation)
        async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%s%r", operation.__name__, args[1:])
            try:
                return await operation(*args, **kwargs)
            except FUSEError:
                raise
            except ErofsError as e:
                operations = args[0]
                assert isinstance(operations, Operations)
                operations.report(e)
                code = e.errno or errno.EIO
                if isinstance(e, CorruptImage) and not metadata:
                    code = errno.EIO
                raise FUSEError(code) from None
            except Exception:
                log.exception("%s failed unexpectedly", operation.__name__)
                raise FUSEError(errno.EIO) from None

        return guarded

    return wrap


class Operations(pyfuse3.Operations):
    """The read-only operations.  Writes never arrive: the mount is read-only."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(
        self, turns: Turns, handles: Handles, *, shared: bool, record: bool = False
    ) -> None:
        """``shared``: other users may access the mount, so the kernel has to check permissions and
        ACLs.  ``record``: keep the nids of opened files in ``opened``, in the order of opening."""
        super().__init__()
        self.enable_acl = shared
        self.greeted = trio.Event()  # set when FUSE INIT has arrived
        self.opened: dict[int, None] = {}
        self._record = record
        self._turns = turns
        self._handles = handles
        self._info = FileInfo(keep_cache=True)
        self._attr = EntryAttributes()
        self._attr.entry_timeout = FOREVER
        self._files: dict[int, AsyncFile] = {}
        self._stored: dict[int, None] = {}  # nodes recently stored in the page cache
        self._listings = Listings(handles)
        self._directories: dict[int, Inode] = {}
        self._waiting: set[trio.CancelScope] = set()

    def attach(self, image: AsyncImage) -> None:
        """Answer requests from this image, from now on."""
        self._image = image
        self._volume = image.volume
        self._root_nid = image.volume.sb.root_nid
        self._attr.st_blksize = image.volume.sb.block_size

    def init(self) -> None:
        """FUSE INIT.  Later requests wait in the kernel until all serving processes are forked."""
        self._turns.hold()
        self.greeted.set()

    # shared by all operations --------------------------------------------------------

    def stop(self) -> None:
        """Answer all waiting operations with EIO."""
        for scope in list(self._waiting):
            scope.cancel()

    @property
    def waiting(self) -> int:
        """The number of operations that wait for a thread or the network (or are about to)."""
        return len(self._waiting)

    @property
    def ahead(self) -> int | None:
        """``Schedule.ahead``: 0 with several processes, as another one may receive the next read."""
        return 0 if self._turns.shared else None

    def may_block(self, ns: float) -> bool:
        """``Schedule.may_block``: only while no other operation waits, and if ``Turns`` permits."""
        return len(self._waiting) <= 1 and self._turns.may_be_busy(ns)

    def report(self, e: ErofsError) -> None:
        """Log an error, unless it is about a path (OSError); of CorruptImage only the first per
        inode."""
        if isinstance(e, CorruptImage) and not self._handles.first_error(e.nid):
            return
        if not isinstance(e, OSError):
            log.error("%s", e)

    async def _run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Call a parser function; wait only if data is not in memory."""
        try:
            return function(*args)
        except Fault as fault:
            return await self._wait(self._image.resume(fault, function, *args))

    async def _wait(self, work: Awaitable[T]) -> T:
        scope = trio.CancelScope()
        self._waiting.add(scope)
        try:
            with scope:
                return await work
        finally:
            self._waiting.discard(scope)
        raise FUSEError(errno.EIO)  # the daemon is stopping

    def _nid(self, node: int) -> int:
        if node == pyfuse3.ROOT_INODE:
            return self._root_nid
        return tree.nid_of(self._volume, _NUMBER_OF.get(node, node))

    def _node(self, nid: int) -> int:
        if nid == self._root_nid:
            return pyfuse3.ROOT_INODE
        number = tree.inode_number(self._volume, nid)
        return _NODE_OF.get(number, number)

    async def _inode(self, node: int) -> Inode:
        nid = self._nid(node)
        found = self._directories.get(nid)
        return found if found is not None else await self._run(inodes.load, self._volume, nid)

    async def _directory(self, node: int) -> Inode:
        """The inode of a directory; cached, because lookups in one directory come in bursts."""
        nid = self._nid(node)
        found = self._directories.get(nid)
        if found is None:
            found = await self._run(inodes.load, self._volume, nid)
            if not found.is_dir:
                raise FUSEError(errno.ENOTDIR)
            if len(self._directories) >= MAX_DIRECTORIES:
                del self._directories[next(iter(self._directories))]
            self._directories[nid] = found
        return found

    def _entry(self, inode: Inode) -> EntryAttributes:
        """Attributes for a lookup's reply, which is sent before anything else runs: one object
        serves all."""
        return self._as_entry(self._attr, inode)

    def _as_entry(self, attr: EntryAttributes, inode: Inode) -> EntryAttributes:
        """Fill in an entry, whose inode number has to be the node id.  If the inode's real number
        differs, the attributes expire at once, so that the kernel asks getattr, which returns the
        real number."""
        node = self._node(inode.nid)
        attr.attr_timeout = 0.0 if node <= 1 or node in _NUMBER_OF else FOREVER
        return self._fill(attr, inode, node)

    def _row(self, entry: Dirent, inode: Inode) -> Row:
        """A row for readdir; it is cached, so it has an attribute object of its own."""
        attr = EntryAttributes()
        attr.st_blksize = self._volume.sb.block_size
        attr.entry_timeout = FOREVER
        return entry.name, self._as_entry(attr, inode), entry.cookie

    def _bare_row(self, entry: Dirent, number: int) -> Row:
        """A row for readdir without attributes."""
        attr = EntryAttributes()
        attr.st_ino = number
        attr.st_mode = MODE_OF_FT.get(entry.file_type, stat.S_IFREG)
        attr.entry_timeout = attr.attr_timeout = 0.0
        return entry.name, attr, entry.cookie

    def _fill(self, attr: EntryAttributes, inode: Inode, number: int) -> EntryAttributes:
        attr.st_ino = number
        attr.st_mode = inode.mode
        attr.st_nlink = inode.nlink
        attr.st_uid = inode.uid
        attr.st_gid = inode.gid
        attr.st_rdev = inode.rdev
        attr.st_size = inode.size
        attr.st_blocks = tree.blocks_512(self._volume, inode)
        attr.st_atime_ns = attr.st_mtime_ns = attr.st_ctime_ns = inode.mtime_ns
        return attr

    # inodes --------------------------------------------------------------------------

    @answers(metadata=True)
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if len(name) > NAME_LEN:
            raise FUSEError(errno.ENAMETOOLONG)
        if name == b".":  # the kernel looks up a node that it has forgotten
            found = await self._inode(parent_inode)
            return self._entry(found)
        parent = await self._directory(parent_inode)
        inode = await self._run(tree.lookup, self._volume, parent, name)
        if inode is None:  # a negative entry, which the kernel may cache, unlike an error
            missing = EntryAttributes()
            missing.st_ino = 0
            missing.entry_timeout = FOREVER
            return missing
        return self._entry(inode)

    @answers(metadata=True)
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        found = await self._inode(inode)
        attr = self._fill(self._attr, found, tree.inode_number(self._volume, found.nid))
        attr.attr_timeout = FOREVER
        return attr

    @answers(metadata=True)
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return await self._run(tree.link_target, self._volume, await self._inode(inode))

    @answers(metadata=True)
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Called on private mounts only, whose owner may do everything but write."""
        return True

    @answers(metadata=True)
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        sb = self._volume.sb
        s = pyfuse3.StatvfsData()
        s.f_bsize = s.f_frsize = sb.block_size
        s.f_blocks = sb.total_blocks
        s.f_bfree = s.f_bavail = 0
        s.f_files = 2**64 - 1  # as in the kernel's driver: all but the used ones are free
        s.f_ffree = s.f_favail = 2**64 - 1 - sb.inodes
        s.f_namemax = NAME_LEN
        return s

    # extended attributes -------------------------------------------------------------

    @answers(metadata=True)
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        if name.startswith(b"trusted.") and ctx.uid != 0:
            raise FUSEError(errno.ENODATA)
        return await self._run(tree.get_xattr, self._volume, await self._inode(inode), name)

    @answers(metadata=True)
    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        found = await self._inode(inode)
        names = await self._run(xattr.names, self._volume, found)
        if ctx.uid != 0:
            names = [n for n in names if not n.startswith(b"trusted.")]
        return names

    # directories ---------------------------------------------------------------------

    @answers(metadata=True)
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        await self._listing(inode)
        return inode

    async def _listing(self, node: int) -> Listing:
        found = self._listings.get(node)
        if found is None:
            found = Listing(await self._directory(node))
            self._listings.put(node, found)
        return found

    @answers(metadata=True)
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        listing = await self._listing(fh)
        reply = pyfuse3.readdir_reply
        rows = listing.rows
        at = bisect_right(rows, start_id, key=cookie_of) if start_id else 0
        if not at and (start_id or not listing.first):  # before the cached run
            rows = []
        while True:
            for name, attr, cookie in islice(rows, at, None):
                if not reply(token, name, attr, cookie):
                    return
                start_id = cookie
            if listing.whole and rows is listing.rows:
                return
            more = await self._run(self._prepare, listing.inode, start_id)
            rows, at = listing.add(start_id, more)
            self._listings.put(fh, listing)
            if not more:
                return

    def _prepare(self, parent: Inode, cookie: int) -> list[Row]:
        """Up to ENTRIES_AT_ONCE rows from ``cookie`` on; [] at the directory's end."""
        vol = self._volume
        size = vol.sb.directory_block_size
        index, skip = divmod(cookie, size)
        end = -(-parent.size // size) * size
        if cookie >= end:  # a "." that is not stored comes last, as in the kernel's driver
            if cookie > end or not parent.dot_omitted:
                return []
            return [
                self._bare_row(
                    Dirent(b".", parent.nid, 2, end + 1), tree.inode_number(vol, parent.nid)
                )
            ]
        found: list[Row] = []
        block = directory.block_entries(vol, parent, index, -(-skip // 12))
        for entry in block[:ENTRIES_AT_ONCE]:
            if entry.name in _DOTS:  # the kernel ignores the attributes of these two
                found.append(self._bare_row(entry, tree.inode_number(vol, entry.nid)))
                continue
            try:
                found.append(self._row(entry, inodes.load(vol, entry.nid)))
            except ErofsError as e:  # corrupt inode: list its name; a stat returns the error
                self.report(e)
                found.append(self._bare_row(entry, self._node(entry.nid)))
        return found

    @answers(metadata=True)
    async def releasedir(self, fh: int) -> None:
        pass

    # files ---------------------------------------------------------------------------

    @answers(metadata=True)
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        self._handles.opened(inode)
        try:
            file = await self._file(inode)
            if self._record and len(self.opened) < MAX_RECORDED:
                self.opened[file.inode.nid] = None
            if 0 < file.inode.size <= STORE_SIZE and inode not in self._stored:
                await self._store(inode, file)
            while self._handles.is_stored_by_others(inode):  # noqa: ASYNC110 (there is no event)
                await trio.sleep(STORING)
        except BaseException:
            if self._turns.mine:  # else the count stays too high: the file is merely never stored
                self._handles.closed(inode)
            raise
        self._info.fh = inode
        return self._info

    async def _file(self, node: int) -> AsyncFile:
        file = self._files.get(node)
        if file is None:
            file = AsyncFile(self._image, await self._inode(node))
            if len(self._files) >= MAX_FILES:
                del self._files[next(iter(self._files))]
            self._files[node] = file
        return file

    async def _store(self, node: int, file: AsyncFile) -> None:
        """Put a small file's data into the kernel's page cache, so that the kernel sends no READ.

        A pending READ for one of these pages, even one that no process has received yet, holds the
        page's lock, and notify_store would block until that READ is answered: perhaps for ever, if
        this process has to answer it or if the process that received it has died.  READs need a
        handle; therefore data is stored only while no other handle is open or opening, and another
        process that opens one meanwhile waits with its answer."""
        inode = file.inode
        try:
            found = file.read_now(0, inode.size)
            if isinstance(found, Pending):
                if not self._image.local:
                    return  # opening a file must not cause a download
                found = await self._wait(found.finish())
            with self._handles.storing(node):
                if self._handles.count(node) == 1:
                    pyfuse3.notify_store(node, 0, found)  # type: ignore[arg-type]
                    if len(self._stored) >= MAX_STORED:
                        del self._stored[next(iter(self._stored))]
                    self._stored[node] = None
        except (ErofsError, OSError) as e:
            log.debug("nid %d is not stored: %s", inode.nid, e)  # a read returns the error

    @answers(metadata=False)
    async def read(self, fh: int, off: int, size: int) -> Buffer:  # type: ignore[override]
        if size >= LONG_READ:
            self._turns.pass_on()
        file = self._files.get(fh) or await self._file(fh)
        found = file.read_now(off, size)
        return await self._wait(found.finish()) if isinstance(found, Pending) else found

    @answers(metadata=True)
    async def release(self, fh: int) -> None:
        self._handles.closed(fh)

    @answers(metadata=True)
    async def flush(self, fh: int) -> None:
        """close(2): nothing to write back.  After ENOSYS the kernel sends no further FLUSH."""
        raise FUSEError(errno.ENOSYS)

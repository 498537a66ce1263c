"""pyfuse3's operations over an AsyncImage.  What they answer is in ``answers``.

``Operations`` knows which other operations need the event loop, so it is also the image's Schedule.

File handles are node ids, so no table of handles is kept.  Most operations are answered from memory at
once; one that has to wait does so in its own cancel scope, so that stopping the daemon answers it with
EIO.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext

from pyerofs.aio import AsyncFile, AsyncImage, Pending
from pyerofs.errors import ErofsError
from pyerofs.format.memory import Fault
from pyerofs.format.model import Dirent, Inode
from pyerofs.format.ondisk import DIRENT, MODE_OF_FT
from pyerofs.sources.base import Buffer
from pyerofs_fuse.answers import Answers, Refused

log = logging.getLogger("pyerofs-fuse")

FOREVER = 1e9  # seconds; the image can't change
ENTRIES_AT_ONCE = 128  # directory entries prepared at once: a fraction of a millisecond
MAX_FILES = 1024  # recently opened files in the cache
MAX_RECORDED = 1 << 20  # opened files that are recorded

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
P = ParamSpec("P")


def refusing(
    metadata: bool,
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Decorator: turn every exception of an operation into an errno.  Only FUSEError passes, because
    any other exception would end the mount."""

    def wrap(operation: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(operation)
        async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%s%r", operation.__name__, args[1:])
            try:
                return await operation(*args, **kwargs)
            except FUSEError:
                raise
            except Refused as e:
                raise FUSEError(e.code) from None
            except ErofsError as e:
                operations = args[0]
                assert isinstance(operations, Operations)
                raise FUSEError(operations.answers.code_of(e, metadata=metadata)) from None
            except Exception:
                log.exception("internal error in %s", operation.__name__)
                raise FUSEError(errno.EIO) from None

        return guarded

    return wrap


class Operations(pyfuse3.Operations):
    """The read-only operations.  Writes never arrive: the mount is read-only."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    answers: Answers

    def __init__(self, *, shared: bool, record: bool = False) -> None:
        """``shared``: other users may access the mount, so the kernel has to check permissions and
        ACLs.  ``record``: keep the nids of opened files in ``opened``, in the order of opening."""
        super().__init__()
        self.enable_acl = shared
        self.greeted = trio.Event()  # set when FUSE INIT has arrived
        self.opened: dict[int, None] = {}
        self._record = record
        self._info = FileInfo(keep_cache=True)
        self._attr = EntryAttributes()
        self._attr.entry_timeout = FOREVER
        self._files: dict[int, AsyncFile] = {}
        self._waiting: set[trio.CancelScope] = set()

    def attach(self, image: AsyncImage) -> None:
        """Answer requests from this image, from now on."""
        self._image = image
        self.answers = Answers(image.volume)
        self._attr.st_blksize = image.volume.sb.block_size

    def init(self) -> None:
        """FUSE INIT."""
        self.greeted.set()

    # shared by all operations --------------------------------------------------------

    def stop(self) -> None:
        """Answer all waiting operations with EIO."""
        for scope in list(self._waiting):
            scope.cancel()

    @property
    def ahead(self) -> int | None:
        """``Schedule.ahead``: as the cache size allows."""
        return None

    def may_block(self, ns: float) -> bool:
        """``Schedule.may_block``: while no other operation waits."""
        return len(self._waiting) <= 1

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

    # inodes --------------------------------------------------------------------------

    def _entry(self, inode: Inode) -> EntryAttributes:
        """Attributes for a lookup's reply, which is sent before anything else runs: one object
        serves all."""
        return self._as_entry(self._attr, inode)

    def _as_entry(self, attr: EntryAttributes, inode: Inode) -> EntryAttributes:
        """Fill in an entry.  pyfuse3 takes its inode number for the node id; if these differ, the
        attributes expire at once, so that the kernel asks getattr, which returns the inode number."""
        node = self.answers.node_of(inode.nid)
        same = node == self.answers.number(inode.nid)
        attr.attr_timeout = FOREVER if same else 0.0
        return self._fill(attr, inode, node)

    def _fill(self, attr: EntryAttributes, inode: Inode, number: int) -> EntryAttributes:
        attr.st_ino = number
        attr.st_mode = inode.mode
        attr.st_nlink = inode.nlink
        attr.st_uid = inode.uid
        attr.st_gid = inode.gid
        attr.st_rdev = inode.rdev
        attr.st_size = inode.size
        attr.st_blocks = self.answers.blocks(inode)
        attr.st_atime_ns = attr.st_mtime_ns = attr.st_ctime_ns = inode.mtime_ns
        return attr

    @refusing(metadata=True)
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        inode = await self._run(self.answers.lookup, parent_inode, name)
        if inode is None:  # a negative entry, which the kernel may cache, unlike an error
            missing = EntryAttributes()
            missing.st_ino = 0
            missing.entry_timeout = FOREVER
            return missing
        return self._entry(inode)

    @refusing(metadata=True)
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        found = await self._run(self.answers.inode, inode)
        attr = self._fill(self._attr, found, self.answers.number(found.nid))
        attr.attr_timeout = FOREVER
        return attr

    @refusing(metadata=True)
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return await self._run(self.answers.readlink, inode)

    @refusing(metadata=True)
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Called on private mounts only, whose owner may do everything but write."""
        return True

    @refusing(metadata=True)
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        found = self.answers.statfs()
        s = pyfuse3.StatvfsData()
        s.f_bsize = s.f_frsize = found.block_size
        s.f_blocks = found.blocks
        s.f_bfree = s.f_bavail = 0
        s.f_files = found.files
        s.f_ffree = s.f_favail = found.free_files
        s.f_namemax = found.name_length
        return s

    # extended attributes -------------------------------------------------------------

    @refusing(metadata=True)
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        return await self._run(self.answers.getxattr, inode, name, ctx.uid)

    @refusing(metadata=True)
    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        return await self._run(self.answers.listxattr, inode, ctx.uid)

    # directories ---------------------------------------------------------------------

    @refusing(metadata=True)
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        await self._run(self.answers.directory, inode)
        return inode

    @refusing(metadata=True)
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        while rows := await self._run(self._rows, fh, start_id):
            for entry, inode in rows:
                attr = self._row(entry, inode)
                if not pyfuse3.readdir_reply(token, entry.name, attr, entry.cookie):
                    return
                start_id = entry.cookie

    def _rows(self, node: int, cookie: int) -> list[tuple[Dirent, Inode | None]]:
        """Up to ENTRIES_AT_ONCE entries from ``cookie`` on; [] at the directory's end."""
        parent = self.answers.directory(node)
        index, inside = divmod(cookie, self.answers.volume.sb.directory_block_size)
        if index < self.answers.blocks_of(parent):
            first = -(-inside // DIRENT.size)
            found = self.answers.entries(parent, index, first)[:ENTRIES_AT_ONCE]
        else:
            dot = self.answers.dot(parent)
            found = [dot] if dot is not None and not inside else []
        return [(entry, self.answers.entry_inode(entry.name, entry.nid)) for entry in found]

    def _row(self, entry: Dirent, inode: Inode | None) -> EntryAttributes:
        attr = EntryAttributes()
        if inode is not None:
            attr.st_blksize = self._attr.st_blksize
            attr.entry_timeout = FOREVER
            return self._as_entry(attr, inode)
        is_dots = entry.name in (b".", b"..")  # of which the kernel takes the number only
        number, node = self.answers.number, self.answers.node_of
        attr.st_ino = number(entry.nid) if is_dots else node(entry.nid)
        attr.st_mode = MODE_OF_FT.get(entry.file_type, 0)
        attr.entry_timeout = attr.attr_timeout = 0.0
        return attr

    @refusing(metadata=True)
    async def releasedir(self, fh: int) -> None:
        pass

    # files ---------------------------------------------------------------------------

    @refusing(metadata=True)
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        file = await self._file(inode)
        if self._record and len(self.opened) < MAX_RECORDED:
            self.opened[file.inode.nid] = None
        self._info.fh = inode
        return self._info

    async def _file(self, node: int) -> AsyncFile:
        file = self._files.get(node)
        if file is None:
            file = AsyncFile(self._image, await self._run(self.answers.file, node))
            if len(self._files) >= MAX_FILES:
                del self._files[next(iter(self._files))]
            self._files[node] = file
        return file

    @refusing(metadata=False)
    async def read(self, fh: int, off: int, size: int) -> Buffer:  # type: ignore[override]
        file = self._files.get(fh) or await self._file(fh)
        found = file.read_now(off, size)
        return await self._wait(found.finish()) if isinstance(found, Pending) else found

    @refusing(metadata=True)
    async def release(self, fh: int) -> None:
        pass

    @refusing(metadata=True)
    async def flush(self, fh: int) -> None:
        """close(2): nothing to write back.  After ENOSYS the kernel sends no further FLUSH."""
        raise FUSEError(errno.ENOSYS)

"""The asynchronous API, for trio: ``async with pyerofs.aio.open(...) as image``.

The parser stays synchronous.  A call runs it on a FaultingMemory: usually all the data is in
memory, and the call returns at once, without a trip through the event loop; otherwise a ``Pager``
brings what is missing.

Checkpoints: a method is a checkpoint only if it has to wait.  Cancellation is safe everywhere: work
that other tasks also wait for is restarted by one of them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

import trio

from pyerofs.errors import ErofsError, NotADirectory, NotFound, TooManySymlinks
from pyerofs.format import data, directory, superblock, tree
from pyerofs.format import inode as inodes
from pyerofs.format.extent import extents
from pyerofs.format.memory import DEFAULT_CACHE_SIZE, Fault, NotDecoded
from pyerofs.format.model import ENCODED, FRAGMENT, Dirent, Extent, Inode
from pyerofs.format.tree import PathLike, Stat
from pyerofs.format.volume import Volume
from pyerofs.image import Target
from pyerofs.pager import CONSIDERATE, Pager, Schedule
from pyerofs.sources.base import AsyncSource, Buffer
from pyerofs.sources.open import Openable, named, open_one
from pyerofs.sources.spec import Access

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MAX_PIECES = 32  # extents of one read that are fetched and decoded concurrently
AHEAD = 4 << 20  # bytes that are decoded ahead of a sequential reader
INODE_SIZE = 64  # bytes; data after an inode usually lies in the same window


def open(
    what: Openable,
    *,
    offset: int = 0,
    devices: Sequence[Openable] = (),
    cache_size: int = DEFAULT_CACHE_SIZE,
    access: Access | None = None,
) -> AbstractAsyncContextManager[AsyncImage]:
    """Open an EROFS image for an ``async with`` block.

    The arguments and errors are those of ``pyerofs.open``."""
    return open_scheduled(
        CONSIDERATE, what, offset=offset, devices=devices, cache_size=cache_size, access=access
    )


@asynccontextmanager
async def open_scheduled(
    schedule: Schedule,
    what: Openable,
    *,
    offset: int = 0,
    devices: Sequence[Openable] = (),
    cache_size: int = DEFAULT_CACHE_SIZE,
    access: Access | None = None,
) -> AsyncIterator[AsyncImage]:
    """``open`` with the Schedule of a front-end, which knows when the event loop may block."""
    access = access or Access()
    opened: list[AsyncSource] = []
    try:
        failed: BaseException | None = None
        async with trio.open_nursery() as nursery:
            try:
                for item in named(what, offset, devices):
                    opened.append(await open_one(item, access, nursery))  # noqa: PERF401
                image = AsyncImage(opened, nursery, cache_size, schedule)
                await image.start()
                yield image
            except BaseException as e:
                failed = e  # raised below, outside the nursery, which would wrap it in a group
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed
    finally:
        with trio.CancelScope(shield=True):
            for source in opened:
                await source.aclose()


class Pending:
    """The rest of a read that could not be answered from memory."""

    __slots__ = ("_rest",)

    def __init__(self, rest: Callable[[], Awaitable[Buffer]]) -> None:
        self._rest = rest

    async def finish(self) -> Buffer:
        """Complete the read and return all its bytes.  Raises as ``read_data`` does."""
        return await self._rest()


class AsyncImage:
    """An open EROFS image.  Made by ``pyerofs.aio.open``; for one event loop.

    The methods are those of ``pyerofs.Image``."""

    volume: Volume
    root: Inode

    def __init__(
        self,
        sources: Sequence[AsyncSource],
        nursery: trio.Nursery,
        cache_size: int = DEFAULT_CACHE_SIZE,
        schedule: Schedule = CONSIDERATE,
    ) -> None:
        """``nursery``: runs the background tasks that decode ahead."""
        self._sources = tuple(sources)
        self._pager = Pager(sources, nursery, cache_size, schedule)
        self.memory = self._pager.memory
        ahead = schedule.ahead
        self.ahead = min(AHEAD, cache_size // 8) if ahead is None else ahead
        self.far = not self.local  # at opening; ``local`` may change later

    async def start(self) -> None:
        """Read the superblock and the special inodes.  Raises CorruptImage, UnsupportedFeature."""
        memory = self.memory
        sb = await self.call(
            superblock.load, lambda at, n: memory.bytes_at(0, at, n), memory.sizes[0]
        )
        self.volume = Volume(sb, memory, len(self._sources) - 1)
        await self.call(data.attach_metabox, self.volume)
        self.root = await self.call(tree.root, self.volume)

    @property
    def superblock(self) -> superblock.Superblock:
        return self.volume.sb

    @property
    def local(self) -> bool:
        """Whether all sources can be read without the network, at present."""
        return all(s.blocking is not None for s in self._sources)

    async def verify(self, *, rest: bool = True) -> None:
        """As ``Image.verify``."""
        for source in self._sources:
            digested = source.verifiable
            if digested is not None and (rest or digested.whole):
                await digested.verify()

    def status(self) -> list[dict[str, Any]]:
        """The status of each source; see ``AsyncSource.status``."""
        return [s.status() for s in self._sources]

    # what the parser misses ---------------------------------------------------------------

    async def call(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Call a parser function; after each Fault, get the missing data and call it again."""
        return await self._pager.call(function, *args)

    async def resume(self, fault: Fault, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Like ``call``, after a first call has raised ``fault``."""
        return await self._pager.resume(fault, function, *args)

    def decode_ahead(self, inode: Inode, offset: int, length: int) -> None:
        """Start decoding a range in worker threads; hint it to the sources.  Never waits or raises.

        Best effort: a range that can't be mapped from memory is skipped; see
        ``Pager.decode_ahead``."""
        try:
            found = self._map(inode, offset, length)
        except (Fault, ErofsError):
            return
        self._pager.hint(found)
        self._pager.decode_ahead(
            data.pcluster(self.volume, inode, extent) for extent in found if extent.kind == ENCODED
        )

    async def will_need(self, inode: Inode, offset: int, length: int) -> None:
        """Hint to the sources that a range will be read soon; they may fetch it or do nothing.
        Waits only for the metadata that maps the range."""
        self._pager.hint(await self.call(self._map, inode, offset, length))

    def inode_needed(self, nid: int) -> None:
        """Hint to the source that an inode will be read soon.  Never waits."""
        device, offset = self.volume.inode_position(nid)
        if device >= 0:
            self._sources[device].will_need(offset, INODE_SIZE)

    # inodes -----------------------------------------------------------------------------

    async def inode(self, nid: int) -> Inode:
        """The inode with a given nid."""
        return await self.call(inodes.load, self.volume, nid)

    async def lookup(self, path: Target, *, follow_symlinks: bool = True) -> Inode:
        """The inode at a path.  Raises NotFound, NotADirectory, TooManySymlinks."""
        if isinstance(path, Inode):
            return path
        return await self.call(tree.resolve, self.volume, tree.encode(path), follow_symlinks)

    async def child(self, parent: Inode, name: bytes) -> Inode | None:
        """The inode of a directory's entry ``name``, or None if there is none."""
        return await self.call(tree.lookup, self.volume, parent, name)

    async def exists(self, path: Target, *, follow_symlinks: bool = True) -> bool:
        """Whether a path exists (False for dangling links)."""
        try:
            await self.lookup(path, follow_symlinks=follow_symlinks)
        except (NotFound, NotADirectory, TooManySymlinks):
            return False
        return True

    async def stat(self, path: Target, *, follow_symlinks: bool = True) -> Stat:
        """Stat of the inode at a path, as the kernel's driver shows it."""
        return tree.stat(self.volume, await self.lookup(path, follow_symlinks=follow_symlinks))

    async def readlink(self, path: Target) -> str:
        """The target of a symbolic link.  Raises NotASymlink."""
        inode = await self.lookup(path, follow_symlinks=False)
        return tree.decode(await self.call(tree.link_target, self.volume, inode))

    # extended attributes ----------------------------------------------------------------

    async def xattrs(self, path: Target, *, follow_symlinks: bool = True) -> dict[str, bytes]:
        """All extended attributes, ``trusted.*`` included."""
        inode = await self.lookup(path, follow_symlinks=follow_symlinks)
        found = await self.call(tree.xattrs, self.volume, inode)
        return {tree.decode(name): value for name, value in found.items()}

    async def getxattr(
        self, path: Target, name: str | bytes, *, follow_symlinks: bool = True
    ) -> bytes:
        """One extended attribute.  Raises NoSuchXattr."""
        inode = await self.lookup(path, follow_symlinks=follow_symlinks)
        return await self.call(tree.get_xattr, self.volume, inode, tree.encode(name))

    # directories ------------------------------------------------------------------------

    async def block_entries(self, parent: Inode, index: int, first: int = 0) -> list[Dirent]:
        """The entries of one directory block, ``.`` and ``..`` included; [] beyond the end."""
        if index * self.volume.sb.directory_block_size >= parent.size:
            return []
        return await self.call(directory.block_entries, self.volume, parent, index, first)

    async def scandir(self, path: Target = "/") -> AsyncGenerator[Dirent, None]:
        """The entries of a directory, one block at a time, without ``.`` and ``..``.  Raises
        NotADirectory."""
        inode = await self.lookup(path)
        if not inode.is_dir:
            raise NotADirectory(tree.shown(inode, path))
        index = 0
        while entries := await self.block_entries(inode, index):
            for entry in entries:
                if entry.name not in (b".", b".."):
                    yield entry
            index += 1

    async def listdir(self, path: Target = "/") -> list[str]:
        """The names in a directory."""
        return [tree.decode(e.name) async for e in self.scandir(path)]

    async def walk(
        self, top: PathLike = "/"
    ) -> AsyncGenerator[tuple[str, list[tuple[str, Inode]], list[tuple[str, Inode]]], None]:
        """(path, directories, others) of each directory below ``top``, parents first; the lists
        hold (name, Inode).  Directories that the caller removes from the list are not entered."""
        start = await self.lookup(top)
        above = tree.decode(tree.encode(top))
        trail = tree.Trail(start)
        while (step := trail.next()) is not None:
            place, here = step
            path = place.below(above)
            directories: list[tuple[str, Inode]] = []
            others: list[tuple[str, Inode]] = []
            async with aclosing(self.scandir(here)) as entries:
                async for entry in entries:
                    inode = await self.inode(entry.nid)
                    found = directories if inode.is_dir else others
                    found.append((tree.decode(entry.name), inode))
            yield path, directories, others
            trail.enter([(tree.encode(name), inode) for name, inode in directories])

    # file data --------------------------------------------------------------------------

    async def open(self, path: Target) -> AsyncFile:
        """A file to read from.  Raises IsADirectory, NotAFile."""
        inode = await self.lookup(path)
        tree.require_file(inode, path)
        return AsyncFile(self, inode)

    async def read(self, path: Target, offset: int = 0, length: int | None = None) -> bytes:
        """``length`` bytes of a file at ``offset``, by default all; fewer only at its end.

        At most 2 GiB at once (ErofsError).  Raises IsADirectory, NotAFile; ValueError for a
        negative offset or length."""
        inode = await self.lookup(path)
        tree.require_file(inode, path)
        if length is None:
            length = inode.size
        if offset < 0 or length < 0:
            raise ValueError(f"negative offset or length: {offset}, {length}")
        return bytes(await self.read_data(inode, offset, length))

    async def read_data(
        self, inode: Inode, offset: int, length: int, sparse: bool = False
    ) -> Buffer:
        """Like ``read``, for the data of an inode of any type, and without a copy where possible.
        ``sparse``: the bytes that follow are unlikely to be read soon."""
        found = self.read_now(inode, offset, length, sparse)
        return await found.finish() if isinstance(found, Pending) else found

    def read_now(
        self, inode: Inode, offset: int, length: int, sparse: bool = False
    ) -> Buffer | Pending:
        """Like ``read_data`` if the data is in memory; otherwise a Pending.  Never waits.  Raises
        ErofsError."""
        try:
            cuts = list(data.cuts(self.volume, inode, offset, length))
        except Fault as fault:
            return Pending(partial(self._map_and_read, fault, inode, offset, length, sparse))
        parts: list[Buffer] = []
        try:
            for cut in cuts:
                parts.append(data.piece(self.volume, inode, *cut, sparse))  # noqa: PERF401
        except Fault as fault:
            return Pending(partial(self._read_rest, fault, inode, cuts, parts, sparse))
        return data.joined(parts)

    async def _map_and_read(
        self, fault: Fault, inode: Inode, offset: int, length: int, sparse: bool
    ) -> Buffer:
        """Complete a read after mapping its range has raised ``fault``."""

        def cuts() -> list[data.Cut]:
            return list(data.cuts(self.volume, inode, offset, length))

        return await self._read_cuts(inode, await self.resume(fault, cuts), [], sparse)

    async def _read_rest(
        self,
        fault: Fault,
        inode: Inode,
        cuts: list[data.Cut],
        parts: list[Buffer],
        sparse: bool,
    ) -> Buffer:
        """Complete a read after the piece that follows ``parts`` has raised ``fault``."""
        if len(parts) + 1 == len(cuts):
            parts.append(await self._piece(inode, *cuts[-1], sparse, fault))
            return data.joined(parts)
        return await self._read_cuts(inode, cuts, parts, sparse)

    async def _read_cuts(
        self, inode: Inode, cuts: list[data.Cut], parts: list[Buffer], sparse: bool
    ) -> Buffer:
        """Read the pieces that follow ``parts``, up to MAX_PIECES at the same time."""
        first = len(parts)
        parts += [b""] * (len(cuts) - first)
        todo = iter(range(first, len(cuts)))

        async def get(_: int) -> None:
            for i in todo:
                parts[i] = await self._piece(inode, *cuts[i], sparse)

        if len(cuts) - first == 1:
            await get(first)
        else:
            await run_all(get, range(min(len(cuts) - first, MAX_PIECES)))
        return data.joined(parts)

    async def extents(self, path: Target) -> list[Extent]:
        """The extent map of a file, directory or link."""
        inode = await self.lookup(path)
        return await self.call(self._map, inode, 0, inode.size)

    def _map(self, inode: Inode, offset: int, length: int) -> list[Extent]:
        return list(extents(self.volume, inode, offset, length))

    async def _piece(
        self,
        inode: Inode,
        extent: Extent,
        skip: int,
        length: int,
        sparse: bool,
        fault: Fault | None = None,
    ) -> Buffer:
        """The asynchronous ``data.piece``.  ``fault``: raised by a first call of ``data.piece``, if
        any."""
        if extent.kind == ENCODED:
            if isinstance(fault, NotDecoded):
                wanted = fault.pcluster
            else:
                wanted = data.pcluster(self.volume, inode, extent)
                if sparse:
                    wanted = self.memory.enough(wanted, skip + length)
            decoded = await self._pager.decoded(wanted)
            return memoryview(decoded)[skip : skip + length]
        if extent.kind == FRAGMENT:
            packed = await self.call(data.packed_inode, self.volume, inode)
            found = await self.read_data(packed, extent.address + skip, length, sparse)
            data.check_fragment(inode, len(found), length)
            return found
        again = partial(data.piece, self.volume, inode, extent, skip, length)
        return await (self.call(again) if fault is None else self.resume(fault, again))


async def run_all(function: Callable[[int], Awaitable[None]], numbers: Sequence[int]) -> None:
    """Run ``function`` for all numbers concurrently.  The first ErofsError cancels the others and
    is raised alone, not as a group."""
    failed: list[ErofsError] = []

    async def one(number: int) -> None:
        try:
            await function(number)
        except ErofsError as e:
            failed.append(e)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for number in numbers:
            nursery.start_soon(one, number)
    if failed:
        raise failed[0]


class AsyncFile:
    """An open file of an AsyncImage: reads at a cursor or at any offset.

    A read that continues near the end of the last one is sequential: the data after it is then
    decoded ahead in worker threads."""

    __slots__ = ("_ahead", "_next", "image", "inode", "position", "sequential")

    def __init__(self, image: AsyncImage, inode: Inode) -> None:
        self.image = image
        self.inode = inode
        self.position = 0
        self._next = 0
        self._ahead = 0  # read-ahead has been started up to here
        self.sequential = True  # whether the last read was sequential

    def read_now(self, offset: int, length: int) -> Buffer | Pending:
        """Like ``read_at`` if the data is in memory; otherwise a Pending.  Never waits."""
        self._foresee(offset, length)
        return self.image.read_now(self.inode, offset, length, not self.sequential)

    async def read_at(self, offset: int, length: int) -> Buffer:
        """Up to ``length`` bytes at ``offset``; fewer only at the file's end."""
        self._foresee(offset, length)
        return await self.image.read_data(self.inode, offset, length, not self.sequential)

    def _foresee(self, offset: int, length: int) -> None:
        end = offset + length
        if offset != self._next:
            # requests may be reordered, or skip data that the reader has cached
            near = self._next - 2 * length <= offset <= max(self._next, self._ahead) + length
            if not near:
                self._ahead = 0
                self.sequential = False
                self._next = end
                return
        self._next = max(self._next, end)
        self.sequential = True
        inode = self.inode
        if not offset or end >= inode.size or not (inode.is_compressed or self.image.far):
            return
        window = self.image.ahead
        start = max(self._ahead, end)
        if start - end < window // 2 and start < inode.size:
            self._ahead = min(start + window, inode.size)
            self.image.decode_ahead(inode, start, self._ahead - start)

    async def read(self, length: int = -1) -> bytes:
        """Up to ``length`` bytes at the cursor (default: all up to the end); advances the cursor."""
        if length < 0:
            length = max(self.inode.size - self.position, 0)
        found = bytes(await self.read_at(self.position, length))
        self.position += len(found)
        return found

    def seek(self, position: int) -> None:
        """Move the cursor.  Raises ValueError if ``position`` is negative."""
        if position < 0:
            raise ValueError(f"negative seek position {position}")
        self.position = position

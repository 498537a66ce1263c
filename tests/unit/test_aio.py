"""The asynchronous API: the same answers, from memory or from afar, and how much is asked for.

Most tests give it a source that never has anything at hand, so that every access faults."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import trio
import trio.testing

import pyerofs
from pyerofs import aio
from pyerofs.aio import AsyncFile, AsyncImage, Pending
from pyerofs.format import data, memory
from pyerofs.format.extent import extents
from pyerofs.format.model import ENCODED, FRAGMENT, Extent, Inode
from pyerofs.sources import Buffer, MemorySource
from pyerofs.sources.base import AsyncSource, check_range
from tests import handmade as hm
from tests.helpers import SilentSource, every_image, handmade, location, open_golden, primary
from tests.manifests import Entries, Manifest, differences, entry, golden

T = TypeVar("T")


def using(
    want: Manifest,
    function: Callable[[AsyncImage], Awaitable[T]],
    make: Callable[[bytes], MemorySource] | None = None,
    cache_size: int = memory.DEFAULT_CACHE_SIZE,
) -> T:
    """What ``function`` returns for a golden image: from the file, or from sources of another
    kind."""

    async def main() -> T:
        if make is None:
            opened = aio.open(want.image, **location(want), cache_size=cache_size)
        else:
            devices = [make(path.read_bytes()) for path in want.devices]
            opened = aio.open(make(primary(want)), devices=devices, cache_size=cache_size)
        async with opened as image:
            return await function(image)

    return trio.run(main)


async def entries_of(image: AsyncImage) -> Entries:
    found = {".": await entry_of(image, image.root)}
    async for path, directories, others in image.walk():
        for name, inode in directories + others:
            found[f"{path}/{name}".lstrip("/")] = await entry_of(image, inode)
    return found


async def entry_of(image: AsyncImage, inode: Inode) -> dict[str, object]:
    return entry(
        await image.stat(inode),
        content=await image.read(inode) if inode.is_file else None,
        target=await image.readlink(inode) if inode.is_symlink else None,
        xattrs=await image.xattrs(inode),
    )


# --- the same answers -------------------------------------------------------------------------


@every_image
@pytest.mark.parametrize(
    ("make", "cache_size"),
    [(None, 64 << 20), (None, 1000), (SilentSource, 64 << 20), (SilentSource, 1000)],
    ids=["file", "file without a cache", "afar", "afar without a cache"],
)
def test_everything_is_what_linux_shows(
    want: Manifest, make: Callable[[bytes], MemorySource] | None, cache_size: int
) -> None:
    assert differences(want, using(want, entries_of, make, cache_size)) == []


@every_image
def test_every_path_and_reads_in_pieces(want: Manifest) -> None:
    async def check(image: AsyncImage) -> None:
        with open_golden(want) as reference:
            for path, expected in want.entries.items():
                if not stat.S_ISREG(expected["mode"]):
                    continue
                whole = reference.read(path)
                async with trio.open_nursery() as nursery:  # all pieces at once
                    for at in range(0, len(whole) + 1, 5001):
                        nursery.start_soon(compare, image, path, at, whole[at : at + 5001])
                file = await image.open(path)
                assert b"".join([await file.read(4093), await file.read()]) == whole

    async def compare(image: AsyncImage, path: str, at: int, expected: bytes) -> None:
        assert await image.read(path, at, 5001) == expected

    using(want, check, SilentSource, 1000)


async def use_the_rest(image: AsyncImage) -> None:
    """The rest of the API, on ``plain``; see ``test_the_rest``."""
    assert len(await image.listdir("many")) == 41
    assert await image.listdir("/") == await image.listdir("")
    assert await image.exists("text")
    assert not await image.exists("dangling")
    assert not await image.exists("text/below")
    assert await image.exists("dangling", follow_symlinks=False)
    assert (await image.stat("link-short")).st_size == 40425
    assert (await image.stat("link-short", follow_symlinks=False)).st_size == 4
    assert await image.readlink("link-short") == "text"
    assert await image.getxattr("xattr-1", "user.common") == b"shared-value"
    child = await image.child(image.root, b"text")
    assert child is not None
    assert child.nid == (await image.lookup("text")).nid
    assert await image.child(image.root, b"missing") is None
    assert (await image.inode(child.nid)).size == 40425
    assert await image.lookup(child) is child
    assert image.superblock.block_size == 4096
    assert [e.length for e in await image.extents(child)] == [36864, 3561]
    assert await image.block_entries(image.root, 99) == []


@pytest.mark.parametrize("make", [None, SilentSource])
def test_the_rest(make: Callable[[bytes], MemorySource] | None) -> None:
    using(golden("plain"), use_the_rest, make)


# --- what it costs ----------------------------------------------------------------------------


class FarSource(AsyncSource):
    """An asynchronous source with nothing at hand.  Where there is a ``gate``, reads wait at it;
    they fail at the offsets in ``broken``."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.name = "far"
        self.size = len(data)
        self.requests: list[tuple[int, int]] = []
        self.gate: trio.Event | None = None
        self.broken: Container[int] = ()

    def peek(self, offset: int, length: int) -> Buffer | None:
        return None

    async def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        self.requests.append((offset, length))
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        if offset in self.broken:
            raise pyerofs.SourceError(f"far: broken at {offset}")
        return self.data[offset : offset + length]

    async def aclose(self) -> None:
        pass


@asynccontextmanager
async def open_far(name: str) -> AsyncIterator[tuple[AsyncImage, FarSource]]:
    """A golden image behind a source that is far away."""
    source = FarSource(primary(golden(name)))
    async with trio.open_nursery() as nursery:
        image = AsyncImage([source], nursery)
        await image.start()
        yield image, source
        nursery.cancel_scope.cancel()


class Cost(NamedTuple):
    requests: int  # to the source
    faults: int  # of the parser
    decodes: int  # of pclusters


BOTTOM = "/".join(f"deep{i}" for i in range(12)) + "/bottom"

# What each operation costs, one after another on one image; the cache keeps what came before.
NOTHING = Cost(0, 0, 0)
COSTS: dict[str, dict[str, Cost]] = {
    "plain": {
        "open": Cost(1, 1, 0),
        "look up deep below": Cost(2, 2, 0),
        "look up again": NOTHING,
        "look up nothing": NOTHING,
        "list": NOTHING,
        "stat all": NOTHING,
        "read": Cost(1, 2, 0),
        "read again": Cost(1, 2, 0),  # stored data is not kept
        "read in steps": Cost(16, 16, 0),
    },
    "chunk-indexes": {
        "open": Cost(1, 1, 0),
        "look up deep below": NOTHING,
        "look up again": NOTHING,
        "look up nothing": NOTHING,
        "list": NOTHING,
        "stat all": NOTHING,
        "read": Cost(1, 1, 0),
        "read again": Cost(1, 1, 0),
        "read in steps": Cost(17, 17, 0),
    },
    "zstd": {
        "open": Cost(1, 1, 0),
        "look up deep below": Cost(1, 1, 0),
        "look up again": NOTHING,
        "look up nothing": NOTHING,
        "list": NOTHING,
        "stat all": Cost(1, 1, 0),
        "read": Cost(4, 5, 4),
        "read again": NOTHING,
        "read in steps": Cost(6, 12, 6),
    },
    "lzma-C64k": {
        "open": Cost(1, 1, 0),
        "look up deep below": Cost(1, 1, 0),
        "look up again": NOTHING,
        "look up nothing": NOTHING,
        "list": NOTHING,
        "stat all": NOTHING,
        "read": Cost(2, 3, 1),
        "read again": NOTHING,
        "read in steps": Cost(1, 2, 1),
    },
    "frag-zstd": {
        "open": Cost(1, 1, 0),
        "look up deep below": NOTHING,
        "look up again": NOTHING,
        "look up nothing": NOTHING,
        "list": NOTHING,
        "stat all": NOTHING,
        "read": Cost(2, 4, 2),
        "read again": NOTHING,
        "read in steps": NOTHING,  # in the same pcluster of the packed inode
    },
    "metabox": {
        "open": Cost(17, 17, 15),
        "look up deep below": NOTHING,
        "look up again": NOTHING,
        "look up nothing": NOTHING,
        "list": NOTHING,
        "stat all": NOTHING,
        "read": Cost(10, 11, 9),
        "read again": Cost(1, 1, 0),  # its last bytes are stored
        "read in steps": Cost(17, 33, 16),
    },
}


@contextmanager
def counting_faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[memory.Fault]]:
    faults: list[memory.Fault] = []

    def count(self: memory.Fault, *args: object) -> None:
        Exception.__init__(self, *args)
        faults.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(memory.Fault, "__init__", count)
        yield faults


async def costs_of(name: str, faults: list[memory.Fault]) -> dict[str, Cost]:
    async with open_far(name) as (image, source):
        found = {"open": Cost(len(source.requests), len(faults), image.memory.decodes)}
        for label, operation in operations_on(image).items():
            before = len(source.requests), len(faults), image.memory.decodes
            await operation()
            after = len(source.requests), len(faults), image.memory.decodes
            found[label] = Cost(*(b - a for a, b in zip(before, after, strict=True)))
    return found


def operations_on(image: AsyncImage) -> dict[str, Callable[[], Awaitable[object]]]:
    async def stat_all() -> None:
        for entry_name in await image.listdir("many"):
            await image.stat(f"many/{entry_name}", follow_symlinks=False)

    async def read_in_steps() -> None:
        file = await image.open("size-65537")
        while await file.read(4096):
            pass

    return {
        "look up deep below": partial(image.lookup, BOTTOM),
        "look up again": partial(image.lookup, BOTTOM),
        "look up nothing": partial(image.exists, "nothing"),
        "list": partial(image.listdir, "many"),
        "stat all": stat_all,
        "read": partial(image.read, "text"),
        "read again": partial(image.read, "text"),
        "read in steps": read_in_steps,
    }


@pytest.mark.parametrize("name", COSTS)
def test_costs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with counting_faults(monkeypatch) as faults:
        assert trio.run(costs_of, name, faults) == COSTS[name]


@pytest.mark.parametrize("name", ["lz4", "zstd", "plain"])
def test_a_read_that_has_to_wait_is_resumed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found out before the fault is not found out again: the range is mapped once."""

    async def main() -> None:
        async with open_far(name) as (image, source):
            file = await image.open("size-65537")
            await file.read_at(65536, 1)  # its map is in memory from now on
            mapped: list[int] = []

            def count(*args: Any) -> Iterator[Extent]:
                mapped.append(args[2])
                return extents(*args)

            monkeypatch.setattr(data, "extents", count)
            waits = len(source.requests)
            assert len(await file.read_at(100, 4096)) == 4096
            assert len(source.requests) > waits
            assert mapped == [100]

    trio.run(main)


@every_image
def test_metadata_is_fetched_once(want: Manifest) -> None:
    """Looking up and listing again costs no request: everything fits in the cache."""

    async def main() -> None:
        sources = [FarSource(primary(want)), *(FarSource(d.read_bytes()) for d in want.devices)]
        requests = []
        async with trio.open_nursery() as nursery:
            image = AsyncImage(sources, nursery)
            await image.start()
            for _ in range(2):
                for path in want.entries:
                    await image.stat(path, follow_symlinks=False)
                    await image.xattrs(path, follow_symlinks=False)
                async for _ in image.walk():
                    pass
                requests.append(sum(len(s.requests) for s in sources))
        assert requests[1] == requests[0]

    trio.run(main)


def at_hand(file: AsyncFile, offset: int, length: int) -> bytes:
    """What a read gives that does not have to wait."""
    found = file.read_now(offset, length)
    assert not isinstance(found, Pending)
    return bytes(found)


def test_what_is_at_hand_needs_no_event_loop() -> None:
    """Nothing is awaited where the source has everything at hand and decoding is cheap."""

    def now(coroutine: Coroutine[object, object, T]) -> T:
        with pytest.raises(StopIteration) as stopped:
            coroutine.send(None)
        return stopped.value.value  # type: ignore[no-any-return]

    async def main(image: AsyncImage) -> None:
        assert now(image.stat("text")).st_size == 40425
        assert len(now(image.listdir("many"))) == 41
        assert len(now(image.read("text"))) == 40425
        file = now(image.open("text"))
        assert at_hand(file, 4000, 9) == now(file.read_at(4000, 9))

    using(golden("zstd"), main, MemorySource)


@pytest.mark.parametrize("make", [None, SilentSource], ids=["file", "afar"])
def test_a_random_read_of_a_fragment_decodes_no_more_than_it_needs(
    make: Callable[[bytes], MemorySource] | None,
) -> None:
    async def read(image: AsyncImage) -> int:
        packed = await image.inode(image.superblock.packed_nid)
        checked = 0
        files = [inode async for _, _, others in image.walk() for _, inode in others]
        for inode in [inode for inode in files if inode.is_file and inode.size >= 9]:
            extent = (await image.extents(inode))[-1]
            for holder in await image.extents(packed):
                need = extent.address + 9 - holder.start
                key = data.pcluster(image.volume, packed, holder).key
                if holder.kind != ENCODED or not 9 <= need < holder.length - 100:
                    continue
                if extent.kind == FRAGMENT and key not in image.memory.pclusters:
                    found = await image.read_data(inode, extent.start, 9, sparse=True)
                    decoded = image.memory.pclusters.get(key)
                    assert decoded is not None
                    assert len(decoded) == need
                    assert found == decoded[-9:]
                    checked += 1
        return checked

    assert using(golden("allfrag-lz4"), read, make) > 0


def test_read_now_says_that_it_would_wait() -> None:
    async def main() -> None:
        async with open_far("zstd") as (image, _):
            file = await image.open("text")
            pending = file.read_now(0, 10)
            assert isinstance(pending, Pending)
            assert at_hand(file, 0, 0) == b""
            whole = await file.read()
            assert bytes(await pending.finish()) == whole[:10]
            assert at_hand(file, 100, 10) == whole[100:110]

    trio.run(main)


# --- many tasks at once -----------------------------------------------------------------------


@dataclass
class Crowd:
    """Tasks that read the same file at once; what they got, and what they failed with."""

    image: AsyncImage
    path: str
    got: list[bytes] = field(default_factory=list)
    failed: list[Exception] = field(default_factory=list)

    async def read(self, scope: trio.CancelScope | None = None) -> None:
        with scope or trio.CancelScope():
            try:
                self.got.append(await self.image.read(self.path))
            except pyerofs.SourceError as e:
                self.failed.append(e)


# of one pcluster each: decoded by the event loop, decoded by a thread, in the packed inode
ONE_PCLUSTER = [("zstd-C128k", "text"), ("lzma-C64k", "size-65537"), ("frag-lz4", "dup-c")]


@asynccontextmanager
async def crowd_at(name: str, path: str) -> AsyncIterator[tuple[Crowd, FarSource]]:
    """A crowd before a file of which all metadata is there."""
    async with open_far(name) as (image, source):
        await image.extents(path)
        source.requests.clear()
        yield Crowd(image, path), source


def content(name: str, path: str) -> bytes:
    with open_golden(golden(name)) as image:
        return image.read(path)


@pytest.mark.parametrize(("name", "path"), ONE_PCLUSTER)
def test_a_pcluster_is_fetched_and_decoded_once_for_all(name: str, path: str) -> None:
    async def main() -> None:
        async with crowd_at(name, path) as (crowd, source):
            decodes = crowd.image.memory.decodes
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(crowd.read)
            assert crowd.got == [content(name, path)] * 50
            assert len(source.requests) == len(set(source.requests))
            assert crowd.image.memory.decodes == decodes + 1

    trio.run(main)


@pytest.mark.parametrize(("name", "path"), ONE_PCLUSTER)
@pytest.mark.parametrize("cancelled", [0, 3], ids=["the one that fetches", "one that waits"])
def test_a_cancelled_reader_harms_no_other(name: str, path: str, cancelled: int) -> None:
    async def main() -> None:
        async with crowd_at(name, path) as (crowd, source):
            scopes = [trio.CancelScope() for _ in range(5)]
            source.gate = trio.Event()
            async with trio.open_nursery() as nursery:
                for scope in scopes:
                    nursery.start_soon(crowd.read, scope)
                    await trio.testing.wait_all_tasks_blocked()
                scopes[cancelled].cancel()
                await trio.testing.wait_all_tasks_blocked()
                source.gate.set()
            assert [s.cancelled_caught for s in scopes] == [i == cancelled for i in range(5)]
            assert crowd.got == [content(name, path)] * 4
            # another one took over, once, if it was the one that fetches
            assert len(source.requests) - len(set(source.requests)) == (cancelled == 0)

    trio.run(main)


@pytest.mark.parametrize(("name", "path"), [*ONE_PCLUSTER, ("zstd", "text"), ("plain", "text")])
def test_after_a_failure_the_next_call_works(name: str, path: str) -> None:
    async def main() -> None:
        async with crowd_at(name, path) as (crowd, source):
            source.broken = range(source.size)
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(crowd.read)
            assert not crowd.got
            assert [type(e) for e in crowd.failed] == [pyerofs.SourceError] * 3
            source.broken = ()
            await crowd.read()
            assert crowd.got == [content(name, path)]

    trio.run(main)


def test_a_failure_stops_no_other_call() -> None:
    async def main() -> None:
        async with open_far("zstd") as (image, source):
            (first, *_) = [e for e in await image.extents("text") if e.kind == ENCODED]
            source.broken = [first.address]
            text, other = Crowd(image, "text"), Crowd(image, "size-65537")
            source.gate = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(text.read)
                nursery.start_soon(other.read)
                await trio.testing.wait_all_tasks_blocked()
                source.gate.set()
            assert other.got == [content("zstd", "size-65537")]
            assert [str(e) for e in text.failed] == [f"far: broken at {first.address}"]

    trio.run(main)


def test_a_thread_that_fails() -> None:
    class Broken(SilentSource):
        broken = False

        def read_at(self, offset: int, length: int) -> Buffer:
            if self.broken:
                raise pyerofs.SourceError("disk on fire")
            return super().read_at(offset, length)

    async def main() -> None:
        source = Broken(primary(golden("zstd")))
        async with aio.open(source) as image:
            source.broken = True
            with pytest.raises(pyerofs.SourceError, match="disk on fire"):
                await image.read("text")
            source.broken = False
            assert await image.read("text") == content("zstd", "text")
        assert source.closed

    trio.run(main)


# --- opening, errors, files -------------------------------------------------------------------


def test_what_is_no_image_is_closed() -> None:
    async def main() -> None:
        source = SilentSource(bytes(9000))
        with pytest.raises(pyerofs.CorruptImage, match="no EROFS superblock"):
            async with aio.open(source):
                pytest.fail("opened")
        assert source.closed

    trio.run(main)


@pytest.mark.parametrize("error", [KeyError, pyerofs.NotFound, KeyboardInterrupt])
def test_what_the_block_raises_comes_out_as_it_is(error: type[BaseException]) -> None:
    """And not in a group of exceptions."""

    async def main() -> None:
        source = SilentSource(primary(golden("plain")))
        with pytest.raises(error, match="mine"):
            async with aio.open(source):
                raise error("mine")
        assert source.closed

    trio.run(main)


def test_the_block_may_be_cancelled() -> None:
    async def main() -> None:
        source = SilentSource(primary(golden("plain")))
        with trio.CancelScope() as scope:
            async with aio.open(source) as image:
                assert await image.read("text")
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert source.closed

    trio.run(main)


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(pyerofs.SourceError, match="absent"):
            async with aio.open(tmp_path / "absent"):
                pytest.fail("opened")

    trio.run(main)


@pytest.mark.parametrize("make", [MemorySource, SilentSource])
@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("missing", pyerofs.NotFound),
        ("text/below", pyerofs.NotADirectory),
        ("many", pyerofs.IsADirectory),
        ("fifo", pyerofs.NotAFile),
    ],
)
def test_errors(
    make: Callable[[bytes], MemorySource], path: str, error: type[pyerofs.ErofsError]
) -> None:
    async def main(image: AsyncImage) -> None:
        with pytest.raises(error, match=path):
            await image.read(path)
        with pytest.raises(error, match=path):
            await image.open(path)
        with pytest.raises(pyerofs.NotADirectory):
            await image.listdir("text")
        with pytest.raises(pyerofs.NotASymlink):
            await image.readlink("text")
        with pytest.raises(pyerofs.NoSuchXattr):
            await image.getxattr("text", "user.none")
        with pytest.raises(ValueError, match="negative"):
            await image.read("text", -1)

    using(golden("plain"), main, make)


def test_corruption_is_reported_as_by_the_synchronous_api() -> None:
    want = golden("zstd-C128k")
    data = bytearray(primary(want))
    with open_golden(want) as image:
        (extent, *_) = image.extents("text")
    data[extent.address : extent.address + extent.size] = b"x" * extent.size
    with pyerofs.open(MemorySource(data)) as image, pytest.raises(pyerofs.CorruptImage) as expected:
        image.read("text")

    async def main(source: MemorySource) -> None:
        async with aio.open(source) as image:
            with pytest.raises(pyerofs.CorruptImage) as found:
                await image.read("text")
        assert str(found.value) == str(expected.value)
        assert found.value.offset == extent.address

    trio.run(main, MemorySource(data))
    trio.run(main, SilentSource(data))


def test_a_hole_larger_than_memory_is_refused() -> None:
    image = handmade({b"hole": hm.plain(1 << 40, 0xFFFFFFFF, extended=True, high=0xFFFF)})

    async def main() -> None:
        async with aio.open(MemorySource(image)) as opened:
            with pytest.raises(pyerofs.ErofsError, match="at most"):
                await opened.read("hole")
            assert await opened.read("hole", 1 << 39, 5) == bytes(5)

    trio.run(main)


def test_a_file_has_a_cursor() -> None:
    async def main(image: AsyncImage) -> None:
        whole = await image.read("text")
        file = await image.open("text")
        assert await file.read(100) == whole[:100]
        assert file.position == 100
        file.seek(40000)
        assert await file.read() == whole[40000:]
        assert await file.read() == await file.read(5) == b""
        file.seek(99999)
        assert await file.read() == b""
        with pytest.raises(ValueError, match="negative"):
            file.seek(-1)

    using(golden("lz4"), main, SilentSource)


def test_what_a_walk_s_caller_removes_is_not_entered() -> None:
    async def main(image: AsyncImage) -> None:
        seen = []
        async for path, directories, _ in image.walk():
            seen.append(path)
            directories[:] = [d for d in directories if d[0] == "deep0"]
        assert seen == ["/", "/deep0"]

    using(golden("plain"), main)

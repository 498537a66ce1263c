"""The contract of sources, proved by every asynchronous kind, near and far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import zstandard

from pyerofs.images.flat import FlatSource
from pyerofs.sources import FileSource, MemorySource, Source
from pyerofs.sources.base import AsyncSource, Wrapper
from pyerofs.sources.local.digested import DigestedSource
from pyerofs.sources.local.slice import AsyncSlice
from pyerofs.sources.local.threaded import ThreadedSource
from pyerofs.sources.open import open_one
from pyerofs.sources.portal import open_blocking
from tests import handmade as hm
from tests.contract import AsyncSourceContract, Opener, SourceContract
from tests.helpers import SilentSource
from tests.remote import oci, verity
from tests.remote.pretend import Pretend, serve
from tests.remote.reading import access, spec
from tests.remote.server import Content, Server
from tests.remote.test_verity import tree_spec

DATA = hm.noise((2 << 20) + 3 * 4096)  # some segments of a cache, and whole blocks of a hash tree


@dataclass
class Place:
    """Where a test keeps its files and servers."""

    directory: Path
    stack: ExitStack

    def file(self, data: bytes = DATA) -> Path:
        path = self.directory / "data"
        path.write_bytes(data)
        return path

    def server(self, content: Content) -> Server:
        return self.stack.enter_context(Server(content))

    def registry(self, image: oci.Manifest) -> str:
        registry = Pretend()
        oci.publish(registry, "app", "1", image)
        server = self.stack.enter_context(serve(registry))
        return f"oci://{server.authority}/app:1"

    def layout(self, image: oci.Manifest) -> str:
        layout = oci.Layout(self.directory / "layout")
        oci.publish(layout, "", "1", image)
        return f"oci-layout:{layout.directory}"


def near(make: Callable[[Place], AsyncSource], place: Place) -> Opener:
    async def opener(_: trio.Nursery) -> AsyncSource:
        return make(place)

    return opener


def far(what: str, *, offset: int = 0, cache: bool = True, again: bool = False) -> Opener:
    """``again``: all of it has been read before, into the cache."""

    async def opener(nursery: trio.Nursery) -> AsyncSource:
        how = access(cache=cache)
        if again:
            async with trio.open_nursery() as before:
                source = await open_one(spec(what, offset=offset), how, before)
                await source.read_at(0, source.size)
                if source.verifiable is not None:
                    await source.verifiable.verify()
                before.cancel_scope.cancel()
            await source.aclose()
        return await open_one(spec(what, offset=offset), how, nursery)

    return opener


def checked(place: Place, *, served: bool, offset: int = 0) -> Opener:
    """Behind dm-verity."""
    path = place.file()
    tree = verity.make(path)
    what = place.server(Content(path.read_bytes())).url if served else str(path)
    fields = {"verity": tree_spec(tree), "offset": offset}

    async def opener(nursery: trio.Nursery) -> AsyncSource:
        return await open_one(spec(what, **fields), access(), nursery)

    return opener


def compressed(data: bytes) -> oci.Manifest:
    """An image of one layer that is a zstd stream."""
    packed = zstandard.ZstdCompressor(level=1).compress(data)
    layer = oci.layer(packed, f"{oci.EROFS}+zstd")
    return oci.manifest(layer, diff_ids=[oci.digest_of(data)])


NEAR: dict[str, Callable[[Place], AsyncSource]] = {
    "threaded, memory": lambda _: ThreadedSource(MemorySource(DATA)),
    "threaded, nothing at hand": lambda _: ThreadedSource(SilentSource(DATA)),
    "threaded, file": lambda place: ThreadedSource(FileSource(place.file())),
    "slice": lambda place: AsyncSlice(ThreadedSource(FileSource(place.file(b"x" * 99 + DATA))), 99),
    "wrapper": lambda place: Wrapper(ThreadedSource(FileSource(place.file()))),
    "digested": lambda place: DigestedSource(FileSource(place.file()), oci.digest_of(DATA)),
    "flat, of two": lambda _: FlatSource(
        [
            (1 << 20, len(DATA) - (1 << 20), ThreadedSource(SilentSource(DATA[1 << 20 :]))),
            (0, 1 << 20, ThreadedSource(MemorySource(DATA[: 1 << 20]))),
        ],
        len(DATA),
    ),
}

FAR: dict[str, Callable[[Place], Opener]] = {
    "HTTP": lambda place: far(place.server(Content(DATA)).url),
    "HTTP, again": lambda place: far(place.server(Content(DATA)).url, again=True),
    "HTTP, without a cache": lambda place: far(place.server(Content(DATA)).url, cache=False),
    "HTTP, without ranges": lambda place: far(place.server(Content(DATA, ranges=False)).url),
    "HTTP, neither ranges nor versions": lambda place: far(
        place.server(Content(DATA, etag=None, ranges=False)).url
    ),
    "HTTP, slice": lambda place: far(place.server(Content(b"x" * 99 + DATA)).url, offset=99),
    "registry": lambda place: far(place.registry(oci.image(DATA))),
    "registry, again": lambda place: far(place.registry(oci.image(DATA)), again=True),
    "registry, without a cache": lambda place: far(place.registry(oci.image(DATA)), cache=False),
    "registry, zstd": lambda place: far(place.registry(compressed(DATA))),
    "layout": lambda place: far(place.layout(oci.image(DATA))),
    "layout, zstd": lambda place: far(place.layout(compressed(DATA))),
    "layout, zstd, without a cache": lambda place: far(place.layout(compressed(DATA)), cache=False),
    "verity, file": lambda place: checked(place, served=False),
    "verity, HTTP": lambda place: checked(place, served=True),
}

KINDS = NEAR.keys() | FAR.keys()


@pytest.fixture(name="place")
def make_place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(tmp_path, stack)


@pytest.fixture(name="opener", params=sorted(KINDS))
def make_opener(request: pytest.FixtureRequest, place: Place) -> Opener:
    kind = request.param
    if kind.startswith("verity") and not verity.available():
        pytest.skip("no veritysetup")
    return near(NEAR[kind], place) if kind in NEAR else FAR[kind](place)


class TestAsynchronous(AsyncSourceContract):
    data = DATA


class TestForThreads(SourceContract):
    """The same through the portal."""

    data = DATA

    @pytest.fixture(name="source")
    def make_source(self, opener: Opener) -> Iterator[Source]:
        async def open_all(nursery: trio.Nursery) -> list[AsyncSource]:
            return [await opener(nursery)]

        (source,) = open_blocking(open_all)
        yield source
        source.close()

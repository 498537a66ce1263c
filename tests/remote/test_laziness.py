"""How much goes over the network: counted, with limits.

``many()`` has all its metadata in the first two MiB and large files behind them; a reader of one thing
must not fetch the others."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import pytest
import trio

import pyerofs
import pyerofs.aio
from tests.remote import faults, oci
from tests.remote.pretend import Pretend, serve
from tests.remote.reading import SEGMENT, access, big, many, opened, spec
from tests.remote.server import Content, Server

IMAGE = many()
TOTAL = len(IMAGE.image)
METADATA = -(-IMAGE.metadata // SEGMENT) * SEGMENT  # whole segments


@pytest.fixture(name="server")
def serve_many() -> Iterator[Server]:
    with Server(Content(IMAGE.image)) as server:
        yield server


def walk(image: pyerofs.Image) -> int:
    """``ls -lR``: how many files there are."""
    found = 0
    for _, _, others in image.walk():
        for entry in others:
            found += stat.S_ISREG(entry.stat().st_mode)
    return found


def test_the_image_is_worth_it() -> None:
    assert METADATA * 10 < TOTAL


def test_opening(server: Server) -> None:
    """One request: it tells what there is and brings what one needs first."""
    with opened(server.url):
        pass
    assert len(server.requests) == 1
    assert server.sent == SEGMENT


def test_walking(server: Server) -> None:
    with opened(server.url) as image:
        assert walk(image) == IMAGE.directories * IMAGE.files + 48
    assert len(server.requests) <= 1 + METADATA // SEGMENT
    assert server.sent <= METADATA + SEGMENT


def test_one_large_file(server: Server) -> None:
    """1 MiB that lies in one segment: its segment, and at most a neighbour."""
    with opened(server.url) as image:
        image.stat("/large-20")
        server.forget()
        assert image.read("/large-20") == b"%06d" % 20 + IMAGE.large[6:]
    assert len(server.requests) <= 2
    assert server.sent <= 2 * SEGMENT


def test_one_large_file_in_pieces(server: Server) -> None:
    """Read-ahead may fetch what lies behind it, but not without measure."""
    with opened(server.url) as image:
        image.stat("/large-20")
        server.forget()
        with image.open("/large-20") as f:
            while f.read(64 << 10):
                pass
    assert len(server.requests) <= 3
    assert server.sent <= 4 * SEGMENT


def test_bytes_here_and_there(server: Server) -> None:
    """A random reader gets no read-ahead: a segment for each place."""
    with opened(server.url) as image:
        walk(image)
        server.forget()
        places = [3, 41, 17, 29, 9, 35]
        for n in places:
            assert image.read(f"/large-{n:02}", 500_000, 100) == IMAGE.large[500_000:500_100]
    assert len(server.requests) <= len(places)
    assert server.sent <= len(places) * SEGMENT


def test_everything(server: Server) -> None:
    """In order, nothing twice, in large requests."""
    with opened(server.url) as image:
        walk(image)
        for n in range(48):
            assert image.read(f"/large-{n:02}")[:6] == b"%06d" % n
    assert server.sent == TOTAL
    assert len(server.requests) <= TOTAL // SEGMENT * 2 // 3


@pytest.mark.parametrize("prefetch", ["none", "metadata"])
def test_again(server: Server, prefetch: str) -> None:
    """What was fetched once is not fetched again, by whomever."""
    with opened(server.url) as image:
        walk(image)
    server.forget()
    with opened(server.url, access(prefetch=prefetch)) as image:
        walk(image)
    assert len(server.requests) <= 1  # is it still the same?
    assert server.sent <= SEGMENT


def test_registries_are_not_asked_for_what_is_known() -> None:
    """A tag costs a request for its manifest, a digest none; blobs are there."""
    registry = Pretend()
    digest = oci.publish(registry, "app", "1", oci.image(big().image))
    with serve(registry) as server:
        for _ in range(2):
            with opened(f"oci://{server.authority}/app:1") as image:
                assert image.read("/big") == big().content
        server.forget()
        with opened(f"oci://{server.authority}/app:1") as image:
            assert image.read("/big") == big().content
        assert [r.path for r in server.of("/manifests/")] == ["/v2/app/manifests/1"]
        assert server.of("/blobs/") == []
        server.forget()
        with opened(f"oci://{server.authority}/app@{digest}") as image:
            assert image.read("/big") == big().content
        assert server.requests == []


def test_requests_of_a_cold_registry() -> None:
    """Manifest, blob: two answers that are no data, at most, beside challenges."""
    registry = Pretend()
    oci.publish(registry, "app", "1", oci.image(big().image))
    with serve(registry) as server:
        with opened(f"oci://{server.authority}/app:1") as image:
            assert image.read("/small") == b"small\n"
        assert len(server.of("/manifests/")) == 1
        assert len(server.of("/blobs/")) == 1
        assert server.sent <= SEGMENT + 4096


def test_single_flight(server: Server) -> None:
    """Fifty tasks that want the same segment wait for one request."""

    async def main() -> None:
        async with pyerofs.aio.open(spec(server.url), access=access()) as image:
            await image.stat("/large-30")
            server.forget()
            server.inject(faults.late(0.1))
            async with trio.open_nursery() as nursery:
                for i in range(50):
                    nursery.start_soon(image.read, "/large-30", i * 20_000, 1000)

    trio.run(main)
    assert len(server.requests) <= 2
    assert server.sent <= 2 * SEGMENT


def test_a_reader_that_gives_up(server: Server) -> None:
    """Its request goes on for the others, and what it brings is kept."""

    async def main() -> None:
        async with pyerofs.aio.open(spec(server.url), access=access()) as image:
            await image.stat("/large-30")
            server.forget()
            server.inject(faults.late(0.3))
            with trio.move_on_after(0.1) as scope:
                await image.read("/large-30")
            assert scope.cancelled_caught
            server.heal()
            assert await image.read("/large-30", 0, 6) == b"000030"
            assert await image.read("/large-30", 100, 6) == IMAGE.large[100:106]

    trio.run(main)
    assert len(server.requests) <= 2
    assert server.sent <= 2 * SEGMENT


def test_read_ahead_hides_latency(server: Server) -> None:
    """While a sequential reader works on one segment, others are under way."""
    server.inject(faults.late(0.05))
    with opened(server.url) as image:
        for n in range(32):
            image.read(f"/large-{n:02}")
    assert server.busiest >= 2

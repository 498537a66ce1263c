"""What every source of bytes has to prove, whatever its kind.

A test class derives from ``SourceContract`` with a fixture ``source``, or from ``AsyncSourceContract``
with a fixture ``opener``; both name the bytes that the source has to show as ``data``.
"""

from __future__ import annotations

import json
import os
import threading
from abc import ABC
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeAlias

import pytest
import trio

from pyerofs.errors import TruncatedRead
from pyerofs.sources.base import AsyncSource, Source
from pyerofs.sources.local.threaded import ThreadedSource
from pyerofs.sources.spec import SourceSpec

Opener: TypeAlias = Callable[[trio.Nursery], Awaitable[AsyncSource]]


def ranges(size: int) -> Iterator[tuple[int, int]]:
    """Ranges within ``size`` bytes, those at its ends and of no length among them."""
    half = size // 2
    yield from ((0, 0), (0, 1), (0, size), (1, half), (0, half + 1), (half, 2), (half + 1, 999))
    yield from ((half - 1, 3), (half, size - half), (size - 1, 1), (size, 0))


def beyond(size: int) -> Iterator[tuple[int, int]]:
    """Ranges that are not within ``size`` bytes."""
    yield from ((0, size + 1), (size - 1, 2), (size, 1), (size + 1, 0), (1 << 62, 1))
    yield from ((-1, 1), (-5, 10), (5, -1))


class SourceContract(ABC):
    """For threads."""

    data: bytes

    def test_size_and_name(self, source: Source) -> None:
        assert source.size == len(self.data)
        assert isinstance(source.name, str)
        assert source.name

    def test_reads_exactly(self, source: Source) -> None:
        for offset, length in ranges(len(self.data)):
            assert bytes(source.read_at(offset, length)) == self.data[offset : offset + length]

    def test_peeks_all_or_nothing(self, source: Source) -> None:
        for offset, length in ranges(len(self.data)):
            found = source.peek(offset, length)
            assert found is None or bytes(found) == self.data[offset : offset + length]

    def test_out_of_bounds(self, source: Source) -> None:
        for offset, length in beyond(len(self.data)):
            with pytest.raises(TruncatedRead) as error:
                source.read_at(offset, length)
            assert source.name in str(error.value)
            assert source.peek(offset, length) is None

    def test_from_many_threads(self, source: Source) -> None:
        wrong: list[int] = []
        room = len(self.data) - 1000

        def read(seed: int) -> None:
            for i in range(100):
                offset = (seed * 977_977 + i * 131_131) % room
                if bytes(source.read_at(offset, 1000)) != self.data[offset : offset + 1000]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_backing(self, source: Source) -> None:
        check_backing(source.backing, self.data)

    def test_closing_twice(self, source: Source) -> None:
        source.close()
        source.close()

    def test_from_trio(self, source: Source) -> None:
        async def main() -> None:
            threaded = ThreadedSource(source)
            assert (threaded.size, threaded.name) == (source.size, source.name)
            await check_many_readers(threaded, self.data)
            await threaded.aclose()
            await threaded.aclose()

        trio.run(main)


class AsyncSourceContract(ABC):
    """For trio's tasks."""

    data: bytes

    def run(self, opener: Opener, check: Callable[[AsyncSource], Awaitable[None]]) -> None:
        """Open the source, check something, close it."""

        async def main() -> None:
            failed: BaseException | None = None
            async with trio.open_nursery() as nursery:
                source = await opener(nursery)
                try:
                    await check(source)
                except BaseException as e:
                    failed = e  # raised below, where the nursery does not make a group of it
                nursery.cancel_scope.cancel()
            await source.aclose()
            await source.aclose()
            if failed is not None:
                raise failed

        trio.run(main)

    def test_size_name_and_status(self, opener: Opener) -> None:
        async def check(source: AsyncSource) -> None:
            assert source.size == len(self.data)
            assert source.name
            status = source.status()
            assert isinstance(status["name"], str)
            assert status["size"] >= source.size
            json.dumps(status)

        self.run(opener, check)

    def test_reads_exactly(self, opener: Opener) -> None:
        async def check(source: AsyncSource) -> None:
            for offset, length in ranges(source.size):
                want = self.data[offset : offset + length]
                assert bytes(await source.read_at(offset, length)) == want
                found = source.peek(offset, length)
                assert found is None or bytes(found) == want

        self.run(opener, check)

    def test_peeks_all_or_nothing(self, opener: Opener) -> None:
        async def check(source: AsyncSource) -> None:
            for offset, length in ranges(source.size):
                found = source.peek(offset, length)
                assert found is None or bytes(found) == self.data[offset : offset + length]

        self.run(opener, check)

    def test_peek_may_be_called_from_any_thread(self, opener: Opener) -> None:
        async def check(source: AsyncSource) -> None:
            await source.read_at(0, source.size)
            for offset, length in ranges(source.size):
                found = await trio.to_thread.run_sync(source.peek, offset, length)
                assert found is None or bytes(found) == self.data[offset : offset + length]

        self.run(opener, check)

    def test_out_of_bounds(self, opener: Opener) -> None:
        async def check(source: AsyncSource) -> None:
            for offset, length in beyond(source.size):
                with pytest.raises(TruncatedRead) as error:
                    await source.read_at(offset, length)
                assert source.name in str(error.value)
                assert source.peek(offset, length) is None

        self.run(opener, check)

    def test_many_readers(self, opener: Opener) -> None:
        async def check(source: AsyncSource) -> None:
            await check_many_readers(source, self.data)

        self.run(opener, check)

    def test_a_hint_does_no_harm(self, opener: Opener) -> None:
        async def check(source: AsyncSource) -> None:
            for offset, length in (*ranges(source.size), *beyond(source.size)):
                source.will_need(offset, length)
            assert bytes(await source.read_at(0, source.size)) == self.data

        self.run(opener, check)

    def test_a_reader_that_gives_up_disturbs_nobody(self, opener: Opener) -> None:
        async def check(source: AsyncSource) -> None:
            async def give_up() -> None:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await source.read_at(0, source.size)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(give_up)
                assert bytes(await source.read_at(0, source.size)) == self.data
            await give_up()
            assert bytes(await source.read_at(1, 5000)) == self.data[1:5001]

        self.run(opener, check)

    def test_what_is_forgotten_can_be_read_again(self, opener: Opener) -> None:
        async def check(source: AsyncSource) -> None:
            await source.read_at(0, source.size)
            for offset, length in ((0, 1), (source.size // 2, 5000), (0, source.size)):
                assert await source.forget(offset, length) in (True, False)
                assert bytes(await source.read_at(0, source.size)) == self.data

        self.run(opener, check)

    def test_the_same_bytes_for_threads(self, opener: Opener) -> None:
        async def check(source: AsyncSource) -> None:
            for _ in range(2):  # before and after all of it was read
                blocking = source.blocking
                if blocking is None:
                    assert not source.quick
                else:
                    assert blocking.size == source.size
                    read = blocking.read_at
                    for offset, length in ranges(source.size):
                        found = await trio.to_thread.run_sync(read, offset, length)
                        assert bytes(found) == self.data[offset : offset + length]
                check_backing(source.backing, self.data)
                await source.read_at(0, source.size)

        self.run(opener, check)

    def test_a_pinned_spec_is_one(self, opener: Opener) -> None:
        async def check(source: AsyncSource) -> None:
            assert source.pinned is None or isinstance(source.pinned, SourceSpec)

        self.run(opener, check)

    def test_verifying(self, opener: Opener) -> None:
        """Where there is a digest of all bytes, they can be checked by it."""

        async def check(source: AsyncSource) -> None:
            digested = source.verifiable
            if digested is not None:
                assert digested.digest is not None
                await digested.verify()
                assert digested.verified
            assert bytes(await source.read_at(0, source.size)) == self.data

        self.run(opener, check)


async def check_many_readers(source: AsyncSource, data: bytes) -> None:
    """A hundred tasks read all of it, each its part."""
    step = -(-len(data) // 100)
    found: dict[int, bytes] = {}

    async def read(offset: int) -> None:
        found[offset] = bytes(await source.read_at(offset, min(step, len(data) - offset)))

    async with trio.open_nursery() as nursery:
        for offset in range(0, len(data), step):
            nursery.start_soon(read, offset)
    assert b"".join(found[offset] for offset in sorted(found)) == data


def check_backing(backing: tuple[int, int] | None, data: bytes) -> None:
    """The file that is named, if one is, holds these bytes."""
    if backing is not None:
        fd, offset = backing
        assert os.pread(fd, len(data), offset) == data

"""Large compressed files, read by many at once: decoded ahead, and stored with the kernel unasked."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import pyerofs
from pyerofs.format import ondisk
from tests import handmade as hm
from tests.fuse.mounting import (
    PATIENCE,
    daemons,
    foreground,
    is_mounted,
    kill,
    mounted,
    unmount,
    wait_until,
)

SIZE = 4 << 20
PIECE = 100_000  # bytes that a pcluster holds: no multiple of a page


class Large(NamedTuple):
    """An image and what its files contain."""

    image: Path
    contents: dict[str, bytes]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    """Files of many pclusters, compressed with DEFLATE, which is too slow to be decoded in place."""
    contents = {f"file {i}": hm.text(SIZE, seed=i) for i in range(4)}
    files, data, at = {}, {}, 1 << 20
    for name, content in contents.items():
        records = []
        for start in range(0, SIZE, PIECE):
            encoder = zlib.compressobj(6, zlib.DEFLATED, -15)
            data[at] = encoder.compress(content[start : start + PIECE]) + encoder.flush()
            records.append((start, hm.plen(len(data[at]), ondisk.ALG_DEFLATE), at))
            at += len(data[at])
        files[name.encode()] = hm.extents(SIZE, 16, records)
    image = hm.build(
        files,
        incompat=ondisk.INCOMPAT_LZ4_0PADDING | ondisk.INCOMPAT_48BIT,
        configs={ondisk.ALG_DEFLATE: ondisk.DEFLATE_CFGS.pack(15)},
    )
    path = tmp_path_factory.mktemp("large") / "large.erofs"
    hm.save(image | data, path)
    with pyerofs.open(path) as opened:
        assert opened.read("file 1") == contents["file 1"]
    return Large(path, contents)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def read_along(path: Path, length: int) -> bytes:
    """A file, read from its beginning to its end in pieces."""
    with opened(path) as fd:
        return b"".join(iter(lambda: os.read(fd, length), b""))


def test_many_readers(large: Large, where: Path) -> None:
    """Several of each file, at different speeds, from a cold start; and once more."""
    with mounted(large.image, where), ThreadPoolExecutor(8) as threads:
        for _ in range(2):
            names = list(large.contents) * 3
            lengths = [1 << 17, 4096, 999_999] * 4
            found = threads.map(read_along, [where / name for name in names], lengths)
            for name, content in zip(names, found, strict=True):
                assert content == large.contents[name]


def test_readers_along_and_about(large: Large, where: Path) -> None:
    """While some read along, others forget what the kernel has and read at random."""

    def read_about(seed: int) -> list[tuple[str, int, int]]:
        rng = random.Random(seed)
        wrong = []
        for name, content in large.contents.items():
            with opened(where / name) as fd:
                for _ in range(40):
                    at, n = rng.randrange(SIZE), rng.choice([1, 5000, 300_000])
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    if os.pread(fd, n, at) != content[at : at + n]:
                        wrong.append((name, at, n))
        return wrong

    with mounted(large.image, where), ThreadPoolExecutor(8) as threads:
        about = [threads.submit(read_about, seed) for seed in range(4)]
        along = {name: threads.submit(read_along, where / name, 1 << 16) for name in large.contents}
        assert [wrong for future in about for wrong in future.result()] == []
        assert [n for n, f in along.items() if f.result() != large.contents[n]] == []


def test_a_mapped_file(large: Large, where: Path) -> None:
    with (
        mounted(large.image, where),
        (where / "file 0").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert mapped[:] == large.contents["file 0"]


def test_a_spoiled_pcluster_among_good_ones(large: Large, where: Path, tmp_path: Path) -> None:
    with pyerofs.open(large.image) as image:
        spoiled = list(image.extents("file 0"))[20]
    copy = tmp_path / "spoiled.erofs"
    content = bytearray(large.image.read_bytes())
    content[spoiled.address : spoiled.address + spoiled.size] = b"\xff" * spoiled.size
    copy.write_bytes(content)
    want = large.contents["file 0"]
    first, last = spoiled.start // 4096 * 4096, -(-spoiled.end // 4096) * 4096
    with mounted(copy, where), opened(where / "file 0") as fd:
        for _ in range(2):
            for at in range(0, SIZE, 4096):
                if first <= at < last:
                    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                        os.pread(fd, 4096, at)
                else:
                    assert os.pread(fd, 4096, at) == want[at : at + 4096]
        assert read_along(where / "file 1", 1 << 17) == large.contents["file 1"]


class Readers:
    """Threads that read all files again and again, until it fails; a context manager."""

    def __init__(self, where: Path, large: Large) -> None:
        self._where = where
        self._contents = large.contents
        self._threads = [threading.Thread(target=self._read, args=[n]) for n in large.contents]
        self._started = threading.Barrier(len(self._threads) + 1)
        self.wrong: list[str] = []
        self.errors: set[int | None] = set()

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in self._threads)

    def _read(self, name: str) -> None:
        want = self._contents[name]
        fd = os.open(self._where / name, os.O_RDONLY)
        try:
            self._started.wait(10)
            while True:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                for at in range(0, SIZE, 1 << 17):
                    found = os.pread(fd, 1 << 17, at)  # cut short if it fails half-way
                    if not found or not want.startswith(found, at):
                        self.wrong.append(f"{name} at {at}")
        except OSError as e:
            self.errors.add(e.errno)
        finally:
            try:
                os.close(fd)
            except OSError:
                pass  # the connection is gone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_while_it_is_busy(
    number: signal.Signals, large: Large, where: Path
) -> None:
    with foreground(large.image, where=where) as process:
        with Readers(where, large) as readers:
            process.send_signal(number)
            assert process.wait(PATIENCE) == 0
            assert not is_mounted(where)
        assert readers.wrong == []
        assert readers.errors <= {errno.EIO, errno.ENOTCONN, errno.ECONNABORTED}


def test_a_killed_daemon_fails_its_readers(large: Large, where: Path) -> None:
    with foreground(large.image, where=where), Readers(where, large) as readers:
        assert wait_until(lambda: not kill(where))
    assert readers.wrong == []
    assert readers.errors <= {errno.EIO, errno.ENOTCONN, errno.ECONNABORTED}


def test_unmounting_waits_for_who_is_still_reading(large: Large, where: Path) -> None:
    with mounted(large.image, where):
        with opened(where / "file 0") as fd:
            assert os.pread(fd, 10, 0) == large.contents["file 0"][:10]
            unmount(where, "-z")
            assert not is_mounted(where)
            found = b"".join(iter(lambda: os.read(fd, 1 << 17), b""))
            assert found == large.contents["file 0"]
        assert wait_until(lambda: not daemons(where))

"""Every source keeps the contract of ``pyerofs.sources.base``."""

from __future__ import annotations

import errno
import gzip
import io
import lzma
import os
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import pyerofs
from pyerofs.errors import SourceError, TruncatedRead
from pyerofs.sources import (
    Buffer,
    ConcatSource,
    FileObjectSource,
    FileSource,
    MemorySource,
    SliceSource,
    Source,
)
from pyerofs.sources.local.file import RWF_NOWAIT
from pyerofs.sources.open import open_source, open_sources
from tests import handmade as hm
from tests.contract import SourceContract
from tests.helpers import SilentSource, entries_of
from tests.manifests import differences, golden

DATA = hm.noise(10_000)
SHM = Path("/dev/shm")


@pytest.fixture(name="path")
def write_data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    return path


@pytest.fixture(name="loop")
def attach_loop_device(path: Path) -> Iterator[Path]:
    """A block device; its size is a multiple of 512 bytes."""
    with path.open("ab") as file:
        file.truncate(10_240)
    try:
        made = subprocess.run(
            ["losetup", "--find", "--show", "--read-only", path],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"no loop device: {e}")
    device = made.stdout.strip()
    yield Path(device)
    subprocess.run(["losetup", "--detach", device], check=True)


def concatenated(pieces: Sequence[int], make: Callable[[Buffer], Source]) -> ConcatSource:
    """DATA in parts of the given lengths and a last one with the rest."""
    parts, at = [], 0
    for length in [*pieces, len(DATA) - sum(pieces)]:
        parts.append(make(DATA[at : at + length]))
        at += length
    return ConcatSource(parts)


MAKERS: dict[str, Callable[[Path], Source]] = {
    "memory": lambda _: MemorySource(DATA),
    "bytearray": lambda _: MemorySource(bytearray(DATA)),
    "memoryview": lambda _: MemorySource(memoryview(DATA)),
    "file": FileSource,
    "file by descriptor": lambda path: FileSource(os.open(path, os.O_RDONLY)),
    "buffered": lambda path: FileObjectSource(path.open("rb")),
    "unbuffered": lambda path: FileObjectSource(path.open("rb", buffering=0)),
    "BytesIO": lambda _: FileObjectSource(io.BytesIO(DATA)),
    "gzip": lambda _: FileObjectSource(
        gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(DATA)))  # type: ignore[arg-type]
    ),
    "slice": lambda path: SliceSource(MemorySource(b"before" + DATA), 6),
    "slice within": lambda path: SliceSource(MemorySource(b"before" + DATA + b"behind"), 6, 10_000),
    "slice of a file": lambda path: SliceSource(FileSource(path), 0),
    "concatenation": lambda path: concatenated([1, 4000, 0, 999], MemorySource),
    "concatenation of one": lambda path: concatenated([], MemorySource),
    "concatenation with empty ends": lambda path: concatenated([0, 10_000], MemorySource),
    "slice of a concatenation": lambda path: SliceSource(
        ConcatSource([MemorySource(b"abc"), concatenated([5000], SilentSource)]), 3
    ),
    "open_source": lambda path: open_source(path),
}


@pytest.fixture(name="source", params=list(MAKERS))
def make_source(request: pytest.FixtureRequest, path: Path) -> Iterator[Source]:
    source = MAKERS[request.param](path)
    yield source
    source.close()
    if isinstance(source, FileObjectSource):
        source._file.close()


class TestContract(SourceContract):
    data = DATA


class TestFile:
    def test_closed(self, path: Path) -> None:
        source = FileSource(path)
        source.close()
        with pytest.raises(SourceError, match="data"):
            source.read_at(0, 1)
        assert source.peek(0, 1) is None

    def test_dropping_it_closes_it(self, path: Path) -> None:
        source = FileSource(path)
        assert source.backing is not None
        fd = source.backing[0]
        os.fstat(fd)
        del source
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    def test_no_other_program_gets_it(self, path: Path) -> None:
        source = FileSource(path)
        assert source.backing is not None
        assert not os.get_inheritable(source.backing[0])

    def test_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="absent: No such file"):
            FileSource(tmp_path / "absent")

    def test_that_may_not_be_read(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> int:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(SourceError, match="data: Permission denied"):
            FileSource(path)

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="is a directory"):
            FileSource(tmp_path)

    def test_fifo_does_not_wait_for_a_writer(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(SourceError, match="neither a file nor a block device"):
            FileSource(tmp_path / "fifo")

    def test_character_device(self) -> None:
        with pytest.raises(SourceError, match="neither a file nor a block device"):
            FileSource("/dev/null")

    def test_a_wrong_descriptor_is_closed(self, tmp_path: Path) -> None:
        fd = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(SourceError, match="is a directory"):
            FileSource(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    def test_names(self, path: Path) -> None:
        assert FileSource(path).name == str(path)
        assert FileSource(path, name="image").name == "image"
        fd = os.open(path, os.O_RDONLY)
        assert FileSource(fd).name == f"fd {fd}"

    def test_that_shrinks(self, path: Path) -> None:
        source = FileSource(path)
        os.truncate(path, 5000)
        assert bytes(source.read_at(4000, 1000)) == DATA[4000:5000]
        with pytest.raises(TruncatedRead, match="shrank to 5000"):
            source.read_at(4000, 2000)
        assert source.peek(4000, 2000) is None

    def test_an_error_of_the_disk(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = FileSource(path)

        def fail(*_: object) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(SourceError, match="data: read at 100: Input/output error"):
            source.read_at(100, 1)

    def test_short_reads_are_completed(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.pread
        monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, min(n, 777), at))
        assert bytes(FileSource(path).read_at(100, 5000)) == DATA[100:5100]

    def test_block_device(self, loop: Path) -> None:
        source = FileSource(loop)
        assert source.size == 10_240
        assert bytes(source.read_at(0, 10_000)) == DATA
        assert bytes(source.read_at(9_000, 1240)) == DATA[9000:] + bytes(240)
        with pytest.raises(TruncatedRead):
            source.read_at(10_000, 241)
        found = source.peek(0, 512)
        assert found is None or bytes(found) == DATA[:512]


@pytest.mark.skipif(RWF_NOWAIT is None, reason="no preadv2 here")
class TestPeekingIntoTheCache:
    def test_what_is_cached(self, path: Path) -> None:
        source = FileSource(path)
        source.read_at(0, 10_000)
        found = source.peek(1000, 8000)
        assert found is not None
        assert bytes(found) == DATA[1000:9000]

    def test_what_is_not(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def would_block(*_: object) -> int:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

        source = FileSource(path)
        monkeypatch.setattr(os, "preadv", would_block)
        assert source.peek(0, 10) is None

    def test_what_is_cached_in_part(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = FileSource(path)
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, at, flags: 5)
        assert source.peek(0, 10) is None
        assert bytes(source.read_at(0, 10)) == DATA[:10]

    @pytest.fixture(name="plain_only")
    def refuse_nowait(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Some file systems can't tell what is cached.  The flags of all calls."""
        real, calls = os.preadv, []

        def preadv(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
            calls.append(flags)
            if flags:
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            return real(fd, buffers, offset, flags)

        monkeypatch.setattr(os, "preadv", preadv)
        return calls

    @pytest.mark.skipif(not os.access(SHM, os.W_OK), reason="no tmpfs")
    def test_tmpfs_is_memory(self, plain_only: list[int]) -> None:
        path = SHM / f"pyerofs-test-{os.getpid()}"
        path.write_bytes(DATA)
        try:
            source = FileSource(path)
            for offset in (5, 50):
                found = source.peek(offset, 1000)
                assert found is not None
                assert bytes(found) == DATA[offset : offset + 1000]
        finally:
            path.unlink()
        assert plain_only[1:] == [0, 0]  # it is not asked again

    def test_a_disk_is_not(self, path: Path, plain_only: list[int]) -> None:
        source = FileSource(path)
        assert source.peek(0, 10) is None
        assert source.peek(0, 10) is None
        assert len(plain_only) == 1
        assert bytes(source.read_at(0, 10)) == DATA[:10]

    def test_neither_is_a_network(
        self, path: Path, plain_only: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """NFS, FUSE and the like have no device either, but reading from them blocks."""
        real = os.fstat

        def fstat(fd: int) -> os.stat_result:
            found = list(real(fd))
            found[stat.ST_DEV] = os.makedev(0, 4000)
            return os.stat_result(found)

        monkeypatch.setattr(os, "fstat", fstat)
        source = FileSource(path)
        assert source.peek(0, 10) is None
        assert all(plain_only)

    def test_block_device(self, loop: Path, plain_only: list[int]) -> None:
        """/dev is a tmpfs; what is in it is not."""
        assert FileSource(loop).peek(0, 10) is None
        assert all(plain_only)


def read_all(file: Any) -> Buffer:
    source = FileObjectSource(file)
    return source.read_at(0, source.size)


class TestFileObject:
    def test_is_not_closed(self) -> None:
        file = io.BytesIO(DATA)
        FileObjectSource(file).close()
        assert not file.closed

    def test_that_has_been_closed(self) -> None:
        file = io.BytesIO(DATA)
        source = FileObjectSource(file)
        file.close()
        with pytest.raises(SourceError, match="closed"):
            source.read_at(0, 1)

    def test_not_seekable(self) -> None:
        read, write = os.pipe()
        os.close(write)
        with os.fdopen(read, "rb") as pipe, pytest.raises(SourceError, match="not seekable"):
            FileObjectSource(pipe)

    def test_that_shrinks(self) -> None:
        file = io.BytesIO(DATA)
        source = FileObjectSource(file)
        file.truncate(5000)
        assert bytes(source.read_at(4000, 1000)) == DATA[4000:5000]
        with pytest.raises(TruncatedRead, match="ended at 5000"):
            source.read_at(4000, 2000)

    def test_short_reads_are_completed(self) -> None:
        class Slow(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                return super().read(min(size or 0, 100))

        assert bytes(FileObjectSource(Slow(DATA)).read_at(50, 5000)) == DATA[50:5050]

    @pytest.mark.parametrize("fault", ["truncated", "damaged", "checksum"])
    @pytest.mark.parametrize(
        ("compress", "open_file"),
        [(gzip.compress, gzip.GzipFile), (lzma.compress, lzma.LZMAFile)],
        ids=["gzip", "xz"],
    )
    def test_compressed_and_broken(
        self,
        fault: str,
        compress: Callable[[bytes], bytes],
        open_file: Callable[..., Any],
    ) -> None:
        """Whatever goes wrong in the object is an error of the source."""
        packed = bytearray(compress(DATA * 20 + hm.text(100_000)))
        if fault == "truncated":
            del packed[-5000:]
        elif fault == "damaged":
            packed[5000:5100] = bytes(100)
        else:
            packed[-6] ^= 1
        file = io.BytesIO(bytes(packed))
        opened = open_file(fileobj=file) if open_file is gzip.GzipFile else open_file(file)
        with pytest.raises(SourceError):
            read_all(opened)


class TestSlice:
    @pytest.mark.parametrize("offset", [-1, 10_001])
    def test_outside(self, offset: int) -> None:
        with pytest.raises(SourceError, match="outside"):
            SliceSource(MemorySource(DATA), offset)

    @pytest.mark.parametrize(("offset", "length"), [(0, 10_001), (9_000, 1001), (0, -1)])
    def test_too_long(self, offset: int, length: int) -> None:
        with pytest.raises(SourceError):
            SliceSource(MemorySource(DATA), offset, length)

    def test_empty(self) -> None:
        source = SliceSource(MemorySource(DATA), 10_000)
        assert source.size == 0
        assert bytes(source.read_at(0, 0)) == b""

    def test_shows_nothing_of_the_rest(self) -> None:
        source = SliceSource(MemorySource(DATA), 100, 200)
        for offset, length in ((-100, 50), (-1, 2), (150, 100), (200, 1), (-100, 300)):
            assert source.peek(offset, length) is None
            with pytest.raises(TruncatedRead, match="memory at 100"):
                source.read_at(offset, length)

    def test_closes_what_it_owns(self) -> None:
        inner = SilentSource(DATA)
        SliceSource(inner, 5).close()
        assert inner.closed


class TestConcatenation:
    def test_asks_each_part_for_its_own(self) -> None:
        parts = [SilentSource(DATA[:4096]), SilentSource(DATA[4096:8192]), SilentSource(b"xyz")]
        source = ConcatSource(parts)
        assert source.size == 8195
        assert bytes(source.read_at(4000, 4195)) == DATA[4000:8192] + b"xyz"
        assert [p.requests for p in parts] == [[(4000, 96)], [(0, 4096)], [(0, 3)]]
        assert source.name == "silent + silent + silent"

    def test_peeks_only_where_all_parts_can(self) -> None:
        source = ConcatSource([MemorySource(b"abc"), SilentSource(b"def"), MemorySource(b"ghi")])
        assert source.peek(0, 3) == b"abc"
        assert source.peek(6, 3) == b"ghi"
        assert source.peek(2, 2) is None
        assert source.peek(0, 9) is None

    def test_of_nothing(self) -> None:
        source = ConcatSource([])
        assert source.size == 0
        assert bytes(source.read_at(0, 0)) == b""
        with pytest.raises(TruncatedRead):
            source.read_at(0, 1)

    def test_closes_what_it_owns(self) -> None:
        parts = [SilentSource(b"abc"), SilentSource(b"def")]
        ConcatSource(parts).close()
        assert all(part.closed for part in parts)

    def test_an_image_and_its_device_as_one(self) -> None:
        """A flat image: the device's blocks follow at the address where its slot maps them."""
        want = golden("tar-index")
        with pyerofs.open(want.image, devices=want.devices) as image:
            mapped = image.superblock.devices[0].uniaddr * image.superblock.block_size
        head = want.image.read_bytes()
        parts: list[Source] = [
            MemorySource(head),
            MemorySource(bytes(mapped - len(head))),
            FileSource(want.devices[0]),
        ]
        with pyerofs.open(ConcatSource(parts)) as image:
            assert differences(want, entries_of(image)) == []


class TestOpening:
    def test_what_stands_for_what(self, path: Path) -> None:
        assert isinstance(open_source(str(path)), FileSource)
        assert isinstance(open_source(path), FileSource)
        assert isinstance(open_source(io.BytesIO(DATA)), FileObjectSource)
        memory = MemorySource(DATA)
        assert open_source(memory) is memory

    def test_several(self, path: Path) -> None:
        first, second = open_sources(path, 100, [io.BytesIO(b"abc")])
        assert isinstance(first, SliceSource)
        assert first.size == 9900
        assert second.size == 3

    def test_none_stays_open_when_one_fails(self, tmp_path: Path) -> None:
        inner, device = SilentSource(DATA), SilentSource(DATA)
        with pytest.raises(SourceError, match="absent"):
            open_sources(inner, 10, [device, tmp_path / "absent"])
        assert inner.closed
        assert device.closed
        inner = SilentSource(DATA)
        with pytest.raises(SourceError, match="outside"):
            open_sources(inner, 10_001, [])
        assert inner.closed

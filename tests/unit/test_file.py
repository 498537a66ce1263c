"""Files in an image are like any other read-only binary file, and decode no more than they must."""

from __future__ import annotations

import io
import os
import random
import shutil
import threading
from collections.abc import Iterator

import pytest

import pyerofs
from pyerofs import Image
from pyerofs.format.model import ENCODED, FRAGMENT
from pyerofs.sources import MemorySource
from tests.helpers import every_image, open_golden, primary
from tests.manifests import Manifest, golden

# files of all kinds: flat with a tail, chunks, holes, pclusters, fragments, inline pclusters
FILES = [
    ("plain", "text"),
    ("chunk-indexes", "sparse"),
    ("zstd", "text"),
    ("lzma-C64k", "size-65537"),
    ("dedupe-frag-zstd", "mixed"),
    ("ztail-lz4", "mixed"),
    ("extents-ztail", "sparse"),
    ("lz4hc-legacy-C32k", "size-65537"),
]
each_kind = pytest.mark.parametrize(("name", "path"), FILES)


@pytest.fixture(name="image")
def open_zstd() -> Iterator[Image]:
    with open_golden(golden("zstd")) as image:
        yield image


@pytest.fixture(name="file")
def open_text(image: Image) -> Iterator[io.BufferedReader]:
    with image.open("text") as file:
        yield file


@pytest.fixture(name="reference")
def read_text(image: Image) -> io.BytesIO:
    return io.BytesIO(image.read("text"))


class TestLikeAnyFile:
    def test_what_it_can_do(self, file: io.BufferedReader) -> None:
        assert isinstance(file, io.BufferedReader)
        assert file.readable()
        assert file.seekable()
        assert not file.writable()
        assert not file.isatty()
        with pytest.raises(io.UnsupportedOperation):
            file.fileno()
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")
        with pytest.raises(io.UnsupportedOperation):
            file.truncate()

    @pytest.mark.parametrize(
        ("offset", "whence"),
        [
            (0, os.SEEK_SET),
            (40000, os.SEEK_SET),
            (40425, os.SEEK_SET),
            (1 << 40, os.SEEK_SET),
            (-1, os.SEEK_END),
            (-40425, os.SEEK_END),
            (7, os.SEEK_END),
            (90, os.SEEK_CUR),
            (-10, os.SEEK_CUR),
        ],
    )
    def test_seek_and_tell(
        self, file: io.BufferedReader, reference: io.BytesIO, offset: int, whence: int
    ) -> None:
        for f in (file, reference):
            f.seek(1000)
            f.read(10)
        assert file.seek(offset, whence) == reference.seek(offset, whence)
        assert file.tell() == reference.tell()
        assert file.read(100) == reference.read(100)
        assert file.tell() == reference.tell()

    @pytest.mark.parametrize(
        ("offset", "whence"), [(-1, os.SEEK_SET), (-40426, os.SEEK_END), (-1, os.SEEK_CUR), (0, 17)]
    )
    def test_seeking_to_nowhere(self, file: io.BufferedReader, offset: int, whence: int) -> None:
        with pytest.raises(ValueError):
            file.seek(offset, whence)
        with pytest.raises(ValueError):
            file.raw.seek(offset, whence)
        assert file.tell() == file.raw.tell() == 0

    def test_past_the_end(self, file: io.BufferedReader) -> None:
        file.seek(40420)
        assert len(file.read(100)) == 5
        assert file.read(100) == file.read() == file.readline() == b""
        file.seek(50000)
        assert file.read() == b""
        assert file.readinto(bytearray(5)) == 0

    def test_readinto(self, file: io.BufferedReader, reference: io.BytesIO) -> None:
        for size in (0, 1, 4096, 5000, 100_000):
            got, expected = bytearray(size), bytearray(size)
            assert file.readinto(got) == reference.readinto(expected)
            assert got == expected
        file.seek(10)
        raw = memoryview(bytearray(20))
        assert file.raw.readinto(raw[5:10]) == 5
        assert bytes(raw[:5]) == bytes(5)

    def test_lines(self, file: io.BufferedReader, reference: io.BytesIO) -> None:
        assert file.readline() == reference.readline()
        assert file.readline(3) == reference.readline(3)
        assert list(file) == list(reference)
        file.seek(0)
        assert file.readlines() == reference.getvalue().splitlines(keepends=True)

    def test_as_text(self, file: io.BufferedReader, reference: io.BytesIO) -> None:
        with io.TextIOWrapper(file, "ascii") as text:
            assert text.read() == reference.getvalue().decode("ascii")

    def test_peek_and_read1(self, file: io.BufferedReader, reference: io.BytesIO) -> None:
        assert reference.getvalue().startswith(file.peek(10))
        got = b"".join(iter(lambda: file.read1(1000), b""))
        assert got == reference.getvalue()

    def test_copying(self, file: io.BufferedReader, reference: io.BytesIO) -> None:
        copy = io.BytesIO()
        shutil.copyfileobj(file, copy, 10_000)
        assert copy.getvalue() == reference.getvalue()

    def test_closed(self, file: io.BufferedReader) -> None:
        file.close()
        assert file.closed
        with pytest.raises(ValueError, match="closed"):
            file.read()

    def test_several_at_once(self, image: Image) -> None:
        with image.open("text") as one, image.open("text") as other:
            one.seek(100)
            assert other.tell() == 0
            assert one.read(10) == other.read(110)[100:]

    def test_empty(self, image: Image) -> None:
        with image.open("size-0") as file:
            assert file.read() == file.read(10) == b""
            assert file.seek(0, os.SEEK_END) == 0


@each_kind
def test_random_reads(name: str, path: str) -> None:
    choose = random.Random(name)
    with (
        open_golden(golden(name)) as image,
        image.open(path) as buffered,
        image.open(path) as unbuffered,
    ):
        reference = io.BytesIO(image.read(path))
        size = len(reference.getvalue())
        for _ in range(300):
            offset = choose.randrange(size + 100)
            length = choose.choice([0, 1, 7, 512, 4096, 10_000, size])
            reference.seek(offset)
            buffered.seek(offset)
            unbuffered.raw.seek(offset, os.SEEK_SET)
            expected = reference.read(length)
            assert buffered.read(length) == expected
            assert unbuffered.raw.read(length) == expected


@every_image
@pytest.mark.parametrize("path", ["text", "size-65537", "sparse"])
def test_small_reads_decode_each_pcluster_once(want: Manifest, path: str) -> None:
    if path not in want.entries:
        pytest.skip("not in this image")
    with open_golden(want) as image:
        inode = image.lookup(path)
        extents = list(image.extents(inode))
        if any(e.kind == FRAGMENT for e in extents):
            holder = image.extents(image.inode(image.superblock.packed_nid))
            extents += [e for e in holder if e.kind == ENCODED]
        encoded = {e.address for e in extents if e.kind == ENCODED}
        before = image.volume.memory.decodes
        with image.open(inode) as file:
            while file.raw.read(100):
                pass
        decoded = image.volume.memory.decodes - before
        assert decoded <= len(encoded)
        assert bool(decoded) == bool(encoded)


def test_small_reads_of_everything_decode_each_pcluster_once() -> None:
    with open_golden(golden("frag-zstd")) as image:
        packed = image.inode(image.superblock.packed_nid)
        extents = list(image.extents(packed))
        files = [e.inode for _, _, others in image.walk() for e in others if e.is_file()]
        for inode in files:
            extents += image.extents(inode)
            with image.open(inode) as file:
                while file.raw.read(100):
                    pass
        encoded = {e.address for e in extents if e.kind == ENCODED}
        assert image.volume.memory.decodes == len(encoded)


def test_a_cache_too_small_costs_time_but_no_bytes() -> None:
    with open_golden(golden("lzma")) as image:
        expected = image.read("size-65537")
    with open_golden(golden("lzma"), cache_size=1000) as image, image.open("size-65537") as file:
        assert b"".join(iter(lambda: file.raw.read(1000), b"")) == expected
        assert image.volume.memory.decodes > 5
        assert image.volume.memory.pclusters.used <= 1000


@each_kind
@pytest.mark.parametrize("cache_size", [1000, 64 << 20])
def test_threads(name: str, path: str, cache_size: int) -> None:
    """Eight threads read randomly from one image: the right bytes, whatever the others do."""
    with open_golden(golden(name)) as image:
        reference = {p: image.read(p) for p in (path, "dup-a", "text")}
    wrong: list[str] = []

    def read(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(60):
            which = choose.choice(list(reference))
            expected = reference[which]
            offset = choose.randrange(len(expected))
            length = choose.randrange(20_000)
            if image.read(which, offset, length) != expected[offset : offset + length]:
                wrong.append(f"{which}: {length} bytes at {offset}")

    with open_golden(golden(name), cache_size=cache_size) as image:
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_failed_read_leaves_the_file_where_it_was() -> None:
    want = golden("zstd")
    with open_golden(want) as image:
        second = list(image.extents("text"))[1]
        expected = image.read("text", 0, second.start)
    data = bytearray(primary(want))
    data[second.address : second.address + second.size] = bytes(second.size)
    with pyerofs.open(MemorySource(data)) as image, image.open("text") as file:
        assert file.raw.read(second.start) == expected
        with pytest.raises(pyerofs.CorruptImage, match="only zeros") as found:
            file.raw.read(10)
        assert found.value.offset == second.address
        assert found.value.nid == image.lookup("text").nid
        assert file.raw.tell() == second.start
        file.seek(0)
        assert file.raw.read(100) == expected[:100]

"""Android sparse images are read in place: the same as what they stand for, and bounded by what they
are, whatever their headers claim."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import pyerofs
from pyerofs import aio
from pyerofs.errors import ErofsError, SourceError
from pyerofs.sources import Source
from pyerofs.sources.open import open_sources
from tests import handmade as hm
from tests.cli.conftest import Done, Run
from tests.helpers import entries_of, words
from tests.hostile import bounded
from tests.manifests import golden

MAGIC = 0xED26FF3A
RAW, FILL, DONT_CARE, CRC32 = 0xCAC1, 0xCAC2, 0xCAC3, 0xCAC4
HEADER = struct.Struct("<I4H4I")
CHUNK = struct.Struct("<2H2I")
BLOCK = 4096

repeatable = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=150,
    suppress_health_check=list(HealthCheck),
)


# --- an encoder -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """A chunk of so many blocks; ``data`` is what it has in the file."""

    kind: int
    blocks: int
    data: bytes = b""

    def flat(self, block: int) -> bytes:
        """The bytes that it stands for."""
        if self.kind == RAW:
            return self.data
        if self.kind == FILL:
            return self.data * (self.blocks * block // 4)
        return bytes(self.blocks * block)


def encoded(
    chunks: Sequence[Chunk],
    block: int = BLOCK,
    *,
    header_size: int = HEADER.size,
    chunk_size: int = CHUNK.size,
    checksum: int = 0,
    minor: int = 0,
) -> bytes:
    """A sparse image of chunks."""
    blocks = sum(chunk.blocks for chunk in chunks)
    found = [
        HEADER.pack(
            MAGIC, 1, minor, header_size, chunk_size, block, blocks, len(chunks), checksum
        ).ljust(header_size, b"\xaa")
    ]
    for chunk in chunks:
        record = CHUNK.pack(chunk.kind, 0, chunk.blocks, chunk_size + len(chunk.data))
        found += [record.ljust(chunk_size, b"\xbb"), chunk.data]
    return b"".join(found)


def decoded(chunks: Sequence[Chunk], block: int = BLOCK) -> bytes:
    """What they stand for."""
    return b"".join(chunk.flat(block) for chunk in chunks)


def chunked(data: bytes, block: int = BLOCK, *, crc: bool = False, most: int = 3) -> list[Chunk]:
    """Chunks that stand for data, and zeros up to a whole block: each kind where it will do; RAW
    chunks have ``most`` blocks at most."""
    data += bytes(-len(data) % block)
    found: list[Chunk] = []
    for at in range(0, len(data), block):
        piece = data[at : at + block]
        last = found[-1] if found else Chunk(CRC32, 0)
        if piece == piece[:4] * (block // 4):
            kind, content = (FILL, piece[:4]) if any(piece) else (DONT_CARE, b"")
            if last.kind == kind and last.data == content:
                found[-1] = Chunk(kind, last.blocks + 1, content)
                continue
            found.append(Chunk(kind, 1, content))
        elif last.kind == RAW and last.blocks < most:
            found[-1] = Chunk(RAW, last.blocks + 1, last.data + piece)
        else:
            found.append(Chunk(RAW, 1, piece))
        if crc and at // block % 5 == 4 and found[-1].kind == RAW:
            sum_so_far = zlib.crc32(data[: at + block])
            found.append(Chunk(CRC32, 0, struct.pack("<I", sum_so_far)))
    return found


def sparse(data: bytes, block: int = BLOCK) -> bytes:
    """Data as a sparse image."""
    return encoded(chunked(data, block), block)


def image_with_all_kinds() -> bytes:
    """An image with data that makes chunks of each kind."""
    block = 100
    data = hm.noise(3 * BLOCK) + b"fill" * (2 * BLOCK // 4) + bytes(4 * BLOCK) + hm.noise(BLOCK)
    pieces = hm.build(
        {b"data": hm.plain(len(data), block, extended=True), b"name": hm.inline(b"value")},
        {block: data},
    )
    flat = hm.Sparse(pieces)
    return bytes(flat.read_at(0, flat.size))


ALL_KINDS = image_with_all_kinds()


def save(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def opened(path: Path, offset: int = 0) -> Source:
    """The source that a path leads to: the bytes behind an image."""
    (source,) = open_sources(str(path), offset, ())
    return source


# --- the same as the raw image ----------------------------------------------------------------


def test_the_encoder_uses_each_kind() -> None:
    kinds = {chunk.kind for chunk in chunked(ALL_KINDS, crc=True)}
    assert kinds == {RAW, FILL, DONT_CARE, CRC32}
    assert decoded(chunked(ALL_KINDS, crc=True)) == ALL_KINDS


@pytest.mark.parametrize(
    "command",
    [["info"], ["info", "--json"], ["ls", "-lR"], ["tree"], ["cat", "text", "noise"],
     ["stat", "-x", "text", "many"], ["check", "-q"], ["dump"], ["tar"]],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("name", ["plain", "zstd", "chunk4k"])
def test_commands_show_the_same(run: Run, tmp_path: Path, name: str, command: list[str]) -> None:
    want = golden(name)
    path = save(tmp_path / "it", sparse(want.image.read_bytes()))
    verb, *rest = command
    expected = run(verb, want.image, *rest)
    assert expected.status == 0
    assert run(verb, path, *rest) == expected


def test_it_is_extracted_the_same(run: Run, tmp_path: Path) -> None:
    path = save(tmp_path / "it", sparse(ALL_KINDS))
    assert run("extract", path, "-C", tmp_path / "out") == Done(0, b"", "")
    assert (tmp_path / "out" / "name").read_bytes() == b"value"
    with pyerofs.open(save(tmp_path / "flat", ALL_KINDS)) as image:
        assert (tmp_path / "out" / "data").read_bytes() == image.read("data")


@pytest.mark.parametrize("inos", [1, 5000], ids=["threads", "processes"])
def test_workers_read_it_too(run: Run, tmp_path: Path, inos: int) -> None:
    files = {b"%03d" % i: hm.inline(hm.text(2000, seed=i)) for i in range(300)}
    pieces = hm.build(files, inos=inos, block_bits=14)
    flat = bytes(hm.Sparse(pieces).read_at(0, hm.end_of(pieces)))
    path = save(tmp_path / "it", sparse(flat))
    assert run("extract", "-q", path, "-C", tmp_path / "out") == Done(0, b"", "")
    for i in range(300):
        assert (tmp_path / "out" / f"{i:03}").read_bytes() == hm.text(2000, seed=i)
    assert run("check", "-q", path).status == 0


@pytest.mark.parametrize("block", [4, 512, 1024, 4096, 65536, 1 << 20])
def test_any_block_size(tmp_path: Path, block: int) -> None:
    data = sparse(ALL_KINDS, block)
    with pyerofs.open(save(tmp_path / "it", data)) as image:
        assert image.read("name") == b"value"
        assert image.read("data")[3 * BLOCK : 3 * BLOCK + 8] == b"fillfill"


@pytest.mark.parametrize("crc", [False, True], ids=["", "checksums"])
@pytest.mark.parametrize(
    ("header_size", "chunk_size"), [(28, 12), (32, 12), (28, 16), (100, 64), (65535, 65535)]
)
def test_larger_headers(tmp_path: Path, header_size: int, chunk_size: int, crc: bool) -> None:
    chunks = chunked(ALL_KINDS, crc=crc)
    data = encoded(chunks, header_size=header_size, chunk_size=chunk_size, minor=1)
    with pyerofs.open(save(tmp_path / "it", data)) as image:
        assert image.read("name") == b"value"
        assert image.read("data")[3 * BLOCK : 3 * BLOCK + 8] == b"fillfill"


def test_a_checksum_of_the_whole(tmp_path: Path) -> None:
    """In the header, where hardly anybody writes one."""
    data = encoded(chunked(ALL_KINDS), checksum=zlib.crc32(ALL_KINDS))
    with pyerofs.open(save(tmp_path / "it", data)) as image:
        assert image.read("name") == b"value"


def test_chunks_of_one_block_each(tmp_path: Path) -> None:
    """As many as there can be: images that are cut at block boundaries of EROFS and others."""
    data = encoded(chunked(ALL_KINDS, 512, most=1), 512)
    with pyerofs.open(save(tmp_path / "it", data)) as image:
        assert image.read("data")[:100] == hm.noise(100)


@pytest.mark.parametrize("block", [512, 4096, 65536])
def test_an_offset_counts_in_what_it_stands_for(run: Run, tmp_path: Path, block: int) -> None:
    want = golden("offset")
    data = want.image.read_bytes()
    path = save(tmp_path / "it", sparse(data, block))
    arguments = ["--offset", str(want.offset)]
    for verb in ("ls", "check", "info"):
        expected = run(verb, want.image, *arguments)
        done = run(verb, path, *arguments)
        assert (done.status, done.err) == (0, "")
        if block == BLOCK or verb != "info":
            assert done == expected
    with pyerofs.open(path, offset=want.offset) as image:
        assert image.listdir()
    done = run("ls", path, "--offset", 1 << 40)
    assert (done.status, done.out) == (1, b"")
    assert done.err.count("\n") == 1


def test_extra_devices_may_be_sparse(run: Run, tmp_path: Path) -> None:
    want = golden("blobdev")
    expected = run("check", *words(want))
    device = save(tmp_path / "device", sparse(want.devices[0].read_bytes()))
    primary = save(tmp_path / "primary", sparse(want.image.read_bytes()))
    for image, extra in [
        (want.image, device), (primary, want.devices[0]), (primary, device),
    ]:  # fmt: skip
        assert run("check", image, "--device", extra) == expected
        assert len(run("cat", image, "text", "--device", extra).out) == want.entries["text"]["size"]
    with (
        pyerofs.open(primary, devices=[device]) as opened_image,
        pyerofs.open(want.image, devices=want.devices) as plain,
    ):
        assert entries_of(opened_image) == entries_of(plain)


def test_it_is_opened_by_name_path_and_file(tmp_path: Path) -> None:
    path = save(tmp_path / "it", sparse(ALL_KINDS))
    for what in (path, str(path), io.BytesIO(sparse(ALL_KINDS))):
        with pyerofs.open(what) as image:
            assert image.read("name") == b"value"
    with path.open("rb") as file, pyerofs.open(file) as image:
        assert image.read("name") == b"value"


def test_it_is_opened_by_trio_s_api(tmp_path: Path) -> None:
    path = save(tmp_path / "it", sparse(ALL_KINDS))

    async def read() -> bytes:
        async with aio.open(path) as image:
            return await image.read("data")

    with pyerofs.open(save(tmp_path / "flat", ALL_KINDS)) as image:
        assert trio.run(read) == image.read("data")


def test_the_file_s_own_bytes_are_nobody_s_business(tmp_path: Path) -> None:
    """Whoever sends a file's bytes on by its descriptor must not send these."""
    source = opened(save(tmp_path / "it", sparse(ALL_KINDS)))
    assert source.size == len(ALL_KINDS)
    if source.backing is not None:
        fd, offset = source.backing
        assert os.pread(fd, source.size, offset) == ALL_KINDS
    source.close()
    with pytest.raises((ErofsError, ValueError)):
        source.read_at(0, source.size)


def test_ranges_beyond_the_end_are_refused(tmp_path: Path) -> None:
    source = opened(save(tmp_path / "it", sparse(ALL_KINDS)))
    size = source.size
    for offset, length in [(size, 1), (size - 1, 2), (0, size + 1), (-1, 1), (1 << 70, 1)]:
        assert source.peek(offset, length) is None
        with pytest.raises(SourceError):
            source.read_at(offset, length)
    assert bytes(source.read_at(size, 0)) == b""
    source.close()


def test_many_threads_read_it_at_once(tmp_path: Path) -> None:
    source = opened(save(tmp_path / "it", encoded(chunked(ALL_KINDS, 512), 512)))
    chance = random.Random(1)
    ranges = [(chance.randrange(len(ALL_KINDS)), chance.randrange(5000)) for _ in range(2000)]

    def right(where: tuple[int, int]) -> bool:
        offset, length = where
        length = min(length, len(ALL_KINDS) - offset)
        return bytes(source.read_at(offset, length)) == ALL_KINDS[offset : offset + length]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, ranges))
    source.close()


def test_in_a_tar_of_a_sparse_image_is_what_is_in_it(run: Run, tmp_path: Path) -> None:
    path = save(tmp_path / "it", sparse(ALL_KINDS))
    assert run("tar", path, "-o", tmp_path / "out.tar") == Done(0, b"", "")
    with tarfile.open(tmp_path / "out.tar") as archive:
        member = archive.extractfile("./data")
        assert member is not None
        assert member.read(BLOCK) == hm.noise(3 * BLOCK)[:BLOCK]


# --- any chunks -------------------------------------------------------------------------------


@st.composite
def any_chunks(draw: st.DrawFn) -> tuple[list[Chunk], int]:
    """Chunks of all kinds, and the size of their blocks."""
    block = draw(st.sampled_from([4, 8, 12, 512, 1000, 4096]))
    found: list[Chunk] = []
    for number in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from([RAW, FILL, DONT_CARE, CRC32]))
        blocks = draw(st.integers(1, 5))
        if kind == RAW:
            found.append(Chunk(RAW, blocks, hm.noise(blocks * block, seed=number)))
        elif kind == FILL:
            found.append(Chunk(FILL, blocks, draw(st.binary(min_size=4, max_size=4))))
        elif kind == DONT_CARE:
            found.append(Chunk(DONT_CARE, blocks))
        else:
            sum_so_far = zlib.crc32(decoded(found, block))
            found.append(Chunk(CRC32, 0, struct.pack("<I", sum_so_far)))
    return found, block


@repeatable
@given(
    any_chunks(),
    st.sampled_from([(28, 12), (40, 20)]),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=12),
    st.booleans(),
)
@example(([Chunk(FILL, 3, b"abcd")], 4), (28, 12), [(0.1, 1.0), (0.5, 0.7)], False)
def test_any_range_of_any_chunks_is_what_they_stand_for(
    what: tuple[list[Chunk], int],
    sizes: tuple[int, int],
    ranges: list[tuple[float, float]],
    sliced: bool,
) -> None:
    chunks, block = what
    flat = decoded(chunks, block)
    if not flat:
        return
    data = encoded(chunks, block, header_size=sizes[0], chunk_size=sizes[1])
    with tempfile.TemporaryDirectory() as directory:
        path = save(Path(directory) / "it", data)
        start = len(flat) // 3 if sliced else 0
        source = opened(path, start)
        flat = flat[start:]
        assert source.size == len(flat)
        assert bytes(source.read_at(0, len(flat))) == flat
        for first, last in ranges:
            offset, end = sorted((int(first * len(flat)), int(last * len(flat))))
            assert bytes(source.read_at(offset, end - offset)) == flat[offset:end]
            peeked = source.peek(offset, end - offset)
            assert peeked is None or bytes(peeked) == flat[offset:end]
        source.close()


# --- what makes no sense ----------------------------------------------------------------------

GOOD = chunked(ALL_KINDS, crc=True)
GOOD_IMAGE = encoded(GOOD)
LAST = 2**32 - 1


def header(**changes: int) -> bytes:
    """The header of a sound image with some fields changed."""
    names = ["magic", "major", "minor", "header", "chunk"]
    names += ["block", "blocks", "chunks", "checksum"]
    values = dict(zip(names, HEADER.unpack_from(GOOD_IMAGE), strict=True))
    assert changes.keys() <= values.keys()
    return HEADER.pack(*(values | changes).values()) + GOOD_IMAGE[HEADER.size :]


def records() -> list[int]:
    """Where each chunk's header lies in the sound image."""
    found, at = [], HEADER.size
    for chunk in GOOD:
        found.append(at)
        at += CHUNK.size + len(chunk.data)
    return found


def chunk_changed(wanted: int, **changes: int) -> bytes:
    """A sound image in which the header of the first chunk of a kind is changed; blocks that it
    gains or loses are counted in the image's header."""
    index = [chunk.kind for chunk in GOOD].index(wanted)
    at = records()[index]
    names = ["kind", "reserved", "blocks", "size"]
    values = dict(zip(names, CHUNK.unpack_from(GOOD_IMAGE, at), strict=True))
    gained = changes.get("blocks", values["blocks"]) - values["blocks"]
    record = CHUNK.pack(*(values | changes).values())
    blocks = len(ALL_KINDS) // BLOCK + gained
    image = header(blocks=blocks) if 0 <= blocks <= LAST else GOOD_IMAGE
    return image[:at] + record + image[at + CHUNK.size :]


WRONG: dict[str, Callable[[], bytes]] = {
    "another major version": lambda: header(major=2),
    "no version": lambda: header(major=0),
    "a header of no bytes": lambda: header(header=0),
    "a header that is too short": lambda: header(header=27),
    "a header beyond the end": lambda: header(header=65535)[:5000],
    "chunk headers of no bytes": lambda: header(chunk=0),
    "chunk headers that are too short": lambda: header(chunk=11),
    "chunk headers that are too long": lambda: header(chunk=13),
    "blocks of no bytes": lambda: header(block=0),
    "blocks of three bytes": lambda: header(block=3),
    "blocks of 4098 bytes": lambda: header(block=4098),
    "blocks of 4 GiB": lambda: header(block=LAST - 3),
    "blocks of 4 GiB less one": lambda: header(block=LAST),
    "no blocks": lambda: header(blocks=0),
    "a block too few": lambda: header(blocks=len(ALL_KINDS) // BLOCK - 1),
    "a block too many": lambda: header(blocks=len(ALL_KINDS) // BLOCK + 1),
    "as many blocks as can be": lambda: header(blocks=LAST),
    "no chunks": lambda: header(chunks=0),
    "a chunk too few": lambda: header(chunks=len(GOOD) - 1 - (GOOD[-1].kind == CRC32)),
    "a chunk too many": lambda: header(chunks=len(GOOD) + 1),
    "as many chunks as can be": lambda: header(chunks=LAST),
    "as many of all as can be": lambda: header(chunks=LAST, blocks=LAST, block=LAST - 3),
    "a kind that is none": lambda: chunk_changed(RAW, kind=0xCAC5),
    "a kind of zero": lambda: chunk_changed(RAW, kind=0),
    "raw data called a hole": lambda: chunk_changed(RAW, kind=DONT_CARE),
    "raw data called a pattern": lambda: chunk_changed(RAW, kind=FILL),
    "a pattern called raw data": lambda: chunk_changed(FILL, kind=RAW),
    "a hole called a pattern": lambda: chunk_changed(DONT_CARE, kind=FILL),
    "raw data of a block more": lambda: chunk_changed(RAW, blocks=GOOD[0].blocks + 1),
    "raw data of a block less": lambda: chunk_changed(RAW, blocks=GOOD[0].blocks - 1),
    "raw data of no bytes": lambda: chunk_changed(RAW, size=12),
    "raw data of a byte more": lambda: chunk_changed(RAW, size=12 + len(GOOD[0].data) + 1),
    "raw data of a byte less": lambda: chunk_changed(RAW, size=12 + len(GOOD[0].data) - 1),
    "a chunk of less than its header": lambda: chunk_changed(RAW, size=11),
    "a chunk of nothing": lambda: chunk_changed(DONT_CARE, size=0),
    "raw data of 4 GiB": lambda: chunk_changed(RAW, size=LAST),
    "a pattern of three bytes": lambda: chunk_changed(FILL, size=15),
    "a pattern of eight bytes": lambda: chunk_changed(FILL, size=20),
    "a pattern of none": lambda: chunk_changed(FILL, size=12),
    "a hole with something in it": lambda: chunk_changed(DONT_CARE, size=16),
    "a checksum of no bytes": lambda: chunk_changed(CRC32, size=12),
    "a checksum of eight bytes": lambda: chunk_changed(CRC32, size=20),
    "a hole of as many blocks as can be": lambda: chunk_changed(DONT_CARE, blocks=LAST),
    "a pattern of as many blocks as can be": lambda: chunk_changed(FILL, blocks=LAST),
    "cut in the header": lambda: GOOD_IMAGE[:27],
    "cut behind the magic number": lambda: GOOD_IMAGE[:4],
    "cut behind the header": lambda: GOOD_IMAGE[:28],
    "cut in a chunk's header": lambda: GOOD_IMAGE[:33],
    "cut in raw data": lambda: GOOD_IMAGE[:2000],
    "cut in the last chunk": lambda: GOOD_IMAGE[:-1],
    "cut before the last chunk": lambda: GOOD_IMAGE[: records()[-1]],
}
assert GOOD[0].kind == RAW


@pytest.mark.parametrize("wrong", WRONG)
def test_what_contradicts_itself_is_refused(run: Run, tmp_path: Path, wrong: str) -> None:
    path = save(tmp_path / "it", WRONG[wrong]())
    for verb in ("info", "check"):
        done = run(verb, path)
        assert (done.status, done.out) == (1, b"")
        assert done.err.count("\n") == 1
        assert done.err.startswith(f"pyerofs: {path}: ")
        assert "sparse" in done.err.replace(str(tmp_path), "")
    with pytest.raises(SourceError):
        pyerofs.open(path)
    with pytest.raises(SourceError):
        pyerofs.open(golden("blobdev").image, devices=[path])


@pytest.mark.parametrize(
    "claims",
    [
        {"chunks": LAST},
        {"chunks": LAST, "blocks": LAST, "block": 1 << 20},
        {"blocks": LAST},
        {"block": LAST - 3, "blocks": LAST},
    ],
    ids=str,
)
def test_what_is_claimed_takes_no_memory(tmp_path: Path, claims: dict[str, int]) -> None:
    done = bounded(tmp_path, "info", save(tmp_path / "it", header(**claims)))
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert done.seconds < 5
    assert done.memory < 100 << 20


def test_many_chunks_that_are_not_there_take_no_memory(tmp_path: Path) -> None:
    """A file of zeros behind the header, as large as all the chunks would be, but sparse itself."""
    path = save(tmp_path / "it", header(chunks=LAST)[: HEADER.size])
    os.truncate(path, 12 * LAST)
    done = bounded(tmp_path, "info", path)
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert done.seconds < 5


@pytest.mark.parametrize("kind", [FILL, DONT_CARE], ids=["patterns", "holes"])
def test_many_chunks_take_little_memory(tmp_path: Path, kind: int) -> None:
    """Patterns, or holes, of one block each behind the image."""
    count = 200_000
    content = b"abcd" if kind == FILL else b""
    data = encoded([*chunked(ALL_KINDS), *[Chunk(kind, 1, content)] * count])
    done = bounded(tmp_path, "cat", save(tmp_path / "it", data), "name")
    assert (done.status, done.out, done.err) == (0, b"value", "")
    assert done.memory < 120 << 20


@pytest.mark.parametrize("kind", [FILL, DONT_CARE], ids=["patterns", "holes"])
@pytest.mark.parametrize("command", ["info", "ls", "check", "tar", "dump", "dump as JSON"])
def test_a_small_file_that_stands_for_terabytes(tmp_path: Path, command: str, kind: int) -> None:
    """16 TiB of nothing, or of a pattern, are none that anybody has to look at."""
    blocks = LAST - len(ALL_KINDS) // BLOCK
    content = b"abcd" if kind == FILL else b""
    data = encoded([*chunked(ALL_KINDS), Chunk(kind, blocks, content)])
    path = save(tmp_path / "it", data)
    rest = {"dump as JSON": ["dump", path, "--json"], "tar": ["tar", path, "-o", os.devnull]}
    done = bounded(tmp_path, *rest.get(command, [command, path]))
    assert (done.status, done.err) == (0, "")
    assert done.seconds < 10
    if command == "dump as JSON":
        assert json.loads(done.out)[-1]["end"] == LAST * BLOCK


def test_one_pattern_of_terabytes_is_read_where_it_is_wanted(tmp_path: Path) -> None:
    source = opened(save(tmp_path / "it", encoded([Chunk(FILL, LAST, b"abcd")])))
    assert source.size == LAST * BLOCK
    assert bytes(source.read_at(source.size - 7, 7)) == b"bcdabcd"
    assert bytes(source.read_at(source.size // 2 + 1, 5)) == b"bcdab"
    source.close()


@pytest.mark.parametrize("levels", [2, 3, 50])
def test_a_sparse_image_of_a_sparse_image(run: Run, tmp_path: Path, levels: int) -> None:
    """Nobody makes one; it is an image, or it is refused, but nothing overflows."""
    data = ALL_KINDS
    for _ in range(levels):
        data = sparse(data)
    done = run("ls", save(tmp_path / "it", data))
    assert done.status in (0, 1)
    assert done.err.count("\n") == done.status


def test_a_file_that_is_cut_while_it_is_open(tmp_path: Path) -> None:
    path = save(tmp_path / "it", GOOD_IMAGE)
    source = opened(path)
    os.truncate(path, 100)
    with pytest.raises(SourceError):
        source.read_at(0, source.size)
    source.close()


# --- mutations --------------------------------------------------------------------------------

SMALL_CHUNKS = chunked(ALL_KINDS[: 20 * BLOCK], crc=True)
SMALL = encoded(SMALL_CHUNKS)
FIELDS = [*range(0, HEADER.size, 2)]  # where headers lie
_at = HEADER.size
for _chunk in SMALL_CHUNKS:
    FIELDS += range(_at, _at + CHUNK.size, 2)
    _at += CHUNK.size + len(_chunk.data)
VALUES = [
    0,
    1,
    2,
    3,
    4,
    11,
    12,
    13,
    16,
    27,
    28,
    29,
    0x7FFF,
    0x8000,
    0xFFFC,
    0xFFFF,
    *range(RAW, 0xCAC6),
]


@settings(repeatable, max_examples=400)
@given(
    st.lists(st.tuples(st.sampled_from(FIELDS), st.sampled_from(VALUES)), min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(0, len(SMALL))),
)
def test_whatever_its_headers_say_it_is_read_or_refused(
    patches: list[tuple[int, int]], cut: int | None
) -> None:
    data = bytearray(SMALL)
    for at, value in patches:
        struct.pack_into("<H", data, at, value)
    with tempfile.TemporaryDirectory() as directory:
        path = save(Path(directory) / "it", bytes(data[:cut]))
        with suppress(ErofsError), closing(opened(path)) as source:
            for offset in (0, source.size // 2, max(source.size - 5000, 0)):
                length = min(5000, source.size - offset)
                assert len(source.read_at(offset, length)) == length
        with suppress(ErofsError), pyerofs.open(path) as image:
            image.listdir()
            image.read("name")


@settings(repeatable, max_examples=200)
@given(st.binary(max_size=200))
def test_anything_behind_the_magic_number_is_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = save(Path(directory) / "it", struct.pack("<I", MAGIC) + data)
        with pytest.raises(ErofsError):
            pyerofs.open(path)

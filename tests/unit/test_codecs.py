"""The decoders: exact bytes or DecodeError, and never more memory than the format allows."""

from __future__ import annotations

import lzma
import random
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lz4.block
import pytest
import zstandard

import pyerofs
from pyerofs.format import codecs
from pyerofs.format.codecs import DecodeError, decode
from pyerofs.format.memory import BlockingMemory, Pcluster
from pyerofs.format.ondisk import (
    ALG_DEFLATE,
    ALG_INTERLACED,
    ALG_LZ4,
    ALG_LZMA,
    ALG_ZSTD,
    PCLUSTER_MAX_DSIZE,
)
from pyerofs.sources import MemorySource
from tests import handmade as hm

BLOCK = 4096


def pack_lz4(data: bytes) -> bytes:
    return lz4.block.compress(data, mode="high_compression", store_size=False)  # type: ignore[no-any-return]


def pack_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def pack_zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=9).compress(data)


def pack_zstd_of_unknown_size(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=9, write_content_size=False).compress(data)


def pack_lzma(data: bytes, lc: int = 3, lp: int = 0, pb: int = 2) -> bytes:
    """MicroLZMA: the first byte, always 0, makes way for the properties."""
    spec = {"id": lzma.FILTER_LZMA1, "lc": lc, "lp": lp, "pb": pb, "dict_size": 1 << 20}
    raw = lzma.compress(data, lzma.FORMAT_RAW, filters=[spec])
    assert raw[0] == 0
    return bytes([~((pb * 5 + lp) * 9 + lc) & 0xFF]) + raw[1:]


PACKERS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "lz4": (ALG_LZ4, pack_lz4),
    "lzma": (ALG_LZMA, pack_lzma),
    "deflate": (ALG_DEFLATE, pack_deflate),
    "zstd": (ALG_ZSTD, pack_zstd),
    "zstd of unknown size": (ALG_ZSTD, pack_zstd_of_unknown_size),
}
every_packer = pytest.mark.parametrize("name", PACKERS)
# those that check the length themselves; for LZ4 the memory does
exact = pytest.mark.parametrize("name", [name for name in PACKERS if name != "lz4"])

SAMPLES = {
    "text": hm.text(40_000),
    "one byte": b"x",
    "zeros": bytes(30_000),
    "zeros first": bytes(5000) + hm.text(5000),
    "noise": hm.noise(3000),
    "noise, then text": hm.noise(5000) + hm.text(20_000),
    "a megabyte": hm.text(1 << 20),
    "short repeats": b"ab" * 9000 + b"c",
}


def padded(stream: bytes) -> bytes:
    """Aligned to the end of its blocks, as EROFS has it."""
    return bytes(-len(stream) % BLOCK) + stream


# --- the bytes --------------------------------------------------------------------------------


@every_packer
@pytest.mark.parametrize("sample", SAMPLES)
def test_round_trip(name: str, sample: str) -> None:
    algorithm, pack = PACKERS[name]
    data = SAMPLES[sample]
    stream = pack(data)
    for encoded in (stream, padded(stream), bytearray(padded(stream)), memoryview(padded(stream))):
        assert decode(algorithm, encoded, len(data), False) == data


@every_packer
@pytest.mark.parametrize("length", [1, 4095, 4096, 39_999, 40_000])
def test_a_partial_reference_wants_the_first_bytes(name: str, length: int) -> None:
    algorithm, pack = PACKERS[name]
    data = SAMPLES["text"]
    found = decode(algorithm, padded(pack(data)), length, True)
    assert found[:length] == data[:length]
    assert len(found) >= length
    assert data.startswith(found)


@pytest.mark.parametrize(
    ("lc", "lp", "pb"), [(3, 0, 2), (0, 0, 0), (0, 2, 0), (4, 0, 4), (1, 3, 1)]
)
def test_lzma_properties(lc: int, lp: int, pb: int) -> None:
    data = SAMPLES["text"]
    assert decode(ALG_LZMA, padded(pack_lzma(data, lc, lp, pb)), len(data), False) == data


@pytest.mark.parametrize("first", [0xFF ^ 225, 0xFF ^ (8 + 9), 1])
def test_bad_lzma_properties(first: int) -> None:
    with pytest.raises(DecodeError, match="properties"):
        decode(ALG_LZMA, bytes([first]) + pack_lzma(b"x" * 100)[1:], 100, False)


def test_deflate_without_isal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "_inflater", None)
    monkeypatch.setitem(sys.modules, "isal", None)
    data = SAMPLES["text"]
    assert decode(ALG_DEFLATE, padded(pack_deflate(data)), len(data), False) == data
    with pytest.raises(DecodeError, match="deflate"):
        decode(ALG_DEFLATE, b"\xff" * 100, 100, False)
    assert codecs._inflater is not None
    assert codecs._inflater[1] is zlib.error
    monkeypatch.setattr(codecs, "_inflater", None)


# --- LZ4 without zero padding -----------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("rubbish", [b"", b"\0" * 500, b"\xff" * 500, hm.noise(500)])
def test_lz4_left_aligned(sample: str, rubbish: bytes) -> None:
    data = SAMPLES[sample]
    encoded = pack_lz4(data) + rubbish
    assert decode(ALG_LZ4, encoded, len(data), False, zero_padded=False) == data


@pytest.mark.parametrize("sample", ["text", "zeros", "short repeats", "noise, then text"])
def test_lz4_left_aligned_in_part(sample: str) -> None:
    data = SAMPLES[sample]
    encoded = pack_lz4(data) + hm.noise(100)
    choose = random.Random(sample)
    for length in (
        1,
        2,
        15,
        16,
        17,
        255,
        4096,
        len(data) - 1,
        *choose.sample(range(len(data)), 50),
    ):
        wanted = max(length, 1)
        found = decode(ALG_LZ4, encoded, wanted, True, zero_padded=False)
        assert found == data[:wanted]


@pytest.mark.parametrize("cut", [0, 1, 5, 100])
def test_lz4_left_aligned_and_cut_off(cut: int) -> None:
    data = hm.noise(2000)
    with pytest.raises(DecodeError, match="lz4"):
        decode(ALG_LZ4, pack_lz4(data)[:cut], len(data), False, zero_padded=False)


def test_lz4_left_aligned_with_a_match_at_no_distance() -> None:
    with pytest.raises(DecodeError, match="distance 0"):
        decode(ALG_LZ4, b"\x10x\0\0" + bytes(50), 20, False, zero_padded=False)


@pytest.mark.parametrize("sample", ["text", "zeros", "short repeats", "noise, then text"])
def test_lz4_stops_early_or_not(sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library behind python-lz4, or without."""
    data = SAMPLES[sample]
    encoded = padded(pack_lz4(data))
    lengths = (1, 2, 15, 16, 17, 4095, len(data) // 2, len(data) - 1, len(data))
    early = [decode(ALG_LZ4, encoded, length, True) for length in lengths]
    assert early == [data[:length] for length in lengths]
    monkeypatch.setattr(codecs, "_native_lz4", lambda: None)
    late = [decode(ALG_LZ4, encoded, length, True) for length in lengths]
    assert late == [data] * len(lengths)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("native", [True, False])
def test_lz4_by_either_library(sample: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the stream lies: only its own bytes are looked at, the same ones are made of it."""
    if not native:
        monkeypatch.setattr(codecs, "_native_lz4", lambda: None)
    data = SAMPLES[sample]
    stream = padded(pack_lz4(data))
    between = b"\xff" * 9 + stream + b"\xff" * 9
    for encoded in (
        stream,
        bytearray(stream),
        memoryview(between)[9:-9],
        memoryview(bytearray(between))[9:-9],
    ):
        for partial in (False, True):
            assert decode(ALG_LZ4, encoded, len(data), partial) == data
        some = len(data) // 2 + 1
        assert decode(ALG_LZ4, encoded, some, True)[:some] == data[:some]
        for wrong in (len(data) - 1, len(data) // 2):
            with pytest.raises(DecodeError, match="lz4"):
                decode(ALG_LZ4, encoded, wrong, False)


def lz4_run(length: int) -> tuple[int, bytes]:
    """The part of a length that a token holds, and the bytes that hold the rest."""
    if length < 15:
        return length, b""
    return 15, b"\xff" * ((length - 15) // 255) + bytes([(length - 15) % 255])


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("literals", [1, 15, 300])
@pytest.mark.parametrize("match", [4, 7, 8, 19, 33, 1000, 50_000])
def test_lz4_never_shows_what_was_in_memory(literals: int, match: int, partial: bool) -> None:
    """A match at distance 0 copies from where it writes, and is not refused."""
    (high, more), (low, still_more) = lz4_run(literals), lz4_run(match - 4)
    head = bytes([high << 4 | low]) + more + b"L" * literals + b"\0\0" + still_more
    stream = head + b"\xc0" + b"T" * 12
    size = literals + match + 12
    for length in range(1, size + 1, max(size // 20, 1)) if partial else [size]:
        secrets = [bytearray(b"S" * length) for _ in range(20)]
        del secrets
        found = decode(ALG_LZ4, stream, length, partial)
        assert len(found) == length
        assert b"S" not in found


# --- stored, rotated --------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1, 100, 4095])
@pytest.mark.parametrize("length", [1, 99, 100, 101, 4000, 4096])
def test_interlaced(shift: int, length: int) -> None:
    """Each byte keeps the place in its block that its logical offset asks for."""
    logical = BLOCK - shift  # where the extent starts within the block
    data = hm.noise(length)
    block = bytearray(BLOCK)
    for i, byte in enumerate(data):
        block[(logical + i) % BLOCK] = byte
    assert decode(ALG_INTERLACED, block, length, False, shift=shift % BLOCK or BLOCK) == data


def test_interlaced_longer_than_its_blocks() -> None:
    with pytest.raises(DecodeError, match="longer than its blocks"):
        decode(ALG_INTERLACED, bytes(BLOCK), BLOCK + 1, False, shift=5)


# --- what is not a stream ---------------------------------------------------------------------


@exact
@pytest.mark.parametrize("length", [40_001, 41_000, 200_000])
@pytest.mark.parametrize("partial", [False, True])
def test_less_than_promised(name: str, length: int, partial: bool) -> None:
    algorithm, pack = PACKERS[name]
    with pytest.raises(DecodeError):
        decode(algorithm, padded(pack(SAMPLES["text"])), length, partial)


@pytest.mark.parametrize("partial", [False, True])
def test_less_than_promised_by_lz4(partial: bool) -> None:
    stream = padded(pack_lz4(SAMPLES["text"]))
    memory = BlockingMemory([MemorySource(stream)])
    with pytest.raises(pyerofs.CorruptImage, match="40000 bytes instead of 40001") as error:
        memory.decoded(Pcluster(0, 0, len(stream), ALG_LZ4, 0, 40_001, partial, 77))
    assert (error.value.offset, error.value.nid) == (0, 77)


def test_more_than_promised_by_lz4() -> None:
    with pytest.raises(DecodeError):
        decode(ALG_LZ4, padded(pack_lz4(SAMPLES["text"])), 39_999, False)


@every_packer
def test_only_zeros(name: str) -> None:
    for encoded in (bytes(BLOCK), b""):
        with pytest.raises(DecodeError, match="only zeros"):
            decode(PACKERS[name][0], encoded, 100, False)


@every_packer
@pytest.mark.parametrize("partial", [False, True])
def test_cut_off(name: str, partial: bool) -> None:
    algorithm, pack = PACKERS[name]
    stream = pack(hm.noise(5000))
    for end in (1, 2, 4, 5, 100, 2500):
        with pytest.raises(DecodeError):
            decode(algorithm, stream[:end], 5000, partial)


@pytest.mark.parametrize("algorithm", [ALG_LZ4, ALG_LZMA, ALG_DEFLATE, ALG_ZSTD])
@pytest.mark.parametrize("partial", [False, True])
def test_garbage(algorithm: int, partial: bool) -> None:
    """Any bytes give DecodeError or, by chance, bytes: no other exception and no crash."""
    refused = 0
    for seed in range(150):
        data = hm.noise(1 + 37 * seed % 3000, seed)
        for zero_padded in (True, False):
            try:
                found = decode(algorithm, data, 5000, partial, zero_padded=zero_padded)
            except DecodeError:
                refused += 1
            else:
                assert len(found) <= PCLUSTER_MAX_DSIZE
    assert refused > 100


@every_packer
def test_damaged_streams(name: str) -> None:
    algorithm, pack = PACKERS[name]
    stream = pack(SAMPLES["text"])
    choose = random.Random(name)
    for _ in range(200):
        damaged = bytearray(stream)
        damaged[choose.randrange(len(damaged))] ^= 1 << choose.randrange(8)
        try:
            found = decode(algorithm, damaged, 40_000, choose.random() < 0.5)
        except DecodeError:
            continue
        assert len(found) <= PCLUSTER_MAX_DSIZE


@pytest.mark.parametrize("algorithm", [4, 6, 15])
def test_unknown_algorithm(algorithm: int) -> None:
    with pytest.raises(pyerofs.UnsupportedFeature, match=f"algorithm {algorithm}"):
        decode(algorithm, b"x", 1, False)


# --- bombs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lz4", "deflate", "lzma"])
def test_the_first_look_decodes_no_more_than_it_needs(name: str) -> None:
    """And the second all of it, lest the beginning be decoded over and over."""
    algorithm, pack = PACKERS[name]
    data = SAMPLES["text"]
    stream = padded(pack(data))
    memory = BlockingMemory([MemorySource(stream)])
    pcluster = Pcluster(0, 0, len(stream), algorithm, 0, len(data), False, 77)
    first = memory.enough(pcluster, 5000)
    assert memory.decoded(first) == data[:5000]
    assert memory.decoded(first) == data[:5000]
    assert memory.decodes == 1
    assert memory.first(pcluster, 4000)[:4000] == data[:4000]
    assert memory.enough(pcluster, 4000).length == 4000
    assert memory.decodes == 1
    assert memory.enough(pcluster, 6000) == pcluster
    assert memory.decoded(pcluster) == data
    assert memory.decoded(first) == data
    assert memory.decodes == 2


def test_zstd_has_no_use_for_less() -> None:
    stream = padded(pack_zstd(SAMPLES["text"]))
    pcluster = Pcluster(0, 0, len(stream), ALG_ZSTD, 0, len(SAMPLES["text"]), False, 77)
    assert BlockingMemory([MemorySource(stream)]).enough(pcluster, 5000) == pcluster


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Fail where the block takes more than ``limit`` bytes of memory at a time."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit


@pytest.mark.parametrize("name", ["lz4", "deflate", "zstd", "lzma", "zstd of unknown size"])
def test_bombs_give_what_was_asked_for(name: str) -> None:
    algorithm, pack = PACKERS[name]
    bomb = pack(bytes(40 << 20))
    with at_most(1 << 20):
        assert decode(algorithm, bomb, 5000, True) == bytes(5000)


def test_an_lz4_bomb_is_refused_where_decoding_can_not_stop_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bomb = pack_lz4(bytes(40 << 20))
    assert len(decode(ALG_LZ4, bomb, 5000, True)) == 5000
    monkeypatch.setattr(codecs, "_native_lz4", lambda: None)
    with at_most(2 * PCLUSTER_MAX_DSIZE), pytest.raises(DecodeError):
        decode(ALG_LZ4, bomb, 5000, True)
    with at_most(2 * PCLUSTER_MAX_DSIZE), pytest.raises(DecodeError, match="match too long"):
        decode(ALG_LZ4, bomb, 5000, True, zero_padded=False)


def test_an_lz4_length_that_never_ends() -> None:
    """A match of gigabytes, in a stream that is walked and not decoded."""
    bomb = b"\x1fx\x01\x00" + b"\xff" * (1 << 20) + b"\0"
    with at_most(8 << 20), pytest.raises(DecodeError, match="match too long"):
        decode(ALG_LZ4, bomb, 5000, True, zero_padded=False)


@pytest.mark.parametrize("partial", [False, True])
def test_a_zstd_frame_that_claims_too_much(partial: bool) -> None:
    """A single-segment frame that says 1 TiB: nothing that large may be allocated for it."""
    frame = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\0\0"
    with at_most(2 << 20), pytest.raises(DecodeError):
        decode(ALG_ZSTD, frame, 5000, partial)


@pytest.mark.parametrize("partial", [False, True])
def test_a_zstd_frame_with_a_huge_window(partial: bool) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = stream.compress(hm.text(50_000)) + stream.flush()
    with at_most(2 << 20), pytest.raises(DecodeError, match=r"zstd: .*(memory|window)"):
        decode(ALG_ZSTD, frame, 5000, partial)


def test_more_than_a_pcluster_may_hold_is_not_tried() -> None:
    memory = BlockingMemory([MemorySource(bytes(4096))])
    for size, length in ((4096, PCLUSTER_MAX_DSIZE + 1), ((1 << 20) + 1, 4096)):
        with pytest.raises(pyerofs.CorruptImage, match=f"{size} bytes for {length}"):
            memory.decode(Pcluster(0, 0, size, ALG_LZ4, 0, length, False, 1), bytes(10))


# --- threads ----------------------------------------------------------------------------------


@every_packer
def test_in_many_threads(name: str) -> None:
    algorithm, pack = PACKERS[name]
    samples = [hm.text(20_000, seed) for seed in range(8)]
    wrong = [0] * 8

    def work(seed: int) -> None:
        encoded = padded(pack(samples[seed]))
        wrong[seed] = sum(
            decode(algorithm, encoded, 20_000, False) != samples[seed] for _ in range(30)
        )

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0] * 8

"""Decode one pcluster: bytes in, bytes out, one function per algorithm.

Each function takes the encoded bytes (zero padding included), the decoded length that the extent
promises, and ``partial``: whether the pcluster may decode to more than that (a deduplicated extent
may refer to its first bytes only).  Each returns at least ``length`` bytes and never more than
PCLUSTER_MAX_DSIZE, so that a decompression bomb costs no more than the largest legal pcluster.  All
codecs release the GIL.

Codec libraries are imported on first use, because start-up time counts at every mount.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyerofs.errors import UnsupportedFeature
from pyerofs.format.ondisk import (
    ALG_DEFLATE,
    ALG_INTERLACED,
    ALG_LZ4,
    ALG_LZMA,
    ALG_ZSTD,
    PCLUSTER_MAX_DSIZE,
)
from pyerofs.sources.base import Buffer

LZMA_MAX_DICT_SIZE = 8 << 20  # the kernel's limit
ZSTD_MAX_WINDOW_LOG = 23  # 8 MiB: bounds the memory of a streaming decoder

STOP_EARLY = {ALG_LZ4, ALG_LZMA, ALG_DEFLATE}  # decoders that stop after ``length`` bytes
PADDING = 4096  # bytes searched for the end of the padding before the whole pcluster is


class DecodeError(Exception):
    """The bytes are not a valid stream of the algorithm; the caller adds their location."""


def unpadded(data: Buffer) -> memoryview:
    """The stream without the leading zeros, which align it to the end of its block."""
    view = memoryview(data)
    if view and view[0]:
        return view
    for size in (PADDING, len(view)):  # padding is shorter than a block unless corrupt
        head = bytes(view[:size])
        zeros = len(head) - len(head.lstrip(b"\0"))
        if zeros < len(head):
            return view[zeros:]
    raise DecodeError("only zeros")


def lz4(data: Buffer, length: int, partial: bool) -> Buffer:
    """LZ4 block, right-aligned (LZ4_0PADDING)."""
    stream = unpadded(data)
    if (native := _native_lz4()) is not None:
        return native(data, len(stream), length, partial)
    from lz4.block import LZ4BlockError, decompress

    # one byte of LZ4 can expand to at most 255
    room = min(255 * len(stream), PCLUSTER_MAX_DSIZE) if partial else length
    try:
        return decompress(stream, uncompressed_size=max(room, length))  # type: ignore[no-any-return]
    except LZ4BlockError as e:
        raise DecodeError(f"lz4: {e}") from None


@functools.cache
def _native_lz4() -> Callable[[Buffer, int, int, bool], Buffer] | None:
    """The decoder that python-lz4 contains, called with ctypes; None if it is not available.

    python-lz4 does not expose the function that stops early, and copies what it has decoded, which
    takes a quarter of the time."""
    import ctypes as c

    from lz4.block import _block

    try:
        library, python = c.CDLL(_block.__file__), c.PyDLL(None)
        whole, first = library.LZ4_decompress_safe, library.LZ4_decompress_safe_partial
        new, address_of_bytes = python.PyBytes_FromStringAndSize, python.PyBytes_AsString
    except (OSError, AttributeError):
        return None
    whole.argtypes = (c.c_void_p, c.c_void_p, c.c_int, c.c_int)
    first.argtypes = (c.c_void_p, c.c_void_p, c.c_int, c.c_int, c.c_int)
    new.argtypes, new.restype = (c.c_void_p, c.c_ssize_t), c.py_object
    address_of_bytes.argtypes, address_of_bytes.restype = (c.py_object,), c.c_void_p
    address, at = c.addressof, c.c_char.from_buffer

    def decode(data: Buffer, size: int, length: int, partial: bool) -> Buffer:
        """Decode the last ``size`` bytes of ``data`` to exactly ``length`` bytes."""
        if isinstance(data, memoryview) and data.readonly:
            data = bytes(data)
        start = address_of_bytes(data) if isinstance(data, bytes) else address(at(data))
        start += len(data) - size
        out: Buffer
        if partial:
            # of zeros: here a match at distance 0 copies what was in the buffer before
            out = bytearray(length)
            # src, dst, srcSize, targetOutputSize, dstCapacity
            n = first(start, address(at(out)), size, length, length)
        else:
            out = new(None, length)  # not initialised; no other code has it yet
            n = whole(start, out, size, length)  # src, dst, compressedSize, dstCapacity
        if n != length:
            raise DecodeError(f"lz4: {n} bytes instead of {length}" if n >= 0 else "lz4: corrupt")
        return out

    return decode


def lz4_unpadded(data: Buffer, length: int, partial: bool) -> bytes:
    """LZ4 block, left-aligned and followed by garbage (images before LZ4_0PADDING).

    python-lz4 needs the exact end of a stream.  So the sequences are scanned until they produce
    ``length`` bytes; the stream is cut there and terminated with literals."""
    from lz4.block import LZ4BlockError, decompress

    stream, produced = lz4_head(bytes(data), length)
    try:
        out: bytes = decompress(stream, uncompressed_size=produced)
    except LZ4BlockError as e:
        raise DecodeError(f"lz4: {e}") from None
    return _exactly(out[:length], length, "lz4")


def lz4_head(data: bytes, length: int) -> tuple[bytes, int]:
    """Cut an LZ4 block after the sequences that produce its first ``length`` bytes.

    Returns a valid block and its decoded size, which is larger than ``length``, because the codec
    requires literals after the last match of a block.  Raises DecodeError."""
    pos = out = 0
    try:
        while True:
            start = pos
            token = data[pos]
            literals, pos = _lz4_run(data, pos + 1, token >> 4)
            if out + literals >= length:
                keep = length - out
                if pos + keep > len(data):
                    raise DecodeError("lz4: ends too early")
                last = data[pos : pos + keep] + _LZ4_TAIL
                return data[:start] + _lz4_literals(last), length + len(_LZ4_TAIL)
            pos += literals
            if data[pos] | data[pos + 1] << 8 == 0:
                raise DecodeError("lz4: match at distance 0")
            match, pos = _lz4_run(data, pos + 2, token & 15)
            out += literals + match + 4
            if out >= length:
                break
    except IndexError:
        raise DecodeError("lz4: ends too early") from None
    if out > 2 * PCLUSTER_MAX_DSIZE:
        raise DecodeError("lz4: match too long")
    return data[:pos] + _lz4_literals(_LZ4_TAIL), out + len(_LZ4_TAIL)


_LZ4_TAIL = bytes(16)


def _lz4_run(data: bytes, pos: int, nibble: int) -> tuple[int, int]:
    """Decode a length that starts in a token's nibble; returns it and the position after it."""
    if nibble == 15:
        while True:
            more = data[pos]
            pos += 1
            nibble += more
            if more != 255:
                break
    return nibble, pos


def _lz4_literals(data: bytes) -> bytes:
    """An LZ4 sequence of literals only."""
    n = len(data)
    if n < 15:
        return bytes([n << 4]) + data
    full, rest = divmod(n - 15, 255)
    return b"\xf0" + b"\xff" * full + bytes([rest]) + data


def lzma(data: Buffer, length: int, partial: bool, dict_size: int) -> bytes:
    """MicroLZMA: raw LZMA1 whose first byte (always zero) holds the inverted lc/lp/pb byte."""
    import lzma as xz

    stream = unpadded(data)
    properties = stream[0] ^ 0xFF
    if properties > (4 * 5 + 4) * 9 + 8:
        raise DecodeError("lzma: bad properties")
    lclp, pb = properties % 45, properties // 45
    lc, lp = lclp % 9, lclp // 9
    if lc + lp > 4:
        raise DecodeError("lzma: bad properties")
    spec = {
        "id": xz.FILTER_LZMA1,
        "lc": lc,
        "lp": lp,
        "pb": pb,
        # no match reaches back further than the output's start
        "dict_size": max(4096, min(dict_size, length)),
    }
    try:
        out = xz.LZMADecompressor(xz.FORMAT_RAW, filters=[spec]).decompress(
            b"\0" + stream[1:], max_length=length
        )
    except (xz.LZMAError, EOFError) as e:
        raise DecodeError(f"lzma: {e}") from None
    return _exactly(out, length, "lzma")


def deflate(data: Buffer, length: int, partial: bool) -> bytes:
    """Raw DEFLATE.  isal is about 1.7 times as fast as zlib and used where it is installed."""
    global _inflater
    if _inflater is None:
        _inflater = _find_inflater()
    decompressobj, error = _inflater
    inflater = decompressobj(-15)
    try:
        out: bytes = inflater.decompress(unpadded(data), length)
    except error as e:
        raise DecodeError(f"deflate: {e}") from None
    return _exactly(out, length, "deflate")


_inflater: tuple[Callable[[int], Any], Any] | None = None  # decompressobj and its error


def _find_inflater() -> tuple[Callable[[int], Any], Any]:
    try:
        from isal import isal_zlib
    except ImportError:
        import zlib

        return zlib.decompressobj, zlib.error
    return isal_zlib.decompressobj, isal_zlib.error


_local = threading.local()  # a ZstdDecompressor must not be used by two threads at once


def zstd(data: Buffer, length: int, partial: bool) -> bytes:
    """One Zstandard frame."""
    import zstandard

    stream = unpadded(data)
    try:
        decompressor = _local.zstd
    except AttributeError:
        decompressor = _local.zstd = zstandard.ZstdDecompressor(
            max_window_size=1 << ZSTD_MAX_WINDOW_LOG
        )
    try:
        if not partial:
            # decompress() allocates the size that the frame header states: check it first
            size = zstandard.frame_content_size(stream)
            if size in (-1, length):
                out = decompressor.decompress(stream, max_output_size=length)
                return _exactly(out, length, "zstd")
            if size > PCLUSTER_MAX_DSIZE:
                raise DecodeError(f"zstd: frame claims {size} bytes")
        out = decompressor.stream_reader(stream).read(length)
    except zstandard.ZstdError as e:
        raise DecodeError(f"zstd: {e}") from None
    return _exactly(out, length, "zstd")


def interlaced(data: Buffer, length: int, shift: int) -> bytes:
    """Stored bytes, rotated so that each keeps its position within a block.

    ``shift``: how many bytes at the end of ``data`` are the first ones of the result."""
    data = bytes(data)
    if length > len(data) or shift > len(data):
        raise DecodeError("interlaced: longer than its blocks")
    first = min(shift, length)
    at = len(data) - shift
    return data[at : at + first] + data[: length - first]


def _exactly(out: bytes, length: int, name: str) -> bytes:
    if len(out) != length:
        raise DecodeError(f"{name}: {len(out)} bytes instead of {length}")
    return out


def decode(
    algorithm: int,
    data: Buffer,
    length: int,
    partial: bool,
    *,
    zero_padded: bool = True,
    lzma_dict_size: int = LZMA_MAX_DICT_SIZE,
    shift: int = 0,
) -> Buffer:
    """Decode one pcluster; CPU-bound, releases the GIL, safe in any thread.  Raises DecodeError."""
    if algorithm == ALG_LZ4:
        return (lz4 if zero_padded else lz4_unpadded)(data, length, partial)
    if algorithm == ALG_ZSTD:
        return zstd(data, length, partial)
    if algorithm == ALG_LZMA:
        return lzma(data, length, partial, lzma_dict_size)
    if algorithm == ALG_DEFLATE:
        return deflate(data, length, partial)
    if algorithm == ALG_INTERLACED:
        return interlaced(data, length, shift)
    raise UnsupportedFeature(f"compression algorithm {algorithm}")


@dataclass(frozen=True, slots=True)
class Decoder:
    """``decode`` with the codec parameters of one image's superblock."""

    zero_padded: bool = True
    lzma_dict_size: int = LZMA_MAX_DICT_SIZE

    def __call__(
        self, algorithm: int, data: Buffer, length: int, partial: bool, shift: int
    ) -> Buffer:
        return decode(
            algorithm, data, length, partial,
            zero_padded=self.zero_padded, lzma_dict_size=self.lzma_dict_size, shift=shift,
        )  # fmt: skip

"""What does the library add to the codecs, and what do its small calls cost?

Reads a whole file with ``Image.read``, and decodes the same pclusters with the bare codec, one after
another in one thread, everything in memory: the ratio is what all else costs.  Then cached reads,
look-ups, stat and listings.
"""

from __future__ import annotations

import lzma as xz
import os
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lz4.block
import zstandard
from common import Report, options, parse, per_call, say, timed
from images import CODECS, Images
from mounting import warm

import pyerofs
from pyerofs.format import ondisk, tree
from pyerofs.format.model import ENCODED

try:
    from isal import isal_zlib as zlib
except ImportError:
    import zlib  # type: ignore[no-redef]

PYEROFS, CODEC = SYSTEMS = ("pyerofs", "codec alone")
WHOLE, PIECES = "whole file at once", "whole file, 1 MiB each"
PIECE = 1 << 20

Decode = Callable[[], Any]


def decoders(image: pyerofs.Image, fd: int) -> Iterator[Decode]:
    """A call of the bare codec for each pcluster of /big, its input in memory and unpadded; for what
    is stored as it is, a pread from the image."""
    for extent in image.extents("/big"):
        if extent.kind == ENCODED and extent.algorithm != ondisk.ALG_INTERLACED:
            data = os.pread(fd, extent.size, extent.address)
            yield decoder(extent.algorithm, data.lstrip(b"\0"), extent.length)
        else:
            for skip in range(0, extent.length, PIECE):
                n = min(PIECE, extent.length - skip)
                yield partial(os.pread, fd, n, extent.address + skip)


def decoder(algorithm: int, data: bytes, length: int) -> Decode:
    """A call of the bare codec."""
    if algorithm == ondisk.ALG_LZ4:
        return lambda: lz4.block.decompress(data, uncompressed_size=length)
    if algorithm == ondisk.ALG_ZSTD:
        return lambda: _zstd.decompress(data, max_output_size=length)
    if algorithm == ondisk.ALG_DEFLATE:
        return lambda: zlib.decompressobj(-15).decompress(data, length)
    lclp, pb = (data[0] ^ 0xFF) % 45, (data[0] ^ 0xFF) // 45
    spec = {"id": xz.FILTER_LZMA1, "lc": lclp % 9, "lp": lclp // 9, "pb": pb, "dict_size": 8 << 20}
    stream = b"\0" + data[1:]
    return lambda: xz.LZMADecompressor(xz.FORMAT_RAW, filters=[spec]).decompress(stream, length)


_zstd = zstandard.ZstdDecompressor()


def whole_file(report: Report, name: str, path: Path) -> None:
    """A whole file at once and in pieces, with Image and with the bare codec."""
    warm(path)

    def add(what: str, system: str, work: Callable[[], object]) -> None:
        report.add(name, what, "MB/s", system, size / timed(work) / 1e6)

    with pyerofs.open(path) as image, path.open("rb") as raw:
        size = image.stat("/big").st_size
        calls = list(decoders(image, raw.fileno()))
        if sum(len(call()) for call in calls) != size:
            raise SystemExit(f"{name}: the bare codec gives another size")
        add(WHOLE, CODEC, lambda: b"".join([call() for call in calls]))
        add(PIECES, CODEC, lambda: deque((call() for call in calls), maxlen=0))
    calls.clear()
    with pyerofs.open(path) as image:  # anew: with nothing in its cache
        add(WHOLE, PYEROFS, lambda: image.read("/big"))
    with pyerofs.open(path) as image, image.open("/big") as file:
        add(PIECES, PYEROFS, lambda: deque(iter(lambda: file.read(PIECE), b""), maxlen=0))


def cached_reads(report: Report, name: str, path: Path) -> None:
    """Pages of a pcluster that is in the cache."""
    with pyerofs.open(path) as image:
        inode = image.lookup("/big")
        us = per_call(lambda: image.read(inode, 8192, 4096))
        report.add(name, "read of 4 KiB, cached", "us", PYEROFS, us)


def metadata(report: Report, name: str, path: Path) -> None:
    """Look-ups, stat and listings, with all they need in the cache."""
    with pyerofs.open(path) as image:
        deepest, largest, count = "", "", 0
        for where, directories, others in image.walk():
            if others and where.count("/") > deepest.count("/"):
                deepest = others[-1].path
            if len(directories) + len(others) > count:
                largest, count = where, len(directories) + len(others)
        depth = deepest.count("/")
        parent = image.lookup(largest)
        names = image.listdir(parent)
        middle = names[len(names) // 3].encode("utf-8", "surrogateescape")
        inode = image.lookup(deepest, follow_symlinks=False)
        calls: dict[str, tuple[Callable[[], object], int]] = {
            "search in the largest directory": (
                lambda: tree.lookup(image.volume, parent, middle),
                1,
            ),
            "lookup of a known path, per component": (
                lambda: image.lookup(deepest, follow_symlinks=False),
                depth,
            ),
            "stat of an inode": (lambda: image.stat(inode), 1),
            "listdir, per entry": (lambda: image.listdir(parent), count),
            "scandir + stat, per entry": (lambda: [e.stat() for e in image.scandir(parent)], count),
        }
        for what, (call, times) in calls.items():
            report.add(name, what, "us", PYEROFS, per_call(call) / times)


def main() -> None:
    """Measure, report."""
    args = parse(options(__doc__))
    report = Report("library", "The library", SYSTEMS, (CODEC,))
    report.note("codec alone: the same pclusters, input in memory; for 'none', bare preads")
    images = Images(args, report)
    bigs = images.all("big", ("lz4hc", "none") if args.quick else CODECS)
    trees = images.all("tree", ("none",) if args.quick else CODECS)
    for number in range(args.rounds):
        say(f"round {number + 1} of {args.rounds}")
        for name, path in bigs.items():
            whole_file(report, name, path)
            cached_reads(report, name, path)
        for name, path in trees.items():
            metadata(report, name, path)
    report.finish(args)


if __name__ == "__main__":
    main()

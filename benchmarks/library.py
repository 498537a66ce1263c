"""What does the library add to the codecs, and what do its small calls cost?

Reads a whole file with ``Image.read``, and decodes the same pclusters with the bare codec, one after
another in one thread, everything in memory: the ratio is what all else costs.  Then cached reads,
look-ups, stat and listings.
"""

from __future__ import annotations

import lzma as xz
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lz4.block
import zstandard
from common import Report, options, parse, per_call, say, timed
from images import CODECS, Images
from mounting import warm

import pyerofs
from pyerofs import ondisk, tree
from pyerofs.model import ENCODED

try:
    from isal import isal_zlib as zlib
except ImportError:
    import zlib  # type: ignore[no-redef]

PYEROFS, CODEC = SYSTEMS = ("pyerofs", "codec alone")
PIECE = 1 << 20

Decode = Callable[[], Any]


def decoders(image: pyerofs.Image, path: str) -> Iterator[Decode]:
    """A call of the bare codec for each pcluster of a file, its input in memory and unpadded; for
    what is not compressed, a copy."""
    inode = image.lookup(path)
    for extent in image.extents(inode):
        if extent.kind == ENCODED and extent.algorithm != ondisk.ALG_INTERLACED:
            data = bytes(image.volume.memory.raw(extent.device, extent.address, extent.size))
            yield decoder(extent.algorithm, data.lstrip(b"\0"), extent.length)
        else:
            for skip in range(0, extent.length, PIECE):
                piece = image.read(inode, extent.start + skip, min(PIECE, extent.length - skip))
                yield lambda piece=piece: bytearray(piece)


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
    """Image.read and the bare codec, over the same pclusters."""
    warm(path)
    with pyerofs.open(path) as image:
        calls = list(decoders(image, "/big"))

        def decode() -> None:
            for call in calls:
                call()

        size = image.stat("/big").st_size
        report.add(name, "whole file", "MB/s", CODEC, size / timed(decode) / 1e6)
    calls.clear()
    with pyerofs.open(path) as image:  # anew: with nothing in its cache
        report.add(name, "whole file", "MB/s", PYEROFS, size / timed(image.read, "/big") / 1e6)
    with pyerofs.open(path) as image, image.open("/big") as file:

        def pieces() -> None:
            while file.read(PIECE):
                pass

        report.add(name, "file object, 1 MiB each", "MB/s", PYEROFS, size / timed(pieces) / 1e6)


def cached_reads(report: Report, name: str, path: Path) -> None:
    """Pages of a pcluster that is in the cache."""
    with pyerofs.open(path) as image:
        inode = image.lookup("/big")
        us = per_call(lambda: image.read(inode, 8192, 4096))
        report.add(name, "cached 4 KiB read", "us", PYEROFS, us)


def metadata(report: Report, name: str, path: Path) -> None:
    """Look-ups, stat and listings, with all they need in the cache."""
    with pyerofs.open(path) as image:
        deepest, largest = "", ("", 0)
        for where, directories, others in image.walk():
            if others and where.count("/") > deepest.count("/"):
                deepest = others[-1].path
            largest = max(largest, (where, len(directories) + len(others)), key=lambda d: d[1])
        directory, _, last = deepest.rpartition("/")
        parent, name_of_last = image.lookup(directory), last.encode("utf-8", "surrogateescape")
        inode = image.lookup(deepest, follow_symlinks=False)
        depth = deepest.count("/")

        def add(what: str, us: float) -> None:
            report.add(name, what, "us", PYEROFS, us)

        add("tree.lookup of a name", per_call(lambda: tree.lookup(image.volume, parent, name_of_last)))
        us = per_call(lambda: image.lookup(deepest, follow_symlinks=False))
        add("Image.lookup, per component", us / depth)
        add("Image.stat of an inode", per_call(lambda: image.stat(inode)))
        us = per_call(lambda: image.stat(deepest, follow_symlinks=False))
        add("Image.stat of a path, per component", us / depth)
        add("listdir, per entry", per_call(lambda: image.listdir(largest[0])) / largest[1])
        us = per_call(lambda: [e.stat() for e in image.scandir(largest[0])])
        add("scandir + stat, per entry", us / largest[1])


def main() -> None:
    """Measure, report."""
    args = parse(options(__doc__))
    report = Report("library", "The library", SYSTEMS, (CODEC,))
    report.note("codec alone: the same pclusters, input in memory; for 'none', copies")
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

"""What does it cost when images grow?

Images of a thousand to a million files, a directory of a hundred thousand entries, and a file of up
to 10 GiB, sparse and compressed.  For each: time to mount, to look up random names or to read random
pages, and the daemon's memory.  Everything should stay flat.  Images are made of tar streams in
``--scratch``: nothing but the images, 1 GB in all, ever lies on disk.  Draws growth.svg.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tarfile import USTAR_FORMAT, TarInfo
from typing import Any, BinaryIO

from chart import Chart
from common import Report, options, parse, save, say, timed
from images import CannotMake, make
from mounting import EROFSFUSE, KERNEL, PYEROFS, CannotMount, Mount, commands, walk

SYSTEMS = (KERNEL, EROFSFUSE, PYEROFS)
FILES = (1_000, 10_000, 100_000, 1_000_000)
PER_DIRECTORY = 1000
ENTRIES = 100_000  # of the large directory
SIZES = (1 << 26, 1 << 28, 1 << 30, 10 << 30)  # of the large file
LOOKUPS = 2000
READS = 500
PAGE = 4096
BLOCK = 1 << 20

Add = Callable[[str, str, float], None]  # what, unit, value
Probe = Callable[[Mount, Add], None]


# --- what the images are made of --------------------------------------------------------------


def names(count: int, per_directory: int) -> list[str]:
    """Paths of files in directories of equal size."""
    return [f"d{i // per_directory:04}/f{i:07}" for i in range(count)]


def small_files(paths: Iterable[str], stream: BinaryIO) -> None:
    """A tar stream of files that hold their own names."""
    here = ""
    for path in paths:
        directory = path.partition("/")[0]
        if directory != here:
            here = directory
            info = TarInfo(directory)
            info.type, info.mode = b"5", 0o755
            stream.write(info.tobuf(USTAR_FORMAT))
        data = path.encode()
        stream.write(header(path, len(data)) + data.ljust(512, b"\0"))
    stream.write(bytes(1024))


def large_file(size: int, stream: BinaryIO) -> None:
    """A tar stream of one file that compresses by about fifty, every page of it different."""
    stream.write(header("big", size))
    rng = random.Random(4)
    filler = b"the quick brown fox jumps over the lazy dog, again and again; "
    for _ in range(size // BLOCK):
        block = bytearray(filler * (BLOCK // len(filler) + 1))[:BLOCK]
        for page in range(0, BLOCK, PAGE):
            block[page : page + 48] = rng.randbytes(48)
        stream.write(block)
    stream.write(bytes(1024))


def header(path: str, size: int) -> bytes:
    """A tar header of a regular file."""
    info = TarInfo(path)
    info.size = size
    info.mode = 0o644
    return info.tobuf(USTAR_FORMAT)


def sparse_file(path: Path, size: int) -> None:
    """A file with a page of data in every MiB, and holes otherwise."""
    with path.open("wb") as f:
        f.truncate(size)
        for start in range(0, size, BLOCK):
            f.seek(start)
            f.write(b"data".ljust(PAGE, b"."))

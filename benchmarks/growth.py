"""What does it cost when images grow?

Images of a thousand to a million files, a directory of a hundred thousand entries, and a file of up
to 10 GiB, stored as chunks with holes and compressed.  For each: time to mount, to look up random
names or read random pages, and the daemon's memory.  Ideally all of it stays flat.  The images are
made in ``--scratch``, one at a time, of a tar stream or a sparse file; 1 GB there is enough.
Draws growth.svg.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tarfile import DIRTYPE, USTAR_FORMAT, TarInfo
from typing import Any, BinaryIO

from chart import Series, draw
from common import Report, options, parse, save, say, skip, timed
from images import CannotMake, make
from mounting import EROFSFUSE, KERNEL, PYEROFS, CannotMount, Mount, commands, walk

SYSTEMS = (KERNEL, EROFSFUSE, PYEROFS)
FILES = (1_000, 10_000, 100_000, 1_000_000)
PER_DIRECTORY = 1000
ENTRIES = 100_000  # of the large directory
SIZES = (100 << 20, 1 << 30, 10 << 30)  # of the large file
LOOKUPS = 2000
READS = 500
PAGE = 4096
BLOCK = 1 << 20
DATA = 4  # pages of text at the start of each block of the large file

MOUNT, LOOKUP, WALK, LOAD, MEMORY = (
    ("mount to first ls", "ms"),
    ("look up a random name", "us"),
    ("walk + lstat, per entry", "us"),
    ("read a random page", "us"),
    ("daemon memory", "MiB"),
)

Add = Callable[[tuple[str, str], float], None]
Probe = Callable[[Mount, Add], None]


def paths(count: int, per_directory: int) -> list[str]:
    """Names for files, in directories of equal size."""
    return [f"d{i // per_directory:04}/f{i:07}" for i in range(count)]


def tar_of(names: Iterable[str], stream: BinaryIO) -> None:
    """A tar stream of files that hold their own names."""
    here = ""
    for name in names:
        directory = name.partition("/")[0]
        if directory != here:
            here = directory
            info = TarInfo(directory)
            info.type, info.mode = DIRTYPE, 0o755
            stream.write(info.tobuf(USTAR_FORMAT))
        info = TarInfo(name)
        info.size = len(name)
        stream.write(info.tobuf(USTAR_FORMAT) + name.encode().ljust(512, b"\0"))
    stream.write(bytes(1024))


def write_sparse(path: Path, size: int) -> None:
    """A file with some pages of text in every MiB, and holes otherwise."""
    rng = random.Random(4)
    words = [bytes(rng.choices(b"etaoinshrdlu", k=rng.randrange(2, 10))) for _ in range(64)]
    text = b" ".join(rng.choices(words, k=BLOCK // 4))
    with path.open("wb") as f:
        f.truncate(size)
        for start in range(0, size, BLOCK):
            f.seek(start)
            at = rng.randrange(len(text) - DATA * PAGE)
            f.write(text[at : at + DATA * PAGE])


def names_probe(names: list[str], m: Mount, add: Add) -> None:
    """Look up random names, each once, in directories that are known; then walk."""
    chosen = random.Random(5).sample(names, min(LOOKUPS, len(names)))
    for directory in {os.path.dirname(name) for name in chosen}:
        os.lstat(m.path / directory)
    paths = [str(m.path / name) for name in chosen]

    def look_up() -> None:
        for path in paths:
            os.lstat(path)

    add(LOOKUP, timed(look_up) / len(paths) * 1e6)
    add(WALK, timed(walk, m.path) / len(names) * 1e6)


def pages_probe(size: int, m: Mount, add: Add) -> None:
    """Read random pages of text, each once."""
    pages = size // BLOCK * DATA
    chosen = random.Random(6).sample(range(pages), min(READS, pages))
    places = [page // DATA * BLOCK + page % DATA * PAGE for page in chosen]
    fd = os.open(m.path / "big", os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

        def read() -> None:
            for place in places:
                os.pread(fd, PAGE, place)

        add(LOAD, timed(read) / len(places) * 1e6)
    finally:
        os.close(fd)


def measure(report: Report, args: Any, subject: str, image: Path, probe: Probe) -> None:
    """All systems on one image, in rounds."""
    say(subject)
    systems = commands(report)
    for _ in range(args.rounds):
        systems.append(systems.pop(0))
        for system in systems:

            def add(what: tuple[str, str], value: float, name: str = system.name) -> None:
                report.add(subject, *what, name, value)

            try:
                with Mount(system, image) as m:
                    add(MOUNT, m.first_ls * 1e3)
                    probe(m, add)
                    if used := m.memory():
                        add(MEMORY, used)
            except (CannotMount, OSError) as e:
                report.note(f"{system.name} fails on {subject}: {e}")


def series(report: Report, subjects: dict[float, str], what: tuple[str, str]) -> Series:
    """The medians of a measurement by size."""
    found: Series = {}
    for size, subject in subjects.items():
        for system, samples in report.rows.get((subject, *what), {}).items():
            found.setdefault(system, []).append((size, statistics.median(samples)))
    return {system: found[system] for system in SYSTEMS if system in found}


def grow(report: Report, args: Any, scratch: Path) -> tuple[dict[float, str], dict[float, str]]:
    """Make images and measure them.  Returns the subjects by files and by size.  Raises
    CannotMake."""
    image = scratch / "image.erofs"
    by_files: dict[float, str] = {}
    for count in FILES[:2] if args.quick else FILES:
        by_files[count] = f"{count:,} files"
        names = paths(count, PER_DIRECTORY)
        make(image, [], partial(tar_of, names))
        measure(report, args, by_files[count], image, partial(names_probe, names))
    count = ENTRIES // 10 if args.quick else ENTRIES
    names = paths(count, count)
    make(image, [], partial(tar_of, names))
    subject = f"{count:,} files in one directory"
    measure(report, args, subject, image, partial(names_probe, names))

    by_size: dict[float, str] = {}
    source = scratch / "source"
    source.mkdir()
    for size in SIZES[:1] if args.quick else SIZES:
        write_sparse(source / "big", size)
        subject = f"file of {size >> 20:,} MiB"
        by_size[size] = f"{subject}, lz4"
        for how, words in (("chunks", ["--chunksize=4096"]), ("lz4", ["-zlz4"])):
            make(image, words, source)
            measure(report, args, f"{subject}, {how}", image, partial(pages_probe, size))
    return by_files, by_size


def main() -> None:
    """Measure, report, draw."""
    parser = options(__doc__, rounds=3, images=False)
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="default: as Python's tempfile")
    args = parse(parser)
    report = Report("growth", "Growing images", SYSTEMS, (EROFSFUSE,))
    with tempfile.TemporaryDirectory(prefix="pyerofs-bench-", dir=args.scratch) as scratch:
        try:
            by_files, by_size = grow(report, args, Path(scratch))
        except CannotMake as e:
            skip(str(e))
    report.finish(args)
    panels = [
        (f"{what[0]} ({what[1]})", counts, found)
        for counts, subjects, whats in (
            ("files", by_files, (MOUNT, LOOKUP, WALK, MEMORY)),
            ("bytes in one file (lz4)", by_size, (LOAD, MEMORY)),
        )
        for what in whats
        if (found := series(report, subjects, what))
    ]
    save(args.results, "growth.svg", draw("What it costs when images grow", panels))


if __name__ == "__main__":
    main()

"""How fast is a mounted image?

Compares both engines of pyerofs-fuse with the kernel's driver and with erofsfuse.  Every measurement
has a mount of its own, and all systems take turns in every round.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import Report, options, parse, say, timed
from images import CODECS, QUICK, Images
from mounting import (
    EROFSFUSE,
    SYSTEMS,
    CannotMount,
    Mount,
    System,
    commands,
    names,
    read_files,
    walk,
)

import pyerofs

SAMPLE_SIZE = 256 << 20  # bytes of files that several processes read
SAMPLE_FILES = (64 << 10, 8 << 20)  # from this size up to that
RANDOM_READS = 2000
PAGE = 4096
TREE_PROBES = ("walk", "names", "files", "processes-1", "processes-2", "processes-4")
BIG_PROBES = ("sequential", "random")
WIDE_PROBES = ("wide",)
PROBES = (*TREE_PROBES, *BIG_PROBES, *WIDE_PROBES)
QUICK_CODECS = ("zstd", "none")

Add = Callable[[str, str, float], None]  # what, unit, value
Probe = Callable[[Mount, Add], None]


class Probes:
    """What is measured on one kind of image.  A probe gets a new mount and adds what it finds."""

    probes: dict[str, Probe]

    def __init__(self) -> None:
        self._size = -1

    def read(self, what: str, m: Mount, add: Add, work: Callable[[], int]) -> None:
        """Time ``work``, which returns how many bytes it read, and look at the daemon."""
        before = m.cpu()
        found: list[int] = []
        seconds = timed(lambda: found.append(work()))
        if self._size not in (-1, found[0]):
            raise SystemExit(f"{m.system.name}: {found[0]} bytes read, others found {self._size}")
        self._size = found[0]
        add(what, "MB/s", found[0] / seconds / 1e6)
        if (after := m.cpu()) > before:
            add(f"{what}: daemon CPU", "s", after - before)
        if used := m.memory():
            add(f"{what}: daemon memory", "MiB", used)


class Tree(Probes):
    """Many files."""

    def __init__(self, image: Path, *, shrink: int) -> None:
        super().__init__()
        self._sample = sample(image, SAMPLE_SIZE // shrink)
        processes = [partial(self._processes, n) for n in (1, 2, 4)]
        work: list[Probe] = [self._walk, self._names, self._files, *processes]
        self.probes = dict(zip(TREE_PROBES, work, strict=True))

    def _walk(self, m: Mount, add: Add) -> None:
        add("walk + lstat, fresh", "s", timed(walk, m.path))
        add("walk + lstat, again", "s", timed(walk, m.path))

    def _names(self, m: Mount, add: Add) -> None:
        add("find, fresh", "s", timed(names, m.path))

    def _files(self, m: Mount, add: Add) -> None:
        self.read("walk + read every file", m, add, lambda: read_files(walk(m.path)))

    def _processes(self, count: int, m: Mount, add: Add) -> None:
        paths = [str(m.path / name) for name in self._sample]
        fork = multiprocessing.get_context("fork")
        workers = [fork.Process(target=read_files, args=(paths[i::count],)) for i in range(count)]

        def work() -> None:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

        seconds = timed(work)
        if any(worker.exitcode for worker in workers):
            raise SystemExit(f"{m.system.name}: a reader failed")
        size = sum(self._sample.values())
        add(
            f"{count} process{'es' if count > 1 else ''} reading files",
            "MB/s",
            size / seconds / 1e6,
        )


class Big(Probes):
    """One big file."""

    def __init__(self, *, shrink: int) -> None:
        super().__init__()
        self._count = RANDOM_READS // shrink
        self.probes = dict(zip(BIG_PROBES, [self._sequential, self._random], strict=True))

    def _sequential(self, m: Mount, add: Add) -> None:
        self.read("sequential read", m, add, lambda: read_files([str(m.path / "big")]))

    def _random(self, m: Mount, add: Add) -> None:
        fd = os.open(m.path / "big", os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            pages = os.fstat(fd).st_size // PAGE
            places = random.Random(2).choices(range(pages), k=self._count)

            def work() -> None:
                for place in places:
                    os.pread(fd, PAGE, place * PAGE)

            add("random 4 KiB read", "us", timed(work) / self._count * 1e6)
        finally:
            os.close(fd)


class Wide(Probes):
    """One directory with many entries."""

    def __init__(self) -> None:
        super().__init__()
        self.probes = dict(zip(WIDE_PROBES, [self._list], strict=True))

    def _list(self, m: Mount, add: Add) -> None:
        command = ["ls", "-f", str(m.path / "wide")]
        add("ls -f, fresh", "s", timed(partial(subprocess.run, command, stdout=subprocess.DEVNULL)))
        if used := m.memory():
            add("ls -f: daemon memory", "MiB", used)


def sample(image: Path, size: int) -> dict[str, int]:
    """Some files of a tree, the largest first, with their sizes."""
    with pyerofs.open(image) as tree:
        files = {
            entry.path.lstrip("/"): entry.inode.size
            for _, _, others in tree.walk()
            for entry in others
            if entry.is_file() and SAMPLE_FILES[0] <= entry.inode.size <= SAMPLE_FILES[1]
        }
    names = sorted(files)
    random.Random(3).shuffle(names)
    found = {}
    for name in names:
        if size <= 0:
            break
        found[name] = files[name]
        size -= files[name]
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure(
    kind: Probes, images: dict[str, Path], systems: list[System], args: Any, report: Report
) -> None:
    """Run the probes on the images in rounds, in which all systems take turns."""
    probes = {what: probe for what, probe in kind.probes.items() if what in args.only}
    for number in range(args.rounds):
        for what, probe in probes.items():
            say(f"round {number + 1} of {args.rounds}: {what}")
            systems.append(systems.pop(0))  # no system is measured first in every round
            for name, image in images.items():
                for system in systems:
                    one(system, image, name, probe, args, report)


def one(system: System, image: Path, name: str, probe: Probe, args: Any, report: Report) -> None:
    """One measurement, added to the rows of the image that is called ``name``."""

    def add(what: str, unit: str, value: float) -> None:
        report.add(name, what, unit, system.name, value)

    try:
        with Mount(system, image, cold=args.cold) as m:
            add("mount to first ls", "ms", m.first_ls * 1e3)
            probe(m, add)
    except (CannotMount, OSError) as e:
        report.note(f"{system.name} fails on {name}: {e}")


def measure_all(systems: list[System], codecs: Sequence[str], args: Any, report: Report) -> None:
    """Run all probes that ``args.only`` names."""
    images = Images(args, report)
    shrink = QUICK if args.quick else 1
    if set(args.only) & set(TREE_PROBES) and (found := images.all("tree", codecs)):
        tree = Tree(list(found.values())[-1], shrink=shrink)
        measure(tree, found, systems, args, report)
    if set(args.only) & set(BIG_PROBES) and (found := images.all("big", codecs)):
        measure(Big(shrink=shrink), found, systems, args, report)
    if set(args.only) & set(WIDE_PROBES) and (found := images.all("wide", ("none",))):
        measure(Wide(), found, systems, args, report)


def main() -> None:
    """Measure, report."""

    def words(text: str) -> list[str]:
        return text.split(",")

    parser = options(__doc__)
    parser.add_argument(
        "--only", type=words, metavar="WHAT,...", default=list(PROBES),
        help=f"what to measure, of {', '.join(PROBES)}",
    )  # fmt: skip
    parser.add_argument(
        "--codecs", type=words, metavar="CODEC,...", default=None,
        help=f"which images to measure, of {', '.join(CODECS)}",
    )  # fmt: skip
    parser.add_argument(
        "--systems", type=words, metavar="SYSTEM,...", default=list(SYSTEMS),
        help=f"what to compare, of {', '.join(SYSTEMS)}",
    )  # fmt: skip
    parser.add_argument(
        "--cold", action="store_true",
        help="empty all caches before each mount (root), so that images come from the disk",
    )  # fmt: skip
    args = parse(parser)
    if args.cold and os.geteuid():
        parser.error("--cold: only root can empty the caches")
    codecs = args.codecs or (QUICK_CODECS if args.quick else CODECS)

    report = Report("mounts", "Mounted images", SYSTEMS, (EROFSFUSE,))
    state = "on disk, all caches empty" if args.cold else "in the page cache"
    report.note(f"each measurement has a new mount; the image is {state}")
    systems = [s for s in commands(report) if s.name in args.systems]
    measure_all(systems, codecs, args, report)
    report.finish(args)


if __name__ == "__main__":
    main()

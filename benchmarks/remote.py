"""What does it cost when the image is elsewhere?

Laziness: requests and bytes on the wire for what people do with a mount, of images of many files: as
mkfs.erofs writes them by default, with metadata all over the image, and with ``--MZ`` and with large
chunks, which keep it together.  Speed: reading everything over loopback, compared with curl fetching
the image to a file, with a server capped at 100 MB/s, from the cache compared with a local image, and
with 20 ms of latency in each request compared with none.  The server is that of the tests, in a
process of its own.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from common import HERE, Report, find, options, parse, say, skip, timed
from images import QUICK, CannotMake, Images, make
from mounting import Command, Mount, read_files, walk

sys.path.insert(0, str(HERE.parent))  # for the tests' server

CURL, LOCAL, NEAR, PYEROFS = SYSTEMS = ("curl", "local image", "no latency", "pyerofs")
LATENCY = 0.02
CAP = 100e6
ONE_FILE = 1 << 20
FILES = 60_000
LARGEST = 2 << 20  # of these files
BIG = "big-none"
MANY = {  # images of the same many files, and how they are made
    "many": [],
    "many, --MZ": ["--MZ"],
    "many, --chunksize=1M": ["--chunksize=1048576"],
}


# --- the server -------------------------------------------------------------------------------


def serve(path: str, latency: str, rate: str) -> None:
    """Serve a file; answer each line on stdin with what was asked for since the last one."""
    from tests.remote import faults
    from tests.remote.server import Content, Server, anything

    with open(path, "rb") as f:
        data = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
    with Server(Content(memoryview(data)), rate=float(rate) or None) as server:
        if float(latency):
            server.inject(faults.late(float(latency)), when=anything)
        print(server.url, flush=True)
        for _ in sys.stdin:
            print(len(server.requests), server.sent, flush=True)
            server.forget()


class Served:
    """An image behind a URL."""

    def __init__(self, image: Path, latency: float = 0.0, rate: float = 0.0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", image, str(latency), str(rate)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def counts(self) -> tuple[int, int]:
        """Requests and bytes since this was last asked."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        requests, sent = self._process.stdout.readline().split()
        return int(requests), int(sent)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


FUSE = find("pyerofs-fuse") or "pyerofs-fuse"


class Remote(Command):
    """pyerofs-fuse on a URL: a system for ``Mount``."""

    def __init__(self, served: Served, cache: Path, *words: str) -> None:
        super().__init__(PYEROFS, FUSE, f"--cache-dir={cache}", *words)
        self._url = served.url

    def mount(self, image: Path, where: Path) -> None:
        self._run(self._url, where)


def local() -> Command:
    """The same on the file."""
    return Command(LOCAL, FUSE)


# --- images -----------------------------------------------------------------------------------


def many_images(args: Any, report: Report) -> dict[str, Path]:
    """The images of many files, made if need be."""
    found = {}
    for name, words in MANY.items():
        path = args.images / f"{name.replace(', --', '-').replace('=', '')}.erofs"
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                make(path, words, partial(small_files, args))
        except (OSError, CannotMake) as e:
            report.note(f"{name} can't be made, and is skipped: {e}")
        else:
            found[name] = path
    return found


def small_files(args: Any, stream: BinaryIO) -> None:
    """A tar stream of many of a tree's files; a hash of each path decides whether it is taken."""
    files = []
    for here, _, names in os.walk(args.tree):
        for name in names:
            path = Path(here, name)
            if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
                files.append((path, path.stat().st_size))
    files = sorted((p, n) for p, n in files if n <= LARGEST)
    share = (FILES // QUICK if args.quick else FILES) / max(1, len(files))
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        made = {Path()}
        for path, _ in files:
            inside = path.relative_to(args.tree)
            if zlib.crc32(os.fsencode(inside)) / 2**32 < share:
                for parent in reversed(inside.parents):
                    if parent not in made:
                        made.add(parent)
                        tar.add(args.tree / parent, parent, recursive=False)
                tar.add(path, inside, recursive=False)


# --- measuring --------------------------------------------------------------------------------


@contextmanager
def cache() -> Iterator[Path]:
    """An empty cache directory."""
    with tempfile.TemporaryDirectory(prefix="pyerofs-bench-") as found:
        yield Path(found)


def everything(m: Mount) -> int:
    return read_files(walk(m.path))


def read_big(m: Mount) -> int:
    return read_files([str(m.path / "big")])


def some_file(top: Path) -> str:
    """The file whose size is nearest to ONE_FILE."""
    return min(walk(top), key=lambda path: (abs(os.path.getsize(path) - ONE_FILE), path))


def laziness(name: str, image: Path, report: Report) -> None:
    """Counts don't vary much: once is enough."""
    with Mount(local(), image) as m:
        paths = walk(m.path)
        one = Path(some_file(m.path))
        report.note(
            f"{name}: {len(paths):,} files, {image.stat().st_size / 1e6:.0f} MB;"
            f" the one file has {one.stat().st_size / 1e6:.2f} MB"
        )
        one = one.relative_to(m.path)

    def add(what: str, served: Served) -> None:
        requests, sent = served.counts()
        report.add(name, f"{what}: requests", "", PYEROFS, requests)
        report.add(name, f"{what}: on the wire", "MB", PYEROFS, sent / 1e6)

    with Served(image) as served:
        with cache() as where:
            with Mount(Remote(served, where), image) as m:
                walk(m.path)
                add("mount + ls -lR", served)
                read_files([str(m.path / one)])
                add("then one file of 1 MB", served)
                everything(m)
                add("then everything", served)
            with Mount(Remote(served, where), image) as m:
                everything(m)
                add("mounted again, everything", served)
        with cache() as where, Mount(Remote(served, where), image) as m:
            read_files([str(m.path / one)])
            add("mount + one file of 1 MB", served)


def speed(images: dict[str, Path], report: Report) -> None:
    """One round."""
    for name, image in images.items():
        read_all = read_big if name == BIG else everything
        size = image.stat().st_size
        for title, rate in (("cold", 0.0), ("cold, server capped at 100 MB/s", CAP)):
            if name != BIG and rate:
                continue
            with Served(image, rate=rate) as served, cache() as where:
                seconds = timed(fetch, served.url, where / "curl")
                report.add(name, title, "MB/s", CURL, size / seconds / 1e6)
                (where / "curl").unlink()
                with Mount(Remote(served, where / "cache"), image) as m:
                    seconds = timed(read_all, m)
                    report.add(name, title, "MB/s", PYEROFS, size / seconds / 1e6)
                if rate:
                    continue
                with Mount(Remote(served, where / "cache"), image) as m:
                    seconds = timed(read_all, m)
                    report.add(name, "warm", "MB/s", PYEROFS, size / seconds / 1e6)
        with Mount(local(), image) as m:
            seconds = timed(read_all, m)
            report.add(name, "warm", "MB/s", LOCAL, size / seconds / 1e6)
        for system, latency in ((NEAR, 0.0), (PYEROFS, LATENCY)):
            with (
                Served(image, latency) as served,
                cache() as where,
                Mount(Remote(served, where), image) as m,
            ):
                report.add(name, "20 ms of latency: mount", "s", system, m.first_ls)
                if name != BIG:
                    seconds = timed(walk, m.path)
                    report.add(name, "20 ms of latency: walk", "s", system, seconds)
                seconds = timed(read_all, m)
                report.add(name, "20 ms of latency: read all", "s", system, seconds)


def fetch(url: str, where: Path) -> None:
    """What everybody compares with."""
    subprocess.run(["curl", "--silent", "--fail", "--output", where, url], check=True)


def main() -> None:
    """Measure, report."""
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
        return
    parser = options(__doc__, rounds=3)
    args: Any = parse(parser)
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        skip("/dev/fuse can't be opened")
    if find("curl") is None:
        skip("no curl on PATH")
    report = Report("remote", "Images from afar", SYSTEMS, (CURL, LOCAL, NEAR))
    report.note("mounts of pyerofs-fuse; the server is Python's, on loopback")
    found = many_images(args, report)
    for name, image in found.items():
        say(f"laziness: {name}")
        laziness(name, image, report)
    big = Images(args, report).get(BIG)
    images = ({} if big is None else {BIG: big}) | dict(list(found.items())[:2])
    for number in range(args.rounds):
        say(f"round {number + 1} of {args.rounds}: speed")
        speed(images, report)
    report.finish(args)


if __name__ == "__main__":
    main()

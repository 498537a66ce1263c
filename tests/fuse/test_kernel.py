"""Beside a mount by the kernel's own driver: what both show must be the same."""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import handmade as hm
from tests.fuse import libc
from tests.fuse.mounting import kernel_mounted, mounted
from tests.manifests import Entries, Manifest, golden

IMAGES = [
    "plain", "noinline", "b512", "lz4", "zdir-zstd-48bit", "ztail-lzma", "48bit-chunk",
    "chunk-indexes", "dot-omitted", "metabox", "kitchen-sink", "tar-index",
]  # fmt: skip

STAT = (
    "st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_size", "st_blksize", "st_blocks",
    "st_rdev", "st_atime_ns", "st_mtime_ns", "st_ctime_ns",
)  # fmt: skip
STATVFS = (
    "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail",
    "f_namemax",
)  # fmt: skip


class Pair(NamedTuple):
    """An image, mounted twice."""

    ours: Path
    kernels: Path
    entries: Entries

    def paths(self, kind: int) -> list[str]:
        """The paths of one type of file."""
        return [path for path, e in self.entries.items() if stat.S_IFMT(e["mode"]) == kind]


@contextmanager
def mount_both(manifest: Manifest, top: Path) -> Iterator[Pair]:
    """Mount an image at ``top/ours`` and ``top/kernels``."""
    with (
        kernel_mounted(manifest, top / "kernels") as kernels,
        mounted(manifest, top / "ours") as ours,
    ):
        yield Pair(ours, kernels, manifest.entries)


@pytest.fixture(scope="module", params=IMAGES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    with mount_both(golden(request.param), tmp_path_factory.mktemp("pair")) as mounts:
        yield mounts


def status(path: Path) -> dict[str, int]:
    found = path.lstat()
    return {field: getattr(found, field) for field in STAT}


def test_stat(pair: Pair) -> None:
    for path in pair.entries:
        assert status(pair.ours / path) == status(pair.kernels / path), path


@pytest.mark.parametrize("size", [512, 32768])
def test_directory_entries(pair: Pair, size: int) -> None:
    for path in pair.paths(stat.S_IFDIR):
        found = libc.getdents(pair.ours / path, size)
        assert found == libc.getdents(pair.kernels / path, size), path


def test_file_system(pair: Pair) -> None:
    ours, kernels = os.statvfs(pair.ours), os.statvfs(pair.kernels)
    for field in STATVFS:
        assert getattr(ours, field) == getattr(kernels, field), field


def holes(path: Path) -> list[tuple[int, int]]:
    """(SEEK_DATA, SEEK_HOLE) from each block on; a negative errno where that fails."""

    def seek(fd: int, offset: int, whence: int) -> int:
        try:
            return os.lseek(fd, offset, whence)
        except OSError as e:
            return -(e.errno or errno.EIO)

    with path.open("rb") as f:
        fd = f.fileno()
        size = os.fstat(fd).st_size
        steps = [*range(0, min(size, 200 * 4096), 4096), size - 1, size, size + 1]
        return [(seek(fd, at, os.SEEK_DATA), seek(fd, at, os.SEEK_HOLE)) for at in steps if at >= 0]


def test_holes(pair: Pair, engine: str) -> None:
    for path in pair.paths(stat.S_IFREG):
        found = holes(pair.ours / path)
        if engine == "direct":
            assert found == holes(pair.kernels / path), path
        elif size := (pair.ours / path).stat().st_size:  # pyfuse3 knows no SEEK requests
            assert found[0] == (0, size)


def forget_pages(fd: int) -> None:
    """Make the next reads arrive at the daemon."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def test_mapped_files(pair: Pair) -> None:
    for path in pair.paths(stat.S_IFREG):
        want = (pair.kernels / path).read_bytes()
        with (pair.ours / path).open("rb") as f:
            if not want:
                continue  # nothing to map
            forget_pages(f.fileno())
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                for page in reversed(range(0, len(want), mmap.PAGESIZE)):
                    end = page + mmap.PAGESIZE
                    assert mapped[page:end] == want[page:end], (path, page)


def test_sendfile(pair: Pair, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for path in pair.paths(stat.S_IFREG):
        with (pair.ours / path).open("rb") as source, copy.open("wb") as target:
            forget_pages(source.fileno())
            at = 0
            while n := os.sendfile(target.fileno(), source.fileno(), at, 1 << 20):
                at += n
        assert copy.read_bytes() == (pair.kernels / path).read_bytes(), path


def test_random_reads_by_many_threads(pair: Pair) -> None:
    contents = {p: (pair.kernels / p).read_bytes() for p in pair.paths(stat.S_IFREG)}
    large = [path for path, content in contents.items() if len(content) > 4096]

    def read_about(seed: int) -> list[tuple[str, int, int]]:
        """Reads that gave something else, with every other thread past the page cache."""
        rng = random.Random(seed)
        flags = os.O_DIRECT if seed % 2 else 0
        fds = {path: os.open(pair.ours / path, os.O_RDONLY | flags) for path in large}
        wrong = []
        try:
            for _ in range(60):
                path = rng.choice(large)
                at = rng.randrange(len(contents[path]) + 10)
                n = rng.choice([1, 100, 4096, 10_000, 200_000])
                forget_pages(fds[path])
                if os.pread(fds[path], n, at) != contents[path][at : at + n]:
                    wrong.append((path, at, n))
        finally:
            for fd in fds.values():
                os.close(fd)
        return wrong

    with ThreadPoolExecutor(8) as threads:
        assert [wrong for found in threads.map(read_about, range(8)) for wrong in found] == []


def test_seeking_in_directories(pair: Pair) -> None:
    for path in (".", "many", "empty-dir"):
        seek_everywhere(pair.ours / path)


def seek_everywhere(directory: Path) -> None:
    """Read it, go back to any place, and read on from there."""
    with libc.DirectoryStream(directory) as stream:
        positions = [stream.tell()]
        entries = []
        for entry in stream:
            entries.append(entry)
            positions.append(stream.tell())
        places = list(range(len(positions)))
        random.Random(1).shuffle(places)
        for i in places[:50]:
            stream.seek(positions[i])
            assert list(stream) == entries[i:]
        stream.rewind()
        assert list(stream) == entries


# --- images that mkfs.erofs does not write --------------------------------------------------


def handmade(pieces: hm.Pieces, path: Path) -> Manifest:
    """An image of pieces, saved, about whose contents nothing is said."""
    hm.save(pieces, path)
    return Manifest(path.stem, path, (), 0, "kernel", {})


def test_a_large_directory(tmp_path: Path) -> None:
    names = {b"%d" % i * (1 + i % 40): (2, 1) for i in range(3000)}
    data = hm.directory({b".": (3, 2), b"..": (3, 2)} | names, 4096)
    image = hm.build(
        {b"file": hm.plain(0, 0), b"large": hm.plain(len(data), 100, mode=hm.DIRECTORY)},
        {100: data},
    )
    with mount_both(handmade(image, tmp_path / "image"), tmp_path) as pair:
        want = libc.getdents(pair.kernels / "large")
        assert len(want) == 3002
        assert libc.getdents(pair.ours / "large") == want
        seek_everywhere(pair.ours / "large")


def test_inodes_that_have_the_numbers_fuse_reserves(tmp_path: Path) -> None:
    files = {b"zero": hm.plain(5, 100), b"one": hm.plain(4096, 100)}
    image = hm.build(files, {100: hm.text(4096)}, first_nid=0)
    with mount_both(handmade(image, tmp_path / "image"), tmp_path) as (ours, kernels, _):
        assert [(kernels / name).stat().st_ino for name in ("zero", "one")] == [0, 1]
        for name in ("zero", "one"):
            assert (ours / name).read_bytes() == (kernels / name).read_bytes()
            assert status(ours / name) == status(kernels / name)
        # d_ino is the node id, which pyfuse3 can't tell apart from the inode number
        assert [e.name for e in libc.getdents(ours)] == [e.name for e in libc.getdents(kernels)]

"""The images to measure with: ready ones, or made of a directory tree with mkfs.erofs.

``tree-CODEC`` holds many files, ``big-CODEC`` one of 256 MiB, put together from what the tree has,
``wide-none`` a directory of 100,000 empty files.
A tree beyond 1 GB is trimmed: a hash of each path decides whether it is taken.
"""

from __future__ import annotations

import os
import random
import stat
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from common import Report, find, say

CODECS = ("lz4hc", "zstd", "lzma", "deflate", "none")
TREE_CODECS = ("lz4hc", "zstd", "none")  # zstd with fragments and deduplication

TREE_SIZE = 1_000_000_000
BIG_SIZE = 256 << 20
WIDE_COUNT = 100_000
QUICK = 16  # times smaller


class Images:
    """The images of one run of a benchmark."""

    def __init__(self, args: Any, report: Report) -> None:
        self._args = args
        self._report = report
        self._shrink = QUICK if args.quick else 1

    def get(self, name: str) -> Path | None:
        """The path of an image, made if need be; None, and a note, where that can't be done."""
        path: Path = self._args.images / f"{name}.erofs"
        if not path.exists():
            kind, _, codec = name.partition("-")
            words = [] if codec == "none" else [f"-z{codec}", "-C65536"]
            if name == "tree-zstd":
                words.append("-Efragments,dedupe")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == "wide":
                    make_wide(path, WIDE_COUNT // self._shrink)
                else:
                    make(path, words, self._tree if kind == "tree" else self._big)
            except (OSError, CannotMake) as e:
                self._report.note(f"{name} can't be made, and is skipped: {e}")
                return None
        return path

    def all(self, kind: str, codecs: Sequence[str] = CODECS) -> dict[str, Path]:
        """Those of a kind (tree, big, wide) that there are."""
        names = [f"{kind}-{c}" for c in codecs if kind != "tree" or c in TREE_CODECS]
        found = {name: self.get(name) for name in names}
        return {name: path for name, path in found.items() if path is not None}

    def _tree(self, stream: BinaryIO) -> None:
        top: Path = self._args.tree
        files = list(_files(top))
        share = TREE_SIZE / self._shrink / max(1, sum(size for _, size in files))
        made = {Path()}
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for path, _ in files:
                inside = path.relative_to(top)
                if zlib.crc32(os.fsencode(inside)) / 2**32 >= share:
                    continue
                for parent in reversed(inside.parents):
                    if parent not in made:
                        made.add(parent)
                        tar.add(top / parent, parent, recursive=False)
                with suppress(PermissionError):  # not ours to read: left out
                    tar.add(path, inside, recursive=False)

    def _big(self, stream: BinaryIO) -> None:
        """Programs, libraries and text, one after another in a fixed random order."""
        files = [
            (path, size)
            for path, size in _files(self._args.tree)
            if 16 << 10 <= size <= 16 << 20 and not path.is_symlink() and os.access(path, os.R_OK)
        ]
        random.Random(1).shuffle(files)
        size = min(BIG_SIZE // self._shrink, sum(size for _, size in files))
        info = tarfile.TarInfo("big")
        info.size = left = size
        info.mode = 0o644
        stream.write(info.tobuf(tarfile.USTAR_FORMAT))
        for path, _ in files:
            data = path.read_bytes()[:left]
            stream.write(data)
            left -= len(data)
            if not left:
                break
        stream.write(bytes(-size % 512 + 1024))


class CannotMake(Exception):
    """An image can't be made."""


def make(path: Path, words: list[str], source: Path | Callable[[BinaryIO], None]) -> None:
    """Make an image of a directory, or of the tar stream that ``source`` writes: then nothing has to
    lie on disk.  Raises CannotMake."""
    program = find("mkfs.erofs")
    if program is None:
        raise CannotMake("mkfs.erofs is not on PATH")
    say(f"making {path.stem} ...")
    rough = path.with_suffix(".part")
    what = [rough, source] if isinstance(source, Path) else ["--tar=f", rough]
    command = [program, "--quiet", *words, *what]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        if not isinstance(source, Path):
            with suppress(BrokenPipeError):  # mkfs.erofs tells why
                source(cast(BinaryIO, child.stdin))
        errors = child.communicate()[1].decode("utf-8", "replace").strip()
    if child.returncode:
        rough.unlink(missing_ok=True)
        raise CannotMake(errors.splitlines()[-1] if errors else "mkfs.erofs fails")
    rough.replace(path)


def make_wide(path: Path, count: int) -> None:
    """Make an image of a directory with many files.  Of a tar stream, that would take mkfs.erofs
    minutes.  Raises CannotMake."""
    with tempfile.TemporaryDirectory(prefix="pyerofs-bench-") as scratch:
        wide = Path(scratch, "wide")
        wide.mkdir()
        for number in range(count):
            (wide / f"file-{number:06}").touch()
        make(path, [], Path(scratch))


def _files(top: Path) -> Iterator[tuple[Path, int]]:
    """Files and links below a directory, in order, and their sizes."""
    for here, directories, names in os.walk(top):
        directories.sort()
        for name in sorted(names):
            path = Path(here, name)
            with suppress(OSError):
                s = path.lstat()
                if stat.S_ISREG(s.st_mode) or stat.S_ISLNK(s.st_mode):
                    yield path, s.st_size

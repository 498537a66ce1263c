"""Images for the remote tests, ways to read them from afar, and what came of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyerofs
from pyerofs.errors import SourceError
from pyerofs.sources.spec import Access, SourceSpec, parse_spec
from tests import handmade as hm
from tests.manifests import Manifest

SEGMENT = 1 << 20  # of the cache
BLOCK = 4096
TIMEOUT = 20.0  # of a read where nothing depends on it
HANG = 60  # seconds after which a test is stuck rather than slow
ROOT = Path(__file__).parents[2]


# --- images -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Big:
    """An image with metadata in its first segment and one file, ``/big``, in all others."""

    image: bytes
    content: bytes  # of /big

    @property
    def segments(self) -> int:
        return -(-len(self.image) // SEGMENT)


@cache
def big(megabytes: int = 6, seed: int = 1) -> Big:
    """``/big`` has so many MiB of noise, and begins where the second segment does."""
    content = hm.noise(megabytes << 20, seed)
    block = SEGMENT // BLOCK
    pieces = hm.build(
        {b"big": hm.plain(len(content), block), b"small": hm.inline(b"small\n")},
        {block: content},
    )
    image = bytearray(hm.end_of(pieces))
    for at, data in pieces.items():
        image[at : at + len(data)] = data
    return Big(bytes(image), content)


@dataclass(frozen=True)
class Many:
    """An image with many small files in directories, and some larger ones whose data lie far away
    from the metadata."""

    image: bytes
    directories: int
    files: int  # in each
    large: bytes  # content of /large-0, /large-1 …: 1 MiB each, all the same but for a number
    metadata: int  # bytes from the start that hold all the metadata


FIRST = 64  # block of the first directory of ``many``
SMALL = b"small file %06d"


@cache
def many(directories: int = 40, files: int = 100, large: int = 48) -> Many:
    """``/dir-N/file-M`` and ``/large-N``."""
    data: dict[int, bytes] = {}
    inodes: dict[bytes, bytes] = {}
    block = FIRST
    for d in range(directories):
        first = block * BLOCK
        made = [hm.inline(SMALL % (d * files + f)).ljust(64, b"\0") for f in range(files)]
        data[block] = b"".join(made)
        block += -(-len(data[block]) // BLOCK)
        names = {b"file-%03d" % f: ((first + 64 * f - hm.METADATA) // 32, 1) for f in range(files)}
        listing = hm.directory({b".": (2, 2), b"..": (2, 2)} | names, BLOCK)
        data[block] = listing
        inodes[b"dir-%02d" % d] = hm.plain(len(listing), block, mode=hm.DIRECTORY, nlink=2)
        block += -(-len(listing) // BLOCK)
    metadata = block * BLOCK
    block = -(-metadata // SEGMENT) * SEGMENT // BLOCK
    content = hm.noise(SEGMENT)
    for n in range(large):
        data[block] = b"%06d" % n + content[6:]
        inodes[b"large-%02d" % n] = hm.plain(SEGMENT, block)
        block += SEGMENT // BLOCK
    pieces = hm.build(inodes, data)
    image = bytearray(hm.end_of(pieces))
    for at, piece in pieces.items():
        image[at : at + len(piece)] = piece
    return Many(bytes(image), directories, files, content, metadata)


def file_name(want: Manifest) -> str:
    """What a golden image is called where names have to be in lower case."""
    return want.name.lower()


# --- reading ----------------------------------------------------------------------------------


def spec(what: str, **fields: Any) -> SourceSpec:
    """A source that may be plain http."""
    return parse_spec(what, **({"insecure": True} | fields))


def access(**fields: Any) -> Access:
    """Nothing is fetched unasked, and nothing waits for a minute."""
    return replace(Access(timeout=TIMEOUT, prefetch="none"), **fields)


def opened(what: str, how: Access | None = None, **fields: Any) -> pyerofs.Image:
    """A remote image."""
    return pyerofs.open(spec(what, **fields), access=how or access())


@dataclass
class Outcome:
    """What came of reading a file piece by piece."""

    right: int = 0
    wrong: int = 0
    errors: list[SourceError] = field(default_factory=list)

    @property
    def failed(self) -> set[type[SourceError]]:
        return {type(e) for e in self.errors}


def read_pieces(
    image: pyerofs.Image,
    content: bytes,
    offsets: Iterable[int] | None = None,
    *,
    path: str = "/big",
    length: int = 128 << 10,
) -> Outcome:
    """Read pieces of a file, all of them unless ``offsets`` says which; compare each."""
    found = Outcome()
    for offset in range(0, len(content), length) if offsets is None else offsets:
        try:
            got = image.read(path, offset, length)
        except SourceError as e:
            found.errors.append(e)
        else:
            if got == content[offset : offset + length]:
                found.right += 1
            else:
                found.wrong += 1
    return found


def assert_all_right(found: Outcome) -> None:
    assert (found.wrong, found.errors) == (0, [])
    assert found.right


# --- processes --------------------------------------------------------------------------------

READER = Path(__file__).with_name("reader.py")


def command(*words: object, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run ``pyerofs WORD …``."""
    settings: dict[str, Any] = {"timeout": HANG, "cwd": ROOT, "stdin": subprocess.DEVNULL} | how
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [sys.executable, "-m", "pyerofs", *map(str, words)],
        capture_output=True, text=True, errors="surrogateescape", check=False, **settings,
    )  # fmt: skip
    return done


def reader(*words: object, **how: Any) -> subprocess.Popen[str]:
    """Start a process that reads an image: see ``reader.py``."""
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    arguments = [sys.executable, str(READER), *map(str, words)]
    process: subprocess.Popen[str] = subprocess.Popen(arguments, text=True, **(settings | how))
    return process


def cache_files(top: Path | None = None) -> list[Path]:
    """Everything in the cache directory."""
    top = top or Path(os.environ["XDG_CACHE_HOME"]) / "pyerofs"
    return sorted(path for path in top.rglob("*") if path.is_file()) if top.exists() else []


def data_files(top: Path | None = None) -> list[Path]:
    """The blobs in the cache directory: what is larger than any book-keeping could be."""
    return [path for path in cache_files(top) if path.stat().st_size >= SEGMENT]


def in_threads(work: Sequence[Callable[[], object]]) -> list[object]:
    """Run functions at the same time; their results, or what they raised."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(work)) as pool:
        futures = [pool.submit(each) for each in work]
        return [future.exception(HANG) or future.result() for future in futures]

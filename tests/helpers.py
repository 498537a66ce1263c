"""What the tests of the library and of the command share: opening images, and awkward sources."""

from __future__ import annotations

import signal
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import pyerofs
from pyerofs import Image
from pyerofs.sources import Buffer, MemorySource
from tests import handmade as hm
from tests.manifests import Entries, Manifest, all_manifests, entries_below, entry

every_image = pytest.mark.parametrize("want", all_manifests(), ids=str)

SYMLINK = 0o120777


class SilentSource(MemorySource):
    """Never has anything at hand: every byte must be waited for.  Keeps what was asked for."""

    def __init__(self, data: Buffer, *, name: str = "silent") -> None:
        super().__init__(data, name=name)
        self.requests: list[tuple[int, int]] = []
        self.closed = False

    def peek(self, offset: int, length: int) -> Buffer | None:
        return None

    def read_at(self, offset: int, length: int) -> Buffer:
        self.requests.append((offset, length))
        return super().read_at(offset, length)

    def close(self) -> None:
        self.closed = True


def location(want: Manifest) -> dict[str, Any]:
    """The keywords that ``open`` needs for a golden image, beside its path."""
    return {"offset": want.offset, "devices": want.devices}


def open_golden(want: Manifest, **options: Any) -> Image:
    """A golden image, opened."""
    return pyerofs.open(want.image, **location(want), **options)


def words(want: Manifest) -> list[str]:
    """The arguments that name a golden image to the command."""
    found = [str(want.image)]
    if want.offset:
        found += ["--offset", str(want.offset)]
    for device in want.devices:
        found += ["--device", str(device)]
    return found


def primary(want: Manifest) -> bytes:
    """The bytes of a golden image's primary device, from where the image starts."""
    return want.image.read_bytes()[want.offset :]


def entries_of(image: Image) -> Entries:
    """Everything in an image, in the manifests' terms."""
    found = {".": _entry_of(image, image.root)}
    for _, directories, others in image.walk():
        for item in directories + others:
            found[item.path.removeprefix("/")] = _entry_of(image, item.inode)
    return found


def _entry_of(image: Image, inode: pyerofs.Inode) -> dict[str, Any]:
    return entry(
        image.stat(inode),
        content=image.read(inode) if inode.is_file else None,
        target=image.readlink(inode) if inode.is_symlink else None,
        xattrs=image.xattrs(inode),
    )


def extracted(want: Manifest, top: Path) -> Entries:
    """What is in a directory, except for what an ordinary file system has its own idea of: the
    sizes and link counts of directories."""
    found = entries_below(top)
    for path, item in found.items():
        expected = want.entries.get(path, {})
        if stat.S_ISDIR(item["mode"]):
            item |= {k: expected[k] for k in ("size", "nlink") if k in expected}
    return found


def handmade(files: Mapping[bytes, bytes], **options: Any) -> bytes:
    """The bytes of a hand-made image."""
    pieces = hm.build(files, **options)
    return hm.Sparse(pieces).read_at(0, hm.end_of(pieces))


def symlink(target: bytes) -> bytes:
    """The inode of a symbolic link."""
    return hm.inline(target, mode=SYMLINK)


def directory(nid: int, entries: Mapping[bytes, tuple[int, int]]) -> bytes:
    """The inode of a directory, which has the given nid.  ``..`` leads to itself: nobody asks."""
    dots = {b".": (nid, 2), b"..": (nid, 2)}
    return hm.inline(hm.directory(dots | dict(entries), 4096), mode=hm.DIRECTORY, nlink=2)


@contextmanager
def signals_at(action: signal.Handlers, *numbers: signal.Signals) -> Iterator[None]:
    """What is started meanwhile starts with these signals ignored, or not ignored."""
    before = [(number, signal.signal(number, action)) for number in numbers]
    try:
        yield
    finally:
        for number, was in before:
            signal.signal(number, was)

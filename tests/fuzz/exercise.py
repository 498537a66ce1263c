"""Read everything in an image, with bounded effort, the way a suspicious user would."""

from __future__ import annotations

import signal
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, cast

import trio

from pyerofs import aio
from pyerofs.cli.check import Checker
from pyerofs.errors import (
    CorruptImage,
    ErofsError,
    NoSuchXattr,
    NotADirectory,
    NotFound,
    TooManySymlinks,
)
from pyerofs.format import directory
from pyerofs.format.model import Dirent, Inode
from pyerofs.format.tree import file_type
from pyerofs.image import Image
from pyerofs.sources import Buffer, MemorySource
from pyerofs.system.progress import Progress
from tests.fuzz.atlas import open_bytes

MISSING = ("user.absent", "trusted.overlay.opaque", "system.posix_acl_access", "nonsense", "")


class Violation(AssertionError):
    """The library broke its promises without an exception of its own."""


@dataclass(frozen=True)
class Limits:
    """How much to read of one image."""

    entries: int = 400  # of all directories together
    file_bytes: int = 1 << 20
    all_bytes: int = 8 << 20
    extents: int = 500  # of one file
    piece: int = 20_000  # bytes per read: divides no block, spans some


@dataclass
class Outcome:
    """What happened: how often each operation ended in what."""

    results: Counter[str] = field(default_factory=Counter)
    entries: int = 0
    bytes_read: int = 0

    @property
    def kind(self) -> str:
        """``unopened: …``, ``clean`` or ``errors``."""
        bad = [result for result in self.results if not result.endswith(": ok")]
        if self.results["open: ok"]:
            return "errors" if bad else "clean"
        return f"unopened{bad[0].removeprefix('open')}"

    @contextmanager
    def attempt(self, what: str, *expect: type[ErofsError]) -> Iterator[None]:
        """Do something that may end in an ErofsError; count how it ended.  ``expect``: errors that
        are right answers."""
        try:
            yield
        except ErofsError as e:
            _check_error(e)
            name = "ok" if isinstance(e, expect) else type(e).__name__
        else:
            name = "ok"
        self.results[f"{what}: {name}"] += 1


def _check_error(e: ErofsError) -> None:
    if isinstance(e, CorruptImage) and e.offset is None and e.nid is None:
        raise Violation(f"names neither offset nor nid: {e}") from e
    if not str(e) or "\n" in str(e):
        raise Violation(f"not a message of one line: {str(e)!r}") from e


class Hang(BaseException):
    """Something took too long; not an Exception, so that nothing swallows it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Hang in the block if it takes longer.  For the main thread."""

    def ring(*_: object) -> None:
        raise Hang(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def exercise(image: bytes, devices: Sequence[bytes] = (), limits: Limits | None = None) -> Outcome:
    """Open an image and read all there is in it.

    Raises what is no ErofsError, and Violation."""
    outcome = Outcome()
    with outcome.attempt("open"):
        opened = open_bytes(image, devices)
    if outcome.results["open: ok"]:
        with opened:
            _Reader(opened, outcome, limits or Limits()).run()
    return outcome


class _Reader:
    def __init__(self, opened: Image, outcome: Outcome, limits: Limits) -> None:
        self.image = opened
        self.outcome = outcome
        self.attempt = outcome.attempt
        self.limits = limits

    def run(self) -> None:
        """Everything reachable by name, then the special inodes, then the whole through the API."""
        sb = self.image.superblock
        str(sb), sb.feature_names, sb.total_blocks, sb.device_mask
        todo = deque(nid for nid in (sb.packed_nid, sb.metabox_nid) if nid)
        todo.append(self.image.root.nid)
        seen = set()
        while todo:
            nid = todo.popleft()
            if nid in seen:
                continue
            seen.add(nid)
            with self.attempt("inode"):
                inode = self.image.inode(nid)
                self.inode(inode)
                todo += [entry.nid for entry in self.entries(inode)]
        self.by_path()

    def inode(self, inode: Inode) -> None:
        """What every inode has, and the data of those that have some."""
        repr(inode), file_type(inode)
        with self.attempt("stat"):
            stat = self.image.stat(inode)
            if not 0 <= stat.st_ino < 1 << 64:
                raise Violation(f"inode number {stat.st_ino} of nid {inode.nid}")
            if not -1 << 63 <= stat.st_mtime_ns // 1_000_000_000 < 1 << 63:
                raise Violation(f"time of nid {inode.nid} does not fit a stat")
        with self.attempt("xattrs"):
            found = self.image.xattrs(inode)
            for name, value in islice(found.items(), 20):
                with self.attempt("getxattr"):
                    if self.image.getxattr(inode, name) != value:
                        raise Violation(f"xattr {name!r} of nid {inode.nid} reads differently")
        for name in MISSING:
            with self.attempt("no xattr", NoSuchXattr):
                self.image.getxattr(inode, name)
        if inode.is_symlink:
            with self.attempt("readlink"):
                self.image.readlink(inode)
        if inode.is_file:
            with self.attempt("read"):
                self.data(inode)
            with self.attempt("read end"):
                self.piece(inode, max(0, inode.size - 100), 200)
            with self.attempt("read middle"), self.image.open(inode) as file:
                file.seek(inode.size // 2)
                file.read(100)
        if inode.is_file or inode.is_dir or inode.is_symlink:
            with self.attempt("extents"):
                self.extents(inode)

    def data(self, inode: Inode) -> None:
        """The file from its start, in pieces."""
        for offset in range(0, min(inode.size, self.limits.file_bytes), self.limits.piece):
            if self.outcome.bytes_read > self.limits.all_bytes:
                return
            self.piece(inode, offset, self.limits.piece)

    def piece(self, inode: Inode, offset: int, length: int) -> None:
        """One read, which must be as long as the file allows."""
        data = self.image.read(inode, offset, length)
        self.outcome.bytes_read += len(data)
        if len(data) != min(length, inode.size - offset):
            raise Violation(f"{len(data)} bytes at {offset} of nid {inode.nid}, not {length}")

    def extents(self, inode: Inode) -> None:
        """The map: without gaps, from the start to the end."""
        end = 0
        fresh = self.image.inode(inode.nid)  # nothing remembered
        for extent in islice(self.image.extents(fresh), self.limits.extents):
            if extent.start != end or extent.length <= 0 or extent.end > max(inode.size, 0):
                raise Violation(f"{extent} after {end} of {inode.size} bytes, nid {inode.nid}")
            end = extent.end

    def entries(self, inode: Inode) -> list[Dirent]:
        """The entries of a directory, each looked up as well; listing resumes anywhere."""
        found: list[Dirent] = []
        if not inode.is_dir:
            return found
        vol = self.image.volume
        with self.attempt("list"):
            room = max(self.limits.entries - self.outcome.entries, 0)
            found += islice(directory.entries(vol, inode), room)
            for at in {len(found) // 3, len(found) // 2, len(found) - 1} if found else ():
                rest = list(islice(directory.entries(vol, inode, found[at].cookie), 5))
                if rest[: len(found) - at - 1] != found[at + 1 : at + 6]:
                    raise Violation(f"listing of nid {inode.nid} resumed at {found[at].cookie}")
        self.outcome.entries += len(found)
        for entry in found:
            with self.attempt("lookup"):
                if directory.lookup(vol, inode, entry.name) is None:
                    self.outcome.results["lookup: nothing"] += 1
        with self.attempt("lookup of nothing"):
            directory.lookup(vol, inode, b"\xff" * 255)
            directory.lookup(vol, inode, b"nothing")
            directory.lookup(vol, inode, b"!")
        return found

    def by_path(self) -> None:
        """walk, stat and read by path, following links."""
        count = 0
        with self.attempt("walk"):
            for path, directories, others in self.image.walk():
                for entry in (*directories, *others):
                    count += 1
                    with self.attempt("by path", NotFound, TooManySymlinks, NotADirectory):
                        self.image.stat(f"{path}/{entry.name}")
                if count > self.limits.entries:
                    break


class Stingy(MemorySource):
    """Bytes of which about half are never there at once."""

    def peek(self, offset: int, length: int) -> Buffer | None:
        return None if (offset >> 9) * 0x9E3779B1 >> 13 & 1 else super().peek(offset, length)


def exercise_async(
    image: bytes, devices: Sequence[bytes] = (), limits: Limits | None = None
) -> Outcome:
    """The same through ``pyerofs.aio``, which has to wait for some of the bytes."""
    outcome = Outcome()
    trio.run(_run_async, image, devices, outcome, limits or Limits())
    return outcome


async def _run_async(
    image: bytes, devices: Sequence[bytes], outcome: Outcome, limits: Limits
) -> None:
    sources = [Stingy(device) for device in (image, *devices)]
    with outcome.attempt("open"):
        async with aio.open(sources[0], devices=sources[1:], cache_size=4 << 20) as opened:
            with outcome.attempt("walk"):
                async with aclosing(cast(AsyncGenerator[Any, None], opened.walk())) as steps:
                    async for _, directories, others in steps:
                        for name, inode in (*directories, *others):
                            with outcome.attempt("inode"):
                                await _inode_async(opened, name, inode, outcome, limits)
                            outcome.entries += 1
                        if outcome.entries > limits.entries:
                            break
            for nid in (opened.superblock.packed_nid, opened.superblock.metabox_nid):
                with outcome.attempt("inode"):
                    special = await opened.inode(nid) if nid else opened.root
                    await _inode_async(opened, "", special, outcome, limits)


async def _inode_async(
    opened: aio.AsyncImage, name: str, inode: Inode, outcome: Outcome, limits: Limits
) -> None:
    with outcome.attempt("stat"):
        await opened.stat(inode)
    with outcome.attempt("xattrs"):
        await opened.xattrs(inode)
    if inode.is_symlink:
        with outcome.attempt("readlink"):
            await opened.readlink(inode)
    if inode.is_dir:
        with outcome.attempt("child"):
            await opened.child(inode, name.encode("utf-8", "surrogateescape"))
    if not inode.is_file:
        return
    file = await opened.open(inode)  # which decodes ahead
    end = min(inode.size, limits.file_bytes)
    for offset in (*range(0, end, limits.piece), max(inode.size - 100, 0)):
        if outcome.bytes_read > limits.all_bytes:
            return
        with outcome.attempt("read"):
            data = await file.read_at(offset, limits.piece)
            outcome.bytes_read += len(data)
            if len(data) != min(limits.piece, inode.size - offset):
                raise Violation(f"{len(data)} bytes at {offset} of nid {inode.nid}, aio")


def exercise_check(
    image: bytes,
    devices: Sequence[bytes] = (),
    limits: Limits | None = None,
    *,
    data: bool = True,
) -> Outcome:
    """``pyerofs check``, which sets its own limits; without ``data``: ``check --metadata``."""
    outcome = Outcome()
    with outcome.attempt("open"), open_bytes(image, devices) as opened:
        checker = Checker(opened, Progress("checking", 0, quiet=True), data=data)
        checker.run()
        outcome.entries, outcome.bytes_read = checker.inodes, checker.bytes
        if checker.problems:
            outcome.results["check: problems"] += 1
    return outcome


WAYS: dict[str, Callable[[bytes, Sequence[bytes], Limits | None], Outcome]] = {
    "image": exercise,
    "aio": exercise_async,
    "check": exercise_check,
    "metadata": partial(exercise_check, data=False),
}

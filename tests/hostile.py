"""Hostile images on top of ``handmade``: directories out of order, trees too deep for a path, tables
that overlap; and how commands are run on them: with little memory, and not for long.

A ``Layout`` places inodes and blocks behind the root directory that ``handmade.build`` makes, and
``Layout.image`` has that root lead to them.
"""

from __future__ import annotations

import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from pyerofs.format import ondisk
from tests import handmade as hm

ROOT = 128  # the nid of the root directory, where all inodes are in a layout
BLOCK = 4096
NAME = 255  # bytes of the longest name

FILE, DIR, CHR, BLK, FIFO, SOCK, LINK = (
    ondisk.FT_REG_FILE, ondisk.FT_DIR, ondisk.FT_CHRDEV, ondisk.FT_BLKDEV, ondisk.FT_FIFO,
    ondisk.FT_SOCK, ondisk.FT_SYMLINK,
)  # fmt: skip

Entry = tuple[bytes, int, int]  # name, nid, file type

_OWNER = struct.Struct("<II")  # of an extended inode
_OWNER_AT, _NLINK_AT, _MODE_AT = 24, 44, 4
_LINKS_AT = 6  # the link count of a compact inode


# --- inodes -----------------------------------------------------------------------------------


def owned(inode: bytes, uid: int, gid: int) -> bytes:
    """An extended inode with another owner."""
    assert inode[0] & ondisk.I_EXTENDED_BIT
    return inode[:_OWNER_AT] + _OWNER.pack(uid, gid) + inode[_OWNER_AT + _OWNER.size :]


def with_links(inode: bytes, nlink: int) -> bytes:
    """An inode with another link count."""
    if inode[0] & ondisk.I_EXTENDED_BIT:
        return inode[:_NLINK_AT] + struct.pack("<I", nlink) + inode[_NLINK_AT + 4 :]
    return inode[:_LINKS_AT] + struct.pack("<H", nlink) + inode[_LINKS_AT + 2 :]


def with_mode(inode: bytes, mode: int) -> bytes:
    """An inode with another type and mode."""
    return inode[:_MODE_AT] + struct.pack("<H", mode) + inode[_MODE_AT + 2 :]


def node(kind: int, permissions: int, *, rdev: int = 0, xattrs: bytes = b"") -> bytes:
    """A fifo, a socket or a device of user 1000 and group 70000."""
    layout = ondisk.LAYOUT_FLAT_PLAIN
    return hm.inode(layout, 0, rdev, mode=kind | permissions, extended=True, xattrs=xattrs)


def block_map(size: int, blocks: Sequence[int], *, mode: int = hm.REGULAR) -> bytes:
    """A chunk-based inode with a block for each 4 KiB, by a table of 4 bytes for each."""
    table = struct.pack(f"<{len(blocks)}I", *blocks)
    nlink = 2 if stat.S_ISDIR(mode) else 1
    return hm.inode(
        ondisk.LAYOUT_CHUNK_BASED, size, 0, table, align=4, mode=mode, nlink=nlink, extended=True
    )


def in_order(entries: Sequence[Entry], block: int = BLOCK) -> bytes:
    """The data of a directory with the entries in the order given, whatever their names are."""
    blocks: list[list[Entry]] = [[]]
    room = block
    for entry in entries:
        room -= ondisk.DIRENT.size + len(entry[0])
        if room < 0:
            blocks.append([])
            room = block - ondisk.DIRENT.size - len(entry[0])
        blocks[-1].append(entry)
    return b"".join(one_block(one).ljust(block, b"\0") for one in blocks[:-1]) + one_block(
        blocks[-1]
    )


def one_block(entries: Sequence[Entry]) -> bytes:
    """One directory block, not filled up."""
    start = len(entries) * ondisk.DIRENT.size
    records, names = [], []
    for name, nid, kind in entries:
        records.append(ondisk.DIRENT.pack(nid, start, kind))
        names.append(name)
        start += len(name)
    return b"".join(records + names)


# --- images -----------------------------------------------------------------------------------


class Layout:
    """Inodes and blocks, one after another."""

    def __init__(self) -> None:
        self._pieces: hm.Pieces = {}
        self._end = hm.METADATA + 2 * BLOCK  # the root directory lies before that

    def inode(self, content: bytes) -> int:
        """Place an inode and what follows it; its nid.  It crosses no block if it fits into one."""
        at = self._place(len(content))
        self._pieces[at] = content
        return _nid(at)

    def inodes(self, contents: Sequence[bytes]) -> list[int]:
        """Place many side by side; each must be whole slots of 32 bytes."""
        assert all(len(content) % 32 == 0 for content in contents)
        data = b"".join(contents)
        at = self._place(len(data))
        self._pieces[at] = data
        starts = accumulate(map(len, contents), initial=at)
        return [_nid(start) for start, _ in zip(starts, contents, strict=False)]

    def blocks(self, data: bytes) -> int:
        """Place data at the start of a block; the block."""
        self._end += -self._end % BLOCK
        at = self._end
        self._pieces[at] = data
        self._end = at + len(data) + -len(data) % BLOCK
        return at // BLOCK

    def directory(
        self,
        entries: Sequence[Entry],
        *,
        parent: int = ROOT,
        dots: bool = True,
        subdirectories: int | None = None,
    ) -> int:
        """Place a directory with the entries in the order given, behind ``.`` and ``..``; its nid."""

        def data(nid: int) -> bytes:
            first = [(b".", nid, DIR), (b"..", parent, DIR)] if dots else []
            return in_order([*first, *entries])

        if subdirectories is None:
            subdirectories = len([1 for _, _, kind in entries if kind == DIR])
        known: dict[str, Any] = {
            "mode": hm.DIRECTORY, "nlink": subdirectories + 2, "extended": True,
        }  # fmt: skip
        size = len(data(0))
        if size + 64 <= BLOCK:
            at = self._place(size + 64)
            self._pieces[at] = hm.inline(data(_nid(at)), **known)
        else:
            at = self._place(64)
            self._pieces[at] = hm.plain(size, self.blocks(data(_nid(at))), **known)
        return _nid(at)

    def change(self, nid: int, change: Callable[[bytes], bytes]) -> None:
        """Change an inode, and what lies behind it, that was placed by itself."""
        at = hm.METADATA + (nid << ondisk.ISLOT_BITS)
        changed = change(self._pieces[at])
        assert len(changed) == len(self._pieces[at])
        self._pieces[at] = changed

    def have_parent(self, nid: int, parent: int) -> None:
        """Let the ``..`` of an inline directory lead elsewhere."""
        at = ondisk.INODE_EXTENDED.size + ondisk.DIRENT.size
        self.change(nid, lambda inode: inode[:at] + struct.pack("<Q", parent) + inode[at + 8 :])

    def image(self, entries: Mapping[bytes, tuple[int, int]], **fields: Any) -> bytes:
        """The bytes of an image with these entries in its root directory."""
        pieces = hm.build({}, elsewhere=entries, **fields)
        assert max(pieces) == hm.METADATA + (ROOT << ondisk.ISLOT_BITS)
        root = pieces[hm.METADATA + (ROOT << ondisk.ISLOT_BITS)]
        subdirectories = len([1 for _, kind in entries.values() if kind == DIR])
        pieces[max(pieces)] = with_links(root, 2 + subdirectories)
        pieces |= self._pieces
        end = hm.end_of(pieces)
        image = bytearray(end)
        for at, content in pieces.items():
            image[at : at + len(content)] = content
        return bytes(image)

    def _place(self, size: int) -> int:
        self._end += -self._end % 32
        if self._end % BLOCK + size > BLOCK:
            self._end += -self._end % BLOCK
        at = self._end
        self._end += size
        return at


def _nid(at: int) -> int:
    return at - hm.METADATA >> ondisk.ISLOT_BITS


def unordered(entries: Sequence[Entry], layout: Layout, **fields: Any) -> bytes:
    """An image whose root has a directory ``d`` with the entries in the order given."""
    return layout.image({b"d": (layout.directory(entries), DIR)}, **fields)


def one_block_often(chunks: int = 20_000) -> bytes:
    """An image of some 90 KiB with a directory ``d`` of that many blocks, which are all the same."""
    layout = Layout()
    file = layout.inode(hm.inline(b"x"))
    names = sorted(b"%c%c" % (a, b) for a in range(97, 120) for b in range(97, 110))
    block = layout.blocks(one_block([(name, file, FILE) for name in names[:292]]))
    directory = layout.inode(block_map(chunks * BLOCK, [block] * chunks, mode=hm.DIRECTORY))
    return layout.image({b"d": (directory, DIR)}, incompat=ondisk.INCOMPAT_CHUNKED_FILE)


def deep(levels: int, *, files: bool = True, nlink: int = 1, **fields: Any) -> bytes:
    """An image with directories of 255-byte names inside each other; each but the root has a file
    ``f`` of its own, and the deepest one a file ``z``, too."""
    layout = Layout()
    file = hm.inode(
        ondisk.LAYOUT_FLAT_PLAIN, 0, ondisk.NULL_ADDR_32, extended=True, nlink=nlink
    )  # empty
    name = b"n" * NAME
    here = 0
    for level in range(levels):  # from the deepest one on
        entries = [(b"f", layout.inode(file), FILE)] if files else []
        entries += [(name, here, DIR)] if level else [(b"z", layout.inode(file), FILE)]
        below, here = here, layout.directory(entries)
        if level:
            layout.have_parent(below, here)
    return layout.image({name: (here, DIR)}, **fields)


def overlapping(inodes: int = 8_500) -> bytes:
    """An image of some 700 KiB with files side by side whose chunk tables begin behind their inodes,
    and so have all the inodes that follow in them."""
    layout = Layout()
    size = inodes * 32 // 4 * BLOCK  # a table as long as all inodes
    record = hm.inode(ondisk.LAYOUT_CHUNK_BASED, size, 0)
    nids = layout.inodes([record] * inodes)
    layout.blocks(bytes(inodes * 32))  # the last one's table
    names = sorted(b"%05d" % i for i in range(inodes))
    entries = [(name, nid, FILE) for name, nid in zip(names, nids, strict=True)]
    directory = layout.directory(entries)
    return layout.image({b"d": (directory, DIR)}, incompat=ondisk.INCOMPAT_CHUNKED_FILE)


# --- commands that may not take much ----------------------------------------------------------

SECONDS = 30.0  # that a command may run
ADDRESS_SPACE = 1 << 30  # bytes that its processes may map, each: beyond that is a MemoryError
LARGEST_OUTPUT = 64 << 20  # bytes of a file that it writes
MEMORY = 300 << 20  # bytes that each may really use

# between pytest and the command: what a process was before it became another counts with it
_MEASURE = """
import os, resource, subprocess, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
process = subprocess.Popen([sys.executable, "-m", "pyerofs", *sys.argv[4:]])
_, status, used = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as f:
    f.write(f"{os.waitstatus_to_exitcode(status)} {used.ru_maxrss}")
"""


@dataclass(frozen=True)
class Spent:
    """What a command has said, and what it took."""

    status: int
    out: bytes
    err: str
    seconds: float
    memory: int  # bytes, of its largest process

    @property
    def lines(self) -> list[str]:
        return self.out.decode("utf-8", "surrogateescape").splitlines()


def bounded(directory: Path, *words: object, output: bool = True) -> Spent:
    """Run ``pyerofs WORD …`` with little memory; ``directory`` is for what is measured.

    Fails where it takes too long, too much memory, or ends in a traceback.  ``output``: keep what
    goes to stdout."""
    found, said, errors = (directory / f"measured.{end}" for end in ("txt", "out", "err"))
    found.unlink(missing_ok=True)
    limits = (str(ADDRESS_SPACE), str(LARGEST_OUTPUT))
    command = [sys.executable, "-c", _MEASURE, str(found), *limits, *map(str, words)]
    started = time.monotonic()
    sink = said if output else Path(os.devnull)
    with sink.open("wb") as out, errors.open("wb") as err:
        in_time = _run(command, out, err)
    seconds = time.monotonic() - started
    message = errors.read_bytes()[-20_000:].decode("utf-8", "surrogateescape")
    assert in_time, f"still running after {seconds:.0f} s; {message[-500:]}"
    assert "Traceback" not in message, message[-2000:]
    status, kib = map(int, found.read_text().split())
    done = Spent(status, said.read_bytes() if output else b"", message, seconds, kib << 10)
    assert done.memory < MEMORY, f"{done.memory >> 20} MiB; {message[-500:]}"
    return done


def _run(command: list[str], out: IO[bytes], err: IO[bytes]) -> bool:
    """Run it, and what it starts, for as long as it may; whether it has ended by itself."""
    project = Path(__file__).parents[1]
    few = os.environ | {"MALLOC_ARENA_MAX": "2"}  # threads' arenas are mapped, but hardly used
    process = subprocess.Popen(
        command, stdout=out, stderr=err, cwd=project, env=few, start_new_session=True
    )
    try:
        process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return True


# --- trees too deep for a path ----------------------------------------------------------------

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def descend(top: Path, name: bytes) -> list[list[bytes]]:
    """What is in a directory, in the directory of that name in it, and so on."""
    found = []
    fd = os.open(top, _DIRECTORY)
    try:
        while True:
            names = sorted(map(os.fsencode, os.listdir(fd)))
            found.append(names)
            if name not in names:
                return found
            deeper = os.open(name, _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = deeper
    finally:
        os.close(fd)


def remove(top: Path) -> None:
    """Remove a tree, however deep it is, with one directory open at a time."""
    try:
        fd = os.open(top, _DIRECTORY)
    except FileNotFoundError:
        return
    entered: list[str] = []
    try:
        while True:
            deeper = _first_directory(fd)
            if deeper is not None:
                entered.append(deeper)
                following = os.open(deeper, _DIRECTORY, dir_fd=fd)
            elif entered:
                following = os.open("..", _DIRECTORY, dir_fd=fd)
                os.rmdir(entered.pop(), dir_fd=following)
            else:
                break
            os.close(fd)
            fd = following
    finally:
        os.close(fd)
    os.rmdir(top)


def _first_directory(fd: int) -> str | None:
    """A directory in a directory; without one, all that it has is removed."""
    with os.scandir(fd) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_directory in found:
        if is_directory:
            return name
    for name, _ in found:
        os.unlink(name, dir_fd=fd)
    return None

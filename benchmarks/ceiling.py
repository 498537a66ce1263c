"""The ceiling: pyfuse3 serving a tree from memory, with no parsing and no decoding.

    python ceiling.py IMAGE [MOUNTPOINT]

Reads the whole image first (names, attributes and data, up to a few GB), then serves it with the
smallest possible operations: what any file system built on pyfuse3 could reach at best.  Runs in the
background once mounted, like pyerofs-fuse; unmount it to end it.

Without a MOUNTPOINT it says "ready" when it has read the image, then reads mount points from stdin, a
line each, and answers with the id of the process that serves it.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
from typing import Any

import pyfuse3
import trio
from pyerofs_fuse.mount import read_ahead
from pyerofs_fuse.processes import eager
from pyerofs_fuse.processes.turns import Turns

import pyerofs
from pyerofs.format import tree

FOREVER = 1e9


class Node:
    """An inode with everything about it ready to be sent."""

    __slots__ = ("attr", "children", "data", "rows")

    def __init__(self, attr: Any) -> None:
        self.attr = attr
        self.children: dict[bytes, Node] = {}
        self.rows: list[tuple[bytes, Any, int]] = []
        self.data: bytes | memoryview = b""


class Ceiling(pyfuse3.Operations):
    """Dictionary look-ups, and nothing else."""

    enable_writeback_cache = False

    def __init__(self, nodes: dict[int, Node]) -> None:
        super().__init__()
        self._nodes = nodes
        self._missing = pyfuse3.EntryAttributes()
        self._missing.st_ino = 0
        self._missing.entry_timeout = FOREVER

    async def lookup(self, parent: int, name: bytes, ctx: Any) -> Any:
        child = self._nodes[parent].children.get(name)
        return self._missing if child is None else child.attr

    async def getattr(self, inode: int, ctx: Any) -> Any:
        return self._nodes[inode].attr

    async def readlink(self, inode: int, ctx: Any) -> Any:
        return self._nodes[inode].data

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def readdir(self, fh: int, start: int, token: Any) -> None:
        for name, attr, cookie in self._nodes[fh].rows[start:]:
            if not pyfuse3.readdir_reply(token, name, attr, cookie):
                break

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, offset: int, size: int) -> Any:
        return memoryview(self._nodes[fh].data)[offset : offset + size]

    async def release(self, fh: int) -> None:
        pass

    async def releasedir(self, fh: int) -> None:
        pass

    async def flush(self, fh: int) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)  # and the kernel never asks again

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        raise pyfuse3.FUSEError(errno.ENODATA)


def load(image: pyerofs.Image) -> dict[int, Node]:
    """The whole tree as Nodes by node id."""
    nodes: dict[int, Node] = {}

    def node(inode: pyerofs.Inode) -> Node:
        number = 1 if inode.nid == image.root.nid else tree.inode_number(image.volume, inode.nid)
        found = nodes.get(number)
        if found is None:
            attr = pyfuse3.EntryAttributes()
            s = image.stat(inode)
            attr.st_ino = number
            for field in ("mode", "nlink", "uid", "gid", "size", "blksize", "blocks", "rdev"):
                setattr(attr, f"st_{field}", getattr(s, f"st_{field}"))
            attr.st_mtime_ns = attr.st_atime_ns = attr.st_ctime_ns = s.st_mtime_ns
            attr.entry_timeout = attr.attr_timeout = FOREVER
            found = nodes[number] = Node(attr)
            if inode.is_file:
                found.data = image.read(inode)
            elif inode.is_symlink:
                found.data = os.fsencode(image.readlink(inode))
        return found

    for _, directories, others, here in _walk(image):
        parent = node(here)
        entries = sorted(directories + others, key=lambda e: e.dirent.name)
        for i, entry in enumerate(entries, 1):
            child = node(entry.inode)
            parent.children[entry.dirent.name] = child
            parent.rows.append((entry.dirent.name, child.attr, i))
    return nodes


def _walk(image: pyerofs.Image) -> Any:
    for path, directories, others in image.walk():
        yield path, directories, others, image.lookup(path)


def fork(nodes: dict[int, Node], mountpoint: str) -> int:
    """Serve in a process of its own; returns its id once it is mounted, or 0."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(write_end)
        mounted = os.read(read_end, 1)
        os.close(read_end)
        return child if mounted else 0
    os.setsid()
    pyfuse3.init(Ceiling(nodes), mountpoint, {"ro", "fsname=ceiling"})
    read_ahead(mountpoint)
    eager.enable(Turns(1), lambda: False)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.write(write_end, b"\0")
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()
        os._exit(0)


def main() -> None:
    """Load, mount, fork, serve."""
    with pyerofs.open(sys.argv[1]) as image:
        nodes = load(image)
    gc.collect()
    gc.freeze()
    if len(sys.argv) > 2:
        sys.exit(0 if fork(nodes, sys.argv[2]) else 1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        print(fork(nodes, line.rstrip("\n")), flush=True)


if __name__ == "__main__":
    main()

"""Inodes and directory entries as the kernel's records."""

from __future__ import annotations

from functools import cache
from struct import Struct

from pyerofs.format.model import Inode
from pyerofs.system.fuse import wire
from pyerofs.system.fuse.wire import FOREVER
from pyerofs_fuse.answers import Answers


class Encoder:
    """Encodes what one image has.  A walk encodes each inode once, so this is made to be fast."""

    def __init__(self, answers: Answers) -> None:
        sb = answers.volume.sb
        self._answers = answers
        self._block_size = sb.block_size
        # nids are inode numbers and node ids, but for the root and the nids 0 and 1
        self._are_nids = not sb.metabox_nid
        self._root = sb.root_nid

    def attributes(self, inode: Inode) -> tuple[int, ...]:
        """The fields of struct fuse_attr."""
        nid = inode.nid
        number = nid if self._are_nids else self._answers.number(nid)
        seconds, nanoseconds = inode.mtime, inode.mtime_nsec
        return (
            number, inode.size, self._answers.blocks(inode), seconds, seconds, seconds, nanoseconds,
            nanoseconds, nanoseconds, inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev,
            self._block_size, 0,
        )  # fmt: skip

    def attr(self, inode: Inode) -> bytes:
        """The reply to GETATTR."""
        return wire.ATTR_OUT.pack(FOREVER, 0, 0, *self.attributes(inode))

    def entry(self, inode: Inode) -> bytes:
        """The reply to LOOKUP."""
        node = self._answers.node_of(inode.nid)
        return wire.ENTRY.pack(node, 0, FOREVER, FOREVER, 0, 0, *self.attributes(inode))

    def full(self, name: bytes, cookie: int, kind: int, inode: Inode) -> bytes:
        """An entry of READDIRPLUS, with attributes."""
        nid = inode.nid
        plain = self._are_nids and nid > 1 and nid != self._root
        node = nid if plain else self._answers.node_of(nid)
        attributes = self.attributes(inode)
        length = len(name)
        return _full(length).pack(
            node, 0, FOREVER, FOREVER, 0, 0, *attributes, attributes[0], cookie, length, kind, name
        )

    def bare(self, name: bytes, cookie: int, kind: int, number: int) -> bytes:
        """An entry of READDIRPLUS, without attributes."""
        length = len(name)
        return _bare(length).pack(number, cookie, length, kind, name)

    def plain(self, name: bytes, cookie: int, kind: int, number: int) -> bytes:
        """An entry of READDIR."""
        length = len(name)
        return _plain(length).pack(number, cookie, length, kind, name)


# The records of an entry whose name has a given length, at most 255.


@cache
def _plain(length: int) -> Struct:
    return Struct(f"=QQII{wire.padded(length) - wire.DIRENT.size}s")


@cache
def _bare(length: int) -> Struct:
    return Struct(f"={wire.ENTRY.size}xQQII{wire.padded(length) - wire.DIRENT.size}s")


@cache
def _full(length: int) -> Struct:
    return Struct(f"=QQQQII{wire.ATTR}QQII{wire.padded(length) - wire.DIRENT.size}s")

"""Directory listings, encoded for READDIR and READDIRPLUS.

A listing is encoded block by block, and a reply is cut out of the encoded blocks.  With attributes, an
entry saves the client that looks at it a LOOKUP; but loading an inode takes longer than all else, so
whoever only lists should not wait for it.  ``Clients`` finds out who looks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from typing import TypeVar

from pyerofs.format.memory import ByteCache
from pyerofs.format.model import Dirent, Inode
from pyerofs.format.ondisk import FT_DIR, MODE_OF_FT
from pyerofs.sources.base import Buffer
from pyerofs_fuse.answers import Answers
from pyerofs_fuse.direct.encode import Encoder

T = TypeVar("T")

CACHE_SIZE = 4 << 20  # bytes of encoded blocks; the kernel caches listings, too
MAX_CLIENTS = 256
MAX_DIRECTORIES = 1024  # listed without attributes, that are remembered
SMALL = 1  # blocks of a directory that is listed with attributes at a client's first look


_KINDS = {file_type: mode >> 12 for file_type, mode in MODE_OF_FT.items()}  # d_type


class Form(IntEnum):
    """How entries are encoded."""

    PLAIN = 0  # READDIR
    BARE = 1  # READDIRPLUS; directories with attributes, all else without
    FULL = 2  # READDIRPLUS, with attributes


@dataclass(frozen=True, slots=True)
class Block:
    """The encoded entries of one directory block."""

    cookies: list[int]  # of the entry after each
    ends: list[int]  # where each ends in ``data``
    data: bytes

    def __len__(self) -> int:
        return len(self.data) + 16 * len(self.ends)


class Listings:
    """Encodes listings of one image."""

    def __init__(self, answers: Answers, encoder: Encoder) -> None:
        self._answers = answers
        self._encoder = encoder
        self._blocks: ByteCache[tuple[int, int, Form], Block] = ByteCache(CACHE_SIZE)

    def reply(self, parent: Inode, cookie: int, room: int, form: Form) -> list[Buffer]:
        """The entries from ``cookie`` on, as many as fit in ``room`` bytes; none at the end."""
        found: list[Buffer] = []
        size = self._answers.volume.sb.directory_block_size
        index, inside = divmod(cookie, size)
        blocks = self._answers.blocks_of(parent)
        end_index = blocks + parent.dot_omitted  # then a block with ``.`` follows
        while index < end_index:
            block = self._block(parent, index, form, end_index)
            first = bisect_right(block.cookies, cookie) if inside else 0
            start = block.ends[first - 1] if first else 0
            last = bisect_right(block.ends, start + room)
            if last > first:
                end = block.ends[last - 1]
                found.append(memoryview(block.data)[start:end])
                room -= end - start
            if last < len(block.ends):
                break
            index += 1
            inside = 0
        return found

    def _block(self, parent: Inode, index: int, form: Form, count: int) -> Block:
        """One of ``count`` blocks.  An only block is not cached: the kernel asks for it once."""
        key = parent.nid, index, form
        block = self._blocks.get(key) if count > 1 else None
        if block is None:
            if index < self._answers.blocks_of(parent):
                block = self._encoded(self._answers.entries(parent, index), form)
            else:
                dot = self._answers.dot(parent)
                block = self._encoded([] if dot is None else [dot], form)
            if count > 1:
                self._blocks.put(key, block)
        return block

    def _encoded(self, entries: list[Dirent], form: Form) -> Block:
        answers, encoder = self._answers, self._encoder
        encode = encoder.plain if form is Form.PLAIN else encoder.bare
        full, bare = form is Form.FULL, form is Form.BARE
        parts = []
        for name, nid, file_type, cookie in entries:
            inode = None
            if full or (bare and file_type == FT_DIR):
                inode = answers.entry_inode(name, nid)
            if inode is None:
                parts.append(encode(name, cookie, _KINDS.get(file_type, 0), answers.number(nid)))
            else:
                parts.append(encoder.full(name, cookie, _KINDS.get(file_type, 0), inode))
        ends = [*accumulate(map(len, parts))]
        return Block([entry.cookie for entry in entries], ends, b"".join(parts))


class Clients:
    """Learns which clients look at the files that they have listed, and so profit from attributes.

    A client is a thread, by its id.  Its first small directory is listed with attributes (``ls -l``
    lists one and ends), later ones without, until it looks up a file in one of them."""

    def __init__(self) -> None:
        self._clients: OrderedDict[int, bool] = OrderedDict()  # whether it looks at files
        self._bare: OrderedDict[int, None] = OrderedDict()  # directories listed without attributes

    def form(self, pid: int, node: int, cookie: int, blocks: int) -> Form:
        """How to list a directory of ``blocks`` blocks, from ``cookie`` on."""
        looks = self._clients.get(pid)
        if looks or (looks is None and not cookie and blocks <= SMALL):
            self._note(self._clients, pid, bool(looks), MAX_CLIENTS)
            return Form.FULL
        self._note(self._clients, pid, False, MAX_CLIENTS)
        self._note(self._bare, node, None, MAX_DIRECTORIES)
        return Form.BARE

    def looked_up(self, pid: int, node: int, is_directory: bool) -> None:
        """A client has looked up an entry in a directory."""
        if not is_directory and node in self._bare:
            self._note(self._clients, pid, True, MAX_CLIENTS)

    @staticmethod
    def _note(known: OrderedDict[int, T], key: int, value: T, limit: int) -> None:
        known[key] = value
        known.move_to_end(key)
        if len(known) > limit:
            known.popitem(last=False)

"""Listings of directories, ready to be sent."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from operator import itemgetter

from pyfuse3 import EntryAttributes

from pyerofs.format.model import Inode
from pyerofs_fuse.processes.handles import Handles

MAX_ROWS = 80_000  # directory entries kept ready to be sent, by all processes: about 30 MB
MAX_DIRECTORY_ROWS = 1 << 13  # and of one; larger directories are prepared as they are read
MAX_LISTINGS = 1 << 14

# A directory entry, ready to be sent: name, attributes, cookie of the entry after it.
Row = tuple[bytes, EntryAttributes, int]
cookie_of = itemgetter(2)


class Listing:
    """Entries of a directory that lie one after another."""

    __slots__ = ("counted", "first", "inode", "rows", "whole")

    def __init__(self, inode: Inode) -> None:
        self.inode = inode
        self.rows: list[Row] = []
        self.first = True  # the first of them is the directory's
        self.whole = False  # and the last one, too
        self.counted = 0

    def add(self, cookie: int, more: list[Row]) -> tuple[list[Row], int]:
        """Add the entries that follow ``cookie``, if that is where the last one ends; else keep these
        instead.  Nothing means that it was the directory's end.  Returns the entries, and where in them
        the new ones begin."""
        rows = self.rows
        if cookie == (rows[-1][2] if rows else 0):
            if not more:
                self.whole = self.first
                return rows, len(rows)
            if len(rows) < MAX_DIRECTORY_ROWS:
                at = len(rows)
                rows += more
                return rows, at
        elif not more:
            return [], 0
        self.first = not cookie
        self.whole = False
        self.rows = more
        return more, 0


class Listings:
    """The directories that were listed lately, the least recently read dropped first."""

    def __init__(self, handles: Handles) -> None:
        """Made before the fork."""
        self._listings: OrderedDict[int, Listing] = OrderedDict()
        self._handles = handles
        # how many rows each process has: whoever is asked for listings may have more than his part
        self._rows = memoryview(mmap.mmap(-1, 8 * handles.processes)).cast("Q")

    def get(self, node: int) -> Listing | None:
        found = self._listings.get(node)
        if found is not None:
            self._listings.move_to_end(node)
        return found

    def put(self, node: int, listing: Listing) -> None:
        """Keep a listing, or what it has become."""
        rows, me, processes = self._rows, self._handles.me, self._handles.processes
        old = self._listings.get(node)
        if old is not None and old is not listing:  # two made it at the same time
            rows[me] -= old.counted
            old.counted = 0
        self._listings[node] = listing
        rows[me] += len(listing.rows) - listing.counted
        listing.counted = len(listing.rows)
        limit = max(MAX_ROWS - sum(rows) + rows[me], MAX_ROWS // (2 * processes))
        while rows[me] > limit or len(self._listings) > MAX_LISTINGS:
            _, gone = self._listings.popitem(last=False)
            rows[me] -= gone.counted
            gone.counted = 0

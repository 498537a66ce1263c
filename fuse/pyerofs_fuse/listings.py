"""A cache of directory listings, as rows ready for READDIR replies."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from operator import itemgetter

from pyfuse3 import EntryAttributes

from pyerofs.format.model import Inode
from pyerofs_fuse.processes.handles import Handles

MAX_ROWS = 80_000  # directory entries cached by all processes together: about 30 MB
MAX_DIRECTORY_ROWS = 1 << 13  # cached of one directory; larger ones are prepared as they are read
MAX_LISTINGS = 1 << 14

# A directory entry, ready to be sent: name, attributes, cookie of the entry after it.
Row = tuple[bytes, EntryAttributes, int]
cookie_of = itemgetter(2)


class Listing:
    """A run of consecutive entries of a directory."""

    __slots__ = ("counted", "first", "inode", "rows", "whole")

    def __init__(self, inode: Inode) -> None:
        self.inode = inode
        self.rows: list[Row] = []
        self.first = True  # the run starts with the directory's first entry
        self.whole = False  # the run is the whole directory
        self.counted = 0

    def add(self, cookie: int, more: list[Row]) -> tuple[list[Row], int]:
        """Append the entries that follow ``cookie``, if the run ends there and has room; otherwise
        replace the run with them.  An empty ``more`` means the end of the directory.  Returns the
        rows to send from, and the index of the first new one."""
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
    """The Listings of recently read directories: a least-recently-used cache by node id."""

    def __init__(self, handles: Handles) -> None:
        """Call before the fork: the row counts are in shared memory."""
        self._listings: OrderedDict[int, Listing] = OrderedDict()
        self._handles = handles
        # rows cached by each process: a process that lists much may exceed an equal share
        self._rows = memoryview(mmap.mmap(-1, 8 * handles.processes)).cast("Q")

    def get(self, node: int) -> Listing | None:
        found = self._listings.get(node)
        if found is not None:
            self._listings.move_to_end(node)
        return found

    def put(self, node: int, listing: Listing) -> None:
        """Add a listing, or count the rows added to it; evicts the least recently read ones."""
        rows, me, processes = self._rows, self._handles.me, self._handles.processes
        old = self._listings.get(node)
        if old is not None and old is not listing:  # two tasks made it concurrently
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

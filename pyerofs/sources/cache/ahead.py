"""When to fetch ahead of a sequential reader, and how much.  Decisions only: no I/O, no clock."""

from __future__ import annotations

from pyerofs.sources.base import SEGMENT_BITS

WINDOW = 16  # segments fetched ahead of a sequential reader at most
NEAR = 16 << 10  # bytes that a sequential reader may leave out
NEVER = 1 << 63


class ReadAhead:
    """Follows the reads of one blob, whose readers are taken for one.

    A read that starts near the end of the last one is sequential: a window of segments beyond it is
    fetched.  The window doubles each time up to WINDOW, and moves on when half of it is used up."""

    def __init__(self, count: int) -> None:
        """``count``: the blob's segments."""
        self._count = count
        self._end = -NEAR - 1  # of the last read
        self._window = 1  # segments
        self._ahead = 0  # the first segment that was not yet asked for
        # a read from this offset on uses up half of what was fetched ahead
        self.trigger = NEVER

    def peeked(self, end: int) -> None:
        """Take note of a read, up to ``end``, that memory answered.  May be called from any thread."""
        self._end = end

    def read(self, offset: int, length: int) -> range:
        """Take note of a read; the segments to be fetched ahead of the next one."""
        sequential = abs(offset - self._end) <= NEAR
        self._end = offset + length
        if sequential:
            return self._advance(self._end - 1 >> SEGMENT_BITS)
        self.trigger = NEVER
        return range(0)

    def crossed(self, number: int) -> range:
        """Take note that memory answered a read in segment ``number``, beyond the trigger; the segments
        to be fetched ahead: none if that segment was not fetched ahead."""
        if number < self._ahead:
            return self._advance(number)
        self.trigger = NEVER
        return range(0)

    def _advance(self, number: int) -> range:
        """The segments to be fetched now that a sequential reader has come to ``number``."""
        if not self._ahead - self._window - 1 <= number <= self._ahead:  # it is elsewhere now
            self._ahead, self._window = number + 1, 1
        elif number < self._ahead - self._window // 2:
            return range(0)
        self._window = min(2 * self._window, WINDOW)
        start = max(self._ahead, number + 1)
        self._ahead = min(number + 1 + self._window, self._count)
        half = max(self._ahead - self._window // 2, number + 1)
        self.trigger = half << SEGMENT_BITS if self._ahead < self._count else NEVER
        return range(start, self._ahead)

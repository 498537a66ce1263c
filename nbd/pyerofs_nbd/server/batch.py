"""Replies that go out together, in one system call.

Small reads of files that are in the page cache go from there into one buffer, headers between them:
no object is made for each, and the kernel is handed one range instead of dozens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeAlias

from pyerofs.sources.base import Buffer
from pyerofs_nbd.server.protocol import Request

SMALL = 32 << 10  # bytes: the largest read that ``read`` is meant for
ENOUGH = 32 << 10  # bytes to send together; the client works on them while we fill the next batch
MAX_PARTS = 900  # below IOV_MAX (1024)
ROOM = ENOUGH + SMALL + 4096  # a batch that is not full takes one more reply

RWF_NOWAIT = getattr(os, "RWF_NOWAIT", 0)

Head: TypeAlias = Callable[[int, int, int], bytes]  # cookie, offset, length -> a reply's header


class Batch:
    """Gathers replies; ``take`` what is there, and ``clear`` when it was sent."""

    def __init__(self, head: Head) -> None:
        """``head`` makes the header of a successful read."""
        self.size = 0  # bytes gathered
        self.payload = 0  # those of them that are data
        self._head = head
        self._length = len(head(0, 0, 0))
        self._parts: list[Buffer] = []
        self._view = memoryview(bytearray(ROOM))
        self._from = self._at = 0  # what of it is not among the parts yet
        self.can_read = bool(RWF_NOWAIT)

    @property
    def full(self) -> bool:
        """Whether it should be sent before more is added."""
        return self.size >= ENOUGH or len(self._parts) >= MAX_PARTS

    def read(self, requests: Sequence[Request], start: int, size: int, fd: int, base: int) -> int:
        """Add the replies to reads, from the file that has the export's bytes (``size`` of them) from
        ``base`` on, as long as they are plain, small and at the kernel's hand, and the batch is not
        full.  Returns which request was the first that it did not take, beginning with ``start``."""
        view, at, head, header = self._view, self._at, self._head, self._length
        preadv, nowait = os.preadv, RWF_NOWAIT
        stop = at + ENOUGH - self.size
        n = start
        try:
            for n in range(start, len(requests)):
                _, flags, kind, cookie, offset, length = requests[n]
                if kind or flags or not 0 < length <= SMALL or offset + length > size or at >= stop:
                    break
                data = at + header
                end = data + length
                if preadv(fd, (view[data:end],), base + offset, nowait) != length:
                    break
                view[at:data] = head(cookie, offset, length)
                at = end
            else:
                n = len(requests)
        except BlockingIOError:
            pass
        except OSError:
            self.can_read = False  # a file system that does not know RWF_NOWAIT, or is in trouble
        self.size += at - self._at
        self.payload += at - self._at - (n - start) * header
        self._at = at
        return n

    def add(self, *parts: Buffer) -> None:
        """Add a reply."""
        self._close_run()
        self._parts += parts
        self.size += sum(map(len, parts))

    def add_read(self, cookie: int, offset: int, data: Buffer) -> None:
        """Add the reply to a read."""
        self.add(self._head(cookie, offset, len(data)), data)
        self.payload += len(data)

    def _close_run(self) -> None:
        if self._at > self._from:
            self._parts.append(self._view[self._from : self._at])
            self._from = self._at

    def take(self) -> list[Buffer]:
        """What is to be sent; it must not change before ``clear``."""
        self._close_run()
        return self._parts

    def clear(self) -> None:
        """Start again."""
        self._parts.clear()
        self._from = self._at = self.size = self.payload = 0

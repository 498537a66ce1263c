"""Batches of replies, each sent by one system call.

Small reads that hit the page cache go directly into one buffer, with the headers between them: no
object is made for each reply, and the kernel is passed one range instead of dozens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeAlias

from pyerofs.sources.base import Buffer
from pyerofs_nbd.server.protocol import Request

SMALL = 32 << 10  # bytes: the largest read that ``read`` is meant for
ENOUGH = 32 << 10  # bytes of a full batch; the client works on it while the next one is filled
MAX_PARTS = 900  # below IOV_MAX (1024)
ROOM = ENOUGH + SMALL + 4096  # a batch that is not full takes one more reply

RWF_NOWAIT = getattr(os, "RWF_NOWAIT", 0)

Head: TypeAlias = Callable[[int, int, int], bytes]  # cookie, offset, length -> a reply's header


class Batch:
    """Gathers replies: ``take`` them, send them, ``clear`` the batch."""

    def __init__(self, head: Head) -> None:
        """``head`` makes the header of a successful read."""
        self.size = 0  # bytes gathered
        self.payload = 0  # bytes of data among them
        self._head = head
        self._length = len(head(0, 0, 0))
        self._parts: list[Buffer] = []
        self._view = memoryview(bytearray(ROOM))
        self._from = self._at = 0  # the range of the view not yet among the parts
        self.can_read = bool(RWF_NOWAIT)

    @property
    def full(self) -> bool:
        """Whether the batch should be sent before more replies are added."""
        return self.size >= ENOUGH or len(self._parts) >= MAX_PARTS

    def read(self, requests: Sequence[Request], start: int, size: int, fd: int, base: int) -> int:
        """Add replies to ``requests`` from ``start`` on, as long as they are plain, small reads that
        hit the page cache, and the batch is not full.  The export's bytes (``size`` of them) lie in
        the file from ``base`` on.  Returns the index of the first request that was not answered."""
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
            self.can_read = False  # the file system has no RWF_NOWAIT, or the read failed
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
        """The parts to send; the batch must not change before ``clear``."""
        self._close_run()
        return self._parts

    def clear(self) -> None:
        """Empty the batch."""
        self._parts.clear()
        self._from = self._at = self.size = self.payload = 0

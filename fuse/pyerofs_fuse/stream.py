"""Files as the mount reads them: what had to be decoded anyway goes to the kernel.

After a random read, the rest of the pcluster that had to be decoded for it is pushed into the page
cache, so that later reads there need no request.  Sequential readers are left to READs: with a
read-ahead of 1 MiB the kernel asks sooner than a thread could push.
"""

from __future__ import annotations

from pyerofs.aio import AsyncFile, AsyncImage
from pyerofs.data import pcluster
from pyerofs.model import ENCODED, Inode
from pyerofs_fuse.push import Pusher

MAX_PUSHED = 1 << 15  # extents remembered as pushed; forgetting one costs a copy, nothing else


class Streamer:
    """What the files of one mount share."""

    def __init__(self, image: AsyncImage) -> None:
        self.image = image
        self.pusher = Pusher()
        self._pushed: dict[tuple[int, int], int] = {}  # node and start of an extent -> pushed up to

    def news(self, node: int, start: int, end: int) -> int:
        """From where on the data of an extent, from ``start`` to ``end``, has not been pushed lately;
        from now on it has."""
        known = self._pushed.pop((node, start), start)
        if len(self._pushed) >= MAX_PUSHED:
            del self._pushed[next(iter(self._pushed))]
        self._pushed[node, start] = max(known, end)
        return known


class StreamedFile(AsyncFile):
    """An open file of a mount."""

    __slots__ = ("_node", "_streamer")

    def __init__(self, streamer: Streamer, inode: Inode, node: int) -> None:
        super().__init__(streamer.image, inode)
        self._streamer = streamer
        self._node = node

    def push_rest(self, start: int, end: int) -> None:
        """After a random read of ``[start, end)``, push the rest of the pcluster it lies in."""
        zmap = self.inode.zmap
        extent = None if zmap is None else zmap.last
        if extent is None or extent.kind != ENCODED or not extent.start <= start < extent.end:
            return
        if extent.length <= end - start:
            return
        decoded = self.image.memory.pclusters.get(
            pcluster(self.image.volume, self.inode, extent)[:5]
        )
        if decoded is None:
            return
        view = memoryview(decoded)[: extent.length]
        stop = extent.start + len(view)
        news = self._streamer.news(self._node, extent.start, stop)
        # around the pages that the kernel waits for
        if news < start:
            self._push(news, view[news - extent.start : start - extent.start])
        if end < stop:
            self._push(max(news, end), view[max(news, end) - extent.start :])

    def _push(self, offset: int, what: memoryview) -> None:
        self._streamer.pusher.push(self._node, offset, self.inode.size, what)

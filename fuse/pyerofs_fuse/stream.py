"""Files as the mount reads them: what had to be decoded anyway goes to the kernel.

After a random read, the rest of the pcluster that had to be decoded for it is pushed into the page
cache, so that later reads there need no request.  Sequential readers are left to READs: with a
read-ahead of 1 MiB the kernel asks sooner than a thread could push.
"""

from __future__ import annotations

from pyerofs.aio import AsyncFile, AsyncImage
from pyerofs.data import pcluster
from pyerofs.model import ENCODED, Extent, Inode
from pyerofs_fuse.push import Pusher

MAX_PUSHED = 1 << 15  # extents remembered as pushed; forgetting one costs a copy, nothing else


class Streamer:
    """What the files of one mount share."""

    def __init__(self, image: AsyncImage) -> None:
        self.image = image
        self.pusher = Pusher()
        self._pushed: dict[tuple[int, int], None] = {}  # node and offset of pushed extents

    def first_time(self, node: int, extent: Extent) -> bool:
        """Whether an extent has not been pushed lately; from now on it has."""
        key = (node, extent.start)
        if key in self._pushed:
            return False
        if len(self._pushed) >= MAX_PUSHED:
            del self._pushed[next(iter(self._pushed))]
        self._pushed[key] = None
        return True


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
        key = pcluster(self.image.volume, self.inode, extent)[:5]
        decoded = self.image.memory.pclusters.get(key)
        if decoded is None or len(decoded) < extent.length:
            return
        if self._streamer.first_time(self._node, extent):
            # around the pages that the kernel waits for
            view = memoryview(decoded)
            if extent.start < start:
                self._push(extent.start, view[: start - extent.start])
            if end < extent.end:
                self._push(end, view[end - extent.start : extent.length])

    def _push(self, offset: int, what: memoryview) -> None:
        self._streamer.pusher.push(self._node, offset, self.inode.size, what)

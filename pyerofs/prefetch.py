"""Prefetch for remote images: metadata, and the files that an earlier mount opened.

Prefetching only sends hints to the sources, which fetch while no reader is waiting for data.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterable, Sequence

import trio

from pyerofs.aio import AsyncImage
from pyerofs.errors import ErofsError
from pyerofs.format import tree
from pyerofs.format.memory import METABOX
from pyerofs.format.model import Inode
from pyerofs.format.ondisk import FT_DIR
from pyerofs.sources.base import SEGMENT_BITS, AsyncSource

log = logging.getLogger("pyerofs")

# metadata is prefetched from at most this many segments of 1 MiB, or from this share (an eighth) of
# the image, if that is more: some images scatter metadata everywhere
MIN_BUDGET = 64
BUDGET_SHARE = 8
CACHE_SIZE = 8 << 20  # bytes of memory for walking an image in ``prefetch_metadata_of``


async def prefetch_metadata(image: AsyncImage) -> None:
    """Prefetch inodes and directories, those near the root first.  Waits for the directories that it
    walks.  Logs errors."""
    try:
        metabox = image.volume.metabox
        if metabox is not None:
            await image.will_need(metabox, 0, metabox.size)
        await _walk(image)
    except ErofsError as e:
        log.warning("stopped prefetching metadata: %s", e)


async def prefetch_metadata_of(sources: Sequence[AsyncSource]) -> None:
    """``prefetch_metadata`` for front-ends that export bytes and have no AsyncImage.  Logs errors,
    also if the sources are not an EROFS image.  Does nothing if all sources are local."""
    if all(source.blocking is not None for source in sources):
        return
    async with trio.open_nursery() as nursery:
        image = AsyncImage(sources, nursery, CACHE_SIZE)
        try:
            await image.start()
            await prefetch_metadata(image)
        except ErofsError as e:
            log.info("no metadata is prefetched: %s", e)
        nursery.cancel_scope.cancel()


async def _walk(image: AsyncImage) -> None:
    hinted: set[int] = set()
    seen = {image.root.nid}
    budget = max(MIN_BUDGET, (image.memory.sizes[0] >> SEGMENT_BITS) // BUDGET_SHARE)
    waiting = deque([image.root])
    while waiting and len(hinted) < budget:
        parent = waiting.popleft()
        await image.will_need(parent, 0, parent.size)
        below: list[int] = []
        index = 0
        while entries := await image.block_entries(parent, index):
            index += 1
            for entry in entries:
                device, offset = image.volume.inode_position(entry.nid)
                segment = offset >> SEGMENT_BITS
                if device != METABOX and segment not in hinted:
                    hinted.add(segment)
                    image.inode_needed(entry.nid)
                if entry.file_type == FT_DIR and entry.nid not in seen:
                    seen.add(entry.nid)
                    below.append(entry.nid)
        for nid in below:
            inode = await image.inode(nid)
            if inode.is_dir:
                waiting.append(inode)


async def prefetch_paths(image: AsyncImage, paths: Iterable[str]) -> None:
    """Prefetch the data of files, in this order.  A path that fails is logged and skipped."""
    for path in paths:
        try:
            inode = await image.lookup(path)
            if inode.is_file:
                await image.will_need(inode, 0, inode.size)
        except ErofsError as e:
            log.info("not prefetched: %s", e)


async def paths_of(image: AsyncImage, nids: Collection[int]) -> list[str]:
    """A path of each inode, in the order of ``nids``; inodes not in the tree are left out.  Walks
    the tree.  Raises ErofsError."""
    wanted = set(nids)
    paths: dict[int, str] = {}
    trail = tree.Trail(image.root)
    while len(paths) < len(wanted) and (step := trail.next()) is not None:
        place, here = step
        directories: list[tuple[bytes, Inode]] = []
        async for entry in image.scandir(here):
            if entry.nid in wanted:
                paths.setdefault(entry.nid, "/" + tree.decode(place.path(entry.name)))
            if entry.file_type == FT_DIR:
                directories.append((entry.name, await image.inode(entry.nid)))
        trail.enter(directories)
    return [paths[nid] for nid in nids if nid in paths]

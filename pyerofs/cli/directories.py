"""Open directories below a target component by component, never following a link."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from pyerofs.format.tree import Place

OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEAR = 32  # levels at the top, of which each directory on the way stays open
STEP = 32  # levels between those that stay open further down


class Directories:
    """Opens the directories of Places below a target directory.  For one thread.

    The paths of a deep tree exceed PATH_MAX, so a directory is opened component by component.  Those on
    the way to the last one stay open, as shortcuts to what lies beside and below them."""

    def __init__(self, root: int) -> None:
        """``root``: the target's descriptor, which the caller closes."""
        self._root = root
        self._kept: dict[Place, int] = {}  # each is below the one before

    @contextmanager
    def opened(self, place: Place) -> Iterator[int]:
        """The descriptor of a Place's directory, closed at the end of the block.  Raises OSError."""
        fd = self._open(place)
        try:
            yield fd
        finally:
            os.close(fd)

    def _open(self, place: Place) -> int:
        way = []  # from the place up to one that was kept, or to the root
        here = place
        while here.parent is not None and here not in self._kept:
            way.append(here)
            here = here.parent
        self._forget(here.depth)
        fd = os.dup(self._kept.get(here, self._root))
        for deeper in reversed(way):
            try:
                below = os.open(deeper.name, OPEN, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
            if deeper.depth <= NEAR or deeper.depth % STEP == 0:
                self._kept[deeper] = os.dup(fd)
        return fd

    def _forget(self, depth: int) -> None:
        """Close those that are deeper."""
        while self._kept and (last := next(reversed(self._kept))).depth > depth:
            os.close(self._kept.pop(last))

    def close(self) -> None:
        self._forget(0)

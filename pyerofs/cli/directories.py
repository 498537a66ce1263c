"""Open directories below a target component by component, never following a link."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from pyerofs.format.tree import Place

OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
STEP = 32  # levels between directories that stay open on the way down


class Directories:
    """Opens the directories of Places below a target directory.  For one thread.

    The paths of a deep tree exceed PATH_MAX, so a directory is opened component by component.  Some
    directories on the way stay open, as shortcuts to others below them."""

    def __init__(self, root: int) -> None:
        """``root``: the target's descriptor, which the caller closes."""
        self._root = root
        self._kept: list[tuple[Place, int]] = []  # each below the one before

    @contextmanager
    def opened(self, place: Place) -> Iterator[int]:
        """The descriptor of a Place's directory, closed at the end of the block.  Raises OSError."""
        fd = self._open(place)
        try:
            yield fd
        finally:
            os.close(fd)

    def _open(self, place: Place) -> int:
        way = []  # from the place up to an open directory, or the root
        open_places = {id(kept): fd for kept, fd in self._kept}
        here = place
        while here.parent is not None and id(here) not in open_places:
            way.append(here)
            here = here.parent
        while self._kept and self._kept[-1][0].depth > here.depth:
            os.close(self._kept.pop()[1])
        fd = os.dup(open_places.get(id(here), self._root))
        for deeper in reversed(way):
            try:
                below = os.open(deeper.name, OPEN, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
            if deeper.depth % STEP == 0:
                self._kept.append((deeper, os.dup(fd)))
        return fd

    def close(self) -> None:
        while self._kept:
            os.close(self._kept.pop()[1])

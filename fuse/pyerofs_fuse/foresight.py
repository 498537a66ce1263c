"""Prepare what a walk will ask for next, while its client is busy with the last answer.

Programs that walk a tree enter the directories of a listing in the order of that listing.  As long as
one does, the next one is known, and its listing is prepared in the moment before its request comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

MAX_AHEAD = 1 << 14  # directories that are expected; beyond that, one is expected no more


class Foresight:
    """What is expected of whoever lists directories."""

    def __init__(self, prepare: Callable[[int], bool]) -> None:
        """``prepare`` does some of the work for the directory with a given node id; False if there is
        no more to do."""
        self._prepare = prepare
        self._expected: list[int] = []  # the next one last
        self._entered = -1  # the directory that was opened last, until it has been listed
        self._right = False  # whether the last one came as expected
        self._ready = False  # whether the next one is prepared

    def entered(self, node: int) -> None:
        """A directory is being opened."""
        expected = self._expected
        self._entered = node
        self._ready = False
        self._right = bool(expected) and expected[-1] == node
        if self._right:
            expected.pop()
        else:
            expected.clear()

    def listed(self, node: int, directories: Sequence[int]) -> None:
        """All of a directory has been handed out; these are in it."""
        if node == self._entered and len(self._expected) + len(directories) <= MAX_AHEAD:
            self._expected += reversed(directories)
            self._ready = False
        self._entered = -1

    def work(self) -> bool:
        """Do some of what can be done now; a fraction of a millisecond.  False if there is nothing."""
        if self._ready or not self._right or not self._expected:
            return False
        self._ready = not self._prepare(self._expected[-1])
        return True

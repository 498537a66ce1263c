"""Directories that are kept ready to be sent: how many, and whose."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("pyerofs_fuse")

from pyerofs_fuse import listings
from pyerofs_fuse.listings import Listing, Listings, Row
from pyerofs_fuse.processes.handles import Handles
from pyfuse3 import EntryAttributes

from pyerofs.format.model import Inode


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "MAX_ROWS", 100)


def listing(count: int) -> Listing:
    """A whole directory of so many entries."""
    found = Listing(Inode())
    rows: list[Row] = [(b"x", EntryAttributes(), 12 * (n + 1)) for n in range(count)]
    found.add(0, rows)
    found.add(12 * count, [])
    assert found.whole
    return found


def crew(size: int) -> list[Listings]:
    """What several processes have, as after a fork."""
    handles = Handles(size)
    found: list[Listings] = []
    for me in range(size):
        mine = copy.copy(handles)
        mine.me = me
        one = Listings(mine)
        one._rows = found[0]._rows if found else one._rows
        found.append(one)
    return found


def kept(one: Listings, nodes: range) -> list[int]:
    return [node for node in nodes if one.get(node) is not None]


def test_the_least_recently_read_go_first() -> None:
    (one,) = crew(1)
    for node in range(10):
        one.put(node, listing(10))
    assert kept(one, range(10)) == [*range(10)]
    one.get(0)
    one.put(10, listing(10))
    assert kept(one, range(11)) == [0, *range(2, 11)]


def test_who_needs_them_may_have_them_all() -> None:
    first, second = crew(2)
    for node in range(10):
        first.put(node, listing(10))
    assert kept(first, range(10)) == [*range(10)]
    for node in range(10):  # the other one still gets a part
        second.put(node, listing(10))
    assert kept(second, range(10)) == [8, 9]
    first.put(10, listing(10))  # and that is missing here
    assert kept(first, range(11)) == [*range(3, 11)]


def test_a_directory_that_grows() -> None:
    (one,) = crew(1)
    grows = Listing(Inode())
    for n in range(9):
        grows.add(
            12 * 10 * n, [(b"x", EntryAttributes(), 12 * (10 * n + i + 1)) for i in range(10)]
        )
        one.put(1, grows)
    one.put(2, listing(10))
    assert kept(one, range(3)) == [1, 2]
    one.put(3, listing(1))
    assert kept(one, range(4)) == [2, 3]


def test_a_directory_that_two_look_at_at_once_counts_once() -> None:
    (one,) = crew(1)
    for _ in range(100):
        one.put(1, listing(60))
    one.put(2, listing(40))
    assert kept(one, range(3)) == [1, 2]


def test_one_that_is_too_large_is_not_kept() -> None:
    (one,) = crew(1)
    one.put(1, listing(10))
    one.put(2, listing(101))
    assert kept(one, range(3)) == []

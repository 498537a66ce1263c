"""When and how far ahead of a reader a cached blob is fetched."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pyerofs.sources.base import SEGMENT
from pyerofs.sources.cache.ahead import NEAR, NEVER, WINDOW, ReadAhead

COUNT = 100
PIECE = 128 << 10


def read_on(ahead: ReadAhead, start: int, end: int, step: int = PIECE) -> list[range]:
    """What reading a range in steps has fetched ahead, without the empty ones."""
    found = (ahead.read(offset, step) for offset in range(start, end, step))
    return [r for r in found if r]


def test_a_first_read_fetches_nothing_ahead() -> None:
    assert not ReadAhead(COUNT).read(20 * SEGMENT, PIECE)


def test_a_read_at_the_start_is_no_sequential_one_yet() -> None:
    assert not ReadAhead(COUNT).read(0, PIECE)


def test_the_window_doubles_up_to_its_limit() -> None:
    fetched = read_on(ReadAhead(COUNT), 0, 60 * SEGMENT)
    assert [len(r) for r in fetched[:3]] == [2, 4, 7]
    assert max(len(r) for r in fetched) <= WINDOW
    assert fetched[-1].stop > 60 + WINDOW // 2


def test_nothing_is_left_out_and_nothing_fetched_twice() -> None:
    fetched = [n for r in read_on(ReadAhead(COUNT), 0, COUNT * SEGMENT) for n in r]
    assert fetched == list(range(1, COUNT))


def test_a_gap_may_be_left_out() -> None:
    ahead = ReadAhead(COUNT)
    ahead.read(5 * SEGMENT, PIECE)
    assert ahead.read(5 * SEGMENT + PIECE + NEAR, PIECE)
    ahead = ReadAhead(COUNT)
    ahead.read(5 * SEGMENT, PIECE)
    assert not ahead.read(5 * SEGMENT + PIECE + NEAR + 1, PIECE)


def test_a_jump_ends_it() -> None:
    ahead = ReadAhead(COUNT)
    read_on(ahead, 0, 4 * SEGMENT)
    assert ahead.trigger < NEVER
    assert not ahead.read(50 * SEGMENT, PIECE)
    assert ahead.trigger == NEVER


def test_answers_from_memory_move_it_on() -> None:
    ahead = ReadAhead(COUNT)
    read_on(ahead, 0, 4 * SEGMENT)
    at = ahead.trigger
    ahead.peeked(at + PIECE)
    fetched = ahead.crossed(at // SEGMENT)
    assert fetched
    assert fetched.start > at // SEGMENT
    assert ahead.trigger > at


def test_an_answer_from_far_beyond_ends_it() -> None:
    ahead = ReadAhead(COUNT)
    read_on(ahead, 0, 4 * SEGMENT)
    assert not ahead.crossed(COUNT - 1)
    assert ahead.trigger == NEVER


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 40 * SEGMENT), st.integers(1, 3 * SEGMENT), st.booleans())),
)
def test_whatever_is_read(count: int, reads: list[tuple[int, int, bool]]) -> None:
    """Only segments that there are, at most a window of them, and never behind the reader."""
    ahead = ReadAhead(count)
    for offset, length, cached in reads:
        offset %= count * SEGMENT
        end = min(offset + length, count * SEGMENT)
        if cached:
            ahead.peeked(end)
            fetched = ahead.crossed(offset // SEGMENT) if offset >= ahead.trigger else range(0)
        else:
            fetched = ahead.read(offset, end - offset)
            assert not fetched or fetched.start > (end - 1) // SEGMENT
        assert len(fetched) <= WINDOW + 1
        assert not fetched or (fetched.start >= 0 and fetched.stop <= count)

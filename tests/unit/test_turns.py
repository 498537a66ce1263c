"""Whose turn it is, and how many handles there are: what the processes of a mount share."""

from __future__ import annotations

import copy
import fcntl
import mmap
import os
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

pytest.importorskip("pyerofs_fuse")
if not hasattr(os, "eventfd"):
    pytest.skip("no eventfd", allow_module_level=True)

from pyerofs_fuse.processes.handles import SLOTS, Handles
from pyerofs_fuse.processes.turns import ALONE_NS, HANDED_OVER_NS, SELECT_LIMIT, Turns

PATIENCE = 30.0  # seconds
SHORT, LONG = ALONE_NS / 2, ALONE_NS * 2
WORKERS = 4


@pytest.fixture
def crew() -> Iterator[list[Turns]]:
    """What several processes have of the same turn, which is the first one's."""
    first = Turns(3)
    others = [copy.copy(first) for _ in range(2)]  # as after a fork
    for other in others:
        other.hold()
    yield [first, *others]
    os.close(first.fd)


@pytest.fixture
def queue() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe, in the place of the kernel's queue."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def is_free(turns: Turns) -> bool:
    """Whether whoever waits for the turn would wake."""
    return bool(select.select([turns.fd], (), (), 0)[0])


# --- alone ----------------------------------------------------------------------------------


def test_alone_it_always_is_ours(queue: tuple[int, int]) -> None:
    turns = Turns(1)
    assert not turns.shared
    assert turns.mine
    turns.queue, writer = queue
    for change in (turns.pass_on, turns.hold):
        change()
        assert turns.mine
        assert turns.take()
    assert turns.may_be_busy(SHORT)
    assert not turns.may_be_busy(LONG)
    os.write(writer, b"request")
    assert not turns.may_be_busy(SHORT)
    assert turns.mine
    assert turns.take()


def test_alone_it_needs_no_descriptor() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    turns = Turns(1)
    assert turns.fd < 0
    assert sorted(os.listdir("/proc/self/fd")) == before


# --- several --------------------------------------------------------------------------------


def test_exactly_one_has_it(crew: list[Turns]) -> None:
    first, second, third = crew
    assert [turns.take() for turns in crew] == [True, False, False]
    assert not is_free(first)
    first.pass_on()
    assert is_free(second)
    assert not first.mine
    assert [turns.take() for turns in (third, second, first)] == [True, False, False]
    assert [turns.mine for turns in crew] == [False, False, True]
    assert not is_free(first)


def test_who_had_it_may_take_it_again(crew: list[Turns]) -> None:
    crew[0].pass_on()
    assert [turns.take() for turns in crew] == [True, False, False]


def test_taking_twice_changes_nothing(crew: list[Turns]) -> None:
    assert crew[0].take()
    assert crew[0].take()
    crew[0].pass_on()
    assert [turns.take() for turns in crew] == [True, False, False]


def test_only_who_has_it_passes_it_on(crew: list[Turns]) -> None:
    """Or there would be two."""
    first, second, third = crew
    second.pass_on()
    assert third.may_be_busy(LONG)
    assert not is_free(first)
    first.pass_on()
    first.pass_on()
    assert [turns.take() for turns in crew] == [True, False, False]


def test_while_it_is_held_nobody_has_it(crew: list[Turns]) -> None:
    for turns in crew:
        turns.hold()
    assert not any(turns.take() for turns in crew)
    assert not is_free(crew[0])
    for turns in crew:
        turns.pass_on()
        assert turns.may_be_busy(SHORT)
    assert not any(turns.take() for turns in crew)
    crew[1].mine = True  # the one who starts it
    assert [turns.take() for turns in crew] == [False, True, False]
    crew[1].pass_on()
    assert [turns.take() for turns in crew] == [True, False, False]


def test_work_passes_it_on_while_something_waits(crew: list[Turns], queue: tuple[int, int]) -> None:
    first, second, _ = crew
    reader, writer = queue
    for turns in crew:
        turns.queue = reader
    assert first.idle()
    assert first.may_be_busy(SHORT)
    assert not is_free(second)

    os.write(writer, b"request")
    assert not first.idle()
    assert second.may_be_busy(SHORT)  # not its turn
    assert not is_free(second)
    assert first.may_be_busy(SHORT)
    assert is_free(second)
    assert [turns.take() for turns in (second, first)] == [True, False]

    os.read(reader, 100)
    assert second.may_be_busy(SHORT)
    assert not is_free(first)
    assert second.mine
    assert second.may_be_busy(LONG)
    assert is_free(first)
    assert not first.may_be_busy(HANDED_OVER_NS)


def test_work_passes_it_on_before_the_queue_is_known(crew: list[Turns]) -> None:
    assert not crew[0].idle()
    assert crew[0].may_be_busy(SHORT)
    assert [turns.take() for turns in crew[1:]] == [True, False]


def test_a_queue_that_select_can_not_look_at(crew: list[Turns], queue: tuple[int, int]) -> None:
    try:
        high = fcntl.fcntl(queue[0], fcntl.F_DUPFD_CLOEXEC, SELECT_LIMIT)
    except OSError:
        pytest.skip("not that many descriptors here")
    try:
        crew[0].queue = high
        assert not crew[0].idle()
        assert crew[0].may_be_busy(SHORT)
        assert not crew[0].mine
    finally:
        os.close(high)


def test_what_a_process_starts_does_not_inherit_it(crew: list[Turns]) -> None:
    assert not os.get_inheritable(crew[0].fd)


# --- across processes -----------------------------------------------------------------------


def run_forked(work: Callable[[int], None], count: int = WORKERS) -> None:
    """Call ``work(0)``, ``work(1)``, … in forked processes; fails if one raises or hangs."""
    pids = []
    for i in range(count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests
            pid = os.fork()
        if not pid:
            status = 1
            try:
                work(i)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    deadline = time.monotonic() + PATIENCE
    statuses: dict[int, int] = {}
    try:
        while len(statuses) < count and time.monotonic() < deadline:
            for pid in pids:
                if pid not in statuses:
                    gone, status = os.waitpid(pid, os.WNOHANG)
                    statuses |= {pid: status} if gone else {}
            time.sleep(0.005)
    finally:
        for pid in pids:
            if pid not in statuses:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    assert list(statuses.values()) == [0] * count


def shared_numbers(count: int) -> memoryview:
    return memoryview(mmap.mmap(-1, 8 * count)).cast("q")


def wait_for(turns: Turns) -> None:
    """As the event loop does, and as reluctant to go on waiting."""
    while not turns.take():
        select.select([turns.fd], (), (), PATIENCE)


def test_one_process_at_a_time() -> None:
    """They add to a number, which goes wrong if two do it at the same time."""
    rounds = 500
    turns = Turns(WORKERS)
    numbers = shared_numbers(2)  # the sum, who is adding

    def work(i: int) -> None:
        turns.mine = i == 0
        for _ in range(rounds):
            wait_for(turns)
            assert numbers[1] == 0
            numbers[1] = os.getpid()
            before = numbers[0]
            if before % 50 == 0:
                time.sleep(0.0005)  # let the others run
            numbers[0] = before + 1
            assert numbers[1] == os.getpid()
            numbers[1] = 0
            turns.pass_on()

    run_forked(work)
    assert numbers[0] == WORKERS * rounds
    turns.mine = False
    assert is_free(turns)
    assert turns.take()
    os.close(turns.fd)


def test_a_queue_of_requests_is_worked_off(queue: tuple[int, int]) -> None:
    """Each request is received once, whoever does it, and nobody blocks where another was faster."""
    turns = Turns(WORKERS)
    turns.queue, writer = queue
    received = shared_numbers(1001)

    def work(i: int) -> None:
        turns.mine = i == 0
        while True:
            wait_for(turns)
            while turns.take():
                if not select.select([turns.queue], (), (), PATIENCE)[0]:
                    raise TimeoutError
                (number,) = os.read(turns.queue, 1)  # blocks, if it was somebody else's turn
                if not number:
                    os.write(writer, b"\0")  # for the next one
                    turns.pass_on()
                    return
                received[i] += 1
                turns.may_be_busy(SHORT)

    os.write(writer, b"\1" * 2000 + b"\0")
    run_forked(work)
    assert sum(received) == 2000
    os.close(turns.fd)


# --- handles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("node", [1, 2, 36, SLOTS - 1, SLOTS, 2**40 + 7, 2**64 - 2, 2**64 - 1])
def test_counting(node: int) -> None:
    handles = Handles()
    assert handles.count(node) == 0
    for expected in (1, 2, 3):
        handles.opened(node)
        assert handles.count(node) == expected
    assert handles.count(node + 1) == handles.count(node - 1) == 0
    for expected in (2, 1, 0):
        handles.closed(node)
        assert handles.count(node) == expected


def test_nodes_that_share_a_count() -> None:
    """It may be too high, never too low."""
    handles = Handles()
    handles.opened(5)
    handles.opened(5 + SLOTS)
    assert handles.count(5) >= 1
    assert handles.count(5 + SLOTS) >= 1
    handles.closed(5)
    assert handles.count(5 + SLOTS) >= 1
    handles.closed(5 + SLOTS)
    assert handles.count(5) == handles.count(5 + SLOTS) == 0


def test_mounts_do_not_share_counts() -> None:
    one, two = Handles(), Handles()
    one.opened(7)
    assert two.count(7) == 0


def test_processes_share_counts() -> None:
    handles = Handles()
    handles.opened(7)

    def work(_: int) -> None:
        assert handles.count(7) == 1
        handles.opened(7)
        handles.closed(8 + SLOTS)

    for _ in range(3):
        handles.opened(8)
    run_forked(work, 1)
    assert handles.count(7) == 2
    assert handles.count(8) == 2


def test_a_count_is_never_too_low() -> None:
    """Whatever the others do, who has opened a file is counted; and in the end all are gone."""
    rounds = 400
    turns = Turns(WORKERS)
    handles = Handles()
    nodes = [3, 4, 3 + SLOTS]

    def work(i: int) -> None:
        turns.mine = i == 0
        held = dict.fromkeys(nodes, 0)
        for step in range(rounds):
            node = nodes[(step + i) % len(nodes)]
            wait_for(turns)
            handles.opened(node)
            turns.pass_on()
            held[node] += 1
            for each, count in held.items():
                assert handles.count(each) >= count
            if step % 3 == i % 3:
                other = max(held, key=lambda each: held[each])
                held[other] -= 1
                wait_for(turns)
                handles.closed(other)
                turns.pass_on()
        for node, count in held.items():
            for _ in range(count):
                wait_for(turns)
                handles.closed(node)
                turns.pass_on()

    run_forked(work)
    assert [handles.count(node) for node in nodes] == [0, 0, 0]
    os.close(turns.fd)


def test_an_error_is_the_first_one_only_once() -> None:
    """For all processes."""
    handles = Handles()
    assert handles.first_error(5)
    assert handles.first_error(None)
    child = os.fork()
    if not child:
        seen = handles.first_error(5) or handles.first_error(None) or not handles.first_error(7)
        os._exit(int(seen))
    assert os.waitpid(child, 0)[1] == 0
    assert not handles.first_error(7)
    assert handles.first_error(2**63 + 1)

"""Whatever a server sends ends in the right data or in an ErofsError of one printable line: within
its time, with little memory, and with nothing said where nobody listens.

A short, repeatable run of what ``run_exchanges.py`` does for hours, and the smallest exchange for
each defect that was found.  All are played by processes of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest

from tests.fuzz import exchanges as ex
from tests.fuzz.exchanges import Alteration, Exchange, Result
from tests.fuzz.known_exchanges import KNOWN, WAITING
from tests.fuzz.run_exchanges import Case, Job, Player, exchange_of

SEED, COUNT, PORTION, SECONDS = 9, 600, 60, 12.0
LEAST = 60  # exchanges that any machine can play in that time
TOGETHER = 16


@pytest.fixture(name="player", scope="module")
def start() -> Iterator[Player]:
    """Plays one exchange at a time."""
    with Player() as player:
        yield player


@pytest.fixture(name="many", scope="module")
def start_many() -> Iterator[Player]:
    """Plays several at a time."""
    with Player(TOGETHER) as player:
        yield player


def said(job: Job, result: Result) -> str:
    """For people who have to find out why."""
    lines = [str(exchange_of(job)), f"{result.outcome} in {result.seconds:.2f} s"]
    return "\n".join([*lines, *(f"{d.key}\n{d.details}" for d in result.defects)])


def broken(player: Player, jobs: Sequence[Job]) -> list[str]:
    """What broke when they were played."""
    results = player.play(jobs)
    return [said(job, results[job]) for job in jobs if results[job].defects]


def survive(player: Player, *jobs: Job) -> None:
    """Play exchanges, which break no promise."""
    found = broken(player, jobs)
    assert not found, f"{len(found)} of {len(jobs)}:\n" + "\n\n".join(found)


def test_honest_servers(player: Player) -> None:
    names = [name for name in KNOWN if name.startswith("honest")]
    assert len(names) >= len(ex.KINDS)
    results = player.play(names)
    for name in names:
        assert results[name].outcome == "data", said(name, results[name])
    survive(player, *names)


def test_cases_are_repeatable() -> None:
    for number in range(50):
        first, second = ex.case(SEED, number), ex.case(SEED, number)
        assert str(first) == str(second)
        assert first.rewriting == second.rewriting
    assert str(ex.case(SEED, 1)) != str(ex.case(SEED + 1, 1))


def test_the_harness_sees_wrong_data() -> None:
    """It would be worth little otherwise."""
    exchange = Exchange(0, "ranges", (Alteration("blob", "one bit", ex.flip_body(0.5)),))
    scene = ex.Scene(exchange, "127.0.0.1:1")
    request = ex.Request("GET", "/0/image", {"range": "bytes=0-1048575"})
    assert scene.answer(request).wire()[1]
    assert not ex.Scene(exchange, "127.0.0.1:1", honest=True).answer(request).wire()[1]
    assert ex.message_defects("a\x1bb", "x")
    assert ex.message_defects("a\ud800b", "x")
    assert not ex.message_defects("é, as it should be", "x")


@pytest.fixture(name="waited", scope="module")
def wait(many: Player) -> dict[Job, Result]:
    """What came of those that take a second each: all of them at a time."""
    return many.play(WAITING)


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in WAITING])
def test_smallest(player: Player, name: str) -> None:
    survive(player, name)


@pytest.mark.parametrize("name", WAITING)
def test_smallest_that_wait(waited: dict[Job, Result], name: str) -> None:
    assert not waited[name].defects, said(name, waited[name])


def test_a_short_run(many: Player) -> None:
    """The first cases of a seed, several at a time."""
    end = time.monotonic() + SECONDS
    found: list[str] = []
    played = 0
    while played < COUNT and time.monotonic() < end:
        found += broken(many, [Case(SEED, n) for n in range(played, played + PORTION)])
        played += PORTION
    assert not found, f"{len(found)} of {played}:\n" + "\n\n".join(found)
    assert played >= LEAST

"""Play many exchanges with servers that send anything, and report what broke:

    python -m tests.fuzz.run_exchanges --count 100000 --seed 1 --jobs 2

Case ``n`` of a seed is the same whenever it is run; ``--only n`` repeats it alone.  Players are
processes of their own with an address-space limit, and play several exchanges at a time.  Where
more than one of those may be to blame (a process that hangs or takes too much memory), each is
played again, alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

from tests.fuzz.exchanges import (
    HANG,
    KINDS,
    MIB,
    PATIENCE,
    TIMEOUT,
    Backstage,
    Defect,
    Exchange,
    Noises,
    Result,
    Stage,
    case,
    environment,
    limited,
    perform,
)
from tests.fuzz.known_exchanges import KNOWN
from tests.fuzz.run import forget_peak, resident

PEAK = 200 * MIB  # of a process, whatever it plays
STUCK = 2 * PATIENCE  # seconds without a word after which a process is ended
START = 30.0  # seconds that a process may take to begin
SLOWEST = 8  # cases to name
PORTION = 500  # exchanges between two looks at what is to be played again

# memory that is free goes back to the system, so that what is resident is what is in use
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072",
}  # fmt: skip


class Case(NamedTuple):
    """A case by its number, or only some of what goes wrong in it."""

    seed: int
    number: int
    kept: tuple[int, ...] | None = None  # None: all
    rewritten: bool = True

    def exchange(self) -> Exchange:
        whole = case(self.seed, self.number)
        if self.kept is None:
            return whole
        alterations = tuple(whole.alterations[i] for i in self.kept)
        rewriting = whole.rewriting if self.rewritten else None
        return replace(whole, alterations=alterations, rewriting=rewriting)

    def simpler(self) -> list[Case]:
        """The same with one thing that goes wrong, where there are several."""
        whole = self.exchange()
        rewritten = whole.rewriting is not None
        if len(whole.alterations) + rewritten < 2:
            return []
        found = [self._replace(kept=(i,), rewritten=False) for i in range(len(whole.alterations))]
        return found + ([self._replace(kept=())] if rewritten else [])


Job: TypeAlias = Case | str  # a name: one of KNOWN


def exchange_of(job: Job) -> Exchange:
    """What is to be played."""
    return KNOWN[job] if isinstance(job, str) else job.exchange()


# --- players ----------------------------------------------------------------------------------


@contextmanager
def rig(count: int) -> Iterator[tuple[list[Stage], Path, Noises]]:
    """Stages, a directory, and this process made ready."""
    warnings.filterwarnings("error", "Async generator 'pyerofs", ResourceWarning)
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("SSL_CERT_DIR", "PYEROFS_PASSWORD"):
            del os.environ[name]
    backstage, noises = Backstage(), Noises()
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, noises.listening():
            directory = Path(name)
            stages = [backstage.stage() for _ in range(count)]
            os.environ.update(environment(directory, stages))
            for number, kind in enumerate(KINDS):  # all modules, before memory is measured
                perform(stages[0], Exchange(number, kind), directory, noises)
            yield stages, directory, noises
    finally:
        backstage.close()


def serve(threads: int, orders: Connection) -> None:
    """Play what is ordered, so many at a time."""
    lock = threading.Lock()
    ended = [0.0]  # when an exchange came to its end

    def report(*words: object) -> None:
        with lock:
            orders.send(words)

    def play(stage: Stage, jobs: queue.SimpleQueue[Job | None], alone: bool) -> None:
        while (job := jobs.get()) is not None:
            report(job)
            result = perform(stage, exchange_of(job), directory, noises, alone=alone)
            if result.outcome != "stuck":
                ended[0] = time.monotonic()
            elif alone or time.monotonic() - ended[0] > HANG:
                os._exit(1)  # nothing else can go on
            else:
                result.defects = [replace(defect, sure=True) for defect in result.defects]
            peak = resident("VmHWM")
            if peak > PEAK:
                result.defects.append(Defect("Memory", f"{peak >> 20} MiB", sure=alone))
                forget_peak()
            report(job, result, peak)

    with rig(threads) as (stages, directory, noises), limited(), suppress(EOFError):
        report()
        while True:
            ordered = orders.recv()
            jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
            for job in (*ordered, *[None] * threads):
                jobs.put(job)
            forget_peak()
            players = [
                threading.Thread(target=play, args=(stage, jobs, len(ordered) == 1), daemon=True)
                for stage in stages
            ]
            for each in players:
                each.start()
            for each in players:
                each.join()
            report()


class Player:
    """A process that plays exchanges, and its successors.  ``stop`` it."""

    def __init__(self, threads: int = 1) -> None:
        self.peak = 0  # of memory, while nothing took more than it may
        self.innocent = 0  # exchanges that broke nothing when they were alone
        self._threads = threads
        self._process: SpawnProcess | None = None

    def __enter__(self) -> Player:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process.  Idempotent; the next order starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._orders.close()
            self._process = None

    def play(self, jobs: Sequence[Job]) -> dict[Job, Result]:
        """Play exchanges; those that may have disturbed each other once more, alone."""
        found: dict[Job, Result] = {}
        left = list(jobs)
        while left:
            begun, done = self._order(left)
            found |= done
            suspects = [job for job in begun if job not in done]
            left = [job for job in left if job not in begun]
            if len(jobs) == 1:
                break
            suspects += [j for j, r in done.items() if not all(d.sure for d in r.defects)]
            for job in suspects:
                found |= self.play([job])
                self.innocent += not found[job].defects
        for job in jobs:
            if job not in found:
                exchange = exchange_of(job)
                defect = Defect(f"Hang: the process is stuck: {exchange.kind}")
                found[job] = Result(
                    exchange.number, exchange.kind, "stuck", PATIENCE, defects=[defect]
                )
        return found

    def _order(self, jobs: Sequence[Job]) -> tuple[list[Job], dict[Job, Result]]:
        """The jobs that were begun, and the results of those that were done."""
        if self._process is None:
            self._start()
        begun: list[Job] = []
        done: dict[Job, Result] = {}
        try:
            self._orders.send(list(jobs))
            while words := self._hear(STUCK):
                job, *more = words
                if more:
                    done[job], peak = more
                    self.peak = max(self.peak, peak)
                else:
                    begun.append(job)
        except (EOFError, OSError):
            self.stop()
        return begun, done

    def _hear(self, seconds: float) -> tuple[Any, ...]:
        if not self._orders.poll(seconds):
            raise EOFError
        words: tuple[Any, ...] = self._orders.recv()
        return words

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        known = {name: os.environ.get(name) for name in ALLOCATOR}
        os.environ |= ALLOCATOR
        try:
            self._process = context.Process(target=serve, args=(self._threads, theirs), daemon=True)
            self._process.start()
        finally:
            for name, value in known.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        theirs.close()
        self._hear(START)


# --- many -------------------------------------------------------------------------------------


@dataclass
class Found:
    """A defect: how often, and the case that shows it best."""

    defect: Defect
    example: Case
    count: int = 0


@dataclass
class Tally:
    """What happened."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind
    slowest: list[tuple[float, int]] = field(default_factory=list)
    found: dict[str, Found] = field(default_factory=dict)
    tried: int = 0
    requests: int = 0
    sent: int = 0
    peak: int = 0
    innocent: int = 0
    seconds: float = 0.0

    def add(self, job: Case, result: Result) -> None:
        """Take a result in."""
        self.tried += 1
        self.outcomes[result.kind, result.outcome] += 1
        self.slowest = sorted([*self.slowest, (result.seconds, job.number)])[-SLOWEST:]
        self.requests += result.asked
        self.sent += result.sent
        for defect in result.defects:
            known = self.found.setdefault(defect.key, Found(defect, job))
            known.count += 1
            if known.count == 1:
                print(f"\n{defect.key}  (case {job.number})\n{defect.details}", flush=True)


def run(seed: int, count: int, jobs: int, threads: int) -> Tally:
    """Play the cases of a seed."""
    tally = Tally()
    start = shown = time.monotonic()
    starts = iter(range(0, count, PORTION))
    lock = threading.Lock()

    def play() -> None:
        nonlocal shown
        with Player(threads) as player:
            while True:
                with lock:
                    first = next(starts, None)
                if first is None:
                    break
                cases = [Case(seed, n) for n in range(first, min(first + PORTION, count))]
                results = player.play(cases)
                with lock:
                    for job in cases:
                        tally.add(job, results[job])
                    if time.monotonic() - shown > 30:
                        shown = time.monotonic()
                        rate = tally.tried / (shown - start)
                        print(
                            f"{tally.tried} tried, {rate:.0f} a second,"
                            f" {len(tally.found)} kinds of defects",
                            flush=True,
                        )
            with lock:
                tally.peak = max(tally.peak, player.peak)
                tally.innocent += player.innocent

    workers = [threading.Thread(target=play) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    tally.seconds = time.monotonic() - start
    return tally


def shrink(tally: Tally) -> None:
    """Leave out of the examples what does not matter."""
    with Player() as player:
        for found in tally.found.values():
            for job in found.example.simpler():
                result = player.play([job])[job]
                if any(_same(defect.key, found.defect.key) for defect in result.defects):
                    found.example = job
                    break


def _same(key: str, other: str) -> bool:
    """Whether they are of one cause, as far as that can be told."""
    return key == other or (key.startswith(("Hang", "Memory", "Greed")) and key[:4] == other[:4])


# --- command line -----------------------------------------------------------------------------


def table(tally: Tally, seed: int, threads: int) -> str:
    """The report."""
    names = sorted({outcome for _, outcome in tally.outcomes})
    kinds = sorted({kind for kind, _ in tally.outcomes})
    rows = [["", *names, "all"]]
    for kind in kinds:
        counts = [tally.outcomes[kind, name] for name in names]
        rows.append([kind, *map(str, counts), str(sum(counts))])
    sums = [sum(tally.outcomes[kind, name] for kind in kinds) for name in names]
    rows.append(["all", *map(str, sums), str(sum(sums))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [c.rjust(w) for c, w in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    rate = tally.tried / max(tally.seconds, 0.001)
    lines += [
        "",
        f"{tally.tried} exchanges (seed {seed}) in {tally.seconds:.0f} s: {rate:.0f} a second,"
        f" {tally.requests} requests, {tally.sent >> 20} MiB sent",
        f"peak memory of a process, which plays {threads} at a time: {tally.peak >> 20} MiB",
        "slowest: " + ", ".join(f"{s:.2f} s (case {n})" for s, n in reversed(tally.slowest)),
        f"{tally.innocent} were played again and broke nothing when they were alone",
        f"{sum(f.count for f in tally.found.values())} defects of {len(tally.found)} kinds:",
    ]
    for found in sorted(tally.found.values(), key=lambda f: -f.count):
        lines.append(f"  {found.count:6} x {found.defect.key}")
        lines += [f"           {text}" for text in str(found.example.exchange()).split("\n")]
    return "\n".join(lines)


def main() -> int:
    """Parse the arguments, run, report; 1 if anything broke."""
    parser = argparse.ArgumentParser(description="Play exchanges with servers that send anything.")
    parser.add_argument("--count", type=int, default=20_000, help="exchanges to play")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--threads", type=int, default=16, help="exchanges at a time in each")
    parser.add_argument("--only", type=int, help="play this case alone")
    parser.add_argument("--known", help="play this one of known_exchanges alone")
    args = parser.parse_args()
    if args.only is not None or args.known is not None:
        job: Job = args.known if args.known is not None else Case(args.seed, args.only)
        with Player() as player:
            result = player.play([job])[job]
        print(exchange_of(job))
        print(f"{result.outcome} in {result.seconds:.2f} s, peak {player.peak >> 20} MiB")
        for defect in result.defects:
            print(f"{defect.key}\n{defect.details}")
        return bool(result.defects)
    tally = run(args.seed, args.count, args.jobs, args.threads)
    shrink(tally)
    print()
    print(table(tally, args.seed, args.threads))
    print(f"(reads were given {TIMEOUT:g} s; {HANG:g} s counts as a hang)")
    return bool(tally.found)


if __name__ == "__main__":
    sys.exit(main())

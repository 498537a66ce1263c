"""Try many mutated images and report what broke:

    python -m tests.fuzz.run --count 200000 --seed 1 --jobs 2

Case ``n`` of a seed is the same whenever it is run, if the images and the other arguments are;
``--only n`` repeats it.
Workers run in processes of their own with an address-space limit, and a timer for each case, so
that a crash or an endless loop inside a codec is caught as well.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.fuzz import atlas
from tests.fuzz.exercise import WAYS, Hang, time_limit
from tests.fuzz.mutate import Patch, apply, mutate

MIB = 1 << 20
BATCH = 100  # cases between two reports of a worker
SLOWEST = 8  # cases to name


class TooMuchMemory(Exception):
    """A case needed more memory than the caches and the largest pcluster explain."""


class Case(NamedTuple):
    """One mutated image."""

    number: int
    subject: str
    patches: tuple[Patch, ...]
    sealed: bool
    way: str

    def image(self) -> bytes:
        """Its bytes."""
        return apply(atlas.subject(self.subject).image, self.patches, sealed=self.sealed)

    def __str__(self) -> str:
        sealed = "" if self.sealed else " (checksum as it was)"
        lines = [
            f"case {self.number}, {self.way}: {self.subject}{sealed}",
            *(p.what for p in self.patches),
        ]
        return "\n  ".join(lines)


def case(config: Config, number: int) -> Case:
    """The case of that number."""
    rng = Random(f"{config.seed}:{number}")
    name = rng.choice(config.subjects)
    patches = mutate(atlas.subject(name), rng)
    return Case(number, name, tuple(patches), rng.random() < 0.9, rng.choice(config.ways))


@dataclass
class Failure:
    """A bug: its first case, shrunk, and how often it was met."""

    title: str
    details: str
    example: Case
    count: int = 1


@dataclass
class Tally:
    """What happened in some cases."""

    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    results: Counter[str] = field(default_factory=Counter)
    failures: dict[str, Failure] = field(default_factory=dict)
    peak: int = 0  # bytes of resident memory
    most: tuple[int, int] = (0, -1)  # bytes that one case needed, its number
    slowest: list[tuple[float, int]] = field(default_factory=list)  # seconds, numbers

    def add(self, other: Tally) -> list[Failure]:
        """Take another tally in; returns the failures that are new."""
        self.tried += other.tried
        self.outcomes += other.outcomes
        self.results += other.results
        self.peak = max(self.peak, other.peak)
        self.most = max(self.most, other.most)
        self.note_slow(*other.slowest)
        new = []
        for key, failure in other.failures.items():
            if key in self.failures:
                self.failures[key].count += failure.count
            else:
                self.failures[key] = failure
                new.append(failure)
        return new

    def note_slow(self, *found: tuple[float, int]) -> None:
        """Keep the slowest cases."""
        self.slowest = sorted((*self.slowest, *found), reverse=True)[:SLOWEST]


@dataclass(frozen=True)
class Config:
    """What workers need to know."""

    seed: int
    count: int
    jobs: int
    seconds: float  # per case
    memory: int  # bytes per case
    subjects: tuple[str, ...]
    ways: tuple[str, ...]


# --- one case -----------------------------------------------------------------------------------


def resident(what: str = "VmRSS") -> int:
    """Bytes of resident memory: now (VmRSS) or at most since ``forget_peak`` (VmHWM)."""
    try:
        status = Path("/proc/self/status").read_text("ascii", "replace")
        return int(status.split(f"{what}:", 1)[1].split(None, 1)[0]) << 10
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def forget_peak() -> None:
    """Let VmHWM count from now on, where the kernel can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        pass


def attempt(config: Config, tried: Case, tally: Tally) -> tuple[str, str] | None:
    """Run one case; the key and the details of its failure, or None."""
    image, devices = tried.image(), atlas.subject(tried.subject).devices
    forget_peak()
    before, start = resident(), time.monotonic()
    try:
        with time_limit(config.seconds):
            outcome = WAYS[tried.way](image, devices, None)
        used = max(0, resident("VmHWM") - before)
        tally.peak = max(tally.peak, before + used)
        tally.most = max(tally.most, (used, tried.number))
        tally.note_slow((time.monotonic() - start, tried.number))
        tally.outcomes[outcome.kind] += 1
        tally.results.update({f"{tried.way} {k}": n for k, n in outcome.results.items()})
        if used > config.memory:
            raise TooMuchMemory(f"more than {config.memory >> 20} MiB")
    except (Exception, Hang, BaseExceptionGroup) as e:
        tally.outcomes[type(e).__name__] += 1
        return _key(e), "".join(traceback.format_exception(e, limit=-12))
    return None


def _key(e: BaseException) -> str:
    """What failures have in common that are one bug: the exception and who raised it."""
    frames = traceback.extract_tb(e.__traceback__)
    inside = [f for f in frames if "/pyerofs/" in f.filename] or frames
    if isinstance(e, Hang):  # the innermost frame is chance
        inside = inside[:2]
    where = f"{Path(inside[-1].filename).name}:{inside[-1].name}:{inside[-1].lineno}"
    message = str(e).split(":")[0] if isinstance(e, AssertionError) else ""
    within = f" of {type(e.exceptions[0]).__name__}" if isinstance(e, BaseExceptionGroup) else ""
    message = "".join(c for c in message if not c.isdigit())
    return f"{type(e).__name__}{within} in {where} {message}".strip()


def shrink(config: Config, failed: Case, key: str) -> Case:
    """The case with as few patches as still fail in the same way."""
    kept = list(failed.patches)
    i = 0
    while i < len(kept) and len(kept) > 1:
        fewer = failed._replace(patches=(*kept[:i], *kept[i + 1 :]))
        found = attempt(config, fewer, Tally())
        if found is not None and found[0] == key:
            del kept[i]
        else:
            i += 1
    return failed._replace(patches=tuple(kept))


# --- workers ------------------------------------------------------------------------------------


def work(config: Config, job: int, start: int, current: Any, reports: Connection) -> None:
    """Try this job's cases from number ``start`` on, in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in config.subjects:
        atlas.subject(name)
    limit = resident() + 4 * config.memory + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    tally = Tally()
    for number in range(start, config.count, config.jobs):
        current.value = number
        tried = case(config, number)
        tally.tried += 1
        found = attempt(config, tried, tally)
        if found is not None:
            key, details = found
            if key in tally.failures:
                tally.failures[key].count += 1
            else:
                tally.failures[key] = Failure(key, details, shrink(config, tried, key))
        if tally.tried == BATCH:
            reports.send(tally)
            tally = Tally(failures={k: _again(f) for k, f in tally.failures.items()})
    reports.send(tally)
    reports.close()


def _again(failure: Failure) -> Failure:
    """A known failure, not met yet since the last report."""
    return Failure(failure.title, failure.details, failure.example, 0)


class Worker:
    """A process that works, and its successors should it die."""

    def __init__(self, config: Config, job: int) -> None:
        self.config = config
        self.job = job
        self._context = multiprocessing.get_context("spawn")
        self._current = self._context.Value("q", job, lock=False)
        self._start(job)

    def _start(self, number: int) -> None:
        self.reports, theirs = self._context.Pipe(False)
        self._seen, self._since = -1, time.monotonic()
        self._current.value = number
        self._process: SpawnProcess = self._context.Process(
            target=work, args=(self.config, self.job, number, self._current, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def overdue(self) -> None:
        """Kill a process whose case ignores its timer: it loops inside a codec."""
        if self._seen != self._current.value:
            self._seen, self._since = self._current.value, time.monotonic()
        elif time.monotonic() - self._since > 60 + 5 * self.config.seconds:
            self._process.kill()

    def ended(self) -> Failure | None:
        """Tell why the process ended, if it did not mean to, and go on behind that case."""
        self.reports.close()
        self._process.join()
        if not self._process.exitcode:
            return None
        number = self._current.value
        title = f"worker died with {self._process.exitcode}"
        failed = case(self.config, number)
        self._start(number + self.config.jobs)
        return Failure(title, "", failed)


def run(config: Config, found: Callable[[Failure], None], tick: Callable[[Tally], None]) -> Tally:
    """Try all cases; call ``found`` for each new failure, ``tick`` now and then."""
    total = Tally()
    workers = {w.reports: w for w in (Worker(config, job) for job in range(config.jobs))}
    while workers:
        for reports in wait(list(workers), timeout=5):
            assert isinstance(reports, Connection)
            try:
                new = total.add(reports.recv())
            except EOFError:
                worker = workers.pop(reports)
                death = worker.ended()
                if death is not None:
                    workers[worker.reports] = worker
                new = [] if death is None else total.add(Tally(failures={str(death): death}))
            for failure in new:
                found(failure)
            tick(total)
        for worker in workers.values():
            worker.overdue()
    return total


# --- command line -------------------------------------------------------------------------------


def write(directory: Path, failure: Failure) -> None:
    """Keep a failing image, and how it came about beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = hashlib.sha256(f"{failure.title} {failure.example}".encode()).hexdigest()[:8]
    (directory / f"{stem}.erofs").write_bytes(failure.example.image())
    text = f"{failure.title}\n{failure.example}\n\n{failure.details}"
    (directory / f"{stem}.txt").write_text(text, "utf-8")


def summary(total: Tally, seconds: float) -> str:
    """The report."""
    rate = total.tried / max(seconds, 0.001)
    lines = [f"{total.tried} tried in {seconds:.0f} s ({rate:.0f}/s)"]
    lines += [f"  {n:8} {kind}" for kind, n in total.outcomes.most_common()]
    lines.append("operations:")
    lines += [f"  {n:10} {kind}" for kind, n in sorted(total.results.items())]
    lines.append(f"peak RSS {total.peak >> 20} MiB; most for one case {total.most[0] >> 20} MiB")
    lines[-1] += f" (case {total.most[1]})"
    slow = (f"{taken:.2f} s (case {number})" for taken, number in total.slowest)
    lines.append(f"slowest: {', '.join(slow)}")
    hangs = sum(f.count for k, f in total.failures.items() if k.startswith("Hang"))
    crashes = sum(f.count for f in total.failures.values()) - hangs
    lines.append(f"{crashes} crashes, {hangs} hangs, {len(total.failures)} kinds:")
    for failure in sorted(total.failures.values(), key=lambda f: -f.count):
        lines.append(f"  {failure.count:6} x {failure.title}; {failure.example}")
    return "\n".join(lines)


def main() -> int:
    """Parse the arguments, run, report; 1 if anything broke."""
    parser = argparse.ArgumentParser(description="Try many mutated EROFS images.")
    parser.add_argument("--count", type=int, default=20_000, help="cases to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10, help="limit for a case")
    parser.add_argument("--memory", type=int, default=96, help="limit for a case, MiB")
    parser.add_argument("--subjects", default="", help="only images whose name contains this")
    parser.add_argument("--ways", default="image,image,aio,check", help="of reading, by share")
    parser.add_argument("--only", type=int, help="run this case alone, without a net")
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"))
    args = parser.parse_args()
    config = Config(
        seed=args.seed,
        count=args.count,
        jobs=args.jobs,
        seconds=args.seconds,
        memory=args.memory * MIB,
        subjects=tuple(name for name in atlas.names() if args.subjects in name),
        ways=tuple(args.ways.split(",")),
    )
    if args.only is not None:
        single = case(config, args.only)
        print(single)
        print(WAYS[single.way](single.image(), atlas.subject(single.subject).devices, None))
        return 0
    start = shown = time.monotonic()

    def found(failure: Failure) -> None:
        print(f"\n{failure.title}\n{failure.example}\n{failure.details}", flush=True)
        write(args.out, failure)

    def tick(total: Tally) -> None:
        nonlocal shown
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            print(f"{total.tried} tried, {len(total.failures)} kinds of failures", flush=True)

    total = run(config, found, tick)
    print(summary(total, time.monotonic() - start))
    return bool(total.failures)


if __name__ == "__main__":
    sys.exit(main())

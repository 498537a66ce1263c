"""What all benchmarks share: options, programs, timing, and the report with its table and JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
IMAGES = HERE / "images"
MORE_IS_BETTER = {"MB/s"}
PACKAGES = ("pyerofs", "pyfuse3", "trio", "lz4", "zstandard", "isal")


# --- options ----------------------------------------------------------------------------------


def options(doc: str | None, *, rounds: int = 5, images: bool = True) -> argparse.ArgumentParser:
    """The options that all benchmarks understand, used or not."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if rounds:
        parser.add_argument("-n", "--rounds", type=int, default=None, help=f"default {rounds}")
    if images:
        parser.add_argument(
            "--images", type=Path, metavar="DIR", help="where images are, or are made if missing"
        )
        parser.add_argument(
            "--tree", type=Path, metavar="DIR", default=Path("/usr"),
            help="what to make images of, trimmed to 1 GB (default /usr)",
        )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="once and small: does it run?")
    parser.add_argument("--results", type=Path, metavar="DIR", help="where to save results")
    parser.set_defaults(default_rounds=rounds)
    return parser


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> Any:
    """The options, with the defaults that depend on ``--quick`` filled in."""
    args = parser.parse_args(words)
    quick = Path("quick") if args.quick else Path()  # never mixed up with the real thing
    if getattr(args, "rounds", 0) is None:
        args.rounds = 1 if args.quick else args.default_rounds
    if getattr(args, "images", 0) is None:
        args.images = IMAGES / quick
    if args.results is None:
        args.results = RESULTS / quick
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unmount on the way out
    return args


def say(text: str) -> None:
    """Tell how it goes, on stderr."""
    print(text, file=sys.stderr, flush=True)


def skip(why: str) -> NoReturn:
    """End a benchmark that can't be run here; that is no failure."""
    say(f"skipped: {why}")
    sys.exit(0)


# --- programs ---------------------------------------------------------------------------------


def find(program: str) -> str | None:
    """A program: the one beside this interpreter, or the one on PATH."""
    beside = Path(sys.executable).parent / program
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(program)


@dataclass(frozen=True)
class Ran:
    """How a program ran: wall clock, CPU seconds of all its threads, peak memory in MiB."""

    seconds: float
    cpu: float
    peak: float


def run(
    command: Sequence[str | os.PathLike[str]], sink: Callable[[int], None] | None = None
) -> Ran:
    """Run a program to its end.  ``sink`` gets a descriptor with its output, which is dropped
    otherwise.  Raises CalledProcessError."""
    start = time.perf_counter()
    out = subprocess.DEVNULL if sink is None else subprocess.PIPE
    child = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE)
    watch = _Watch(child)
    if child.stdout is not None and sink is not None:
        sink(child.stdout.fileno())
        child.stdout.close()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    errors = watch.end()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command, stderr=errors)
    return Ran(seconds, usage.ru_utime + usage.ru_stime, watch.peak)


class _Watch:
    """Looks at a child's memory (ru_maxrss would count its parent's) and empties its stderr."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.peak = 0.0
        self._child = child
        self._errors = b""
        self._threads = [threading.Thread(target=t) for t in (self._look, self._drain)]
        for thread in self._threads:
            thread.start()

    def _look(self) -> None:
        while self._child.returncode is None:
            self.peak = max(self.peak, peak_memory(self._child.pid))
            time.sleep(0.02)

    def _drain(self) -> None:
        assert self._child.stderr is not None
        with self._child.stderr as stream:
            self._errors = stream.read()

    def end(self) -> bytes:
        for thread in self._threads:
            thread.join()
        return self._errors


def memory(pid: int) -> float:
    """Memory of a process in MiB, or 0 if it is gone: what n processes share counts 1/n for each."""
    return _mib(f"/proc/{pid}/smaps_rollup", "Pss:")


def peak_memory(pid: int) -> float:
    """The most memory that a process has had so far, in MiB, with all that it shares."""
    return _mib(f"/proc/{pid}/status", "VmHWM:")


def _mib(path: str, field: str) -> float:
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    return 0.0


def cpu(pid: int) -> float:
    """CPU seconds that a process has used."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


# --- timing -----------------------------------------------------------------------------------


def timed(function: Callable[..., object], *args: object) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def per_call(function: Callable[[], object]) -> float:
    """Microseconds per call, over at least 0.2 seconds of calls."""
    calls, seconds = timeit.Timer(function).autorange()
    return seconds / calls * 1e6


def drop_caches(what: int = 3) -> None:
    """Make the kernel forget what it has read.  Root only."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text(f"{what}\n")


# --- report -----------------------------------------------------------------------------------


@dataclass
class Report:
    """What was measured: rows of samples by system.  Printed as a table of medians with ratios, and
    saved as JSON with all samples, and with what one has to know to compare them."""

    name: str
    title: str
    systems: Sequence[str]  # the columns
    against: Sequence[str]  # those to compare with
    ours: str = "pyerofs"
    notes: list[str] = field(default_factory=list)
    appendix: str = ""  # more Markdown
    rows: dict[tuple[str, str, str], dict[str, list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._load = os.getloadavg()[0]
        cores = len(os.sched_getaffinity(0))
        if self._load > cores / 4:
            self.note(f"the machine was busy before we began: load {self._load:.1f}, {cores} cores")

    def add(self, subject: str, what: str, unit: str, system: str, value: float) -> None:
        """One more sample."""
        self.rows.setdefault((subject, what, unit), {}).setdefault(system, []).append(value)

    def note(self, text: str) -> None:
        """Something that the reader of the table must know; said once."""
        if text not in self.notes:
            self.notes.append(text)
            say(f"note: {text}")

    def table(self) -> str:
        """The medians and ratios, as Markdown that reads well as it is."""
        shown = [s for s in self.systems if any(s in row for row in self.rows.values())]
        against = [s for s in self.against if s in shown]
        lines = [["", "", "unit", *shown, *(f"vs {s}" for s in against)]]
        before = ""
        subjects = list(dict.fromkeys(subject for subject, _, _ in self.rows))
        rows = sorted(self.rows.items(), key=lambda row: subjects.index(row[0][0]))
        for (subject, what, unit), row in rows:
            medians = {s: statistics.median(values) for s, values in row.items()}
            line = [subject if subject != before else "", what, unit]
            line += [number(medians[s]) if s in medians else "-" for s in shown]
            line += [self._ratio(medians, s, unit) for s in against]
            lines.append(line)
            before = subject
        return markdown(lines)

    def _ratio(self, medians: dict[str, float], other: str, unit: str) -> str:
        if self.ours not in medians or not medians.get(other) or not medians[self.ours]:
            return "-"
        ratio = medians[other] / medians[self.ours]
        return f"{1 / ratio if unit in MORE_IS_BETTER else ratio:.2f}"

    def finish(self, args: argparse.Namespace) -> None:
        """Print and save."""
        if not self.rows:
            skip("nothing could be measured")
        text = f"### {self.title}\n\n{self.table()}\n"
        if self.against:
            text += f"\nMedians; rounds: {args.rounds}.  Ratios: above 1, {self.ours} is better.\n"
        text += "".join(f"\n- {note}" for note in self.notes)
        text += f"\n\n{self.appendix}" if self.appendix else ""
        print(f"\n{text}")
        found = {
            "benchmark": self.name,
            "title": self.title,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "load": {"before": self._load, "after": os.getloadavg()[0]},
            "versions": versions(),
            "quick": args.quick,
            "notes": self.notes,
            "rows": [
                {"subject": subject, "what": what, "unit": unit, "samples": samples}
                for (subject, what, unit), samples in self.rows.items()
            ],
        }
        save(args.results, f"{self.name}.json", json.dumps(found, indent=1) + "\n")
        save(args.results, f"{self.name}.md", text.rstrip() + "\n")


def save(directory: Path, name: str, text: str) -> None:
    """Write a result."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)
    say(f"saved {name}")


def number(value: float) -> str:
    """Three digits that matter."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}"


def markdown(lines: list[list[str]]) -> str:
    """A table, its first line the header; text to the left, numbers to the right."""
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: list[str]) -> str:
        texts = [
            c.ljust(w) if i < 3 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(texts) + " |"

    rule = [f":{'-' * (w - 1)}" if i < 3 else f"{'-' * (w - 1)}:" for i, w in enumerate(widths)]
    return "\n".join([line(lines[0]), line(rule), *map(line, lines[1:])])


def machine() -> dict[str, object]:
    """What the numbers depend on, and nothing that tells whose machine it is."""
    model = platform.machine()
    with suppress(OSError):
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                model = text.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "root": os.geteuid() == 0,
    }


def versions() -> dict[str, str]:
    """Of all that takes part."""
    found = {"linux": platform.release(), "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    for program, word in (("fsck.erofs", "erofs-utils"), ("fusermount3", "libfuse")):
        if path := find(program):
            said = subprocess.run([path, "-V"], capture_output=True, text=True, check=False)
            numbers = [w for w in said.stdout.split() if w[0].isdigit()]
            found[word] = numbers[0] if numbers else "?"
    with suppress(OSError):
        git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
        said = subprocess.run(git, capture_output=True, text=True, check=False)
        if said.stdout:
            found["commit"] = said.stdout.strip()
    return found

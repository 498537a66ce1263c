"""Is this tree slower than another commit?  Compares mounts of both, in one run.

    python benchmarks/compare.py BASE [--only walk,random] [--codecs lz4hc] [-n ROUNDS]

The base takes part twice: how far its two measurements lie apart is the noise.  A measurement fails
if the median of this tree's times, relative to the base's in the same round, exceeds both the noise
and TOLERANCE.  Exit status 1 if one fails.
"""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import HERE, MORE_IS_BETTER, Report, options, parse, say
from mounting import Command, System
from mounts import PROBES, measure_all

TOLERANCE = 1.05
BASE, AGAIN, HERE_NOW = "base", "base again", "this tree"
CODECS = ("lz4hc", "zstd", "none")
LEFT_OUT = ("CPU", "memory")  # told, but they decide nothing
RUN = "from pyerofs_fuse.cli import run; run()"


def program(tree: Path, path: Path) -> Path:
    """A script that runs the pyerofs-fuse of a source tree with this interpreter."""
    places = ":".join(str(tree / part) for part in (".", "fuse", "nbd"))
    words = [sys.executable, "-c", RUN]
    path.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(places)} exec {shlex.join(words)} "$@"\n')
    path.chmod(0o755)
    return path


def slower(samples: dict[str, list[float]], unit: str) -> tuple[float, float]:
    """How many times slower this tree is than the base, and how far the base is from itself."""

    def ratios(system: str) -> list[float]:
        pairs = zip(samples[system], samples[BASE], strict=True)
        return [b / a if unit in MORE_IS_BETTER else a / b for a, b in pairs]

    noise = max(max(r, 1 / r) for r in ratios(AGAIN))
    return statistics.median(ratios(HERE_NOW)), noise


def failures(report: Report) -> list[str]:
    """The measurements in which this tree is slower beyond the noise."""
    found = []
    for (subject, what, unit), samples in report.rows.items():
        if any(word in what for word in LEFT_OUT) or len(samples) < 3:
            continue
        ratio, noise = slower(samples, unit)
        if ratio > max(noise, TOLERANCE):
            found.append(f"{subject}, {what}: {ratio:.2f} times slower (noise {noise:.2f})")
    return found


def main() -> int:
    """Measure, report; the exit status."""
    parser = options(__doc__)
    parser.add_argument("base", metavar="BASE", help="a commit")
    for name, known in (("only", PROBES), ("codecs", CODECS)):
        parser.add_argument(
            f"--{name}", type=lambda text: text.split(","), metavar="WHAT,...", default=list(known),
            help=f"of {', '.join(known)}",
        )  # fmt: skip
    args = parse(parser)
    args.cold = False
    report = Report(
        "compare", f"Compared with {args.base}", (BASE, AGAIN, HERE_NOW), (BASE,), HERE_NOW
    )
    git = ["git", "-C", str(HERE), "worktree"]
    with tempfile.TemporaryDirectory(prefix="pyerofs-bench-") as scratch:
        tree = Path(scratch, "base")
        subprocess.run([*git, "add", "--quiet", "--detach", tree, args.base], check=True)
        try:
            old = str(program(tree, Path(scratch, "old")))
            new = str(program(HERE.parent, Path(scratch, "new")))
            systems: list[System] = [
                Command(name, path) for name, path in ((BASE, old), (AGAIN, old), (HERE_NOW, new))
            ]
            measure_all(systems, args.codecs, args, report)
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)
    report.finish(args)
    found = failures(report)
    for line in found:
        say(f"slower: {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

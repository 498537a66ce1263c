"""Does the daemon's memory stay where it is?

Reads random places of random files of a mounted image, again and again, and lists directories, while
it watches the daemon.  Pages that were read are dropped at once, and as root also inodes and names
every few seconds, so that the daemon has to answer again and to forget.  The slope is fitted to the
second half, when the caches are full.
"""

from __future__ import annotations

import os
import random
import statistics
import time

from common import Report, drop_caches, options, parse, say, skip
from images import Images
from mounting import PYEROFS, CannotMount, Mount, commands, walk

READ = 64 << 10


def work(paths: list[str], rng: random.Random, until: float) -> int:
    """Read until it is time; returns how often."""
    done = 0
    while time.monotonic() < until:
        path = rng.choice(paths)
        if not done % 16:
            os.listdir(os.path.dirname(path))
        fd = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            os.pread(fd, READ, rng.randrange(size + 1) & -4096)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        done += 1
    return done


def slope(samples: list[tuple[float, float]]) -> float:
    """KiB per minute, of (seconds, MiB), by least squares over the second half."""
    half = samples[len(samples) // 2 :]
    if len(half) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*half, strict=True)).slope * 60 * 1024


def main() -> None:
    """Mount, read, watch, report."""
    parser = options(__doc__, rounds=0)
    parser.add_argument("--seconds", type=int, help="how long (default 120)")
    parser.add_argument("--every", type=int, help="seconds between looks (default 5)")
    parser.add_argument("--system", default=PYEROFS, help="what to watch (default: %(default)s)")
    args = parse(parser)
    seconds = args.seconds or (10 if args.quick else 120)
    every = args.every or (1 if args.quick else 5)

    report = Report("soak", f"Memory over {seconds} seconds", (args.system,), ())
    images = Images(args, report).all("tree", ("zstd",))
    system = next((s for s in commands(report) if s.name == args.system), None)
    if not images or system is None:
        skip("nothing to watch")
    try:
        with Mount(system, images["tree-zstd"]) as m:
            paths = walk(m.path)
            rng = random.Random(7)
            start = time.monotonic()
            samples: list[tuple[float, float]] = []
            done = 0
            while (passed := time.monotonic() - start) < seconds:
                samples.append((passed, m.memory()))
                say(f"{passed:5.0f} s {done:9,} reads {samples[-1][1]:8.1f} MiB")
                done += work(paths, rng, start + passed + every)
                if os.geteuid() == 0:
                    drop_caches(2)
            samples.append((passed, m.memory()))
    except CannotMount as e:
        skip(f"{args.system}: {e}")
    facts = [
        ("reads", "1/s", done / samples[-1][0]),
        ("memory after the first walk", "MiB", samples[0][1]),
        ("memory at the end", "MiB", samples[-1][1]),
        ("peak memory", "MiB", max(mib for _, mib in samples)),
        ("slope of the second half", "KiB/min", slope(samples)),
    ]
    for what, unit, value in facts:
        report.add("tree-zstd", what, unit, args.system, value)
    for passed, mib in samples:
        report.add("tree-zstd", f"after {passed:.0f} s", "MiB", args.system, mib)
    report.finish(args)


if __name__ == "__main__":
    main()

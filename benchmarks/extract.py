"""How fast are the commands that go through a whole image?

``pyerofs extract`` and ``check`` against ``fsck.erofs``, which does both, in turn; ``pyerofs tar`` by
itself.  Images come from the page cache; what is extracted goes to ``--scratch``.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import Report, find, options, parse, run, say
from images import CODECS, Images
from mounting import READ, warm

PYEROFS, FSCK = SYSTEMS = ("pyerofs", "fsck.erofs")

# Both extract owners, modes and times, but no extended attributes; fsck.erofs 1.9.3 extracts images
# with fragments only when told a path.
WORDS: dict[str, dict[str, Callable[[Path, str], list[str | Path]]]] = {
    "extract": {
        PYEROFS: lambda image, out: ["extract", "--quiet", "--no-xattrs", image, "-C", out],
        FSCK: lambda image, out: ["--path=/", f"--extract={out}", "--preserve", image],
    },
    "check": {
        PYEROFS: lambda image, out: ["check", "--quiet", image],
        FSCK: lambda image, out: ["--extract", image],
    },
    "tar": {PYEROFS: lambda image, out: ["tar", image]},
}


def measure(
    report: Report, name: str, image: Path, what: str, system: str, out: Path | None
) -> None:
    """Run one command once."""
    program = find(system)
    if program is None:
        report.note(f"{system} is not on PATH: skipped")
        return
    size = 0

    def count(fd: int) -> None:
        nonlocal size
        buffer = bytearray(READ)
        while n := os.readv(fd, [buffer]):
            size += n

    warm(image)
    os.sync()  # what others have written must not be ours to wait for
    with tempfile.TemporaryDirectory(prefix="pyerofs-bench-", dir=out) as scratch:
        try:
            words = WORDS[what][system](image, scratch)
            ran = run([program, *words], count if what == "tar" else None)
        except subprocess.CalledProcessError as e:
            said = e.stderr.decode("utf-8", "replace").strip().splitlines()
            report.note(f"{system} fails to {what} {name}: {said[-1] if said else e.returncode}")
            return
    report.add(name, what, "s", system, ran.seconds)
    if size:
        report.add(name, what, "MB/s", system, size / ran.seconds / 1e6)
    report.add(name, f"{what}: CPU", "s", system, ran.cpu)
    report.add(name, f"{what}: peak memory", "MiB", system, ran.peak)


def main() -> None:
    """Measure, report."""
    parser = options(__doc__, rounds=4)  # even: each system is the first as often
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="default: as Python's tempfile")
    args = parse(parser)
    report = Report("extract", "Whole images", SYSTEMS, (FSCK,))
    report.note("tar: bytes of the stream per second, through a pipe")
    report.note("check: fsck.erofs decodes what is compressed, and does not look at other data")
    images = Images(args, report).all("tree", ("zstd",) if args.quick else CODECS)
    for number in range(args.rounds):
        for what, systems in WORDS.items():
            say(f"round {number + 1} of {args.rounds}: {what}")
            for name, image in images.items():
                for system in list(systems)[:: -1 if number % 2 else 1]:
                    measure(report, name, image, what, system, args.scratch)
    report.finish(args)


if __name__ == "__main__":
    main()

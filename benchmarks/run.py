"""Run all benchmarks, one after another.  Nothing else should run on the machine meanwhile.

Results go to results/: a table (NAME.md) and all samples (NAME.json) of each.  With ``--quick`` they
go to results/quick/, take a few minutes, and mean nothing.
"""

from __future__ import annotations

import subprocess
import sys

from common import HERE, options, say

BENCHMARKS = ("startup", "library", "mounts", "extract", "growth", "soak", "remote", "nbd")
WITHOUT_IMAGES = {"startup", "growth", "nbd"}
WITHOUT_ROUNDS = {"soak"}


def main() -> int:
    """Run them all; returns 1 if any failed."""
    parser = options(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    args = parser.parse_args()
    failed = []
    for name in args.names or BENCHMARKS:
        words = ["--quick"] if args.quick else []
        if args.results:
            words += ["--results", args.results]
        if args.rounds and name not in WITHOUT_ROUNDS:
            words += ["--rounds", str(args.rounds)]
        if name not in WITHOUT_IMAGES:
            words += ["--tree", args.tree]
            words += ["--images", args.images] if args.images else []
        say(f"== {name}")
        if subprocess.run([sys.executable, HERE / f"{name}.py", *words], check=False).returncode:
            failed.append(name)
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

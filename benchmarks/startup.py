"""How long until it runs?

The bare interpreter, ``--version``, the way from the command to the first listing of the mount, and
which imports take the time.  The mounted image is a small one, so that only starting counts.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

from common import HERE, Report, find, markdown, number, options, parse, say, timed
from images import CannotMake, make
from mounting import EROFSFUSE, KERNEL, PYEROFS, CannotMount, Mount, commands

PYTHON = "python -c pass"
TOP = 15


def imports(module: str) -> str:
    """What an import needs, the slowest first, as a table."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    rows = []
    for line in said.splitlines():
        own, _, rest = line.removeprefix("import time:").partition("|")
        total, _, name = rest.partition("|")
        if own.strip().isdigit():
            rows.append((int(own) / 1e3, int(total) / 1e3, name.strip()))
    rows.sort(reverse=True)
    lines = [["import", "", "unit", "itself", "with what it imports"]]
    lines += [[name, "", "ms", number(own), number(total)] for own, total, name in rows[:TOP]]
    lines.append(["all", "", "ms", number(sum(own for own, _, _ in rows)), ""])
    return f"`import {module}`, once, under `-X importtime`:\n\n{markdown(lines)}"


def silent(command: list[str]) -> None:
    """Run a command and drop what it says."""
    subprocess.run(command, capture_output=True, check=False)


def empty(stream: BinaryIO) -> None:
    """A tar stream with nothing in it."""
    stream.write(bytes(1024))


def main() -> None:
    """Measure, report."""
    args = parse(options(__doc__, rounds=15, images=False))
    report = Report(
        "startup", "Start-up", (KERNEL, EROFSFUSE, PYEROFS, PYTHON), (EROFSFUSE, PYTHON)
    )
    systems = commands(report)
    shortest = {PYTHON: [sys.executable, "-c", "pass"]}
    for system, program in ((EROFSFUSE, "erofsfuse"), (PYEROFS, "pyerofs-fuse")):
        if path := find(program):
            shortest[system] = [path, "--version"]
    with tempfile.TemporaryDirectory(prefix="pyerofs-bench-") as scratch:
        image = Path(scratch, "empty.erofs")
        try:
            make(image, [], empty)
        except CannotMake as e:
            image = HERE.parent / "tests/images/plain.erofs"
            report.note(f"mounts a small image of the tests: {e}")
        for number in range(args.rounds):
            say(f"round {number + 1} of {args.rounds}")
            for system, command in shortest.items():
                report.add("", "--version", "ms", system, timed(silent, command) * 1e3)
            for each in systems:
                try:
                    with Mount(each, image) as m:
                        report.add("", "mount to first ls", "ms", each.name, m.first_ls * 1e3)
                        if memory := m.memory():
                            report.add("", "daemon memory then", "MiB", each.name, memory)
                except CannotMount as e:
                    report.note(f"{each.name}: {e}")
    report.appendix = imports("pyerofs_fuse.serve")
    report.finish(args)


if __name__ == "__main__":
    main()

"""The mounts that a process sees, from /proc/PID/mountinfo (proc(5))."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    device: str  # MAJOR:MINOR, as st_dev has it
    where: str  # the mount point
    kind: str  # the type of file system
    source: str
    options: str  # of the mount, then of its superblock, separated by commas


def mounts(pid: int | str = "self") -> list[Mount]:
    """All mounts in the namespace of a process, in the order of mounting; [] if mountinfo can't be
    read."""
    try:
        with open(f"/proc/{pid}/mountinfo", errors="surrogateescape") as f:
            return parse(f.read())
    except OSError:
        return []


def topmost(where: str) -> Mount | None:
    """The mount at a mount point that hides any others there; None if there is none."""
    return next((mount for mount in reversed(mounts()) if mount.where == where), None)


def of_file(fd: int) -> Mount | None:
    """A mount of the file system that an open file is on; None if there is none."""
    number = os.fstat(fd).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    return next((mount for mount in mounts() if mount.device == device), None)


def parse(text: str) -> list[Mount]:
    """The mounts that a mountinfo file lists.  Malformed lines are skipped."""
    found = []
    for line in text.splitlines():
        fields = line.split(" ")
        if "-" not in fields[6:]:  # "-" ends the optional fields
            continue
        at = fields.index("-", 6)
        if len(fields) < at + 4:
            continue
        kind, source, superblock = fields[at + 1 : at + 4]
        options = f"{fields[5]},{superblock}"
        found.append(Mount(fields[2], unescape(fields[4]), kind, unescape(source), options))
    return found


def unescape(field: str) -> str:
    """A field without the kernel's octal escapes for blanks and backslashes."""
    return os.fsdecode(
        re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8) & 255]), os.fsencode(field))
    )

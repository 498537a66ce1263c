"""A coverage-guided target for long runs; needs the ``atheris`` package:

    python -m tests.fuzz.atheris_target corpus-directory -max_total_time=3600

An input is no image but what to change in one: a subject, a way to read it, and edits of its fields
or bytes.  Inputs stay small, and what libFuzzer does to them is always a change of some field.
``--show FILE`` tells what an input, such as one that crashed, stands for.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from tests.fuzz import atlas
from tests.fuzz.exercise import WAYS, Limits, time_limit
from tests.fuzz.mutate import Patch, apply, put

HEAD = struct.Struct("<BB")  # subject; way, and whether to fit the checksum
EDIT = struct.Struct("<HHQ")  # label (the highest: a byte), which field of it, value
BYTE = 0xFF00
MAX_EDITS = 16
SECONDS = 10
LIMITS = Limits(entries=200, file_bytes=1 << 17, all_bytes=1 << 20, extents=100)

Input = tuple[atlas.Subject, str, list[Patch], bool]


def parse(data: bytes) -> Input | None:
    """What an input stands for: a subject, a way, patches, and whether the checksum is fitted."""
    if len(data) < HEAD.size:
        return None
    number, flags = HEAD.unpack_from(data)
    names = atlas.names()
    subject = atlas.subject(names[number % len(names)])
    end = HEAD.size + MAX_EDITS * EDIT.size
    way = sorted(WAYS)[(flags & 0x7F) % len(WAYS)]
    return subject, way, list(_patches(subject, data[HEAD.size : end])), flags < 0x80


def _patches(subject: atlas.Subject, edits: bytes) -> Iterator[Patch]:
    whole = len(edits) - len(edits) % EDIT.size
    for label, which, value in EDIT.iter_unpack(edits[:whole]):
        if label >= BYTE:
            at = (value >> 8) % len(subject.image)
            yield Patch(at, 1, bytes([value & 0xFF]), f"byte at {at:#x}: {value & 0xFF:#x}")
            continue
        fields = subject.fields[subject.labels[label % len(subject.labels)]]
        yield put(subject, fields[which % len(fields)], value)


def one_input(data: bytes) -> None:
    """Read what an input stands for; libFuzzer's entry point."""
    found = parse(data)
    if found is None:
        return
    subject, way, patches, sealed = found
    image = apply(subject.image, patches, sealed=sealed)
    with time_limit(SECONDS):
        WAYS[way](image, subject.devices, LIMITS)


def main() -> None:
    """Fuzz until stopped, or show an input."""
    if sys.argv[1:2] == ["--show"]:
        found = parse(Path(sys.argv[2]).read_bytes())
        if found is not None:
            subject, way, patches, sealed = found
            print(f"{way}: {subject.name}, checksum {'fitted' if sealed else 'as it was'}")
            print("\n".join(patch.what for patch in patches))
        return
    atheris = import_module("atheris")  # only here: it is no dependency of the tests

    for name in atlas.names():
        atlas.subject(name)
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

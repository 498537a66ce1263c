"""Deterministic mutations of a good image: the same ``random.Random`` gives the same patches.

A mutator takes a Subject and a Random and returns patches.  *Blind* ones know nothing of EROFS;
*field-aware* ones set what the atlas lists to values that break readers.  Patches are applied from
the first to the last, so that a failing case shrinks by leaving patches out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random
from typing import NamedTuple

from tests.fuzz.atlas import Field, Subject, seal

BLOCK = 512  # the smallest block: what blind mutators move about


class Patch(NamedTuple):
    """At ``at``, ``drop`` bytes give way to ``put``; ``what`` says why."""

    at: int
    drop: int
    put: bytes
    what: str


Mutator = Callable[[Subject, Random], list[Patch]]


def apply(image: bytes, patches: Iterable[Patch], *, sealed: bool = True) -> bytes:
    """The patched image; ``sealed``: with a superblock checksum that fits."""
    out = bytearray(image)
    for patch in patches:
        out[patch.at : patch.at + patch.drop] = patch.put
    return seal(bytes(out)) if sealed else bytes(out)


def mutate(subject: Subject, rng: Random) -> list[Patch]:
    """One to four mutations; two of three are field-aware."""
    found = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        found += rng.choice(FIELD_AWARE if rng.random() < 0.7 else BLIND)(subject, rng)
    return found


# --- blind ------------------------------------------------------------------------------------


def _place(image: bytes, rng: Random) -> int:
    """An offset; often near the start, where the metadata is."""
    return rng.randrange(rng.choice((len(image), min(len(image), 16 << 10))))


def flip_bits(subject: Subject, rng: Random) -> list[Patch]:
    """Up to eight flipped bits, near one another."""
    image, start = subject.image, _place(subject.image, rng)
    found = {}
    for _ in range(rng.randint(1, 8)):
        at = min(start + rng.randrange(16), len(image) - 1)
        found[at] = bytes([image[at] ^ 1 << rng.randrange(8)])
    return [Patch(at, 1, put, "flip bits") for at, put in found.items()]


def set_bytes(subject: Subject, rng: Random) -> list[Patch]:
    """A few bytes set to one value, or to any."""
    at, n = _place(subject.image, rng), rng.choice((1, 1, 2, 4, 8, 32))
    put = rng.choice((b"\0" * n, b"\xff" * n, b"\x80" * n, rng.randbytes(n)))
    return [Patch(at, n, put, "set bytes")]


def truncate(subject: Subject, rng: Random) -> list[Patch]:
    """An end that comes too early, mostly at a block's border."""
    at = _place(subject.image, rng)
    at -= at % BLOCK if rng.random() < 0.7 else 0
    return [Patch(at, len(subject.image) - at, b"", f"truncate at {at:#x}")]


def zero(subject: Subject, rng: Random) -> list[Patch]:
    """A lost block, or several."""
    at, n = _place(subject.image, rng) // BLOCK * BLOCK, BLOCK << rng.randrange(6)
    return [Patch(at, n, bytes(n), f"zero {n} bytes at {at:#x}")]


def swap_blocks(subject: Subject, rng: Random) -> list[Patch]:
    """Two blocks in each other's place."""
    image, size = subject.image, BLOCK << rng.randrange(4)
    one, two = (_place(image, rng) // size * size for _ in range(2))
    return [
        Patch(one, size, image[two : two + size], f"swap {one:#x} and {two:#x}"),
        Patch(two, size, image[one : one + size], f"swap {two:#x} and {one:#x}"),
    ]


def splice(subject: Subject, rng: Random) -> list[Patch]:
    """A piece copied elsewhere, over what is there or in between; or a piece left out."""
    image, n = subject.image, 1 << rng.randrange(12)
    at, origin = _place(image, rng), _place(image, rng)
    how = rng.randrange(3)
    drop, put = ((n, image[origin : origin + n]), (0, image[origin : origin + n]), (n, b""))[how]
    return [Patch(at, drop, put, ("copy", "insert", "leave out")[how] + f" {n} bytes at {at:#x}")]


BLIND: tuple[Mutator, ...] = (flip_bits, set_bytes, truncate, zero, swap_blocks, splice)

# --- field-aware ------------------------------------------------------------------------------


def interesting(subject: Subject, field: Field, rng: Random) -> int:
    """A value that a field is likely to be mishandled with."""
    now, sign = field.get(subject.image), 1 << field.width - 1
    power = 1 << rng.randrange(field.width)
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice((0, 1, 2, 2 * sign - 1, 2 * sign - 2, sign, sign - 1, sign + 1))
    if kind == 1:
        return now + rng.choice((-1, 1, -2, 2, now, -now // 2, -2 * now, 1 << 12, -1 << 12))
    if kind == 2:
        return now ^ rng.choice((power, sign, 2 * sign - 1, 1 << field.width // 2))
    if kind == 3:
        return power + rng.choice((-1, 0, 1))
    if kind == 4:  # something that exists: itself, a special inode, a block, the end
        return rng.choice((field.nid, field.nid | 1 << 63, field.at >> 12, field.at, *(
            rng.choice(subject.numbers) for _ in range(8)
        )))  # fmt: skip
    return rng.getrandbits(field.width)


def put(subject: Subject, field: Field, value: int) -> Patch:
    """Give one field another value."""
    value &= (1 << field.width) - 1
    old = field.get(subject.image)
    what = f"{field.label} of nid {field.nid} at {field.at:#x}: {old:#x} -> {value:#x}"
    return Patch(field.at, field.size, field.put(subject.image, value), what)


def pick(subject: Subject, rng: Random) -> Field:
    """A field; each kind of record is as likely as another, however many there are."""
    record = rng.choice(sorted({label.split(".")[0] for label in subject.labels}))
    label = rng.choice([label for label in subject.labels if label.startswith(f"{record}.")])
    return rng.choice(subject.fields[label])


def set_field(subject: Subject, rng: Random) -> list[Patch]:
    """One field, an interesting value."""
    field = pick(subject, rng)
    return [put(subject, field, interesting(subject, field, rng))]


def set_everywhere(subject: Subject, rng: Random) -> list[Patch]:
    """The same value in up to 64 fields of one kind."""
    field = pick(subject, rng)
    value = interesting(subject, field, rng)
    fields = subject.fields[field.label]
    return [put(subject, f, value) for f in rng.sample(fields, min(len(fields), 64))]


def set_record(subject: Subject, rng: Random) -> list[Patch]:
    """Several fields of one inode: what one field hides, another shows."""
    nid = pick(subject, rng).nid
    fields = [f for label in subject.labels for f in subject.fields[label] if f.nid == nid]
    return [
        put(subject, f, interesting(subject, f, rng))
        for f in rng.sample(fields, min(len(fields), rng.randint(2, 5)))
    ]


def graft(subject: Subject, rng: Random) -> list[Patch]:
    """A field's value from another of its kind: loops, shared blocks, foreign names."""
    field = pick(subject, rng)
    other = rng.choice(subject.fields[field.label])
    return [put(subject, field, other.get(subject.image))]


def transplant(subject: Subject, rng: Random) -> list[Patch]:
    """A whole inode, as another one."""
    labels = [label for label in subject.labels if label.endswith("-inode.i_format")]
    one, two = (rng.choice(subject.fields[rng.choice(labels)]) for _ in range(2))
    record = subject.image[two.at : two.at + rng.choice((32, 64, 128))]
    what = f"inode of nid {two.nid} over nid {one.nid} at {one.at:#x}"
    return [Patch(one.at, len(record), record, what)]


FIELD_AWARE: tuple[Mutator, ...] = (
    set_field, set_field, set_field, set_field, set_everywhere, set_record, graft, transplant,
)  # fmt: skip

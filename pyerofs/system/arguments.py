"""Split a command line into operands, options and mount options, as mount helpers read it.

The daemons use this rather than argparse: mount(8) passes options in any order and ``-o`` words that
only a table can tell apart, source options count in the order in which they come, and argparse takes
longer to import than a mount takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import NamedTuple


class UsageError(Exception):
    """The command line is invalid; the message says why."""


class Takes(Enum):
    """Whether a long option takes a value."""

    NOTHING = "nothing"
    VALUE = "value"  # --name=value, or the next word
    JOINED = "joined"  # --name=value, or none at all


class Operand(NamedTuple):
    """A word that is no option."""

    text: str


class Option(NamedTuple):
    """A long option, or what a letter stands for."""

    name: str
    value: str | None

    @property
    def text(self) -> str:
        """The value of an option that takes one."""
        assert self.value is not None
        return self.value


class MountOption(NamedTuple):
    """One of the comma-separated words of ``-o``; ``value`` is None where it has no ``=``."""

    name: str
    value: str | None
    word: str


def read(
    words: list[str],
    takes: Mapping[str, Takes],
    letters: Mapping[str, str],
) -> Iterator[Operand | Option | MountOption]:
    """The words in the order in which they come; ``--`` makes operands of all that follow it.

    ``takes`` has the long options, and ``letters`` what each letter stands for.  Raises UsageError."""
    rest = iter(words)
    for word in rest:
        if word == "--":
            yield from map(Operand, rest)
        elif word.startswith("--"):
            yield _long(word[2:], takes, rest)
        elif word.startswith("-o"):
            for part in filter(None, split_words(word[2:] or _next("-o", rest))):
                name, equals, value = part.partition("=")
                yield MountOption(name, value if equals else None, part)
        elif word.startswith("-") and word != "-":
            for letter in word[1:]:
                if letter not in letters:
                    raise UsageError(f"unknown option -{letter}")
                yield Option(letters[letter], None)
        else:
            yield Operand(word)


def _long(text: str, takes: Mapping[str, Takes], rest: Iterator[str]) -> Option:
    name, equals, joined = text.partition("=")
    kind = takes.get(name)
    if kind is None:
        raise UsageError(f"unknown option --{name}")
    if equals:
        if kind is Takes.NOTHING:
            raise UsageError(f"--{name} takes no value")
        return Option(name, joined)
    return Option(name, _next(f"--{name}", rest) if kind is Takes.VALUE else None)


def _next(name: str, rest: Iterator[str]) -> str:
    value = next(rest, None)
    if value is None:
        raise UsageError(f"{name} needs a value")
    return value


def split_words(text: str) -> list[str]:
    """The words of an ``-o`` option: split at commas that no backslash precedes."""
    words = [""]
    escaped = False
    for c in text:
        if escaped:
            words[-1] += c
            escaped = False
        elif c == "\\":
            escaped = True
        elif c == ",":
            words.append("")
        else:
            words[-1] += c
    return words

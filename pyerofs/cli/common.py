"""What several verbs need: opening the image, printing names and JSON, a progress bar."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from pyerofs import image
from pyerofs.image import Image


def open_image(args: argparse.Namespace) -> Image:
    """Open what the arguments name."""
    return image.open(
        args.image, offset=args.offset, devices=args.device, cache_size=args.cache_size
    )


def printable(name: str) -> str:
    """A name for a terminal: control characters are shown, not obeyed.  In a pipe: as it is."""
    if not sys.stdout.isatty() or name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def print_json(value: Any) -> None:
    """One JSON document; undecodable bytes of names stay surrogate escapes (``\\udcXX``)."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=True)
    sys.stdout.write("\n")


class Progress:
    """A bar on stderr, only where that is a terminal, at most ten times a second."""

    def __init__(self, what: str, total: int, *, quiet: bool = False) -> None:
        self._what = what
        self._total = max(total, 1)
        self._done = 0
        self._next = 0.0
        self._shown = not quiet and sys.stderr.isatty()

    def advance(self, n: int = 1) -> None:
        self._done += n
        if not self._shown:
            return
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 0.1
            part = min(self._done / self._total, 1.0)
            bar = "#" * round(30 * part)
            sys.stderr.write(f"\r{self._what} [{bar:<30}] {part:4.0%} {self._done:,}")
            sys.stderr.flush()

    def close(self) -> None:
        """Wipe the bar."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

"""What several verbs need: opening the image, printing names and JSON, a progress bar."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pyerofs import image
from pyerofs.cli.messages import complain
from pyerofs.image import Image
from pyerofs.sources.spec import SourceWords
from pyerofs.system.daemon import access_to, start_logging
from pyerofs.system.progress import Download


@contextmanager
def open_image(args: argparse.Namespace, *, whole: bool = False) -> Iterator[Image]:
    """Open what the arguments name.  May ask for a password.

    ``whole``: the command is about everything in it.  Then, or where all of it was read anyway, the
    digests of what came from afar are checked at the end, so that no exit status of 0 stands for bytes
    that are not what they are called.  Raises SourceError."""
    start_logging("pyerofs", foreground=True, debug=0)
    words: SourceWords = args.source or SourceWords()
    spec = words.spec_as_typed(args.image)
    waiting = Download()
    access = replace(access_to(words), prefetch="none", progress=waiting.show)
    try:
        opened = image.open(spec, cache_size=args.cache_size, access=access)
    finally:
        waiting.close()
    with opened:
        if missing := opened.volume.missing_devices:
            complain(f"{missing} extra devices of the image are missing (pass each with --device)")
        yield opened
        opened.verify(rest=whole)


def printable(name: str) -> str:
    """A name for a terminal: control characters are shown, not obeyed.  In a pipe: as it is."""
    if not sys.stdout.isatty() or name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def print_json(value: Any) -> None:
    """One JSON document; undecodable bytes of names stay surrogate escapes (``\\udcXX``)."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=True)
    sys.stdout.write("\n")

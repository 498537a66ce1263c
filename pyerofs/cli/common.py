"""Shared by several verbs: opening the image with a progress bar, printing names and JSON."""

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
    """Open the image that the arguments name, for a ``with`` block.  May ask for a password.

    At the end of the block, the digests of downloaded blobs are checked if ``whole`` (the command
    covers the entire image) or if a blob is complete anyway.  Exit status 0 thus implies correct
    bytes.  Raises SourceError, CorruptImage, UnsupportedFeature."""
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
    """A name for output: with control characters escaped on a terminal, unchanged elsewhere."""
    if not sys.stdout.isatty() or name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def print_json(value: Any) -> None:
    """One JSON document; undecodable bytes of names stay surrogate escapes (``\\udcXX``)."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=True)
    sys.stdout.write("\n")

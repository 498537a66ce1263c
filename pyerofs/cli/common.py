"""What several verbs need: opening the image, printing names and JSON, a progress bar."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

from pyerofs import image
from pyerofs.daemon import ask_password
from pyerofs.image import Image
from pyerofs.progress import Download
from pyerofs.sources.spec import SourceWords


def open_image(args: argparse.Namespace) -> Image:
    """Open what the arguments name.  May ask for a password."""
    words: SourceWords = args.source or SourceWords()
    spec = words.spec_as_typed(args.image)
    waiting = Download()
    access = replace(words.access(ask_password), prefetch="none", progress=waiting.show)
    try:
        return image.open(spec, cache_size=args.cache_size, access=access)
    finally:
        waiting.close()


def printable(name: str) -> str:
    """A name for a terminal: control characters are shown, not obeyed.  In a pipe: as it is."""
    if not sys.stdout.isatty() or name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def print_json(value: Any) -> None:
    """One JSON document; undecodable bytes of names stay surrogate escapes (``\\udcXX``)."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=True)
    sys.stdout.write("\n")

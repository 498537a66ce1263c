"""Reads files of an image from afar, in a process of its own, and writes their digests.

usage: reader.py SOURCE CACHE_DIR [PATH...]      SOURCE: a URL or reference, or a spec as JSON
"""

from __future__ import annotations

import hashlib
import json
import sys

import pyerofs
from pyerofs.sources.spec import Access, SourceSpec, parse_spec

PIECE = 256 << 10


def main() -> int:
    what, cache_dir, *paths = sys.argv[1:]
    spec = (
        SourceSpec.from_json(json.loads(what))
        if what.startswith("{")
        else parse_spec(what, insecure=True)
    )
    access = Access(timeout=20, cache_dir=cache_dir, prefetch="none")
    with pyerofs.open(spec, access=access) as image:
        for path in paths or ["/big"]:
            found = hashlib.sha256()
            with image.open(path) as f:
                while piece := f.read(PIECE):
                    found.update(piece)
            print(found.hexdigest(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

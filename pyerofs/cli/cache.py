"""``pyerofs cache``: list, remove, prune and verify the blobs in the cache."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime

from pyerofs.cli.common import print_json
from pyerofs.cli.messages import complain
from pyerofs.errors import SourceError, one_line
from pyerofs.sources.cache.blobfiles import BAD, COMPLETE
from pyerofs.sources.cache.cachedir import Blob, CacheDir, default_directory
from pyerofs.system.arguments import UsageError
from pyerofs.system.progress import Progress
from pyerofs.units import format_size

_STATES = {COMPLETE: "complete", BAD: "bad"}


def _state(blob: Blob) -> str:
    """A blob's state: ``verified``, ``complete``, ``bad`` or ``partial``."""
    return "verified" if blob.verified else _STATES.get(blob.state, "partial")


def cache(args: argparse.Namespace) -> int:
    """Run one action; exit status 1 if a blob is damaged or could not be removed."""
    directory = CacheDir(args.cache_dir or default_directory(), args.cache_limit)
    action = {"ls": _list, "rm": _remove, "prune": _prune, "verify": _verify}[args.action]
    return action(directory, args)


def _chosen(directory: CacheDir, args: argparse.Namespace) -> list[Blob]:
    """The blobs that the arguments name (default: all), most recently used first.  Raises
    SourceError for a name that is not in the cache."""
    blobs = sorted(directory.blobs(), key=lambda b: -b.used)
    if not args.blobs:
        return blobs
    chosen = []
    for name in args.blobs:
        found = [b for b in blobs if name in (b.key, b.name) or _starts(b.key, name)]
        if not found:
            raise SourceError(f"{name}: not in the cache {directory.path} (see cache ls)")
        chosen += found
    return chosen


def _starts(key: str, name: str) -> bool:
    return len(name) >= 4 and (key.startswith(name) or key.partition(":")[2].startswith(name))


def _list(directory: CacheDir, args: argparse.Namespace) -> int:
    blobs = _chosen(directory, args)
    if args.json:
        print_json(
            [
                {"key": b.key, "name": b.name, "size": b.size, "stored": b.stored,
                 "state": _STATES.get(b.state, "partial"), "verified": b.verified,
                 "used": b.used}
                for b in blobs
            ]
        )  # fmt: skip
        return 0
    for b in blobs:
        used = datetime.fromtimestamp(b.used, UTC).strftime("%Y-%m-%d %H:%M")
        state = _state(b)
        if state == "partial":
            state = f"{100 * min(b.stored / max(b.size, 1), 1):.0f} %"
        key, name = one_line(b.key[:19]), one_line(b.name)
        print(f"{key:19} {format_size(b.stored):>10} {state:>8} {used}  {name}")
    print(
        f"{len(blobs)} blobs, {format_size(sum(b.stored for b in blobs))} in {directory.path}",
        file=sys.stderr,
    )
    return 0


def _remove(directory: CacheDir, args: argparse.Namespace) -> int:
    if not args.blobs and not args.all:
        raise UsageError("cache rm: name blobs (see cache ls), or use --all")
    status = 0
    for b in _chosen(directory, args):
        if not directory.remove(b):
            complain(f"{b.key}: in use, so not removed")
            status = 1
    if args.all:
        directory.forget_documents()
    return status


def _prune(directory: CacheDir, args: argparse.Namespace) -> int:
    removed = directory.evict()
    print(f"{removed} blobs removed", file=sys.stderr)
    return 0


def _verify(directory: CacheDir, args: argparse.Namespace) -> int:
    """Read every cached segment; drop damaged ones, so that they are fetched again."""
    blobs = _chosen(directory, args)
    progress = Progress("checking", sum(b.size >> 20 for b in blobs))
    wrong = 0
    for b in blobs:
        try:
            store = directory.open_blob(b)
        except OSError as e:
            complain(f"{b.key}: {e.strerror}")
            store = None
        if store is None:
            wrong += 1
            directory.remove(b)
            complain(f"{b.key}: damaged, or stored by an older version; removed")
            continue
        try:
            for number in range(store.count):
                if store.has(number) and store.segment(number) is None:
                    wrong += 1
                    complain(f"{b.key}: segment {number} is damaged; dropped")
                progress.advance()
        finally:
            store.close()
    progress.close()
    print(f"{len(blobs)} blobs checked, {wrong} damaged segments or blobs dropped", file=sys.stderr)
    return 1 if wrong else 0

"""``pyerofs mounts``: show how much live mounts have fetched and cached."""

from __future__ import annotations

import argparse
import time
from typing import Any

from pyerofs.cli.common import print_json
from pyerofs.system.status import live
from pyerofs.units import format_size


def mounts(args: argparse.Namespace) -> int:
    """List the live mounts of this user (root: of all users)."""
    found = list(live())
    if args.json:
        print_json(found)
        return 0
    for mount in found:
        age = time.time() - mount.get("since", time.time())
        unprotected = ", unprotected" if mount.get("protected") is False else ""
        pid = mount.get("pid", "?")
        print(f"{mount['mountpoint']}  (pid {pid}, for {age:.0f} s{unprotected})")
        for source in mount["sources"]:
            print(f"  {_described(source)}")
        if mount.get("fetching"):
            print(f"  fetching {format_size(mount['fetching'])}/s")
    return 0


def _described(source: dict[str, Any]) -> str:
    size = source.get("size", 0)
    line = f"{source['name']}: {format_size(size)}"
    if "cached" in source:
        line += (
            f", {100 * min(source['cached'] / max(size, 1), 1):.0f} % cached,"
            f" {format_size(source.get('fetched', 0))} fetched in {source.get('requests', 0)} requests,"
            f" {source.get('retries', 0)} retries"
        )
    if "verified" in source:
        line += ", verified" if source["verified"] else ", not verified yet"
    return line

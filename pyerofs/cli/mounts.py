"""``pyerofs mounts``: what live mounts have fetched and cached."""

from __future__ import annotations

import argparse
import time

from pyerofs.cli.common import print_json, printable
from pyerofs.status import live
from pyerofs.units import format_size


def mounts(args: argparse.Namespace) -> int:
    """List them."""
    found = list(live())
    if args.json:
        print_json(found)
        return 0
    for mount in found:
        age = time.time() - float(mount.get("since", 0))
        print(
            f"{printable(str(mount.get('mountpoint')))}  (pid {mount.get('pid')}, for {age:.0f} s)"
        )
        for source in mount.get("sources", []):
            size = max(int(source.get("size", 0)), 1)
            line = f"  {printable(str(source.get('name')))}: {format_size(size)}"
            if "cached" in source:
                line += (
                    f", {100 * source['cached'] / size:.0f} % cached,"
                    f" {format_size(source['fetched'])} fetched in {source['requests']} requests,"
                    f" {source['retries']} retries"
                )
            print(line)
        if mount.get("fetching"):
            print(f"  fetching {format_size(mount['fetching'])}/s")
    return 0

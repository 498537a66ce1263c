"""``pyerofs mounts``: show how much live mounts have fetched and cached; restart their programs."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from typing import Any

from pyerofs.cli.common import print_json
from pyerofs.errors import ErofsError
from pyerofs.system import mountinfo
from pyerofs.system.keeper import RESTART
from pyerofs.system.status import live
from pyerofs.units import format_size

MOMENT = 3.0  # seconds
PATIENCE = 15.0  # seconds in which a restarted program has to be ready


def mounts(args: argparse.Namespace) -> int:
    """List the live mounts of this user (root: of all users), or those that are named."""
    named = [_find(os.path.abspath(path)) for path in args.mountpoint]
    found = named or list(live())
    if args.restart:
        return _restart(found)
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


def _find(mountpoint: str) -> dict[str, Any]:
    """The status of the mount at a path; it is there a moment after the mount.  Raises ErofsError."""
    end = time.monotonic() + MOMENT
    while True:
        for status in live():
            if status["mountpoint"] == mountpoint:
                return status
        if mountinfo.topmost(mountpoint) is None or time.monotonic() > end:
            raise ErofsError(
                f"{mountpoint}: pyerofs has mounted nothing there (see `pyerofs mounts`)"
            )
        time.sleep(0.05)


def _restart(statuses: list[dict[str, Any]]) -> int:
    """Have mounts execute their programs anew; exit status 1 if one of them fails."""
    failed = 0
    for status in statuses:
        where = status["mountpoint"]
        try:
            now = _restarted(status)
        except ErofsError as e:
            print(f"pyerofs: {where}: {e}", file=sys.stderr)
            failed = 1
        else:
            print(f"{where}: now served by pyerofs {now.get('version', '?')}")
    return failed


def _restarted(status: dict[str, Any]) -> dict[str, Any]:
    """Restart one mount; returns its new status.  Raises ErofsError."""
    keeper = status.get("keeper")
    if keeper is None:
        raise ErofsError(
            "can't be restarted: that takes the direct engine of pyerofs-fuse, and Linux 6.9"
        )
    _signal(keeper, status["owner"])
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(0.02)
        found = [now for now in live() if _same(now, status)]
        old = [now for now in found if now.get("restarts", 0) <= status.get("restarts", 0)]
        if found and not old:
            return found[0]
        if any(now.get("keeper") != keeper for now in old):
            raise ErofsError("the new program has failed (see its log); the old one goes on")
    raise ErofsError(f"not restarted within {PATIENCE:.0f} s; its log (syslog) may say why")


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two statuses are of the same mount."""
    return all(one[key] == other[key] for key in ("mountpoint", "owner"))


def _signal(pid: int, owner: int) -> None:
    """Ask a keeper to restart, if it is a process of the mount's owner: anybody can write a status
    with another's number.  Raises ErofsError."""
    try:
        fd = os.pidfd_open(pid)
    except OSError as e:
        raise ErofsError(f"its keeper (pid {pid}): {e.strerror}") from None
    try:
        if os.stat(f"/proc/{pid}").st_uid != owner:
            raise ErofsError(f"its keeper (pid {pid}) is no process of its owner")
        signal.pidfd_send_signal(fd, RESTART)
    except OSError as e:
        raise ErofsError(f"its keeper (pid {pid}): {e.strerror}") from None
    finally:
        os.close(fd)

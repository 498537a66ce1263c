"""What ``--list`` shows: every nbd device that is attached."""

from __future__ import annotations

import json
import os
from typing import Any

from pyerofs.errors import one_line
from pyerofs.units import format_size
from pyerofs_nbd.devices import groups, recovery, sysfs
from pyerofs_nbd.errors import NbdError
from pyerofs_nbd.lifecycle import control
from pyerofs_nbd.lifecycle.messages import Status, StatusAsked
from pyerofs_nbd.lifecycle.reattach import load


def rows() -> list[dict[str, Any]]:
    """One row for each device.  ``state``: alive, dead, disconnected (but still open in a process)
    or unknown (served by another program)."""
    return [_row(index) for index in sysfs.devices()]


def _row(index: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "device": sysfs.node(index),
        "state": "unknown",
        "source": None,
        "size": sysfs.size(index),
        "mountpoints": [mount.where for mount in groups.mounts_of(index)],
        "recovery": sysfs.backend(index) or None,
        "pid": None,
        "fetched": None,
        "verified": None,
    }
    path = row["recovery"]
    if path is None:
        return row
    try:
        record = load(path, accept_unpinned=True)
    except NbdError:
        if recovery.is_ours(path) and not os.path.lexists(path):
            row["state"] = "disconnected"
        return row
    row["source"] = record.source.name
    if recovery.alive(path):
        row["state"] = "alive"
        status = control.ask(recovery.control_path(path), StatusAsked())
        if isinstance(status, Status):
            row["pid"] = status.pid
            row["verified"] = status.verified
            row["fetched"] = status.bytes if status.fetched is None else status.fetched
    elif record.fingerprint is not None:
        row["state"] = "dead"
    return row


def as_json() -> str:
    return json.dumps(rows(), indent=1)


def as_table() -> str:
    """A table for users; empty if there are no devices."""
    found = rows()
    if not found:
        return ""
    lines = [("DEVICE", "STATE", "SIZE", "FETCHED", "VERIFIED", "MOUNTED AT", "SOURCE")]
    for row in found:
        fetched = row["fetched"]
        lines.append(
            (
                row["device"],
                row["state"],
                format_size(row["size"]),
                "-" if fetched is None else format_size(fetched),
                {True: "yes", False: "not yet"}.get(row["verified"], "-"),
                one_line(" ".join(row["mountpoints"])) or "-",
                one_line(row["source"] or "-"),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(line[:6], widths, strict=True)), line[6]])
        for line in lines
    )

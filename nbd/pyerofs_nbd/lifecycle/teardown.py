"""Unmount and disconnect devices, and remove their files."""

from __future__ import annotations

import errno
import os

from pyerofs_nbd.devices import groups, recovery, sysfs
from pyerofs_nbd.devices.driver import check_privilege, disconnect, explain
from pyerofs_nbd.devices.mounting import unmount
from pyerofs_nbd.errors import NbdError
from pyerofs_nbd.lifecycle.reattach import resolve


def unmount_target(target: str) -> None:
    """Unmount a mount point, or all of a device's, and disconnect devices no longer mounted.

    Raises NbdError."""
    check_privilege()
    index = resolve(target)
    together = [(i, sysfs.backend(i)) for i in groups.together(index)]
    only = None if sysfs.index_of(target) is not None else os.path.realpath(target)
    for mount in groups.mounts_of(index):
        if only is not None and mount.where != only:
            continue
        try:
            unmount(mount.where)
        except OSError as e:
            hint = "; a process uses it (fuser -vm shows which)" if e.errno == errno.EBUSY else ""
            raise NbdError(f"{mount.where}: {e.strerror}{hint}") from None
    for other, identifier in together:
        if groups.mounts_of(other) or (sysfs.attached(other) and groups.in_use(other)):
            continue  # mounted elsewhere as well
        _take_away(other, identifier)
    recovery.collect()


def disconnect_target(target: str) -> list[str]:
    """Disconnect a device, even if it is in use; returns its mount points.  Raises NbdError."""
    check_privilege()
    index = resolve(target)
    left = [mount.where for mount in groups.mounts_of(index)]
    for other, identifier in [(i, sysfs.backend(i)) for i in groups.together(index)]:
        _take_away(other, identifier)
    recovery.collect()
    return left


def _take_away(index: int, identifier: str | None) -> None:
    if not sysfs.attached(index) or sysfs.backend(index) != identifier:
        return
    mounted = groups.in_use(index)
    try:
        disconnect(index)
    except OSError as e:
        raise explain(e) from None
    # (the kernel keeps an empty device until the last process closes it)
    if not mounted and not sysfs.wait_gone(index, identifier):
        raise NbdError(f"{sysfs.node(index)}: is disconnected, but a process still has it open")

"""Devices that carry one image together, and where that image is mounted.

An image with extra devices takes several, and the kernel shows nowhere that a mount of the first one
uses the others.  Their identifiers tell: these are the paths of recovery files, whose names differ in
the number of the part only (``recovery.path_of``).
"""

from __future__ import annotations

import os

from pyerofs.system.mountinfo import Mount, mounts
from pyerofs_nbd.devices import recovery, sysfs


def together(index: int) -> list[int]:
    """The devices that carry an image together with this one, itself first, then by their parts."""
    backend = sysfs.backend(index)
    if not backend:
        return [index]
    image, _ = recovery.parted(backend)
    found = []
    for other in sysfs.devices():
        name, part = recovery.parted(sysfs.backend(other) or "")
        if other != index and name == image:
            found.append((part, other))
    return [index, *(other for _, other in sorted(found))]


def mounts_of(index: int) -> list[Mount]:
    """Where the image that a device carries is mounted, the latest first."""
    members = together(index)
    numbers = {sysfs.number(i) for i in members}
    nodes = {sysfs.node(i) for i in members}
    return [m for m in reversed(mounts()) if m.device in numbers or m.source in nodes]


def in_use(index: int) -> bool:
    """Whether the image that a device carries is mounted in any mount namespace that we see a process
    of.

    (Opening the device would tell more, but may hang: the kernel looks for partitions then, and the
    server may be dead.)"""
    numbers = {sysfs.number(i) for i in together(index)}
    seen = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            namespace = os.readlink(f"/proc/{name}/ns/mnt")
        except OSError:
            continue  # ended meanwhile
        if namespace in seen:
            continue
        found = mounts(name)
        if any(mount.device in numbers for mount in found):
            return True
        if found:  # else it has ended: another process shows the same namespace
            seen.add(namespace)
    return False

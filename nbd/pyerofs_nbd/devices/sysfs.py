"""nbd devices in sysfs and /proc: their state, queue settings and mounts."""

from __future__ import annotations

import os
import re
import stat
import time

from pyerofs.system.mountinfo import topmost
from pyerofs_nbd.errors import NbdError

SYSFS = "/sys/block"
IO_TIMEOUT = 2000  # ms that requests taken by a dead server wait after a reattach
SETTINGS = {"max_sectors_kb": 1024, "read_ahead_kb": 1024}
GONE_IN = 10.0  # seconds until a device must be detached after DISCONNECT


NO_DRIVER = (
    "this kernel has no nbd driver (modprobe nbd fails);"
    " serve with --socket PATH instead, or mount with pyerofs-fuse"
)
NO_PRIVILEGE = (
    "attaching a device needs root (CAP_SYS_ADMIN in the initial namespace);"
    " serve with --socket PATH instead, or mount with pyerofs-fuse"
)


def node(index: int) -> str:
    return f"/dev/nbd{index}"


def index_of(name: str) -> int | None:
    """The number in ``/dev/nbd3`` or ``nbd3``; None for other names."""
    found = re.fullmatch(r"(?:/dev/)?nbd(\d{1,7})", name, re.ASCII)
    return int(found[1]) if found else None


def _read(index: int, name: str) -> str | None:
    try:
        with open(f"{SYSFS}/nbd{index}/{name}", errors="surrogateescape") as f:
            return f.read()
    except OSError:
        return None


def backend(index: int) -> str | None:
    """The identifier given when the device was attached: the path of its recovery file.

    Blanks within it are kept."""
    found = _read(index, "backend")
    return found.removesuffix("\n") if found is not None else None


def size(index: int) -> int:
    """The device's size in bytes; 0 if it is not attached."""
    found = _read(index, "size")
    return int(found) * 512 if found else 0


def attached(index: int) -> bool:
    """Whether the device is configured, even if its server is dead."""
    return _read(index, "pid") is not None


def devices() -> list[int]:
    """The devices that are attached, in order."""
    try:
        names = os.listdir(SYSFS)
    except OSError:
        return []
    indices = (index_of(name) for name in names)
    return sorted(i for i in indices if i is not None and attached(i))


def owned_by(identifier: str) -> list[int]:
    """The attached devices with this identifier; at most one, unless a program reuses it."""
    return [i for i in devices() if backend(i) == identifier]


def configure(index: int, *, io_timeout: int = IO_TIMEOUT) -> None:
    """Set the queue settings whose kernel defaults are unsuitable; CONNECT resets them each time.

    Raises NbdError if ``io_timeout`` (ms) can't be set: reads would wait 30 s after a reattach."""
    queue = f"{SYSFS}/nbd{index}/queue"
    for name, value in ({"io_timeout": io_timeout} | SETTINGS).items():
        try:
            with open(f"{queue}/{name}", "w") as f:
                f.write(str(value))
        except OSError as e:
            if name == "io_timeout":
                raise NbdError(f"{queue}/{name}: {e.strerror}; is /sys read-only?") from None


def check_node(index: int) -> None:
    """Raise NbdError unless the device's node exists and is a block device."""
    try:
        mode = os.stat(node(index)).st_mode
    except OSError as e:
        raise NbdError(f"{node(index)}: {e.strerror}; is /dev a devtmpfs here?") from None
    if not stat.S_ISBLK(mode):
        raise NbdError(f"{node(index)}: not a block device; is /dev a devtmpfs here?")


def wait_gone(index: int, identifier: str | None) -> bool:
    """Wait until a device is no longer attached with that identifier.  False after 10 s."""
    end = time.monotonic() + GONE_IN
    while attached(index) and (identifier is None or backend(index) == identifier):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def number(index: int) -> str:
    """``43:0``, as mountinfo has it; "" where there is no such device."""
    return (_read(index, "dev") or "").strip()


def mounted_at(where: str) -> int | None:
    """The number of the nbd device of the topmost mount at ``where``, or None."""
    found = topmost(where)
    return None if found is None else index_of(found.source)


def modprobe() -> None:
    """Try to load the driver.  Failures are ignored: the callers notice a missing driver."""
    import subprocess  # its import takes longer than the rest of a --list

    try:
        subprocess.run(
            ["modprobe", "-q", "nbd"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"},
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        pass

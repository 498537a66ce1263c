"""Block devices as sysfs and /proc show them, and what nbd needs there."""

from __future__ import annotations

import os
import re
import stat
import time

from pyerofs.system.mountinfo import topmost
from pyerofs_nbd.errors import NbdError

SYSFS = "/sys/block"
IO_TIMEOUT = 2000  # ms: how long requests that a dead server had wait after a reattach
SETTINGS = {"max_sectors_kb": 1024, "read_ahead_kb": 1024}
GONE_IN = 10.0  # seconds for a device to go after DISCONNECT


NO_DRIVER = (
    "this kernel has no nbd driver (modprobe nbd fails);"
    " serve with --socket PATH instead, or mount with pyerofs-fuse"
)
NO_PRIVILEGE = (
    "attaching a device takes root (CAP_SYS_ADMIN in the initial namespace);"
    " serve with --socket PATH instead, or mount with pyerofs-fuse"
)


def node(index: int) -> str:
    return f"/dev/nbd{index}"


def index_of(name: str) -> int | None:
    """The number in ``/dev/nbd3`` or ``nbd3``; None where it is no such name."""
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
    """Bytes; 0 for a device that is not attached."""
    found = _read(index, "size")
    return int(found) * 512 if found else 0


def attached(index: int) -> bool:
    """Whether the device is configured, its server dead or alive."""
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
    """The attached devices with this identifier; at most one, unless somebody plays tricks."""
    return [i for i in devices() if backend(i) == identifier]


def configure(index: int, *, io_timeout: int = IO_TIMEOUT) -> None:
    """Set what the kernel's defaults are bad at.  CONNECT resets it, so after each.

    Raises NbdError: without a short ``io_timeout`` (ms), readers wait 30 s after a reattach."""
    queue = f"{SYSFS}/nbd{index}/queue"
    for name, value in ({"io_timeout": io_timeout} | SETTINGS).items():
        try:
            with open(f"{queue}/{name}", "w") as f:
                f.write(str(value))
        except OSError as e:
            if name == "io_timeout":
                raise NbdError(f"{queue}/{name}: {e.strerror}; is /sys read-only?") from None


def check_node(index: int) -> None:
    """Raise NbdError unless the device's node is there."""
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
    """The nbd device that is mounted at a place; the topmost one."""
    found = topmost(where)
    return None if found is None else index_of(found.source)


def modprobe() -> None:
    """Try to load the driver; no error where that fails, since it shows soon enough."""
    import subprocess  # takes longer than all the rest of a --list

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

"""Block devices as sysfs and /proc show them, and what nbd needs there."""

from __future__ import annotations

import os
import re
import stat
import time
from dataclasses import dataclass

SYSFS = "/sys/block"
IO_TIMEOUT = 2000  # ms: how long requests that a dead server had wait after a reattach
SETTINGS = {"max_sectors_kb": 1024, "read_ahead_kb": 1024}
GONE_IN = 10.0  # seconds for a device to go after DISCONNECT


class NbdError(Exception):
    """Something can't be done; the message is one line: what, where, what to do."""


NO_DRIVER = (
    "this kernel has no nbd driver (modprobe nbd fails);"
    " serve with --socket PATH instead, or mount with pyerofs-fuse"
)
NO_PRIVILEGE = (
    "attaching a device takes root (CAP_SYS_ADMIN in the initial namespace);"
    " serve with --socket PATH instead, or mount with pyerofs-fuse"
)


@dataclass(frozen=True)
class Mount:
    """A mounted device."""

    where: str
    kind: str
    options: str


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


def unescape(field: str) -> str:
    """A field of mountinfo, which writes blanks and backslashes in octal."""
    return os.fsdecode(
        re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8) & 255]), os.fsencode(field))
    )


def parse_mountinfo(text: str) -> list[tuple[str, str, Mount]]:
    """(major:minor, source, mount) of each line.  Lines that make no sense are left out."""
    found = []
    for line in text.splitlines():
        fields = line.split(" ")
        if "-" not in fields[6:]:
            continue
        at = fields.index("-", 6)
        if len(fields) < at + 4:
            continue
        mount = Mount(unescape(fields[4]), fields[at + 1], f"{fields[5]},{fields[at + 3]}")
        found.append((fields[2], unescape(fields[at + 2]), mount))
    return found


def mounts() -> list[tuple[str, str, Mount]]:
    """All mounts that this process sees."""
    try:
        with open("/proc/self/mountinfo", errors="surrogateescape") as f:
            return parse_mountinfo(f.read())
    except OSError:
        return []


def _image(identifier: str) -> str:
    """What the identifiers of all the devices that carry one image have in common: the names of
    their recovery files differ in a number only."""
    return re.sub(r"(?:\.\d+)?\.json$", "", identifier, flags=re.ASCII)


def _with(index: int) -> list[int]:
    """The devices that carry an image together with one, which is among them.

    The kernel shows nowhere that a mount uses the others."""
    found = backend(index)
    if not found:
        return [index]
    image = _image(found)
    return [index, *(i for i in devices() if i != index and _image(backend(i) or "") == image)]


def _number(index: int) -> str:
    """``43:0``, as mountinfo has it."""
    return (_read(index, "dev") or "").strip()


def mounts_of(index: int) -> list[Mount]:
    """Where a device is mounted, the latest first; also as one of several that carry an image."""
    together = _with(index)
    numbers, nodes = {_number(i) for i in together}, {node(i) for i in together}
    return [
        mount
        for number, source, mount in reversed(mounts())
        if number in numbers or source in nodes
    ]


def mounted_at(where: str) -> int | None:
    """The nbd device that is mounted at a place; the topmost one."""
    for _, source, mount in reversed(mounts()):
        if mount.where == where:
            return index_of(source)
    return None


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


def in_use(index: int) -> bool:
    """Whether the device is mounted in any mount namespace that we see a process of, or one that
    carries an image together with it.

    (Opening it would tell more, but may hang: the kernel looks for partitions then, and the server
    may be dead.)"""
    numbers = {_number(i) for i in _with(index)}
    seen = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            namespace = os.readlink(f"/proc/{name}/ns/mnt")
            if namespace in seen:
                continue
            seen.add(namespace)
            with open(f"/proc/{name}/mountinfo", errors="surrogateescape") as f:
                if any(line.split(" ", 3)[2] in numbers for line in f):
                    return True
        except (OSError, IndexError):
            continue  # ended meanwhile
    return False

"""mount(2) and umount(2) for a device; errors name the kernel's reason."""

from __future__ import annotations

import errno
import os
import re

from pyerofs.system import libc
from pyerofs_nbd.errors import NbdError

MS_RDONLY = 1
_FLAGS = {
    "nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "dirsync": 128, "nosymfollow": 256,
    "noatime": 1024, "nodiratime": 2048, "silent": 32768, "relatime": 1 << 21,
    "strictatime": 1 << 24, "lazytime": 1 << 25,
}  # fmt: skip
_CLEARED = {
    "suid": "nosuid", "dev": "nodev", "exec": "noexec", "async": "sync", "symfollow": "nosymfollow",
    "atime": "noatime", "diratime": "nodiratime", "loud": "silent", "norelatime": "relatime",
    "nostrictatime": "strictatime", "nolazytime": "lazytime",
}  # fmt: skip
# fstab options that are not for the kernel, and those that a read-only image makes moot
_IGNORED = {
    "ro", "rw", "defaults", "auto", "noauto", "user", "nouser", "users", "group", "owner", "nofail",
    "_netdev", "loop", "comment",
}  # fmt: skip


FLAT_SINCE = (6, 4)  # Linux


def mounts_flat() -> bool:
    """Whether this kernel's erofs can mount an image and its extra devices as one flat device."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return found is None or (int(found[1]), int(found[2])) >= FLAT_SINCE


def flags_and_data(words: list[str]) -> tuple[int, str]:
    """The flags and data of mount(2) for the options of ``-o``."""
    flags = MS_RDONLY
    data = []
    for word in words:
        name = word.partition("=")[0]
        if word in _FLAGS:
            flags |= _FLAGS[word]
        elif word in _CLEARED:
            flags &= ~_FLAGS[_CLEARED[word]]
        elif name not in _IGNORED and not name.startswith("x-"):
            data.append(word)
    return flags, ",".join(data)


def mount(source: str, where: str, words: list[str]) -> None:
    """Mount erofs, read-only.  Blocks while the superblock is read.  Raises NbdError."""
    flags, data = flags_and_data(words)
    said = _KernelLog()
    try:
        libc.mount(source, where, "erofs", flags, data)
    except OSError as e:
        raise NbdError(f"{where}: can't be mounted: {_reason(e, said.lines())}") from None
    finally:
        said.close()


def _reason(e: OSError, said: list[str]) -> str:
    if said:
        return f"{e.strerror} (the kernel says: {said[-1]})"
    if e.errno == errno.ENODEV:
        return "this kernel has no erofs (modprobe erofs fails)"
    if e.errno == errno.EINVAL:
        return "Invalid argument (is it an EROFS image, and does this kernel know its features?)"
    return str(e.strerror)


def unmount(where: str) -> None:
    """Unmount a mount point.  Raises OSError."""
    libc.unmount(where)


class _KernelLog:
    """The kernel's log messages about erofs from now on; none if /dev/kmsg can't be read."""

    def __init__(self) -> None:
        self._fd = -1
        try:
            self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            self.close()

    def lines(self) -> list[str]:
        found: list[str] = []
        while self._fd >= 0 and len(found) < 1000:
            try:
                text = os.read(self._fd, 8192).decode("utf-8", "replace")
            except OSError:  # EAGAIN: no more; EPIPE: some were overwritten
                break
            said = re.match(r"[^;]*;erofs: (.*)", text)
            if said:
                found.append(re.sub(r"^\(device [^)]*\): ", "", said[1]).strip())
        return found

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

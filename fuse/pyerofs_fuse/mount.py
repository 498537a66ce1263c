"""What both engines do about a mount point: checks beforehand, one-line errors, tuning."""

from __future__ import annotations

import errno
import gc
import logging
import os
import stat
import sys
from typing import NamedTuple

from pyerofs.errors import one_line
from pyerofs.sources.spec import Access, SourceSpec
from pyerofs.system import mountinfo
from pyerofs.system.daemon import Report
from pyerofs.system.libc import keep_freed_memory
from pyerofs_fuse.options import Options

log = logging.getLogger("pyerofs-fuse")

READ_AHEAD_KB = 2048


class Job(NamedTuple):
    """What to mount, and how."""

    options: Options
    spec: SourceSpec
    access: Access
    first: list[str]  # paths to prefetch before anything else, of a remote image
    report: Report
    program: list[str]  # what was executed, without options and arguments


class MountError(Exception):
    """Mounting failed; the message is one line."""


class OpenFailed(Exception):
    """The image could not be opened; the message is one line."""


def explain(text: str, where: str) -> str:
    """One line for what mount(2), libfuse or fusermount3 said of a mount point."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if _is_ours(where):
        return "already mounted there (fusermount3 -u unmounts; root can mount over it)"
    if _in_user_namespace():
        return "a user namespace can only mount in its own mount namespace (see unshare -rm)"
    if any("user_allow_other" in line for line in lines):
        return "allow_other needs the line user_allow_other in /etc/fuse.conf (or root)"
    return lines[0] if lines else "can't be mounted (and no reason is given)"


def tune() -> None:
    """Tune the interpreter and the allocator for a daemon that constantly hands out large buffers."""
    sys.setswitchinterval(
        2e-4
    )  # a finished decoder thread waits no longer for the GIL than a request takes
    keep_freed_memory()
    gc.freeze()  # collections need not look at what was made at start-up, which stays
    gc.enable()


def _is_ours(mountpoint: str) -> bool:
    """Whether an EROFS image is mounted there, by pyerofs-fuse, erofsfuse or the kernel's driver."""
    found = mountinfo.topmost(os.path.realpath(mountpoint))
    return found is not None and found.kind in ("fuse.pyerofs-fuse", "fuse.erofs", "erofs")


def _in_user_namespace() -> bool:
    try:
        with open("/proc/self/uid_map") as f:
            return f.read().split() != ["0", "0", "4294967295"]
    except OSError:
        return False


def read_ahead(mountpoint: str) -> None:
    """Raise the kernel's read-ahead from its default of 128 KiB to READ_AHEAD_KB, if run as root."""
    found = mountinfo.topmost(mountpoint)
    if found is None:
        return
    try:
        with open(f"/sys/class/bdi/{found.device}/read_ahead_kb", "w") as f:
            f.write(str(READ_AHEAD_KB))
    except OSError:
        pass


def write_record(path: str, paths: list[str]) -> None:
    """Write the paths of the files that were opened, in the order of opening.  Logs errors."""
    text = "".join(f"{p}\n" for p in paths if "\n" not in p)
    try:
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as f:
            f.write(text)
    except OSError as e:
        log.warning("%s: can't write the list of opened files: %s", path, e.strerror)


def check(options: Options) -> None:
    """Check the mount point and /dev/fuse in advance, because libfuse's own errors are vague.
    Raises MountError."""
    where = options.mountpoint
    try:
        mode = os.stat(where).st_mode
        os.statvfs(where)  # a dead mount may still answer stat, from the kernel's cache
    except OSError as e:
        hint = ""
        if e.errno == errno.ENOTCONN:
            hint = f" (the daemon of this mount has died; unmount it: fusermount3 -u {where})"
        raise MountError(f"{where}: {e.strerror}{hint}") from None
    if not stat.S_ISDIR(mode):
        raise MountError(f"{where}: not a directory")
    if os.geteuid() == 0 and _is_ours(where):
        message = f"{where}: an image is already mounted there; this mount hides it"
        print(f"pyerofs-fuse: {one_line(message)}", file=sys.stderr)
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        raise MountError(
            f"/dev/fuse: {e.strerror}; without it, try `pyerofs extract` or `pyerofs-nbd`"
        ) from None

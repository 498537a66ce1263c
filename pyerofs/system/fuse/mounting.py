"""Mount a FUSE file system and get the descriptor that its requests are read from.

With CAP_SYS_ADMIN mount(2) does it; else the set-uid program fusermount3, which hands over the
descriptor through a socket.  Neither needs libfuse.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pyerofs.system import libc, mountinfo

if TYPE_CHECKING:
    import socket

DEVICE = "/dev/fuse"
HELPER = "fusermount3"
MAX_MESSAGE = 4096  # bytes read of what fusermount3 says

# The options that are flags of mount(2): the flag, and whether the option sets or clears it.
_FLAGS = {
    "ro": (libc.MS_RDONLY, True),
    "suid": (libc.MS_NOSUID, False),
    "nosuid": (libc.MS_NOSUID, True),
    "dev": (libc.MS_NODEV, False),
    "nodev": (libc.MS_NODEV, True),
    "exec": (libc.MS_NOEXEC, False),
    "noexec": (libc.MS_NOEXEC, True),
    "sync": (libc.MS_SYNCHRONOUS, True),
    "async": (libc.MS_SYNCHRONOUS, False),
    "dirsync": (libc.MS_DIRSYNC, True),
    "atime": (libc.MS_NOATIME, False),
    "noatime": (libc.MS_NOATIME, True),
    "diratime": (libc.MS_NODIRATIME, False),
    "nodiratime": (libc.MS_NODIRATIME, True),
    "relatime": (libc.MS_RELATIME, True),
    "norelatime": (libc.MS_RELATIME, False),
    "strictatime": (libc.MS_STRICTATIME, True),
    "nostrictatime": (libc.MS_STRICTATIME, False),
}
DEFAULT_FLAGS = libc.MS_NOSUID | libc.MS_NODEV


class HelperError(Exception):
    """fusermount3 has refused; the message is what it printed."""


class Mounted(NamedTuple):
    """A mount that is live once INIT is answered.  ``where``: its real path, since nobody may resolve
    a path across a mount that does not answer.  ``device``: its "major:minor" in mountinfo.
    ``guard``: with auto_unmount, fusermount3 unmounts when this socket is closed."""

    where: str
    fd: int
    device: str | None
    guard: socket.socket | None


def mount(where: str, name: str, subtype: str, words: Sequence[str]) -> Mounted:
    """Mount at ``where``, an absolute path, read-only.  ``name`` is shown as the mount's source,
    ``words`` are options of mount(8), auto_unmount and those that the FUSE driver takes.

    Raises OSError, or HelperError."""
    words = ["ro", *words]
    where = os.path.realpath(where)
    fd, guard = -1, None
    if "auto_unmount" not in words:
        fd = _by_system_call(where, name, subtype, words)
    if fd < 0:
        fd, guard = _by_helper(where, name, subtype, words)
    found = mountinfo.topmost(where)
    return Mounted(where, fd, None if found is None else found.device, guard)


def unmount(mounted: Mounted) -> None:
    """Detach the mount, even while it is in use; nothing where another one covers or replaced it.

    Raises OSError, or HelperError."""
    found = mountinfo.topmost(mounted.where)
    if found is None or found.device != mounted.device:
        return
    try:
        libc.unmount(mounted.where, detach=True)
    except PermissionError:
        _Helper(["-u", "-q", "-z", "--", mounted.where]).wait()


def _by_system_call(where: str, name: str, subtype: str, words: Sequence[str]) -> int:
    """The descriptor; -1 where mount(2) is not permitted."""
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    flags = DEFAULT_FLAGS
    root = stat.S_IFMT(os.stat(where).st_mode)
    data = [f"fd={fd}", f"rootmode={root:o}", f"user_id={os.getuid()}", f"group_id={os.getgid()}"]
    for word in words:
        if word in _FLAGS:
            flag, sets = _FLAGS[word]
            flags = flags | flag if sets else flags & ~flag
        else:
            data.append(word)
    try:
        libc.mount(name, where, f"fuse.{subtype}", flags, ",".join(data))
    except PermissionError:
        os.close(fd)
        return -1
    except BaseException:
        os.close(fd)
        raise
    return fd


def _by_helper(
    where: str, name: str, subtype: str, words: Sequence[str]
) -> tuple[int, socket.socket | None]:
    import array
    import socket

    options = ",".join([f"fsname={_escaped(name)}", f"subtype={_escaped(subtype)}", *words])
    ours, theirs = socket.socketpair()
    with theirs:
        helper = _Helper(["-o", options, "--", where], theirs.fileno())
    fds = array.array("i")
    _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(fds.itemsize))
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: fds.itemsize])
    if not fds:
        ours.close()
        helper.wait()
        raise HelperError(f"{HELPER} gives no descriptor")
    os.set_inheritable(fds[0], False)
    if "auto_unmount" in words:
        return fds[0], ours  # the helper stays, too
    ours.close()
    helper.wait()
    return fds[0], None


class _Helper:
    """A run of fusermount3."""

    def __init__(self, arguments: list[str], socket_fd: int | None = None) -> None:
        """Start it.  Raises OSError."""

        import shutil

        program = shutil.which(HELPER)
        if program is None:
            text = f"{HELPER}, which mounts for users, is not installed"
            raise FileNotFoundError(errno.ENOENT, text)
        environment = dict(os.environ)
        if socket_fd is not None:
            environment["_FUSE_COMMFD"] = str(socket_fd)
            os.set_inheritable(socket_fd, True)
        self._said = os.memfd_create(HELPER)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        actions = [
            (os.POSIX_SPAWN_DUP2, null, 0),
            (os.POSIX_SPAWN_DUP2, null, 1),
            (os.POSIX_SPAWN_DUP2, self._said, 2),
        ]
        try:
            self._pid = os.posix_spawn(
                program, [HELPER, *arguments], environment, file_actions=actions, setsigmask=()
            )
        finally:
            os.close(null)

    def wait(self) -> None:
        """Wait for its end.  Raises HelperError if it has failed."""
        _, status = os.waitpid(self._pid, 0)
        said = os.pread(self._said, MAX_MESSAGE, 0)
        os.close(self._said)
        if status:
            raise HelperError(said.decode("utf-8", "replace"))


def _escaped(text: str) -> str:
    """fusermount3 splits options at commas that no backslash precedes."""
    return text.replace("\\", "\\\\").replace(",", "\\,")

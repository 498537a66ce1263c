"""The status of live mounts: a small JSON file for each, in a directory of its user.

A live mount's process holds a lock on its file, so an unlocked file is stale.  Readers trust no
content: root reads files of other users, who may have written anything.
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any

from pyerofs.errors import one_line
from pyerofs.system.private import PrivateDirectory

PERIOD = 1.0  # seconds
SIZE = 16 << 10  # bytes; a file is written at once, padded to this
MAX_FILES = 1000  # read of one directory
MAX_SOURCES = 100  # read of one mount
RUN_USER = "/run/user"
ROOT_DIRECTORY = "/run/pyerofs"

_TEXTS = ("command", "version", "mountpoint", "source", "name")
_NUMBERS = (
    "pid", "keeper", "restarts", "since",
    "fetching", "size", "cached", "requests", "fetched", "retries",
)  # fmt: skip
_FLAGS = ("complete", "verified", "protected")


def directory() -> str:
    """The directory of this process's status file."""
    return directories(os.getuid())[0]


def directories(uid: int) -> list[str]:
    """Directories that may hold a user's files, the usual one first.  In su, cron and containers
    there is no runtime directory; a private one below the temporary directory replaces it."""
    if uid == 0:
        return [ROOT_DIRECTORY]
    found = []
    if uid == os.getuid() and (own := os.environ.get("XDG_RUNTIME_DIR")):
        found.append(own)
    found.append(os.path.join(RUN_USER, str(uid)))
    here = [os.path.join(path, "pyerofs") for path in found if _owned(path, uid)]
    import tempfile  # late: it brings modules that a mount does not need

    return [*dict.fromkeys(here), os.path.join(tempfile.gettempdir(), f"pyerofs-{uid}")]


def _owned(path: str, uid: int) -> bool:
    """Whether a user owns a directory: after a plain su, XDG_RUNTIME_DIR is another user's."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == uid


class StatusFile:
    """The status file of this process's mount, locked until it is closed.

    The lock is shared with processes that are forked from this one, until they ``leave``."""

    def __init__(self, about: dict[str, Any]) -> None:
        """Make the file.  ``about``: what does not change.  Raises OSError."""
        self._about = {"since": int(time.time())} | about | {"pid": os.getpid()}
        self._name = f"{os.getpid()}-{time.monotonic_ns()}.json"  # new after an exec, too
        self._folder = _opened(directory(), os.getuid(), create=True)
        self._fd = self._folder.open_file(self._name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._written = b""
        self._fetched: dict[int, int] = {}
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def write(self, sources: list[dict[str, Any]], **facts: float) -> None:
        """Write the status of each source, and how many bytes a second they have fetched since the last
        call, PERIOD ago.  ``facts``: what else is known now, such as ``protected`` (whether another
        server would follow if this one died).  A full disk is ignored, since the status is optional."""
        fetched = {i: int(s.get("fetched", 0)) for i, s in enumerate(sources)}
        rate = sum(n - self._fetched.get(i, n) for i, n in fetched.items()) / PERIOD
        self._fetched = fetched
        about = self._about | {"sources": sources, "fetching": rate} | facts
        text = json.dumps(about).encode()
        if len(text) < SIZE and text != self._written:
            self._written = text
            try:
                os.pwrite(self._fd, text.ljust(SIZE), 0)
            except OSError:
                pass

    def close(self) -> None:
        """Remove the file."""
        self._folder.unlink_same(self._name, self._fd)
        self.leave()

    def leave(self) -> None:
        """Called in a process that was forked from the file's own: don't share its lock any more."""
        os.close(self._fd)


async def publish(about: dict[str, Any], sources: Callable[[], list[dict[str, Any]]]) -> None:
    """Maintain a status file until cancelled, rewritten every PERIOD if it changes.  Only sleeps if
    the file can't be made."""
    import trio

    try:
        file = StatusFile(about)
    except OSError:
        await trio.sleep_forever()
    try:
        while True:
            file.write(sources())
            await trio.sleep(PERIOD)
    finally:
        file.close()


def live() -> Iterator[dict[str, Any]]:
    """The status of each live mount of this user (root: of all users), checked by ``checked``; with the
    uid of its ``owner``."""
    for path, owner in _places():
        try:
            folder = _opened(path, owner, create=False)
            names = sorted(folder.names())[:MAX_FILES]
        except OSError:
            continue
        for name in names:
            if name.endswith(".json") and (found := _read(folder, name)) is not None:
                yield found | {"owner": owner}


def _opened(path: str, owner: int, *, create: bool) -> PrivateDirectory:
    """Open a directory of status files.  If it lies in a runtime directory, the latter must be
    private to the owner, too.  Raises OSError."""
    runtime, name = os.path.split(path)
    if name != "pyerofs" or path == ROOT_DIRECTORY:
        return PrivateDirectory.open(path, create=create, owner=owner)
    above = PrivateDirectory.open(runtime, create=False, owner=owner)
    return above.subdirectory(name, create=create)


def _places() -> Iterator[tuple[str, int]]:
    """Directories to search, each with the uid that must own it and all its files."""
    uid = os.getuid()
    own = dict.fromkeys([directory(), *directories(uid)])
    yield from ((path, uid) for path in own)
    if uid != 0:
        return
    others = {entry.pw_uid for entry in pwd.getpwall()}
    try:
        others |= {int(name) for name in os.listdir(RUN_USER) if name.isascii() and name.isdigit()}
    except OSError:
        pass
    for other in sorted(others - {0}):
        yield from ((path, other) for path in directories(other))


def _read(folder: PrivateDirectory, name: str) -> dict[str, Any] | None:
    """The status in a file; None if its mount has ended.  Removes a stale file of this user."""
    try:
        fd = folder.open_file(name, os.O_RDONLY)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return checked(json.loads(os.pread(fd, SIZE, 0)))
        if folder.owner == os.geteuid():
            folder.unlink_same(name, fd)
    except (OSError, ValueError, RecursionError):
        pass
    finally:
        os.close(fd)
    return None


def checked(value: object) -> dict[str, Any] | None:
    """The known fields of the right type from an untrusted status; None if the value is not a
    status.  Texts become one line of printable characters."""
    if not isinstance(value, dict) or not isinstance(value.get("mountpoint"), str):
        return None
    sources = value.get("sources")
    found = _fields(value)
    found["sources"] = [
        _fields(s) | {"name": one_line(str(s.get("name", "?")))}
        for s in (sources if isinstance(sources, list) else [])[:MAX_SOURCES]
        if isinstance(s, dict)
    ]
    return found


def _fields(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in _TEXTS:
        if isinstance(text := value.get(key), str):
            found[key] = one_line(text)
    for key in _NUMBERS:
        number: Any = value.get(key)
        whole = isinstance(number, (int, float)) and not isinstance(number, bool)
        if whole and 0 <= number < 1 << 63:  # false for NaN
            found[key] = number
    for key in _FLAGS:
        if isinstance(flag := value.get(key), bool):
            found[key] = flag
    return found

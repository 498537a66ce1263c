"""What live mounts tell about themselves: a small JSON file for each, in the user's runtime directory.

The file is locked by its owner, so one whose owner has died is known by that.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import trio

PERIOD = 1.0  # seconds
SIZE = 16 << 10  # a file is written in one go, padded to this


def directory() -> str:
    """Where this user's files are."""
    if os.getuid() == 0:
        return "/run/pyerofs"
    return os.path.join(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}", "pyerofs")


async def publish(about: dict[str, Any], sources: Callable[[], list[dict[str, Any]]]) -> None:
    """Keep a status file until cancelled.  Does without one where it can't be made."""
    path = os.path.join(directory(), f"{os.getpid()}.json")
    try:
        os.makedirs(directory(), mode=0o700, exist_ok=True)
        fd = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
    except OSError:
        await trio.sleep_forever()
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        last: dict[str, int] = {}
        written = b""
        about = about | {"pid": os.getpid(), "since": int(time.time())}
        while True:
            now = sources()
            fetched = {str(i): int(s.get("fetched", 0)) for i, s in enumerate(now)}
            rate = sum(n - last.get(i, n) for i, n in fetched.items()) / PERIOD
            last = fetched
            text = json.dumps(about | {"sources": now, "fetching": rate}).encode()
            if len(text) < SIZE and text != written:
                written = text
                try:
                    os.pwrite(fd, text.ljust(SIZE), 0)
                except OSError:
                    pass  # no room; nobody needs it
            await trio.sleep(PERIOD)
    finally:
        try:
            os.unlink(path)
        except OSError:
            pass
        os.close(fd)


def live() -> Iterator[dict[str, Any]]:
    """The status of each live mount of this user (root: of everybody)."""
    folders = [directory()]
    if os.getuid() == 0:
        try:
            folders += [f"/run/user/{name}/pyerofs" for name in os.listdir("/run/user")]
        except OSError:
            pass
    for folder in folders:
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            if name.endswith(".json") and (found := _read(os.path.join(folder, name))) is not None:
                yield found


def _read(path: str) -> dict[str, Any] | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            found = json.loads(os.pread(fd, SIZE, 0))
            return found if isinstance(found, dict) else None
        os.unlink(path)  # its owner has died
    except (OSError, ValueError):
        pass
    finally:
        os.close(fd)
    return None

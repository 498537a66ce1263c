"""Recovery files: the data needed to serve an attached device again after its server has died.

The file's path is the device's identifier in the kernel (``/sys/block/nbdN/backend``).  The file is
written before the device is attached and deleted once it is detached.  A living server holds a lock
on the file, which tells other processes that it lives.  Recovery files hold no secrets.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from pyerofs.errors import SourceError
from pyerofs.sources.spec import Access, SourceSpec
from pyerofs_nbd.devices import sysfs
from pyerofs_nbd.errors import NbdError

VERSION = 1
DIRECTORY = "/run/pyerofs/nbd"
OVERRIDE = "PYEROFS_NBD_DIR"  # in the environment
MAX_SIZE = 1 << 16  # bytes of a recovery file
HEAD = 65536  # bytes that the fingerprint covers

# the fields of an Access that a file holds; of the password it holds only where it comes from
_ACCESS = ("timeout", "cache", "cache_dir", "cache_limit", "prefetch", "prefetch_rate")


@dataclass(frozen=True)
class Credentials:
    """Where the password comes from: ``file`` (a path), ``environment``, ``terminal`` or ``none``
    (then the Docker configuration may still have one)."""

    source: str = "none"
    path: str | None = None


@dataclass(frozen=True)
class Fingerprint:
    """Identifies a source's content: size in bytes, and a hash of the first 64 KiB."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """The content of one device's recovery file.

    ``part`` numbers the devices that were attached together; only the first is mounted.
    ``fingerprint`` is None if another program has written the file."""

    source: SourceSpec
    fingerprint: Fingerprint | None
    access: Access = field(default_factory=Access)
    credentials: Credentials = field(default_factory=Credentials)
    part: int = 0
    flat: bool = False
    mountpoint: str | None = None

    def to_json(self) -> dict[str, Any]:
        access = {k: v for k, v in asdict(self.access).items() if k in _ACCESS}
        assert self.fingerprint is not None
        return {
            "pyerofs-nbd": VERSION,
            "source": self.source.to_json(),
            "fingerprint": asdict(self.fingerprint),
            "access": access,
            "credentials": asdict(self.credentials),
            "part": self.part,
            "flat": self.flat,
            "mountpoint": self.mountpoint,
        }


def fingerprint(size: int, head: bytes) -> Fingerprint:
    """``head``: the first ``HEAD`` bytes of a source, or all bytes of a shorter one."""
    return Fingerprint(size, hashlib.sha256(head).hexdigest())


def from_json(value: object) -> Record:
    """Parse a record.  Raises ValueError or SourceError if this version does not understand it."""
    if not isinstance(value, dict) or "pyerofs-nbd" not in value:
        raise ValueError("not a recovery file")
    if value["pyerofs-nbd"] != VERSION:
        raise ValueError(f"written by another version of pyerofs-nbd ({value['pyerofs-nbd']!r})")
    try:
        record = Record(
            source=SourceSpec.from_json(value["source"]),
            fingerprint=_typed(Fingerprint, value["fingerprint"], size=int, sha256=str),
            access=Access(**{k: v for k, v in value["access"].items() if k in _ACCESS}),
            credentials=_typed(
                Credentials, value["credentials"], source=str, path=(str, type(None))
            ),
            part=value["part"],
            flat=value["flat"],
            mountpoint=value["mountpoint"],
        )
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"a field is missing or misplaced ({e})") from None
    if (
        type(record.part) is not int
        or type(record.flat) is not bool
        or not isinstance(record.mountpoint, (str, type(None)))
        or not isinstance(record.access.timeout, (int, float))
        or type(record.access.cache_limit) is not int
    ):
        raise ValueError("a field has the wrong type")
    return record


def _typed(kind: Any, value: Any, **types: Any) -> Any:
    if not isinstance(value, dict) or set(value) != set(types):
        raise TypeError(f"{kind.__name__.lower()}: {value!r}")
    for name, wanted in types.items():
        if not isinstance(value[name], wanted) or isinstance(value[name], bool):
            raise TypeError(f"{name} is {value[name]!r}")
    return kind(**value)


# --- files ----------------------------------------------------------------------------------


def directory(*, make: bool = False) -> str:
    """The directory of recovery files.  Raises NbdError if it is not private to this user."""
    where = os.environ.get(OVERRIDE) or DIRECTORY
    try:
        if make:
            os.makedirs(os.path.dirname(where), mode=0o755, exist_ok=True)
            try:
                os.mkdir(where, 0o700)
            except FileExistsError:
                pass
        found = os.lstat(where)
    except FileNotFoundError:
        return where
    except OSError as e:
        raise NbdError(f"{where}: {e.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise NbdError(f"{where}: not a directory")
    if found.st_uid != os.geteuid():
        raise NbdError(f"{where}: belongs to another user (managing devices needs root)")
    if found.st_mode & 0o077:
        raise NbdError(f"{where}: other users have access to it; its mode must be 0700")
    return where


def token() -> str:
    """A random name for a group of devices that are attached together."""
    return secrets.token_hex(8)


def path_of(name: str, part: int) -> str:
    """The recovery file of one of the devices that are attached together."""
    where = os.path.join(directory(), name)
    return f"{where}.{part}.json" if part else f"{where}.json"


def is_ours(path: str) -> bool:
    """Whether a device's identifier is the path of a recovery file of pyerofs-nbd."""
    return os.path.dirname(path) == directory() and path.endswith(".json")


def group(path: str) -> list[str]:
    """The recovery files of all devices that were attached together with this one's, in order.

    A file of another program is a group of its own."""
    if not is_ours(path):
        return [path]
    where = os.path.dirname(path)
    image, _ = parted(path)
    files = [os.path.join(where, name) for name in _names(where) if name.endswith(".json")]
    return sorted((f for f in files if parted(f)[0] == image), key=parted) or [path]


def parted(path: str) -> tuple[str, int]:
    """What ``path_of`` made a path of: the directory with the name, and the part.  Any other text, such
    as the identifier of another program's device, is a name of its own with part 0."""
    found = re.fullmatch(r"(.*?)(?:\.(\d{1,9}))?\.json", path, re.ASCII | re.DOTALL)
    return (found[1], int(found[2] or 0)) if found else (path, 0)


def write(path: str, record: Record) -> int:
    """Write a recovery file durably and atomically; returns a descriptor that holds its lock.

    Raises NbdError, and then leaves no file."""
    where = directory(make=True)
    scratch = os.path.join(where, f".{os.path.basename(path)}.new")
    fd = -1
    try:
        fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        data = json.dumps(record.to_json(), indent=1).encode() + b"\n"
        while data:
            data = data[os.write(fd, data) :]
        os.fsync(fd)
        os.rename(scratch, path)
        _sync(where)
    except OSError as e:
        if fd >= 0:
            os.close(fd)
            remove(scratch)
        raise NbdError(f"{path}: {e.strerror}") from None
    return fd


def _sync(where: str) -> None:
    fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read(path: str) -> bytes:
    """The bytes of a recovery file, also of another program's.  Raises NbdError.

    It must be a regular file that no other user can write: it decides a device's content."""
    if not os.path.isabs(path):
        raise NbdError(f"{path!r}: not the path of a recovery file")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as e:
        raise NbdError(f"{path}: {getattr(e, 'strerror', None) or e}") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise NbdError(f"{path}: not a regular file")
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise NbdError(f"{path}: others could have written it, so it is not used")
        data = os.read(fd, MAX_SIZE + 1)
    finally:
        os.close(fd)
    if len(data) > MAX_SIZE:
        raise NbdError(f"{path}: too large for a recovery file")
    return data


def load(path: str) -> Record:
    """Parse a recovery file of pyerofs-nbd.  Raises NbdError."""
    try:
        return from_json(json.loads(read(path)))
    except (ValueError, RecursionError, SourceError) as e:
        raise NbdError(f"{path}: {e}") from None


def lock(path: str) -> int | None:
    """Lock a recovery file, as the server of its device does; returns a descriptor that holds the
    lock, or None if another process holds it.  Raises NbdError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise NbdError(f"{path}: {e.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(fd)
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise NbdError(f"{path}: {e.strerror}") from None
    return fd


def alive(path: str) -> bool:
    """Whether a process serves the device of a recovery file (of pyerofs-nbd)."""
    try:
        fd = lock(path)
    except NbdError:
        return False
    if fd is not None:
        os.close(fd)
    return fd is None


def remove(path: str) -> None:
    """Delete a file; errors are ignored."""
    try:
        os.unlink(path)
    except OSError:
        pass


def control_path(path: str) -> str:
    """The control socket of the server of a recovery file's group."""
    first = group(path)[0]
    return os.path.join(directory(), hashlib.sha256(os.fsencode(first)).hexdigest()[:16] + ".sock")


def collect() -> list[str]:
    """Delete stale recovery files and control sockets; returns the recovery files deleted.

    A file is in use while a process holds its lock, or while it is a device's identifier.  The lock
    is taken before the device is attached, so a file with neither is stale."""
    try:
        where = directory()
    except NbdError:
        return []
    if not os.path.isdir(sysfs.SYSFS):
        return []
    gone, sockets = [], set()
    for name in sorted(_names(where)):
        path = os.path.join(where, name)
        if name.endswith(".json"):
            if alive(path) or sysfs.owned_by(path):
                sockets.add(control_path(path))
                continue
            gone.append(path)
        elif name.endswith(".new") and _old(path):
            remove(path)
    sockets |= {
        control_path(found) for i in sysfs.devices() if (found := sysfs.backend(i)) is not None
    }
    for path in gone:
        remove(path)
    for name in _names(where):
        path = os.path.join(where, name)
        if name.endswith(".sock") and path not in sockets:
            remove(path)
    return gone


def _old(path: str) -> bool:
    """Whether a temporary file is an hour old: no process is still writing it then."""
    try:
        return time.time() - os.lstat(path).st_mtime > 3600
    except OSError:
        return False


def _names(where: str) -> list[str]:
    try:
        return os.listdir(where)
    except OSError:
        return []

"""The cache directory, which all processes of a user share.

    verified/ALGORITHM-HEX.data, .map   blobs that matched their digest in a whole pass, by digest
    claimed/HEX.data, .map              blobs that are not verified, by origin (``claim``)
    documents/ALGORITHM-HEX             manifests, indexes and configurations, by digest
    answers/HEX.json                    the last answer for a reference or URL, by origin
    making                              empty; one byte is locked for each blob being made
    blobs/                              blobs of older versions: adopted if their digest is right

The directory is private: it and all files in it must belong to this user, and no other user may be
able to write to them (``pyerofs.system.private``).  It holds no credentials.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyerofs.errors import SourceError
from pyerofs.sources.base import MAX_BLOB, SEGMENT, NoRoom
from pyerofs.sources.cache.blobfiles import (
    BAD,
    COMPLETE,
    HEADER_SIZE,
    lock,
    parse_header,
    unlink_pair,
)
from pyerofs.sources.cache.blobstore import BlobStore
from pyerofs.sources.cache.claim import Origin
from pyerofs.sources.cache.store import Claimed, Verified, keep_verified
from pyerofs.system.private import PrivateDirectory

log = logging.getLogger("pyerofs")

MAX_DOCUMENT = 16 << 20  # bytes
MAX_ANSWER = 64 << 10  # bytes
ROOM_STEP = 64 << 20  # bytes reserved at a time; the directory is measured before each reservation
ABANDONED = 3600.0  # seconds after which a half-written file is taken for abandoned
FULL_FOR = 1.0  # seconds until a full cache is measured again

_BLOB_NAME = re.compile(r"(?:unpacked-)?(?:sha256|sha512)-[0-9a-f]{64,128}|(?:url-)?[0-9a-f]{64}")
_DOCUMENT_NAME = re.compile(r"(?:sha256|sha512)-[0-9a-f]{64,128}|\.new-[0-9a-f]+")
_ANSWER_NAME = re.compile(r"[0-9a-f]{64}\.json|\.new-[0-9a-f]+")


def default_directory() -> str:
    """``$XDG_CACHE_HOME/pyerofs``, or ``~/.cache/pyerofs``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "pyerofs")


@dataclass(frozen=True, slots=True)
class Blob:
    """One blob of the cache, as listed."""

    folder: PrivateDirectory
    file: str  # the name of its files in ``folder``, without suffix
    key: str
    name: str  # the source's name when it was fetched
    size: int  # bytes
    stored: int  # bytes on disk
    state: int
    used: float  # seconds since 1970
    verified: bool


class CacheDir:
    """A cache directory.  Methods block."""

    def __init__(self, path: str | None, limit: int) -> None:
        """Open the directory, or create it.  ``path``: None for the default; ``limit``: bytes that may
        be stored.  Raises SourceError."""
        self.path = path or default_directory()
        self.limit = limit
        self._lock = threading.Lock()
        self._room = 0  # bytes reserved and not yet used
        self._spooled = 0  # bytes in files without a name
        self._writing = 0  # bytes being written now
        self._full_until = 0.0
        self._warned: set[str] = set()  # file names of the blobs that a warning was logged for
        try:
            self._top = PrivateDirectory.open(self.path, links=True)
            self._verified = self._top.subdirectory("verified")
            self._claimed = self._top.subdirectory("claimed")
            self._documents = self._top.subdirectory("documents")
            self._answers = self._top.subdirectory("answers")
            self._old = self._old_blobs()
            if not os.access(self._claimed.path, os.W_OK):
                raise OSError(errno.EACCES, "not writable", self.path)
        except OSError as e:
            raise _unusable(e, self.path) from None

    def _old_blobs(self) -> PrivateDirectory | None:
        try:
            return self._top.subdirectory("blobs", create=False)
        except OSError:
            return None

    def close(self) -> None:
        """Close the directories.  Idempotent."""
        for folder in (self._top, self._verified, self._claimed, self._documents, self._answers):
            folder.close()
        if self._old is not None:
            self._old.close()

    # blobs ------------------------------------------------------------------------------

    def blob(
        self, origin: Origin, what: str, size: int, name: str, digest: str | None = None
    ) -> BlobStore:
        """The store of a blob of ``size`` bytes that an origin claims to have.  ``what``, a digest or a
        version, tells the origin's blobs apart.  If the cache's files can't be used, the store keeps
        segments in memory.

        Raises SourceError if the verified blob with this digest has another size."""
        verified = None if digest is None else self.verified(digest)
        if verified is not None and verified.size != size:
            verified.close()
            raise SourceError(
                f"{name}: the server claims {size} bytes, but the blob with this digest has"
                f" {verified.size}"
            )
        key = origin.key(what, size)
        about = {"key": digest or f"url:{key}", "name": name}
        store = BlobStore(
            name,
            size,
            digest,
            verified=verified,
            claimed=lambda: Claimed(self._claimed, key, size, about, vouched=digest is not None),
            settled=None if digest is None else (self._verified, _file_name(digest)),
            storing=self.storing,
            close=self.close,
        )
        if digest is not None and verified is None and not store.present():
            store.adopt(self.verified(digest))  # another process may just have verified the blob
        return store

    def verified(self, key: str) -> Verified | None:
        """Open a verified blob; None if there is none, or its files can't be used (logged once)."""
        name = _file_name(key)
        for _ in range(2):
            try:
                store = Verified.open(self._verified, name)
            except OSError as e:
                if name not in self._warned:
                    self._warned.add(name)
                    log.warning(
                        "%s: the cached blob can't be used: %s", e.filename or self.path, e.strerror
                    )
                return None
            if store is not None or not self._adopt_old(key, name):
                return store
        return None

    def whole(self, key: str, name: str) -> BlobStore | None:
        """The store of a verified blob that can't be fetched in parts; None unless all of its segments
        are stored."""
        store = self.verified(key)
        if store is None:
            return None
        if not store.complete:
            store.close()
            return None
        return BlobStore(name, store.size, key, verified=store, close=self.close)

    def known_size(self, digest: str) -> int | None:
        """The size of a verified blob in bytes; None if there is none."""
        store = self.verified(digest)
        if store is None:
            return None
        store.close()
        return store.size

    def keep(self, key: str, fd: int, size: int, name: str) -> None:
        """Store a file as a verified blob; the caller has checked its digest.  Raises SourceError."""
        try:
            keep_verified(self._verified, _file_name(key), fd, size, {"key": key, "name": name})
            self._spooled = 0  # the file has a name now
        except OSError as e:
            raise _unusable(e, self.path) from None

    def _adopt_old(self, key: str, name: str) -> bool:
        """Make a blob of an older version, which may not have checked it, a verified one if its digest
        is right.  Removes the old files in any case; returns whether the blob was adopted."""
        if self._old is None or not key.startswith(("sha256:", "sha512:")):
            return False
        try:
            fd = self._old.open_file(f"{name}.data", os.O_RDONLY)
        except OSError:
            return False
        try:
            with self.alone(key) as alone:
                size = os.fstat(fd).st_size
                if alone and size <= MAX_BLOB and _file_digest(fd, key) == key:
                    about = {"key": key, "name": "kept by an older version"}
                    keep_verified(self._verified, name, fd, size, about)
                    return True
        except (OSError, SourceError):
            pass
        finally:
            os.close(fd)
            self._remove(self._old, name)
        return False

    @contextmanager
    def alone(self, key: str) -> Iterator[bool]:
        """Lock the making of a blob; yields False at once if another process holds the lock.  Raises
        SourceError."""
        # one byte of one file for each key: a lock ends with its process, and leaves no file
        at = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
        try:
            fd = self._top.open_file("making", os.O_RDWR | os.O_CREAT)
        except OSError as e:
            raise _unusable(e, self.path) from None
        try:
            try:
                lock(fd, fcntl.F_WRLCK, at, 1)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(fd)

    def blobs(self) -> Iterator[Blob]:
        """All blobs, unordered.  Raises OSError."""
        for folder in filter(None, (self._verified, self._claimed, self._old)):
            for file_name in folder.names():
                name = file_name.removesuffix(".map")
                if name != file_name and _BLOB_NAME.fullmatch(name):
                    try:
                        yield self._described(folder, name)
                    except OSError:
                        continue

    def _described(self, folder: PrivateDirectory, name: str) -> Blob:
        used = os.stat(f"{name}.map", dir_fd=folder.fd, follow_symlinks=False).st_mtime
        data = os.stat(f"{name}.data", dir_fd=folder.fd, follow_symlinks=False)
        header = parse_header(folder.read(f"{name}.map", HEADER_SIZE))
        # a blob with a damaged header is evicted first
        size, state, about = (data.st_size, BAD, {}) if header is None else header
        key, shown = str(about.get("key", name)), str(about.get("name", "?"))
        verified = folder is self._verified and state == COMPLETE
        return Blob(folder, name, key, shown, size, data.st_blocks * 512, state, used, verified)

    def open_blob(self, blob: Blob) -> Verified | Claimed | None:
        """Open the files of a listed blob; None if they can't be used.  Raises OSError."""
        if blob.folder is self._verified:
            return Verified.open(blob.folder, blob.file)
        if blob.folder is self._claimed and blob.state != BAD:
            about = {"key": blob.key, "name": blob.name}
            has_digest = not blob.key.startswith("url:")
            return Claimed(blob.folder, blob.file, blob.size, about, vouched=has_digest)
        return None

    def remove(self, blob: Blob) -> bool:
        """Unlink a blob unless a process uses it; returns whether it was unlinked."""
        return self._remove(blob.folder, blob.file)

    def _remove(self, folder: PrivateDirectory, name: str) -> bool:
        try:
            fd = folder.open_file(f"{name}.map", os.O_RDWR)
        except OSError as e:
            if e.errno == errno.ENOENT:
                return False
            fd = -1  # a link, a fifo or another user's file: unlinked as well
        try:
            if fd >= 0:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlink_pair(folder, name)
            return True
        except OSError:  # in use; or a directory, which this module never makes here
            return False
        finally:
            if fd >= 0:
                os.close(fd)

    # room -------------------------------------------------------------------------------

    def room(self, n: int) -> bool:
        """Reserve ``n`` bytes; returns whether that many may be stored.  Evicts the least recently used
        blobs, except those in use, if necessary.  Raises OSError."""
        with self._lock:
            return self._reserve(n)

    def _reserve(self, n: int) -> bool:
        """The same as ``room``; the caller holds the lock."""
        if self._room < n and time.monotonic() >= self._full_until:
            wanted = max(n, min(ROOM_STEP, self.limit // 16))
            uncounted = self._spooled + self._writing  # not counted by ``_evict``
            stored, _ = self._evict(self.limit - uncounted - wanted)
            self._room = min(self.limit - uncounted - stored, wanted)
            if self._room < n:
                self._full_until = time.monotonic() + FULL_FOR
        if self._room < n:
            return False
        self._room -= n
        return True

    @contextmanager
    def storing(self, n: int) -> Iterator[bool]:
        """Reserve ``n`` bytes, as ``room`` does, and yield the result.  Until the block ends, other
        threads count these bytes as being written.  Raises OSError."""
        with self._lock:  # one lock for both: in between, another thread would miss these bytes
            reserved = self._reserve(n)
            self._writing += n
        try:
            yield reserved
        finally:
            with self._lock:
                self._writing -= n

    def spool_room(self, n: int) -> bool:
        """The same as ``room`` for a file without a name, which is not in the directory.  Raises
        OSError."""
        with self._lock:
            reserved = self._reserve(n)
            self._spooled += n if reserved else 0
            return reserved

    def evict(self, limit: int | None = None) -> int:
        """Remove the least recently used blobs, except those in use, until the rest fits ``limit``
        bytes (default: the cache's limit).  Returns how many were removed.  Raises OSError."""
        return self._evict(self.limit if limit is None else limit)[1]

    def _evict(self, limit: int) -> tuple[int, int]:
        """The same as ``evict``; returns (bytes stored afterwards, number of blobs removed)."""
        self._sweep()
        blobs = sorted(self.blobs(), key=lambda b: (b.state != BAD, b.used))
        total = sum(b.stored for b in blobs)
        removed = 0
        for blob in blobs:
            if total <= limit and blob.state != BAD:
                break
            if self.remove(blob):
                total -= blob.stored
                removed += 1
                log.info("cache: evicted %s", blob.name)
        return total, removed

    def _sweep(self) -> None:
        """Remove files that dead processes left: data without a map, and half-written files."""
        before = time.time() - ABANDONED
        for folder in (self._verified, self._claimed, self._documents, self._answers):
            names = set(folder.names())
            for name in names:
                twinless = (
                    name.endswith(".data") and f"{name.removesuffix('.data')}.map" not in names
                )
                try:
                    if name.startswith(".") or (twinless and _BLOB_NAME.fullmatch(name[:-5])):
                        status = os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
                        if status.st_mtime < before and stat.S_ISREG(status.st_mode):
                            folder.unlink(name)
                except OSError:
                    continue

    def temporary(self) -> int:
        """Create a file without a name on the cache's file system; returns its descriptor.  Raises
        SourceError."""
        try:
            return self._top.temporary()
        except OSError as e:
            raise _unusable(e, self.path) from None

    # documents and answers --------------------------------------------------------------

    def document(self, digest: str) -> bytes | None:
        """A manifest, index or configuration; None if it is not cached or does not match its digest."""
        try:
            data = self._documents.read(_file_name(digest), MAX_DOCUMENT + 1)
        except OSError:
            return None
        return data if digest_of(data, digest) == digest else None

    def keep_document(self, digest: str, data: bytes) -> None:
        """Store a document that was verified.  Best effort."""
        _try_write(self._documents, _file_name(digest), data)

    def forget_documents(self) -> None:
        """Remove all documents and answers.  Raises OSError."""
        for folder, form in ((self._documents, _DOCUMENT_NAME), (self._answers, _ANSWER_NAME)):
            for name in folder.names():
                if form.fullmatch(name):
                    try:
                        folder.unlink(name)
                    except OSError:
                        pass  # a directory, which this module never makes here

    def answer(self, origin: Origin, question: str) -> dict[str, Any] | None:
        """The origin's last answer to a question; None if none is cached."""
        try:
            answer = json.loads(self._answers.read(f"{origin.key(question)}.json", MAX_ANSWER))
        except (OSError, ValueError, RecursionError):
            return None
        return answer if isinstance(answer, dict) else None

    def keep_answer(self, origin: Origin, question: str, answer: dict[str, Any]) -> None:
        """Store an answer.  Best effort."""
        _try_write(self._answers, f"{origin.key(question)}.json", json.dumps(answer).encode())


def _file_name(key: str) -> str:
    return key.replace(":", "-")


def _unusable(e: OSError, path: str) -> SourceError:
    """The error for a cache that can't be used: NoRoom if the disk is full."""
    kind = NoRoom if e.errno in (errno.ENOSPC, errno.EDQUOT) else SourceError
    return kind(
        f"the cache {e.filename or path} can't be used: {e.strerror}"
        " (--cache-dir names another directory)"
    )


def _try_write(folder: PrivateDirectory, name: str, data: bytes) -> None:
    try:
        folder.write(name, data)
    except OSError as e:
        log.info("cache: %s was not stored: %s", name, e.strerror)


def _file_digest(fd: int, like: str) -> str:
    """The digest of a whole file, by the algorithm of the digest ``like``."""
    algorithm = like.partition(":")[0]
    hasher = hashlib.new(algorithm)
    at = 0
    while data := os.pread(fd, SEGMENT, at):
        hasher.update(data)
        at += len(data)
    return f"{algorithm}:{hasher.hexdigest()}"


def temporary_file(cache: CacheDir | None) -> int:
    """Create a file without a name, on the cache's file system if there is room, else in the directory
    for temporary files; returns its descriptor.  Raises SourceError."""
    if cache is not None:
        try:
            return cache.temporary()
        except NoRoom:
            pass
    try:
        with tempfile.TemporaryFile() as f:
            return os.dup(f.fileno())
    except OSError as e:
        raise SourceError(
            f"{tempfile.gettempdir()}: can't create a temporary file: {e.strerror}"
            " ($TMPDIR names another directory)"
        ) from None


def digest_of(data: bytes, like: str) -> str:
    """The digest of ``data``, by the algorithm of the digest ``like``."""
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"

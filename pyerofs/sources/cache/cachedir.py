"""The cache directory that all processes and commands of a user share.

    verified/ALGORITHM-HEX.data, .map   blobs whose digest was checked over a whole pass, by digest
    claimed/HEX.data, .map              blobs as their servers claim them to be, by claim (``claim.py``)
    documents/ALGORITHM-HEX             manifests, indexes and configurations, by digest
    answers/HEX.json                    what a reference or URL led to when last asked, by origin
    blobs/                              what older versions kept: adopted where its digest is right

The directory is private: it and everything in it has to belong to us, and nobody else may be able to
write to it (``pyerofs.system.private``).  It holds no credentials.
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

MAX_DOCUMENT = 16 << 20
MAX_ANSWER = 64 << 10
ROOM_STEP = 64 << 20  # bytes that may be stored before others' growth is looked at again
ABANDONED = 3600.0  # seconds after which nobody will go on with a half-written file
FULL_FOR = 1.0  # seconds after which a full cache is looked at again

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
    file: str  # its files' name in there, without suffix
    key: str
    name: str  # what it was fetched as
    size: int
    stored: int  # bytes on disk
    state: int
    used: float  # seconds since 1970
    verified: bool


class CacheDir:
    """A cache directory.  Methods block; they raise SourceError where the directory can't be used."""

    def __init__(self, path: str | None, limit: int) -> None:
        self.path = path or default_directory()
        self.limit = limit
        self._lock = threading.Lock()
        self._room = 0  # bytes that may be stored without looking
        self._spooled = 0  # bytes in files without a name
        self._writing = 0  # bytes that are just being written
        self._full_until = 0.0
        self._warned: set[str] = set()  # blobs that can't be used
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
        """Let go of the directory; idempotent."""
        for folder in (self._top, self._verified, self._claimed, self._documents, self._answers):
            folder.close()
        if self._old is not None:
            self._old.close()

    # blobs ------------------------------------------------------------------------------

    def blob(
        self, origin: Origin, what: str, size: int, name: str, digest: str | None = None
    ) -> BlobStore:
        """What is kept of a blob that an origin claims to have.  ``what`` tells it from others of the
        origin: a digest or a version.  Never fails for what is on disk: it goes on in memory."""
        verified = None if digest is None else self.verified(digest)
        if verified is not None and verified.size != size:
            verified.close()
            raise SourceError(f"{name}: has {verified.size} bytes, not {size} as claimed")
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
            store.adopt(self.verified(digest))  # it may just have been found right by others
        return store

    def verified(self, key: str) -> Verified | None:
        """A blob whose digest was checked, if it is there."""
        name = _file_name(key)
        for _ in range(2):
            try:
                found = Verified.open(self._verified, name)
            except OSError as e:
                if name not in self._warned:
                    self._warned.add(name)
                    log.warning("%s: can't be used: %s", e.filename or self.path, e.strerror)
                return None
            if found is not None or not self._adopt_old(key, name):
                return found
        return None

    def whole(self, key: str, name: str) -> BlobStore | None:
        """A verified blob that can't be fetched again in parts, if all of it is there."""
        found = self.verified(key)
        if found is None:
            return None
        if not found.complete:
            found.close()
            return None
        return BlobStore(name, found.size, key, verified=found, close=self.close)

    def known_size(self, digest: str) -> int | None:
        """The size of a verified blob; None if it is not there."""
        found = self.verified(digest)
        if found is None:
            return None
        found.close()
        return found.size

    def keep(self, key: str, fd: int, size: int, name: str) -> None:
        """Put a file whose digest was checked among the verified blobs.  Raises SourceError."""
        try:
            keep_verified(self._verified, _file_name(key), fd, size, {"key": key, "name": name})
            self._spooled = 0  # it has a name now
        except OSError as e:
            raise _unusable(e, self.path) from None

    def _adopt_old(self, key: str, name: str) -> bool:
        """Whether an older version, which believed blobs before they were checked, has left this one
        with the right digest; it is adopted then.  A wrong one is removed."""
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
        """Whether no other process is making this blob, which none will meanwhile."""
        # one byte of one file for each key: locks end with their process, and nothing is left
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
        """All blobs, in no order."""
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
        found = parse_header(folder.read(f"{name}.map", HEADER_SIZE))
        # what can't be read is worth nothing: the first to go
        size, state, about = (data.st_size, BAD, {}) if found is None else found
        key, shown = str(about.get("key", name)), str(about.get("name", "?"))
        verified = folder is self._verified and state == COMPLETE
        return Blob(folder, name, key, shown, size, data.st_blocks * 512, state, used, verified)

    def open_blob(self, blob: Blob) -> Verified | Claimed | None:
        """The files of a blob that was listed.  Raises OSError."""
        if blob.folder is self._verified:
            return Verified.open(blob.folder, blob.file)
        if blob.folder is self._claimed and blob.state != BAD:
            about = {"key": blob.key, "name": blob.name}
            vouched = not blob.key.startswith("url:")
            return Claimed(blob.folder, blob.file, blob.size, about, vouched=vouched)
        return None

    def remove(self, blob: Blob) -> bool:
        """Unlink a blob unless a process uses it; whether that was done."""
        return self._remove(blob.folder, blob.file)

    def _remove(self, folder: PrivateDirectory, name: str) -> bool:
        try:
            fd = folder.open_file(f"{name}.map", os.O_RDWR)
        except OSError as e:
            if e.errno == errno.ENOENT:
                return False
            fd = -1  # no file of ours, but in our place: a link, a fifo
        try:
            if fd >= 0:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlink_pair(folder, name)
            return True
        except OSError:  # locked; or a directory, which is not ours to remove
            return False
        finally:
            if fd >= 0:
                os.close(fd)

    # room -------------------------------------------------------------------------------

    def room(self, n: int) -> bool:
        """Whether ``n`` more bytes may be stored; then they count as stored.  Others' blobs that were
        unused for longest go for it."""
        with self._lock:
            return self._reserve(n)

    def _reserve(self, n: int) -> bool:
        """The same, with the lock held."""
        if self._room < n and time.monotonic() >= self._full_until:
            wanted = max(n, min(ROOM_STEP, self.limit // 16))
            unseen = self._spooled + self._writing  # by a look at what is stored
            stored, _ = self._evict(self.limit - unseen - wanted)
            self._room = min(self.limit - unseen - stored, wanted)
            if self._room < n:
                self._full_until = time.monotonic() + FULL_FOR
        if self._room < n:
            return False
        self._room -= n
        return True

    @contextmanager
    def storing(self, n: int) -> Iterator[bool]:
        """Whether there is room, as ``room``; while they are written, other threads that look at what
        is stored count them, too."""
        with self._lock:  # once: a look between the two would miss what is not yet written
            found = self._reserve(n)
            self._writing += n
        try:
            yield found
        finally:
            with self._lock:
                self._writing -= n

    def spool_room(self, n: int) -> bool:
        """The same as ``room`` for a file without a name, which no look at the directory finds."""
        with self._lock:
            found = self._reserve(n)
            self._spooled += n if found else 0
            return found

    def evict(self, limit: int | None = None) -> int:
        """Remove the blobs unused for longest until what is stored fits the limit; how many went."""
        return self._evict(self.limit if limit is None else limit)[1]

    def _evict(self, limit: int) -> tuple[int, int]:
        """The same; bytes that are stored afterwards, and how many went."""
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
                log.info("cache: %s removed", blob.name)
        return total, removed

    def _sweep(self) -> None:
        """Remove what processes that died have left: files without their twin, half-written ones."""
        before = time.time() - ABANDONED
        for folder in (self._verified, self._claimed, self._documents, self._answers):
            names = set(folder.names())
            for name in names:
                twinless = (
                    name.endswith(".data") and f"{name.removesuffix('.data')}.map" not in names
                )
                try:
                    if name.startswith(".") or (twinless and _BLOB_NAME.fullmatch(name[:-5])):
                        found = os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
                        if found.st_mtime < before and stat.S_ISREG(found.st_mode):
                            folder.unlink(name)
                except OSError:
                    continue

    def temporary(self) -> int:
        """The descriptor of a new file without a name, on the cache's file system."""
        try:
            return self._top.temporary()
        except OSError as e:
            raise _unusable(e, self.path) from None

    # documents and answers --------------------------------------------------------------

    def document(self, digest: str) -> bytes | None:
        """A manifest or configuration; None if it is not there, or is not what it should be."""
        try:
            found = self._documents.read(_file_name(digest), MAX_DOCUMENT + 1)
        except OSError:
            return None
        return found if digest_of(found, digest) == digest else None

    def keep_document(self, digest: str, data: bytes) -> None:
        """Keep a document that was verified.  Best effort."""
        _try_write(self._documents, _file_name(digest), data)

    def forget_documents(self) -> None:
        """Drop all documents and answers."""
        for folder, form in ((self._documents, _DOCUMENT_NAME), (self._answers, _ANSWER_NAME)):
            for name in folder.names():
                if form.fullmatch(name):
                    try:
                        folder.unlink(name)
                    except OSError:
                        pass  # a directory, which is not ours

    def answer(self, origin: Origin, question: str) -> dict[str, Any] | None:
        """What an origin answered when this was last asked."""
        try:
            found = json.loads(self._answers.read(f"{origin.key(question)}.json", MAX_ANSWER))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def keep_answer(self, origin: Origin, question: str, answer: dict[str, Any]) -> None:
        """Keep an answer.  Best effort."""
        _try_write(self._answers, f"{origin.key(question)}.json", json.dumps(answer).encode())


def _file_name(key: str) -> str:
    return key.replace(":", "-")


def _unusable(e: OSError, path: str) -> SourceError:
    """One line about a cache that can't be used."""
    kind = NoRoom if e.errno in (errno.ENOSPC, errno.EDQUOT) else SourceError
    return kind(f"the cache {e.filename or path} can't be used: {e.strerror} (--cache-dir)")


def _try_write(folder: PrivateDirectory, name: str, data: bytes) -> None:
    try:
        folder.write(name, data)
    except OSError as e:
        log.info("cache: %s not kept: %s", name, e.strerror)


def _file_digest(fd: int, like: str) -> str:
    """The digest of a whole file, by the algorithm of another digest."""
    algorithm = like.partition(":")[0]
    found = hashlib.new(algorithm)
    at = 0
    while data := os.pread(fd, SEGMENT, at):
        found.update(data)
        at += len(data)
    return f"{algorithm}:{found.hexdigest()}"


def temporary_file(cache: CacheDir | None) -> int:
    """The descriptor of a file without a name: on the cache's file system, or where such files go."""
    if cache is not None:
        try:
            return cache.temporary()
        except NoRoom:
            pass
    try:
        with tempfile.TemporaryFile() as f:
            return os.dup(f.fileno())
    except OSError as e:
        raise SourceError(f"{tempfile.gettempdir()}: {e.strerror}") from None


def digest_of(data: bytes, like: str) -> str:
    """The digest of some bytes, by the algorithm that another digest is of."""
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"

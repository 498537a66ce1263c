"""The cache directory that all processes and commands share.

    blobs/ALGORITHM-HEX.data, .map   blobs by digest, or by URL and validator (``store.py``)
    documents/ALGORITHM-HEX          manifests, indexes and configurations, by digest
    answers/HEX.json                 what a reference or URL led to when last asked

The directory is private (0700).  It holds no credentials.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyerofs.errors import SourceError
from pyerofs.sources.store import (
    BAD,
    COMPLETE,
    DiskStore,
    read_header,
)

log = logging.getLogger("pyerofs")

MAX_DOCUMENT = 16 << 20


def default_directory() -> str:
    """``$XDG_CACHE_HOME/pyerofs``, or ``~/.cache/pyerofs``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "pyerofs")


@dataclass(frozen=True, slots=True)
class Blob:
    """One blob of the cache, as listed."""

    key: str
    name: str  # what it was fetched as
    size: int
    stored: int  # bytes on disk
    state: int
    used: float  # seconds since 1970
    path: str


class CacheDir:
    """A cache directory.  Methods block; they raise SourceError where the directory can't be used."""

    def __init__(self, path: str | None, limit: int) -> None:
        self.path = path or default_directory()
        self.limit = limit
        try:
            os.makedirs(os.path.dirname(self.path) or "/", exist_ok=True)
            for name in ("", "blobs", "documents", "answers"):
                os.makedirs(os.path.join(self.path, name), mode=0o700, exist_ok=True)
            if not os.access(os.path.join(self.path, "blobs"), os.W_OK):
                raise SourceError(f"{self.path}: not writable")
        except OSError as e:
            raise SourceError(f"{self.path}: {e.strerror}") from None

    # blobs ------------------------------------------------------------------------------

    def _base(self, key: str) -> str:
        return os.path.join(self.path, "blobs", key.replace(":", "-"))

    def store(self, key: str, size: int, name: str) -> DiskStore:
        """The store of a blob, made if need be.  Raises SourceError."""
        try:
            return DiskStore(self._base(key), size, {"key": key, "name": name})
        except OSError as e:
            raise SourceError(f"{self.path}: {e.strerror}") from None

    @contextmanager
    def alone(self, key: str) -> Iterator[bool]:
        """Whether no other process is making this blob, which none will meanwhile."""
        path = self._base(key) + ".lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise SourceError(f"{path}: {e.strerror}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
            os.unlink(path)
        except BlockingIOError:
            yield False
        finally:
            os.close(fd)

    def known_size(self, key: str) -> int | None:
        """The size of a blob that is there completely; None if it is not."""
        found = read_header(self._base(key) + ".map")
        return found[0] if found is not None and found[1] == COMPLETE else None

    def blobs(self) -> Iterator[Blob]:
        """All blobs, in no order."""
        folder = os.path.join(self.path, "blobs")
        for name in os.listdir(folder):
            path = os.path.join(folder, name.removesuffix(".map"))
            if not name.endswith(".map"):
                continue
            header = read_header(path + ".map")
            try:
                used = os.stat(path + ".map").st_mtime
                stored = os.stat(path + ".data").st_blocks * 512
            except OSError:
                continue
            if header is not None:
                size, state, about = header
                key, shown = str(about.get("key", "?")), str(about.get("name", "?"))
                yield Blob(key, shown, size, stored, state, used, path)

    def remove(self, path: str) -> bool:
        """Unlink a blob unless somebody uses it; whether that was done."""
        try:
            fd = os.open(path + ".map", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for suffix in (".data", ".map"):
                try:
                    os.unlink(path + suffix)
                except FileNotFoundError:
                    pass
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(fd)

    def evict(self, limit: int | None = None) -> int:
        """Remove the blobs unused for longest until what is stored fits the limit; how many went."""
        limit = self.limit if limit is None else limit
        blobs = sorted(self.blobs(), key=lambda b: b.used)
        total = sum(b.stored for b in blobs)
        removed = 0
        for blob in blobs:
            if total <= limit and blob.state != BAD:
                continue
            if self.remove(blob.path):
                total -= blob.stored
                removed += 1
                log.info("cache: %s removed", blob.name)
        return removed

    # documents and answers --------------------------------------------------------------

    def document(self, digest: str) -> bytes | None:
        """A manifest or configuration; None if it is not there, or is not what it should be."""
        try:
            with open(self._document(digest), "rb") as f:
                found = f.read(MAX_DOCUMENT + 1)
        except OSError:
            return None
        return found if digest_of(found, digest) == digest else None

    def keep_document(self, digest: str, data: bytes) -> None:
        """Keep a document that was verified.  Best effort."""
        self._write(self._document(digest), data)

    def _document(self, digest: str) -> str:
        return os.path.join(self.path, "documents", digest.replace(":", "-"))

    def forget_documents(self) -> None:
        """Drop all documents and answers."""
        for folder in ("documents", "answers"):
            for name in os.listdir(os.path.join(self.path, folder)):
                os.unlink(os.path.join(self.path, folder, name))

    def answer(self, question: str) -> dict[str, Any] | None:
        """What was the answer when this was last asked."""
        try:
            with open(self._answer(question), "rb") as f:
                found = json.loads(f.read(1 << 16))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def keep_answer(self, question: str, answer: dict[str, Any]) -> None:
        """Keep an answer.  Best effort."""
        self._write(self._answer(question), json.dumps(answer).encode())

    def _answer(self, question: str) -> str:
        return os.path.join(
            self.path, "answers", hashlib.sha256(question.encode()).hexdigest() + ".json"
        )

    def _write(self, path: str, data: bytes) -> None:
        """Write a whole file, or nothing."""
        try:
            fd, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".new-")
        except OSError:
            return
        try:
            with open(fd, "wb") as f:
                f.write(data)
            os.replace(temporary, path)
        except OSError:
            try:
                os.unlink(temporary)
            except OSError:
                pass


def temporary_file(directory: str | None) -> int:
    """A descriptor of an unlinked file."""
    try:
        fd, path = tempfile.mkstemp(dir=directory, prefix=".download-")
        os.unlink(path)
        return fd
    except OSError as e:
        raise SourceError(f"{e.filename or directory}: {e.strerror}") from None


def digest_of(data: bytes, like: str) -> str:
    """The digest of some bytes, by the algorithm that another digest is of."""
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"

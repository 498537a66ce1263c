"""Which files were opened, for ``--record``."""

from __future__ import annotations

import logging
import mmap
import os
import threading

from pyerofs.errors import ErofsError
from pyerofs.format import tree
from pyerofs_fuse.answers import Answers
from pyerofs_fuse.mount import write_record

MAX_RECORDED = 1 << 20  # files
_SIZE = 8 * (1 + MAX_RECORDED)  # bytes: how many files, and their nids in the order of opening

log = logging.getLogger("pyerofs-fuse")


class Record:
    """The nids of files that were opened, in memory that outlives the server which adds them.

    Its threads may share one record, and so may successors; processes that serve at the same time may
    not."""

    def __init__(self, path: str, fd: int | None = None) -> None:
        """``path``: of the list to be written.  ``fd``: the memory of an earlier record.  Raises
        OSError."""
        self._path = path
        self.fd = os.memfd_create("record") if fd is None else fd
        os.ftruncate(self.fd, _SIZE)
        self._words = memoryview(mmap.mmap(self.fd, _SIZE)).cast("Q")
        self._known: set[int] = set()
        self._lock = threading.Lock()

    def _nids(self) -> list[int]:
        return self._words[1 : 1 + min(self._words[0], MAX_RECORDED)].tolist()

    def add(self, nid: int) -> None:
        """Add a file unless it is there."""
        with self._lock:
            if not self._known:
                self._known.update(self._nids())
            count = self._words[0]
            if nid not in self._known and count < MAX_RECORDED:
                self._known.add(nid)
                self._words[1 + count] = nid
                self._words[0] = count + 1

    def write(self, answers: Answers) -> None:
        """Write the list of paths.  Logs errors."""
        try:
            write_record(self._path, tree.paths_of(answers.volume, self._nids()))
        except ErofsError as e:
            log.warning("%s: can't write the list of opened files: %s", self._path, e)

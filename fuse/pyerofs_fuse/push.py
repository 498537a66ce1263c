"""Give the kernel data that it has not asked for, from a thread of its own.

``notify_store`` puts data into the kernel's page cache.  It waits for a page that a READ under way has
locked, so it must never run where READs are answered, nor in the threads that decode for them; in
this one it may wait as long as it likes.  Everything here is best effort: what does not fit into the
queue is dropped, and errors (an unmount, say) end nothing but one push.
"""

from __future__ import annotations

import queue
import threading

import pyfuse3

MAX_QUEUED = 256  # pieces: some MiB, of which most are in the cache of decoded data anyway
PAGE = 4096

Job = tuple[int, int, int, memoryview]  # node, offset, file size, data


class Pusher:
    """The thread that stores; started with the first push."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Job | None] = queue.Queue(MAX_QUEUED)
        self._thread: threading.Thread | None = None
        self._stopping = False

    def push(self, node: int, offset: int, size: int, data: memoryview) -> bool:
        """Store the whole pages of ``data``, which lies at ``offset`` of a node whose file has
        ``size`` bytes.  False if there is too much to do."""
        if self._stopping:
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pusher", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait((node, offset, size, data))
        except queue.Full:
            return False
        return True

    def stop(self, patience: float) -> None:
        """Drop what is queued and wait, ``patience`` seconds at most, for what is under way.
        Blocks: call it in a thread while READs are still answered, or after the mount is gone."""
        self._stopping = True
        if self._thread is None:
            return
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            self._queue.put(None)
        self._thread.join(patience)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._stopping:
                continue
            try:
                self._store(*job)
            except OSError:
                pass  # the kernel has let go of the inode, or of the mount

    def _store(self, node: int, offset: int, size: int, data: memoryview) -> None:
        end = offset + len(data)
        first = (offset + PAGE - 1) & -PAGE
        last = end if end >= size else end & -PAGE  # a file's last page may be short
        if first < last:
            pyfuse3.notify_store(node, first, data[first - offset : last - offset])  # type: ignore[arg-type]

"""An image behind a network, for the direct engine: each server opens it itself.

Its sources live in a thread, which no fork would take along.  So the first server opens the image after
the mount was made, and tells the keeper whether that succeeded; successors open the very bytes that the
first one has opened, or fail.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pyerofs.errors import ErofsError, SourceError
from pyerofs.format.model import ENCODED, PLAIN
from pyerofs.image import Image
from pyerofs.image import open as open_image
from pyerofs.sources.base import hint
from pyerofs.sources.open import pinned_spec
from pyerofs.sources.portal import BlockingSource
from pyerofs.sources.spec import Access, SourceSpec
from pyerofs.system.daemon import STOPS, heeded
from pyerofs.system.progress import Download
from pyerofs.system.readiness import reading
from pyerofs.system.status import PERIOD, StatusFile
from pyerofs_fuse.mount import OpenFailed

log = logging.getLogger("pyerofs-fuse")

HEAD = 64 << 10  # bytes at an image's beginning by which a successor knows it again
MAX_REPORT = 64 << 10


class FarImage:
    """What servers need to open an image, and what the first one reports of it."""

    def __init__(
        self,
        spec: SourceSpec,
        access: Access,
        cache_size: int,
        known: dict[str, Any] | None = None,
    ) -> None:
        """``known``: what an earlier server has opened, as ``self.known`` was then."""
        self._name = spec.name
        self._spec = spec
        self._access = access
        self._cache_size = cache_size
        self.known: dict[str, Any] | None = None  # what the first server has opened
        if known is not None:
            self._learn(known)
        self._reports, self._report = os.pipe()

    def open(self) -> Image:
        """Called in a server.  Raises ErofsError.  Blocks as long as a download takes."""
        first = self.known is None
        try:
            image = self._open()
        except ErofsError as e:
            if first:
                os.write(self._report, json.dumps({"error": str(e)}).encode()[:MAX_REPORT])
            raise
        found = {"spec": self._pinned(image).to_json(), "heads": _heads(image)}
        if first:
            self._learn(found)
            os.write(self._report, json.dumps(found).encode())
        elif self.known is not None and found["heads"] != self.known["heads"]:
            image.close()
            raise SourceError(f"{self._name}: is not what was mounted any more")
        return image

    def _pinned(self, image: Image) -> SourceSpec:
        """The spec of the very bytes that were opened, as far as digests can tell."""
        pins = [s.pinned if isinstance(s, BlockingSource) else None for s in image.sources]
        return pinned_spec(self._spec, pins)

    def _learn(self, found: dict[str, Any]) -> None:
        self.known = found
        self._spec = SourceSpec.from_json(found["spec"])

    def _open(self) -> Image:
        waiting = Download()
        access = replace(self._access, progress=waiting.show)
        try:
            return open_image(self._spec, cache_size=self._cache_size, access=access)
        finally:
            waiting.close()

    def wait(self) -> None:
        """Called in the keeper: wait until the first server has opened the image.

        Raises OpenFailed; KeyboardInterrupt on a stop signal.  These signals and SIGCHLD must be
        blocked."""
        if self.known is not None:
            return
        poll = reading(self._reports)
        while not poll.poll(100):
            pending = signal.sigpending()
            if pending & {*heeded(*STOPS)}:
                raise KeyboardInterrupt
            if signal.SIGCHLD in pending and not poll.poll(0):
                raise OpenFailed(f"{self._spec.name}: the server died while it opened the image")
        found = json.loads(os.read(self._reports, MAX_REPORT))
        if "error" in found:
            raise OpenFailed(found["error"])
        self._learn(found)


def _heads(image: Image) -> list[str]:
    """What tells sources from others that have the same name: sizes, and how each begins."""
    heads = [(source.size, source.read_at(0, min(HEAD, source.size))) for source in image.sources]
    return [f"{size} {hashlib.sha256(head).hexdigest()}" for size, head in heads]


def prefetch(image: Image, paths: Sequence[str]) -> None:
    """Have the sources fetch the data of files while no reader waits for the network.  A thread sends
    the hints; it logs and skips paths that fail."""

    def work() -> None:
        for path in paths:
            try:
                for extent in image.extents(path):
                    if extent.kind in (ENCODED, PLAIN) and extent.device >= 0:
                        source = image.sources[extent.device]
                        hint(source, extent.address, extent.size or extent.length)
            except ErofsError as e:
                log.info("not prefetched: %s", e)

    threading.Thread(target=work, name="prefetch", daemon=True).start()


def publish(about: dict[str, Any], image: Image, facts: Callable[[], dict[str, int]]) -> None:
    """Maintain a status file in a thread, for as long as this process lives.  ``facts``: what else may
    change."""

    def work() -> None:
        try:
            file = StatusFile(about)
        except OSError:
            return
        while True:
            far = [source for source in image.sources if isinstance(source, BlockingSource)]
            file.write([source.status() for source in far], **facts())
            time.sleep(PERIOD)

    threading.Thread(target=work, name="status", daemon=True).start()

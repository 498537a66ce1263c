"""A local file with an expected digest: a blob of an OCI layout, or an unpacked layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import trio

from pyerofs.errors import IntegrityError
from pyerofs.sources.base import Source, Verifiable
from pyerofs.sources.local.threaded import ThreadedSource

PIECE = 4 << 20


class DigestedSource(ThreadedSource):
    """An AsyncSource over a file.  ``verified``: the caller has checked the digest already."""

    whole = False  # which parts were read is not tracked

    def __init__(self, source: Source, digest: str, *, verified: bool = False) -> None:
        super().__init__(source)
        self.verified = verified
        self.digest = digest

    @property
    def verifiable(self) -> Verifiable:
        return self

    def status(self) -> dict[str, Any]:
        return super().status() | {"verified": self.verified}

    async def verify(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Read the whole file and check its digest.  Raises IntegrityError."""
        if self.verified:
            return
        algorithm = self.digest.partition(":")[0]
        found = hashlib.new(algorithm)
        for offset in range(0, self.size, PIECE):
            data = await self.read_at(offset, min(PIECE, self.size - offset))
            await trio.to_thread.run_sync(found.update, data)
            if progress is not None:
                progress(self.name, offset + len(data), self.size)
        if f"{algorithm}:{found.hexdigest()}" != self.digest:
            raise IntegrityError(f"{self.name}: is not what its digest {self.digest} says")
        self.verified = True

"""The origin of claimed bytes: a server's address, and how the server was authenticated.

Bytes from a server are *claimed* until a digest verifies them.  The cache stores claimed bytes by
origin and shares them with no other origin: neither with another server that names the same digest,
nor with the same address when it was authenticated in another way.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass

from pyerofs.errors import SourceError
from pyerofs.sources.spec import SourceSpec

MAX_AUTHORITIES = 16 << 20  # bytes of a --cacert file: all public authorities together have 0.2 MiB


@dataclass(frozen=True, slots=True)
class Origin:
    """A repository of a registry, or a URL, and how its server was authenticated."""

    place: str  # HOST[:PORT]/REPOSITORY, or the whole URL
    authenticated: str  # "system", "cacert:DIGEST", or "no"

    def key(self, *what: str | int | None) -> str:
        """The file name, in hex, for a blob or an answer of this origin, which ``what`` identifies."""
        return hashlib.sha256(json.dumps([*astuple(self), *what]).encode()).hexdigest()


def origin_of(spec: SourceSpec, place: str) -> Origin:
    """The origin of a source.  Raises SourceError if the --cacert file can't be read."""
    if spec.insecure or spec.what.startswith("http:"):
        return Origin(place, "no")
    if spec.cacert is None:
        return Origin(place, "system")
    try:
        with open(spec.cacert, "rb") as f:
            digest = hashlib.sha256(f.read(MAX_AUTHORITIES)).hexdigest()
    except OSError as e:
        raise SourceError(f"--cacert {spec.cacert}: {e.strerror}") from None
    return Origin(place, f"cacert:{digest}")

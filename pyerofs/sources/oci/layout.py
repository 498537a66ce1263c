"""An OCI layout: a directory that holds an image as a registry would.

(OCI image specification, image-layout.md.)
"""

from __future__ import annotations

import os

from pyerofs.errors import RegistryError
from pyerofs.sources.cache.cachedir import digest_of
from pyerofs.sources.oci.manifest import (
    MAX_DOCUMENT,
    Descriptor,
    parse_descriptors,
    parse_document,
    verified,
)
from pyerofs.sources.oci.reference import is_digest
from pyerofs.sources.spec import LAYOUT

REF_NAME = "org.opencontainers.image.ref.name"


class Layout:
    """A layout directory, and the tag or digest of the image to use."""

    def __init__(self, what: str) -> None:
        """``what``: ``oci-layout:DIR[:TAG|@DIGEST]``.  Raises RegistryError."""
        self.name = what
        self._directory, self._wanted = _split(what.removeprefix(LAYOUT))
        if not os.path.isfile(os.path.join(self._directory, "index.json")):
            raise RegistryError(f"{self._directory}: is no OCI layout (it has no index.json)")

    async def document(self, descriptor: Descriptor | None) -> tuple[str, bytes]:
        """The digest and the bytes of a document; without a descriptor, of the one that is named."""
        if descriptor is None and self._wanted is None:
            data = self._index()
            return digest_of(data, "sha256"), data
        if descriptor is None:
            descriptor = self._named()
        data = _read(self.path(descriptor.digest), MAX_DOCUMENT)
        return descriptor.digest, verified(data, descriptor.digest, self.name)

    def path(self, digest: str) -> str:
        """The path of a blob's file."""
        algorithm, _, value = digest.partition(":")
        return os.path.join(self._directory, "blobs", algorithm, value)

    def _index(self) -> bytes:
        """The bytes of index.json.  Raises RegistryError if it lists several images."""
        data = _read(os.path.join(self._directory, "index.json"), MAX_DOCUMENT)
        if sum(d.platform is None for d in self._entries(data)) > 1:
            raise RegistryError(
                f"{self._directory}: holds several images; say which: {self._names(data)}"
            )
        return data

    def _entries(self, data: bytes) -> list[Descriptor]:
        index = parse_document(data, self._directory)
        return parse_descriptors(index, "manifests", self._directory)

    def _names(self, data: bytes) -> str:
        entries = self._entries(data)[:20]
        return ", ".join(
            f":{d.annotations[REF_NAME]}" if REF_NAME in d.annotations else f"@{d.digest}"
            for d in entries
        )

    def _named(self) -> Descriptor:
        data = _read(os.path.join(self._directory, "index.json"), MAX_DOCUMENT)
        for entry in self._entries(data):
            if self._wanted in (entry.digest, entry.annotations.get(REF_NAME)):
                return entry
        raise RegistryError(
            f"{self._directory}: has no {self._wanted}; it has {self._names(data) or 'nothing'}"
        )


def _split(text: str) -> tuple[str, str | None]:
    """The directory, and the tag or digest that is wanted of it."""
    directory, at, digest = text.rpartition("@")
    if at and is_digest(digest):
        return directory, digest
    directory, colon, tag = text.rpartition(":")
    if colon and "/" not in tag and not os.path.isdir(text):
        return directory, tag
    return text, None


def _read(path: str, limit: int) -> bytes:
    try:
        with open(path, "rb") as f:
            data = f.read(limit + 1)
    except OSError as e:
        raise RegistryError(f"{path}: {e.strerror}") from None
    if len(data) > limit:
        raise RegistryError(f"{path}: larger than {limit} bytes")
    return data

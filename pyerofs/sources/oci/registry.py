"""A repository in a registry: documents by tag or digest, blobs in ranges.

(OCI distribution specification, section "Pull".)
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from functools import partial

import trio

from pyerofs.errors import RegistryError, SourceError
from pyerofs.sources.cache.cachedir import CacheDir
from pyerofs.sources.cache.claim import Origin
from pyerofs.sources.net.auth import RegistryAuthority
from pyerofs.sources.net.credentials import Credentials, find_credentials
from pyerofs.sources.net.http import HttpBlob, Version, discover
from pyerofs.sources.net.transport import (
    MAX_ATTEMPTS,
    Gone,
    Refused,
    Target,
    Transient,
    Transport,
    retrying,
)
from pyerofs.sources.oci.manifest import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_DOCUMENT,
    Descriptor,
    verified,
)
from pyerofs.sources.oci.reference import Reference, is_digest
from pyerofs.sources.spec import Access, SourceSpec

log = logging.getLogger("pyerofs")

PROBE_TIMEOUT = 10.0
KNOWN_ATTEMPTS, KNOWN_TIMEOUT = 2, 10.0  # if the cache has the last answer


def patience(access: Access, known: bool) -> tuple[int, float]:
    """The number of attempts and the seconds for a request; fewer if a cached answer is ``known``."""
    if known:
        return KNOWN_ATTEMPTS, min(KNOWN_TIMEOUT, access.timeout)
    return MAX_ATTEMPTS, access.timeout


class Registry:
    """One repository of one registry.  Does not own ``transport``."""

    def __init__(
        self,
        transport: Transport,
        reference: Reference,
        spec: SourceSpec,
        access: Access,
        cache: CacheDir | None,
        origin: Origin,
    ) -> None:
        self.reference = reference
        self.origin = origin
        self._transport = transport
        self._spec = spec
        self._access = access
        self._cache = cache
        self._base: str | None = None
        self._blobs: dict[str, Target] = {}
        self.authority = RegistryAuthority(
            transport, f"repository:{reference.repository}:pull", self._credentials
        )

    async def _credentials(self) -> Credentials | None:
        if self._spec.username is not None:
            return Credentials(self._spec.username, self._access.password or "")
        return await find_credentials(self.reference.registry, self.reference.repository)

    async def base(self) -> str:
        """``https://HOST/v2/REPOSITORY``; with --insecure plain http, if TLS does not work."""
        if self._base is None:
            scheme = "https"
            if self._spec.insecure and not await self._speaks_tls():
                scheme = "http"
            reference = self.reference
            self._base = f"{scheme}://{reference.server}/v2/{reference.repository}"
        return self._base

    async def _speaks_tls(self) -> bool:
        try:
            with trio.fail_after(PROBE_TIMEOUT):
                target = Target(f"https://{self.reference.server}/v2/")
                await self._transport.document(target, {}, None, MAX_DOCUMENT)
        except (Refused, Gone):
            return True
        except (SourceError, trio.TooSlowError):
            return False
        return True

    async def document(self, descriptor: Descriptor | None) -> tuple[str, bytes]:
        """The digest and the bytes of a manifest, index or configuration (by descriptor), or of the
        reference's document.  By digest, from the cache if possible.  Raises SourceError."""
        name = str(self.reference)
        digest = self.reference.digest if descriptor is None else descriptor.digest
        cache = self._cache
        if digest is not None and cache is not None:
            found = await trio.to_thread.run_sync(cache.document, digest)
            if found is not None:
                return digest, found
        if digest is None:
            return await self._tagged()
        is_config = descriptor is not None and descriptor.media_type not in (
            *INDEX_TYPES,
            *MANIFEST_TYPES,
            "",
        )
        data, _ = await self._get("blobs" if is_config else "manifests", digest)
        verified(data, digest, name)
        await self._keep(digest, data)
        return digest, data

    async def _tagged(self) -> tuple[str, bytes]:
        """The tag's document now; if the registry can't be reached, the one that it named last."""
        reference, cache = self.reference, self._cache
        question = f"{reference.registry}/{reference.repository}:{reference.tag}"
        origin = self.origin
        known = None
        if cache is not None:
            answer = await trio.to_thread.run_sync(cache.answer, origin, question)
            digest = str((answer or {}).get("digest", ""))
            if is_digest(digest):
                found = await trio.to_thread.run_sync(cache.document, digest)
                known = None if found is None else (digest, found)
        try:
            data, headers = await self._get("manifests", reference.wanted, known is not None)
        except Transient as e:
            if known is None:
                raise
            log.warning("%s; going on with %s, which it was last time", e, known[0])
            return known
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        said = headers.get("docker-content-digest", digest)
        if is_digest(said):
            verified(data, said, str(reference))
        await self._keep(digest, data)
        if cache is not None:
            await trio.to_thread.run_sync(cache.keep_answer, origin, question, {"digest": digest})
        return digest, data

    async def _keep(self, digest: str, data: bytes) -> None:
        if self._cache is not None:
            await trio.to_thread.run_sync(self._cache.keep_document, digest, data)

    async def _get(
        self, kind: str, which: str, known: bool = False
    ) -> tuple[bytes, Mapping[str, str]]:
        """A small document with its headers.  ``kind``: ``manifests`` or ``blobs``."""

        async def once() -> tuple[bytes, Mapping[str, str]]:
            target = Target(f"{await self.base()}/{kind}/{which}")
            accept = {"Accept": ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))}
            headers = accept if kind == "manifests" else {}
            return await self._transport.document(target, headers, self.authority, MAX_DOCUMENT)

        attempts, timeout = patience(self._access, known)
        try:
            return await retrying(
                once,
                str(self.reference),
                self._transport.traffic,
                timeout,
                attempts,
            )
        except Gone:
            raise RegistryError(f"{self.reference}: the registry has no such image") from None

    async def locate(self, digest: str) -> Target:
        """The URL of a blob."""
        target = self._blobs.get(digest)
        if target is None:
            target = self._blobs[digest] = Target(f"{await self.base()}/blobs/{digest}")
        return target

    async def blob(self, digest: str, size: int | None, name: str, most: int) -> HttpBlob:
        """A blob to be read in ranges; as a whole, of at most ``most`` bytes, if the registry does not
        support ranges.  Sends a request only if the size is not known."""
        ranged = True
        if size is None:
            target = await self.locate(digest)
            found = await discover(self._transport, target, self.authority, self._access.timeout)
            if found.version is None:
                raise RegistryError(f"{target.shown}: the registry does not say how large it is")
            size, ranged = found.version.size, found.ranged
        return HttpBlob(
            self._transport,
            partial(self.locate, digest),
            Version(size),
            name=name,
            authority=self.authority,
            ranged=ranged,
            most=most,
        )

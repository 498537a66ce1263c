"""Open a SourceSpec that is not a local file as an AsyncSource: which server to ask, what the cache
has from an earlier time, and where to store fetched bytes."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator
from dataclasses import replace

import trio

from pyerofs.errors import IntegrityError, SourceError
from pyerofs.sources.base import MAX_BLOB, SEGMENT, AsyncSource, NoRoom
from pyerofs.sources.cache.blobstore import BlobStore
from pyerofs.sources.cache.cached import CachedSource
from pyerofs.sources.cache.cachedir import CacheDir, temporary_file
from pyerofs.sources.cache.claim import Origin, origin_of
from pyerofs.sources.cache.fetcher import Remote
from pyerofs.sources.cache.memorystore import MEMORY_SEGMENTS
from pyerofs.sources.local.digested import DigestedSource
from pyerofs.sources.local.file import FileSource
from pyerofs.sources.local.threaded import ThreadedSource
from pyerofs.sources.net.auth import BasicAuthority
from pyerofs.sources.net.credentials import Credentials
from pyerofs.sources.net.http import (
    Found,
    HttpBlob,
    Version,
    discover,
    download,
    whole_is_too_large,
)
from pyerofs.sources.net.transport import Pace, Target, Traffic, Transient, Transport
from pyerofs.sources.oci.layout import Layout
from pyerofs.sources.oci.manifest import Descriptor, resolve
from pyerofs.sources.oci.reference import parse_digest, parse_reference
from pyerofs.sources.oci.registry import Registry, patience
from pyerofs.sources.oci.zstd_layer import unpack
from pyerofs.sources.spec import OCI, Access, SourceSpec

log = logging.getLogger("pyerofs")


async def open_remote(spec: SourceSpec, access: Access, nursery: trio.Nursery) -> AsyncSource:
    """Open a URL, or a layer of a registry or an OCI layout; ignores ``spec.offset`` and
    ``spec.devices``.  Raises SourceError."""
    cache = await trio.to_thread.run_sync(_cache, access)
    opener = _open_layout if spec.is_layout else _open_far
    try:
        source = await opener(spec, access, nursery, cache)
    except BaseException:
        if cache is not None:
            cache.close()
        raise
    if access.verify and spec.verity is None:
        try:
            await _verify(source, access)
        except BaseException:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await source.aclose()
            raise
    return source


async def _verify(source: AsyncSource, access: Access) -> None:
    """Check the whole source against its digest.  Raises SourceError."""
    digested = source.verifiable
    if digested is None:
        raise SourceError(
            f"{source.name}: --verify needs a digest, and this source has none"
            " (--verity-root-hash checks every read)"
        )
    await digested.verify(access.progress)


async def _open_far(
    spec: SourceSpec, access: Access, nursery: trio.Nursery, cache: CacheDir | None
) -> AsyncSource:
    transport = Transport(insecure=spec.insecure, cacert=spec.cacert)
    try:
        opener = _open_http if spec.is_http else _open_registry
        source = await opener(spec, access, nursery, transport, cache)
    except BaseException:
        with trio.CancelScope(shield=True):
            await transport.aclose()
        raise
    if access.prefetch == "all":
        source.will_need(0, source.size)
    return source


def _cache(access: Access) -> CacheDir | None:
    """The cache directory; None with --no-cache, or if the directory can't be used and the user did
    not name it, or its disk is full.  Raises SourceError."""
    if not access.cache:
        return None
    try:
        return CacheDir(access.cache_dir, access.cache_limit)
    except SourceError as e:
        if access.cache_dir is not None and not isinstance(e, NoRoom):
            raise
        log.warning("%s; continuing without a cache", e)
        return None


def _cached(
    remote: Remote,
    store: BlobStore,
    access: Access,
    nursery: trio.Nursery,
    cache: CacheDir | None,
    pinned: SourceSpec | None = None,
) -> CachedSource:
    source = CachedSource(
        remote, store, nursery, timeout=access.timeout, rate=access.prefetch_rate, pinned=pinned
    )
    if cache is not None:
        nursery.start_soon(_evict, cache)
    return source


async def _evict(cache: CacheDir) -> None:
    try:
        await trio.to_thread.run_sync(cache.evict)
    except OSError as e:
        log.warning("%s: can't evict blobs from the cache: %s", cache.path, e.strerror)


def _most(access: Access) -> int:
    """The most bytes that a blob may have if its server can only send it whole, since all of it has to
    be stored then."""
    return access.cache_limit if access.cache else MEMORY_SEGMENTS * SEGMENT


# URLs --------------------------------------------------------------------------------------


async def _open_http(
    spec: SourceSpec,
    access: Access,
    nursery: trio.Nursery,
    transport: Transport,
    cache: CacheDir | None,
) -> AsyncSource:
    authority = None
    if spec.username is not None:
        if spec.what.startswith("http:") and not spec.insecure:
            raise SourceError(
                f"{spec.name}: the password would be sent in clear text (--insecure allows that)"
            )
        authority = BasicAuthority(Credentials(spec.username, access.password or ""))
    target = Target(spec.what)
    origin = origin_of(spec, spec.what)
    known = None
    if cache is not None:
        known = await trio.to_thread.run_sync(_known, cache, origin, spec.what)
    try:
        attempts, timeout = patience(access, known is not None)
        found = await discover(transport, target, authority, timeout, attempts)
    except Transient as e:
        if known is None:
            raise
        log.warning("%s; continuing with cached data", e)
        found = known
    version = found.version
    if version is None or not (found.ranged or (cache is not None and version.identified)):
        return await _download(target, authority, transport, access, cache)
    if not found.ranged and version.size > _most(access):
        raise SourceError(whole_is_too_large(spec.name, version.size))
    if cache is not None and version.identified:
        what = "\n".join((version.etag or "", version.modified or ""))
        store = await trio.to_thread.run_sync(cache.blob, origin, what, version.size, spec.name)
        answer = {"size": version.size, "etag": version.etag, "modified": version.modified}
        await trio.to_thread.run_sync(cache.keep_answer, origin, spec.what, answer)
    else:
        store = BlobStore(spec.name, version.size, None)

    async def locate() -> Target:
        return target

    blob = HttpBlob(
        transport, locate, version, name=spec.name, authority=authority, ranged=found.ranged,
        most=_most(access),
    )  # fmt: skip
    source = _cached(blob, store, access, nursery, cache)
    await trio.to_thread.run_sync(source.seed, found.beginning)
    return source


def _known(cache: CacheDir, origin: Origin, url: str) -> Found | None:
    """The server's answer when the URL was last opened; None if none is cached."""
    answer = cache.answer(origin, url) or {}
    size, etag, modified = answer.get("size"), answer.get("etag"), answer.get("modified")
    if type(size) is not int or not 0 < size <= MAX_BLOB:
        return None
    if not all(v is None or isinstance(v, str) for v in (etag, modified)):
        return None
    return Found(Version(size, etag, modified), True, b"")


async def _download(
    target: Target,
    authority: BasicAuthority | None,
    transport: Transport,
    access: Access,
    cache: CacheDir | None,
) -> AsyncSource:
    """Fetch a whole blob, from a server without ranges or versions, into a file without a name."""
    log.info("%s: the server can't send ranges, so the whole file is fetched first", target.shown)
    fd = temporary_file(cache)
    try:
        await download(
            transport, target, authority, fd, access.timeout,
            most=access.cache_limit,
            room=cache.spool_room if cache is not None else lambda _: True,
            progress=access.progress,
        )  # fmt: skip
    except NoRoom as e:
        os.close(fd)
        if cache is None:
            raise
        log.warning("%s; trying the directory for temporary files", e)
        return await _download(target, authority, transport, access, None)
    except BaseException:
        os.close(fd)
        raise
    await transport.aclose()
    return ThreadedSource(FileSource(fd, name=target.shown))


# registries --------------------------------------------------------------------------------


async def _open_registry(
    spec: SourceSpec,
    access: Access,
    nursery: trio.Nursery,
    transport: Transport,
    cache: CacheDir | None,
) -> AsyncSource:
    reference = parse_reference(spec.what.removeprefix(OCI))
    origin = origin_of(spec, f"{reference.server}/{reference.repository}")
    registry = Registry(transport, reference, spec, access, cache, origin)
    wanted = None if spec.blob is None else parse_digest(spec.blob)
    chosen = await resolve(
        registry.document, str(reference), platform=spec.platform, layer=spec.layer, blob=wanted
    )
    place = f"{reference.registry}/{reference.repository}"
    pinned = replace(
        spec, what=f"{OCI}{place}@{chosen.manifest}", layer=chosen.number,
        blob=wanted if chosen.number is None else None,
    )  # fmt: skip
    layer = chosen.layer
    most = _most(access)
    if layer is not None and layer.is_zstd:
        name = f"{place}@{layer.digest}"
        blob = await registry.blob(layer.digest, layer.size, name, MAX_BLOB)
        return await _open_zstd(layer, chosen.diff_id, blob, access, nursery, cache, pinned)
    digest = layer.digest if layer is not None else wanted
    assert digest is not None
    size = None if layer is None else layer.size
    if size is None and cache is not None:
        size = await trio.to_thread.run_sync(cache.known_size, digest)
    blob = await registry.blob(digest, size, f"{place}@{digest}", most)
    if cache is not None:
        store = await trio.to_thread.run_sync(
            cache.blob, origin, digest, blob.size, blob.name, digest
        )
    else:
        store = BlobStore(blob.name, blob.size, digest)
    return _cached(blob, store, access, nursery, cache, pinned)


# OCI layouts -------------------------------------------------------------------------------


async def _open_layout(
    spec: SourceSpec, access: Access, nursery: trio.Nursery, cache: CacheDir | None
) -> AsyncSource:
    layout = Layout(spec.what)
    wanted = None if spec.blob is None else parse_digest(spec.blob)
    chosen = await resolve(
        layout.document, layout.name, platform=spec.platform, layer=spec.layer, blob=wanted
    )
    digest = chosen.layer.digest if chosen.layer is not None else wanted
    assert digest is not None
    file = FileSource(layout.path(digest), name=f"{layout.name}, {digest}")
    if chosen.layer is not None and file.size != chosen.layer.size:
        file.close()
        raise IntegrityError(
            f"{file.name}: has {file.size} bytes, but its manifest says {chosen.layer.size}"
        )
    if chosen.layer is None or not chosen.layer.is_zstd:
        return DigestedSource(file, digest)
    blob = _LocalBlob(file)
    return await _open_zstd(chosen.layer, chosen.diff_id, blob, access, nursery, cache, None)


class _LocalBlob:
    """A local file that can be streamed.  Implements ``fetcher.Remote``."""

    ranged = True

    def __init__(self, file: FileSource) -> None:
        self.name = file.name
        self.size = file.size
        self.traffic = Traffic()
        self._file = file

    async def stream(
        self, start: int, end: int, pace: Pace
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        while start < end:
            length = min(SEGMENT, end - start)
            data = await trio.to_thread.run_sync(self._file.read_at, start, length)
            yield start, bytes(data)
            start += length

    async def aclose(self) -> None:
        self._file.close()


# zstd layers -------------------------------------------------------------------------------


async def _open_zstd(
    layer: Descriptor,
    diff_id: str | None,
    blob: Remote,
    access: Access,
    nursery: trio.Nursery,
    cache: CacheDir | None,
    pinned: SourceSpec | None,
) -> AsyncSource:
    """Open a layer that is a zstd stream.  Unpacks it into the cache, unless the cache has it."""
    key = diff_id or f"unpacked-{layer.digest}"
    while cache is not None:
        store = await trio.to_thread.run_sync(cache.whole, key, blob.name)
        if store is not None:
            await blob.aclose()
            return _cached(_Unpacked(blob.name, store.size), store, access, nursery, cache, pinned)
        with cache.alone(key) as alone:
            if alone:
                fd, size = await _unpacked(layer, diff_id, blob, access, cache)
                try:
                    await trio.to_thread.run_sync(cache.keep, key, fd, size, blob.name)
                except SourceError as e:
                    log.warning("%s; continuing without the cache", e)
                    await blob.aclose()
                    return DigestedSource(
                        FileSource(os.dup(fd), name=blob.name), layer.digest, verified=True
                    )
                finally:
                    os.close(fd)
        if not alone:
            await trio.sleep(0.2)  # another process is unpacking the layer
    fd, _ = await unpack(blob, layer, diff_id, None, access)
    await blob.aclose()
    return DigestedSource(FileSource(fd, name=blob.name), layer.digest, verified=True)


async def _unpacked(
    layer: Descriptor, diff_id: str | None, blob: Remote, access: Access, cache: CacheDir
) -> tuple[int, int]:
    """Unpack a layer into a file without a name, in the directory for temporary files if the cache has
    no room.  Returns (descriptor, size in bytes)."""
    try:
        return await unpack(blob, layer, diff_id, cache, access)
    except NoRoom:
        log.info(
            "%s: no room to unpack %s; trying the directory for temporary files",
            cache.path,
            blob.name,
        )
        return await unpack(blob, layer, diff_id, None, access)


class _Unpacked:
    """Stands for the server of a layer that can't be fetched in parts.  Implements
    ``fetcher.Remote``."""

    ranged = True

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.traffic = Traffic()

    async def stream(
        self, start: int, end: int, pace: Pace
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        if start < end:
            raise IntegrityError(
                f"{self.name}: the cached data at offset {start} is damaged; open the image again"
            )
        yield start, b""  # makes it a generator

    async def aclose(self) -> None:
        pass

"""From a SourceSpec that is not a local file to an AsyncSource: what to ask, what is known from last
time, where to keep it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import AsyncGenerator
from dataclasses import replace

import trio

from pyerofs.errors import IntegrityError, SourceError
from pyerofs.sources.auth import BasicAuthority
from pyerofs.sources.base import AsyncSource
from pyerofs.sources.cached import CachedSource, Remote
from pyerofs.sources.cachedir import CacheDir, temporary_file
from pyerofs.sources.credentials import Credentials
from pyerofs.sources.file import FileSource
from pyerofs.sources.http import Found, HttpBlob, Version, discover, download
from pyerofs.sources.layout import Layout
from pyerofs.sources.oci import Descriptor, resolve
from pyerofs.sources.reference import parse_digest, parse_reference
from pyerofs.sources.registry import Registry, patience
from pyerofs.sources.spec import OCI, Access, SourceSpec
from pyerofs.sources.store import COMPLETE, SEGMENT, MemoryStore, Store
from pyerofs.sources.threaded import ThreadedSource
from pyerofs.sources.transport import Target, Traffic, Transient, Transport
from pyerofs.sources.unpack import NoRoom, unpack

log = logging.getLogger("pyerofs")


async def open_remote(spec: SourceSpec, access: Access, nursery: trio.Nursery) -> AsyncSource:
    """A URL, a registry's layer or an OCI layout's, from its first byte.  Raises SourceError."""
    cache = await trio.to_thread.run_sync(_cache, access)
    if spec.is_layout:
        return await _open_layout(spec, access, nursery, cache)
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
    """The cache directory; None where there is to be none, or there can't be."""
    if not access.cache:
        return None
    try:
        return CacheDir(access.cache_dir, access.cache_limit)
    except SourceError as e:
        if access.cache_dir is not None:
            raise
        log.warning("%s; going on without a cache", e)
        return None


def _cached(
    remote: Remote,
    store: Store,
    access: Access,
    nursery: trio.Nursery,
    cache: CacheDir | None,
    *,
    digest: str | None,
    pinned: SourceSpec | None,
) -> CachedSource:
    source = CachedSource(
        remote,
        store,
        nursery,
        timeout=access.timeout,
        rate=access.prefetch_rate,
        digest=digest,
        pinned=pinned,
        on_growth=cache.evict if cache is not None else lambda: None,
    )
    if cache is not None:
        nursery.start_soon(_evict, cache)
    return source


async def _evict(cache: CacheDir) -> None:
    try:
        await trio.to_thread.run_sync(cache.evict)
    except OSError as e:
        log.warning("%s: can't be looked after: %s", cache.path, e.strerror)


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
                f"{spec.name}: the password would be sent in clear text; --insecure allows that"
            )
        authority = BasicAuthority(Credentials(spec.username, access.password or ""))
    target = Target(spec.what)
    known = None if cache is None else await trio.to_thread.run_sync(_known, cache, spec.what)
    try:
        attempts, timeout = patience(access, known is not None)
        found = await discover(transport, target, authority, timeout, attempts)
    except Transient as e:
        if known is None:
            raise
        log.warning("%s; going on with what is in the cache", e)
        found = known
    version = found.version
    if version is None or not (found.ranged or (cache is not None and version.identified)):
        return await _download(target, authority, transport, access, cache)
    store: Store
    if cache is not None and version.identified:
        key = _url_key(spec.what, version)
        store = await trio.to_thread.run_sync(cache.store, key, version.size, spec.name)
        answer = {"size": version.size, "etag": version.etag, "modified": version.modified}
        await trio.to_thread.run_sync(cache.keep_answer, spec.what, answer)
    else:
        store = MemoryStore(version.size)

    async def locate() -> Target:
        return target

    blob = HttpBlob(
        transport, locate, version, name=spec.name, authority=authority, ranged=found.ranged
    )
    source = _cached(blob, store, access, nursery, cache, digest=None, pinned=None)
    source.seed(found.beginning)
    return source


def _known(cache: CacheDir, url: str) -> Found | None:
    """What was found when the URL was opened last."""
    answer = cache.answer(url) or {}
    size, etag, modified = answer.get("size"), answer.get("etag"), answer.get("modified")
    if type(size) is not int or size <= 0:
        return None
    if not all(v is None or isinstance(v, str) for v in (etag, modified)):
        return None
    return Found(Version(size, etag, modified), True, b"")


def _url_key(url: str, version: Version) -> str:
    """A version of a URL's content, as a name for the cache."""
    text = "\n".join((url, version.etag or "", version.modified or "", str(version.size)))
    return f"url:{hashlib.sha256(text.encode()).hexdigest()}"


async def _download(
    target: Target,
    authority: BasicAuthority | None,
    transport: Transport,
    access: Access,
    cache: CacheDir | None,
) -> AsyncSource:
    """Read it all, from a server that can't do ranges, into a file that nobody else sees."""
    log.info("%s: the server sends no parts, so all of it is fetched first", target.shown)
    fd = temporary_file(cache.path if cache is not None else None)
    try:
        await download(transport, target, authority, fd, access.timeout, access.progress)
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
    registry = Registry(transport, reference, spec, access, cache)
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
    if layer is not None and layer.is_zstd:
        blob = await registry.blob(layer.digest, layer.size, f"{place}@{layer.digest}")
        return await _open_zstd(layer, chosen.diff_id, blob, access, nursery, cache, pinned)
    digest = layer.digest if layer is not None else wanted
    assert digest is not None
    size = None if layer is None else layer.size
    if size is None and cache is not None:
        size = await trio.to_thread.run_sync(cache.known_size, digest)
    blob = await registry.blob(digest, size, f"{place}@{digest}")
    store: Store
    if cache is not None:
        store = await trio.to_thread.run_sync(cache.store, digest, blob.size, blob.name)
    else:
        store = MemoryStore(blob.size)
    return _cached(blob, store, access, nursery, cache, digest=digest, pinned=pinned)


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
        raise IntegrityError(f"{file.name}: has {file.size} bytes, not {chosen.layer.size}")
    if chosen.layer is None or not chosen.layer.is_zstd:
        return ThreadedSource(file)
    blob = _LocalBlob(file)
    return await _open_zstd(chosen.layer, chosen.diff_id, blob, access, nursery, cache, None)


class _LocalBlob:
    """A file as something to be streamed.  Implements ``cached.Remote``."""

    ranged = True

    def __init__(self, file: FileSource) -> None:
        self.name = file.name
        self.size = file.size
        self.traffic = Traffic()
        self._file = file

    async def stream(
        self, start: int, end: int, deadline: float
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
    """A layer that is a zstd stream: unpacked into the cache first, unless it is there already."""
    if cache is None:
        fd, _ = await unpack(blob, layer, diff_id, None, access)
        await blob.aclose()
        return ThreadedSource(FileSource(fd, name=blob.name))
    key = diff_id or f"unpacked-{layer.digest}"
    while True:
        with cache.alone(key) as alone:
            size = await trio.to_thread.run_sync(cache.known_size, key)
            if size is None and alone:
                try:
                    fd, size = await unpack(blob, layer, diff_id, cache.path, access)
                except NoRoom:
                    log.warning("%s: no room to unpack %s there", cache.path, blob.name)
                    fd, size = await unpack(blob, layer, diff_id, None, access)
                try:
                    await trio.to_thread.run_sync(_adopt, cache, key, size, blob.name, fd)
                except SourceError as e:
                    log.warning("%s; going on without the cache", e)
                    await blob.aclose()
                    return ThreadedSource(FileSource(os.dup(fd), name=blob.name))
                finally:
                    os.close(fd)
        if size is not None:
            break
        await trio.sleep(0.2)  # another process is unpacking it
    await blob.aclose()
    store = await trio.to_thread.run_sync(cache.store, key, size, blob.name)
    return _cached(
        _Unpacked(blob.name, size), store, access, nursery, cache, digest=diff_id, pinned=pinned
    )


def _adopt(cache: CacheDir, key: str, size: int, name: str, fd: int) -> None:
    """Copy a file whose digest was verified into the cache.  Raises SourceError."""
    store = cache.store(key, size, name)
    try:
        for number in range(store.count):
            offset, length = store.extent(number)
            store.put(number, os.pread(fd, length, offset))
        store.sync()
        store.set_state(COMPLETE)
    except OSError as e:
        raise SourceError(f"{cache.path}: {e.strerror}") from None
    finally:
        store.close()


class _Unpacked:
    """Stands for a layer that can't be fetched in parts.  Implements ``cached.Remote``."""

    ranged = True

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.traffic = Traffic()

    async def stream(
        self, start: int, end: int, deadline: float
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        if start < end:
            raise IntegrityError(
                f"{self.name}: what the cache holds at {start} is spoiled; open it again"
            )
        yield start, b""  # makes it a generator

    async def aclose(self) -> None:
        pass

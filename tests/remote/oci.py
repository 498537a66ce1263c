"""OCI images in the making: blobs, manifests, indexes; and ways to put them into a registry."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urljoin, urlsplit

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_TAR = "application/vnd.oci.image.layer.v1.tar"
OCI_TAR_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
EROFS = "application/vnd.erofs.layer.v1"
EROFS_ZSTD = "application/vnd.erofs.layer.v1+zstd"


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


@dataclass(frozen=True)
class Blob:
    """Bytes with a media type: a layer, a configuration, a manifest."""

    data: bytes
    kind: str
    extra: dict[str, Any] = field(default_factory=dict)  # more of its descriptor

    @property
    def digest(self) -> str:
        return digest_of(self.data)

    @property
    def descriptor(self) -> dict[str, Any]:
        return {
            "mediaType": self.kind,
            "digest": self.digest,
            "size": len(self.data),
        } | self.extra


@dataclass(frozen=True)
class Manifest:
    """A manifest or an index, and what it refers to."""

    blob: Blob
    blobs: tuple[Blob, ...] = ()  # of a manifest
    manifests: tuple[Manifest, ...] = ()  # of an index

    @property
    def digest(self) -> str:
        return self.blob.digest

    def for_platform(self, platform: dict[str, Any] | None) -> Manifest:
        """The same as an entry of an index for a platform."""
        extra = {"platform": platform} if platform is not None else {}
        return Manifest(Blob(self.blob.data, self.blob.kind, extra), self.blobs, self.manifests)


def layer(data: bytes, kind: str = EROFS, **extra: Any) -> Blob:
    return Blob(data, kind, extra)


def manifest(
    *layers: Blob,
    kind: str = OCI_MANIFEST,
    declared: bool = True,
    platform: dict[str, Any] | None = None,
    diff_ids: Sequence[str] | None = None,
    **extra: Any,
) -> Manifest:
    """An image of layers.  ``declared``: whether it has a mediaType of its own."""
    rootfs = {"type": "layers", "diff_ids": diff_ids or [b.digest for b in layers]}
    described = (platform or {"architecture": "amd64", "os": "linux"}) | {"rootfs": rootfs}
    config = Blob(_json(described), DOCKER_CONFIG if kind == DOCKER_MANIFEST else OCI_CONFIG)
    found = {"schemaVersion": 2} | ({"mediaType": kind} if declared else {})
    found |= {"config": config.descriptor, "layers": [b.descriptor for b in layers]} | extra
    return Manifest(Blob(_json(found), kind), (config, *layers))


def index(*manifests: Manifest, kind: str = OCI_INDEX, declared: bool = True) -> Manifest:
    """An index of images, made with ``for_platform``, or of other indexes."""
    found: dict[str, Any] = {"schemaVersion": 2} | ({"mediaType": kind} if declared else {})
    found |= {"manifests": [m.blob.descriptor for m in manifests]}
    return Manifest(Blob(_json(found), kind), (), manifests)


def platform(text: str, *features: str, **extra: Any) -> dict[str, Any]:
    """``linux/arm64/v8`` as indexes have it; ``features`` are os.features."""
    names = ("os", "architecture", "variant")
    found: dict[str, Any] = dict(zip(names, text.split("/"), strict=False))
    return found | ({"os.features": list(features)} if features else {}) | extra


def image(data: bytes, **how: Any) -> Manifest:
    """The commonest: one EROFS layer."""
    return manifest(layer(data), **how)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()


# --- where they go ----------------------------------------------------------------------------


class Store(Protocol):
    """Somewhere that images can be put."""

    def put_blob(self, repository: str, blob: Blob) -> None: ...

    def put_manifest(self, repository: str, reference: str, blob: Blob) -> None: ...


def publish(store: Store, repository: str, tag: str | None, what: Manifest) -> str:
    """Put an image or an index with all that belongs to it.  Returns its digest."""
    for inner in what.manifests:
        publish(store, repository, None, inner)
    for blob in what.blobs:
        store.put_blob(repository, blob)
    store.put_manifest(repository, tag or what.digest, what.blob)
    return what.digest


class Pushing:
    """Pushes to a real registry, as little of the protocol as that takes."""

    def __init__(self, url: str, authorization: str | None = None) -> None:
        self._authority = urlsplit(url).netloc
        self._headers = {"Authorization": authorization} if authorization else {}

    def put_blob(self, repository: str, blob: Blob) -> None:
        if self._ask("HEAD", f"/v2/{repository}/blobs/{blob.digest}")[0] == 200:
            return
        status, headers = self._ask("POST", f"/v2/{repository}/blobs/uploads/")
        assert status == 202, status
        where = urlsplit(urljoin(f"http://{self._authority}/", headers["location"]))
        target = f"{where.path}?{where.query}&digest={blob.digest}"
        kind = {"Content-Type": "application/octet-stream"}
        status, _ = self._ask("PUT", target, blob.data, kind)
        assert status == 201, status

    def put_manifest(self, repository: str, reference: str, blob: Blob) -> None:
        target = f"/v2/{repository}/manifests/{reference}"
        status, _ = self._ask("PUT", target, blob.data, {"Content-Type": blob.kind})
        assert status == 201, status

    def _ask(
        self, method: str, target: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str]]:
        connection = http.client.HTTPConnection(self._authority, timeout=30)
        try:
            connection.request(method, target, body, self._headers | (headers or {}))
            response = connection.getresponse()
            response.read()
            return response.status, {k.lower(): v for k, v in response.getheaders()}
        finally:
            connection.close()


class Layout:
    """An OCI image layout: a directory on disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "blobs" / "sha256").mkdir(parents=True)
        (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self._entries: list[dict[str, Any]] = []
        self._save()

    def put_blob(self, repository: str, blob: Blob) -> None:
        (self.directory / "blobs" / blob.digest.replace(":", "/")).write_bytes(blob.data)

    def put_manifest(self, repository: str, reference: str, blob: Blob) -> None:
        self.put_blob(repository, blob)
        if ":" in reference:
            return  # a part of something else, which refers to it
        annotations = {"org.opencontainers.image.ref.name": reference}
        self._entries.append(blob.descriptor | {"annotations": annotations})
        self._save()

    def _save(self) -> None:
        found = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": self._entries}
        (self.directory / "index.json").write_bytes(_json(found))


def basic(username: str, password: str) -> str:
    """An Authorization header."""
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()

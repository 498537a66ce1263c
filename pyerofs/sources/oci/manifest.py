"""The documents of OCI images (indexes, manifests, descriptors), and the choice of one layer.

Values and plain functions; ``registry.py`` and ``layout.py`` get the documents.  (OCI image
specification: image-index.md, manifest.md, descriptor.md; the EROFS layer types and the ``erofs`` OS
feature are containerd's.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyerofs.errors import IntegrityError, RegistryError
from pyerofs.sources.base import MAX_BLOB
from pyerofs.sources.cache.cachedir import digest_of
from pyerofs.sources.oci.reference import is_digest

INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
EROFS_LAYER = "application/vnd.erofs.layer"
ZSTD = "+zstd"

MAX_DOCUMENT = 4 << 20  # bytes: the largest manifest that registries accept
MAX_DEPTH = 4  # of indexes within indexes
MAX_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class Platform:
    """The platform that an image is built for."""

    os: str
    architecture: str
    variant: str = ""
    features: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A reference to a document or blob by its digest."""

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def is_erofs(self) -> bool:
        return self.media_type.startswith(EROFS_LAYER)

    @property
    def is_zstd(self) -> bool:
        return self.media_type.endswith(ZSTD)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A chosen layer, and its manifest's information about it."""

    layer: Descriptor | None  # None: a blob that the manifest does not list
    number: int | None
    manifest: str  # the manifest's digest
    diff_id: str | None  # the digest of the uncompressed layer; for zstd layers only


# documents ---------------------------------------------------------------------------------


def parse_document(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object.  Raises RegistryError."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise RegistryError(f"{name}: is not JSON") from None
    if not isinstance(found, dict):
        raise RegistryError(f"{name}: is not a JSON object")
    return found


def verified(data: bytes, digest: str, name: str) -> bytes:
    """Return the bytes if they have the digest.  Raises IntegrityError."""
    if digest_of(data, digest) != digest:
        raise IntegrityError(f"{name}: is not what its digest {digest} says")
    return data


def parse_descriptor(value: object, name: str) -> Descriptor:
    """Parse a descriptor.  Raises RegistryError."""
    if not isinstance(value, dict):
        raise RegistryError(f"{name}: holds a descriptor that is none")
    digest, size = value.get("digest"), value.get("size")
    if not isinstance(digest, str) or not is_digest(digest):
        raise RegistryError(f"{name}: holds a descriptor with the digest {digest!r}")
    if type(size) is not int or not 0 <= size <= MAX_BLOB:
        raise RegistryError(f"{name}: holds a descriptor with the size {size!r}")
    annotations = value.get("annotations")
    return Descriptor(
        str(value.get("mediaType") or ""),
        digest,
        size,
        _platform(value.get("platform")),
        {str(k): str(v) for k, v in annotations.items()} if isinstance(annotations, dict) else {},
    )


def _platform(value: object) -> Platform | None:
    if not isinstance(value, dict):
        return None
    features = value.get("os.features")
    return Platform(
        str(value.get("os") or ""),
        str(value.get("architecture") or ""),
        str(value.get("variant") or ""),
        frozenset(str(f) for f in features) if isinstance(features, list) else frozenset(),
    )


def parse_descriptors(document: dict[str, Any], key: str, name: str) -> list[Descriptor]:
    """A list of descriptors in a document.  Raises RegistryError."""
    found = document.get(key)
    if not isinstance(found, list) or len(found) > MAX_ENTRIES:
        raise RegistryError(f"{name}: has no {key} that make sense")
    return [parse_descriptor(d, name) for d in found]


# choosing ----------------------------------------------------------------------------------


def this_platform() -> Platform:
    """The platform of this machine."""
    machine = os.uname().machine
    known = {
        "x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm", "i686": "386",
        "i386": "386", "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64",
        "loongarch64": "loong64", "mips64": "mips64le",
    }  # fmt: skip
    variant = {"armv7l": "v7", "armv6l": "v6"}.get(machine, "")
    return Platform("linux", known.get(machine, machine), variant)


def parse_platform(text: str) -> Platform:
    """``os/arch[/variant]``.  Raises RegistryError."""
    parts = text.lower().split("/")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise RegistryError(f"platform {text!r}: write it like linux/amd64 or linux/arm/v7")
    names = {"x86_64": "amd64", "aarch64": "arm64"}
    return Platform(parts[0], names.get(parts[1], parts[1]), parts[2] if len(parts) == 3 else "")


def choose_manifests(
    entries: Sequence[Descriptor], wanted: Platform, explicit: bool, name: str
) -> list[Descriptor]:
    """The entries of an index that fit a platform, the best first.

    Entries without a platform come last.  Unless the user has named the platform (``explicit``), a
    sole entry fits whatever its platform.  Raises RegistryError."""
    real = [d for d in entries if d.platform is None or d.platform.architecture != "unknown"]
    found = [d for d in real if d.platform is not None and _fits(d.platform, wanted)]
    found.sort(key=lambda d: _rank(d.platform, wanted))
    found += [d for d in real if d.platform is None]
    if not found and len(real) == 1 and not explicit:
        found = real
    if not found:
        offered = ", ".join(sorted({str(d.platform) for d in real})) or "nothing"
        raise RegistryError(f"{name}: nothing for {wanted}; choose with --platform from {offered}")
    return found


def _fits(found: Platform, wanted: Platform) -> bool:
    if (found.os, found.architecture) != (wanted.os, wanted.architecture):
        return False
    if not wanted.variant:
        return True
    return _variant(found) == _variant(wanted) or (
        wanted.architecture == "arm" and "v5" <= _variant(found) <= _variant(wanted)
    )


def _variant(platform: Platform) -> str:
    """The platform's variant, or the default of its architecture."""
    return platform.variant or {"arm64": "v8", "arm": "v7", "amd64": "v1"}.get(
        platform.architecture, ""
    )


def _rank(found: Platform | None, wanted: Platform) -> tuple[int, int, str]:
    """The sort key: EROFS variants of an image, the exact variant, then the nearest below."""
    assert found is not None
    exact = _variant(found) == _variant(wanted)
    inverted = "".join(chr(255 - min(ord(c), 255)) for c in _variant(found))
    return ("erofs" not in found.features, not exact, inverted)


def choose_layer(
    layers: Sequence[Descriptor], number: int | None, blob: str | None, name: str
) -> int | None:
    """The number of the layer to use; None for a blob that is not listed.  Raises RegistryError."""
    if blob is not None:
        return next((i for i, d in enumerate(layers) if d.digest == blob), None)
    if number is not None:
        if number >= len(layers):
            raise RegistryError(f"{name}: has no layer {number}; {_listed(layers)}")
        return number
    found = [i for i, d in enumerate(layers) if d.is_erofs]
    if len(found) == 1:
        return found[0]
    many = f"{len(found)} EROFS layers" if found else "no EROFS layer"
    hint = "choose with --layer N or --blob DIGEST" if layers else "it has no layers at all"
    raise RegistryError(f"{name}: has {many}; {hint}; {_listed(layers)}")


def _listed(layers: Sequence[Descriptor]) -> str:
    shown = [f"{i}: {d.media_type} {d.digest} {d.size}" for i, d in enumerate(layers[:20])]
    more = [f"and {len(layers) - 20} more"] if len(layers) > 20 else []
    return f"its layers are [{'; '.join(shown + more)}]"


# resolving ---------------------------------------------------------------------------------

# Gets a document by its descriptor, or the top one by None; gives its digest and verified bytes.
GetDocument = Callable[[Descriptor | None], Awaitable[tuple[str, bytes]]]


async def resolve(
    get: GetDocument,
    name: str,
    *,
    platform: str | None,
    layer: int | None,
    blob: str | None,
) -> Chosen:
    """Find the layer to use, through indexes and the manifest.  Raises SourceError."""
    wanted = this_platform() if platform is None else parse_platform(platform)
    digest, manifest = await _manifest(get, None, name, wanted, platform is not None, 0)
    layers = parse_descriptors(manifest, "layers", name)
    number = choose_layer(layers, layer, blob, name)
    if number is None:
        return Chosen(None, None, digest, None)
    chosen = layers[number]
    diff_id = None
    if chosen.is_zstd:
        diff_id = await _diff_id(get, manifest, number, len(layers), name)
    return Chosen(chosen, number, digest, diff_id)


async def _manifest(
    get: GetDocument,
    descriptor: Descriptor | None,
    name: str,
    wanted: Platform,
    explicit: bool,
    depth: int,
) -> tuple[str, dict[str, Any]]:
    digest, data = await get(descriptor)
    document = parse_document(data, name)
    media_type = document.get("mediaType") or (descriptor.media_type if descriptor else "")
    if media_type in INDEX_TYPES or (not media_type and "manifests" in document):
        if depth >= MAX_DEPTH:
            raise RegistryError(f"{name}: more than {MAX_DEPTH} indexes within indexes")
        entries = parse_descriptors(document, "manifests", name)
        last: RegistryError | None = None
        for entry in choose_manifests(entries, wanted, explicit, name)[:MAX_DEPTH]:
            try:
                return await _manifest(get, entry, name, wanted, explicit, depth + 1)
            except RegistryError as e:
                last = last or e  # an index without a platform may hold nothing for this one
        assert last is not None
        raise last
    if document.get("schemaVersion") == 1:
        raise RegistryError(f"{name}: is in Docker's old format (schema 1), which has no EROFS")
    if "layers" not in document:
        raise RegistryError(
            f"{name}: is neither a manifest nor an index ({media_type or 'no type'})"
        )
    return digest, document


async def _diff_id(
    get: GetDocument, manifest: dict[str, Any], number: int, count: int, name: str
) -> str | None:
    """The digest of a layer before compression, from the image's configuration, if it has one."""
    config = parse_descriptor(manifest.get("config"), name)
    if not config.media_type.endswith("json") or config.size > MAX_DOCUMENT:
        return None
    _, data = await get(config)
    rootfs = parse_document(data, f"{name}: its configuration").get("rootfs")
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(found, list) or len(found) != count:
        return None
    diff_id = found[number]
    if not isinstance(diff_id, str) or not is_digest(diff_id):
        raise RegistryError(f"{name}: its configuration holds the digest {diff_id!r}")
    return diff_id

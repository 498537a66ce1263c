"""What servers, registries, caches and callers may send: nothing of it raises what nobody expects."""

from __future__ import annotations

import json
import string
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyerofs.errors import SourceError
from pyerofs.sources import verity
from pyerofs.sources.cache import blobfiles, store
from pyerofs.sources.net.auth import parse_challenge
from pyerofs.sources.net.credentials import _best_entry, _from_entry
from pyerofs.sources.net.http import content_length, content_range
from pyerofs.sources.oci import manifest
from pyerofs.sources.oci.reference import parse_reference
from pyerofs.sources.spec import WORDS as ALL_WORDS
from pyerofs.sources.spec import SourceSpec, SourceWords, VeritySpec
from pyerofs.system.private import PrivateDirectory

many = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))

DIGESTS = st.sampled_from([f"sha256:{'0' * 64}", f"sha256:{'a' * 64}", "sha256:1", "", "md5:aa"])
TYPES = st.sampled_from(
    [
        *manifest.INDEX_TYPES,
        *manifest.MANIFEST_TYPES,
        "application/vnd.erofs.layer.v1+zstd",
        "",
        "text/plain",
    ]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
descriptors = st.fixed_dictionaries(
    {},
    optional={
        "mediaType": TYPES | json_values,
        "digest": DIGESTS | json_values,
        "size": st.integers(-1, 1 << 70) | json_values,
        "annotations": json_values,
        "platform": st.fixed_dictionaries(
            {},
            optional={
                "os": st.sampled_from(["linux", "windows"]) | json_values,
                "architecture": st.sampled_from(["amd64", "arm", "unknown"]) | json_values,
                "variant": st.sampled_from(["v6", "v8"]) | json_values,
                "os.features": st.just(["erofs"]) | json_values,
            },
        )
        | json_values,
    },
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "mediaType": TYPES | json_values,
        "schemaVersion": st.sampled_from([1, 2]) | json_values,
        "manifests": st.lists(descriptors | json_values, max_size=3) | json_values,
        "layers": st.lists(descriptors | json_values, max_size=3) | json_values,
        "config": descriptors | json_values,
        "rootfs": st.fixed_dictionaries({"diff_ids": st.lists(DIGESTS | json_values, max_size=3)}),
    },
)


@given(st.text(max_size=60) | st.text(string.ascii_lowercase + "/:@.-_[]0159", max_size=60))
@many
def test_references(text: str) -> None:
    try:
        found = parse_reference(text)
    except SourceError:
        return
    assert parse_reference(str(found)) == found
    assert not set(found.server + found.repository) & set("?#\\ \n%")


@given(st.lists(documents | json_values, min_size=1, max_size=4), st.integers(0, 3) | st.none())
@many
def test_manifests(given_documents: list[Any], layer: int | None) -> None:
    """Each question gets the next document; they may lead round in a circle."""
    asked = 0

    async def get(_: manifest.Descriptor | None) -> tuple[str, bytes]:
        nonlocal asked
        asked += 1
        assert asked < 1000
        found = given_documents[asked % len(given_documents)]
        return f"sha256:{'0' * 64}", json.dumps(found).encode()

    async def run() -> None:
        try:
            chosen = await manifest.resolve(get, "app", platform=None, layer=layer, blob=None)
        except SourceError:
            return
        assert chosen.layer is not None
        assert chosen.layer.size >= 0

    trio.run(run)


@given(st.lists(st.text(max_size=80) | st.text('Bearscoplm=",\\ ', max_size=80), max_size=3))
@many
def test_challenges(headers: list[str]) -> None:
    found = parse_challenge(headers)
    assert found is None or found[0] in ("bearer", "basic")


@given(
    st.text(string.printable, max_size=40)
    | st.from_regex(r"bytes [0-9]+-[0-9]+/([0-9]+|\*)", fullmatch=True)
)
@many
def test_ranges(text: str) -> None:
    text = text.replace("\n", " ").replace("\r", " ")
    response = httpx.Response(206, headers={"Content-Range": text, "Content-Length": text})
    try:
        first, last, total = content_range(response, "x")
    except SourceError:
        pass
    else:
        assert 0 <= first <= last
        assert total is None or last < total
    length = content_length(response)
    assert length is None or length >= 0


@given(
    st.binary(min_size=512, max_size=512)
    | st.binary(max_size=504).map(lambda b: verity.SIGNATURE + b.ljust(504, b"\0"))
)
@many
def test_verity_superblocks(data: bytes) -> None:
    spec = VeritySpec("0" * 64, hash_offset=0)
    try:
        found = verity.check_parameters(verity.parse_superblock(data, spec, "x"), "x")
    except SourceError:
        return
    assert len(verity.levels(found)) < 64


@given(st.binary(max_size=100))
@many
def test_maps_of_the_cache(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """A map that says anything: nothing that is not there is believed."""
    folder = PrivateDirectory.open(str(tmp_path_factory.mktemp("cache") / "blobs"))
    Path(folder.path, "blob.map").write_bytes(blobfiles.MAP_MAGIC + data)
    blobfiles.parse_header(blobfiles.MAP_MAGIC + data)
    for found in (
        store.Verified.open(folder, "blob"),
        store.Claimed(folder, "blob", 3 << 20, {}, vouched=True),
    ):
        if found is not None:
            assert [found.segment(n) for n in range(min(found.count, 3))] == [None] * 3
            assert found.peek(0, 100) is None
            found.close()
    folder.close()


@given(
    json_values
    | st.fixed_dictionaries(
        {"what": st.text(max_size=20)},
        optional={
            "offset": json_values,
            "devices": json_values,
            "verity": json_values,
            "layer": json_values,
        },
    )
)
@many
def test_specs(value: Any) -> None:
    try:
        found = SourceSpec.from_json(value)
    except SourceError:
        return
    assert SourceSpec.from_json(json.loads(json.dumps(found.to_json()))) == found


@given(
    st.lists(st.tuples(st.sampled_from(sorted(ALL_WORDS)), st.text(max_size=12)), max_size=5),
    st.text(max_size=30),
)
@many
def test_words(words: list[tuple[str, str]], what: str) -> None:
    taken = SourceWords()
    for name, value in words:
        with suppress(ValueError):
            taken.set(name, value)
    try:
        spec = taken.spec(what)
        assert SourceSpec.from_json(spec.to_json()) == spec
    except SourceError:
        pass


@given(json_values, st.dictionaries(st.text(max_size=20), json_values, max_size=3))
@many
def test_files_of_credentials(entry: Any, auths: dict[str, Any]) -> None:
    found = _best_entry(auths | {"example.org": entry}, "example.org", "a/b")
    if found is not None:
        _from_entry(found)

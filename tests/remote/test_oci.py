"""Images in registries and layouts: which manifest, which platform, which layer; and that nothing is
taken for what it is not."""

from __future__ import annotations

import io
import json
import logging
import platform as machine
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

import pyerofs
from pyerofs.errors import IntegrityError, RegistryError, SourceError
from tests.handmade import noise
from tests.helpers import entries_of, every_image
from tests.manifests import Manifest, differences, golden
from tests.remote import faults, oci
from tests.remote.conftest import Registries
from tests.remote.oci import EROFS, image, index, layer, manifest, platform, publish
from tests.remote.pretend import Pretend, serve
from tests.remote.reading import (
    SEGMENT,
    access,
    assert_all_right,
    big,
    command,
    data_files,
    file_name,
    opened,
    read_pieces,
)
from tests.remote.registry import Relay
from tests.remote.server import Server, anything

EMPTY_TAR = layer(bytes(10240), oci.OCI_TAR)
GZIP_TAR = layer(noise(3000), oci.OCI_TAR_GZIP)


def named(name: str) -> bytes:
    """A small image whose label tells which one it is."""
    return golden(name).image.read_bytes()


ONE, TWO, THREE = named("plain"), named("zstd"), named("lz4")


@pytest.fixture(name="registry")
def pretend() -> Iterator[tuple[Pretend, Server]]:
    registry = Pretend()
    with serve(registry) as server:
        yield registry, server


Put = Callable[..., str]


@pytest.fixture(name="put")
def publisher(registry: tuple[Pretend, Server]) -> Put:
    """Publishes something as app:1; returns what to open."""
    store, server = registry

    def put(what: oci.Manifest, tag: str = "1") -> str:
        publish(store, "app", tag, what)
        return f"oci://{server.authority}/app:{tag}"

    return put


def blob_of(what: str, **fields: Any) -> int:
    """The size in bytes of the image that was found: which one it is."""
    with opened(what, **fields) as found:
        return found.superblock.blocks * found.superblock.block_size


def size_of(data: bytes) -> int:
    with pyerofs.open(io.BytesIO(data)) as found:
        return found.superblock.blocks * found.superblock.block_size


def test_the_images_differ() -> None:
    assert len({size_of(data) for data in (ONE, TWO, THREE)}) == 3


# --- a real registry --------------------------------------------------------------------------


class TestRealRegistry:
    @every_image
    def test_golden(
        self, registries: Registries, want: Manifest, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Each device is an image of its own; then once more, the registry being out of reach."""
        name = f"golden/{file_name(want)}"
        paths = (want.image, *want.devices)
        for i, path in enumerate(paths):
            publish(registries.push, name, f"d{i}", image(path.read_bytes()))
        with Server(Relay(registries.open.url)) as server:
            what = f"oci://{server.authority}/{name}"
            devices = tuple(
                pyerofs.SourceSpec(f"{what}:d{i}", insecure=True) for i in range(1, len(paths))
            )
            with opened(f"{what}:d0", offset=want.offset, devices=devices) as found:
                assert differences(want, entries_of(found)) == []
        assert not caplog.records
        how = access(timeout=5.0)
        with opened(f"{what}:d0", how, offset=want.offset, devices=devices) as found:
            assert differences(want, entries_of(found)) == []
        assert len(caplog.records) == len(paths)

    @pytest.mark.parametrize("form", ["oci", "docker", "undeclared", "nested", "nested docker"])
    def test_forms(self, registries: Registries, form: str) -> None:
        made = {
            "oci": image(ONE),
            "docker": image(ONE, kind=oci.DOCKER_MANIFEST),
            "undeclared": image(ONE, declared=False),
            "nested": index(index(image(ONE).for_platform(platform("linux/amd64")))),
            "nested docker": index(
                image(ONE, kind=oci.DOCKER_MANIFEST).for_platform(platform("linux/amd64")),
                kind=oci.DOCKER_LIST,
            ),
        }[form]
        tag = form.replace(" ", "-")
        digest = publish(registries.push, "forms", tag, made)
        for suffix in (f":{tag}", f"@{digest}", f":{tag}@{digest}", f":other@{digest}"):
            what = registries.open.reference("forms" + suffix)
            assert blob_of(what, platform="linux/amd64") == size_of(ONE)

    def test_unknown(self, registries: Registries) -> None:
        publish(registries.push, "forms", "oci", image(ONE))
        for suffix in ("forms:nothing", "nothing:oci", f"forms@sha256:{'0' * 64}"):
            with pytest.raises(RegistryError, match=suffix.partition("@")[0]) as caught:
                opened(registries.open.reference(suffix))
            assert "\n" not in str(caught.value)

    def test_commands(self, registries: Registries) -> None:
        publish(registries.push, "forms", "oci", image(ONE))
        what = registries.open.reference("forms:oci")
        want = command("ls", golden("plain").image).stdout
        for words in (["ls", what], ["ls", "--oci", what.removeprefix("oci://")]):
            done = command(*words, "--insecure")
            assert (done.returncode, done.stdout, done.stderr) == (0, want, "")


# --- platforms --------------------------------------------------------------------------------

AMD, ARM8, ARM, ARM7, ARM6 = (
    platform(text)
    for text in ("linux/amd64", "linux/arm64/v8", "linux/arm64", "linux/arm/v7", "linux/arm/v6")
)


class TestPlatforms:
    @pytest.mark.parametrize(
        ("entries", "wanted", "found"),
        [
            # in what the index offers and what is wanted: the number of the entry that is right
            ([AMD, ARM8], "linux/amd64", 0),
            ([AMD, ARM8], "linux/arm64/v8", 1),
            ([AMD, ARM8], "linux/arm64", 1),
            ([AMD, ARM], "linux/arm64/v8", 1),
            ([ARM7, ARM6], "linux/arm/v6", 1),
            ([ARM6, ARM7], "linux/arm/v7", 1),
            ([ARM6, AMD], "linux/arm/v7", 0),  # v7 runs what is for v6
            ([platform("windows/amd64"), AMD], "linux/amd64", 1),
            ([platform("linux/riscv64"), AMD], "linux/riscv64", 0),
            ([AMD, platform("linux/amd64", "erofs")], "linux/amd64", 1),  # made for us
            ([platform("linux/amd64", "erofs"), AMD], "linux/amd64", 0),
            ([platform("linux/arm64", "erofs"), AMD], "linux/amd64", 1),
            ([platform("linux/amd64/v3"), AMD], "linux/amd64", 1),
        ],
    )
    def test_selection(
        self, put: Put, entries: list[dict[str, Any]], wanted: str, found: int
    ) -> None:
        images = [ONE, TWO]
        made = [
            image(data).for_platform(entry) for data, entry in zip(images, entries, strict=True)
        ]
        assert blob_of(put(index(*made)), platform=wanted) == size_of(images[found])

    @pytest.mark.parametrize("wanted", ["linux/s390x", "linux/arm/v5", "plan9/amd64"])
    def test_none(self, put: Put, wanted: str) -> None:
        made = index(image(ONE).for_platform(AMD), image(TWO).for_platform(ARM7))
        with pytest.raises(RegistryError, match=wanted) as caught:
            opened(put(made), platform=wanted)
        assert "linux/amd64" in str(caught.value)  # what there is

    def test_attestations_are_no_images(self, put: Put) -> None:
        unknown = platform("unknown/unknown")
        made = index(image(TWO).for_platform(unknown), image(ONE).for_platform(AMD))
        assert blob_of(put(made), platform="linux/amd64") == size_of(ONE)

    def test_this_machine_is_the_default(self, put: Put) -> None:
        names = {"x86_64": "linux/amd64", "aarch64": "linux/arm64/v8"}
        ours = names.get(machine.machine())
        if ours is None:
            pytest.skip("tests know no name for this machine")
        others = [platform("linux/s390x"), platform("windows/" + ours.split("/")[1])]
        made = [image(THREE).for_platform(p) for p in others]
        assert blob_of(put(index(*made, image(TWO).for_platform(platform(ours))))) == size_of(TWO)

    def test_a_single_manifest_is_not_refused(self, put: Put) -> None:
        assert blob_of(put(image(ONE, platform=platform("linux/s390x")))) == size_of(ONE)

    def test_in_nested_indexes(self, put: Put) -> None:
        inner = index(image(ONE).for_platform(ARM8), image(TWO).for_platform(AMD))
        assert blob_of(put(index(inner)), platform="linux/amd64") == size_of(TWO)
        assert blob_of(put(index(inner)), platform="linux/arm64") == size_of(ONE)

    def test_an_index_inside_itself_does_not_go_on_for_ever(self, put: Put) -> None:
        made = image(ONE).for_platform(AMD)
        for _ in range(50):
            made = index(made)
        with pytest.raises(RegistryError):
            opened(put(made), platform="linux/amd64")

    @pytest.mark.parametrize("wanted", ["", "linux", "/amd64", "linux/", "a/b/c/d", "linux amd64"])
    def test_nonsense(self, put: Put, wanted: str) -> None:
        with pytest.raises(SourceError):
            opened(put(index(image(ONE).for_platform(AMD))), platform=wanted)


# --- layers -----------------------------------------------------------------------------------


class TestLayers:
    @pytest.mark.parametrize(
        "kind",
        [
            "application/vnd.erofs.layer.v1",
            "application/vnd.erofs.layer",
            "application/vnd.erofs.layer.v2",
            "application/vnd.erofs",
        ],
    )
    def test_whatever_says_erofs(self, put: Put, kind: str) -> None:
        made = manifest(EMPTY_TAR, GZIP_TAR, layer(ONE, kind))
        if kind == "application/vnd.erofs":
            with pytest.raises(RegistryError):
                opened(put(made))
        else:
            assert blob_of(put(made)) == size_of(ONE)

    def test_none(self, put: Put) -> None:
        with pytest.raises(RegistryError) as caught:
            opened(put(manifest(EMPTY_TAR, GZIP_TAR)))
        said = str(caught.value)
        for blob in (EMPTY_TAR, GZIP_TAR):  # what there is, and how to choose
            assert blob.kind in said
            assert blob.digest[:19] in said
        assert "--layer" in said

    def test_several(self, put: Put) -> None:
        made = manifest(layer(ONE), EMPTY_TAR, layer(TWO))
        what = put(made)
        with pytest.raises(RegistryError, match="--layer") as caught:
            opened(what)
        assert layer(TWO).digest[:19] in str(caught.value)
        assert blob_of(what, layer=0) == size_of(ONE)
        assert blob_of(what, layer=2) == size_of(TWO)
        assert blob_of(what, blob=layer(TWO).digest) == size_of(TWO)
        assert blob_of(what, blob=layer(ONE).digest.removeprefix("sha256:")) == size_of(ONE)

    @pytest.mark.parametrize("number", [2, 10**9])
    def test_no_such_layer(self, put: Put, number: int) -> None:
        with pytest.raises(RegistryError, match="layers"):
            opened(put(manifest(layer(ONE), EMPTY_TAR)), layer=number)

    def test_no_such_blob(self, put: Put) -> None:
        with pytest.raises(SourceError, match=layer(TWO).digest[:19]):
            opened(put(manifest(layer(ONE))), blob=layer(TWO).digest)

    def test_a_blob_that_no_manifest_lists(
        self, put: Put, registry: tuple[Pretend, Server]
    ) -> None:
        """mount.erofs takes any digest."""
        registry[0].put_blob("app", layer(TWO))
        assert blob_of(put(manifest(layer(ONE))), blob=layer(TWO).digest) == size_of(TWO)

    def test_of_any_type_if_named(self, put: Put) -> None:
        """mount.erofs never looks at the type; and some tools say that everything is a tar archive
        (oras does).  Who names a layer knows."""
        made = manifest(layer(ONE, oci.OCI_TAR), layer(TWO, "application/octet-stream"))
        assert blob_of(put(made), layer=0) == size_of(ONE)
        assert blob_of(put(made), blob=layer(TWO).digest) == size_of(TWO)

    def test_zstd(self, put: Put) -> None:
        packed = zstandard.compress(big().image)
        made = manifest(layer(packed, oci.EROFS_ZSTD), diff_ids=[oci.digest_of(big().image)])
        for _ in range(2):
            with opened(put(made)) as found:
                assert_all_right(read_pieces(found, big().content))

    def test_zstd_of_several_frames(self, put: Put) -> None:
        """What pzstd and the like write; some frames hold nothing for us."""
        whole = big().image
        skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"
        parts = [whole[:1_000_000], whole[1_000_000:5_000_000], whole[5_000_000:]]
        packed = skippable.join(zstandard.compress(part) for part in parts) + skippable
        made = manifest(layer(packed, oci.EROFS_ZSTD), diff_ids=[oci.digest_of(whole)])
        with opened(put(made)) as found:
            assert_all_right(read_pieces(found, big().content))

    @pytest.mark.parametrize("fault", ["diff id", "frame", "cut", "bomb", "no diff ids"])
    def test_zstd_gone_wrong(self, put: Put, fault: str) -> None:
        packed = bytearray(zstandard.compress(big().image))
        diff_ids = [oci.digest_of(big().image)]
        if fault == "diff id":
            diff_ids = [oci.digest_of(b"something else")]
        elif fault == "frame":
            packed[10] ^= 0x55
        elif fault == "cut":
            del packed[-1000:]
        elif fault == "bomb":
            packed = bytearray(zstandard.compress(bytes(64 << 20)))
        made = manifest(layer(bytes(packed), oci.EROFS_ZSTD), diff_ids=diff_ids)
        if fault == "no diff ids":
            made = manifest(layer(bytes(packed), oci.EROFS_ZSTD), diff_ids=[""])
        try:
            with opened(put(made)) as found:
                assert fault == "no diff ids"
                assert_all_right(read_pieces(found, big().content))
        except SourceError:
            pass
        assert not [p for p in data_files() if fault != "no diff ids" and p.stat().st_blocks > 64]


# --- digests and hostile registries -----------------------------------------------------------

DIGEST = "sha256:" + "0" * 64


def one_layer(**descriptor: object) -> dict[str, object]:
    return {"layers": [{"mediaType": EROFS} | descriptor]}


NONSENSE: list[str | dict[str, object]] = [
    "",
    "null",
    "[]",
    "{}",
    "{",
    '"x"',
    "\xff\xfe",
    "[" * 100_000,
    {},
    {"schemaVersion": 1, "name": "app", "tag": "1", "fsLayers": []},
    {"layers": [], "config": {}},
    {"layers": 5, "config": {}},
    {"layers": [None]},
    {"layers": [[]]},
    one_layer(),
    one_layer(digest="x", size=9),
    one_layer(digest=DIGEST),
    one_layer(digest=DIGEST, size=-1),
    one_layer(digest=DIGEST, size="9"),
    one_layer(digest=DIGEST, size=1e300),
    one_layer(digest=DIGEST, size=True),
    one_layer(digest=DIGEST, size=1 << 80),
    one_layer(digest="sha256:../../../../../../etc/passwd", size=9),
    one_layer(digest="md5:" + "0" * 32, size=9),
    {"manifests": []},
    {"manifests": {}},
    {"manifests": [5]},
    {"manifests": [{"digest": 7}]},
    {"manifests": [{"digest": DIGEST, "platform": 5}]},
    {"manifests": [{"digest": "../../app", "size": 9, "mediaType": oci.OCI_MANIFEST}]},
]


class TestDigests:
    def test_manifest(self, registry: tuple[Pretend, Server]) -> None:
        """By digest, whatever the registry says in its headers."""
        store, server = registry
        right, other = image(ONE), image(TWO)
        publish(store, "app", "1", right)
        publish(store, "app", "2", other)
        store.manifests["app", right.digest] = other.blob
        with pytest.raises(IntegrityError, match="digest"):
            opened(f"oci://{server.authority}/app@{right.digest}")
        with pytest.raises(IntegrityError, match="digest"):
            opened(f"oci://{server.authority}/app:1@{right.digest}")

    def test_manifest_in_an_index(self, registry: tuple[Pretend, Server]) -> None:
        store, server = registry
        right, other = image(ONE).for_platform(AMD), image(TWO)
        publish(store, "app", "1", index(right))
        publish(store, "app", "2", other)
        store.manifests["app", right.digest] = other.blob
        with pytest.raises(IntegrityError, match="digest"):
            opened(f"oci://{server.authority}/app:1", platform="linux/amd64")

    def test_tag_contradicting_the_header(self, registry: tuple[Pretend, Server]) -> None:
        store, server = registry
        publish(store, "app", "1", image(ONE))

        def lying(request: Any, site: Any) -> Any:
            response = site(request)
            if "Docker-Content-Digest" in response.headers:
                response.headers["Docker-Content-Digest"] = f"sha256:{'0' * 64}"
            return response

        server.inject(lying, when=anything)
        with pytest.raises(IntegrityError, match="digest"):
            opened(f"oci://{server.authority}/app:1")

    def test_without_the_header(self, registry: tuple[Pretend, Server], put: Put) -> None:
        registry[0].digest_header = False
        assert blob_of(put(image(ONE))) == size_of(ONE)

    def test_blob(
        self, registry: tuple[Pretend, Server], put: Put, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Known to be wrong once it is complete: from then on, errors, and nothing of it is kept."""
        caplog.set_level(logging.CRITICAL)
        what = put(image(big().image))
        store, _ = registry
        wrong = bytearray(big().image)
        wrong[-100_000] ^= 1
        store.blobs[oci.digest_of(big().image)] = bytes(wrong)
        with opened(what) as found:
            read_pieces(found, big().content)
            for _ in range(200):  # the verdict comes in the background
                if read_pieces(found, big().content, [0, 3 << 20, 5 << 20]).errors:
                    break
                time.sleep(0.05)
            after = read_pieces(found, big().content)
            assert after.failed == {IntegrityError}
            assert (after.right, after.wrong) == (0, 0)
        assert data_files() == []
        store.blobs[oci.digest_of(big().image)] = big().image
        with opened(what) as found:
            assert_all_right(read_pieces(found, big().content))

    def test_blob_of_another_size(self, registry: tuple[Pretend, Server], put: Put) -> None:
        what = put(image(big().image))
        for data in (big().image + bytes(SEGMENT), big().image[:-SEGMENT]):
            registry[0].blobs[oci.digest_of(big().image)] = data
            with pytest.raises(SourceError):
                opened(what).read("/big")

    @pytest.mark.parametrize("number", range(len(NONSENSE)))
    @pytest.mark.parametrize("kind", [oci.OCI_MANIFEST, oci.OCI_INDEX])
    def test_nonsense(self, registry: tuple[Pretend, Server], number: int, kind: str) -> None:
        store, server = registry
        found = NONSENSE[number]
        text = found if isinstance(found, str) else json.dumps({"schemaVersion": 2} | found)
        store.put_manifest("app", "1", oci.Blob(text.encode("latin-1"), kind))
        with pytest.raises(SourceError) as caught:
            opened(f"oci://{server.authority}/app:1")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 2000

    def test_endless_manifest(self, registry: tuple[Pretend, Server]) -> None:
        store, server = registry
        store.put_manifest("app", "1", oci.Blob(b" " * (64 << 20), oci.OCI_MANIFEST))
        with pytest.raises(SourceError):
            opened(f"oci://{server.authority}/app:1")
        assert server.sent <= 40 << 20

    def test_layers_elsewhere_are_not_fetched(self, put: Put) -> None:
        """``urls`` of a descriptor could lead anywhere."""
        with Server(lambda _: (_ for _ in ()).throw(AssertionError)) as elsewhere:
            made = manifest(layer(ONE, EROFS, urls=[f"{elsewhere.url}/blob"]))
            assert blob_of(put(made)) == size_of(ONE)
            assert elsewhere.requests == []


class TestFaultsOfRegistries:
    @pytest.mark.parametrize(
        "fault",
        [faults.refused(429, Retry_After="0"), faults.refused(503), faults.hanging_up,
         faults.short(10), faults.reset(10)],
        ids=["429", "503", "hanging up", "short", "reset"],
    )  # fmt: skip
    def test_everywhere(self, registry: tuple[Pretend, Server], put: Put, fault: Any) -> None:
        """Each thing asked for fails once."""
        what = put(image(big().image))
        failed: set[str] = set()

        def new(request: Any) -> bool:
            key = f"{request.path} {request.range and request.range[1]}"
            fresh = key not in failed
            failed.add(key)
            return fresh

        registry[1].inject(fault, when=new)
        with opened(what) as found:
            assert_all_right(read_pieces(found, big().content))
        assert len(failed) > 3

    def test_garbage_is_found_at_last(
        self, registry: tuple[Pretend, Server], put: Put, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.CRITICAL)
        what = put(image(big().image))
        registry[1].inject(faults.bit_flip(), skip=1, times=1)
        with opened(what) as found:
            read_pieces(found, big().content)
        registry[1].heal()
        try:
            with opened(what, access(prefetch="all")) as found:  # also what nobody reads
                for _ in range(200):
                    seen = read_pieces(found, big().content)
                    if seen.errors or not seen.wrong:
                        break
                    time.sleep(0.05)
                after = read_pieces(found, big().content)
        except IntegrityError:
            pass  # it had been complete: its digest was known to be wrong before its first read
        else:
            # found now, or already while the first reader went, and then fetched anew
            assert after.wrong == 0
            assert not (after.right and after.errors)
        with opened(what) as found:
            assert_all_right(read_pieces(found, big().content))


# --- layouts ----------------------------------------------------------------------------------


class TestLayouts:
    @pytest.fixture(name="layout")
    def make_layout(self, tmp_path: Path) -> oci.Layout:
        return oci.Layout(tmp_path / "layout")

    def test_one_image(self, layout: oci.Layout) -> None:
        digest = publish(layout, "", "1", image(ONE))
        for suffix in ("", ":1", f"@{digest}"):
            assert blob_of(f"oci-layout:{layout.directory}{suffix}") == size_of(ONE)

    def test_several(self, layout: oci.Layout) -> None:
        publish(layout, "", "1", image(ONE))
        digest = publish(layout, "", "2", image(TWO))
        assert blob_of(f"oci-layout:{layout.directory}:1") == size_of(ONE)
        assert blob_of(f"oci-layout:{layout.directory}:2") == size_of(TWO)
        assert blob_of(f"oci-layout:{layout.directory}@{digest}") == size_of(TWO)
        with pytest.raises(RegistryError, match=r"1.*2"):
            opened(f"oci-layout:{layout.directory}")
        with pytest.raises(RegistryError, match="3"):
            opened(f"oci-layout:{layout.directory}:3")

    def test_platforms_and_layers(self, layout: oci.Layout) -> None:
        several = manifest(layer(ONE), layer(TWO))
        publish(layout, "", "1", index(image(THREE).for_platform(AMD), several.for_platform(ARM8)))
        what = f"oci-layout:{layout.directory}:1"
        assert blob_of(what, platform="linux/amd64") == size_of(THREE)
        assert blob_of(what, platform="linux/arm64", layer=1) == size_of(TWO)

    def test_relative_and_odd_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        layout = oci.Layout(tmp_path / "a b:c@d")
        publish(layout, "", "1", image(ONE))
        monkeypatch.chdir(tmp_path)
        assert blob_of("oci-layout:a b:c@d:1") == size_of(ONE)
        assert blob_of("oci-layout:./a b:c@d") == size_of(ONE)

    def test_the_command(self, layout: oci.Layout) -> None:
        publish(layout, "", "1", image(ONE))
        done = command("ls", f"oci-layout:{layout.directory}:1")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout

    @pytest.mark.parametrize(
        "spoiled", ["manifest", "missing blob", "short blob", "no index", "gone"]
    )
    def test_spoiled(self, layout: oci.Layout, spoiled: str) -> None:
        made = image(ONE)
        publish(layout, "", "1", made)
        blobs = layout.directory / "blobs/sha256"
        if spoiled == "manifest":
            path = blobs / made.digest[7:]
            path.write_text(json.dumps(json.loads(path.read_text())))
        elif spoiled == "missing blob":
            (blobs / made.blobs[1].digest[7:]).unlink()
        elif spoiled == "short blob":
            (blobs / made.blobs[1].digest[7:]).write_bytes(ONE[:-4096])
        elif spoiled == "no index":
            (layout.directory / "index.json").unlink()
        else:
            shutil.rmtree(layout.directory)
        with pytest.raises(SourceError) as caught:
            opened(f"oci-layout:{layout.directory}:1")
        assert "\n" not in str(caught.value)

    def test_no_way_out(self, layout: oci.Layout, tmp_path: Path) -> None:
        """A digest that is a path."""
        (tmp_path / "secret").write_bytes(ONE)
        blob = layer(ONE)
        made = manifest(blob)
        text = made.blob.data.replace(blob.digest.encode(), b"sha256:../../../secret")
        publish(layout, "", "1", oci.Manifest(oci.Blob(text, oci.OCI_MANIFEST), made.blobs))
        with pytest.raises(SourceError):
            opened(f"oci-layout:{layout.directory}:1")

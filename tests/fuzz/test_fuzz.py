"""Hostile images must end in the right result or in an ErofsError: no other exception, no endless
loop, no allocation that the caches and the largest pcluster don't explain.

A short, repeatable run of what ``run.py`` and ``atheris_target.py`` do for hours, and the loops and
bombs that a mutation would hardly hit."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyerofs.errors import CorruptImage
from pyerofs.format import ondisk
from pyerofs.format.codecs import DecodeError, lz4_unpadded
from tests import handmade as hm
from tests.fuzz import atlas, crafted
from tests.fuzz.exercise import WAYS, exercise, time_limit
from tests.fuzz.mutate import Patch, apply, mutate, put

SECONDS = 10  # far more than any case needs
SMALL = (
    "handmade-records", "handmade-indexes", "kitchen-sink", "kitchen-sink+flat",
    "kitchen-sink-zdir+flat", "metabox-xattr+flat", "extents-frag", "extents-ztail", "ztail-lzma",
    "tar-index", "xattr-prefix-fragments+flat", "dedupe-frag-zstd", "lz4-legacy", "chunk-indexes",
)  # fmt: skip

repeatable = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=120,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    with time_limit(6 * SECONDS):
        yield


def survive(name: str, patches: list[Patch], *ways: str, sealed: bool = True) -> None:
    """Read the patched image in each way; raises whatever is not an ErofsError."""
    subject = atlas.subject(name)
    image = apply(subject.image, patches, sealed=sealed)
    for way in ways or WAYS:
        with time_limit(SECONDS):
            WAYS[way](image, subject.devices, None)


def everywhere(name: str, label: str, value: int, nid: int | None = None) -> list[Patch]:
    """One value in all fields of a label, or in those of one inode."""
    subject = atlas.subject(name)
    fields = [f for f in subject.fields[label] if nid is None or f.nid == nid]
    assert fields
    return [put(subject, f, value) for f in fields]


# --- mutations --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", atlas.names())
def test_good_images_are_clean(name: str) -> None:
    subject = atlas.subject(name)
    for way, read in WAYS.items():
        assert read(subject.image, subject.devices, None).kind == "clean", way


@st.composite
def edited_fields(draw: st.DrawFn) -> tuple[str, list[Patch]]:
    """A subject and a few fields set to anything; shrinks to the fields that matter."""
    subject = atlas.subject(draw(st.sampled_from(SMALL)))
    patches = []
    for _ in range(draw(st.integers(1, 4))):
        fields = subject.fields[draw(st.sampled_from(subject.labels))]
        field = fields[draw(st.integers(0, len(fields) - 1))]
        top = (1 << field.width) - 1
        values = st.one_of(
            st.sampled_from((0, 1, top, top - 1, top // 2, top // 2 + 1, field.nid)),
            st.sampled_from(subject.numbers),
            st.integers(0, top),
        )
        patches.append(put(subject, field, draw(values)))
    return subject.name, patches


@repeatable
@given(edited_fields(), st.sampled_from(sorted(WAYS)))
def test_edited_fields(edited: tuple[str, list[Patch]], way: str) -> None:
    survive(*edited, way)


@repeatable
@given(
    st.sampled_from(SMALL), st.integers(0, 1 << 64), st.sampled_from(sorted(WAYS)), st.booleans()
)
def test_mutations(name: str, seed: int, way: str, sealed: bool) -> None:
    survive(name, mutate(atlas.subject(name), Random(seed)), way, sealed=sealed)


@pytest.mark.parametrize("name", ["kitchen-sink", "tar-index", "handmade-indexes"])
def test_truncated(name: str) -> None:
    subject = atlas.subject(name)
    for end in range(0, len(subject.image), 512):
        with time_limit(SECONDS):
            exercise(subject.image[:end], subject.devices)


@pytest.mark.parametrize("name", ["handmade-records", "handmade-indexes", "kitchen-sink+flat"])
def test_extremes(name: str) -> None:
    """Every kind of field, all of them at once: none, zero-length, endless, all ones."""
    subject = atlas.subject(name)
    for label in subject.labels:
        for value in (0, -1):
            survive(name, everywhere(name, label, value), "image")


# --- loops ------------------------------------------------------------------------------------


def test_directory_in_itself() -> None:
    subject = atlas.subject("plain")
    nids = {f.nid for f in subject.fields["dirent.nid"]}
    for nid in nids:
        patches = everywhere("plain", "dirent.nid", nid, nid)
        survive("plain", patches)
        with subject.open() as image:
            root = image.root.nid
        with atlas.open_bytes(apply(subject.image, patches)) as image:
            if nid == root:
                with pytest.raises(CorruptImage):
                    list(image.walk())
                assert image.lookup("/".join(["deep0"] * 3000)).nid == root


def test_every_directory_leads_to_the_root() -> None:
    subject = atlas.subject("plain")
    with subject.open() as image:
        root = image.root.nid
    survive("plain", everywhere("plain", "dirent.nid", root))


@pytest.mark.parametrize("way", WAYS)
def test_directories_reached_on_many_paths(way: str) -> None:
    """Thirty directories, each of which holds the next one twice: a billion paths."""
    image = crafted.directories([[min(i + 1, 29)] * 2 for i in range(29)] + [[]])
    with time_limit(SECONDS):
        WAYS[way](image, (), None)
    with atlas.open_bytes(image) as opened, time_limit(SECONDS), pytest.raises(CorruptImage):
        for _ in opened.walk():
            pass


def test_deep_directories_take_little_memory() -> None:
    """A chain of directories, each with another one beside the next."""
    depth = 1500
    image = crafted.directories([[i + 1, depth + i] for i in range(depth - 1)] + [[]] * (depth + 1))
    with atlas.open_bytes(image) as opened:
        tracemalloc.start()
        try:
            assert sum(1 for _ in opened.walk()) == 2 * depth
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 16 << 20


def test_huge_directories() -> None:
    for name in ("plain", "chunk-indexes", "kitchen-sink+flat"):
        for size in (1 << 31, (1 << 63) - 1):
            survive(name, everywhere(name, "dir-inode.i_size", size))


@pytest.mark.parametrize("name", ["frag-zstd", "allfrag-lz4", "extents-frag", "kitchen-sink"])
def test_packed_inode_in_itself(name: str) -> None:
    subject = atlas.subject(name)
    with subject.open() as image:
        packed = image.superblock.packed_nid
    patches = everywhere(name, "map.whole", 1 << 63, packed)  # one fragment, at offset 0
    survive(name, patches)
    with (
        atlas.open_bytes(apply(subject.image, patches)) as image,
        pytest.raises(CorruptImage, match="inside the packed inode"),
    ):
        image.read(image.inode(packed))
    for advise in range(0, 64, 3):  # mixtures of fragments, inline data and big pclusters
        survive(name, everywhere(name, "map.h_advise", advise, packed), "image")


def test_metabox_in_itself() -> None:
    for name in ("metabox", "metabox+flat", "kitchen-sink", "metabox-xattr+flat"):
        subject = atlas.subject(name)
        with subject.open() as image:
            nid = image.superblock.metabox_nid
            packed = image.superblock.packed_nid
        field = subject.fields["superblock.metabox_nid"][0]
        for value in (1 << 63, nid | 1 << 63, packed, subject.numbers[0], *range(1, 64)):
            survive(name, [put(subject, field, value)], "image")
        for label in subject.labels:
            if label.startswith(("metabox-inode.", "map.")):
                survive(name, [put(subject, f, -1) for f in subject.fields[label] if f.nid == nid])


@pytest.mark.parametrize("label", ["packed_nid", "metabox_nid", "rootnid_2b", "rootnid_8b"])
def test_special_inodes_are_others(label: str) -> None:
    for name in ("kitchen-sink+flat", "extents-frag"):
        subject = atlas.subject(name)
        field = subject.fields[f"superblock.{label}"][0]
        for value in sorted(set(subject.numbers))[::7]:
            survive(name, [put(subject, field, value)], "image")


# --- found by fuzzing ---------------------------------------------------------------------------


def test_records_out_of_order() -> None:
    """An extent that starts before the one before it ends must not be read twice."""
    name = "handmade-records"
    for n in range(1, 4):
        subject = atlas.subject(name)
        fields = subject.fields["extent.lstart_lo"]
        for field in fields[n::4]:
            for value in (0, 1, 2999, 3001, 6000):
                survive(name, [put(subject, field, value)])


def test_many_holes_in_short_records() -> None:
    """Each lookup must not start from the first record."""
    count = 20_000
    file = hm.extents(count * crafted.BLOCK, 4, [(0, 0, 0)] * count)
    with (
        atlas.open_bytes(crafted.single(file, ondisk.INCOMPAT_48BIT)) as image,
        time_limit(SECONDS / 2),
    ):
        assert sum(e.length for e in image.extents("file")) == count * crafted.BLOCK


def test_lz4_literals_beyond_the_end() -> None:
    """Twenty literals announced, ten there: the rest is not zeros."""
    with pytest.raises(DecodeError):
        lz4_unpadded(b"\xf0\x05" + b"A" * 10, 20, False)

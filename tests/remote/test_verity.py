"""dm-verity trees made by veritysetup: what is right is read, and nothing else ever is."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pyerofs
from pyerofs import SourceSpec, VeritySpec
from pyerofs.errors import ErofsError, IntegrityError, SourceError
from tests.helpers import entries_of, every_image
from tests.manifests import Manifest, differences, golden
from tests.remote import faults, oci, verity
from tests.remote.pretend import Pretend, serve
from tests.remote.reading import (
    BLOCK,
    SEGMENT,
    access,
    assert_all_right,
    big,
    command,
    data_files,
    opened,
    read_pieces,
)
from tests.remote.server import Content, Server
from tests.remote.verity import Tree, make, spoil

pytestmark = pytest.mark.skipif(not verity.available(), reason="no veritysetup")

BIG = big()
FORMS: list[dict[str, Any]] = [
    {},
    {"appended": False},
    {"superblock": False},
    {"appended": False, "superblock": False},
    {"salt": ""},
    {"salt": "00" * 32},
    {"salt": "ab" * 200, "superblock": False},
    {"salt": "1f", "superblock": False, "appended": False},
    {"algorithm": "sha1"},
    {"algorithm": "sha1", "superblock": False, "salt": ""},
    {"algorithm": "sha512"},
    {"algorithm": "sha512", "superblock": False, "appended": False},
    {"data_block_size": 512, "hash_block_size": 512},
    {"data_block_size": 512, "superblock": False, "salt": ""},
    {"data_block_size": 1024, "hash_block_size": 4096},
    {"data_block_size": 4096, "hash_block_size": 1024, "algorithm": "sha512"},
    {"data_block_size": 2048, "hash_block_size": 512, "superblock": False},
]


def name_of(form: dict[str, Any]) -> str:
    return ",".join(f"{k}={str(v)[:6]}" for k, v in form.items()) or "default"


every_form = pytest.mark.parametrize("form", FORMS, ids=name_of)


@pytest.fixture(name="path")
def write_image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(BIG.image)
    return path


def tree_spec(tree: Tree) -> VeritySpec:
    """How one says it all."""
    where: dict[str, Any] = {"hash_offset": tree.hash_offset}
    if not tree.appended:
        where = {"hash_device": str(tree.hashes)}
    found = VeritySpec(root_hash=tree.root_hash, superblock=tree.superblock, **where)
    if tree.superblock:
        return found
    return replace(
        found,
        algorithm=tree.algorithm,
        salt=tree.salt,
        data_block_size=tree.data_block_size,
        hash_block_size=tree.hash_block_size,
        data_blocks=tree.data_blocks,
    )


def verified(path: Path, tree: Tree, **fields: Any) -> pyerofs.Image:
    return opened(str(path), verity=tree_spec(tree), **fields)


def words(tree: Tree) -> list[str]:
    """The same for a command."""
    found = [f"--verity-root-hash={tree.root_hash}"]
    if tree.appended:
        found.append(f"--verity-hash-offset={tree.hash_offset}")
    else:
        found.append(f"--verity-hash-device={tree.hashes}")
    if not tree.superblock:
        found += [
            "--verity-no-superblock",
            f"--verity-algorithm={tree.algorithm}",
            f"--verity-data-block-size={tree.data_block_size}",
            f"--verity-hash-block-size={tree.hash_block_size}",
            f"--verity-data-blocks={tree.data_blocks}",
        ]
        found += [f"--verity-salt={tree.salt}"] if tree.salt else []
    return found


# --- what is right ----------------------------------------------------------------------------


@every_form
def test_forms(path: Path, form: dict[str, Any]) -> None:
    tree = make(path, **form)
    with verified(path, tree) as image:
        assert_all_right(read_pieces(image, BIG.content))
        assert image.read("/small") == b"small\n"


@every_image
def test_golden(want: Manifest, tmp_path: Path) -> None:
    """Each device has a tree of its own; offsets are those of the file, before --offset."""
    trees = []
    for path in (want.image, *want.devices):
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        trees.append((copy, make(copy, data_block_size=512, hash_block_size=4096)))
    (image, tree), *others = trees
    devices = tuple(SourceSpec(str(p), verity=tree_spec(t)) for p, t in others)
    with verified(image, tree, offset=want.offset, devices=devices) as found:
        assert differences(want, entries_of(found)) == []


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3], FORMS[7]], ids=name_of)
def test_commands(path: Path, form: dict[str, Any]) -> None:
    tree = make(path, **form)
    done = command("cat", path, "small", *words(tree))
    assert (done.returncode, done.stdout, done.stderr) == (0, "small\n", "")
    other = "0" * len(tree.root_hash)
    done = command("cat", path, "small", *words(replace(tree, root_hash=other)))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_only_the_data_is_seen(path: Path) -> None:
    """What lies behind the verified blocks is not part of the image."""
    tree = make(path)
    with path.open("ab") as f:
        f.write(b"unverified" * 1000)
    with verified(path, tree) as image:
        (source,) = image.sources
        assert source.size == tree.covered
        with pytest.raises(SourceError):
            source.read_at(tree.covered - 5, 10)


def test_no_way_past_it(path: Path) -> None:
    """No sendfile, no second read: there is no file to be had beneath it."""
    tree = make(path)
    with verified(path, tree) as image:
        (source,) = image.sources
        assert source.backing is None


# --- what is not ------------------------------------------------------------------------------


class TestSpoiled:
    @every_form
    def test_data(self, path: Path, form: dict[str, Any]) -> None:
        tree = make(path, **form)
        at = SEGMENT + (3 << 20) + 12_345  # of /big: 3 MiB and a little
        spoil(path, at)
        block = at // tree.data_block_size
        with verified(path, tree) as image:
            for length in (1, 100, 128 << 10):
                found = read_pieces(image, BIG.content, length=length, offsets=[(3 << 20) + 12_345])
                assert (found.right, found.wrong) == (0, 0)
                assert found.failed == {IntegrityError}
                assert str(block) in str(found.errors[0])
            whole = read_pieces(image, BIG.content, length=64 << 10)
            assert (whole.wrong, len(whole.errors)) == (0, 1)  # all else can be read

    @every_form
    def test_tree(self, path: Path, form: dict[str, Any]) -> None:
        """A bit anywhere in the tree: at most errors."""
        tree = make(path, **form)
        size = tree.hashes.stat().st_size - tree.hash_offset
        chance = random.Random(1)
        original = tree.hashes.read_bytes()
        hurt = 0
        for at in [0, size // 2, size - 1, *(chance.randrange(size) for _ in range(5))]:
            tree.hashes.write_bytes(original)
            spoil(tree.hashes, tree.hash_offset + at)
            try:
                with verified(path, tree) as image:
                    found = read_pieces(image, BIG.content, length=1 << 20)
            except ErofsError:
                hurt += 1
            else:
                assert found.wrong == 0
                hurt += bool(found.errors)
        assert hurt

    def test_every_kind_of_swap(self, path: Path) -> None:
        """Blocks exchanged: each has a valid hash, elsewhere."""
        tree = make(path)
        data = bytearray(path.read_bytes())
        one, two = SEGMENT + BLOCK, SEGMENT + 9 * BLOCK
        data[one : one + BLOCK], data[two : two + BLOCK] = (
            data[two : two + BLOCK],
            data[one : one + BLOCK],
        )
        path.write_bytes(data)
        with verified(path, tree) as image:
            found = read_pieces(image, BIG.content, length=BLOCK)
            assert (found.wrong, len(found.errors)) == (0, 2)

    def test_metadata(self, path: Path) -> None:
        tree = make(path)
        spoil(path, 1024 + 20)
        with pytest.raises(IntegrityError):
            verified(path, tree)

    @pytest.mark.parametrize("what", ["data", "tree"])
    def test_cut(self, path: Path, what: str) -> None:
        tree = make(path, appended=False)
        victim = path if what == "data" else tree.hashes
        with victim.open("r+b") as f:
            f.truncate(victim.stat().st_size // 2)
        try:
            with verified(path, tree) as image:
                found = read_pieces(image, BIG.content)
                assert found.wrong == 0
                assert found.errors
        except SourceError:
            pass

    @pytest.mark.parametrize(
        "change",
        [
            {"root_hash": "00" * 32}, {"root_hash": ""}, {"root_hash": "ab"},
            {"root_hash": "ab" * 20}, {"hash_offset": 0}, {"hash_offset": 4096},
            {"hash_offset": 1 << 60}, {"superblock": False, "data_blocks": 5},
            {"superblock": False}, {"superblock": False, "salt": "00"},
            {"superblock": False, "data_blocks": 1 << 60},
            {"superblock": False, "data_blocks": 0},
            {"superblock": False, "data_block_size": 0},
            {"superblock": False, "data_block_size": 1000},
            {"superblock": False, "hash_block_size": 16},
            {"superblock": False, "hash_block_size": 1 << 40},
            {"superblock": False, "algorithm": "md5"}, {"superblock": False, "algorithm": "nonsense"},
            {"superblock": False, "salt": "ab" * 300},
        ],
        ids=str,
    )  # fmt: skip
    def test_told_wrong(self, path: Path, change: dict[str, Any]) -> None:
        tree = make(path)
        told = replace(tree_spec(tree), **change)
        with pytest.raises(SourceError) as caught:
            opened(str(path), verity=told)
        assert "\n" not in str(caught.value)

    def test_devices_without_a_tree(self, tmp_path: Path) -> None:
        want = golden("blobdev")
        image = tmp_path / "image"
        image.write_bytes(want.image.read_bytes())
        tree = make(image)
        devices = tuple(SourceSpec(str(d)) for d in want.devices)
        with pytest.raises(SourceError, match="verity-root-hash"):
            verified(image, tree, devices=devices)
        done = command("ls", image, *words(tree), f"--device={want.devices[0]}")
        assert done.returncode
        assert "verity-root-hash" in done.stderr

    def test_superblocks_made_of_nonsense(self, path: Path) -> None:
        """Whatever a superblock says: an error, and soon."""
        tree = make(path, appended=False)
        original = tree.hashes.read_bytes()
        chance = random.Random(11)
        for at in range(90):
            for value in (0, 255, chance.randrange(256)):
                spoiled = bytearray(original)
                spoiled[at] = value
                tree.hashes.write_bytes(spoiled)
                try:
                    with verified(path, tree) as image:
                        assert image.read("/big", 0, 10) == BIG.content[:10]
                except ErofsError:
                    pass


# --- from afar --------------------------------------------------------------------------------


class TestFromAfar:
    def test_http(self, path: Path) -> None:
        tree = make(path)
        with Server(Content(path.read_bytes())) as server:
            with opened(server.url, verity=tree_spec(tree)) as image:
                assert_all_right(read_pieces(image, BIG.content))
            server.forget()
            with opened(server.url, verity=tree_spec(tree)) as image:
                assert_all_right(read_pieces(image, BIG.content))
            assert len(server.requests) <= 1

    def test_hash_device_beside(self, path: Path) -> None:
        tree = make(path, appended=False)
        with (
            Server(Content(BIG.image)) as server,
            opened(server.url, verity=tree_spec(tree)) as image,
        ):
            assert_all_right(read_pieces(image, BIG.content))

    def test_layer(self, path: Path) -> None:
        """containerd appends the tree to the layer."""
        tree = make(path, salt="00" * 32)
        registry = Pretend()
        oci.publish(registry, "app", "1", oci.image(path.read_bytes()))
        with serve(registry) as server:
            what = f"oci://{server.authority}/app:1"
            with opened(what, verity=tree_spec(tree)) as image:
                assert_all_right(read_pieces(image, BIG.content))

    @pytest.mark.parametrize("fault", [faults.garbage, faults.bit_flip(70_000)])
    def test_garbage_is_never_shown(self, path: Path, fault: Any) -> None:
        """A server that lies twice: fetched again, or an error; and once it is well, all is."""
        tree = make(path)
        with (
            Server(Content(path.read_bytes())) as server,
            opened(server.url, verity=tree_spec(tree)) as image,
        ):
            server.inject(fault, times=2)
            found = read_pieces(image, BIG.content)
            assert found.wrong == 0
            server.heal()
            assert_all_right(read_pieces(image, BIG.content))

    def test_a_lying_server_is_an_error(self, path: Path) -> None:
        tree = make(path)
        with (
            Server(Content(path.read_bytes())) as server,
            opened(server.url, verity=tree_spec(tree)) as image,
        ):
            server.inject(faults.garbage)
            server.forget()
            found = read_pieces(image, BIG.content, [4 << 20])
            assert found.failed == {IntegrityError}
            assert len(server.requests) < 10  # not for ever

    def test_a_spoiled_cache_is_fetched_again(self, path: Path) -> None:
        """Spoiled so well that its checksums are right: only the tree can tell."""
        tree = make(path)
        content = Content(path.read_bytes())
        with Server(content) as server:
            wrong = bytearray(content.data)
            wrong[4 << 20] ^= 1
            content.data, right = bytes(wrong), content.data
            with opened(server.url) as image:
                image.read("/big")  # without a tree nobody notices
            assert data_files()
            content.data = right
            with opened(server.url, verity=tree_spec(tree)) as image:
                assert_all_right(read_pieces(image, BIG.content))

    def test_hashes_are_fetched_once(self, path: Path) -> None:
        """Segments of data, those of the tree, and nothing twice."""
        tree = make(path)
        whole = path.read_bytes()
        with Server(Content(whole)) as server:
            with opened(server.url, access(cache=False), verity=tree_spec(tree)) as image:
                assert_all_right(read_pieces(image, BIG.content))
            assert server.sent <= len(whole) + SEGMENT

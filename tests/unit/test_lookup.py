"""Resolving paths: inside the image only, as Linux does it below a chroot."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import pyerofs
from pyerofs import Image
from pyerofs.format import tree
from pyerofs.format.tree import MAX_SYMLINKS
from pyerofs.sources import MemorySource
from tests import handmade as hm
from tests.helpers import directory, handmade, open_golden, symlink
from tests.manifests import golden

FILE, DIR, LINK = 1, 2, 7

# nids are given in this order from 2 on, two for each inode of at most 64 bytes
LINKS = {
    b"to-file": b"dir/file",
    b"to-dir": b"dir",
    b"absolute": b"/dir/file",
    b"above": b"../../dir/../dir/./file",
    b"slash": b"dir/",
    b"slash-file": b"dir/file/",
    b"through": b"to-dir/to-parent/to-file",
    b"dangling": b"nowhere/at/all",
    b"loop": b"loop",
    b"ping": b"pong",
    b"pong": b"ping",
    b"through-file": b"dir/file/x",
    b"outside": b"/../../../../etc/passwd",
    b"latin-\xe9": b"dir/f\xff",
    b"doubled": b"//dir///file",
}


@pytest.fixture(name="image", scope="module")
def build() -> Iterator[Image]:
    """::

    dir/file, dir/f\\xff, dir/to-parent -> .., dir/empty/, the links above,
    chain-00 -> dir/file, chain-01 -> chain-00 …
    """
    inner = {
        b"file": (2, FILE),
        b"f\xff": (4, FILE),
        b"to-parent": (6, LINK),
        b"empty": (8, DIR),
    }
    files = {
        b".file": hm.inline(b"the content"),  # nid 2
        b".other": hm.inline(b"not UTF-8"),  # nid 4
        b".link": symlink(b".."),  # nid 6
        b".empty": directory(8, {}),
        b"dir": directory(10, inner),
    }
    files |= {name: symlink(target) for name, target in LINKS.items()}
    files |= {
        b"chain-%02d" % i: symlink(b"chain-%02d" % (i - 1) if i else b"dir/file") for i in range(50)
    }
    with pyerofs.open(MemorySource(handmade(files))) as image:
        yield image


@pytest.mark.parametrize(
    "path",
    [
        "dir/file",
        "/dir/file",
        "//dir///file",
        "./dir/./file",
        "dir/../dir/file",
        "../../dir/file",
        "/../dir/file",
        "dir/empty/../file",
        "to-file",
        "to-dir/file",
        "to-dir/../dir/file",
        "absolute",
        "above",
        "slash/file",
        "slash//file",
        "through",
        "doubled",
        "dir/to-parent/dir/to-parent/to-file",
        b"dir/file",
        b"/to-dir/file",
    ],
)
def test_what_leads_to_the_file(image: Image, path: str | bytes) -> None:
    assert image.lookup(path).nid == 2
    assert image.read(path) == b"the content"


@pytest.mark.parametrize(
    "path", ["", "/", ".", "//", "..", "dir/..", "/../..", "dir/to-parent", b"/"]
)
def test_what_leads_to_the_root(image: Image, path: str | bytes) -> None:
    assert image.lookup(path).nid == image.root.nid


@pytest.mark.parametrize("path", ["dir", "dir/", "dir//", "dir/.", "to-dir", "to-dir/", "slash"])
def test_what_leads_to_the_directory(image: Image, path: str) -> None:
    assert image.lookup(path).nid == 10
    assert image.listdir(path) == ["empty", "file", "f\udcff", "to-parent"]


@pytest.mark.parametrize("path", ["to-dir/", "to-dir/.", "slash/", "to-dir//"])
def test_a_slash_at_the_end_follows_the_link_in_any_case(image: Image, path: str) -> None:
    assert image.lookup(path, follow_symlinks=False).nid == 10


@pytest.mark.parametrize("path", [*LINKS, b"chain-45"])
def test_the_link_itself(image: Image, path: bytes) -> None:
    assert image.lookup(path, follow_symlinks=False).is_symlink
    if path in LINKS:
        assert os.fsencode(image.readlink(path)) == LINKS[path]
        assert image.stat(path, follow_symlinks=False).st_size == len(LINKS[path])


@pytest.mark.parametrize(
    "path",
    [
        "missing",
        "dir/missing",
        "missing/x",
        "dangling",
        "outside",
        "dir/FILE",
        "dir/file\0",
        "x" * 300,
    ],
)
def test_not_found(image: Image, path: str) -> None:
    with pytest.raises(pyerofs.NotFound) as found:
        image.lookup(path)
    assert found.value.path == path.encode()
    assert not image.exists(path)


@pytest.mark.parametrize(
    "path",
    [
        "dir/file/",
        "dir/file/x",
        "dir/file/.",
        "dir/file/..",
        "slash-file",
        "through-file",
        "to-file/x",
    ],
)
def test_not_a_directory(image: Image, path: str) -> None:
    with pytest.raises(pyerofs.NotADirectory):
        image.lookup(path)
    assert not image.exists(path)


@pytest.mark.parametrize("path", ["loop", "ping", "loop/x", "dir/to-parent/pong/y"])
def test_loops(image: Image, path: str) -> None:
    with pytest.raises(pyerofs.TooManySymlinks):
        image.lookup(path)


@pytest.mark.parametrize("path", ["loop", "ping", "loop/x", "chain-49"])
def test_nothing_exists_behind_too_many_links(image: Image, path: str) -> None:
    assert not image.exists(path)  # as os.path.exists says
    assert not pyerofs.Path(image, path).exists()
    assert image.exists("loop", follow_symlinks=False)


def test_as_many_links_as_linux_follows(image: Image) -> None:
    assert MAX_SYMLINKS == 40
    assert image.read(f"chain-{MAX_SYMLINKS - 1}") == b"the content"
    with pytest.raises(pyerofs.TooManySymlinks):
        image.read(f"chain-{MAX_SYMLINKS}")


@pytest.mark.parametrize("path", ["dir/f\udcff", b"dir/f\xff", "latin-\udce9", b"latin-\xe9"])
def test_names_that_are_not_utf8(image: Image, path: str | bytes) -> None:
    assert image.read(path) == b"not UTF-8"


def test_names_that_are_not_utf8_in_messages(image: Image) -> None:
    with pytest.raises(pyerofs.NotFound) as found:
        image.lookup(b"absent-\xff")
    assert str(found.value).isprintable()
    assert "absent-" in str(found.value)


def test_in_the_middle_of_many_blocks() -> None:
    names = [b"%04d-%s" % (i, b"n" * (i % 50)) for i in range(1000)]
    with pyerofs.open(
        MemorySource(
            handmade(
                {b"a": hm.inline(b"a")}, elsewhere=dict.fromkeys(names, (2, FILE)), block_bits=16
            )
        )
    ) as image:
        assert [n.encode() for n in image.listdir()] == [*names, b"a"]
        for name in names:
            assert image.lookup(name).nid == 2
            assert not image.exists(name + b"\x01")
            assert not image.exists(name[:-1] + b"\x01")


def test_paths_of_inodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole paths, in the order asked for, however messages would shorten them."""
    monkeypatch.setattr(tree, "MAX_PATH", 10)
    monkeypatch.setattr(tree, "ENDS", 2)
    with open_golden(golden("lz4")) as image:
        deep = "".join(f"/deep{n}" for n in range(12)) + "/bottom"
        wanted = ["/text", deep, "/many"]
        nids = [image.lookup(path).nid for path in wanted]
        assert tree.paths_of(image.volume, [*nids, 1 << 40]) == wanted

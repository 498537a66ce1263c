"""``pyerofs check``: sound images pass; what is wrong is found, and where.

Each damaged image is checked with ``--metadata``, too."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyerofs import Image
from pyerofs.format import ondisk
from pyerofs.format.model import FRAGMENT
from tests import handmade as hm
from tests.cli.conftest import Run
from tests.helpers import directory, every_image, handmade, open_golden, symlink, words
from tests.manifests import Manifest, golden

FILE, DIR = 1, 2


@every_image
def test_golden_images_are_sound(run: Run, want: Manifest) -> None:
    done = run("check", *words(want))
    assert (done.status, done.err) == (0, "")
    once = {p: e for p, e in want.entries.items() if p not in ("hard-3", "many/hard-2")}
    size = sum(e["size"] for e in once.values() if "sha256" in e)
    with open_golden(want) as image:
        special = [n for n in (image.superblock.packed_nid, image.superblock.metabox_nid) if n]
        size += sum(image.inode(nid).size for nid in special)
    inodes = len(once) + len(special)
    assert done.lines == [f"{inodes} inodes, {size} bytes of file data, no problems"]
    facts = {"checked": "everything", "inodes": inodes, "bytes": size, "problems": []}
    assert run("check", "--json", *words(want)).json == facts
    done = run("check", "--metadata", *words(want))
    assert (done.status, done.err) == (0, "")
    assert done.lines == [f"{inodes} inodes, {size} bytes of file data (not read), no problems"]
    facts["checked"] = "metadata"
    assert run("check", "--metadata", "--json", *words(want)).json == facts


def problems(run: Run, path: Path, image: bytes, *, in_data: bool = False) -> list[dict[str, Any]]:
    """What is found in an image, which must be something, and be the same in text.  With
    ``--metadata``, problems of the same paths are found, or none if they are ``in_data``."""
    path.write_bytes(image)
    metadata = run("check", "--json", "--metadata", path)
    assert (metadata.status, metadata.err) == (0 if in_data else 1, "")
    done = run("check", "--json", path)
    assert (done.status, done.err) == (1, "")
    found: list[dict[str, Any]] = done.json["problems"]
    assert found
    text = run("check", "-q", path)
    assert (text.status, text.err) == (1, "")
    for problem in found:
        (line,) = [s for s in text.lines if s.startswith(f"{problem['path']}: {problem['what']}")]
        assert problem["nid"] is None or f"nid {problem['nid']}" in line
        assert problem["offset"] is None or f"offset {problem['offset']:#x}" in line
    assert text.lines[-1].endswith(f"{len(found)} problems")
    shown = {problem["path"] for problem in metadata.json["problems"]}
    assert shown == (set() if in_data else {problem["path"] for problem in found})
    return found


# --- golden images with something changed -----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("lz4hc-C64k", "lz4"),
        ("zstd-C128k", "zstd"),
        ("lzma-C64k", "lzma"),
        ("libdeflate", "deflate"),
    ],
)
def test_a_pcluster_that_does_not_decode(
    run: Run, tmp_path: Path, name: str, algorithm: str
) -> None:
    want = golden(name)
    with open_golden(want) as image:
        nid = image.lookup("text").nid
        extent = next(image.extents("text"))
    data = bytearray(want.image.read_bytes())
    data[extent.address : extent.address + extent.size] = b"\x5a" * extent.size
    (problem,) = problems(run, tmp_path / "image", bytes(data), in_data=True)
    assert problem["path"] == "/text"
    assert problem["what"].startswith(f"pcluster: {algorithm}")
    assert problem["nid"] == nid
    assert problem["offset"] == extent.address


def test_all_files_that_share_what_is_broken(run: Run, tmp_path: Path) -> None:
    want = golden("frag-zstd")
    with open_golden(want) as image:
        packed = image.inode(image.superblock.packed_nid)
        extent = next(image.extents(packed))
    data = bytearray(want.image.read_bytes())
    data[extent.address : extent.address + extent.size] = bytes(extent.size)
    found = problems(run, tmp_path / "image", bytes(data), in_data=True)
    assert "<packed inode>" in {p["path"] for p in found}
    assert len(found) > 10
    assert {p["offset"] for p in found} == {extent.address}


def patched(change: Callable[[Image, bytearray], None], name: str = "nosbcrc") -> bytes:
    """A golden image without a checksum after a change."""
    want = golden(name)
    data = bytearray(want.image.read_bytes())
    with open_golden(want) as image:
        change(image, data)
    return bytes(data)


def inode_at(image: Image, path: str) -> int:
    return image.volume.inode_position(image.lookup(path, follow_symlinks=False).nid)[1]


def test_a_wrong_link_count(run: Run, tmp_path: Path) -> None:
    def change(image: Image, data: bytearray) -> None:
        at = inode_at(image, "hard-1")
        form = struct.unpack_from("<H", data, at)[0]
        struct.pack_into(*(("<I", data, at + 44) if form & 1 else ("<H", data, at + 6)), 9)

    (problem,) = problems(run, tmp_path / "image", patched(change))
    assert problem["what"] == "link count 9, 3 names found"
    assert problem["path"] == "/hard-1"


def test_a_wrong_type_in_a_directory(run: Run, tmp_path: Path) -> None:
    def change(image: Image, data: bytearray) -> None:
        dirent = struct.pack("<Q", image.lookup("text").nid)
        at = data.index(dirent, 1152)
        assert data[at + 10] == FILE
        data[at + 10] = DIR

    (problem,) = problems(run, tmp_path / "image", patched(change))
    assert problem["path"] == "/text"
    assert problem["what"] == "entry of type 2 for a file"


def test_names_out_of_order(run: Run, tmp_path: Path) -> None:
    def change(image: Image, data: bytearray) -> None:
        at = data.index(b"size-1size-4000")
        data[at : at + 6] = b"xize-1"

    found = problems(run, tmp_path / "image", patched(change))
    assert [p["what"] for p in found] == ["entry b'size-4000' after b'xize-1'"]


def test_an_inode_of_an_unknown_kind(run: Run, tmp_path: Path) -> None:
    def change(image: Image, data: bytearray) -> None:
        data[inode_at(image, "text")] = 0xFF

    (problem,) = problems(run, tmp_path / "image", patched(change))
    assert problem["path"] == "/text"


def test_data_beyond_the_end(run: Run, tmp_path: Path) -> None:
    image = golden("plain").image.read_bytes()
    found = problems(run, tmp_path / "image", image[:-4096])
    assert all("beyond the end" in p["what"] for p in found)


def test_a_fragment_beyond_the_packed_inode(run: Run, tmp_path: Path) -> None:
    def change(image: Image, data: bytearray) -> None:
        packed = image.inode(image.superblock.packed_nid)
        inode = image.lookup("text")
        extent = next(image.extents(inode))
        assert extent.kind == FRAGMENT
        at = inode.data + 7 & ~7
        struct.pack_into("<Q", data, at, 1 << 63 | packed.size - extent.length + 1)

    (problem,) = problems(run, tmp_path / "image", patched(change, "allfrag-lz4"))
    assert problem["path"] == "/text"
    assert problem["what"] == "fragment beyond the packed inode's end"


def test_an_algorithm_that_the_superblock_does_not_list(run: Run, tmp_path: Path) -> None:
    """In the header of a file's index."""

    def change(image: Image, data: bytearray) -> None:
        at = image.lookup("text").data + 7 & ~7
        data[at + 6] = ondisk.ALG_ZSTD

    found = problems(run, tmp_path / "image", patched(change, "lz4hc-C64k"))
    assert {p["path"] for p in found} == {"/text"}
    assert "compression algorithm 3" in found[0]["what"]


@pytest.mark.parametrize("option", [[], ["--metadata"]])
def test_a_device_that_is_missing(run: Run, option: list[str]) -> None:
    """That is not a fault of the image."""
    done = run("check", golden("tar-index").image, *option)
    assert done.status == 1
    assert "--device" in done.text + done.err
    assert "corrupt" not in done.text + done.err


# --- images by hand ---------------------------------------------------------------------------


@pytest.fixture(name="found")
def look(run: Run, tmp_path: Path) -> Callable[..., list[tuple[str, str]]]:
    """The problems of a hand-made image: path and what."""

    def call(
        files: dict[bytes, bytes], *, in_data: bool = False, **options: Any
    ) -> list[tuple[str, str]]:
        image = handmade(files, **options)
        found = problems(run, tmp_path / "image", image, in_data=in_data)
        return [(p["path"], p["what"]) for p in found]

    return call


Look = Callable[..., list[tuple[str, str]]]


def test_a_sound_image(run: Run, tmp_path: Path) -> None:
    image = handmade({b"file": hm.inline(b"x"), b"link": symlink(b"file")})
    (tmp_path / "image").write_bytes(image)
    assert run("check", tmp_path / "image").lines == ["3 inodes, 1 bytes of file data, no problems"]


def test_a_directory_inside_itself(found: Look) -> None:
    problems = found({b"a": directory(2, {b"again": (2, DIR)})})
    assert ("/a/again", "directory reached twice") in problems


def test_a_directory_with_two_names(found: Look) -> None:
    problems = found({b"a": directory(2, {})}, elsewhere={b"b": (2, DIR)})
    assert any(what == "directory reached twice" for _, what in problems)


def test_dots_that_lead_elsewhere(found: Look) -> None:
    """Our hand-made directories have a ``..`` that leads to themselves."""
    problems = found({b"a": directory(2, {})})
    assert ("/a", "'..' leads to nid 2") in problems


def test_dots_that_are_missing(found: Look) -> None:
    alone = hm.inline(hm.directory({b"x": (2, FILE)}, 4096), mode=hm.DIRECTORY, nlink=2)
    problems = found({b"a": hm.inline(b"x"), b"d": alone})
    assert {("/d", "no '.' entry"), ("/d", "no '..' entry")} <= set(problems)


@pytest.mark.parametrize("target", [b"", b"nul\0here"])
def test_links_to_nothing(found: Look, target: bytes) -> None:
    """Their targets count as data, their sizes do not."""
    ((path, what),) = found({b"link": symlink(target)}, in_data=bool(target))
    assert path == "/link"
    assert "link target" in what


def test_a_name_that_comes_twice(run: Run, tmp_path: Path) -> None:
    image = handmade({b"xa": hm.inline(b"1"), b"xb": hm.inline(b"2")}).replace(b"xaxb", b"xbxb")
    found = problems(run, tmp_path / "image", image)
    assert ("/", "entry b'xb' after b'xb'") in {(p["path"], p["what"]) for p in found}


def test_a_bad_name(run: Run, tmp_path: Path) -> None:
    image = handmade({b"a_b": hm.inline(b"1")}).replace(b"a_b", b"a/b")
    (problem, *_) = problems(run, tmp_path / "image", image)
    assert problem["path"] == "/"
    assert "bad name" in problem["what"]


def test_a_filter_that_denies_what_is_there(found: Look) -> None:
    attributes = bytearray(hm.xattrs(hm.xattr(1, b"name", b"value")))
    attributes[:4] = b"\xff" * 4
    assert found(
        {b"f": hm.inline(b"x", xattrs=bytes(attributes))}, compat=ondisk.COMPAT_XATTR_FILTER
    ) == [("/f", "name filter denies xattr b'user.name'")]


def test_an_xattr_that_comes_twice(found: Look) -> None:
    entries = hm.xattr(1, b"name", b"1") + hm.xattr(1, b"name", b"2")
    assert found({b"f": hm.inline(b"x", xattrs=hm.xattrs(entries))}) == [
        ("/f", "an xattr comes twice")
    ]


def test_an_xattr_that_does_not_fit(found: Look) -> None:
    entries = ondisk.XATTR_ENTRY.pack(200, 1, 0) + b"abcd"
    ((path, what),) = found({b"f": hm.inline(b"x", xattrs=hm.xattrs(entries))})
    assert path == "/f"
    assert "xattr reaches beyond" in what


HEAD1 = ondisk.LCLUSTER_HEAD1
MAPS = {  # what is wrong, and a file with it
    "data beyond the end of": [
        hm.plain(5000, 9999),
        hm.chunks(5000, [(0, 1), (0, 9999)]),
        hm.indexed(5000, [hm.head(HEAD1, 0, 9999), hm.nonhead(1, 1)]),
        hm.indexed(5000, [hm.head(ondisk.LCLUSTER_PLAIN, 0, 9999), hm.head(HEAD1, 0, 1)]),
    ],
    "leads back by 1 to no head": [hm.indexed(5000, [hm.nonhead(1, 2), hm.nonhead(2, 1)])],
    "starts at byte 5000": [hm.indexed(5000, [hm.head(HEAD1, 5000, 1), hm.nonhead(1, 1)])],
    "crosses its block": [hm.inode(ondisk.LAYOUT_FLAT_INLINE, 4090, 0)],
    "fragment, but the image has no packed inode": [
        hm.inode(
            ondisk.LAYOUT_COMPRESSED_FULL, 5000, 1, struct.pack("<Q", 1 << 63), align=8
        )
    ],
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "file"), [(k, file) for k, v in MAPS.items() for file in v])
def test_a_map_that_leads_nowhere(found: Look, wrong: str, file: bytes) -> None:
    ((path, what),) = found({b"f": file}, incompat=ondisk.INCOMPAT_LZ4_0PADDING)
    assert path == "/f"
    assert wrong in what


def test_entries_that_lead_nowhere(found: Look) -> None:
    problems = found({b"a": hm.inline(b"x")}, elsewhere={b"b": (1 << 30, FILE)})
    assert [path for path, _ in problems] == ["/b"]


def test_what_can_not_even_be_opened(run: Run, tmp_path: Path) -> None:
    data = bytearray(golden("plain").image.read_bytes())
    data[1100] ^= 1
    (tmp_path / "image").write_bytes(data)
    for option in ([], ["--json"], ["--metadata"]):
        done = run("check", *option, tmp_path / "image")
        assert done.status == 1
        assert "checksum" in done.text + done.err

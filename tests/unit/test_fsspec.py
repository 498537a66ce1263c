"""The fsspec file system: what its own archive file systems can do, on an EROFS image."""

from __future__ import annotations

import io
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

fsspec = pytest.importorskip("fsspec")

import pyerofs  # noqa: E402
from pyerofs.fsspec import ErofsFileSystem  # noqa: E402
from tests.helpers import every_image  # noqa: E402
from tests.manifests import Manifest, golden  # noqa: E402

BOTTOM = "/".join(f"deep{i}" for i in range(12)) + "/bottom"


@pytest.fixture(name="fs")
def open_plain() -> Iterator[ErofsFileSystem]:
    fs = fsspec.filesystem("erofs", fo=str(golden("plain").image))
    yield fs
    fs.close()


@every_image
def test_finds_and_reads_everything(want: Manifest) -> None:
    fs = fsspec.filesystem(
        "erofs",
        fo=str(want.image),
        offset=want.offset,
        devices=[str(device) for device in want.devices],
    )
    found = fs.find("/", withdirs=True, detail=True)
    assert set(found) | {"."} - {""} >= set(want.entries)
    for path, expected in want.entries.items():
        info = fs.info("" if path == "." else path)
        assert info["mode"] == expected["mode"]
        assert info["uid"] == expected["uid"]
        assert info["gid"] == expected["gid"]
        assert info["mtime"] == expected["mtime_ns"] / 1e9
        kind = stat.S_IFMT(expected["mode"])
        if kind == stat.S_IFREG:
            assert info["type"] == "file"
            assert info["size"] == expected["size"] == len(fs.cat_file(path))
        else:
            known = {stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
            assert info["type"] == known.get(kind, "other")
            assert info["size"] == 0
        if kind == stat.S_IFLNK:
            assert info["destination"] == expected["target"]
    fs.close()


def test_is_registered(fs: ErofsFileSystem) -> None:
    assert fsspec.get_filesystem_class("erofs") is ErofsFileSystem
    assert fs.protocol == "erofs"


def test_listing(fs: ErofsFileSystem) -> None:
    names = fs.ls("", detail=False)
    assert "text" in names
    assert names == fs.ls("/", detail=False) == fs.ls("erofs://", detail=False)
    assert len(fs.ls("many")) == 41
    assert fs.ls("many", detail=False)[0].startswith("many/entry-0000")
    assert fs.ls("text", detail=False) == ["text"]
    assert fs.ls("empty-dir") == []
    with pytest.raises(FileNotFoundError):
        fs.ls("missing")


@pytest.mark.parametrize(
    ("path", "exists", "isdir", "isfile"),
    [
        ("", True, True, False),
        ("/", True, True, False),
        ("many", True, True, False),
        ("text", True, False, True),
        ("/text", True, False, True),
        ("erofs://text", True, False, True),
        ("link-short", True, False, True),
        ("fifo", True, False, False),
        ("dangling", False, False, False),
        ("missing", False, False, False),
        ("text/below", False, False, False),
    ],
)
def test_what_is_there(
    fs: ErofsFileSystem, path: str, exists: bool, isdir: bool, isfile: bool
) -> None:
    assert (fs.exists(path), fs.isdir(path), fs.isfile(path)) == (exists, isdir, isfile)


def test_walking_and_globbing(fs: ErofsFileSystem) -> None:
    assert fs.glob("size-4*") == ["size-4000", "size-4095", "size-4096", "size-4097"]
    assert fs.glob("**/bottom") == [BOTTOM]
    assert fs.glob("*/hard-?") == ["many/hard-2"]
    (first, *_) = fs.walk("")
    assert first[0] == ""
    assert "many" in first[1]
    assert "text" in first[2]
    assert fs.find("deep0") == [BOTTOM]
    assert fs.du("many") == sum(row["size"] for row in fs.ls("many"))


def test_reading(fs: ErofsFileSystem, tmp_path: Path) -> None:
    with pyerofs.open(golden("plain").image) as image:
        text = image.read("text")
    assert fs.cat("text") == fs.cat_file("text") == fs.cat_file("link-short") == text
    assert fs.head("text", 100) == text[:100]
    assert fs.tail("text", 100) == text[-100:]
    with fs.open("text") as file:
        file.seek(100)
        assert file.read(5) == text[100:105]
    with fs.open("text", "r", encoding="ascii") as file:
        assert file.read() == text.decode("ascii")
    fs.get_file("text", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == text


@pytest.mark.parametrize("start", [None, 0, 5, 40000, 50000, -10, -50000])
@pytest.mark.parametrize("end", [None, 0, 7, 40425, 50000, -5, -50000])
def test_ranges(fs: ErofsFileSystem, start: int | None, end: int | None) -> None:
    assert fs.cat_file("text", start, end) == fs.cat_file("text")[start:end]


def test_blocks_between_delimiters(fs: ErofsFileSystem) -> None:
    """For which fsspec wants to know the size of an open file."""
    text = fs.cat("text")
    assert fs.read_block("text", 1000, 50) == text[1000:1050]
    assert fs.read_block("text", 1000, None) == text[1000:]
    start, end = text.index(b"\n", 1000) + 1, text.index(b"\n", 2000) + 1
    assert fs.read_block("text", 1000, 1000, delimiter=b"\n") == text[start:end]


def test_copying_a_tree(fs: ErofsFileSystem, tmp_path: Path) -> None:
    fs.get("many", str(tmp_path / "copy"), recursive=True)
    assert sorted(os.listdir(tmp_path / "copy")) == fs._image.listdir("many")
    assert (tmp_path / "copy" / "hard-2").read_bytes() == fs.cat("many/hard-2")


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("missing", FileNotFoundError),
        ("many", IsADirectoryError),
        ("text/x", NotADirectoryError),
        ("fifo", OSError),
    ],
)
def test_what_can_not_be_read(fs: ErofsFileSystem, path: str, error: type[OSError]) -> None:
    with pytest.raises(error):
        fs.cat_file(path)
    with pytest.raises(error):
        fs.open(path)


@pytest.mark.parametrize("mode", ["wb", "ab", "r+b", "xb"])
def test_read_only(fs: ErofsFileSystem, mode: str) -> None:
    with pytest.raises(ValueError, match="read-only"):
        fs.open("text", mode)


def test_pickled(fs: ErofsFileSystem) -> None:
    """As dask does with file systems."""
    copy = pickle.loads(pickle.dumps(fs))
    assert copy.cat("text") == fs.cat("text")
    copy.close()


@pytest.mark.parametrize("how", ["keyword", "chained", "object", "memory", "options"])
def test_where_the_image_may_be(how: str, tmp_path: Path) -> None:
    want = golden("offset")
    data = want.image.read_bytes()[want.offset :]
    (tmp_path / "system.erofs").write_bytes(data)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/system.erofs", data)
    memory.pipe_file("/at-an-offset.erofs", want.image.read_bytes())
    ways: dict[str, dict[str, Any]] = {
        "keyword": {"urlpath": "erofs://text", "fo": str(tmp_path / "system.erofs")},
        "chained": {"urlpath": "erofs://text::memory://system.erofs"},
        "object": {"urlpath": "erofs://text", "fo": io.BytesIO(data)},
        "memory": {"urlpath": "erofs://text", "fo": "memory://system.erofs"},
        "options": {
            "urlpath": "erofs://text",
            "fo": "/at-an-offset.erofs",
            "target_protocol": "memory",
            "offset": want.offset,
        },
    }
    with pyerofs.open(io.BytesIO(data)) as image, fsspec.open(**ways[how]) as file:
        assert file.read() == image.read("text")
    memory.rm("/", recursive=True)


def test_closing_closes_what_it_opened() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/system.erofs", golden("lz4").image.read_bytes())
    fs = fsspec.filesystem("erofs", fo="memory://system.erofs")
    assert fs.exists("text")
    fs.close()
    fs.close()
    memory.rm("/", recursive=True)


def test_no_image() -> None:
    with pytest.raises(pyerofs.SourceError):
        fsspec.filesystem("erofs", fo="/absent/image.erofs")

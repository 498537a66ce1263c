"""The synchronous API against what Linux shows of every golden image."""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

import pyerofs
from pyerofs import Image
from pyerofs.format.model import Inode
from pyerofs.sources import MemorySource
from tests.helpers import SilentSource, entries_of, every_image, open_golden, primary
from tests.manifests import Entries, Manifest, differences, entry, golden

SMALL = 4093  # a read's size: divides no block


def read_in_small_steps(image: Image, path: str) -> bytes:
    """A file's content, a few bytes at a time and past the buffer's back."""
    with image.open(path) as f:
        return b"".join(iter(lambda: f.raw.read(SMALL), b""))


def entry_at(image: Image, path: str) -> dict[str, object]:
    status = image.stat(path, follow_symlinks=False)
    return entry(
        status,
        content=read_in_small_steps(image, path) if stat.S_ISREG(status.st_mode) else None,
        target=image.readlink(path) if stat.S_ISLNK(status.st_mode) else None,
        xattrs=image.xattrs(path, follow_symlinks=False),
    )


@every_image
def test_every_path_is_what_linux_shows(want: Manifest) -> None:
    with open_golden(want) as image:
        got: Entries = {path: entry_at(image, path) for path in want.entries}
        assert differences(want, got) == []


@every_image
def test_walking_finds_the_same(want: Manifest) -> None:
    with open_golden(want) as image:
        assert differences(want, entries_of(image)) == []


@every_image
def test_nothing_depends_on_the_cache(want: Manifest) -> None:
    with open_golden(want, cache_size=1000) as image:
        assert differences(want, entries_of(image)) == []
        assert image.volume.memory.pclusters.used <= 1000


@every_image
def test_reading_anywhere_is_cutting_from_the_whole(want: Manifest) -> None:
    with open_golden(want) as image:
        for path, expected in want.entries.items():
            if not stat.S_ISREG(expected["mode"]):
                continue
            inode = image.lookup(path)
            whole = image.read(inode)
            size = len(whole)
            for offset in {
                0,
                1,
                511,
                4095,
                4096,
                8191,
                size // 2,
                max(size - 1, 0),
                size,
                size + 9,
            }:
                for length in (0, 1, 513, 4097, size):
                    assert image.read(inode, offset, length) == whole[offset : offset + length]


@every_image
def test_extents_cover_each_file_once(want: Manifest) -> None:
    with open_golden(want) as image:
        for path, expected in want.entries.items():
            if stat.S_IFMT(expected["mode"]) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                inode = image.lookup(path, follow_symlinks=False)
                at = 0
                for extent in image.extents(inode):
                    assert extent.start == at
                    assert extent.length > 0
                    at = extent.end
                assert at == inode.size


@every_image
def test_each_xattr_by_its_name(want: Manifest) -> None:
    with open_golden(want) as image:
        for path, expected in want.entries.items():
            for name, value in expected.get("xattrs", {}).items():
                assert image.getxattr(path, name, follow_symlinks=False).hex() == value
            with pytest.raises(pyerofs.NoSuchXattr):
                image.getxattr(path, "user.nobody-has-this", follow_symlinks=False)


@pytest.fixture(name="image")
def open_plain() -> Iterator[Image]:
    with open_golden(golden("plain")) as image:
        yield image


class TestWalk:
    def test_parents_come_first(self, image: Image) -> None:
        seen: set[str] = set()
        for path, _, _ in image.walk():
            assert path == "/" or path.rpartition("/")[0] in seen | {""}
            seen.add(path)
        assert len(seen) == 16

    def test_what_is_removed_is_not_entered(self, image: Image) -> None:
        seen = []
        for path, directories, _ in image.walk():
            seen.append(path)
            directories[:] = [d for d in directories if d.name == "deep0"]
        assert seen == ["/", "/deep0"]

    def test_from_a_directory(self, image: Image) -> None:
        ((path, directories, others),) = image.walk("many")
        assert (path, directories, len(others)) == ("many", [], 41)
        assert others[0].path.startswith("many/entry-0000-")

    def test_of_a_file(self, image: Image) -> None:
        with pytest.raises(pyerofs.NotADirectory):
            list(image.walk("text"))


class TestDirectories:
    def test_listdir_in_the_order_of_bytes(self, image: Image) -> None:
        names = image.listdir("many")
        assert len(names) == 41
        assert sorted(names) == names
        assert image.listdir() == image.listdir("/") == image.listdir("")
        assert image.listdir("empty-dir") == []

    def test_scandir(self, image: Image) -> None:
        found = {e.name: e for e in image.scandir("/")}
        assert found["text"].is_file()
        assert found["many"].is_dir()
        assert found["link-short"].is_symlink()
        assert not found["link-short"].is_file()
        assert found["text"].path == "/text"
        assert found["text"].stat() == image.stat("text")
        assert image.read(found["text"]) == image.read("text")
        assert repr(found["text"]) == "<DirEntry '/text'>"

    def test_scandir_of_a_file_fails_at_once(self, image: Image) -> None:
        with pytest.raises(pyerofs.NotADirectory, match="text"):
            image.scandir("text")

    def test_scandir_of_an_inode_that_is_a_file_names_it(self, image: Image) -> None:
        inode = image.lookup("text")
        with pytest.raises(pyerofs.NotADirectory, match=f"nid {inode.nid}"):
            image.scandir(inode)


class TestTargets:
    @pytest.mark.parametrize("path", ["text", "/text", b"text", PurePosixPath("/text"), "./text"])
    def test_a_path_of_any_type(self, image: Image, path: str) -> None:
        assert image.stat(path).st_size == 40425
        assert len(image.read(path)) == 40425

    def test_an_inode(self, image: Image) -> None:
        inode = image.lookup("text")
        assert isinstance(inode, Inode)
        assert image.lookup(inode) is inode
        assert image.read(inode) == image.read("text")
        assert image.inode(inode.nid).size == inode.size

    def test_links_are_followed_unless_told(self, image: Image) -> None:
        assert image.stat("link-short").st_size == 40425
        assert image.stat("link-short", follow_symlinks=False).st_size == 4
        assert image.read("link-short") == image.read("text")
        assert image.readlink("link-short") == "text"

    def test_exists(self, image: Image) -> None:
        assert image.exists("text")
        assert not image.exists("missing")
        assert not image.exists("text/below")
        assert not image.exists("dangling")
        assert image.exists("dangling", follow_symlinks=False)


class TestErrors:
    @pytest.mark.parametrize(
        ("path", "error"),
        [
            ("missing", pyerofs.NotFound),
            ("dangling", pyerofs.NotFound),
            ("text/below", pyerofs.NotADirectory),
            ("many", pyerofs.IsADirectory),
            ("fifo", pyerofs.NotAFile),
            ("chr", pyerofs.NotAFile),
        ],
    )
    def test_what_can_not_be_read(
        self, image: Image, path: str, error: type[pyerofs.ErofsError]
    ) -> None:
        with pytest.raises(error, match=path):
            image.read(path)
        with pytest.raises(error, match=path):
            image.open(path)

    def test_no_link(self, image: Image) -> None:
        with pytest.raises(pyerofs.NotASymlink):
            image.readlink("text")

    @pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1)])
    def test_negative_range(self, image: Image, offset: int, length: int) -> None:
        with pytest.raises(ValueError, match="negative"):
            image.read("text", offset, length)


class TestStat:
    def test_what_the_manifests_do_not_have(self, image: Image) -> None:
        numbers = {image.stat(e).st_ino for e in entries_with_inodes(image)}
        assert len(numbers) == len(golden("plain").entries) - 2  # one file has three names
        status = image.stat("size-4097")
        assert status.st_blksize == 4096
        assert status.st_blocks == 16
        assert status.st_mtime == status.st_mtime_ns / 1e9
        assert status.st_atime_ns == status.st_ctime_ns == status.st_mtime_ns

    def test_compressed_files_count_their_pclusters(self) -> None:
        with open_golden(golden("zstd-C128k")) as image:
            inode = image.lookup("size-65537")
            assert image.stat(inode).st_blocks == inode.blocks * 8 < 65537 // 512


def entries_with_inodes(image: Image) -> list[Inode]:
    return [image.root, *(e.inode for _, a, b in image.walk() for e in a + b)]


class TestOpening:
    def test_a_file_object_stays_open(self) -> None:
        file = io.BytesIO(primary(golden("lz4")))
        with pyerofs.open(file) as image:
            assert len(image.read("text")) == 40425
        assert not file.closed

    def test_a_source_is_closed_with_the_image(self) -> None:
        source = SilentSource(primary(golden("lz4")))
        with pyerofs.open(source) as image:
            assert len(image.read("text")) == 40425
            assert not source.closed
        assert source.closed

    def test_what_is_no_image_is_closed(self) -> None:
        source = SilentSource(bytes(5000))
        with pytest.raises(pyerofs.CorruptImage, match="no EROFS superblock"):
            pyerofs.open(source)
        assert source.closed

    def test_should_a_device_fail_all_are_closed(self, tmp_path: Path) -> None:
        source = SilentSource(primary(golden("blobdev")))
        with pytest.raises(pyerofs.SourceError, match="absent"):
            pyerofs.open(source, devices=[tmp_path / "absent"])
        assert source.closed

    def test_closing_twice_and_reading_afterwards(self) -> None:
        image = open_golden(golden("plain"))
        inode = image.lookup("size-65537")
        image.close()
        image.close()
        with pytest.raises(ValueError, match="closed"):
            image.read(inode)

    def test_at_an_offset(self) -> None:
        want = golden("offset")
        assert want.offset
        with pytest.raises(pyerofs.CorruptImage, match="offset"):
            pyerofs.open(want.image)
        with pytest.raises(pyerofs.SourceError, match="outside"):
            pyerofs.open(want.image, offset=1 << 40)


class TestDevices:
    @pytest.mark.parametrize("name", ["blobdev", "tar-index"])
    def test_without_its_device(self, name: str) -> None:
        want = golden(name)
        with pyerofs.open(want.image) as image:
            assert image.exists("text")
            with pytest.raises(pyerofs.ErofsError, match="--device"):
                image.read("size-65537")

    def test_too_many_devices(self) -> None:
        want = golden("blobdev")
        with pytest.raises(pyerofs.ErofsError, match="1 extra devices, 2 were given"):
            pyerofs.open(want.image, devices=want.devices * 2)

    def test_a_device_that_is_too_short(self) -> None:
        want = golden("blobdev")
        short = MemorySource(want.devices[0].read_bytes()[:8192], name="short")
        with (
            pyerofs.open(want.image, devices=[short]) as image,
            pytest.raises(pyerofs.CorruptImage, match="beyond the end of short"),
        ):
            image.read("size-65537")

    def test_devices_of_any_kind(self) -> None:
        want = golden("blobdev")
        device = io.BytesIO(want.devices[0].read_bytes())
        with pyerofs.open(io.BytesIO(primary(want)), devices=[device]) as image:
            assert differences(want, entries_of(image)) == []

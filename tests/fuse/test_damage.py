"""Images that are damaged, or spoiled once they are mounted: errors, and life goes on."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pyerofs
from pyerofs.format.model import ENCODED
from tests.fuse.mounting import PATIENCE, foreground, is_mounted, mounted
from tests.manifests import IMAGES, differences, entry_at, golden, without_trusted

PAGE = 4096
CORRUPT = {errno.EUCLEAN, errno.EIO}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A copy of a golden image."""
    return copy_of("plain", tmp_path)


def copy_of(name: str, directory: Path) -> Path:
    return Path(shutil.copy(IMAGES / f"{name}.erofs", directory))


def overwrite(image: Path, at: int, data: bytes) -> None:
    """Spoil some bytes.  Those under the superblock's checksum would only prevent mounting."""
    assert at >= PAGE
    with image.open("r+b") as file:
        file.seek(at)
        file.write(data)


def error_of(call: Callable[..., object], *arguments: object) -> int:
    """The number of the error that a call must give."""
    with pytest.raises(OSError) as raised:
        call(*arguments)
    return raised.value.errno or 0


def assert_the_rest_is_good(where: Path, spoiled: str) -> None:
    """All but one path, and what is below it, is as the manifest says."""
    want = golden("plain") if os.geteuid() == 0 else without_trusted(golden("plain"))
    for path in list(want.entries):
        if f"{path}/".startswith(f"{spoiled}/"):
            del want.entries[path]
    found = {path: entry_at(os.path.join(where, path)) for path in want.entries}
    assert differences(want, found) == []


def pages(path: Path) -> list[bytes | int]:
    """What each page of a file reads as: bytes, or the number of an error."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return [page(fd, at) for at in range(0, os.fstat(fd).st_size, PAGE)]
    finally:
        os.close(fd)


def page(fd: int, at: int) -> bytes | int:
    try:
        return os.pread(fd, PAGE, at)
    except OSError as e:
        return e.errno or 0


@pytest.mark.parametrize("name", ["zstd", "zstd-C128k", "extents-zstd", "lzma", "deflate", "lz4"])
def test_spoiled_data(name: str, tmp_path: Path, where: Path) -> None:
    image = copy_of(name, tmp_path)
    with pyerofs.open(image) as opened:
        content = opened.read("text")
        pclusters = [extent for extent in opened.extents("text") if extent.kind == ENCODED]
    spoiled = pclusters[len(pclusters) // 2]
    overwrite(image, spoiled.address, b"\xff" * spoiled.size)
    with mounted(image, where):
        for _ in range(2):  # an error must not be remembered as data
            assert pages(where / "text") == [
                errno.EIO
                if at < spoiled.end and spoiled.start < at + PAGE
                else content[at : at + PAGE]
                for at in range(0, len(content), PAGE)
            ]
        assert error_of((where / "text").read_bytes) == errno.EIO
        want = golden(name).entries
        for path in ("mixed", "noise", "hard-1"):
            assert entry_at(str(where / path)) == want[path]


@contextmanager
def spoiled_inode(image: Path, path: str, where: Path, at: int, data: bytes) -> Iterator[Path]:
    """An image mounted with some bytes of an inode overwritten."""
    with pyerofs.open(image) as opened:
        device, start = opened.volume.inode_position(opened.lookup(path, follow_symlinks=False).nid)
        assert device == 0
    overwrite(image, start + at, data)
    with mounted(image, where):
        yield where / path


def test_an_inode_of_no_type(image: Path, where: Path) -> None:
    name = "xattr-13"
    with spoiled_inode(image, name, where, 4, b"\xff\x0f") as path:
        for _ in range(2):
            assert error_of(os.lstat, path) in CORRUPT
            assert error_of(path.read_bytes) in CORRUPT
            assert name in os.listdir(where)
        assert_the_rest_is_good(where, name)


def test_an_inode_of_no_layout(image: Path, where: Path) -> None:
    with spoiled_inode(image, "xattr-13", where, 0, b"\xff\xff") as path:
        assert error_of(os.lstat, path) in CORRUPT | {errno.EOPNOTSUPP}
        assert_the_rest_is_good(where, "xattr-13")


def test_a_link_that_is_too_long(image: Path, where: Path) -> None:
    with spoiled_inode(image, "link-long", where, 8, b"\0\0\x10\0") as path:
        assert error_of(os.readlink, path) in CORRUPT
        assert error_of(path.read_bytes) in CORRUPT
        assert_the_rest_is_good(where, "link-long")


def test_a_spoiled_directory(image: Path, where: Path) -> None:
    with pyerofs.open(image) as opened:
        (block,) = opened.extents("many")
    overwrite(image, block.address, b"\xff" * 200)
    with mounted(image, where):
        for _ in range(2):
            assert error_of(os.listdir, where / "many") in CORRUPT
            assert error_of(os.lstat, where / "many" / "hard-2") in CORRUPT
        assert (where / "many").is_dir()
        assert_the_rest_is_good(where, "many")


def test_a_name_that_leads_elsewhere(image: Path, where: Path) -> None:
    with pyerofs.open(image) as opened:
        (block,) = opened.extents("deep0/deep1")
    overwrite(image, image.read_bytes().index(b"deep2", block.address), b"../..")
    with mounted(image, where):
        assert error_of(os.listdir, where / "deep0" / "deep1") in CORRUPT
        assert_the_rest_is_good(where, "deep0/deep1")


def test_spoiled_xattrs(image: Path, where: Path) -> None:
    with pyerofs.open(image) as opened:
        inode = opened.lookup("xattr-13")
    shared = image.read_bytes()[inode.xattrs + 4]
    overwrite(image, inode.xattrs + 12 + 4 * shared, b"\xff" * 4)  # the first entry's lengths
    with mounted(image, where):
        for _ in range(2):
            assert error_of(os.listxattr, where / "xattr-13") in CORRUPT
            assert error_of(os.getxattr, where / "xattr-13", "user.num") in CORRUPT
        (where / "xattr-13").read_bytes()
        assert_the_rest_is_good(where, "xattr-13")


def test_an_image_that_shrinks(image: Path, where: Path) -> None:
    with mounted(image, where):
        content = (where / "text").read_bytes()
        os.truncate(image, PAGE)
        assert error_of((where / "mixed").read_bytes) == errno.EIO
        assert (where / "text").read_bytes() == content  # the kernel has it
        assert os.statvfs(where).f_blocks > 0


def test_a_device_that_was_not_given(where: Path) -> None:
    """Mounts, as with the kernel: the image's own data is there."""
    want = golden("tar-index")
    with mounted(want.image, where):
        assert error_of((where / "text").read_bytes) == errno.EIO
        assert entry_at(str(where / "deep0")) == want.entries["deep0"]


def test_an_image_that_is_deleted(image: Path, where: Path) -> None:
    with mounted(image, where):
        image.unlink()
        assert_the_rest_is_good(where, "nothing")


def test_what_the_log_says(image: Path, where: Path) -> None:
    with pyerofs.open(image) as opened:
        (block,) = opened.extents("many")
        nid = opened.lookup("many").nid
    overwrite(image, block.address, b"\xff" * 200)
    with foreground(image, where=where) as process:
        for _ in range(3):
            assert error_of(os.listdir, where / "many") in CORRUPT
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE)
        assert not is_mounted(where)
    assert log.count("\n") == 1  # once is enough
    assert log.startswith("pyerofs-fuse: corrupt image: ")
    assert f"nid {nid}" in log

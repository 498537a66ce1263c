"""What is no EROFS image is called what it is, in one line that says what to do."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

import pyerofs
from tests.cli.conftest import Done, Run
from tests.manifests import golden

CONTENT = golden("nosbcrc").image.read_bytes()


def in_place(*pieces: tuple[int, bytes], size: int = 64 << 10) -> bytes:
    """Zeros with something in them."""
    found = bytearray(size)
    for at, data in pieces:
        found[at : at + len(data)] = data
    return bytes(found)


def ext4() -> bytes:
    """A superblock of 64 blocks of 1 KiB."""
    counts = struct.pack("<6I", 16, 64, 3, 40, 5, 1)
    return in_place((1024, counts), (1080, struct.pack("<H", 0xEF53)))


def squashfs() -> bytes:
    """A superblock of version 4.0, with zlib and blocks of 128 KiB."""
    head = b"hsqs" + struct.pack("<IIII6H", 1, 0, 131072, 0, 1, 17, 0, 1, 4, 0)
    return in_place((0, head))


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("a/name")
        member.size = len(CONTENT)
        archive.addfile(member, io.BytesIO(CONTENT))
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/name", CONTENT)
    return out.getvalue()


def damaged_sparse() -> bytes:
    """The header of an Android sparse image, and nothing sensible behind it."""
    header = struct.pack("<I4H4I", 0xED26FF3A, 1, 0, 28, 12, 4096, 1000, 3, 0)
    return header + b"\x5a" * 5000


def empty_sparse() -> bytes:
    """A sound Android sparse image of zeros."""
    header = struct.pack("<I4H4I", 0xED26FF3A, 1, 0, 28, 12, 4096, 1000, 1, 0)
    return header + struct.pack("<2H2I", 0xCAC3, 0, 1000, 12)


def super_image() -> bytes:
    """The geometry of Android's logical partitions, twice, behind the reserved first block."""
    geometry = struct.pack("<II32sIII", 0x616C4467, 52, bytes(32), 65536, 2, 4096)
    return in_place((4096, geometry), (8192, geometry), size=256 << 10)


SAMPLES: dict[str, tuple[Callable[[], bytes], str, str]] = {
    # what it is, what must be said of it, and what is to be done
    "ext4": (ext4, r"\bext[234]\b", ""),
    "squashfs": (squashfs, "squashfs", ""),
    "gzip": (lambda: gzip.compress(CONTENT), "gzip", "gunzip|gzip -d"),
    "xz": (lambda: lzma.compress(CONTENT, preset=0), r"\bxz\b", "unxz|xz -d"),
    "zstd": (lambda: zstandard.compress(CONTENT), "zstd|zstandard", "unzstd|zstd -d"),
    "bzip2": (lambda: bz2.compress(CONTENT), "bzip2", r"bunzip2|bzip2 -d"),
    "damaged sparse": (damaged_sparse, "sparse", ""),
    "empty sparse": (empty_sparse, "no EROFS|not EROFS|zeros", ""),
    "tar": (tar, r"\btar\b", ""),
    "zip": (zipped, r"\bzip\b", ""),
    "super": (super_image, r"\bsuper\b|logical partitions", ""),
    "ELF": (lambda: Path(sys.executable).resolve().read_bytes()[:65536], r"\belf\b", ""),
    "empty": (lambda: b"", r"\bempty\b", ""),
    "zeros": (lambda: bytes(1 << 20), r"\bzeros?\b", ""),
    "few zeros": (lambda: bytes(100), r"\bzeros?\b|too short", ""),
    "text": (lambda: b"hello\n" * 1000, "no EROFS|not EROFS|not an EROFS", ""),
}

each_sample = pytest.mark.parametrize("sample", SAMPLES)


def one_line(done: Done, path: Path) -> str:
    """What a command that has failed says of a file, without the file's name."""
    assert (done.status, done.out) == (1, b"")
    assert done.err.startswith("pyerofs: ")
    assert done.err.count("\n") == 1
    assert str(path) in done.err
    return done.err.replace(str(path), "").removeprefix("pyerofs: ")


@pytest.mark.parametrize("verb", ["info", "check"])
@each_sample
def test_it_is_called_what_it_is(run: Run, tmp_path: Path, sample: str, verb: str) -> None:
    build, name, advice = SAMPLES[sample]
    path = tmp_path / "it"
    path.write_bytes(build())
    said = one_line(run(verb, path), path)
    assert re.search(name, said, re.IGNORECASE), said
    assert re.search(advice, said), said


@each_sample
def test_it_may_be_called_what_it_likes(run: Run, tmp_path: Path, sample: str) -> None:
    """The name is not what tells."""
    build, name, _ = SAMPLES[sample]
    path = tmp_path / "system.erofs"
    path.write_bytes(build())
    said = one_line(run("info", path), path)
    assert re.search(name, said, re.IGNORECASE), said


@each_sample
def test_the_library_says_so_too(tmp_path: Path, sample: str) -> None:
    build, name, _ = SAMPLES[sample]
    path = tmp_path / "it"
    path.write_bytes(build())
    with pytest.raises(pyerofs.ErofsError) as found:
        pyerofs.open(path)
    said = str(found.value).replace(str(path), "")
    assert re.search(name, said, re.IGNORECASE), said
    assert "\n" not in said
    with pytest.raises(pyerofs.ErofsError):
        pyerofs.open(io.BytesIO(build()))


@each_sample
def test_any_beginning_of_it_is_refused_in_one_line(run: Run, tmp_path: Path, sample: str) -> None:
    data = SAMPLES[sample][0]()
    path = tmp_path / "it"
    lengths = [1, 2, 3, 4, 5, 6, 7, 12, 27, 28, 29, 40, 257, 262, 264, 512, 1023, 1024, 1027, 1028]
    lengths += [1080, 1081, 1082, 1151, 1152, 1153, 4096, 4099, 4100, 4101]
    for length in lengths:
        path.write_bytes(data[:length])
        one_line(run("info", path), path)


@each_sample
def test_something_else_behind_an_offset(run: Run, tmp_path: Path, sample: str) -> None:
    """It is what lies there that counts."""
    build, name, _ = SAMPLES[sample]
    path = tmp_path / "it"
    path.write_bytes(b"\x5a" * 8192 + build())
    done = run("info", path, "--offset", 8192)
    said = one_line(done, path)
    if sample not in ("damaged sparse", "empty sparse"):
        assert re.search(name, said, re.IGNORECASE), said


@pytest.mark.parametrize("sample", ["gzip", "xz", "zstd", "bzip2", "zip", "ELF", "squashfs"])
def test_an_image_is_an_image_whatever_its_boot_area_looks_like(
    run: Run, tmp_path: Path, sample: str
) -> None:
    path = tmp_path / "it"
    head = SAMPLES[sample][0]()[:1024].ljust(1024, b"\0")
    path.write_bytes(head + CONTENT[1024:])
    done = run("ls", path)
    assert (done.status, done.err) == (0, "")
    assert done.out == run("ls", golden("nosbcrc").image).out


def test_an_image_with_a_tar_header_before_it(run: Run, tmp_path: Path) -> None:
    """In the boot area, too; and it may come from a tar by its offset."""
    path = tmp_path / "it"
    path.write_bytes(tar()[:1024] + CONTENT[1024:])
    assert run("ls", path).status == 0
    path.write_bytes(tar())
    done = run("ls", path, "--offset", 512)
    assert (done.status, done.err) == (0, "")


def test_a_damaged_superblock_is_still_corruption(run: Run, tmp_path: Path) -> None:
    """With the right magic number it is an image, whatever else it might be."""
    data = bytearray(golden("plain").image.read_bytes())
    data[1100] ^= 1
    data[:4] = b"hsqs"
    path = tmp_path / "it"
    path.write_bytes(data)
    said = one_line(run("info", path), path)
    assert "corrupt image: superblock checksum" in said
    assert "squashfs" not in said

"""What images can make the command take: memory grows neither with what a small image repeats, nor
with the square of a tree's depth, and all that it does ends."""

from __future__ import annotations

import os
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyerofs.format import ondisk
from tests import handmade as hm
from tests import hostile
from tests.hostile import BLOCK, DIR, FILE, Entry, Layout, bounded

MANY = 5000  # inodes that a superblock claims, so that processes do the work
DEEP = 4000  # levels of 255 bytes: a path of a million
COMMANDS = {
    "info": ["info"],
    "info as JSON": ["info", "--json"],
    "ls": ["ls", "d"],
    "ls of all": ["ls", "-R"],
    "ls in long": ["ls", "-lR"],
    "ls as JSON": ["ls", "--json", "d"],
    "tree": ["tree"],
    "check": ["check", "-q"],
    "check as JSON": ["check", "--json"],
    "check of metadata": ["check", "--metadata"],
    "dump": ["dump"],
    "dump as JSON": ["dump", "--json"],
    "tar": ["tar", "-o", "{}/out.tar"],
    "extract": ["extract", "-q", "-C", "{}/out"],
}

each_command = pytest.mark.parametrize("command", COMMANDS)


@pytest.fixture(name="place")
def target(tmp_path: Path) -> Iterator[Path]:
    """A directory from which trees of any depth are removed in the end."""
    yield tmp_path
    hostile.remove(tmp_path / "out")


def words(command: str, place: Path, image: Path) -> list[str]:
    """The words of a command for an image; what it writes goes to a place."""
    verb, *rest = (word.replace("{}", str(place)) for word in COMMANDS[command])
    return [verb, str(image), *rest]


def image_at(place: Path, image: bytes) -> Path:
    path = place / "image"
    path.write_bytes(image)
    return path


# --- much of the same -------------------------------------------------------------------------


@each_command
def test_a_directory_of_one_block_many_times(place: Path, command: str) -> None:
    image = hostile.one_block_often()
    assert len(image) < 110_000
    done = bounded(place, *words(command, place, image_at(place, image)))
    assert done.status == 1
    if command.startswith("check"):
        assert b"/d" in done.out
        assert b"problems" in done.out
    else:
        assert "corrupt" in done.err
    assert len(done.out) + len(done.err) < 4 << 20


def test_a_path_into_a_directory_of_one_block_many_times(place: Path) -> None:
    """Looking a name up reads few blocks, and is no reason to complain."""
    image = image_at(place, hostile.one_block_often())
    assert bounded(place, "cat", image, "d/aa").out == b"x"
    done = bounded(place, "cat", image, "d/zz")
    assert done.status == 1
    assert "no such file" in done.err


def test_a_directory_of_one_block_many_times_is_extracted_as_far_as_it_makes_sense(
    place: Path,
) -> None:
    done = bounded(place, "extract", "-q", image_at(place, hostile.one_block_often()), "-C",
                   place / "out")  # fmt: skip
    assert done.status == 1
    assert len(os.listdir(place / "out" / "d")) == 292


@each_command
def test_a_directory_that_is_one_hole(place: Path, command: str) -> None:
    """Of as many bytes as an inode can claim."""
    layout = Layout()
    record = hm.plain((1 << 63) - 1, 0xFFFFFFFF, high=0xFFFF, mode=hm.DIRECTORY, extended=True)
    image = layout.image({b"d": (layout.inode(record), DIR)})
    done = bounded(place, *words(command, place, image_at(place, image)))
    assert done.status == 1
    assert len(done.out) < 1 << 20


def large_directory(names: int, files: int, *, compressed: bool) -> bytes:
    """An image whose directory ``d`` has so many names of so many files, in order."""
    layout = Layout()
    file = hostile.with_links(hm.inline(b"content", extended=True), names // files)
    nids = [layout.inode(file) for _ in range(files)]
    entries: list[Entry] = [(b"%06d" % i, nids[i % files], FILE) for i in range(names)]
    if not compressed:
        return layout.image({b"d": (layout.directory(entries), DIR)}, inos=files)

    def record(size: int, stream: bytes, block: int) -> bytes:
        word = hm.plen(len(stream), ondisk.ALG_DEFLATE)
        found = hm.extents(size, 16, [(0, word, block * BLOCK)])
        return hostile.with_links(hostile.with_mode(found, hm.DIRECTORY), 2)

    here = layout.inode(record(0, b"", 0))  # it holds its own nid, compressed
    content = hostile.in_order([(b".", here, DIR), (b"..", hostile.ROOT, DIR), *entries])
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = encoder.compress(content) + encoder.flush()
    stream = stream.rjust(-(-len(stream) // BLOCK) * BLOCK, b"\0")
    block = layout.blocks(stream)
    layout.change(here, lambda _: record(len(content), stream, block))
    return layout.image(
        {b"d": (here, DIR)},
        incompat=ondisk.INCOMPAT_48BIT | ondisk.INCOMPAT_LZ4_0PADDING,
        configs={ondisk.ALG_DEFLATE: ondisk.DEFLATE_CFGS.pack(15)},
        inos=files,
    )


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_a_large_directory_is_listed(place: Path, compressed: bool) -> None:
    image = image_at(place, large_directory(100_000, 20, compressed=compressed))
    done = bounded(place, "ls", image, "d")
    assert (done.status, done.err) == (0, "")
    assert done.out == b"".join(b"%06d\n" % i for i in range(100_000))


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_a_large_directory_is_sound(place: Path, compressed: bool) -> None:
    image = image_at(place, large_directory(100_000, 20, compressed=compressed))
    done = bounded(place, "check", "-q", image)
    assert done.lines == ["22 inodes, 140 bytes of file data, no problems"]
    assert (done.status, done.err) == (0, "")


def test_a_large_directory_is_extracted(place: Path) -> None:
    image = image_at(place, large_directory(100_000, 20, compressed=True))
    done = bounded(place, "extract", "-q", image, "-C", place / "out")
    assert (done.status, done.err) == (0, "")
    names = os.listdir(place / "out" / "d")
    assert sorted(names) == [f"{i:06}" for i in range(100_000)]
    for i in (0, 19, 99_999):
        path = place / "out" / "d" / f"{i:06}"
        assert path.read_bytes() == b"content"
        assert path.stat().st_nlink == 5000


def test_a_large_directory_is_put_into_a_tar(place: Path) -> None:
    image = image_at(place, large_directory(20_000, 20, compressed=True))
    done = bounded(place, "tar", image, "-o", place / "out.tar")
    assert (done.status, done.err) == (0, "")
    with tarfile.open(place / "out.tar") as archive:
        names = archive.getnames()
    assert names == [".", "./d", *(f"./d/{i:06}" for i in range(20_000))]


# --- deep trees -------------------------------------------------------------------------------

LONG = b"n" * hostile.NAME


def assert_extracted(out: Path, levels: int, *, files: bool = True) -> None:
    """A tree of ``hostile.deep`` is there."""
    first, *between, last = hostile.descend(out, LONG)
    some = [b"f"] if files else []
    assert first == [LONG]
    assert len(between) == levels - 1
    assert all(names == [*some, LONG] for names in between)
    assert last == [*some, b"z"]


@pytest.mark.parametrize("inos", [1, MANY], ids=["threads", "processes"])
def test_a_tree_of_600_levels_is_extracted(place: Path, inos: int) -> None:
    image = image_at(place, hostile.deep(600, inos=inos))
    done = bounded(place, "extract", "-q", image, "-C", place / "out")
    assert (done.status, done.out, done.err) == (0, b"", "")
    assert_extracted(place / "out", 600)


@pytest.mark.parametrize("inos", [1, MANY], ids=["threads", "processes"])
def test_a_tree_of_600_levels_is_sound(place: Path, inos: int) -> None:
    image = image_at(place, hostile.deep(600, inos=inos))
    done = bounded(place, "check", "-q", image)
    assert done.lines == ["1202 inodes, 0 bytes of file data, no problems"]
    assert (done.status, done.err) == (0, "")


def test_a_tree_of_600_levels_is_extracted_over_itself(place: Path) -> None:
    image = image_at(place, hostile.deep(600, inos=MANY))
    for _ in range(2):
        done = bounded(place, "extract", "-q", "--overwrite", image, "-C", place / "out")
        assert (done.status, done.out, done.err) == (0, b"", "")
    assert_extracted(place / "out", 600)


@pytest.mark.parametrize("inos", [1, MANY], ids=["threads", "processes"])
@pytest.mark.parametrize("files", [False, True], ids=["directories", "files"])
def test_a_very_deep_tree_is_extracted(place: Path, files: bool, inos: int) -> None:
    image = image_at(place, hostile.deep(DEEP, files=files, inos=inos))
    done = bounded(place, "extract", "-q", image, "-C", place / "out")
    assert (done.status, done.out, done.err) == (0, b"", "")
    assert_extracted(place / "out", DEEP, files=files)


def test_attributes_and_times_of_a_very_deep_tree(place: Path) -> None:
    """Directories get theirs in the end, when all that is in them has been made."""
    image = image_at(place, hostile.deep(1000, inos=MANY))
    done = bounded(place, "extract", "-q", image, "-C", place / "out")
    assert (done.status, done.out, done.err) == (0, b"", "")
    fd = os.open(place / "out", os.O_RDONLY)
    try:
        for _ in range(1000):
            deeper = os.open(LONG, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = deeper
            for status in (os.fstat(fd), os.stat("f", dir_fd=fd)):
                assert status.st_mtime_ns == (hm.EPOCH - 1) * 10**9 + 5
                expected = 0o755 if stat.S_ISDIR(status.st_mode) else 0o644
                assert stat.S_IMODE(status.st_mode) == expected
    finally:
        os.close(fd)


def hard_links(levels: int) -> bytes:
    """A tree of ``hostile.deep`` where all its files are one."""
    layout = Layout()
    file = hostile.with_links(hm.inline(b"one", extended=True), levels)
    nid = layout.inode(file)
    here = layout.directory([(b"f", nid, FILE)])
    for _ in range(levels - 1):
        below, here = here, layout.directory([(b"f", nid, FILE), (LONG, here, DIR)])
        layout.have_parent(below, here)
    return layout.image({LONG: (here, DIR)}, inos=MANY)


@pytest.mark.parametrize("levels", [600, 2000])
def test_links_between_the_levels_of_a_deep_tree(place: Path, levels: int) -> None:
    image = image_at(place, hard_links(levels))
    done = bounded(place, "check", "-q", image)
    assert done.lines == [f"{levels + 2} inodes, 3 bytes of file data, no problems"]
    done = bounded(place, "extract", "-q", image, "-C", place / "out")
    assert (done.status, done.out, done.err) == (0, b"", "")
    found = hostile.descend(place / "out", LONG)
    assert found == [[LONG], *[[b"f", LONG]] * (levels - 1), [b"f"]]
    assert os.stat(place / "out" / os.fsdecode(LONG) / "f").st_nlink == levels


@pytest.mark.parametrize("levels", [600, DEEP])
def test_a_very_deep_tree_is_checked(place: Path, levels: int) -> None:
    done = bounded(place, "check", "-q", image_at(place, hostile.deep(levels, inos=MANY)))
    assert done.lines == [f"{2 * levels + 2} inodes, 0 bytes of file data, no problems"]
    assert (done.status, done.err) == (0, "")


@pytest.mark.parametrize("command", ["check", "check as JSON"])
def test_a_problem_on_each_level_of_a_very_deep_tree(place: Path, command: str) -> None:
    image = image_at(place, hostile.deep(DEEP, nlink=2, inos=MANY))
    done = bounded(place, *words(command, place, image), output=False)
    assert done.status == 1


def test_an_error_on_each_level_of_a_very_deep_tree(place: Path) -> None:
    """A file where each file is to be: messages have paths, and nothing is kept of them."""
    image = image_at(place, hostile.deep(600, inos=MANY))
    bounded(place, "extract", "-q", image, "-C", place / "out")
    done = bounded(place, "extract", "-q", image, "-C", place / "out")
    assert done.status == 1
    assert done.err.endswith("pyerofs: 601 files could not be extracted\n")
    assert_extracted(place / "out", 600)


@pytest.mark.parametrize(
    "command", ["info", "dump", "ls of all", "tar to nowhere", "tree to level 5"]
)
def test_a_very_deep_tree_in_little_memory(place: Path, command: str) -> None:
    """What prints paths prints gigabytes of them: that is seen by nobody here."""
    image = image_at(place, hostile.deep(DEEP))
    special: dict[str, list[object]] = {
        "tar to nowhere": ["tar", image, "-o", os.devnull],
        "tree to level 5": ["tree", image, "-L", 5],
    }
    what = special.get(command) or words(command, place, image)
    done = bounded(place, *what, output=False)
    assert done.status in (0, 1)
    assert done.err.count("\n") <= 2


def test_a_part_of_a_very_deep_tree(place: Path) -> None:
    image = image_at(place, hostile.deep(1000))
    done = bounded(place, "extract", "-q", image, "/".join([os.fsdecode(LONG)] * 10), "-C",
                   place / "out")  # fmt: skip
    assert (done.status, done.out, done.err) == (0, b"", "")
    assert len(hostile.descend(place / "out", LONG)) == 1001


# --- tables that overlap ----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["dump", "dump as JSON"])
def test_a_dump_of_overlapping_chunk_tables_ends(place: Path, command: str) -> None:
    image = hostile.overlapping()
    assert len(image) < 730_000
    done = bounded(place, *words(command, place, image_at(place, image)), output=False)
    assert done.status in (0, 1)
    assert "MemoryError" not in done.err
    assert done.err.count("\n") <= 2


@pytest.mark.parametrize("command", ["info", "ls", "ls of all", "ls in long", "ls as JSON", "tree"])
def test_overlapping_chunk_tables_are_of_no_interest_to_others(place: Path, command: str) -> None:
    image = image_at(place, hostile.overlapping())
    done = bounded(place, *words(command, place, image))
    assert (done.status, done.err) == (0, "")


def test_a_dump_of_honest_chunk_tables_is_complete(place: Path) -> None:
    """Many chunks, but no more than the image has bytes to describe them."""
    layout = Layout()
    data = layout.blocks(hm.noise(64 * BLOCK))
    tables = [[data + (7 * i + j) % 64 for i in range(2000)] for j in range(3)]
    files = {
        b"f%d" % j: (layout.inode(hostile.block_map(2000 * BLOCK, table)), FILE)
        for j, table in enumerate(tables)
    }
    image = layout.image(files, incompat=ondisk.INCOMPAT_CHUNKED_FILE)
    done = bounded(place, "dump", image_at(place, image))
    assert (done.status, done.err) == (0, "")
    assert sum(" chunk table " in line for line in done.lines) >= 3
    assert sum(" data " in line for line in done.lines) == 64


def test_a_dump_of_an_image_with_terabytes_of_nothing_behind_it_ends(place: Path) -> None:
    """A file of some KiB and a hole: nobody reads all the zeros."""
    image = image_at(place, hostile.deep(2))
    try:
        os.truncate(image, 8 << 40)
    except OSError:
        pytest.skip("no file can be that large here")
    done = bounded(place, "dump", image)
    assert (done.status, done.err) == (0, "")
    (line,) = [words for words in map(str.split, done.lines) if words[1:] and words[-1] == "padding"
               and words[0].startswith("0x")
               and int(words[0], 16) + int(words[1]) == 8 << 40]  # fmt: skip
    assert int(line[1]) > 7 << 40


Builder = Callable[[], bytes]


def one_byte_names() -> bytes:
    """A chain of directories that lead to two others each, both to the same."""
    layout = Layout()
    here = layout.directory([])
    for _ in range(64):
        here = layout.directory([(b"a", here, DIR), (b"b", here, DIR)])
    return layout.image({b"d": (here, DIR)})


@each_command
@pytest.mark.parametrize("build", [one_byte_names], ids=lambda build: build.__name__)
def test_directories_that_share_all_that_is_in_them(
    place: Path, command: str, build: Builder
) -> None:
    """2 to the power of 64 paths."""
    done = bounded(place, *words(command, place, image_at(place, build())))
    if command not in ("ls", "ls as JSON"):
        assert done.status == 1
        assert "reached twice" in done.err + done.out.decode()

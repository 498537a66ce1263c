"""fsspec's own tests of file systems, on ours, and paths that begin with a slash or a protocol: to
fsspec's users these are the same as without."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from hashlib import md5
from pathlib import Path
from typing import Any, TypeAlias

import pytest

fsspec = pytest.importorskip("fsspec")

from fsspec.tests.abstract import AbstractFixtures, AbstractGetTests  # noqa: E402  after that

from pyerofs.format import ondisk  # noqa: E402
from pyerofs.fsspec import ErofsFileSystem  # noqa: E402
from tests import handmade as hm  # noqa: E402

Tree: TypeAlias = Mapping[str, "bytes | Tree"]

BLOCK = 4096
FIRST = 16  # the block where inodes begin, each in one of its own

NESTED: Tree = {
    "subfile1": b"", "subfile2": b"", "nesteddir": {"nestedfile": b""},
}  # fmt: skip
# what the fixtures of the suite would make, each in a directory of its own
SCENARIOS: Tree = {
    "bulk": {"source": {"file1": b"", "file2": b"", "subdir": NESTED}},
    "globs": {"source": {"file1": b"", "file2": b"", "subdir0": NESTED, "subdir1": NESTED}},
    "prefix": {"source": {"subdir.txt": b"", "subdir": {"subfile.txt": b""}}},
    "hashed": {
        "source": {f"{md5(str(n).encode()).hexdigest()}.txt": str(n).encode() for n in range(10)}
    },
    "src": {"file": b""},
}
INIT = {"one.rc": b"one\n", "two.rc": b"two, which is longer\n", "three.txt": b"3\n"}
SOME: Tree = {
    "etc": {
        "init": INIT,
        "empty": {},
        "name with blanks": b"?\n",
    },
    "top.rc": b"top\n",
}
IMAGES: dict[str, Tree] = {"scenarios": {"top": SCENARIOS}, "some": SOME}


def build(tree: Tree) -> bytes:
    """An image of a tree of small files."""
    inodes: list[bytes] = []

    def reserve() -> tuple[int, int]:
        """The place of an inode, and its nid."""
        inodes.append(b"")
        at = len(inodes) - 1
        return at, ((FIRST + at) * BLOCK - hm.METADATA) // 32

    def place(what: bytes | Tree, parent: int | None) -> tuple[int, int]:
        """The nid and the type of something that is put into the image."""
        at, nid = reserve()
        if isinstance(what, bytes):
            inodes[at] = hm.inline(what)
            return nid, ondisk.FT_REG_FILE
        above = nid if parent is None else parent
        entries = {b".": (nid, ondisk.FT_DIR), b"..": (above, ondisk.FT_DIR)}
        entries |= {os.fsencode(name): place(inner, nid) for name, inner in what.items()}
        inodes[at] = hm.inline(hm.directory(entries, BLOCK), mode=hm.DIRECTORY, nlink=2)
        return nid, ondisk.FT_DIR

    top = {os.fsencode(name): place(what, None) for name, what in tree.items()}
    data = {FIRST + at: inode.ljust(BLOCK, b"\0") for at, inode in enumerate(inodes)}
    pieces = hm.build({}, data, elsewhere=top)
    return hm.Sparse(pieces).read_at(0, hm.end_of(pieces))


class Made(ErofsFileSystem):
    """Lets the suite's fixtures make what is there already, and remove it in words only."""

    protocol = "made"

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        assert self.isdir(path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        assert self.isdir(path)

    def touch(self, path: str, truncate: bool = True, **kwargs: Any) -> None:
        assert self.isfile(path)
        assert self.size(path) == 0

    def pipe(self, path: str, value: bytes | None = None, **kwargs: Any) -> None:
        assert self.cat_file(path) == value

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        assert self.exists(path)


@pytest.fixture(scope="module", name="images")
def make_images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("images")
    for name, tree in IMAGES.items():
        (top / name).write_bytes(build(tree))
    return {name: top / name for name in IMAGES}


# --- fsspec's tests -------------------------------------------------------------------------


class Fixtures(AbstractFixtures):  # type: ignore[misc]
    """The suite's scenarios, in an image."""

    @pytest.fixture
    def fs(self, images: dict[str, Path]) -> Iterator[ErofsFileSystem]:
        fs = Made(fo=str(images["scenarios"]))
        yield fs
        fs.close()

    @pytest.fixture(params=["top", "/top", "made://top", "made:///top"])
    def fs_path(self, request: pytest.FixtureRequest) -> str:
        """Not the root itself: fsspec takes a directory there for its content (``other_paths``) in all
        file systems whose paths begin with a name."""
        return str(request.param)

    @pytest.fixture
    def fs_join(self) -> Callable[..., str]:
        return lambda *parts: os.path.join(*parts)

    def _bulk_operations_scenario_0(self, some_fs: Any, some_join: Any, some_path: Any) -> str:
        where = some_join(some_path, "bulk")
        return str(super()._bulk_operations_scenario_0(some_fs, some_join, where))

    def _glob_edge_cases_files(self, some_fs: Any, some_join: Any, some_path: Any) -> str:
        where = some_join(some_path, "globs")
        return str(super()._glob_edge_cases_files(some_fs, some_join, where))

    def _dir_and_file_with_same_name_prefix(
        self, some_fs: Any, some_join: Any, some_path: Any
    ) -> str:
        where = some_join(some_path, "prefix")
        return str(super()._dir_and_file_with_same_name_prefix(some_fs, some_join, where))

    def _10_files_with_hashed_names(self, some_fs: Any, some_join: Any, some_path: Any) -> str:
        where = some_join(some_path, "hashed")
        return str(super()._10_files_with_hashed_names(some_fs, some_join, where))


class TestGet(Fixtures, AbstractGetTests):  # type: ignore[misc]
    """All of fsspec's tests that only read; those of open, pipe, put and copy begin by writing."""


# --- a slash, or a protocol, before a path --------------------------------------------------


@pytest.fixture(name="fs")
def open_some(images: dict[str, Path]) -> Iterator[ErofsFileSystem]:
    fs = fsspec.filesystem("erofs", fo=str(images["some"]))
    yield fs
    fs.close()


def opened(fs: ErofsFileSystem, path: str) -> bytes:
    with fs.open(path) as file:
        found: bytes = file.read()
    return found


# each gives something of a file, of a directory or of a pattern
OF_A_FILE: dict[str, Callable[[ErofsFileSystem, str], Any]] = {
    "cat": lambda fs, path: fs.cat(path),
    "cat_file": lambda fs, path: fs.cat_file(path),
    "cat_file of a range": lambda fs, path: fs.cat_file(path, 1, 3),
    "cat_ranges": lambda fs, path: fs.cat_ranges([path, path], [0, 1], [2, 3]),
    "checksum": lambda fs, path: fs.checksum(path),
    "du": lambda fs, path: fs.du(path),
    "exists": lambda fs, path: fs.exists(path),
    "expand_path": lambda fs, path: fs.expand_path(path),
    "find": lambda fs, path: fs.find(path),
    "glob": lambda fs, path: fs.glob(path),
    "head": lambda fs, path: fs.head(path, 2),
    "info": lambda fs, path: fs.info(path),
    "isdir": lambda fs, path: fs.isdir(path),
    "isfile": lambda fs, path: fs.isfile(path),
    "ls": lambda fs, path: fs.ls(path),
    "ls of names": lambda fs, path: fs.ls(path, detail=False),
    "open": opened,
    "read_block": lambda fs, path: fs.read_block(path, 0, 2),
    "read_text": lambda fs, path: fs.read_text(path),
    "size": lambda fs, path: fs.size(path),
    "tail": lambda fs, path: fs.tail(path, 2),
    "ukey": lambda fs, path: fs.info(path)["ino"],
}
OF_A_DIRECTORY: dict[str, Callable[[ErofsFileSystem, str], Any]] = {
    "du": lambda fs, path: fs.du(path),
    "du of each": lambda fs, path: fs.du(path, total=False),
    "du with directories": lambda fs, path: fs.du(path, withdirs=True),
    "exists": lambda fs, path: fs.exists(path),
    "expand_path": lambda fs, path: fs.expand_path(path, recursive=True),
    "find": lambda fs, path: fs.find(path),
    "find with directories": lambda fs, path: fs.find(path, withdirs=True, detail=True),
    "find, one level": lambda fs, path: fs.find(path, maxdepth=1),
    "glob": lambda fs, path: fs.glob(path),
    "info": lambda fs, path: fs.info(path),
    "isdir": lambda fs, path: fs.isdir(path),
    "isfile": lambda fs, path: fs.isfile(path),
    "ls": lambda fs, path: fs.ls(path),
    "ls of names": lambda fs, path: fs.ls(path, detail=False),
    "mapper": lambda fs, path: {key: bytes(value) for key, value in fs.get_mapper(path).items()},
    "tree": lambda fs, path: [x for x in fs.tree(path).splitlines() if x[0] in "├└│ "],
    "walk": lambda fs, path: list(fs.walk(path)),
    "walk in detail": lambda fs, path: list(fs.walk(path, detail=True)),
    "walk upwards": lambda fs, path: list(fs.walk(path, topdown=False)),
}
before = pytest.mark.parametrize("before", ["/", "erofs://", "erofs:///"])


@before
@pytest.mark.parametrize("path", ["top.rc", "etc/init/two.rc"])
@pytest.mark.parametrize("what", OF_A_FILE)
def test_files_are_the_same(fs: ErofsFileSystem, what: str, path: str, before: str) -> None:
    found = OF_A_FILE[what](fs, path)
    assert found is not None
    assert OF_A_FILE[what](fs, before + path) == found


@before
@pytest.mark.parametrize("path", ["", "etc", "etc/init", "etc/empty", "etc/init/", "etc/"])
@pytest.mark.parametrize("what", OF_A_DIRECTORY)
def test_directories_are_the_same(fs: ErofsFileSystem, what: str, path: str, before: str) -> None:
    found = OF_A_DIRECTORY[what](fs, path)
    assert found is not None
    assert OF_A_DIRECTORY[what](fs, before + path) == found


@before
@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("etc/init/*.rc", ["etc/init/one.rc", "etc/init/two.rc"]),
        ("*.rc", ["top.rc"]),
        ("*", ["etc", "top.rc"]),
        ("etc/*/", ["etc/empty", "etc/init"]),
        ("**/*.rc", ["etc/init/one.rc", "etc/init/two.rc", "top.rc"]),
        ("etc/**/o*", ["etc/init/one.rc"]),
        ("*/init/t???.rc", []),
        ("*/init/t?o.rc", ["etc/init/two.rc"]),
        ("etc/init/t{wo.rc,hree.txt}", []),
        ("none/*", []),
    ],
)
def test_globbing(fs: ErofsFileSystem, pattern: str, names: list[str], before: str) -> None:
    assert fs.glob(pattern) == names
    assert fs.glob(before + pattern) == names
    assert fs.glob(before + pattern, detail=True) == {name: fs.info(name) for name in names}
    if names:
        if not pattern.endswith("/"):  # which this ignores in all file systems
            assert sorted(fs.expand_path(before + pattern)) == names
        files = {name: fs.cat_file(name) for name in names if fs.isfile(name)}
        if len(files) == len(names):
            assert fs.cat(before + pattern) == files


@before
@pytest.mark.parametrize("path", ["", "etc", "etc/init", "etc/init/"])
def test_reading_a_whole_directory(fs: ErofsFileSystem, path: str, before: str) -> None:
    found = fs.cat(path, recursive=True, on_error="omit")
    assert found["etc/init/one.rc"] == b"one\n"
    assert fs.cat(before + path, recursive=True, on_error="omit") == found


@before
@pytest.mark.parametrize("end", ["", "/"])
def test_copying_a_directory(fs: ErofsFileSystem, before: str, end: str, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    fs.get(f"{before}etc/init{end}", str(target), recursive=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == INIT


@before
def test_copying_everything(fs: ErofsFileSystem, before: str, tmp_path: Path) -> None:
    fs.get(before, str(tmp_path / "copy"), recursive=True)
    found = {
        str(path.relative_to(tmp_path / "copy")): path.read_bytes()
        for path in (tmp_path / "copy").rglob("*")
        if path.is_file()
    }
    assert found == {name: fs.cat_file(name) for name in fs.find("")}


@before
def test_copying_a_file(fs: ErofsFileSystem, before: str, tmp_path: Path) -> None:
    fs.get(f"{before}etc/init/one.rc", str(tmp_path / "one"))
    fs.get_file(f"{before}etc/init/one.rc", str(tmp_path / "two"))
    fs.get(f"{before}etc/init/*.rc", f"{tmp_path}/several/")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == b"one\n"
    assert sorted(os.listdir(tmp_path / "several")) == ["one.rc", "two.rc"]


@pytest.mark.parametrize("url", ["erofs://etc/init/*.rc", "erofs:///etc/init/*.rc"])
def test_opening_by_url(images: dict[str, Path], url: str) -> None:
    files = fsspec.open_files(url, fo=str(images["some"]))
    assert [file.path for file in files] == ["etc/init/one.rc", "etc/init/two.rc"]
    with files as opened:
        assert [file.read() for file in opened] == [b"one\n", b"two, which is longer\n"]
    with fsspec.open(url.replace("*", "one"), fo=str(images["some"])) as file:
        assert file.read() == b"one\n"


@before
@pytest.mark.parametrize("path", ["none", "etc/none", "top.rc/none", "etc/init/none.rc"])
def test_what_is_not_there(fs: ErofsFileSystem, path: str, before: str) -> None:
    path = before + path
    assert not fs.exists(path)
    assert not fs.isdir(path)
    assert not fs.isfile(path)
    assert fs.find(path) == []
    assert fs.glob(path) == []
    for read in (fs.info, fs.ls, fs.cat_file, fs.open, fs.size):
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            read(path)


# --- what would change it -------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda fs: fs.open("new", "wb"),
        lambda fs: fs.open("top.rc", "ab"),
        lambda fs: fs.pipe_file("new", b"data"),
        lambda fs: fs.pipe({"new": b"data"}),
        lambda fs: fs.put_file(__file__, "new"),
        lambda fs: fs.cp_file("top.rc", "new"),
        lambda fs: fs.rm_file("top.rc"),
        lambda fs: fs.rm("top.rc"),
        lambda fs: fs.mv("top.rc", "new"),
        lambda fs: fs.touch("new"),
        lambda fs: fs.write_text("new", "data"),
    ],
    ids=["open", "append", "pipe_file", "pipe", "put_file", "cp_file", "rm_file", "rm", "mv",
         "touch", "write_text"],
)  # fmt: skip
def test_changes_are_refused(
    fs: ErofsFileSystem, change: Callable[[ErofsFileSystem], object]
) -> None:
    everything = fs.find("", withdirs=True)
    with pytest.raises((ValueError, NotImplementedError, OSError)):
        change(fs)
    assert fs.find("", withdirs=True) == everything

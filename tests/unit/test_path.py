"""pyerofs.Path is to an image what pathlib is to what was extracted from it."""

from __future__ import annotations

import io
import os
import pathlib
import stat
from collections.abc import Callable, Iterator
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

import pytest

import pyerofs
from pyerofs.cli.main import main
from tests import handmade as hm
from tests.helpers import directory, handmade, symlink
from tests.manifests import golden

FILE, DIR, LINK = 1, 2, 7

UNFOLLOWABLE = {"/link-long", "/link-4000"}  # pathlib fails (ENAMETOOLONG) where it meets them


class Twins(NamedTuple):
    """The root of an image and of its extracted copy."""

    ours: pyerofs.Path
    theirs: pathlib.Path

    def below(self, path: str) -> tuple[pyerofs.Path, pathlib.Path]:
        return self.ours / path, self.theirs / path

    def relative(self, path: pathlib.Path) -> str:
        return "/" + os.fspath(path.relative_to(self.theirs)).removeprefix(".")


def linked_image() -> bytes:
    """Links to directories, files, nothing, themselves; names with suffixes."""
    inner = {
        b"a.txt": (2, FILE),
        b"b.tar.gz": (2, FILE),
        b".hidden": (2, FILE),
        b"UPPER.TXT": (2, FILE),
        b"up": (4, LINK),
        b"deeper": (6, DIR),
    }
    return handmade(
        {
            b"file": hm.inline(b"one\ntwo\r\nthree"),  # nid 2
            b"zz-up": symlink(b"."),  # nid 4
            b".deeper": directory(6, {b"c.txt": (2, FILE)}),
            b"dir": directory(8, inner),
            b"to-dir": symlink(b"dir"),
            b"to-file": symlink(b"dir/../to-dir/a.txt"),
            b"dangling": symlink(b"nowhere"),
            b"loop": symlink(b"loop"),
            b"[ab]*?": hm.inline(b"special"),
        },
        hidden=[b".deeper"],
    )


@pytest.fixture(name="twins", scope="module", params=["plain", "linked"])
def extract(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Twins]:
    top = tmp_path_factory.mktemp(request.param)
    source = golden("plain").image if request.param == "plain" else top / "image"
    if request.param == "linked":
        source.write_bytes(linked_image())
    assert main(["extract", str(source), "-C", str(top / "tree"), "-q", "--no-same-owner"]) == 0
    for path in UNFOLLOWABLE:
        (top / f"tree{path}").unlink(missing_ok=True)
    with pyerofs.open(source) as image:
        yield Twins(pyerofs.Path(image), top / "tree")


@pytest.fixture(name="root")
def open_linked() -> Iterator[pyerofs.Path]:
    with pyerofs.open(io.BytesIO(linked_image())) as image:
        yield pyerofs.Path(image)


# --- the path itself --------------------------------------------------------------------------

PATHS = ["/", "/a", "/a/b.txt", "/a/.hidden", "/a/b.tar.gz", "/a b/c d", "/usr/lib64/x.so.1.2"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "attribute", ["name", "stem", "suffix", "parts", "parent", "parents", "__str__"]
)
def test_parts_are_those_of_pathlib(root: pyerofs.Path, path: str, attribute: str) -> None:
    def shown(p: Any) -> object:
        found = getattr(p, attribute)
        if attribute == "parents":
            return [str(x) for x in found]
        return str(found()) if callable(found) else str(found)

    assert shown(pyerofs.Path(root.image, path)) == shown(pathlib.PurePosixPath(path))


@pytest.mark.parametrize(
    ("start", "names"),
    [
        ("/", ["a"]),
        ("/a", ["b", "c"]),
        ("/a", ["b/c"]),
        ("/a", ["/b"]),
        ("/a", ["b", "/c", "d"]),
        ("/a", ["../b"]),
        ("/a", [""]),
        ("/a", ["b/"]),
        ("/a", ["b//c"]),
        ("/a", ["./b/./c"]),
        ("/a", ["."]),
    ],
)
def test_joining_is_that_of_pathlib(root: pyerofs.Path, start: str, names: list[str]) -> None:
    ours = pyerofs.Path(root.image, start).joinpath(*names)
    assert str(ours) == str(pathlib.PurePosixPath(start).joinpath(*names))


@pytest.mark.parametrize("path", ["a", "/a", "a/", "//a", "/a//", "./a", "/a/."])
def test_one_path_has_one_form(root: pyerofs.Path, path: str) -> None:
    assert pyerofs.Path(root.image, path) == root / "a"
    assert len({pyerofs.Path(root.image, path), root / "a"}) == 1


def test_equality_and_order(root: pyerofs.Path) -> None:
    assert root / "a" != root / "b"
    assert root / "a" != "/a"
    assert sorted([root / "b", root / "a/z", root / "a"]) == [root / "a", root / "a/z", root / "b"]
    with pyerofs.open(io.BytesIO(linked_image())) as other:
        assert pyerofs.Path(other) != root
    assert repr(root / "a") == "pyerofs.Path('/a')"


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize(
    "pattern", ["*", "*.txt", "a/*", "/a/*", "b*", "*/*", "/*", ".*", "/a", "B.TXT"]
)
def test_match_is_that_of_pathlib(root: pyerofs.Path, path: str, pattern: str) -> None:
    # to pathlib, the root is one more component that "*" matches
    theirs = pathlib.PurePosixPath(path if pattern.startswith("/") else path[1:])
    assert pyerofs.Path(root.image, path).match(pattern) == theirs.match(pattern)


def test_relative_to(root: pyerofs.Path) -> None:
    assert (root / "a/b").relative_to(root) == "a/b"
    assert (root / "a/b").relative_to(root / "a") == "b"
    assert root.relative_to(root) == "."
    with pytest.raises(ValueError, match="not below"):
        (root / "ab").relative_to(root / "a")


def test_what_importlib_resources_asks_for(root: pyerofs.Path) -> None:
    found: object = root
    assert isinstance(found, Traversable)


# --- compared with pathlib --------------------------------------------------------------------


def everything(twins: Twins) -> list[str]:
    return sorted(twins.relative(path) for path in twins.theirs.rglob("*"))


def test_walking_finds_the_same(twins: Twins) -> None:
    theirs = sorted(
        (twins.relative(pathlib.Path(top)), sorted(a), sorted(b + links))
        for top, a, b, links in real_walk(twins.theirs)
    )
    ours = sorted(
        (str(p), sorted(a), sorted(n for n in b if f"/{n}" not in UNFOLLOWABLE))
        for p, a, b in twins.ours.walk()
    )
    assert ours == theirs
    assert len(theirs) > 2


def real_walk(top: pathlib.Path) -> Iterator[tuple[str, list[str], list[str], list[str]]]:
    """os.walk, which counts links to directories as directories, without that."""
    for path, directories, others in os.walk(top):
        links = [d for d in directories if os.path.islink(f"{path}/{d}")]
        yield path, [d for d in directories if d not in links], others, links


def test_walking_can_be_pruned(twins: Twins) -> None:
    seen = []
    for path, directories, _ in twins.ours.walk():
        seen.append(str(path))
        directories.clear()
    assert seen == ["/"]


QUESTIONS: list[Callable[[Any], object]] = [
    lambda p: p.exists(),
    lambda p: p.is_dir(),
    lambda p: p.is_file(),
    lambda p: p.is_symlink(),
    lambda p: os.fspath(p.readlink()) if p.is_symlink() else None,
    lambda p: p.read_bytes() if p.is_file() else None,
    lambda p: p.lstat().st_mode,
    lambda p: p.lstat().st_mtime_ns,
    lambda p: p.stat().st_size if p.is_file() else None,
    lambda p: sorted({f"/{q.name}" for q in p.iterdir()} - UNFOLLOWABLE) if p.is_dir() else None,
]


@pytest.mark.parametrize("number", range(len(QUESTIONS)))
def test_each_path_answers_the_same(twins: Twins, number: int) -> None:
    ask = QUESTIONS[number]
    for path in everything(twins):
        ours, theirs = twins.below(path[1:])
        assert ask(ours) == ask(theirs), path


@pytest.mark.parametrize("path", ["missing", "text/x", "dir/missing", "file/x"])
def test_what_is_not_there(twins: Twins, path: str) -> None:
    ours, theirs = twins.below(path)
    for ask in QUESTIONS[:4]:
        assert ask(ours) is ask(theirs) is False
    for ask in (lambda p: p.stat(), lambda p: p.read_bytes()):
        with pytest.raises(OSError) as expected:
            ask(theirs)
        with pytest.raises(type(expected.value)) as found:
            ask(ours)
        assert found.value.errno == expected.value.errno


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "**/*",
        "*/*",
        "*/*/*",
        "many/entry-00[12]*",
        "*/hard-?",
        "deep0/**/bottom",
        "**/deep?",
        "**/deep1/*",
        "many",
        "missing",
        "missing/*",
        "text/*",
        "size-4*",
        "latin*",
        "dir/*.txt",
        "**/*.txt",
        "**/*.TXT",
        "[[]ab[]][*][?]",
        "to-*/*",
        "to-dir/**/*.txt",
        "*/deeper/*",
        "**/up/*",
        ".*",
        "*/.*",
        "dir/[!a]*",
        "dir/deeper/../a.txt",
        "loop/*",
        "./dir/./a*",
    ],
)
def test_glob(twins: Twins, pattern: str) -> None:
    for ours, theirs in (
        (twins.ours.glob(pattern), twins.theirs.glob(pattern)),
        (twins.ours.rglob(pattern), twins.theirs.rglob(pattern)),
    ):
        found = [str(path) for path in ours if str(path) not in UNFOLLOWABLE]
        assert sorted(found) == sorted({twins.relative(path) for path in theirs})


def test_glob_of_any_depth_finds_directories(root: pyerofs.Path) -> None:
    """As pathlib did before Python 3.13, and ``**/`` does since."""
    found = sorted(str(path) for path in root.glob("**"))
    assert found == ["/", "/dir", "/dir/deeper"]


def test_glob_finds_links_to_nowhere(root: pyerofs.Path) -> None:
    """With wildcards and without: pathlib did the latter in some versions only."""
    for name in ("dangling", "loop"):
        for pattern in (name, f"{name[:-1]}?"):
            assert [p.name for p in root.glob(pattern)] == [name]


@pytest.mark.parametrize("pattern", ["", "/", "/etc"])
def test_patterns_that_are_not_relative(root: pyerofs.Path, pattern: str) -> None:
    with pytest.raises((ValueError, NotImplementedError)):
        pathlib.Path().glob(pattern).__next__()
    with pytest.raises(ValueError, match="not a relative pattern"):
        next(root.glob(pattern))


@pytest.mark.parametrize(
    "path", ["to-dir/deeper/..", "to-file", "dir/up/up/up", "to-dir/up/../dir", ".."]
)
def test_resolve(root: pyerofs.Path, path: str, tmp_path: pathlib.Path) -> None:
    expected = {
        "to-dir/deeper/..": "/dir",
        "to-file": "/dir/a.txt",
        "dir/up/up/up": "/dir",
        "to-dir/up/../dir": "/dir",
        "..": "/",
    }
    assert str((root / path).resolve()) == expected[path]
    for wrong, error in (
        ("loop", pyerofs.TooManySymlinks),
        ("dangling", pyerofs.NotFound),
        ("file/x", pyerofs.NotADirectory),
    ):
        with pytest.raises(error):
            (root / wrong).resolve()


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "rt", "rb"])
@pytest.mark.parametrize("newline", [None, "", "\n"])
def test_opening(twins: Twins, mode: str, newline: str | None) -> None:
    ours, theirs = twins.below("to-dir/a.txt" if (twins.ours / "to-dir").exists() else "text")
    options: dict[str, Any] = {} if "b" in mode else {"newline": newline, "encoding": "ascii"}
    with ours.open(mode, **options) as a, theirs.open(mode, **options) as b:
        assert a.readlines() == b.readlines()
        assert a.closed is False
    assert a.closed


@pytest.mark.parametrize("mode", ["w", "a", "x", "r+", "rb+", "wb", "", "b", "rr", "rbt", "z"])
def test_modes_that_are_not_for_reading(root: pyerofs.Path, mode: str) -> None:
    with pytest.raises(ValueError, match="read-only"):
        (root / "file").open(mode)


def test_text(root: pyerofs.Path) -> None:
    assert (root / "file").read_text() == "one\ntwo\r\nthree"
    assert (root / "file").read_text("utf-16", "replace")
    with pytest.raises(pyerofs.IsADirectory):
        (root / "dir").read_text()
    with pytest.raises(pyerofs.IsADirectory):
        (root / "dir").open()


def test_attributes(root: pyerofs.Path) -> None:
    assert root.stat().st_mode == stat.S_IFDIR | 0o755
    assert (root / "to-dir").inode().is_dir
    assert (root / "to-dir").inode(follow_symlinks=False).is_symlink
    assert (root / "to-dir").readlink() == "dir"
    with pytest.raises(pyerofs.NotASymlink):
        (root / "dir").readlink()


def test_xattrs() -> None:
    want = golden("xattr-prefix")
    with pyerofs.open(want.image) as image:
        found = (pyerofs.Path(image) / "xattr-1").xattrs()
        assert {k: v.hex() for k, v in found.items()} == want.entries["xattr-1"]["xattrs"]

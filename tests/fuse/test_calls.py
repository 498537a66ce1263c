"""What system calls answer.  Each expectation is held against the kernel's driver as well."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import handmade as hm
from tests.fuse import libc
from tests.fuse.mounting import kernel_mounted, mounted
from tests.manifests import golden

Call = Callable[[Path], object]


@pytest.fixture(scope="module", params=["ours", "kernels"])
def tree(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A golden image, mounted by us and by the kernel."""
    mount = mounted if request.param == "ours" else kernel_mounted
    with mount(golden("plain"), tmp_path_factory.mktemp("mnt")) as where:
        yield where


@pytest.mark.parametrize(
    "change",
    {
        "create": lambda top: (top / "new").touch(),
        "touch": lambda top: (top / "text").touch(),
        "open for writing": lambda top: (top / "text").open("r+b"),
        "append": lambda top: (top / "text").open("ab"),
        "truncate": lambda top: os.truncate(top / "text", 0),
        "unlink": lambda top: (top / "text").unlink(),
        "mkdir": lambda top: (top / "new").mkdir(),
        "rmdir": lambda top: (top / "empty-dir").rmdir(),
        "rename": lambda top: (top / "text").rename(top / "new"),
        "link": lambda top: (top / "new").hardlink_to(top / "text"),
        "symlink": lambda top: (top / "new").symlink_to("text"),
        "mknod": lambda top: os.mkfifo(top / "new"),
        "chmod": lambda top: (top / "text").chmod(0o777),
        "chown": lambda top: os.chown(top / "text", os.getuid(), os.getgid()),
        "utime": lambda top: os.utime(top / "text", (1, 1)),
        "setxattr": lambda top: os.setxattr(top / "text", "user.new", b"value"),
        "removexattr": lambda top: os.removexattr(top / "xattr-1", "user.num"),
    }.items(),
    ids=lambda item: item[0],
)
def test_changes_are_refused(tree: Path, change: tuple[str, Call]) -> None:
    assert answer(change[1], tree) == "EROFS"


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """Close a descriptor in the end."""
    try:
        yield fd
    finally:
        os.close(fd)


def answer(call: Call, top: Path) -> object:
    """What a call returns, or the name of its error."""
    try:
        return call(top)
    except OSError as e:
        return errno.errorcode[e.errno or 0]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("missing", "ENOENT"),
        ("tex", "ENOENT"),
        ("text2", "ENOENT"),
        ("\x01", "ENOENT"),  # before all others
        ("\udcff" * 255, "ENOENT"),  # behind all others
        ("many/missing", "ENOENT"),
        ("empty-dir/missing", "ENOENT"),
        ("text/below", "ENOTDIR"),
        ("fifo/below", "ENOTDIR"),
        ("n" * 256, "ENAMETOOLONG"),
        ("many/" + "n" * 1000, "ENAMETOOLONG"),
        ("dangling/", "ENOENT"),
        ("text/", "ENOTDIR"),
    ],
    ids=lambda word: word[:20].encode("utf-8", "backslashreplace").decode(),
)
def test_what_is_not_there(tree: Path, name: str, error: str) -> None:
    for _ in range(3):  # the answer may be remembered
        assert answer(lambda top: os.stat(f"{top}/{name}"), tree) == error


def test_other_refusals(tree: Path) -> None:
    assert answer(lambda top: os.readlink(top / "text"), tree) == "EINVAL"
    assert answer(lambda top: os.listdir(top / "text"), tree) == "ENOTDIR"
    assert answer(lambda top: (top / "many").read_bytes(), tree) == "EISDIR"
    assert answer(lambda top: (top / "dangling").read_bytes(), tree) == "ENOENT"


def test_the_way_up(tree: Path) -> None:
    assert os.path.samefile(tree / "deep0/deep1/../../many", tree / "many")
    assert os.path.samefile(tree / "deep0/..", tree)
    assert os.path.samefile(tree / "many/..", tree / ".")


def test_hard_links(tree: Path) -> None:
    names = ["hard-1", "hard-3", "many/hard-2"]
    assert len({(tree / name).stat().st_ino for name in names}) == 1
    assert {(tree / name).stat().st_nlink for name in names} == {3}
    assert len({(tree / name).read_bytes() for name in names}) == 1


def test_symbolic_links(tree: Path) -> None:
    assert os.readlink(tree / "link-short") == "text"
    assert (tree / "link-short").read_bytes() == (tree / "text").read_bytes()
    assert os.readlink(tree / "link-4000") == "a" * 4000
    assert os.readlink(tree / "link-long") == "/" + "x/" * 1000 + "end"


@pytest.mark.skipif(os.geteuid() != 0, reason="opening files by handle needs root")
@pytest.mark.parametrize("path", ["text", "many/hard-2", "fifo", "many", "deep0/deep1", "."])
def test_handles_outlive_what_the_kernel_remembers(tree: Path, path: str) -> None:
    """As exporting it over NFS needs."""
    want, root = (tree / path).lstat(), tree.stat().st_ino
    handle = libc.handle_of(tree / path)
    libc.remount(tree)  # forgets all names and inodes
    with (
        closing_fd(os.open(tree, os.O_RDONLY)) as top,
        closing_fd(libc.open_by_handle(top, handle, os.O_PATH)) as fd,
    ):
        found = os.fstat(fd)
    assert (found.st_ino, found.st_mode, found.st_size) == (want.st_ino, want.st_mode, want.st_size)
    assert tree.stat().st_ino == root


def test_reading_at_and_behind_the_end(tree: Path) -> None:
    with closing_fd(os.open(tree / "size-4097", os.O_RDONLY)) as fd:
        assert len(os.pread(fd, 4096, 4096)) == 1
        assert os.pread(fd, 4096, 4097) == b""
        assert os.pread(fd, 1, 1 << 40) == b""
        assert os.lseek(fd, 0, os.SEEK_END) == 4097
        assert os.read(fd, 1) == b""


def test_xattr_values(tree: Path) -> None:
    assert os.getxattr(tree / "xattr-1", "user.num") == b"1"
    assert len(os.getxattr(tree / "xattr-1", "user.large")) == 3000
    assert os.getxattr(tree / "many", "user.dir") == b"on a directory"
    assert os.getxattr(tree / "xattr-4", "user.empty") == b""


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("user.large", 0, 3000),
        ("user.large", 3000, 3000),
        ("user.large", 65536, 3000),
        ("user.large", 2999, "ERANGE"),
        ("user.large", 1, "ERANGE"),
        ("user.missing", 0, "ENODATA"),
        ("user.missing", 100, "ENODATA"),
        ("user.larg", 100, "ENODATA"),
        ("user.large2", 100, "ENODATA"),
        ("security.missing", 100, "ENODATA"),
        ("trusted.missing", 100, "ENODATA"),
        ("user." + "n" * 250, 100, "ENODATA"),
        ("user." + "n" * 251, 100, "ERANGE"),
    ],
    ids=str,
)
def test_getxattr(tree: Path, name: str, size: int, expected: int | str) -> None:
    assert answer(lambda top: libc.getxattr(top / "xattr-1", name, size), tree) == expected


def test_listxattr(tree: Path) -> None:
    names = os.listxattr(tree / "xattr-1")
    assert {"user.common", "user.num", "user.large"} <= set(names)
    length = sum(len(name) + 1 for name in names)

    def listing(size: int) -> object:
        return answer(lambda top: libc.listxattr(top / "xattr-1", size), tree)

    assert listing(0) == length
    assert listing(length) == length
    assert listing(length - 1) == "ERANGE"
    assert os.listxattr(tree / "text") == []
    assert libc.listxattr(tree / "text", 0) == 0


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of a script and of a dynamically linked program."""
    found = shutil.which("echo")
    if found is None:
        pytest.skip("no echo to put into an image")
    program = Path(found).read_bytes()
    executable = stat.S_IFREG | 0o755
    image = hm.build(
        {
            b"script": hm.inline(b"#!/bin/sh\nprintf 'script %s' $1\n", mode=executable),
            b"program": hm.plain(len(program), 100, mode=executable),
            b"data": hm.inline(b"#!/bin/sh\n"),
        },
        {100: program},
    )
    path = tmp_path_factory.mktemp("image") / "programs.erofs"
    hm.save(image, path)
    return path


def test_programs_run(programs: Path, where: Path) -> None:
    with mounted(programs, where):
        for name, shown in {"script": "script one", "program": "one\n"}.items():
            assert subprocess.check_output([where / name, "one"], text=True) == shown
        with pytest.raises(PermissionError):
            subprocess.run([where / "data"], check=False)


def test_noexec(programs: Path, where: Path) -> None:
    with mounted(programs, where, "-o", "noexec"), pytest.raises(PermissionError):
        subprocess.run([where / "program"], check=False)

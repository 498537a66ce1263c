"""``pyerofs extract`` under attack: images with equal names, other programs that change the target
in the meantime, owners that are none, attributes that do not fit."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import handmade as hm
from tests import hostile
from tests.cli.conftest import Done, Run, RunProcess
from tests.helpers import handmade, symlink
from tests.hostile import CHR, DIR, FIFO, FILE, LINK, SOCK, Entry, Layout

NOBODY = 65534
NO_OWNER = 0xFFFFFFFF  # to chown, this means: leave it
SET_ID = stat.S_ISUID | stat.S_ISGID
MANY = 5000  # inodes that a superblock claims, so that processes do the work

TRUSTED = hm.xattrs(hm.xattr(4, b"evil", b"1"))  # root can set it on files of every kind

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
by_threads_and_processes = pytest.mark.parametrize("inos", [1, MANY], ids=["threads", "processes"])


def facts(path: Path) -> dict[str, Any]:
    """All that extraction sets of a file, and must not of others."""
    status = path.lstat()
    names = os.listxattr(path, follow_symlinks=False)
    return {
        "mode": oct(status.st_mode),
        "owner": (status.st_uid, status.st_gid),
        "times": (status.st_atime_ns, status.st_mtime_ns),
        "xattrs": {name: os.getxattr(path, name, follow_symlinks=False) for name in names},
    }


@pytest.fixture(name="outside")
def watch(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Files of each kind, beside the target, that are to stay as they are."""
    top = tmp_path / "outside"
    top.mkdir()
    paths = {kind: top / kind for kind in ("file", "fifo", "socket", "link", "directory")}
    paths["file"].write_text("precious")
    os.mkfifo(paths["fifo"])
    os.mknod(paths["socket"], stat.S_IFSOCK | 0o600)
    paths["link"].symlink_to("nowhere")
    paths["directory"].mkdir()
    if os.geteuid() == 0:
        paths["device"] = top / "device"
        os.mknod(paths["device"], stat.S_IFCHR | 0o600, os.makedev(1, 3))
    for path in paths.values():
        if not path.is_symlink():
            path.chmod(0o700 if path.is_dir() else 0o600)
        os.utime(path, ns=(10**18, 10**18), follow_symlinks=False)
    before = {kind: facts(path) for kind, path in paths.items()}
    yield paths
    assert {kind: facts(path) for kind, path in paths.items()} == before
    assert paths["file"].read_text() == "precious"
    assert os.listdir(paths["directory"]) == []


def save(path: Path, image: bytes) -> Path:
    path.write_bytes(image)
    return path


# --- equal names ------------------------------------------------------------------------------


def racing(target: bytes, rounds: int, batch: int = 64, **fields: Any) -> bytes:
    """An image in whose directory ``d`` a fifo and a link of the same name come by turns, each as often
    as files go to one worker at once."""
    layout = Layout()
    fifo = (b"x", layout.inode(hostile.node(stat.S_IFIFO, 0o6777)), FIFO)
    link = (b"x", layout.inode(symlink(target)), LINK)
    return hostile.unordered(([fifo] * batch + [link] * batch) * rounds, layout, **fields)


@pytest.mark.parametrize(("inos", "rounds"), [(1, 12), (MANY, 40)], ids=["threads", "processes"])
def test_a_link_in_place_of_a_fifo_does_not_lead_outside(
    run: Run, tmp_path: Path, outside: dict[str, Path], inos: int, rounds: int
) -> None:
    image = save(tmp_path / "image", racing(os.fsencode(outside["file"]), rounds, inos=inos))
    for number in range(10):
        done = run("extract", "--overwrite", "-q", image, "-C", tmp_path / f"out{number}")
        mode = stat.S_IMODE(outside["file"].stat().st_mode)
        assert oct(mode) == oct(0o600), f"run {number}"
        assert done.status == 1
        assert "corrupt" in done.err
        made = (tmp_path / f"out{number}" / "d" / "x").lstat()
        assert stat.S_ISFIFO(made.st_mode)


def kinds(layout: Layout, target: bytes) -> dict[str, tuple[int, int]]:
    """The nids and types of something of each kind that an image can have."""
    below = layout.inode(hm.inline(b"below"))
    several = hostile.with_links(hm.inline(b"several", extended=True), 2)
    return {
        "file": (layout.inode(hm.inline(b"file")), FILE),
        "several": (layout.inode(several), FILE),  # a file with two names
        "fifo": (layout.inode(hostile.node(stat.S_IFIFO, 0o6777)), FIFO),
        "socket": (layout.inode(hostile.node(stat.S_IFSOCK, 0o6777)), SOCK),
        "link": (layout.inode(symlink(target)), LINK),
        "directory": (layout.directory([(b"evil", below, FILE)]), DIR),
        "other": (layout.directory([(b"other", below, FILE)]), DIR),
    }


def arranged(how: str, first: Entry, second: Entry, filler: tuple[int, int]) -> list[Entry]:
    """Two entries of one name in a directory, side by side or with something between them."""
    others = [(b"y%03d%s" % (i, b"y" * 200), *filler) for i in range(40)]
    between: dict[str, list[Entry]] = {
        "beside": [],
        "with a smaller one between": [(b"a", *filler)],
        "with a dot between": [(b".", 0, DIR)],
        "with two dots between": [(b"..", 0, DIR)],
        "in another block": others,
        "in another block, with smaller ones between": [*others[::-1], (b"a", *filler)],
    }
    return [first, *between[how], second]


ARRANGEMENTS = [
    "beside",
    "with a smaller one between",
    "with a dot between",
    "with two dots between",
    "in another block",
    "in another block, with smaller ones between",
]
PAIRS = [
    ("fifo", "link"), ("link", "fifo"), ("file", "link"), ("link", "file"), ("directory", "link"),
    ("link", "directory"), ("directory", "other"), ("file", "directory"), ("directory", "file"),
    ("several", "link"), ("fifo", "several"), ("socket", "link"), ("link", "several"),
]  # fmt: skip
TYPES = {
    "file": stat.S_IFREG, "several": stat.S_IFREG, "fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK,
    "link": stat.S_IFLNK, "directory": stat.S_IFDIR,
}  # fmt: skip


def twice(how: str, pair: tuple[str, str], target: bytes, **fields: Any) -> bytes:
    """An image in whose directory ``d`` the name ``x`` comes twice."""
    layout = Layout()
    known = kinds(layout, target)
    first, second = ((b"x", *known[kind]) for kind in pair)
    return hostile.unordered(arranged(how, first, second, known["file"]), layout, **fields)


def assert_the_first_one(out: Path, pair: tuple[str, str]) -> None:
    """Of a name that came twice, what came first is there, and nothing of the other."""
    found = out / "d" / "x"
    assert stat.S_IFMT(found.lstat().st_mode) == TYPES[pair[0]]
    if pair[0] == "directory":
        assert os.listdir(found) == ["evil"]


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_name_that_comes_twice_is_extracted_once(
    run: Run, tmp_path: Path, outside: dict[str, Path], pair: tuple[str, str], options: list[str]
) -> None:
    target = outside["directory" if "directory" in pair else "file"]
    for inos in (1, MANY):
        image = save(tmp_path / "image", twice("beside", pair, os.fsencode(target), inos=inos))
        out = tmp_path / f"out-{inos}"
        for _ in range(1 + len(options)):  # the second time, the first one's leftovers are there
            done = run("extract", *options, "-q", image, "-C", out)
            assert done.status == 1
            assert "corrupt" in done.err
            assert_the_first_one(out, pair)


@pytest.mark.parametrize("how", ARRANGEMENTS)
def test_a_name_that_comes_twice_is_found_wherever_it_is(
    run: Run, tmp_path: Path, outside: dict[str, Path], how: str
) -> None:
    pair = ("fifo", "link")
    image = save(tmp_path / "image", twice(how, pair, os.fsencode(outside["file"])))
    out = tmp_path / "out"
    done = run("extract", "--overwrite", "-q", image, "-C", out)
    assert done.status == 1
    assert "corrupt" in done.err
    assert_the_first_one(out, pair)


@pytest.mark.parametrize(
    ("how", "pair"),
    [*((how, PAIRS[0]) for how in ARRANGEMENTS), *((ARRANGEMENTS[0], pair) for pair in PAIRS[1:])],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_name_that_comes_twice_is_in_a_tar_once(
    run: Run, tmp_path: Path, how: str, pair: tuple[str, str]
) -> None:
    image = save(tmp_path / "image", twice(how, pair, b"/nowhere"))
    done = run("tar", image, "-o", tmp_path / "out.tar")
    assert done.status == 1
    assert "corrupt" in done.err
    assert done.err.count("\n") <= 50
    with tarfile.open(tmp_path / "out.tar") as archive:
        members = [member for member in archive if member.name == "./d/x"]
        below = {member.name for member in archive if member.name.startswith("./d/x/")}
    if pair[0] == "socket":  # which a tar can't hold
        assert members == []
        return
    (member,) = members
    predicates = {
        "file": member.isfile, "several": member.isfile, "fifo": member.isfifo,
        "link": member.issym, "directory": member.isdir,
    }  # fmt: skip
    assert predicates[pair[0]]()
    assert below == ({"./d/x/evil"} if pair[0] == "directory" else set())


@pytest.mark.parametrize("how", ARRANGEMENTS)
@pytest.mark.parametrize("pair", [("fifo", "link"), ("directory", "other")], ids="-".join)
def test_a_name_that_comes_twice_is_a_problem(
    run: Run, tmp_path: Path, how: str, pair: tuple[str, str]
) -> None:
    done = run("check", "--json", save(tmp_path / "image", twice(how, pair, b"/nowhere")))
    assert (done.status, done.err) == (1, "")
    found = [p for p in done.json["problems"] if p["path"] in ("/d", "/d/x")]
    assert any(p["path"] == "/d/x" or p["what"].startswith("entry b'") for p in found)


@by_threads_and_processes
def test_names_out_of_order_are_skipped_and_all_others_extracted(
    run: Run, tmp_path: Path, inos: int
) -> None:
    layout = Layout()
    file = layout.inode(hm.inline(b"x"))
    names = [b"a", b"c", b"b", b"d", b"e"]
    image = hostile.unordered([(name, file, FILE) for name in names], layout, inos=inos)
    save(tmp_path / "image", image)
    done = run("extract", "-q", tmp_path / "image", "-C", tmp_path / "out")
    assert done.status == 1
    assert sorted(os.listdir(tmp_path / "out" / "d")) == ["a", "c", "d", "e"]
    (line,) = [line for line in done.err.splitlines() if "corrupt" in line]
    assert "b" in line.replace(str(tmp_path), "")
    done = run("tar", tmp_path / "image", "-o", tmp_path / "out.tar")
    assert done.status == 1
    assert done.err.count("corrupt") == 1
    with tarfile.open(tmp_path / "out.tar") as archive:
        assert archive.getnames() == [".", "./d", "./d/a", "./d/c", "./d/d", "./d/e"]
    found = run("check", "--json", tmp_path / "image")
    assert found.status == 1
    assert len([p for p in found.json["problems"] if "entry" in p["what"]]) == 1


def test_names_in_byte_order_are_no_corruption(run: Run, tmp_path: Path) -> None:
    layout = Layout()
    file = layout.inode(hm.inline(b"x"))
    names = [b"!", b"-", b".-", b"...", b"..a", b".a", b"A", b"\x7f", b"\xc3\xa4", b"\xff"]
    dots: list[Entry] = [(b".", 0, DIR), (b"..", 0, DIR)]
    entries = sorted([*dots, *((name, file, FILE) for name in names)])
    nid = layout.directory(entries, dots=False)
    save(tmp_path / "image", layout.image({b"d": (nid, DIR)}))
    done = run("extract", tmp_path / "image", "-C", tmp_path / "out")
    assert done.err.count("corrupt") == 0
    assert done.status == 0
    assert sorted(map(os.fsencode, os.listdir(tmp_path / "out" / "d"))) == sorted(names)


# --- others that change the target at the same time -------------------------------------------

Swap = Callable[[bytes | str, int | None], None]


def by_symlink(victim: Path) -> Swap:
    """What replaces something in a directory by a symbolic link to the victim."""

    def swap(name: bytes | str, parent: int | None, link: Callable[..., None] = os.symlink) -> None:
        link(victim, name, dir_fd=parent)

    return swap


def by_hard_link(victim: Path) -> Swap:
    """What replaces something in a directory by a further name of the victim."""

    def swap(name: bytes | str, parent: int | None, link: Callable[..., None] = os.link) -> None:
        link(victim, name, dst_dir_fd=parent, follow_symlinks=False)

    return swap


def swap_after(monkeypatch: pytest.MonkeyPatch, function: str, swap: Swap) -> list[str]:
    """Have what a function of ``os`` has just made replaced; the names of all that was."""
    real, unlink = getattr(os, function), os.unlink
    position = 1 if function == "symlink" else 0
    swapped: list[str] = []

    def call(*args: Any, dir_fd: int | None = None, **options: Any) -> None:
        real(*args, dir_fd=dir_fd, **options)
        unlink(args[position], dir_fd=dir_fd)
        swap(args[position], dir_fd)
        swapped.append(os.fsdecode(args[position]))

    monkeypatch.setattr(os, function, call)
    return swapped


def one_node(kind: str, **fields: Any) -> bytes:
    """An image with a fifo, a socket, a device or a link ``x``, and a file behind it."""
    layout = Layout()
    known = {
        "fifo": (stat.S_IFIFO, FIFO),
        "socket": (stat.S_IFSOCK, SOCK),
        "device": (stat.S_IFCHR, CHR),
        "link": (stat.S_IFLNK, LINK),
    }
    kind_bits, kind_number = known[kind]
    if kind == "link":
        record = hm.inline(b"target", mode=stat.S_IFLNK | 0o777, extended=True, xattrs=TRUSTED)
    else:
        record = hostile.node(kind_bits, 0o6777, rdev=0x103, xattrs=TRUSTED)
    file = layout.inode(hm.inline(b"good"))
    entries = {b"x": (layout.inode(record), kind_number), b"y": (file, FILE)}
    return layout.image(entries, **fields)


def assert_reported(done: Done, out: Path) -> None:
    """One entry is known to have failed, and the others are there."""
    assert done.status == 1
    assert any(line.startswith("pyerofs: x: ") for line in done.err.splitlines())
    assert (out / "y").read_bytes() == b"good"


NODES = ["fifo", "socket", pytest.param("device", marks=as_root)]


@by_threads_and_processes
@pytest.mark.parametrize("how", [by_symlink, by_hard_link], ids=lambda how: how.__name__)
@pytest.mark.parametrize("kind", NODES)
def test_a_node_that_is_replaced_as_soon_as_it_is_made(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outside: dict[str, Path],
    kind: str,
    how: Callable[[Path], Swap],
    inos: int,
) -> None:
    image = save(tmp_path / "image", one_node(kind, inos=inos))
    victim = outside["file" if how is by_symlink else kind]
    swap_after(monkeypatch, "mknod", how(victim))
    swap_after(monkeypatch, "mkfifo", how(victim))
    done = run("extract", "-q", image, "-C", tmp_path / "out")
    monkeypatch.undo()
    assert_reported(done, tmp_path / "out")


@by_threads_and_processes
@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_a_node_that_is_replaced_by_a_file_of_another_kind(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outside: dict[str, Path],
    kind: str,
    inos: int,
) -> None:
    image = save(tmp_path / "image", one_node(kind, inos=inos))
    function = "symlink" if kind == "link" else "mknod"
    swap_after(monkeypatch, function, by_hard_link(outside["file"]))
    done = run("extract", "-q", image, "-C", tmp_path / "out")
    monkeypatch.undo()
    assert_reported(done, tmp_path / "out")


@by_threads_and_processes
def test_a_link_that_is_replaced_by_one_from_outside(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outside: dict[str, Path], inos: int
) -> None:
    image = save(tmp_path / "image", one_node("link", inos=inos))
    swap_after(monkeypatch, "symlink", by_hard_link(outside["link"]))
    done = run("extract", "-q", image, "-C", tmp_path / "out")
    monkeypatch.undo()
    assert_reported(done, tmp_path / "out")


@pytest.mark.parametrize("how", [by_symlink, by_hard_link], ids=lambda how: how.__name__)
@pytest.mark.parametrize("kind", [*NODES, "link"])
def test_a_node_that_is_replaced_before_anything_is_set(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outside: dict[str, Path],
    kind: str,
    how: Callable[[Path], Swap],
) -> None:
    """Whatever was looked at before: what is set is set on that, not on what has its name now."""
    image = save(tmp_path / "image", one_node(kind))
    swap = how(outside["file" if how is by_symlink else kind])
    place = tmp_path / "out" / "x"

    def attack(function: str) -> None:
        real = getattr(os, function)

        def call(*args: Any, **options: Any) -> None:
            if os.path.lexists(place):
                place.unlink()
                swap(os.fsencode(place), None)
            real(*args, **options)

        monkeypatch.setattr(os, function, call)

    for function in ("chown", "lchown", "fchown", "chmod", "fchmod", "setxattr", "utime"):
        attack(function)
    run("extract", "-q", image, "-C", tmp_path / "out")
    monkeypatch.undo()
    assert (tmp_path / "out" / "y").read_bytes() == b"good"


@by_threads_and_processes
def test_a_directory_that_is_replaced_as_soon_as_it_is_made(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outside: dict[str, Path], inos: int
) -> None:
    layout = Layout()
    file = layout.inode(hm.inline(b"good"))
    below = layout.directory([(b"evil", file, FILE)])
    image = layout.image({b"x": (below, DIR), b"y": (file, FILE)}, inos=inos)
    save(tmp_path / "image", image)
    real, link = os.mkdir, by_symlink(outside["directory"])

    def mkdir(name: Any, *args: Any, dir_fd: int | None = None) -> None:
        real(name, *args, dir_fd=dir_fd)
        if dir_fd is not None:
            os.rmdir(name, dir_fd=dir_fd)
            link(name, dir_fd)

    monkeypatch.setattr(os, "mkdir", mkdir)
    done = run("extract", "-q", tmp_path / "image", "-C", tmp_path / "out")
    monkeypatch.undo()
    assert done.status == 1
    assert (tmp_path / "out" / "y").read_bytes() == b"good"


# --- owners that are none ---------------------------------------------------------------------


def owners_image() -> bytes:
    """Files, directories and fifos with set-id bits, of owners that chown takes for none."""
    mode = stat.S_IFREG | SET_ID | 0o755
    nobodys = {b"both": (NO_OWNER, NO_OWNER), b"user": (NO_OWNER, 5), b"group": (5, NO_OWNER)}
    nobodys |= {
        b"mine and none": (NOBODY, NO_OWNER),
        b"none and mine": (NO_OWNER, NOBODY),
        b"root's and none": (0, NO_OWNER),
        b"none and root's": (NO_OWNER, 0),
    }
    layout = Layout()
    entries = {}
    for name, (uid, gid) in nobodys.items():
        record = hm.inline(b"x", mode=mode, extended=True)
        entries[name] = (layout.inode(hostile.owned(record, uid, gid)), FILE)
        record = hostile.owned(hostile.node(stat.S_IFIFO, SET_ID | 0o755), uid, gid)
        entries[name + b" fifo"] = (layout.inode(record), FIFO)
        nid = layout.directory([])
        layout.change(nid, lambda inode: hostile.with_mode(inode, stat.S_IFDIR | SET_ID | 0o755))
        layout.change(nid, partial(hostile.owned, uid=uid, gid=gid))
        entries[name + b" directory"] = (nid, DIR)
    return layout.image(entries)


def assert_no_set_id_bits(out: Path) -> None:
    found = {name: oct(stat.S_IMODE((out / name).lstat().st_mode)) for name in os.listdir(out)}
    assert len(found) == 21
    assert found == dict.fromkeys(found, oct(0o755))


@pytest.fixture(scope="module")
def without_privileges() -> list[str]:
    """The words that run a command as nobody, who may read everything but change nothing."""
    if os.geteuid() != 0:
        return []
    found = [
        "setpriv",
        f"--reuid={NOBODY}",
        f"--regid={NOBODY}",
        "--clear-groups",
        "--inh-caps=+dac_read_search",
        "--ambient-caps=+dac_read_search",
    ]
    if shutil.which("setpriv") is None or subprocess.run([*found, "true"], check=False).returncode:
        pytest.skip("no setpriv that can become nobody")
    return found


@pytest.mark.parametrize("options", [[], ["--no-same-owner"]], ids=["", "no-same-owner"])
def test_set_id_bits_without_an_owner_are_lost(
    run_process: RunProcess, tmp_path: Path, without_privileges: list[str], options: list[str]
) -> None:
    save(tmp_path / "image", owners_image())
    if without_privileges:
        os.chown(tmp_path, NOBODY, NOBODY)
    done = run_process(
        "extract", *options, tmp_path / "image", "-C", tmp_path / "out", under=without_privileges
    )
    assert done.status == 0
    assert_no_set_id_bits(tmp_path / "out")


@as_root
@pytest.mark.parametrize("options", [[], ["--no-same-owner"]], ids=["", "no-same-owner"])
def test_set_id_bits_without_an_owner_are_lost_for_root_too(
    run: Run, tmp_path: Path, options: list[str]
) -> None:
    save(tmp_path / "image", owners_image())
    done = run("extract", *options, tmp_path / "image", "-C", tmp_path / "out")
    assert done.status == 0
    assert_no_set_id_bits(tmp_path / "out")


@as_root
def test_set_id_bits_of_real_owners_are_kept(run: Run, tmp_path: Path) -> None:
    layout = Layout()
    record = hm.inline(b"x", mode=stat.S_IFREG | SET_ID | 0o755, extended=True)
    entries = {
        b"%d-%d" % (uid, gid): (layout.inode(hostile.owned(record, uid, gid)), FILE)
        for uid, gid in [(0, 0), (5, 5), (0, 5), (5, 0), (NO_OWNER - 1, NO_OWNER - 1)]
    }
    save(tmp_path / "image", layout.image(entries))
    assert run("extract", tmp_path / "image", "-C", tmp_path / "out") == Done(0, b"", "")
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o6755, path.name
        assert path.name == f"{path.stat().st_uid}-{path.stat().st_gid}"


@as_root
def test_set_id_bits_are_lost_where_the_owner_does_not_take(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems say that they have changed an owner, and have not."""
    layout = Layout()
    record = hm.inline(b"x", mode=stat.S_IFREG | SET_ID | 0o755, extended=True)
    save(tmp_path / "image", layout.image({b"x": (layout.inode(record), FILE)}))
    for function in ("chown", "fchown", "lchown"):
        monkeypatch.setattr(os, function, lambda *args, **options: None)
    run("extract", tmp_path / "image", "-C", tmp_path / "out")
    monkeypatch.undo()
    assert stat.S_IMODE((tmp_path / "out" / "x").stat().st_mode) == 0o755


# --- attributes that do not fit ---------------------------------------------------------------


def with_attributes(xattrs: bytes, **fields: Any) -> bytes:
    """An image with files, a link and a directory that have these attributes, and files without."""
    return handmade(
        {
            b"a": hm.inline(b"before"),
            b"b": hm.inline(b"large", mode=stat.S_IFREG | 0o640, xattrs=xattrs),
            b"c": hm.inline(b"target", mode=stat.S_IFLNK | 0o777, xattrs=xattrs),
            b"d": hm.inline(
                hm.directory({b".": (0, DIR), b"..": (0, DIR)}, 4096),
                mode=hm.DIRECTORY,
                nlink=2,
                xattrs=xattrs,
            ),
            b"e": hm.inline(b"behind"),
        },
        **fields,
    )


def assert_all_but_xattrs(out: Path) -> None:
    assert (out / "a").read_bytes() == b"before"
    assert (out / "b").read_bytes() == b"large"
    assert stat.S_IMODE((out / "b").stat().st_mode) == 0o640
    assert (out / "b").stat().st_mtime_ns == (hm.EPOCH + 7) * 10**9 + 123_456_789
    assert os.readlink(out / "c") == "target"
    assert stat.S_IMODE((out / "d").stat().st_mode) == 0o755
    assert (out / "e").read_bytes() == b"behind"


@as_root
@by_threads_and_processes
def test_an_attribute_larger_than_the_file_system_has_them(
    run: Run, tmp_path: Path, inos: int
) -> None:
    large = hm.xattrs(hm.xattr(4, b"large", bytes(60_000)) + hm.xattr(4, b"small", b"value"))
    save(tmp_path / "image", with_attributes(large, inos=inos))
    done = run("extract", "-q", tmp_path / "image", "-C", tmp_path / "out")
    assert "Traceback" not in done.err
    assert_all_but_xattrs(tmp_path / "out")
    assert os.getxattr(tmp_path / "out" / "b", "trusted.small") == b"value"
    if "trusted.large" in os.listxattr(tmp_path / "out" / "b"):
        assert done == Done(0, b"", "")  # a file system that has them as large
    else:
        assert done == Done(0, b"", "pyerofs: could not set: 3 xattrs\n")


@by_threads_and_processes
@pytest.mark.parametrize(
    "code", ["ENOSPC", "EDQUOT", "E2BIG", "ERANGE", "EINVAL", "EPERM", "ENOTSUP"]
)
def test_attributes_that_can_not_be_set_are_counted(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, inos: int
) -> None:
    def refuse(where: int | bytes | str, *_: object, **__: object) -> None:
        number = getattr(errno, code)
        raise OSError(number, os.strerror(number), where)

    two = hm.xattrs(hm.xattr(1, b"one", b"1") + hm.xattr(1, b"two", b"2"))
    save(tmp_path / "image", with_attributes(two, inos=inos))
    monkeypatch.setattr(os, "setxattr", refuse)
    done = run("extract", "-q", tmp_path / "image", "-C", tmp_path / "out")
    monkeypatch.undo()
    hint = "" if os.geteuid() == 0 else " (not root)"
    owners = "" if os.geteuid() == 0 else "6 owners, "
    assert done == Done(0, b"", f"pyerofs: could not set{hint}: {owners}6 xattrs\n")
    assert_all_but_xattrs(tmp_path / "out")


@as_root
def test_a_disk_that_is_really_full_is_still_an_error(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said of xattrs is not said of data."""
    save(tmp_path / "image", with_attributes(hm.xattrs(hm.xattr(1, b"name", b"value"))))

    def full(fd: int, *_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    done = run("extract", "-q", tmp_path / "image", "-C", tmp_path / "out")
    monkeypatch.undo()
    assert (done.status, done.out) == (1, b"")
    assert done.err == "pyerofs: No space left on device\n"


@pytest.mark.parametrize("name", [b"", b"a\0b", b"\xff\xfe", b"n" * 250])
@by_threads_and_processes
def test_attributes_with_names_that_are_none(
    run: Run, tmp_path: Path, name: bytes, inos: int
) -> None:
    odd = hm.xattrs(hm.xattr(1, name, b"value"))
    save(tmp_path / "image", with_attributes(odd, inos=inos))
    done = run("extract", "-q", tmp_path / "image", "-C", tmp_path / "out")
    assert "Traceback" not in done.err
    assert_all_but_xattrs(tmp_path / "out")

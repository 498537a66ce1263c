"""``pyerofs extract``: everything arrives, and nothing arrives outside."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyerofs.format.model import HOLE
from tests import handmade as hm
from tests.cli.conftest import Done, Run, RunProcess
from tests.helpers import (
    directory,
    every_image,
    extracted,
    handmade,
    open_golden,
    symlink,
    words,
)
from tests.manifests import Entries, Manifest, differences, golden

FILE, DIR, LINK = 1, 2, 7
NOBODY = 65534
PLAIN = words(golden("plain"))

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def paths_below(top: Path) -> list[Path]:
    """All paths below a directory.  Path.rglob of Python 3.11.2 trips over links of 4000 bytes."""
    return [Path(d, name) for d, ds, fs in os.walk(top) for name in ds + fs]


def everything_below(top: Path) -> dict[str, bytes | str]:
    """A fingerprint of a tree: contents and link targets by path."""
    found: dict[str, bytes | str] = {}
    for path in sorted(paths_below(top)):
        kind = stat.S_IFMT(path.lstat().st_mode)
        if kind == stat.S_IFREG:
            found[str(path.relative_to(top))] = path.read_bytes()
        elif kind == stat.S_IFLNK:
            found[str(path.relative_to(top))] = os.readlink(path)
        else:
            found[str(path.relative_to(top))] = oct(kind)
    return found


# --- everything arrives -----------------------------------------------------------------------


@as_root
@every_image
def test_as_root_everything_is_as_it_was(run: Run, want: Manifest, tmp_path: Path) -> None:
    done = run("extract", *words(want), "-C", tmp_path / "out")
    assert done == Done(0, b"", "")
    assert differences(want, extracted(want, tmp_path / "out")) == []


@pytest.fixture(scope="session")
def without_privileges() -> list[str]:
    """The words that run a command as nobody.  It may read everything, because Python itself may
    lie where nobody else can, but change nothing."""
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


def as_nobody_has_it(want: Manifest, uid: int, gid: int) -> Entries:
    """What is left of a manifest's entries without any privilege."""
    found = {}
    for path, entry in want.entries.items():
        if stat.S_ISCHR(entry["mode"]) or stat.S_ISBLK(entry["mode"]):
            continue
        mine = dict(entry, uid=uid, gid=gid)
        if (entry["uid"], entry["gid"]) != (uid, gid):
            mine["mode"] &= ~(stat.S_ISUID | stat.S_ISGID)
        xattrs = entry.get("xattrs", {})
        xattrs = {n: v for n, v in xattrs.items() if n.startswith(("user.", "system."))}
        mine.pop("xattrs", None)
        found[path] = mine | ({"xattrs": xattrs} if xattrs else {})
    return found


@pytest.mark.parametrize(
    "name", ["plain", "kitchen-sink", "blobdev", "lzma", "xattr-prefix", "b8k"]
)
def test_as_nobody_what_is_permitted(
    run_process: RunProcess, name: str, tmp_path: Path, without_privileges: list[str]
) -> None:
    want = golden(name)
    uid, gid = (NOBODY, NOBODY) if without_privileges else (os.geteuid(), os.getegid())
    os.chown(tmp_path, uid, gid)
    done = run_process(
        "extract", *words(want), "-C", tmp_path / "out", under=without_privileges, umask=0o077
    )
    assert (done.status, done.out) == (0, b"")
    expected = as_nobody_has_it(want, uid, gid)
    mine = Manifest(want.name, want.image, want.devices, want.offset, want.oracle, expected)
    assert differences(mine, extracted(mine, tmp_path / "out")) == []
    with open_golden(want) as image:
        inodes = {i.nid: i for i in (image.lookup(p, follow_symlinks=False) for p in want.entries)}
        devices = [i for i in inodes.values() if i.rdev]
        lost = [
            name
            for i in inodes.values()
            for name in image.xattrs(i)
            if name.startswith(("trusted.", "security."))
        ]
    counts = f"{len(devices)} devices, {len(inodes) - len(devices)} owners, {len(lost)} xattrs"
    assert done.err == f"pyerofs: could not set (not root): {counts}\n"


def test_as_nobody_xattrs_of_files_that_may_not_be_written(
    run_process: RunProcess, tmp_path: Path, without_privileges: list[str]
) -> None:
    """The mode must not be there before the attributes are."""
    attributes = hm.xattrs(hm.xattr(1, b"name", b"value"))
    image = handmade({b"f": hm.inline(b"x", mode=stat.S_IFREG | 0o444, xattrs=attributes)})
    (tmp_path / "image").write_bytes(image)
    os.chown(tmp_path, NOBODY, NOBODY) if without_privileges else None
    done = run_process(
        "extract", tmp_path / "image", "-C", tmp_path / "out", under=without_privileges
    )
    assert "xattrs" not in done.err
    assert os.getxattr(tmp_path / "out" / "f", "user.name") == b"value"
    assert stat.S_IMODE((tmp_path / "out" / "f").stat().st_mode) == 0o444


def test_hard_links_are_links(run: Run, tmp_path: Path) -> None:
    run("extract", *PLAIN, "-C", tmp_path)
    names = ["hard-1", "hard-3", "many/hard-2"]
    assert len({(tmp_path / name).stat().st_ino for name in names}) == 1
    assert (tmp_path / "hard-1").stat().st_nlink == 3


@pytest.mark.parametrize("name", ["chunk4k", "chunk-indexes", "chunk-blockmap", "48bit-chunk"])
def test_holes_stay_holes(run: Run, name: str, tmp_path: Path) -> None:
    want = golden(name)
    with open_golden(want) as image:
        holes = sum(e.length for e in image.extents("sparse") if e.kind == HOLE)
    assert run("extract", *words(want), "sparse", "-C", tmp_path).status == 0
    status = (tmp_path / "sparse").stat()
    assert status.st_size == want.entries["sparse"]["size"]
    assert holes > 0
    assert status.st_blocks * 512 <= status.st_size - holes + 8192


def test_a_file_that_is_one_hole(run: Run, tmp_path: Path) -> None:
    image = handmade({b"hole": hm.plain(1 << 33, 0xFFFFFFFF, extended=True, high=0xFFFF)})
    (tmp_path / "image").write_bytes(image)
    assert run("extract", tmp_path / "image", "-C", tmp_path / "out").status == 0
    status = (tmp_path / "out" / "hole").stat()
    assert (status.st_size, status.st_blocks) == (1 << 33, 0)


def test_more_directories_than_files_may_be_open(run_process: RunProcess, tmp_path: Path) -> None:
    # inodes of 64 bytes: two nids each
    directories = {b"%04d" % i: directory(2 + 2 * i, {}) for i in range(500)}
    image = handmade(directories, block_bits=14)
    (tmp_path / "image").write_bytes(image)
    done = run_process(
        "extract",
        tmp_path / "image",
        "-C",
        tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)),
    )
    assert done == Done(0, b"", "")
    assert len(list((tmp_path / "out").iterdir())) == 500


# --- options ----------------------------------------------------------------------------------


def test_into_the_current_directory(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("extract", *PLAIN, "text").status == 0
    assert os.listdir() == ["text"]


def test_the_directory_is_made_with_its_parents(run: Run, tmp_path: Path) -> None:
    assert run("extract", *PLAIN, "text", "-C", tmp_path / "a/b/c").status == 0
    assert (tmp_path / "a/b/c/text").exists()


def test_the_directory_may_be_a_link(run: Run, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert run("extract", *PLAIN, "text", "-C", tmp_path / "link").status == 0
    assert (tmp_path / "real" / "text").exists()


def test_the_directory_may_not_be_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("extract", *PLAIN, "-C", tmp_path / "file")
    assert done.status == 1
    assert done.err == f"pyerofs: {tmp_path / 'file'}: Not a directory\n"


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["text"], {"text"}),
        (["/text", "noise"], {"text", "noise"}),
        (["many/hard-2"], {"many", "many/hard-2"}),
        (["deep0/deep1/deep2/deep3/deep4/deep5/deep6/deep7/deep8/deep9/deep10/deep11"], "deep0"),
        (["deep0"], "deep0"),
        (["empty-dir/"], {"empty-dir"}),
        (["link-short"], {"link-short"}),
        (["./deep0//.//", "size-1"], "deep0+size-1"),
        (["hard-1", "many/hard-2"], {"hard-1", "many", "many/hard-2"}),
    ],
)
def test_paths(run: Run, tmp_path: Path, paths: list[str], expected: set[str] | str) -> None:
    want = golden("plain")
    if isinstance(expected, str):
        top, _, more = expected.partition("+")
        expected = {p for p in want.entries if p.split("/")[0] == top} | ({more} - {""})
    done = run("extract", *PLAIN, *paths, "-C", tmp_path)
    assert done == Done(0, b"", "")
    assert set(everything_below(tmp_path)) == expected
    for path in expected:
        if stat.S_ISREG(want.entries[path]["mode"]):
            content = (tmp_path / path).read_bytes()
            assert hashlib.sha256(content).hexdigest() == want.entries[path]["sha256"]


@pytest.mark.parametrize("path", ["/", ".", "", "many/.."])
def test_the_root_as_a_path(run: Run, tmp_path: Path, path: str) -> None:
    done = run("extract", *PLAIN, path, "-C", tmp_path)
    if ".." in path:
        assert done.status == 1
        assert everything_below(tmp_path) == {}
    else:
        assert done.status == 0
        assert len(everything_below(tmp_path)) == len(golden("plain").entries) - 1


@pytest.mark.parametrize("path", ["missing", "text/x", "many/missing", "text/"])
def test_paths_that_are_not_there(run: Run, tmp_path: Path, path: str) -> None:
    done = run("extract", *PLAIN, path, "-C", tmp_path)
    assert done.status == 1
    assert path in done.err
    assert everything_below(tmp_path) == {}


@as_root
def test_no_same_owner(run: Run, tmp_path: Path) -> None:
    assert run("extract", "--no-same-owner", *PLAIN, "bigids", "setuid", "-C", tmp_path).status == 0
    assert (tmp_path / "bigids").stat().st_uid == 0
    assert (tmp_path / "bigids").stat().st_gid == 0
    assert stat.S_IMODE((tmp_path / "setuid").stat().st_mode) == 0o4755  # root's own


def test_no_xattrs(run: Run, tmp_path: Path) -> None:
    assert run("extract", "--no-xattrs", *PLAIN, "xattr-1", "-C", tmp_path).status == 0
    assert not [n for n in os.listxattr(tmp_path / "xattr-1") if n.startswith("user.")]
    assert run("extract", *PLAIN, "xattr-1", "-C", tmp_path / "with").status == 0
    assert os.getxattr(tmp_path / "with" / "xattr-1", "user.common") == b"shared-value"


# --- what is there already --------------------------------------------------------------------


def test_what_exists_is_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("mine")
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "also mine").touch()
    (tmp_path / "link-short").write_text("mine too")
    done = run("extract", *PLAIN, "-C", tmp_path)
    assert done.status == 1
    assert "pyerofs: text: File exists\n" in done.err
    assert "pyerofs: link-short: File exists\n" in done.err
    assert done.err.endswith("pyerofs: 2 files could not be extracted\n")
    assert (tmp_path / "text").read_text() == "mine"
    assert (tmp_path / "link-short").read_text() == "mine too"
    assert (tmp_path / "many" / "also mine").exists()
    assert len(everything_below(tmp_path)) == len(golden("plain").entries)


def test_links_are_not_made_to_what_was_there(run: Run, tmp_path: Path) -> None:
    """Should the first of a file's names exist, the others must not become that."""
    want = golden("plain")
    names = ["hard-1", "hard-3", "many/hard-2"]
    (tmp_path / "hard-1").write_text("mine")
    assert run("extract", *PLAIN, *names, "-C", tmp_path).status == 1
    assert (tmp_path / "hard-1").read_text() == "mine"
    assert (tmp_path / "hard-1").stat().st_nlink == 1
    for name in names[1:]:
        if (tmp_path / name).exists():
            content = (tmp_path / name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == want.entries[name]["sha256"]


def test_overwrite(run: Run, tmp_path: Path) -> None:
    want = golden("plain")
    (tmp_path / "text").write_text("old")
    (tmp_path / "hard-3").write_text("old")
    (tmp_path / "link-short").write_text("old")
    (tmp_path / "noise").symlink_to("nowhere")
    (tmp_path / "fifo").symlink_to("nowhere")
    done = run("extract", "--overwrite", *PLAIN, "-C", tmp_path)
    assert done == Done(0, b"", "")
    for _ in range(2):
        missing = [p for p in want.entries if not os.path.lexists(tmp_path / p)]
        assert missing == []
        if os.geteuid() == 0:
            assert differences(want, extracted(want, tmp_path)) == []
        assert run("extract", "--overwrite", *PLAIN, "-C", tmp_path) == Done(0, b"", "")


def test_overwrite_replaces_no_directory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "mine").touch()
    done = run("extract", "--overwrite", *PLAIN, "text", "-C", tmp_path)
    assert done.status == 1
    assert (tmp_path / "text" / "mine").exists()


def test_a_file_that_can_not_be_decoded_is_not_left_behind(run: Run, tmp_path: Path) -> None:
    want = golden("zstd-C128k")
    data = bytearray(want.image.read_bytes())
    with open_golden(want) as image:
        (extent,) = image.extents("text")
    data[extent.address : extent.address + extent.size] = bytes(extent.size)
    (tmp_path / "image").write_bytes(data)
    done = run("extract", tmp_path / "image", "-C", tmp_path / "out")
    assert done.status == 1
    assert "pyerofs: text: corrupt image: pcluster" in done.err
    assert set(everything_below(tmp_path / "out")) == set(want.entries) - {".", "text"}


@as_root
def test_a_full_disk(run: Run, tmp_path: Path) -> None:
    """No half a file, and a message."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("can't mount a tmpfs")
    try:
        done = run("extract", *PLAIN, "-C", small)
        assert done.status == 1
        assert "No space left on device" in done.err
        want = golden("plain")
        for path in paths_below(small):
            expected = want.entries[str(path.relative_to(small))]
            if "sha256" in expected:
                assert hashlib.sha256(path.read_bytes()).hexdigest() == expected["sha256"]
    finally:
        subprocess.run(["umount", small], check=True)


# --- nothing arrives outside ------------------------------------------------------------------


@pytest.fixture(name="outside")
def watch(tmp_path: Path) -> Iterator[Path]:
    """A directory beside the target in which nothing may change."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    yield outside
    assert everything_below(outside) == {"file": b"precious"}
    assert sorted(os.listdir(tmp_path)) in (["image", "out", "outside"], ["out", "outside"])


def save(path: Path, image: bytes) -> Path:
    path.write_bytes(image)
    return path


@pytest.mark.parametrize(
    "name",
    [
        b"../evil",
        b"/evil",
        b"a/b",
        b"../outside/evil",
        b"..\0",
        b"x\0y",
        b"",
        b"outside/../../evil",
        b"x" * 256,
    ],
)
@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_names_that_are_none(
    run: Run, tmp_path: Path, outside: Path, name: bytes, kind: str
) -> None:
    inode = {
        "file": hm.inline(b"evil"),
        "directory": directory(4, {b"evil": (2, FILE)}),
        "link": symlink(os.fsencode(outside)),
    }[kind]
    image = handmade({b"first": hm.inline(b"evil"), b"zz" + name: inode})
    # in place of the name that the image was made with
    image = image.replace(b"zz" + name, name.ljust(len(name) + 2, b"\0"), 1)
    assert b"zz" + name not in image
    done = run("extract", "--overwrite", save(tmp_path / "image", image), "-C", tmp_path / "out")
    if name in (b"..\0", b"x\0y"):
        # what follows the NUL is no part of the last name
        assert done.status in (0, 1)
    else:
        assert done.status == 1
        assert "bad name" in done.err or "without a name" in done.err


@pytest.mark.parametrize("target", [DIR, FILE, LINK])
@pytest.mark.parametrize("name", [b"..", b"."])
def test_dots_are_never_created(
    run: Run, tmp_path: Path, outside: Path, name: bytes, target: int
) -> None:
    """A second ``.`` or ``..`` that leads elsewhere."""
    files = {
        b".file": hm.inline(b"evil"),  # nid 2
        b".link": symlink(os.fsencode(outside)[:20]),  # nid 4
        b".dir": directory(6, {b"evil": (2, FILE)}),  # nid 6
        b"zz": directory(8, {name + b"\xff": ({DIR: 6, FILE: 2, LINK: 4}[target], target)}),
    }
    image = handmade(files).replace(name + b"\xff", name + b"\0", 1)
    done = run("extract", save(tmp_path / "image", image), "-C", tmp_path / "out")
    assert done.status in (0, 1)
    assert not (tmp_path / "evil").exists()
    assert os.listdir(tmp_path / "out" / "zz") == []


@pytest.mark.parametrize("evil", [b"../pwn", b"/pwned", b"a/b/cd"])
def test_a_real_image_with_another_name_in_it(
    run: Run, tmp_path: Path, outside: Path, evil: bytes
) -> None:
    data = golden("nosbcrc").image.read_bytes()
    assert data.count(b"size-1size") == 1
    image = data.replace(b"size-1size", evil + b"size")
    done = run("extract", save(tmp_path / "image", image), "-C", tmp_path / "out")
    assert done.status == 1
    assert "bad name" in done.err
    assert set(os.listdir(tmp_path)) == {"image", "out", "outside"}


@pytest.mark.parametrize("link_first", [False, True])
@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_link_and_a_directory_of_the_same_name(
    run: Run, tmp_path: Path, outside: Path, link_first: bool, options: list[str]
) -> None:
    """The image itself makes the link that its directory would be written through."""
    entries = (
        {b"xa": (4, LINK), b"xb": (6, DIR)} if link_first else {b"xa": (6, DIR), b"xb": (4, LINK)}
    )
    image = handmade(
        {
            b".file": hm.inline(b"evil"),  # nid 2
            b".link": symlink(b"../outside"),  # nid 4
            b".dir": directory(6, {b"evil": (2, FILE), b"file": (2, FILE)}),  # nid 6
        },
        elsewhere=entries,
        hidden=[b".link", b".dir"],
    )
    image = image.replace(b"xaxb", b"xbxb")
    for _ in range(2):  # the second time, the first one's leftovers are there
        done = run("extract", *options, save(tmp_path / "image", image), "-C", tmp_path / "out")
        assert done.status == 1
        assert "xb" in done.err


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
@pytest.mark.parametrize("paths", [[], ["many"], ["many/hard-2"], ["hard-1", "many/hard-2"]])
def test_a_link_in_the_target_in_place_of_a_directory(
    run: Run, tmp_path: Path, outside: Path, options: list[str], paths: list[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "many").symlink_to(outside)
    done = run("extract", *options, *PLAIN, *paths, "-C", tmp_path / "out")
    assert done.status == 1
    assert "many" in done.err
    assert (tmp_path / "out" / "many").is_symlink()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("path", ["text", "hard-3", "fifo", "link-short"])
def test_a_link_in_the_target_in_place_of_a_file(
    run: Run, tmp_path: Path, outside: Path, overwrite: bool, path: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / path).symlink_to(outside / "file")
    options = ["--overwrite"] if overwrite else []
    done = run("extract", *options, *PLAIN, "-C", tmp_path / "out")
    assert done.status == (0 if overwrite else 1)
    status = (tmp_path / "out" / path).lstat()
    if overwrite:
        assert stat.S_IFMT(status.st_mode) == stat.S_IFMT(golden("plain").entries[path]["mode"])
    else:
        assert os.readlink(tmp_path / "out" / path) == str(outside / "file")


@pytest.mark.parametrize("path", ["../outside", "many/../../outside", ".."])
def test_dots_in_the_paths_to_extract(run: Run, tmp_path: Path, outside: Path, path: str) -> None:
    (tmp_path / "out").mkdir()
    done = run("extract", *PLAIN, path, "-C", tmp_path / "out")
    assert done.status == 1
    assert everything_below(tmp_path / "out") == {}


def test_a_path_through_a_link_of_the_image(run: Run, tmp_path: Path, outside: Path) -> None:
    """Is resolved in the image, and what it goes through becomes directories."""
    image = handmade(
        {
            b"file": hm.inline(b"good"),  # nid 2
            b"dir": directory(4, {b"in": (2, FILE)}),
            b"link": symlink(b"/dir"),
        }
    )
    done = run("extract", save(tmp_path / "image", image), "link/in", "-C", tmp_path / "out")
    assert done.status == 0
    assert everything_below(tmp_path / "out") == {"link": oct(stat.S_IFDIR), "link/in": b"good"}


def test_a_directory_inside_itself(run: Run, tmp_path: Path, outside: Path) -> None:
    image = handmade({b"a": directory(2, {b"again": (2, DIR)})})
    done = run("extract", save(tmp_path / "image", image), "-C", tmp_path / "out")
    assert done.status == 1
    assert "directory reached twice" in done.err

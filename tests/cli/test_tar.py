"""``pyerofs tar``: what other programs make of the stream."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from pyerofs.cli.tar import RECORD
from tests import handmade as hm
from tests.cli.conftest import Run, RunProcess
from tests.helpers import directory, every_image, extracted, handmade, open_golden, words
from tests.manifests import Entries, Manifest, differences, golden

PLAIN = words(golden("plain"))
KINDS = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


def without_sockets(want: Manifest) -> Manifest:
    entries = {p: e for p, e in want.entries.items() if not stat.S_ISSOCK(e["mode"])}
    return Manifest(want.name, want.image, want.devices, want.offset, want.oracle, entries)


def gnu_tar() -> str:
    found = shutil.which("tar")
    if found is None or b"GNU tar" not in subprocess.check_output([found, "--version"]):
        pytest.skip("no GNU tar")
    return found


def unpack(archive: Path, top: Path) -> str:
    """Have GNU tar unpack it; returns what that had to say."""
    top.mkdir()
    options = [
        "--xattrs",
        "--xattrs-include=*",
        "--numeric-owner",
        "--warning=no-timestamp",
        "-xpf",
    ]
    done = subprocess.run(
        [gnu_tar(), *options, archive, "-C", top], capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


# --- GNU tar ----------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@every_image
def test_gnu_tar_restores_everything(run: Run, want: Manifest, tmp_path: Path) -> None:
    done = run("tar", *words(want), "-o", tmp_path / "tar")
    sockets = sum(stat.S_ISSOCK(e["mode"]) for e in want.entries.values())
    assert (done.status, done.out) == (0, b"")
    assert done.err == ("pyerofs: 1 sockets left out (tar can't hold them)\n" if sockets else "")
    assert unpack(tmp_path / "tar", tmp_path / "out") == ""
    expected = without_sockets(want)
    assert differences(expected, extracted(expected, tmp_path / "out")) == []
    names = ["hard-1", "hard-3", "many/hard-2"]
    assert len({(tmp_path / "out" / name).stat().st_ino for name in names}) == 1


def test_gnu_tar_finds_nothing_to_complain_about(run: Run, tmp_path: Path) -> None:
    run("tar", *PLAIN, "-o", tmp_path / "tar")
    done = subprocess.run(
        [gnu_tar(), "--numeric-owner", "--full-time", "-tvf", tmp_path / "tar"],
        capture_output=True,
        check=True,
        env={"TZ": "UTC", "LC_ALL": "C"},
    )
    assert done.stderr == b""
    rows = {row.split()[5]: row.split() for row in done.stdout.decode("latin-1").splitlines()}
    assert rows["./bigids"][:3] == ["-rw-r--r--", "70000/4000000000", "3"]
    assert rows["./future"][3:5] == ["2242-03-16", "12:56:32.999999999"]
    assert rows["./old"][3:5] == ["1970-01-01", "00:00:05.000000007"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_attributes_with_awkward_names_and_values(run: Run, tmp_path: Path) -> None:
    expected = {
        b"user.empty": b"",
        b"user.newline": b"a\nb=c\n",
        b"user.binary": bytes(range(256)),
        b"user.with=equals": b"1",
        b"user.with%percent": b"2",
        b"user.with%3Dboth=": b"3",
        b"user.latin-\xe9": b"4",
    }
    entries = b"".join(hm.xattr(1, name[5:], value) for name, value in expected.items())
    (tmp_path / "image").write_bytes(handmade({b"f": hm.inline(b"x", xattrs=hm.xattrs(entries))}))
    run("tar", tmp_path / "image", "-o", tmp_path / "tar")
    assert unpack(tmp_path / "tar", tmp_path / "out") == ""
    path = os.fsencode(tmp_path / "out" / "f")
    found = {os.fsencode(n): os.getxattr(path, n) for n in os.listxattr(path)}
    assert {n: v for n, v in found.items() if n.startswith(b"user.")} == expected


# --- Python's tarfile -------------------------------------------------------------------------


def entries_of(archive: tarfile.TarFile) -> Entries:
    """An archive's members in the manifests' terms."""
    found: Entries = {}
    for member in archive:
        name = member.name.removeprefix("./") or "."
        if member.islnk():
            found[name] = found[member.linkname.removeprefix("./")]
            continue
        mtime = member.pax_headers.get("mtime", f"{int(member.mtime)}.0")
        seconds, _, fraction = mtime.partition(".")
        item = found[name] = {
            "mode": member.mode | KINDS[member.type],
            "uid": member.uid,
            "gid": member.gid,
            "size": member.size,
            "mtime_ns": int(seconds) * 10**9 + int(fraction.ljust(9, "0")),
        }
        if member.isfile():
            content = archive.extractfile(member)
            assert content is not None
            item["sha256"] = hashlib.sha256(content.read()).hexdigest()
        if member.issym():
            item |= {"target": member.linkname, "size": len(os.fsencode(member.linkname))}
        if member.isdev() and not member.isfifo():
            item["rdev"] = [member.devmajor, member.devminor]
        xattrs = {
            key.removeprefix("SCHILY.xattr."): os.fsencode(value).hex()
            for key, value in member.pax_headers.items()
            if key.startswith("SCHILY.xattr.")
        }
        item |= {"xattrs": xattrs} if xattrs else {}
    return found


@every_image
def test_python_reads_everything(run: Run, want: Manifest, tmp_path: Path) -> None:
    assert run("tar", *words(want), "-o", tmp_path / "tar").status == 0
    with tarfile.open(tmp_path / "tar") as archive:
        got = entries_of(archive)
        links = [m for m in archive if m.islnk()]
    expected = without_sockets(want)
    for path, item in expected.entries.items():
        got[path]["nlink"] = item.get("nlink", 1)
        if stat.S_ISDIR(item["mode"]) and "size" in item:
            got[path]["size"] = item["size"]
    assert differences(expected, got) == []
    assert len(links) == 2
    assert (tmp_path / "tar").stat().st_size % RECORD == 0


@pytest.fixture(name="odd")
def build(tmp_path: Path) -> Path:
    """Names, targets, ids and times that the old header can't hold."""
    folder = b"d" * 90
    image = handmade(
        {
            b"file": hm.inline(b"x"),  # nid 2
            folder: directory(4, {b"n" * 20: (2, 1)}),  # ./ddd…/ is 93 bytes
            b"n" * 98: hm.inline(b"a"),
            b"n" * 99: hm.inline(b"b"),
            b"n" * 255: hm.inline(b"c"),
            b"latin-\xe9": hm.inline(b"d"),
            "日本".encode(): hm.inline(b"e"),
            b"link-100": hm.inline(b"t" * 100, mode=0o120777),
            b"link-101": hm.inline(b"t" * 101, mode=0o120777),
            b"link-latin": hm.inline(b"\xe9", mode=0o120777),
            b"big": hm.inline(b"f", extended=True),  # uid 1000, gid 70000
        }
    )
    (tmp_path / "image").write_bytes(image)
    return tmp_path / "image"


def test_what_the_old_header_can_not_hold(run: Run, odd: Path, tmp_path: Path) -> None:
    assert run("tar", odd, "-o", tmp_path / "tar").status == 0
    with tarfile.open(tmp_path / "tar") as archive:
        members = {m.name: m for m in archive}
    assert f"./{'d' * 90}/{'n' * 20}" in members
    assert {f"./{'n' * n}" for n in (98, 99, 255)} <= members.keys()
    assert {"./latin-\udce9", "./日本"} <= members.keys()
    assert members["./link-100"].linkname == "t" * 100
    assert "linkpath" not in members["./link-100"].pax_headers
    assert members["./link-101"].linkname == "t" * 101
    assert members["./link-latin"].linkname == "\udce9"
    assert members["./big"].gid == 70000


@pytest.mark.parametrize(
    ("seconds", "nanoseconds", "expected"),
    [
        (0, 0, None),
        (1, 500_000_000, "1.500000000"),
        (8_589_934_591, 0, None),
        (8_589_934_592, 0, "8589934592.000000000"),
        (-1, 0, "-1.000000000"),
        (-1, 750_000_000, "-0.250000000"),
        (-2, 1, "-1.999999999"),
    ],
)
def test_times(
    run: Run, tmp_path: Path, seconds: int, nanoseconds: int, expected: str | None
) -> None:
    """As PAX has it: a fraction counts away from zero."""
    image = handmade({b"f": hm.inline(b"x")}, epoch=seconds - 7, fixed_nsec=nanoseconds)
    (tmp_path / "image").write_bytes(image)
    run("tar", tmp_path / "image", "-o", tmp_path / "tar")
    with tarfile.open(tmp_path / "tar") as archive:
        member = archive.getmember("./f")
        assert member.pax_headers.get("mtime") == expected
        assert member.mtime == pytest.approx(seconds + nanoseconds / 1e9)


# --- the command ------------------------------------------------------------------------------


def test_to_stdout_is_the_same_as_to_a_file(run: Run, tmp_path: Path) -> None:
    assert run("tar", *PLAIN, "-o", tmp_path / "tar").status == 0
    done = run("tar", *PLAIN)
    assert done.status == 0
    assert done.out == (tmp_path / "tar").read_bytes()
    assert done.err == "pyerofs: 1 sockets left out (tar can't hold them)\n"


def test_into_a_pipe(run_process: RunProcess) -> None:
    done = run_process("tar", *PLAIN)
    with tarfile.open(fileobj=io.BytesIO(done.out), mode="r|") as archive:
        assert sum(1 for _ in archive) == len(without_sockets(golden("plain")).entries)


def test_a_part(run: Run, tmp_path: Path) -> None:
    assert run("tar", *PLAIN, "many", "-o", tmp_path / "tar").status == 0
    with tarfile.open(tmp_path / "tar") as archive:
        names = archive.getnames()
        assert names[0] == "."
        assert len(names) == 42
        hard = archive.getmember("./hard-2")
        assert hard.isfile()  # its other names are not in there
        assert hard.size == 9000


def test_without_xattrs(run: Run, tmp_path: Path) -> None:
    run("tar", "--no-xattrs", *PLAIN, "-o", tmp_path / "tar")
    with tarfile.open(tmp_path / "tar") as archive:
        assert not any(key.startswith("SCHILY") for m in archive for key in m.pax_headers)


@pytest.mark.parametrize("path", ["text", "missing", "link-short"])
def test_what_is_no_directory(run: Run, tmp_path: Path, path: str) -> None:
    done = run("tar", *PLAIN, path, "-o", tmp_path / "tar")
    assert done.status == 1
    assert path in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_archive(run: Run, tmp_path: Path) -> None:
    want = golden("zstd-C128k")
    data = bytearray(want.image.read_bytes())
    with open_golden(want) as image:
        (extent,) = image.extents("text")
    data[extent.address : extent.address + extent.size] = bytes(extent.size)
    (tmp_path / "image").write_bytes(data)
    (tmp_path / "tar").write_text("old")
    done = run("tar", tmp_path / "image", "-o", tmp_path / "tar")
    assert done.status == 1
    assert "corrupt image" in done.err
    assert (tmp_path / "tar").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image", "tar"]


def test_an_output_that_can_not_be_made(run: Run, tmp_path: Path) -> None:
    done = run("tar", *PLAIN, "-o", tmp_path / "absent" / "tar")
    assert done.status == 1
    assert "No such file or directory" in done.err
    assert str(tmp_path / "absent") in done.err

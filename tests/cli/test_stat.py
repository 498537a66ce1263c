"""``pyerofs stat``."""

from __future__ import annotations

import stat

import pytest

from tests.cli.conftest import Run
from tests.helpers import every_image, words
from tests.manifests import Manifest, differences, golden

PLAIN = words(golden("plain"))


@every_image
def test_json(run: Run, want: Manifest) -> None:
    paths = [p for p in want.entries if not p.startswith("-")]
    done = run("stat", "--json", *words(want), *paths)
    assert (done.status, done.err) == (0, "")
    types = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "symlink": stat.S_IFLNK,
             "fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "character device": stat.S_IFCHR,
             "block device": stat.S_IFBLK}  # fmt: skip
    got = {}
    for row in done.json:
        expected = want.entries[row["path"]]
        found = {k: row[k] for k in ("uid", "gid", "nlink", "size", "mtime_ns")}
        found["mode"] = int(row["mode"], 8) | types[row["type"]]
        found |= {k: row[k] for k in ("xattrs", "target", "rdev") if k in row}
        if "sha256" in expected:
            found["sha256"] = expected["sha256"]
        got[row["path"]] = found
        if row["type"] in ("file", "directory", "symlink"):
            assert sum(e["length"] for e in row["extents"]) == row["size"]
        else:
            assert "extents" not in row
    assert differences(want, got) == []


def test_text(run: Run) -> None:
    done = run("stat", *PLAIN, "xattr-1")
    assert (done.status, done.err) == (0, "")
    facts = dict(line.split(":", 1) for line in done.lines if not line.startswith("  "))
    assert facts["path"].strip() == "xattr-1"
    assert facts["type"].strip() == "file"
    assert facts["mode"].strip() == "0644"
    assert facts["size"].strip() == "300"
    assert "  xattr user.common = 7368617265642d76616c7565" in done.lines


def test_extents_in_text(run: Run) -> None:
    lines = run("stat", "-x", *words(golden("zstd-C128k")), "text").lines
    (extent,) = [line for line in lines if line.startswith("  extent")]
    assert "start 0, length 40425, kind encoded" in extent
    assert extent.endswith("algorithm zstd")
    assert not [line for line in run("stat", *PLAIN, "text").lines if "extent" in line]


@pytest.mark.parametrize(
    ("name", "path", "kinds"),
    [
        ("plain", "text", ["plain", "inline"]),
        ("frag-zstd", "text", ["fragment"]),
        ("chunk-indexes", "sparse", ["hole", "plain"]),
        ("zstd", "zeros", ["encoded"]),
    ],
)
def test_kinds_of_extents(run: Run, name: str, path: str, kinds: list[str]) -> None:
    (row,) = run("stat", "--json", *words(golden(name)), path).json
    assert sorted({e["kind"] for e in row["extents"]}) == sorted(kinds)
    for extent in row["extents"]:
        assert ("address" in extent) == (extent["kind"] != "hole")


def test_follow(run: Run) -> None:
    (row,) = run("stat", "--json", *PLAIN, "link-short").json
    assert (row["type"], row["target"]) == ("symlink", "text")
    (row,) = run("stat", "-L", "--json", *PLAIN, "link-short").json
    assert (row["type"], row["size"]) == ("file", 40425)


def test_devices(run: Run) -> None:
    (row,) = run("stat", "--json", *PLAIN, "blk").json
    assert row["rdev"] == [259, 1234]


def test_one_that_is_missing(run: Run) -> None:
    for option in ([], ["--json"]):
        done = run("stat", *option, *PLAIN, "text", "missing")
        assert done.status == 1
        assert "missing" in done.err
        assert done.out == b""

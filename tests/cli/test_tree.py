"""``pyerofs tree``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import handmade as hm
from tests.cli.conftest import Run
from tests.helpers import directory, every_image, handmade, symlink, words
from tests.manifests import Manifest, golden

FILE, DIR = 1, 2


@pytest.fixture(name="image")
def build(tmp_path: Path) -> Path:
    """::

    a/b/deep, a/file, link -> a, zz
    """
    image = handmade(
        {
            b".file": hm.inline(b"x"),  # nid 2
            b".inner": directory(4, {b"deep": (2, FILE)}),
            b"a": directory(6, {b"b": (4, DIR), b"file": (2, FILE)}),
            b"link": symlink(b"a"),
            b"zz": hm.inline(b"x"),
        },
        hidden=[b".inner"],
    )
    (tmp_path / "image").write_bytes(image)
    return tmp_path / "image"


def test_drawing(run: Run, image: Path) -> None:
    assert run("tree", image).text == (
        "/\n"
        "|-- .file\n"
        "|-- a\n"
        "|   |-- b\n"
        "|   |   `-- deep\n"
        "|   `-- file\n"
        "|-- link -> a\n"
        "`-- zz\n"
        "\n"
        "2 directories, 5 files\n"
    )


def test_of_a_directory_and_only_so_deep(run: Run, image: Path) -> None:
    assert run("tree", "-L", "1", image, "a").text == (
        "a\n|-- b\n`-- file\n\n1 directories, 1 files\n"
    )
    assert run("tree", "-L", "2", image, "/a").text == (
        "/a\n|-- b\n|   `-- deep\n`-- file\n\n1 directories, 2 files\n"
    )


def test_of_a_file(run: Run, image: Path) -> None:
    assert run("tree", image, "zz").text == "zz\n"


@every_image
def test_counts(run: Run, want: Manifest) -> None:
    directories = sum(e["mode"] & 0o170000 == 0o040000 for e in want.entries.values()) - 1
    done = run("tree", *words(want))
    assert (done.status, done.err) == (0, "")
    files = len(want.entries) - directories - 1
    assert done.lines[-1] == f"{directories} directories, {files} files"


def test_a_directory_inside_itself(run: Run, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(handmade({b"a": directory(2, {b"again": (2, DIR)})}))
    done = run("tree", tmp_path / "image")
    assert done.status == 1
    assert "directory reached twice (nid 2)" in done.err


def test_missing(run: Run) -> None:
    done = run("tree", *words(golden("plain")), "missing")
    assert (done.status, done.out) == (1, b"")

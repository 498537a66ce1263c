"""``pyerofs cat``."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest

from tests.cli.conftest import Done, Run, RunProcess
from tests.helpers import every_image, words
from tests.manifests import Manifest, golden

PLAIN = words(golden("plain"))


@every_image
def test_everything(run: Run, want: Manifest) -> None:
    files = {p: e for p, e in want.entries.items() if stat.S_ISREG(e["mode"])}
    done = run("cat", *words(want), *files)
    assert (done.status, done.err) == (0, "")
    at = 0
    for expected in files.values():
        content = done.out[at : at + expected["size"]]
        assert hashlib.sha256(content).hexdigest() == expected["sha256"]
        at += expected["size"]
    assert at == len(done.out)


def test_through_a_link(run: Run) -> None:
    assert run("cat", *PLAIN, "link-short").out == run("cat", *PLAIN, "/text").out


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("many", "is a directory"),
        ("fifo", "not a regular file"),
        ("missing", "no such file or directory in the image"),
        ("dangling", "no such file or directory in the image"),
        ("text/x", "not a directory"),
    ],
)
def test_what_has_no_data(run: Run, path: str, message: str) -> None:
    assert run("cat", *PLAIN, path) == Done(1, b"", f"pyerofs: {message}: '{path}'\n")


def test_what_comes_before_an_error_is_written(run_process: RunProcess) -> None:
    done = run_process("cat", *PLAIN, "size-1", "missing", "size-511")
    assert done.status == 1
    assert len(done.out) == 1
    assert "missing" in done.err


def test_corrupt_data(run: Run, tmp_path: Path) -> None:
    want = golden("zstd-C128k")
    (row,) = run("stat", "--json", *words(want), "text").json
    (extent,) = row["extents"]
    data = bytearray(want.image.read_bytes())
    at = extent["address"]
    data[at : at + extent["encoded"]] = b"\xff" * extent["encoded"]
    (tmp_path / "image").write_bytes(data)
    done = run("cat", tmp_path / "image", "text")
    assert (done.status, done.out) == (1, b"")
    assert done.err.startswith(f"pyerofs: {tmp_path / 'image'}: corrupt image: pcluster: zstd")
    assert f"offset {at:#x}" in done.err

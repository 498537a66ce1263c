"""``pyerofs ls``."""

from __future__ import annotations

import os
import stat
from datetime import datetime
from pathlib import Path

import pytest

from tests import handmade as hm
from tests.cli.conftest import Run
from tests.helpers import directory, every_image, handmade, symlink, words
from tests.manifests import Manifest, golden

PLAIN = words(golden("plain"))


def names_in(want: Manifest, top: str) -> list[bytes]:
    """What the manifest has in a directory, in the order of bytes."""
    names = (p for p in want.entries if p != "." and os.path.dirname(p) == top)
    return sorted(os.fsencode(os.path.basename(p)) for p in names)


@every_image
def test_recursive_json_has_everything(run: Run, want: Manifest) -> None:
    done = run("ls", "-R", "--json", *words(want))
    assert (done.status, done.err) == (0, "")
    rows = {row["path"].removeprefix("/"): row for row in done.json}
    assert rows.keys() == want.entries.keys() - {"."}
    for path, row in rows.items():
        expected = want.entries[path]
        assert row["mode"] == f"{stat.S_IMODE(expected['mode']):04o}"
        assert row["mtime_ns"] == expected["mtime_ns"]
        assert row.get("target") == expected.get("target")
        assert row.get("rdev") == expected.get("rdev")


def test_a_directory(run: Run) -> None:
    want = golden("plain")
    for path in ("many", "/many", "many/"):
        assert run("ls", *PLAIN, path).out.split(b"\n")[:-1] == names_in(want, "many")
    assert b"\n".join([*names_in(want, ""), b""]) == run("ls", *PLAIN).out
    assert run("ls", *PLAIN, "empty-dir").out == b""


def test_a_file_and_a_link(run: Run) -> None:
    assert run("ls", *PLAIN, "text").lines == ["text"]
    assert run("ls", *PLAIN, "link-short").lines == ["link-short"]


def test_several(run: Run) -> None:
    done = run("ls", *PLAIN, "empty-dir", "deep0", "text")
    assert done.lines == ["empty-dir:", "", "deep0:", "deep1", "text"]


def test_recursive(run: Run) -> None:
    done = run("ls", "-R", *PLAIN, "deep0/deep1/deep2/deep3/deep4/deep5/deep6/deep7/deep8/deep9")
    top = "deep0/deep1/deep2/deep3/deep4/deep5/deep6/deep7/deep8/deep9"
    assert done.lines == [
        f"{top}:",
        "deep10",
        "",
        f"{top}/deep10:",
        "deep11",
        "",
        f"{top}/deep10/deep11:",
        "bottom",
    ]


def test_long(run: Run) -> None:
    time = datetime.fromtimestamp(1700000001).strftime("%Y-%m-%d %H:%M:%S")
    expected = {
        "text": f"-rw-r--r--   1     0     0      40425 {time} text",
        "bigids": f"-rw-r--r--   1 70000 4000000000          3 {time} bigids",
        "hard-1": f"-rw-r--r--   3     0     0       9000 {time} hard-1",
        "setuid": f"-rwsr-xr-x   1     0     0          2 {time} setuid",
        "link-short": f"lrwxrwxrwx   1     0     0          4 {time} link-short -> text",
        "fifo": f"prw-------   1     0     0          0 {time} fifo",
        "blk": f"brw-r-----   1     0     0  259, 1234 {time} blk",
    }
    assert run("ls", "-l", *PLAIN, *expected).lines == list(expected.values())
    assert set(expected.values()) <= set(run("ls", "-l", *PLAIN).lines)
    (future,) = run("ls", "-l", *PLAIN, "future").lines
    assert "2242-03-16" in future


@pytest.mark.parametrize("path", ["missing", "text/x", "dangling"])
def test_what_is_not_there(run: Run, path: str) -> None:
    done = run("ls", *PLAIN, path)
    assert (done.status, done.out) == (1, b"")
    assert done.err.startswith("pyerofs: ")
    assert path in done.err


@pytest.fixture(name="odd")
def build(tmp_path: Path) -> Path:
    image = handmade(
        {
            b"file": hm.inline(b"x"),  # nid 2
            b"dir": directory(4, {b"in": (2, 1)}),
            b"to-dir": symlink(b"dir"),
            b"latin-\xe9": hm.inline(b"x"),
            b"new\nline\x1b[31m": hm.inline(b"x"),
        }
    )
    (tmp_path / "image").write_bytes(image)
    return tmp_path / "image"


@pytest.mark.parametrize("path", ["to-dir", "to-dir/"])
def test_a_link_to_a_directory(run: Run, odd: Path, path: str) -> None:
    assert run("ls", odd, path).lines == ["in"]


def test_long_of_a_link_with_a_slash_is_the_directory(run: Run, odd: Path) -> None:
    done = run("ls", "-l", odd, "to-dir/")
    assert (done.status, done.err) == (0, "")
    assert done.lines[0].endswith(" in")


def test_names_come_out_as_they_are(run: Run, odd: Path) -> None:
    """In a pipe: nothing is escaped."""
    out = run("ls", odd).out
    assert b"latin-\xe9\n" in out
    assert b"new\nline\x1b[31m\n" in out
    paths = [row["path"] for row in run("ls", odd, "--json").json]
    assert "/latin-\udce9" in paths


def test_names_on_a_terminal_are_shown_and_not_obeyed(
    run: Run, odd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    out = run("ls", odd).out
    assert b"new\\nline\\x1b[31m\n" in out
    assert b"\x1b" not in out

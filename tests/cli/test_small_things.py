"""What newcomers trip over: devices that are not there, errors that are no OSErrors, images that are
closed, options in the wrong place."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyerofs
from pyerofs.errors import SourceError
from pyerofs.format import ondisk
from tests import handmade as hm
from tests.cli.conftest import Done, Run, RunProcess
from tests.helpers import handmade, open_golden, words
from tests.manifests import IMAGES, golden

NOBODY = 65534
PLAIN = words(golden("plain"))
ROOT = Path(__file__).parents[2]


# --- extra devices that are missing -----------------------------------------------------------

BLOCK = 4096
ON_DEVICES = 30  # files on extra devices, ten on each


def with_devices(mapped: bool = False, present: bool = False) -> bytes:
    """An image with files here and files on three extra devices, which may be ``mapped`` behind the
    image, and be there."""
    first = 100
    devices = [(10, first + 10 * i if mapped else 0) for i in range(3)]
    files = {
        b"far%02d" % i: hm.chunks(BLOCK, [(1 + i // 10, i % 10)]) for i in range(ON_DEVICES)
    } | {b"near": hm.inline(b"here")}
    data = {first: hm.noise(30 * BLOCK)} if present else None
    return handmade(
        files, data=data, devices=devices, incompat=ondisk.INCOMPAT_CHUNKED_FILE
    )  # fmt: skip


@pytest.fixture
def incomplete(tmp_path: Path) -> Path:
    """An image whose three extra devices are missing."""
    path = tmp_path / "it"
    path.write_bytes(with_devices())
    return path


def assert_warned(done: Done, count: int = 3) -> list[str]:
    """The first line on stderr says how many devices are missing; the others."""
    first, *others = done.err.splitlines()
    assert first.startswith("pyerofs: ")
    assert "--device" in first
    assert re.search(rf"\b{count}\b", re.sub(r"\S*/\S*", "", first))
    assert "missing" in first or "not given" in first
    assert not [line for line in others if "--device" in line]
    return others


@pytest.mark.parametrize(
    "command",
    [["info"], ["info", "--json"], ["ls"], ["ls", "-lR"], ["tree"], ["stat", "near"],
     ["stat", "far00"], ["cat", "near"]],
    ids=" ".join,
)  # fmt: skip
def test_what_is_here_can_be_read(run: Run, incomplete: Path, command: list[str]) -> None:
    verb, *rest = command
    done = run(verb, incomplete, *rest)
    assert done.status == 0
    assert assert_warned(done) == []
    assert "--device" not in done.text
    if "--json" in rest:
        assert len(json.loads(done.out)["devices"]) == 3
    if verb == "cat":
        assert done.out == b"here"


def test_a_file_on_a_missing_device(run: Run, incomplete: Path) -> None:
    done = run("cat", incomplete, "far00")
    assert (done.status, done.out) == (1, b"")
    first, *others = done.err.splitlines()
    assert "--device" in first
    assert re.search(r"\b3\b", first)
    assert len(others) <= 1


def test_check_tells_once(run: Run, incomplete: Path) -> None:
    done = run("check", "-q", incomplete)
    assert done.status == 1
    assert assert_warned(done) == []
    assert len(done.lines) <= 2
    assert "far" not in done.text
    facts = run("check", "--json", incomplete).json
    assert len(facts["problems"]) <= 1
    assert facts["inodes"] == ON_DEVICES + 2


def test_check_still_finds_what_else_is_wrong(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.write_bytes(with_devices().replace(b"far28far29", b"far28faa29"))
    facts = run("check", "--json", path).json
    assert [p for p in facts["problems"] if "entry" in p["what"] and p["path"].startswith("/")]
    assert len(facts["problems"]) <= 2


@pytest.mark.parametrize("inos", [1, 5000], ids=["threads", "processes"])
def test_extract_tells_once(run: Run, tmp_path: Path, inos: int) -> None:
    files = {b"far%03d" % i: hm.chunks(BLOCK, [(1, i)]) for i in range(100)}
    files[b"near"] = hm.inline(b"here")
    image = handmade(
        files, devices=[(100, 0)], incompat=ondisk.INCOMPAT_CHUNKED_FILE, inos=inos, block_bits=14
    )
    (tmp_path / "it").write_bytes(image)
    done = run("extract", "-q", tmp_path / "it", "-C", tmp_path / "out")
    assert (done.status, done.out) == (1, b"")
    others = assert_warned(done, 1)
    assert len(others) <= 2
    assert "far" not in "".join(others)
    assert any("100" in line for line in others)  # files that could not be extracted
    assert os.listdir(tmp_path / "out") == ["near"]
    assert (tmp_path / "out" / "near").read_bytes() == b"here"


def test_tar_and_dump_tell_once(run: Run, incomplete: Path, tmp_path: Path) -> None:
    done = run("dump", incomplete)
    assert assert_warned(done) == []
    done = run("tar", incomplete, "-o", tmp_path / "out.tar")
    assert done.status == 1
    first, *others = done.err.splitlines()
    assert "--device" in first
    assert len(others) <= 1
    if (tmp_path / "out.tar").exists():
        with tarfile.open(tmp_path / "out.tar") as archive:
            assert "./near" in archive.getnames()


@pytest.mark.parametrize("name", ["blobdev", "tar-index"])
def test_golden_images_without_their_device(run: Run, tmp_path: Path, name: str) -> None:
    want = golden(name)
    done = run("info", want.image)
    assert done.status == 0
    assert assert_warned(done, 1) == []
    done = run("check", "-q", want.image)
    assert done.status == 1
    assert assert_warned(done, 1) == []
    assert len(done.lines) <= 2
    done = run("extract", "-q", "--no-same-owner", want.image, "-C", tmp_path / "out")
    assert done.status == 1
    assert len(assert_warned(done, 1)) <= 2
    for path, entry in want.entries.items():
        if not stat.S_ISREG(entry["mode"]):
            assert os.path.lexists(tmp_path / "out" / path)


@pytest.mark.parametrize("name", ["blobdev", "tar-index"])
def test_nothing_is_said_where_all_devices_are_given(run: Run, name: str) -> None:
    for verb in ("info", "ls", "check"):
        assert run(verb, *words(golden(name))).err == ""


def test_nothing_is_said_where_devices_are_part_of_the_image(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.write_bytes(with_devices(mapped=True, present=True))
    for verb in ("info", "ls", "check"):
        done = run(verb, path)
        assert (done.status, done.err) == (0, "")
    assert run("cat", path, "far07").out == hm.noise(30 * BLOCK)[7 * BLOCK : 8 * BLOCK]


def test_mapped_devices_that_are_cut_off(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.write_bytes(with_devices(mapped=True))
    done = run("info", path)
    assert done.status == 0
    assert assert_warned(done) == []


def test_the_library_prints_nothing(
    incomplete: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    with pyerofs.open(incomplete) as image:
        assert image.read("near") == b"here"
        with pytest.raises(pyerofs.ErofsError, match="device"):
            image.read("far00")
    assert capfdbinary.readouterr() == (b"", b"")


# --- errors that are OSErrors, too ------------------------------------------------------------


def test_an_image_that_is_not_there_is_a_file_not_found(tmp_path: Path) -> None:
    path = tmp_path / "nope"
    for name in (path, str(path)):
        with pytest.raises(FileNotFoundError) as found:
            pyerofs.open(name)
        e = found.value
        assert isinstance(e, SourceError)
        assert isinstance(e, pyerofs.ErofsError)
        assert e.errno == errno.ENOENT
        assert os.fspath(e.filename) == str(path)
        assert str(e) == f"{path}: No such file or directory"


def test_a_device_that_is_not_there_is_one_too(tmp_path: Path) -> None:
    path = tmp_path / "nope"
    with pytest.raises(FileNotFoundError) as found:
        pyerofs.open(golden("blobdev").image, devices=[path])
    assert isinstance(found.value, SourceError)
    assert os.fspath(found.value.filename) == str(path)


def test_a_path_through_a_file_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as found:
        pyerofs.open(tmp_path / "file" / "nope")
    assert isinstance(found.value, SourceError)
    assert found.value.errno == errno.ENOTDIR


def test_it_can_be_pickled(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as found:
        pyerofs.open(tmp_path / "nope")
    e: Any = found.value
    again = pickle.loads(pickle.dumps(e))
    assert type(again) is type(e)
    assert isinstance(again, FileNotFoundError)
    assert (str(again), again.errno, again.filename) == (str(e), e.errno, e.filename)


def test_the_command_says_what_it_said(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "nope"
    assert run("ls", path) == Done(1, b"", f"pyerofs: {path}: No such file or directory\n")


def in_a_child(function: Callable[[], object]) -> str:
    """Call something as nobody, in a process of its own; what it returns, or how it fails."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(read)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            said = repr(function())
        except BaseException:
            said = traceback.format_exc()
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as answer:
        said = answer.read().decode()
    os.waitpid(pid, 0)
    return said


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_an_image_that_may_not_be_read_is_a_permission_error(tmp_path: Path) -> None:
    path = tmp_path / "it"
    shutil.copy(golden("plain").image, path)
    path.chmod(0)
    pyerofs.open(path).close()  # has all modules loaded, which nobody might not be able to

    def attempt() -> object:
        try:
            pyerofs.open(path)
        except PermissionError as e:
            return isinstance(e, SourceError), e.errno, os.fspath(e.filename) == str(path)
        return "opened"

    assert in_a_child(attempt) == repr((True, errno.EACCES, True))


# --- images that are closed -------------------------------------------------------------------

Use = Callable[[pyerofs.Image], object]

USES: dict[str, Use] = {
    "read": lambda image: image.read("text"),
    "read a piece": lambda image: image.read("text", 5, 5),
    "read nothing": lambda image: image.read("text", 0, 0),
    "read an empty file": lambda image: image.read("size-0"),
    "open": lambda image: image.open("text"),
    "open and read": lambda image: image.open("text").read(),
    "lookup": lambda image: image.lookup("many/hard-2"),
    "lookup of the root": lambda image: image.lookup("/"),
    "lookup of what is not there": lambda image: image.lookup("nope"),
    "exists": lambda image: image.exists("text"),
    "exists not": lambda image: image.exists("nope"),
    "stat": lambda image: image.stat("text"),
    "stat of the root": lambda image: image.stat("/"),
    "inode": lambda image: image.inode(image.root.nid),
    "readlink": lambda image: image.readlink("link-short"),
    "xattrs": lambda image: image.xattrs("xattr-1"),
    "getxattr": lambda image: image.getxattr("xattr-1", "user.common"),
    "listdir": lambda image: image.listdir("/"),
    "scandir": lambda image: list(image.scandir("many")),
    "walk": lambda image: list(image.walk()),
    "extents": lambda image: list(image.extents("text")),
    "Path.exists": lambda image: pyerofs.Path(image, "text").exists(),
    "Path.read_bytes": lambda image: pyerofs.Path(image, "text").read_bytes(),
    "Path.iterdir": lambda image: list(pyerofs.Path(image).iterdir()),
}


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", ["plain", "zstd"])
@pytest.mark.parametrize("use", USES)
def test_a_closed_image_is_closed(name: str, use: str, warm: bool) -> None:
    image = open_golden(golden(name))
    if warm:
        for other in USES.values():
            try:
                other(image)
            except pyerofs.NotFound:
                pass
    image.close()
    with pytest.raises(ValueError, match="closed"):
        USES[use](image)
    image.close()  # again


def test_inodes_are_of_no_use_in_a_closed_image() -> None:
    with open_golden(golden("plain")) as image:
        inodes = {path: image.lookup(path) for path in ("text", "many", "xattr-1")}
        image.read("text")
    for function, path in [
        (image.read, "text"), (image.stat, "text"), (image.listdir, "many"),
        (image.xattrs, "xattr-1"), (image.open, "text"), (image.scandir, "many"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="closed"):
            function(inodes[path])  # type: ignore[operator]


@pytest.mark.parametrize("started", [0, 5], ids=["", "started"])
def test_files_of_a_closed_image_are_closed(started: int) -> None:
    image = open_golden(golden("plain"))
    file = image.open("text")
    assert len(file.read(started)) == started
    image.close()
    reads: list[Callable[[], object]]
    reads = [file.read, file.readline, lambda: file.read(1), lambda: next(file)]
    for read in reads:
        with pytest.raises(ValueError, match="closed"):
            read()
    with pytest.raises(ValueError, match="closed"):
        file.readinto(bytearray(10))
    file.close()


def test_what_was_begun_ends_when_an_image_is_closed() -> None:
    image = open_golden(golden("plain"))
    entries = image.scandir("/")
    first = next(entries)
    walk = image.walk()
    next(walk)
    image.close()
    with pytest.raises(ValueError, match="closed"):
        list(entries)
    with pytest.raises(ValueError, match="closed"):
        list(walk)
    with pytest.raises(ValueError, match="closed"):
        first.stat()


def test_an_image_from_memory_is_closed_too() -> None:
    with golden("plain").image.open("rb") as file:
        image = pyerofs.open(file)
        image.listdir()
        image.close()
        assert not file.closed
        with pytest.raises(ValueError, match="closed"):
            image.listdir()


# --- where output goes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [["ls"], ["ls", "--json"], ["info"], ["tree"], ["stat", "text"], ["cat", "text"], ["tar"],
     ["check", "-q"], ["dump"]],
    ids=" ".join,
)  # fmt: skip
def test_closed_stdout(run_process: RunProcess, command: list[str]) -> None:
    """``pyerofs ls IMAGE >&-``"""
    verb, *rest = command
    closed = ["sh", "-c", 'exec "$@" >&-', "sh"]
    done = run_process(verb, *PLAIN, *rest, under=closed)
    assert done.status == 1
    assert done.err.startswith("pyerofs: ")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("streams", ["2>&-", "<&-", "<&- 2>&-"])
def test_other_closed_streams_do_not_matter(run_process: RunProcess, streams: str) -> None:
    done = run_process("ls", *PLAIN, under=["sh", "-c", f'exec "$@" {streams}', "sh"])
    assert (done.status, done.err) == (0, "")
    assert b"text\n" in done.out


@pytest.mark.parametrize("streams", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_nothing_is_extracted_into_files_that_take_the_place_of_a_stream(
    run_process: RunProcess, tmp_path: Path, streams: str
) -> None:
    done = run_process(
        "extract", "-q", *PLAIN, "text", "size-1", "-C", tmp_path / "out",
        under=["sh", "-c", f'exec "$@" {streams}', "sh"],
    )  # fmt: skip
    assert "Traceback" not in done.err
    with open_golden(golden("plain")) as image:
        for path in (tmp_path / "out").glob("*"):
            assert path.read_bytes() == image.read(path.name)
        if done.status == 0:
            assert len(os.listdir(tmp_path / "out")) == 2


# --- options ----------------------------------------------------------------------------------


def shown(command: list[object]) -> str:
    """A command line as a test's id."""
    return " ".join(str(word).removeprefix(f"{IMAGES}/") for word in command) or "nothing"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["ls", "--nonsense", *PLAIN], "--nonsense"),
        (["--nonsense", "ls", *PLAIN], "--nonsense"),
        (["--nonsense"], ""),
        (["nonsense"], "nonsense"),
        (["nonsense", *PLAIN], "nonsense"),
        ([], ""),
        (["ls"], "IMAGE"),
        (["cat", *PLAIN], "PATH"),
        (["tree", *PLAIN, "one", "two"], "two"),
        (["info", *PLAIN, "--cache-size", "x"], "--cache-size"),
        (["info", *PLAIN, "--cache-size"], "--cache-size"),
        (["--cache-size", "ls", *PLAIN], ""),
        (["--cache-size"], "--cache-size"),
        (["--json"], ""),
        (["--json", "tree", *PLAIN], "--json"),
        (["--json", "cat", *PLAIN, "text"], "--json"),
        (["--overwrite", "extract", *PLAIN], "--overwrite"),
        (["completion", "csh"], "csh"),
        (["cache", "nonsense"], "nonsense"),
        (["--insecure", "completion", "bash"], "--insecure"),
    ],
    ids=lambda value: shown(value) if isinstance(value, list) else "",
)
def test_a_wrong_word_is_two_lines_at_most(run: Run, wrong: list[str], named: str) -> None:
    done = run(*wrong)
    assert (done.status, done.out) == (2, b"")
    assert 1 <= done.err.count("\n") <= 2
    assert named in done.err.splitlines()[-1]
    assert all(len(line) < 200 for line in done.err.splitlines())


def test_all_is_told_on_demand(run: Run) -> None:
    for words_ in (["--help"], ["ls", "--help"], ["--json", "ls", "--help"]):
        done = run(*words_)
        assert (done.status, done.err) == (0, "")
        assert done.text.count("\n") > 10


OFFSET = golden("offset").image
BLOBDEV = golden("blobdev")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["--json", "ls", *PLAIN], ["ls", "--json", *PLAIN]),
        (["--json", "info", *PLAIN], ["info", *PLAIN, "--json"]),
        (["--json", "check", *PLAIN], ["check", *PLAIN, "--json"]),
        (["--json", "stat", *PLAIN, "text"], ["stat", *PLAIN, "text", "--json"]),
        (["--cache-size", "1M", "ls", *PLAIN], ["ls", *PLAIN, "--cache-size", "1M"]),
        (["--cache-size=1M", "ls", *PLAIN], ["ls", *PLAIN, "--cache-size=1M"]),
        (["--insecure", "ls", *PLAIN], ["ls", "--insecure", *PLAIN]),
        (["--json", "--cache-size", "1M", "--insecure", "ls", *PLAIN], ["ls", "--json", *PLAIN]),
        (["--cache-size", "1M", "ls", "--json", *PLAIN], ["ls", "--json", *PLAIN]),
        (["--offset", "0x100000", "ls", OFFSET], ["ls", OFFSET, "--offset", "0x100000"]),
        (["--offset=0x100000", "ls", OFFSET, "many"], ["ls", OFFSET, "many", "--offset=1048576"]),
        (
            ["--device", BLOBDEV.devices[0], "cat", BLOBDEV.image, "text"],
            ["cat", BLOBDEV.image, "text", "--device", BLOBDEV.devices[0]],
        ),
        (["--timeout", "5", "--no-cache", "ls", *PLAIN], ["ls", *PLAIN]),
    ],
    ids=shown,
)
def test_common_options_may_come_before_the_verb(
    run: Run, before: list[object], after: list[object]
) -> None:
    want = run(*after)
    assert want.status == 0
    assert run(*before) == want


def test_the_last_of_an_option_counts(run: Run) -> None:
    """Before the verb or behind it."""
    done = run("--offset", "5", "ls", OFFSET, "--offset", "0x100000")
    assert done == run("ls", OFFSET, "--offset", "0x100000")
    assert done.status == 0


def test_a_verb_may_be_the_value_of_an_option(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``pyerofs --device ls cat IMAGE``: a device that is called so."""
    shutil.copy(BLOBDEV.devices[0], tmp_path / "ls")
    monkeypatch.chdir(tmp_path)
    done = run("--device", "ls", "cat", BLOBDEV.image, "text")
    assert done.status == 0
    assert len(done.out) == BLOBDEV.entries["text"]["size"]


@pytest.fixture
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("_cache")
def test_verbs_without_an_image_have_some_of_them(run: Run) -> None:
    done = run("--json", "cache", "ls")
    assert (done.status, done.err) == (0, "")
    assert done == run("cache", "ls", "--json")


def test_no_verb_is_guessed_from_a_path() -> None:
    """An image that is called like a verb is no verb."""
    done = subprocess.run(
        [sys.executable, "-m", "pyerofs", "--json", "./ls"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") <= 2

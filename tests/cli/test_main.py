"""The command as a whole: its grammar, exit statuses, and where its words go."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pyerofs
from pyerofs.cli.main import build_parser, main
from tests import handmade as hm
from tests.cli.conftest import Done, Run, RunProcess
from tests.helpers import handmade, words
from tests.manifests import golden

PLAIN = words(golden("plain"))
VERBS = [
    "info", "ls", "tree", "stat", "cat", "extract", "tar", "check", "dump", "cache", "mounts",
    "completion",
]  # fmt: skip


# --- grammar ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["nonsense"],
        ["ls"],
        ["cat", *PLAIN],
        ["stat", *PLAIN],
        ["ls", "--nonsense", *PLAIN],
        ["ls", *PLAIN, "--offset", "-1"],
        ["ls", *PLAIN, "--offset", "x"],
        ["ls", *PLAIN, "--cache-size", "-1"],
        ["ls", *PLAIN, "--cache-size", "many"],
        ["ls", *PLAIN, "--cache-size"],
        ["ls", *PLAIN, "--cache-size", "M"],
        ["tree", *PLAIN, "-L", "x"],
        ["completion", "csh"],
        ["tree", *PLAIN, "one", "two"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(run: Run, wrong: list[str]) -> None:
    done = run(*wrong)
    assert (done.status, done.out) == (2, b"")
    assert done.err.startswith("usage: pyerofs")


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help(run: Run, verb: str) -> None:
    done = run(*filter(None, [verb]), "--help")
    assert (done.status, done.err) == (0, "")
    assert done.text.startswith("usage: pyerofs")
    if not verb:
        assert all(f"    {name} " in done.text for name in VERBS)
        assert "exit status" in done.text


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(run: Run, option: str) -> None:
    assert run(option) == Done(0, f"pyerofs {pyerofs.__version__}\n".encode(), "")


@pytest.mark.parametrize("size", ["0", "1", "1000", "0x1000", "64k", "1M", "1GiB", "2 mb"])
def test_any_cache_size_will_do(run: Run, size: str) -> None:
    done = run("cat", "--cache-size", size, *words(golden("zstd")), "text")
    assert done.status == 0
    assert done.out == run("cat", *words(golden("zstd")), "text").out


def test_options_may_come_anywhere(run: Run) -> None:
    offset = golden("offset")
    listing = run("ls", offset.image, "--offset", "0x100000", "many").out
    assert listing == run("ls", "--offset", "1048576", offset.image, "many").out
    assert listing.count(b"\n") == 41
    assert run("cat", *PLAIN, "--", "text").status == 0


@pytest.mark.parametrize("name", ["blobdev", "tar-index"])
def test_devices(run: Run, name: str) -> None:
    want = golden(name)
    assert len(run("cat", *words(want), "text").out) == want.entries["text"]["size"]
    without = run("cat", want.image, "text")
    assert (without.status, without.out) == (1, b"")
    assert "--device" in without.err
    too_many = run("cat", *words(want), "--device", want.devices[0], "text")
    assert too_many.status == 1
    assert "1 extra devices, 2 were given" in too_many.err


# --- what can not be opened -------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["info", "ls", "tree", "check", "dump", "tar", "extract"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "No such file or directory"),
        ("directory", "is a directory, not an image"),
        ("text", "too short for a superblock"),
        ("empty", "too short for a superblock"),
        ("zeros", "no EROFS superblock"),
        ("newer", "unknown incompatible features 0x200; use a newer pyerofs"),
        ("cut", "image ends within the superblock's block"),
    ],
)
def test_images_that_are_none(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, kind: str, message: str
) -> None:
    path = tmp_path / kind
    data = bytearray(golden("nosbcrc").image.read_bytes())
    data[1024 + 81] = 2
    contents = {
        "text": b"hello\n",
        "empty": b"",
        "zeros": bytes(9000),
        "newer": bytes(data),
        "cut": golden("plain").image.read_bytes()[:2000],
    }
    if kind == "directory":
        path.mkdir()
    elif kind != "absent":
        path.write_bytes(contents[kind])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = run(verb, path)
    assert (done.status, done.out) == (1, b"")
    assert done.err.startswith("pyerofs: ")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert os.listdir() == []


def test_a_name_that_is_not_utf8(run_process: RunProcess, tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9"
    shutil.copy(golden("plain").image, path)
    done = run_process("ls", path, "many")
    assert done.status == 0
    done = run_process("ls", path, "latin-\udce9\udcff")
    assert done.out == b"latin-\xe9\xff\n"


def test_an_image_that_may_not_be_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    done = run("ls", *PLAIN)
    monkeypatch.undo()
    assert done.status == 1
    assert done.err == f"pyerofs: {golden('plain').image}: Permission denied\n"


# --- where words go ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        ["ls", "-R"],
        ["ls", "-lR"],
        ["ls", "-R", "--json"],
        ["tree"],
        ["dump"],
        ["dump", "--json"],
        ["tar"],
        ["check", "--json"],
    ],
    ids=" ".join,
)
def test_a_reader_that_goes_away_is_no_news(arguments: list[str]) -> None:
    """``pyerofs … | head -1``"""
    verb, *options = arguments
    writer = subprocess.Popen(
        [sys.executable, "-m", "pyerofs", verb, *PLAIN, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert writer.stdout is not None
    writer.stdout.read(1)
    writer.stdout.close()
    assert writer.stderr is not None
    said = writer.stderr.read()
    writer.stderr.close()
    assert writer.wait() in (0, 1)
    assert b"Traceback" not in said
    assert b"Broken" not in said
    assert b"Exception" not in said


def test_nobody_reads_at_all(run_process: RunProcess) -> None:
    read, write = os.pipe()
    os.close(read)
    for verb in ("ls", "info", "tar"):
        done = run_process(verb, *PLAIN, stdout=write)
        assert done.status in (0, 1)
        assert "Broken" not in done.err
        assert "Exception" not in done.err
    os.close(write)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["ls"], ["info", "--json"], ["cat", "text"], ["tar"]])
def test_output_that_can_not_be_written(run_process: RunProcess, arguments: list[str]) -> None:
    verb, *paths = arguments
    with open("/dev/full", "wb") as full:
        done = run_process(verb, *PLAIN, *paths, stdout=full)
    assert done.status == 1
    assert done.err.splitlines()[-1] == "pyerofs: No space left on device"
    assert "Exception" not in done.err


@pytest.mark.parametrize("verb", ["info", "ls", "stat", "check", "dump"])
def test_json_is_one_document(run: Run, verb: str) -> None:
    paths = ["text", "latin-\udce9\udcff"] if verb in ("ls", "stat") else []
    done = run(verb, "--json", *PLAIN, *paths)
    assert (done.status, done.err) == (0, "")
    assert done.out.endswith(b"\n")
    assert json.loads(done.out)
    done.out.decode("ascii")


def test_messages_never_mix_with_data(run: Run, tmp_path: Path) -> None:
    done = run("extract", *PLAIN, "-C", tmp_path)
    assert done.out == b""
    done = run("extract", *PLAIN, "-C", tmp_path)  # everything exists
    assert done.out == b""
    assert done.status == 1
    done = run("tar", *PLAIN, "many/hard-2")
    assert done.out == b""
    assert done.err.startswith("pyerofs: ")


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyerofs.cli.listing.ls", interrupt)
    assert run("ls", *PLAIN).status == 128 + signal.SIGINT


def test_in_a_locale_without_utf8(run_process: RunProcess, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(handmade({"日本".encode(): hm.inline("é".encode())}))
    for locale in ("C", "POSIX", "C.UTF-8"):
        environment = os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        done = run_process("ls", tmp_path / "image", env=environment)
        assert (done.status, done.err) == (0, "")
        assert done.out == "日本\n".encode()


# --- completion -------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_scripts(run: Run, shell: str, tmp_path: Path) -> None:
    done = run("completion", shell)
    assert (done.status, done.err) == (0, "")
    for verb in VERBS:
        assert verb in done.text
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell}")
    (tmp_path / "script").write_bytes(done.out)
    option = "--no-execute" if shell == "fish" else "-n"
    checked = subprocess.run(
        [program, option, tmp_path / "script"], capture_output=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["pyerofs", ""], set(VERBS)),
        (["pyerofs", "c"], {"cache", "cat", "check", "completion"}),
        (["pyerofs", "extract", "--over"], {"--overwrite"}),
        (["pyerofs", "tree", "--l"], {"--layer", "--level"}),
        (["pyerofs", "ls", "im"], {"image.erofs"}),
    ],
)  # fmt: skip
def test_bash_completes(run: Run, tmp_path: Path, line: list[str], expected: set[str]) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    (tmp_path / "image.erofs").touch()
    script = run("completion", "bash").text
    shown = " ".join(f"'{word}'" for word in line)
    script += f"COMP_WORDS=({shown}); COMP_CWORD={len(line) - 1}; _pyerofs\n"
    script += 'printf "%s\\n" "${COMPREPLY[@]}"\n'
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert set(done.stdout.split()) == expected
    assert done.stderr == ""


# --- the rest ---------------------------------------------------------------------------------


def test_every_verb_is_there() -> None:
    parser = build_parser()
    assert parser.prog == "pyerofs"
    for verb in VERBS[:-3]:
        paths = ["x"] if verb in ("cat", "stat") else []
        assert parser.parse_args([verb, "image", *paths]).verb == verb


@pytest.mark.parametrize("how", ["module", "script"])
def test_as_a_program(how: str) -> None:
    script = Path(sys.executable).with_name("pyerofs")
    if how == "script" and not script.exists():
        pytest.skip("not installed")
    command = [sys.executable, "-m", "pyerofs"] if how == "module" else [str(script)]
    done = subprocess.run([*command, "cat", *PLAIN, "size-1"], capture_output=True, check=False)
    assert (done.returncode, len(done.stdout), done.stderr) == (0, 1, b"")
    done = subprocess.run([*command, "cat", *PLAIN, "none/x"], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    done = subprocess.run([*command], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


def test_main_may_be_called_again(run: Run) -> None:
    first = run("ls", *PLAIN)
    assert main(["ls", *PLAIN]) == 0
    assert run("ls", *PLAIN) == first

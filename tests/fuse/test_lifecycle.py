"""From the command line to the end of the daemon."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

import pyerofs
from tests.fuse.mounting import (
    COMMAND,
    PATIENCE,
    assert_one_line,
    assert_refused,
    daemons,
    foreground,
    is_mounted,
    keeper,
    kill,
    mounted,
    mounts_at,
    run,
    unmount,
    wait_until,
)
from tests.manifests import IMAGES, differences, entries_below, entry_at, golden, without_trusted

PLAIN = IMAGES / "plain.erofs"
OFFSET = golden("offset")
TAR = golden("tar-index")


def shows_plain(where: Path) -> bool:
    """Whether it is the image that most tests mount."""
    return {"many", "xattr-1"} <= set(os.listdir(where)) and (where / "many").is_dir()


# --- it works -------------------------------------------------------------------------------


def test_returns_when_the_mount_is_live(where: Path) -> None:
    for _ in range(5):
        done = run(PLAIN, where)
        assert shows_plain(where)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert daemons(where)
        unmount(where)


def test_what_the_system_is_told(where: Path) -> None:
    with mounted(PLAIN, where):
        (line,) = mounts_at(where)
        assert (line.source, line.kind) == (str(PLAIN), "fuse.pyerofs-fuse")
        assert {"ro", "nosuid", "nodev", f"user_id={os.getuid()}"} <= set(line.options)


def test_relative_paths(where: Path) -> None:
    done = run(os.path.relpath(PLAIN, where.parent), where.name, cwd=where.parent)
    try:
        assert (done.returncode, done.stderr) == (0, "")
        assert shows_plain(where)
        assert mounts_at(where)[0].source == str(PLAIN)
    finally:
        unmount(where)


@pytest.mark.parametrize(
    "options",
    [
        [f"--offset={OFFSET.offset}"],
        ["--offset", f"{OFFSET.offset:#x}"],
        ["-o", f"offset={OFFSET.offset}"],
        [f"-ooffset={OFFSET.offset},ro"],
        ["-o", f"nosuid,offset={OFFSET.offset}", "-s", "--dbglevel=0", "--cache-size=1M"],
    ],
    ids=" ".join,
)
def test_an_image_at_an_offset(options: list[str], where: Path) -> None:
    with mounted(OFFSET.image, where, *options):
        assert (where / "many").is_dir()


def test_options_may_come_last(where: Path) -> None:
    assert run(OFFSET.image, where, "-o", f"offset={OFFSET.offset}").returncode == 0
    assert (where / "many").is_dir()


@pytest.mark.parametrize("form", ["--device={}", "-odevice={}", "--device {}", "-o ro,device={}"])
def test_an_image_with_a_device(form: str, where: Path) -> None:
    options = form.format(TAR.devices[0]).split(" ", 1)
    with mounted(TAR.image, where, *options):
        assert entry_at(str(where / "text")) == TAR.entries["text"]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ("fsname=my image", ("my image", "fuse.pyerofs-fuse")),
        ("subtype=erofs", (str(PLAIN), "fuse.erofs")),
    ],
)
def test_a_name_of_ones_own(options: str, shown: tuple[str, str], where: Path) -> None:
    with mounted(PLAIN, where, "-o", options):
        assert [(line.source, line.kind) for line in mounts_at(where)] == [shown]


@pytest.mark.skipif(os.geteuid() != 0, reason="mount(8) needs root")
@pytest.mark.skipif(shutil.which("mount.fuse3") is None, reason="no mount.fuse3")
@pytest.mark.parametrize(
    "command",
    [
        ["mount", "-t", "fuse", "-o", "nodev,noatime", f"{COMMAND}#{PLAIN}", "{where}"],
        # what "mount -t fuse.pyerofs-fuse" starts where the system's PATH leads to the command
        [
            "mount.fuse3",
            PLAIN,
            "{where}",
            "-t",
            "fuse.pyerofs-fuse",
            "-o",
            "defaults,nodev,_netdev",
        ],
    ],
    ids=["mount", "mount.fuse3"],
)
def test_mounting_with_mount(command: list[str | Path], where: Path) -> None:
    path = f"{COMMAND.parent}:{os.environ['PATH']}"
    words = [str(word).format(where=where) for word in command]
    subprocess.run(words, check=True, timeout=30, env=os.environ | {"PATH": path})
    assert shows_plain(where)
    (line,) = mounts_at(where)
    assert (line.source, line.kind) == (str(PLAIN), "fuse.pyerofs-fuse")
    assert {"ro", "nodev"} <= set(line.options)
    subprocess.run(["umount", where], check=True, timeout=30)
    assert wait_until(lambda: not daemons(where))


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "a,b",
        "a\\b",
        "a,b\\,c",
        "tab\tand\nnewline",
        "a#b",
        "übel-日本",
        "\udcff\udcfe",
        "a=b:c",
    ],
    ids=lambda name: name.encode("utf-8", "backslashreplace").decode(),
)
def test_awkward_names(name: str, where: Path, tmp_path: Path) -> None:
    image = tmp_path / name
    shutil.copy(PLAIN, image)
    with mounted(image, where):
        assert [line.source for line in mounts_at(where)] == [str(image)]
    with mounted(PLAIN, tmp_path / f"mnt {name}") as there:
        assert shows_plain(there)


def test_many_mounts_at_once(tmp_path: Path) -> None:
    same = mounted(PLAIN, tmp_path / "one"), mounted(PLAIN, tmp_path / "two")
    with same[0] as one, same[1] as two, mounted(OFFSET, tmp_path / "three") as three:
        assert shows_plain(one)
        assert shows_plain(two)
        assert not shows_plain(three)
        unmount(one)
        assert shows_plain(two)
        assert (three / "many").is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="fusermount3 forbids it")
def test_a_mount_over_a_mount(where: Path) -> None:
    with mounted(PLAIN, where):
        assert run(f"--offset={OFFSET.offset}", OFFSET.image, where).returncode == 0
        assert not shows_plain(where)
        unmount(where)
        assert shows_plain(where)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(closed: str, where: Path) -> None:
    """As some supervisors start daemons: the files that it opens get the numbers 0 to 2."""
    starting: list[str | Path] = ["sh", "-c", f'exec "$0" "$@" {closed}', COMMAND, PLAIN, where]
    assert subprocess.run(starting, check=False, timeout=30).returncode == 0
    expected = golden("plain") if os.geteuid() == 0 else without_trusted(golden("plain"))
    assert differences(expected, entries_below(where)) == []


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help(word: str) -> None:
    done = run(word)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: pyerofs-fuse")


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_version(word: str) -> None:
    done = run(word)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"pyerofs-fuse {pyerofs.__version__}\n"


# --- it ends --------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="umount(8) needs root")
def test_umount_ends_the_daemon(where: Path) -> None:
    with mounted(PLAIN, where):
        subprocess.run(["umount", where], check=True, timeout=30)
        assert wait_until(lambda: not daemons(where))


def test_fusermount_ends_the_daemon(where: Path) -> None:
    with mounted(PLAIN, where):
        unmount(where)
        assert wait_until(lambda: not daemons(where))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_daemon(number: signal.Signals, where: Path) -> None:
    with mounted(PLAIN, where):
        os.kill(keeper(where), number)
        assert wait_until(lambda: not daemons(where))
        assert not is_mounted(where)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_the_foreground(number: signal.Signals, where: Path) -> None:
    with foreground(PLAIN, where=where) as process:
        assert shows_plain(where)
        process.send_signal(number)
        assert process.communicate(timeout=PATIENCE) == ("", "")
        assert process.returncode == 0
        assert not is_mounted(where)


def test_unmounting_ends_it_in_the_foreground(where: Path) -> None:
    with foreground(PLAIN, where=where) as process:
        unmount(where)
        assert process.communicate(timeout=PATIENCE) == ("", "")
        assert process.returncode == 0


def test_requests_are_logged_if_asked_for(where: Path) -> None:
    with foreground("-d", PLAIN, where=where) as process:
        (where / "text").read_bytes()
        unmount(where)
        log = process.communicate(timeout=PATIENCE)[1]
    assert "lookup(" in log
    assert "open(" in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_while_it_is_in_use(number: signal.Signals, where: Path) -> None:
    with foreground(PLAIN, where=where) as process:
        file = os.open(where / "text", os.O_RDONLY)
        with subprocess.Popen(["sleep", "60"], stdin=file, cwd=where / "many") as user:
            try:
                process.send_signal(number)
                assert process.wait(PATIENCE) == 0
                assert not is_mounted(where)
            finally:
                user.kill()
                os.close(file)


@pytest.mark.parametrize("pause", [0, 0.01, 0.1, 0.3, 1])
def test_two_signals_do_no_harm(pause: float, where: Path) -> None:
    with foreground(PLAIN, where=where) as process:
        assert shows_plain(where)
        process.send_signal(signal.SIGTERM)
        time.sleep(pause)
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
        assert not is_mounted(where)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_early(number: signal.Signals, where: Path) -> None:
    with foreground(PLAIN, where=where) as process:  # mounted, but perhaps not serving yet
        process.send_signal(number)
        process.wait(PATIENCE)
        assert not is_mounted(where)


def test_what_a_killed_daemon_leaves_behind(where: Path) -> None:
    with mounted(PLAIN, where):
        assert wait_until(lambda: not kill(where))
        assert is_mounted(where)
        with pytest.raises(OSError, match="connect"):
            os.listdir(where)
        done = run(PLAIN, where)
        assert_one_line(done)
        assert f"fusermount3 -u {where}" in done.stderr
        unmount(where)
        assert not is_mounted(where)
        assert run(PLAIN, where).returncode == 0
        assert shows_plain(where)


@pytest.mark.skipif(os.geteuid() != 0, reason="fusermount3 looks with root's eyes")
def test_auto_unmount(where: Path) -> None:
    """Left to fusermount3, which at times looks a moment too early and gives up."""

    def vanishes() -> bool:
        with mounted(PLAIN, where, "-o", "auto_unmount"):
            wait_until(lambda: not kill(where))
            return wait_until(lambda: not is_mounted(where), 2)

    assert any(vanishes() for _ in range(5))


# --- it refuses -----------------------------------------------------------------------------


@pytest.fixture(params=["background", "foreground"])
def mode(request: pytest.FixtureRequest) -> list[str]:
    """Options: the two ways in which it runs report in different ways."""
    return ["-f"] if request.param == "foreground" else []


class TestRefuses:
    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            ([], "needs an image and a mount point"),
            ([PLAIN], "needs an image and a mount point"),
            ([PLAIN, "{where}", "more"], "more"),
            (["--unknown", PLAIN, "{where}"], "--unknown"),
            (["-x", PLAIN, "{where}"], "-x"),
            (["-o", "unknown", PLAIN, "{where}"], "unknown"),
            (["-o", "ro,unknown=1", PLAIN, "{where}"], "unknown=1"),
            ([PLAIN, "{where}", "-o"], "-o needs a value"),
            (["--offset=some", PLAIN, "{where}"], "offset=some"),
            (["--offset=-512", PLAIN, "{where}"], "offset=-512"),
            (["--offset=999999999", PLAIN, "{where}"], "999999999"),
            (["--offset=512", PLAIN, "{where}"], "superblock"),
            (["-o", "offset=", PLAIN, "{where}"], "offset"),
            (["--cache-size=much", PLAIN, "{where}"], "much"),
            (["--device=/missing", TAR.image, "{where}"], "/missing"),
            (["--device=/dev/null", TAR.image, "{where}"], "/dev/null"),
            ([*["--device", TAR.devices[0]] * 2, TAR.image, "{where}"], "2"),
            ([f"--device={PLAIN}", PLAIN, "{where}"], "device"),
            (["/missing.erofs", "{where}"], "/missing.erofs: No such file or directory"),
            (["/dev/null", "{where}"], "/dev/null"),
            ([IMAGES, "{where}"], "directory"),
            ([__file__, "{where}"], "superblock"),
            ([PLAIN, "{where}/missing"], "missing: No such file or directory"),
            ([PLAIN, __file__], "not a directory"),
            (["", "{where}"], ""),
        ],
        ids=lambda value: " ".join(map(os.path.basename, value)) if isinstance(value, list) else "",
    )
    def test_what_makes_no_sense(
        self, words: list[str | Path], reason: str, mode: list[str], where: Path
    ) -> None:
        done = run(*mode, *(str(word).format(where=where) for word in words))
        assert_refused(done, where)
        assert reason in done.stderr

    @pytest.mark.parametrize(
        ("at", "data", "reason"),
        [
            (1024, b"\0", "superblock"),  # the magic number
            (1024 + 64, b"other", "checksum"),  # the label
            (3000, b"other", "checksum"),  # the rest of the block
        ],
    )
    def test_damaged_images(
        self, at: int, data: bytes, reason: str, mode: list[str], where: Path, tmp_path: Path
    ) -> None:
        content = bytearray(PLAIN.read_bytes())
        content[at : at + len(data)] = data
        (tmp_path / "damaged").write_bytes(content)
        done = run(*mode, tmp_path / "damaged", where)
        assert_refused(done, where)
        assert reason in done.stderr

    @pytest.mark.parametrize("length", [0, 1024, 1100])
    def test_short_images(self, length: int, mode: list[str], where: Path, tmp_path: Path) -> None:
        (tmp_path / "short").write_bytes(PLAIN.read_bytes()[:length])
        assert_refused(run(*mode, tmp_path / "short", where), where)

    def test_an_image_that_is_no_file(self, mode: list[str], where: Path, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        assert_refused(run(*mode, tmp_path / "fifo", where), where)

    @pytest.mark.parametrize("name", ["two\nlines", "\udcff", "ü"], ids=ascii)
    def test_awkward_names(self, name: str, mode: list[str], where: Path, tmp_path: Path) -> None:
        assert_refused(run(*mode, tmp_path / name, where), where)
        assert_one_line(run(*mode, PLAIN, tmp_path / name))

    def test_an_empty_mount_point(self, mode: list[str], where: Path) -> None:
        """As ``"$UNSET"`` gives it: by no means the working directory."""
        try:
            assert_one_line(run(*mode, PLAIN, "", cwd=where))
        finally:
            if is_mounted(where):
                unmount(where)

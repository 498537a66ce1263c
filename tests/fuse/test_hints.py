"""What is said where a mount can't be made, what erofsfuse's users may go on typing, and what a mount
leaves to its caller: its files, its locks, and the signals that it had ignored."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from pyerofs_fuse.options import parse

from tests.fuse.mounting import (
    COMMAND,
    PATIENCE,
    assert_one_line,
    assert_refused,
    cleaned,
    daemons,
    foreground,
    is_mounted,
    keeper,
    mounted,
    mounts_at,
    run,
    unmount,
    wait_until,
)
from tests.helpers import signals_at
from tests.manifests import IMAGES, golden

PLAIN = IMAGES / "plain.erofs"
OFFSET = golden("offset")
TEXT: int = golden("plain").entries["text"]["size"]
MOMENT = 0.5  # seconds in which a mount that a signal ends has ended
DEVICE = Path("/dev/fuse")
NOBODY = 65534


def works(where: Path) -> bool:
    return len((where / "text").read_bytes()) == TEXT


# --- the options of erofsfuse ---------------------------------------------------------------

# what `erofsfuse --help` (1.9.3, libfuse 3) lists
MOUNT_WORDS = [
    "allow_other", "allow_root", "auto_unmount", "max_threads=4", "max_idle_threads=2", "clone_fd",
    "fsname=name", "subtype=kind", "kernel_cache", "auto_cache", "noforget", "umask=022", "uid=1000",
    "gid=1000", "entry_timeout=1.5", "negative_timeout=0", "attr_timeout=1", "ac_attr_timeout=1.0",
    "remember=10", "modules=subdir:iconv", "debug", "offset=512", "device=/a/device",
]  # fmt: skip
SWITCHES = ["--dbglevel=5", "--device=/a/device", "--offset=512", "-f", "-d", "-s"]


@pytest.mark.parametrize("form", ["-o {}", "-o{}", "-o ro,{},nodev"])
@pytest.mark.parametrize("word", MOUNT_WORDS)
def test_mount_options_of_erofsfuse_are_understood(word: str, form: str) -> None:
    first, *more = form.format(word).split(" ")
    for words in ([first, *more, "image", "/mnt"], ["image", "/mnt", first, *more]):
        options = parse(words)
        assert (options.image, options.mountpoint, options.show) == ("image", "/mnt", "")


@pytest.mark.parametrize("word", SWITCHES)
def test_switches_of_erofsfuse_are_understood(word: str) -> None:
    for words in ([word, "image", "/mnt"], ["image", "/mnt", word]):
        options = parse(words)
        assert (options.image, options.mountpoint, options.show) == ("image", "/mnt", "")


def test_all_of_them_at_once() -> None:
    options = parse(["-f", "-s", "-o", ",".join(MOUNT_WORDS), *SWITCHES[:3], "image", "/mnt"])
    assert (options.foreground, options.debug >= 3) == (True, True)
    assert options.spec.offset == 512
    assert [device.what for device in options.spec.devices] == ["/a/device"] * 2


@pytest.mark.parametrize("word", ["-h", "--help", "-V", "--version"])
def test_what_only_tells_something(word: str) -> None:
    assert parse([word]).show in ("help", "version")


@pytest.mark.parametrize("word", ["max_thread=4", "kernel_cached", "mask=022", "entry_timeouts=1"])
def test_other_words_are_still_refused(word: str, where: Path) -> None:
    done = run("-o", word, PLAIN, where)
    assert_refused(done, where)
    assert word in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["-o", "max_threads=2,clone_fd"],
        ["-o", "max_threads=2", "-o", "clone_fd", "-s"],
        ["-o", "max_idle_threads=1,fsname=a name,kernel_cache,auto_cache,noforget,remember=5"],
        ["-o", "umask=077,uid=1,gid=1,entry_timeout=1.5,negative_timeout=0,attr_timeout=1"],
        ["-o", "ac_attr_timeout=1,modules=subdir"],
    ],
    ids=" ".join,
)
def test_mounting_with_options_of_erofsfuse(words: list[str], where: Path) -> None:
    with mounted(PLAIN, where, *words):
        assert works(where)
        if "fsname" in words[1]:
            assert mounts_at(where)[0].source == "a name"


# --- hints ----------------------------------------------------------------------------------


@pytest.fixture(name="namespace")
def _can_unshare() -> None:
    """In a new user namespace, /dev/fuse can be opened."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    probe = ["unshare", "-r", "sh", "-c", ": <>/dev/fuse"]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")


@pytest.mark.usefixtures("namespace")
class TestInANamespace:
    @pytest.mark.parametrize("words", [[], ["-f"], ["-o", "allow_other"]], ids=" ".join)
    def test_without_mounts_of_its_own(self, words: list[str], where: Path) -> None:
        """``unshare -r``: root, but not where the mounts are."""
        done = subprocess.run(
            ["unshare", "-r", COMMAND, *words, PLAIN, where],
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert_refused(done, where)
        assert "namespace" in done.stderr
        assert str(where) in done.stderr

    def test_with_mounts_of_its_own(self, where: Path) -> None:
        """``unshare -rm``: nothing is in the way."""
        script = '"$0" "$1" "$2" && ls "$2" && fusermount3 -u "$2"'
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script, COMMAND, PLAIN, where],
            capture_output=True, text=True, errors="surrogateescape",
            timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert "text" in done.stdout.splitlines()
        assert not is_mounted(where)
        assert wait_until(lambda: not daemons(where))


def assert_says_already_mounted(done: subprocess.CompletedProcess[str], where: Path) -> None:
    """In one line."""
    assert "already mounted" in done.stderr
    assert str(where) in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount over a mount")
@pytest.mark.parametrize("first", [[PLAIN], [f"--offset={OFFSET.offset}", OFFSET.image]], ids=len)
def test_mounting_twice_is_said(first: list[str | Path], where: Path) -> None:
    """Whether or not it is allowed: it was seldom meant."""
    with mounted(PLAIN, where):
        done = run(*first, where)
        assert_says_already_mounted(done, where)
        assert len(mounts_at(where)) == (2 if done.returncode == 0 else 1)


def test_other_mounts_are_not_spoken_of(where: Path) -> None:
    """One beside it, and one above."""
    beside = where.with_name("beside")
    with mounted(PLAIN, beside), mounted(PLAIN, where):
        assert works(where)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
class TestWithoutRoot:
    @pytest.fixture(name="home")
    def make_home(self) -> Iterator[Path]:
        """A directory of nobody, with an image."""
        with tempfile.TemporaryDirectory() as name:
            home = Path(name)
            os.chown(home, NOBODY, NOBODY)
            home.chmod(0o755)
            shutil.copy(PLAIN, home / "image")
            yield home

    @pytest.fixture(name="place")
    def make_place(self, home: Path) -> Iterator[Path]:
        with cleaned(home / "mnt") as place:
            os.chown(place, NOBODY, NOBODY)
            yield place

    @pytest.fixture(name="nobody")
    def _as_nobody(self) -> Iterator[list[str]]:
        """Words that run a command as an ordinary user, who may read where our Python is."""
        if shutil.which("setpriv") is None:
            pytest.skip("no setpriv")
        if not os.stat(shutil.which("fusermount3") or "").st_mode & stat.S_ISUID:
            pytest.skip("fusermount3 is not setuid root")
        words = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
        words += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        mode = stat.S_IMODE(DEVICE.stat().st_mode)
        DEVICE.chmod(0o666)
        yield words
        DEVICE.chmod(mode)

    def mount(self, nobody: list[str], *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*nobody, COMMAND, *words],
            capture_output=True, text=True, timeout=PATIENCE, check=False, cwd="/",
        )  # fmt: skip

    @pytest.mark.parametrize("mode", [[], ["-f"]], ids=["background", "foreground"])
    def test_mounting_twice(
        self, nobody: list[str], home: Path, place: Path, mode: list[str]
    ) -> None:
        """fusermount3 refuses, and gives a reason that misleads: permissions."""
        done = self.mount(nobody, home / "image", place)
        if done.returncode:
            pytest.skip(f"no mounts of users here: {done.stderr}")
        again = self.mount(nobody, *mode, home / "image", place)
        assert_one_line(again)
        assert_says_already_mounted(again, place)
        assert len(mounts_at(place)) == 1

    def test_a_place_of_somebody_else(self, nobody: list[str], home: Path, place: Path) -> None:
        """Nothing is mounted there, and nothing is said of that."""
        os.chown(place, 0, 0)
        done = self.mount(nobody, home / "image", place)
        assert_refused(done, place)
        assert "already mounted" not in done.stderr
        assert "namespace" not in done.stderr


# --- what belongs to the caller -------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["-s"]], ids=["several", "single"])
def test_a_daemon_keeps_no_file_of_its_caller(
    words: list[str], where: Path, tmp_path: Path
) -> None:
    """Nor, with it, the lock that the caller has on it."""
    lock = tmp_path / "lock"
    theirs = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(theirs, fcntl.LOCK_EX)
    many = [theirs, fcntl.fcntl(theirs, fcntl.F_DUPFD, 500)]
    with cleaned(where):
        try:
            done = run(*words, PLAIN, where, pass_fds=many)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        finally:
            for fd in many:
                os.close(fd)
        assert works(where)
        kept = {
            os.readlink(link)
            for pid in daemons(where)
            for link in Path(f"/proc/{pid}/fd").iterdir()
        }
        assert str(lock) not in kept
        with lock.open() as ours:
            fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unmount(where)
        assert wait_until(lambda: not daemons(where))


def test_a_pipe_of_the_caller_ends(where: Path) -> None:
    """``exec 3>&1; ... | cat``: who reads sees the end while the mount lives."""
    reading, writing = os.pipe()
    with cleaned(where), os.fdopen(reading, "rb") as pipe:
        try:
            assert run(PLAIN, where, pass_fds=[writing]).returncode == 0
        finally:
            os.close(writing)
        os.set_blocking(pipe.fileno(), False)
        assert pipe.read() == b""
        assert works(where)


# --- signals that were ignored --------------------------------------------------------------


@contextmanager
def started(
    action: signal.Handlers, number: signal.Signals, *words: str | Path, where: Path
) -> Iterator[subprocess.Popen[str]]:
    """``pyerofs-fuse -f`` with a signal as it says."""
    with ExitStack() as stack:
        with signals_at(action, number):
            process = stack.enter_context(foreground(*words, PLAIN, where=where))
        yield process


IGNORABLE = [signal.SIGINT, signal.SIGHUP]
modes = pytest.mark.parametrize("words", [[], ["-s"]], ids=["several", "single"])


@modes
@pytest.mark.parametrize("number", IGNORABLE)
def test_an_ignored_signal_stays_ignored_in_the_background(
    number: signal.Signals, words: list[str], where: Path
) -> None:
    """As in a job of a shell script, and under nohup."""
    with cleaned(where):
        with signals_at(signal.SIG_IGN, number):
            assert run(*words, PLAIN, where).returncode == 0
        for pid in daemons(where):
            os.kill(pid, number)
        assert not wait_until(lambda: not is_mounted(where), MOMENT)
        assert works(where)
        os.kill(keeper(where), signal.SIGTERM)
        assert wait_until(lambda: not is_mounted(where))
        assert wait_until(lambda: not daemons(where))


@modes
@pytest.mark.parametrize("number", IGNORABLE)
def test_an_ignored_signal_stays_ignored_in_the_foreground(
    number: signal.Signals, words: list[str], where: Path
) -> None:
    with started(signal.SIG_IGN, number, *words, where=where) as process:
        assert works(where)
        process.send_signal(number)
        assert not wait_until(lambda: process.poll() is not None, MOMENT)
        assert works(where)
        process.terminate()
        assert process.communicate(timeout=PATIENCE) == ("", "")
        assert process.returncode == 0
        assert not is_mounted(where)


@modes
@pytest.mark.parametrize("number", IGNORABLE)
def test_an_ignored_signal_that_comes_early(
    number: signal.Signals, words: list[str], where: Path
) -> None:
    """Just when it has mounted: it does not end then, and goes on to serve."""
    with started(signal.SIG_IGN, number, *words, where=where) as process:
        process.send_signal(number)
        assert works(where)
        assert not wait_until(lambda: process.poll() is not None, MOMENT)
        process.terminate()
        assert process.wait(PATIENCE) == 0
        assert not is_mounted(where)


@modes
@pytest.mark.parametrize("number", IGNORABLE)
def test_other_signals_end_it(number: signal.Signals, words: list[str], where: Path) -> None:
    """One that was not ignored, while the other one was."""
    (other,) = (n for n in IGNORABLE if n != number)
    with (
        signals_at(signal.SIG_IGN, other),
        started(signal.SIG_DFL, number, *words, where=where) as process,
    ):
        process.send_signal(number)
        assert process.communicate(timeout=PATIENCE)[1] == ""
        assert process.returncode == 0
        assert not is_mounted(where)

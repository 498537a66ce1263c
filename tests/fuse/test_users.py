"""Who may mount, and who sees what: with and without root, alone and among others."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.fuse.mounting import (
    assert_refused,
    cleaned,
    daemons,
    is_mounted,
    mounted,
    mounts_at,
    run,
    unmount,
    wait_until,
)
from tests.manifests import IMAGES, differences, entries_below, golden, without_trusted

T = TypeVar("T")

DEVICE = Path("/dev/fuse")
NOBODY = 65534
READER = 1000  # whom an ACL in the images lets read xattr-3

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becoming other users needs root")


def as_user(uid: int) -> dict[str, Any]:
    """The keywords that make a subprocess run as a user without any privilege."""
    return {"user": uid, "group": uid, "extra_groups": [], "cwd": "/"}


def call_as(uid: int, function: Callable[..., T], *arguments: object) -> T:
    """Call something as a user, in a process of its own; its result or exception comes back."""
    fork = multiprocessing.get_context("fork")  # whoever calls needs no access to our Python
    with ProcessPoolExecutor(1, fork, initializer=become, initargs=(uid,)) as process:
        return process.submit(function, *arguments).result()


def become(uid: int) -> None:
    """Give all privileges up, for good."""
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def may_read(uid: int, path: Path) -> bool:
    """Whether a user gets at a file's content."""
    try:
        call_as(uid, Path.read_bytes, path)
    except PermissionError:
        return False
    return True


def sees_trusted(uid: int, path: Path) -> bool:
    """Whether a user is shown xattrs that are for root."""
    names = call_as(uid, os.listxattr, path)
    assert "user.num" in names
    return any(name.startswith("trusted.") for name in names)


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that others may enter, unlike pytest's, and that belongs to nobody."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        os.chown(home, NOBODY, NOBODY)
        home.chmod(0o755)
        yield home


@pytest.fixture
def image(home: Path) -> Path:
    """A golden image that everybody may read."""
    return Path(shutil.copy(IMAGES / "plain.erofs", home / "image.erofs"))


@pytest.fixture
def place(home: Path) -> Iterator[Path]:
    """A mount point of nobody."""
    with cleaned(home / "mnt") as place:
        os.chown(place, NOBODY, NOBODY)
        yield place


# --- mounts of an unprivileged user ---------------------------------------------------------


@pytest.fixture
def _command_for_all() -> None:
    """Others can run it: Python and the project do not lie where only root may look."""
    try:
        done = run("--version", **as_user(NOBODY))
    except PermissionError as e:
        pytest.skip(f"only root can run {e.filename}")
    if done.returncode:
        pytest.skip(f"only root can run it: {done.stderr.splitlines()[-1]}")


@pytest.fixture
def _device_for_all() -> Iterator[None]:
    """/dev/fuse as most systems have it."""
    if not os.stat(shutil.which("fusermount3") or "").st_mode & stat.S_ISUID:
        pytest.skip("fusermount3 is not setuid root")
    mode = stat.S_IMODE(DEVICE.stat().st_mode)
    DEVICE.chmod(0o666)
    yield
    DEVICE.chmod(mode)


@pytest.mark.usefixtures("_command_for_all", "_device_for_all")
class TestWithoutRoot:
    def test_mount_read_unmount(self, image: Path, place: Path) -> None:
        done = run(image, place, **as_user(NOBODY))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert {"ro", "nosuid", "nodev"} <= set(mounts_at(place)[0].options)
        found = call_as(NOBODY, entries_below, place)
        assert differences(without_trusted(golden("plain")), found) == []
        unmount(place, **as_user(NOBODY))
        assert not is_mounted(place)
        assert wait_until(lambda: not daemons(place))

    def test_the_owner_reads_everything(self, image: Path, place: Path) -> None:
        with mounted(image, place, **as_user(NOBODY)):
            assert may_read(NOBODY, place / "none")

    def test_nobody_else_gets_in(self, image: Path, place: Path) -> None:
        with mounted(image, place, **as_user(NOBODY)):
            assert not may_read(READER, place / "text")
            assert not may_read(0, place / "text")

    def test_trusted_xattrs_are_hidden(self, image: Path, place: Path) -> None:
        with mounted(image, place, **as_user(NOBODY)):
            assert not sees_trusted(NOBODY, place / "xattr-0")
            with pytest.raises(OSError, match="No data available"):
                call_as(NOBODY, os.getxattr, place / "xattr-0", "trusted.overlay.opaque")

    def test_an_awkward_name(self, home: Path, place: Path) -> None:
        image = home / "an image, with\\ ünïcode \udcff.erofs"
        shutil.copy(IMAGES / "plain.erofs", image)
        with mounted(image, place, **as_user(NOBODY)):
            assert [line.source for line in mounts_at(place)] == [str(image)]

    def test_a_mount_point_of_somebody_else(self, image: Path, place: Path) -> None:
        os.chown(place, 0, 0)
        assert_refused(run(image, place, **as_user(NOBODY)), place)

    def test_allow_other_needs_permission(self, image: Path, place: Path) -> None:
        settings = Path("/etc/fuse.conf")
        if settings.exists() and "user_allow_other" in settings.read_text().splitlines():
            pytest.skip("/etc/fuse.conf gives it to everybody")
        done = run("-o", "allow_other", image, place, **as_user(NOBODY))
        assert_refused(done, place)
        assert "user_allow_other" in done.stderr

    def test_an_image_that_may_not_be_read(self, image: Path, place: Path) -> None:
        image.chmod(0o600)
        done = run(image, place, **as_user(NOBODY))
        assert_refused(done, place)
        assert str(image) in done.stderr


@pytest.mark.usefixtures("_command_for_all")
def test_without_permission_to_use_fuse(image: Path, place: Path) -> None:
    if DEVICE.stat().st_mode & 0o006:
        pytest.skip("everybody may open /dev/fuse here")
    done = run(image, place, **as_user(NOBODY))
    assert_refused(done, place)
    assert "/dev/fuse" in done.stderr


# --- mounts of root -------------------------------------------------------------------------


def test_a_private_mount_of_root(image: Path, place: Path) -> None:
    with mounted(image, place):
        assert may_read(0, place / "none")
        assert not may_read(NOBODY, place / "text")


def test_a_shared_mount_checks_modes(image: Path, place: Path) -> None:
    with mounted(image, place, "-o", "allow_other"):
        assert {"allow_other", "default_permissions"} <= set(mounts_at(place)[0].options)
        assert may_read(NOBODY, place / "text")
        assert may_read(NOBODY, place / "many" / "hard-2")
        assert not may_read(NOBODY, place / "none")
        assert may_read(0, place / "none")


def test_a_shared_mount_checks_acls(image: Path, place: Path) -> None:
    with mounted(image, place, "-o", "allow_other"):
        assert (place / "xattr-3").stat().st_mode & 0o007 == 0
        assert not may_read(NOBODY, place / "xattr-3")
        assert not may_read(READER + 1, place / "xattr-3")
        assert may_read(READER, place / "xattr-3")


def test_a_shared_mount_hides_trusted_xattrs(image: Path, place: Path) -> None:
    with mounted(image, place, "-o", "allow_other"):
        assert sees_trusted(0, place / "xattr-4")
        assert not sees_trusted(NOBODY, place / "xattr-4")
        assert sees_trusted(0, place / "xattr-4")  # what others are told is not kept for root


def test_a_shared_mount_owned_by_root_lets_root_in(image: Path, place: Path) -> None:
    with mounted(image, place, "-o", "allow_root"):
        assert may_read(0, place / "text")
        assert not may_read(NOBODY, place / "text")

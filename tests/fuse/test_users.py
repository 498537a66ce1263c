"""Who may mount, and who sees what: with and without root, alone and among others."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuse.mounting import (
    cleaned,
    daemons,
    is_mounted,
    mounted,
    mounts_at,
    run,
    unmount,
    wait_until,
)
from tests.manifests import IMAGES, Entries, differences, golden, without_trusted

DEVICE = Path("/dev/fuse")
NOBODY = 65534
READER = 1000  # whom an ACL in the images lets read xattr-3

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becoming other users needs root")


def as_user(uid: int) -> dict[str, Any]:
    """The keywords that make a subprocess run as a user without any privilege."""
    return {"user": uid, "group": uid, "extra_groups": [], "cwd": "/"}


def python(uid: int, code: str, *arguments: Path) -> str:
    """Run a few lines as a user; returns what they print, or the last line of their traceback."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, timeout=60, env=environment, **as_user(uid),
    )  # fmt: skip
    return done.stdout if done.returncode == 0 else done.stderr.splitlines()[-1]


def entries_seen_by(uid: int, top: Path) -> Entries:
    """What a user finds in a tree."""
    walk = (
        "import json, sys, pathlib; from tests.manifests import entries_below;"
        "print(json.dumps(entries_below(pathlib.Path(sys.argv[1]))))"
    )
    found: Entries = json.loads(python(uid, walk, top))
    return found


def read(uid: int, path: Path) -> str:
    """``read`` or the name of the error that a user gets for a file."""
    code = "import sys; open(sys.argv[1], 'rb').read(); print('read')"
    return python(uid, code, path).partition(":")[0].strip()


@pytest.fixture(scope="module", autouse=True)
def _others_can_run_the_command() -> None:
    said = python(NOBODY, "import tests.manifests, pyfuse3, pyerofs_fuse.mount; print('yes')")
    if said.strip() != "yes":
        pytest.skip(f"Python or the project can't be used by other users here: {said}")


@pytest.fixture
def device_for_all() -> Iterator[None]:
    """/dev/fuse as most systems have it."""
    if not os.stat(shutil.which("fusermount3") or "").st_mode & stat.S_ISUID:
        pytest.skip("fusermount3 is not setuid root")
    mode = stat.S_IMODE(DEVICE.stat().st_mode)
    DEVICE.chmod(0o666)
    yield
    DEVICE.chmod(mode)


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


@pytest.mark.usefixtures("device_for_all")
class TestWithoutRoot:
    def test_mount_read_unmount(self, image: Path, place: Path) -> None:
        assert run(image, place, **as_user(NOBODY)).returncode == 0
        assert {"ro", "nosuid", "nodev"} <= set(mounts_at(place)[0].options)
        assert differences(without_trusted(golden("plain")), entries_seen_by(NOBODY, place)) == []
        unmount(place, **as_user(NOBODY))
        assert not is_mounted(place)
        assert wait_until(lambda: not daemons(place))

    def test_the_owner_reads_everything(self, image: Path, place: Path) -> None:
        with mounted(image, place, **as_user(NOBODY)):
            assert read(NOBODY, place / "none") == "read"

    def test_nobody_else_gets_in(self, image: Path, place: Path) -> None:
        with mounted(image, place, **as_user(NOBODY)):
            assert read(READER, place / "text") == "PermissionError"
            with pytest.raises(PermissionError):  # not even root
                os.listdir(place)

    def test_trusted_xattrs_are_hidden(self, image: Path, place: Path) -> None:
        with mounted(image, place, **as_user(NOBODY)):
            names = python(
                NOBODY, "import os, sys; print(os.listxattr(sys.argv[1]))", place / "xattr-0"
            )
            assert "user.num" in names
            assert "trusted" not in names
            code = "import os, sys; os.getxattr(sys.argv[1], 'trusted.overlay.opaque')"
            assert "No data available" in python(NOBODY, code, place / "xattr-0")

    def test_awkward_names(self, home: Path, place: Path) -> None:
        image = home / "an image, with\\ ünïcode \udcff.erofs"
        shutil.copy(IMAGES / "plain.erofs", image)
        with mounted(image, place, **as_user(NOBODY)):
            assert [(m.source, m.kind) for m in mounts_at(place)] == [
                (str(image), "fuse.pyerofs-fuse")
            ]

    def test_auto_unmount(self, image: Path, place: Path) -> None:
        with mounted(image, place, "-o", "auto_unmount", **as_user(NOBODY)):
            for pid in daemons(place):
                os.kill(pid, 9)
            assert wait_until(lambda: not is_mounted(place))

    def test_a_mount_point_of_somebody_else(self, image: Path, place: Path) -> None:
        os.chown(place, 0, 0)
        assert_refused(run(image, place, **as_user(NOBODY)), place)

    def test_allow_other_needs_permission(self, image: Path, place: Path) -> None:
        settings = Path("/etc/fuse.conf")
        if settings.exists() and "user_allow_other" in settings.read_text().split():
            pytest.skip("/etc/fuse.conf gives it to everybody")
        done = run("-o", "allow_other", image, place, **as_user(NOBODY))
        assert_refused(done, place)
        assert "user_allow_other" in done.stderr

    def test_an_image_that_may_not_be_read(self, image: Path, place: Path) -> None:
        image.chmod(0o600)
        done = run(image, place, **as_user(NOBODY))
        assert_refused(done, place)
        assert str(image) in done.stderr


def assert_refused(done: subprocess.CompletedProcess[str], where: Path) -> None:
    """One line says why nothing was mounted."""
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("pyerofs-fuse: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    assert not is_mounted(where)
    assert daemons(where) == []


def test_without_permission_to_use_fuse(image: Path, place: Path) -> None:
    if DEVICE.stat().st_mode & 0o006:
        pytest.skip("everybody may open /dev/fuse here")
    done = run(image, place, **as_user(NOBODY))
    assert_refused(done, place)
    assert "/dev/fuse" in done.stderr


# --- mounts of root -------------------------------------------------------------------------


def test_a_private_mount_of_root(image: Path, place: Path) -> None:
    with mounted(image, place):
        assert read(0, place / "none") == "read"
        assert read(NOBODY, place / "text") == "PermissionError"


def test_a_shared_mount_checks_modes(image: Path, place: Path) -> None:
    with mounted(image, place, "-o", "allow_other"):
        assert {"allow_other", "default_permissions"} <= set(mounts_at(place)[0].options)
        assert read(NOBODY, place / "text") == "read"
        assert read(NOBODY, place / "many" / "hard-2") == "read"
        assert read(NOBODY, place / "none") == "PermissionError"


def test_a_shared_mount_checks_acls(image: Path, place: Path) -> None:
    with mounted(image, place, "-o", "allow_other"):
        assert (place / "xattr-3").stat().st_mode & 0o007 == 0
        assert read(NOBODY, place / "xattr-3") == "PermissionError"
        assert read(READER + 1, place / "xattr-3") == "PermissionError"
        assert read(READER, place / "xattr-3") == "read"  # the ACL names this one
        assert read(0, place / "xattr-3") == "read"


def test_a_shared_mount_hides_trusted_xattrs(image: Path, place: Path) -> None:
    code = "import os, sys; print(sorted(os.listxattr(sys.argv[1])))"
    with mounted(image, place, "-o", "allow_other"):
        # root last: what root is told must not be remembered for others, nor the reverse
        for uid, visible in ((0, True), (NOBODY, False), (0, True)):
            assert ("trusted" in python(uid, code, place / "xattr-4")) == visible


def test_root_may_be_let_in(image: Path, place: Path) -> None:
    with mounted(image, place, "-o", "allow_root"):
        assert read(0, place / "text") == "read"

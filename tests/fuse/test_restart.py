"""``pyerofs mounts --restart``: a mount goes on with another program, and no reader notices."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.fuse.mounting import (
    daemons,
    digests,
    is_mounted,
    keeper,
    kill,
    mounted,
    restart,
    servers,
    status_of,
    unmount,
    wait_until,
)
from tests.fuse.test_keeper import Readers, alter, drop_caches, mount_altered
from tests.manifests import IMAGES

IMAGE = IMAGES / "lz4hc.erofs"


def have_ended(pids: list[int], where: Path) -> bool:
    return not set(pids) & set(daemons(where))


def restarted(where: Path) -> None:
    done = restart(where)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{where}: now served by pyerofs ")


def test_readers_notice_nothing(mount: Path, want: dict[str, str]) -> None:
    first = keeper(mount)
    readers = Readers(mount, want, 6)
    times = 0
    while readers.are_running:
        before = servers(mount)
        restarted(mount)
        assert keeper(mount) == first
        assert wait_until(partial(have_ended, before, mount))
        times += 1
        drop_caches()
    assert readers.finish() > 0
    assert times > 1
    status = status_of(mount)
    assert (status["restarts"], status["protected"]) == (times, True)
    assert Path(f"/proc/{first}/comm").read_text() == "pyerofs-fuse\n"
    os.kill(servers(mount)[0], signal.SIGKILL)
    drop_caches()
    assert digests(mount) == want
    unmount(mount)
    assert wait_until(lambda: not daemons(mount))


def test_the_same_image_goes_on(tmp_path: Path, where: Path, want: dict[str, str]) -> None:
    """Not what has its name now; offset and options are kept."""
    path = tmp_path / "image"
    path.write_bytes(bytes(8192) + IMAGE.read_bytes())
    with mounted(path, where, "--offset=8192"):
        path.unlink()
        path.write_bytes(b"another")
        for _ in range(2):
            restarted(where)
            drop_caches()
            assert digests(where) == want


def test_what_was_recorded_is_kept(tmp_path: Path, where: Path) -> None:
    record = tmp_path / "record"
    with mounted(IMAGE, where, f"--record={record}"):
        (where / "size-4097").read_bytes()
        restarted(where)
        (where / "size-4096").read_bytes()
        for pid in servers(where):
            os.kill(pid, signal.SIGKILL)
        (where / "size-4095").read_bytes()
        (where / "size-4097").read_bytes()
        unmount(where)
        assert wait_until(lambda: not daemons(where))
    assert record.read_text() == "/size-4097\n/size-4096\n/size-4095\n"


def helper(where: Path) -> int | None:
    """The process of fusermount3 that waits for the keeper's end."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if words[0] == b"fusermount3" and os.fsencode(where) in words:
                return int(path.parent.name)
    return None


def test_auto_unmount_outlives_a_restart(where: Path) -> None:
    with mounted(IMAGE, where, "-o", "auto_unmount"):
        waiting = helper(where)
        assert waiting is not None
        restarted(where)
        time.sleep(0.2)
        assert helper(where) == waiting
        assert os.listdir(where)
        assert wait_until(lambda: not kill(where))
        assert wait_until(lambda: helper(where) is None)


BROKEN = {
    "does not start": "raise SystemExit(1)",
    "knows another format": "from pyerofs_fuse.direct import handover\nhandover.FORMAT = 2",
    "has servers that die": "server.DirectServer.run = lambda self, what: os._exit(9)",
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=[*BROKEN])
def test_a_new_program_that_is_broken(
    change: str, tmp_path: Path, where: Path, want: dict[str, str]
) -> None:
    """The old servers go on, and one of them becomes the keeper."""
    mount_altered("", where, tmp_path)
    assert wait_until(lambda: status_of(where))
    before = status_of(where)
    alter(change, tmp_path)
    done = restart(where)
    assert done.returncode == 1
    assert done.stderr == (
        f"pyerofs: {where}: the new program has failed (see its log); the old one goes on\n"
    )
    drop_caches()
    assert digests(where) == want
    assert wait_until(lambda: status_of(where))
    status = status_of(where)
    assert (status["restarts"], status["protected"]) == (0, True)
    assert status["pid"] != before["pid"]
    os.kill(status["pid"], signal.SIGTERM)
    assert wait_until(lambda: not is_mounted(where))


def test_mounts_that_can_not_be_restarted(where: Path, tmp_path: Path) -> None:
    done = restart(tmp_path)
    assert done.returncode == 1
    assert "pyerofs has mounted nothing there" in done.stderr
    pytest.importorskip("pyfuse3")
    with mounted(IMAGE, where, "--engine=pyfuse3"):
        assert wait_until(lambda: status_of(where))
        done = restart(where)
    assert done.returncode == 1
    assert f"{where}: can't be restarted" in done.stderr


def test_a_signal_for_another_users_process(where: Path) -> None:
    """A status may name any process; only its owner's is asked to restart."""
    from pyerofs.cli import mounts
    from pyerofs.errors import ErofsError

    with subprocess.Popen(["sleep", "60"]) as other:
        with pytest.raises(ErofsError, match="is no process of its owner"):
            mounts._signal(other.pid, os.getuid() + 1)
        assert other.poll() is None
        other.kill()

"""pyerofs-fuse on older kernels: 6.1 can't send requests again, 6.12 can."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyerofs.system.status import live
from tests.fuse.mounting import cleaned, daemons, keeper, mounted, unmount, wait_until
from tests.manifests import differences, entries_below, golden
from tests.vm.tools import forget_caches

WANT = golden("lz4hc")
OLD = pytest.mark.kernel("6.1")
NEW = pytest.mark.kernel("6.12")
KERNELS = [pytest.param("6.1", marks=OLD), pytest.param("6.12", marks=NEW)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", [(), ("-o", "allow_root"), ("-o", "allow_other")])
def test_everything_is_there(kernel: str, options: tuple[str, ...], tmp_path: Path) -> None:
    """With and without OPEN and OPENDIR."""
    with mounted(WANT, tmp_path / "mnt", "--engine=direct", *options) as where:
        assert differences(WANT, entries_below(where)) == []
        assert differences(WANT, entries_below(where)) == []
        unmount(where)
        assert wait_until(lambda: not daemons(where))


def is_protected(where: Path) -> bool:
    """What the status says, which is there a moment after the mount."""
    found: list[bool] = []

    def look() -> list[bool]:
        found.extend(s["protected"] for s in live() if s["mountpoint"] == os.fspath(where))
        return found

    assert wait_until(look)
    return found[0]


def restart(where: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pyerofs", "mounts", "--restart", os.fspath(where)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


def kill_servers(where: Path) -> None:
    main = keeper(where)
    for pid in daemons(where):
        if pid != main:
            os.kill(pid, signal.SIGKILL)


@NEW
def test_servers_are_killed(tmp_path: Path) -> None:
    with mounted(WANT, tmp_path / "mnt", "--engine=direct") as where:
        assert is_protected(where)
        for _ in range(5):
            kill_servers(where)
            forget_caches()
            assert differences(WANT, entries_below(where)) == []


@NEW
def test_the_program_is_restarted(tmp_path: Path) -> None:
    with mounted(WANT, tmp_path / "mnt", "--engine=direct") as where:
        assert is_protected(where)
        assert restart(where).returncode == 0
        forget_caches()
        assert differences(WANT, entries_below(where)) == []


@OLD
def test_a_server_is_killed_where_nothing_is_sent_again(tmp_path: Path) -> None:
    """Nobody waits for ever: the mount is dead at once, and can be mounted over after unmounting."""
    with cleaned(tmp_path / "mnt") as where:
        with mounted(WANT, where, "--engine=direct"):
            assert not is_protected(where)
            done = restart(where)
            assert done.returncode == 1
            assert "Linux 6.9" in done.stderr
            kill_servers(where)
            assert wait_until(lambda: not daemons(where))
            with pytest.raises(OSError) as caught:
                os.listdir(where)
            assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        with mounted(WANT, where, "--engine=direct"):
            assert differences(WANT, entries_below(where)) == []

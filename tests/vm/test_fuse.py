"""pyerofs-fuse on older kernels: 6.1 can't send requests again, 6.12 can."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from tests.fuse.mounting import (
    cleaned,
    daemons,
    mounted,
    restart,
    servers,
    status_of,
    unmount,
    wait_until,
)
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
    assert wait_until(lambda: status_of(where))
    return bool(status_of(where)["protected"])


def kill_servers(where: Path) -> None:
    for pid in servers(where):
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
    """Readers get an error at once; after unmounting, the image can be mounted there again."""
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

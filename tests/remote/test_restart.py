"""``pyerofs mounts --restart`` of a mount of an image from afar."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.fuse.mounting import (
    cleaned,
    daemons,
    keeper,
    restart,
    status_of,
    unmount,
    wait_until,
)
from tests.remote import oci
from tests.remote.pretend import Pretend, serve
from tests.remote.reading import big
from tests.remote.registry import PASSWORD, USER
from tests.remote.test_mount import mount, pytestmark, read

__all__ = ["pytestmark"]

BIG = big()


def test_a_restart_keeps_the_password_and_the_image(tmp_path: Path) -> None:
    """Although the password's file and the tag have changed; also after the keeper has died."""
    with cleaned(tmp_path / "mnt") as where:
        registry = Pretend("Bearer", {USER: PASSWORD})
        oci.publish(registry, "app", "1", oci.image(BIG.image))
        password = tmp_path / "password"
        password.write_text(PASSWORD)
        with serve(registry) as server:
            words = ["--engine=direct", "--insecure", "--prefetch=none", f"--username={USER}"]
            words += [f"--password-file={password}"]
            mount(*words, f"oci://{server.authority}/app:1", where=where)
            password.unlink()
            oci.publish(registry, "app", "1", oci.image(big(seed=2).image))
            for times in range(1, 4):
                assert wait_until(lambda: status_of(where).get("protected") is True)
                if times == 2:
                    os.kill(keeper(where), signal.SIGKILL)
                    assert wait_until(lambda: status_of(where).get("protected") is False)
                done = restart(where)
                assert (done.returncode, done.stderr) == (0, "")
                assert status_of(where)["restarts"] == times
                registry.revoke()
                assert read(where, times << 20) == BIG.content[times << 20 :][:10]
            assert wait_until(lambda: status_of(where).get("protected") is True)
            for pid in daemons(where):
                shown = Path(f"/proc/{pid}/cmdline").read_bytes()
                assert PASSWORD.encode() not in shown
        unmount(where)
        assert wait_until(lambda: not daemons(where))

"""Servers die; devices and their mounts live on."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from pyerofs_nbd.devices.sysfs import IO_TIMEOUT

from tests.manifests import IMAGES, differences, entries_below, golden
from tests.vm.tools import (
    RECOVERY,
    Reader,
    assert_nothing_left,
    attach,
    attached,
    cleaned,
    forget_caches,
    kill,
    listed,
    ok,
    recovery_files,
    refused,
    report,
    run,
    server_of,
    servers,
    sha256,
    wait_until,
)

PLAIN = IMAGES / "plain.erofs"
DEVICES = golden("blobdev")
SIZE = 32 << 20
STALL = 20.0  # seconds: far above what is measured, far below the kernel's 30 s default
SLACK = 10.0  # seconds above the setting for the kernel's timer (1 s) and a busy, emulated machine


@pytest.fixture(autouse=True)
def _cleaned() -> Iterator[None]:
    with cleaned():
        yield


@pytest.fixture
def where(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Something that takes a while to be read."""
    path = tmp_path / "large"
    block = os.urandom(1 << 20)
    with path.open("wb") as f:
        for i in range(SIZE >> 20):
            f.write(i.to_bytes(8, "big") + block[8:])
    return path


def kept() -> list[Path]:
    return [p for p in recovery_files() if p.suffix == ".json"]


def test_a_reader_waits_for_the_new_server(large: Path) -> None:
    device = attach(large)
    pid = server_of(device)
    reader = Reader(device, 0.005)
    time.sleep(0.5)
    kill(pid)
    time.sleep(1)
    assert reader.process.poll() is None
    assert [row["state"] for row in listed()] == ["dead"]
    start = time.monotonic()
    assert ok("--reattach", device) == f"{device}\n"
    back = time.monotonic()
    found = reader.result()
    report(
        f"killed under a reader: --reattach took {back - start:.2f} s, after it the reader stood"
        f" still for {max(0, found.until - back):.2f} s more, {found.longest:.2f} s in all"
    )
    assert found.digest == sha256(large)
    assert found.longest > 1  # it was a read of then that waited
    assert found.until - back < IO_TIMEOUT / 1000 + SLACK
    assert [row["state"] for row in listed()] == ["alive"]
    ok("--disconnect", device)
    assert_nothing_left()


def test_what_a_dead_server_had_taken_is_not_waited_for_any_longer_than_set() -> None:
    """Requests are in flight for sure, and the kernel's timer is at different places each time."""
    device = attach(PLAIN)
    queue = Path(f"/sys/block/{device[5:]}/queue")
    timeout = int((queue / "io_timeout").read_text()) / 1000
    assert timeout == IO_TIMEOUT / 1000
    stalls = []
    for before in (0.1, 1.1, 2.1):
        pid = server_of(device)
        reader = Reader(device, waiting=True)
        os.kill(pid, signal.SIGSTOP)
        reader.begin()
        time.sleep(before)
        kill(pid)
        ok("--reattach", device)
        back = time.monotonic()
        found = reader.result()
        assert found.digest == sha256(PLAIN)
        stalls.append(found.until - back)
    report(
        "a read that the dead server had taken, from --reattach on: "
        + ", ".join(f"{stall:.2f} s" for stall in stalls)
    )
    assert max(stalls) < timeout + SLACK
    ok("--disconnect", device)
    assert_nothing_left()


def test_a_mount_lives_on(where: Path) -> None:
    device = attach(golden("lz4hc"), "--mount", where)
    kill(server_of(device))
    forget_caches()
    hashing = subprocess.Popen(
        ["sh", "-c", f"find '{where}' -type f -exec sha256sum {{}} +"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="surrogateescape",
    )  # fmt: skip
    assert ok("--reattach", where) == f"{device}\n"
    out, _ = hashing.communicate(timeout=60)
    assert golden("lz4hc").entries["text"]["sha256"] in out
    assert differences(golden("lz4hc"), entries_below(where)) == []
    ok("--unmount", where)
    assert_nothing_left()


def test_reattaching_a_living_device_changes_nothing() -> None:
    device = attach(PLAIN)
    before = servers(), recovery_files()
    done = run("--reattach", device)
    assert (done.returncode, done.stdout) == (0, "")
    assert "lives" in done.stderr
    assert ok("--reattach", "--all") == ""
    assert (servers(), recovery_files()) == before


def test_all_at_once() -> None:
    found = [attach(PLAIN), attach(golden("lz4").image), attach(golden("offset"))]
    for device in found[:2]:
        kill(server_of(device))
    assert ok("--reattach", "--all").split() == found[:2]
    assert [row["state"] for row in listed()] == ["alive"] * 3
    assert sha256(Path(found[0])) == sha256(PLAIN)


@pytest.mark.kernel("6.12")
def test_an_image_with_a_device_of_its_own(where: Path) -> None:
    device = attach(DEVICES, "--mount", where)
    for row in listed():
        if row["pid"] in servers():
            kill(row["pid"])
    assert wait_until(lambda: not servers())
    forget_caches()
    ok("--reattach", device)
    assert differences(DEVICES, entries_below(where)) == []
    ok("--unmount", where)
    assert_nothing_left()


def test_another_source_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "image"
    shutil.copy(PLAIN, source)
    device = attach(source)
    kill(server_of(device))
    shutil.copy(golden("lz4").image, source)
    assert "not what the device showed" in refused("--reattach", device)
    source.unlink()
    assert "No such file" in refused("--reattach", device)
    assert [row["state"] for row in listed()] == ["dead"]
    shutil.copy(PLAIN, source)
    ok("--reattach", device)
    assert sha256(Path(device)) == sha256(PLAIN)


def test_files_of_others_and_broken_ones_are_refused() -> None:
    device = attach(PLAIN)
    kill(server_of(device))
    (path,) = kept()
    good = path.read_bytes()
    for bad in (
        b"",
        b"{",
        b"{}",
        b"\0" * 100,
        good.replace(b'"pyerofs-nbd": 1', b'"pyerofs-nbd": 2'),
    ):
        path.write_bytes(bad)
        assert str(path) in refused("--reattach", device)
    path.write_bytes(good)
    path.chmod(0o666)
    assert "others could have written it" in refused("--reattach", device)
    path.chmod(0o600)
    ok("--reattach", device)


def test_a_dead_device_goes_away_cleanly(where: Path) -> None:
    device = attach(PLAIN, "--mount", where)
    kill(server_of(device))
    ok("--unmount", where)
    assert_nothing_left()
    device = attach(PLAIN)
    kill(server_of(device))
    ok("--disconnect", device)
    assert_nothing_left()


def test_a_blocked_reader_ends_with_a_disconnect(large: Path) -> None:
    device = attach(large)
    kill(server_of(device))
    forget_caches()
    reader = subprocess.Popen(["cat", device], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    time.sleep(0.5)
    assert reader.poll() is None
    run("--disconnect", device)
    _, message = reader.communicate(timeout=30)
    assert reader.returncode == 1
    assert b"error" in message
    assert_nothing_left()


def test_no_patience_for_the_dead(large: Path) -> None:
    device = attach(large, "--dead-timeout", "0")
    kill(server_of(device))
    forget_caches()
    assert subprocess.run(["cat", device], capture_output=True, timeout=30, check=False).returncode


def test_what_is_stale_is_collected() -> None:
    ok("--list")
    device = attach(PLAIN)
    (path,) = kept()
    stale = RECOVERY / "0123456789abcdef.json"
    shutil.copy(path, stale)
    other = attach(PLAIN)
    assert not stale.exists()
    assert len(kept()) == 2
    ok("--disconnect", device)
    ok("--disconnect", other)
    assert_nothing_left()


# --- supervised -----------------------------------------------------------------------------


def test_a_supervisor_starts_new_servers(large: Path) -> None:
    device = attach(large, "--supervise")
    reader = Reader(device, 0.02)
    pids = set()
    for _ in range(4):
        assert wait_until(
            lambda: listed()[0]["state"] == "alive" and listed()[0]["pid"] not in pids
        )
        pids.add(server_of(device))
        kill(server_of(device))
    found = reader.result()
    report(f"four supervised kills: the longest a read took is {found.longest:.2f} s")
    assert found.digest == sha256(large)
    assert found.longest < STALL
    assert len(pids) == 4
    ok("--disconnect", device)
    assert_nothing_left()


def test_a_supervisor_ends_with_the_device(where: Path) -> None:
    attach(PLAIN, "--supervise", "--mount", where)
    assert len(servers()) == 2
    ok("--unmount", where)
    assert_nothing_left()


def test_a_supervisor_ends_with_a_device_that_went_while_the_server_was_dead() -> None:
    device = attach(PLAIN, "--supervise")
    pid = server_of(device)
    (supervisor,) = set(servers()) - {pid}
    os.kill(supervisor, signal.SIGSTOP)
    kill(pid)
    ok("--disconnect", device)
    os.kill(supervisor, signal.SIGCONT)
    assert_nothing_left()


# --- takeover -------------------------------------------------------------------------------


def gone(server: int) -> bool:
    """Whether a server has ended."""
    return server not in servers()


def test_a_takeover_interrupts_nobody(large: Path) -> None:
    device = attach(large)
    reader = Reader(device, 0.01)
    for _ in range(2):
        old = server_of(device)
        assert ok("--takeover", device) == f"{device}\n"
        assert wait_until(partial(gone, old))
        assert server_of(device) != old
    found = reader.result()
    report(f"two takeovers: the longest a read took is {found.longest:.2f} s")
    assert found.digest == sha256(large)
    assert found.longest < STALL
    ok("--disconnect", device)
    assert_nothing_left()


def test_a_supervised_server_can_be_taken_over_by_another() -> None:
    device = attach(PLAIN, "--supervise")
    old = set(servers())
    ok("--takeover", device, "--supervise")
    assert wait_until(lambda: not old & set(servers()))
    kill(server_of(device))
    assert wait_until(lambda: listed()[0]["state"] == "alive")
    assert sha256(Path(device)) == sha256(PLAIN)
    ok("--disconnect", device)
    assert_nothing_left()


def test_a_failed_takeover_leaves_the_old_one(tmp_path: Path) -> None:
    source = tmp_path / "image"
    shutil.copy(PLAIN, source)
    device = attach(source)
    old = server_of(device)
    moved = source.rename(tmp_path / "elsewhere")
    assert "No such file" in refused("--takeover", device)
    assert server_of(device) == old
    forget_caches()
    assert sha256(Path(device)) == sha256(PLAIN)
    moved.rename(source)
    kill(old)
    assert "no living server" in refused("--takeover", device)
    assert attached() == [device[5:]]


def test_half_a_takeover_is_none() -> None:
    """Who asked for it vanishes with the connections in hand."""
    from pyerofs_nbd.lifecycle import control
    from pyerofs_nbd.lifecycle.messages import Devices, TakeoverAsked

    device = attach(PLAIN)
    old = server_of(device)
    (path,) = [p for p in recovery_files() if p.suffix == ".sock"]
    with control.dial(str(path)) as channel:
        control.send(channel, TakeoverAsked())
        message, fds = control.receive(channel)
        assert isinstance(message, Devices)
        assert message.devices[0][0] == int(device[8:])
        for fd in fds:
            os.close(fd)
    forget_caches()
    assert sha256(Path(device)) == sha256(PLAIN)
    assert server_of(device) == old


# --- mount.erofs ----------------------------------------------------------------------------


def by_another_program(line: str, size: int) -> str:
    """A device as mount.erofs attaches it, its server dead already."""
    import socket

    from pyerofs_nbd.devices.netlink import Netlink, connect
    from pyerofs_nbd.devices.sysfs import modprobe

    modprobe()
    where = Path("/run/erofsmount/nbd")
    where.mkdir(parents=True, exist_ok=True)
    path = where / "mountnbd_AbCdEf"
    path.write_text(line)
    path.chmod(0o600)
    ours, theirs = socket.socketpair()
    with Netlink() as netlink, ours, theirs:
        index = netlink.connect(
            connect(size, [theirs.fileno()], block_size=512, dead_timeout=600, identifier=str(path))
        )
    return f"/dev/nbd{index}"


def test_a_device_of_mount_erofs_is_adopted(where: Path) -> None:
    device = by_another_program(f"LOCAL {PLAIN}\n", (1 << 54) - 512)
    (row,) = listed()
    assert (row["source"], row["state"]) == (str(PLAIN), "unknown")
    assert ok("--reattach", device) == f"{device}\n"
    assert int(Path(f"/sys/block/{device[5:]}/size").read_text()) * 512 == PLAIN.stat().st_size
    subprocess.run(["mount", "-o", "ro", "-t", "erofs", device, where], check=True)
    assert differences(golden("plain"), entries_below(where)) == []
    assert listed()[0]["state"] == "alive"
    subprocess.run(["umount", where], check=True)
    ok("--disconnect", device)
    assert_nothing_left()
    assert not Path("/run/erofsmount/nbd/mountnbd_AbCdEf").exists()


def test_what_is_not_known_of_mount_erofs() -> None:
    secret = base64.b64encode(b"user:secret").decode()
    device = by_another_program(
        f"TARINDEX_OCI_BLOB r linux/amd64 sha256:{'0' * 64} {secret} /i \n", 1 << 30
    )
    message = refused("--reattach", device)
    assert "TARINDEX_OCI_BLOB" in message
    assert "secret" not in message
    assert secret not in message
    ok("--disconnect", device)

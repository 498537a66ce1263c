"""Attach, mount, look, unmount, disconnect."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import handmade as hm
from tests.manifests import IMAGES, differences, entries_below, golden
from tests.remote.server import Content, Request, Response, Server, Site
from tests.vm.tools import (
    COMMAND,
    NEWNET,
    NEWNS,
    Reader,
    assert_nothing_left,
    attach,
    attached,
    cleaned,
    listed,
    mounts,
    ok,
    recovery_files,
    refused,
    report,
    run,
    server_of,
    servers,
    sha256,
    unshare,
    wait_until,
)

PLAIN = IMAGES / "plain.erofs"
SHELL = " ".join(COMMAND)


@pytest.fixture(autouse=True)
def _cleaned() -> Iterator[None]:
    with cleaned():
        yield


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """A mount point, with a blank in its name."""
    path = tmp_path / "mount point"
    path.mkdir()
    return path


def in_namespaces(*kinds: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command in namespaces of its own."""
    words = ["unshare", *kinds, "sh", "-c", code]
    return subprocess.run(words, capture_output=True, text=True, timeout=90, check=False)


def shown(name: str, where: Path) -> list[str]:
    want = golden(name)
    return differences(want, entries_below(where))


def check_image(name: str, where: Path) -> None:
    """Mount an image, compare everything in it with the manifest, unmount."""
    device = attach(golden(name), "--mount", where)
    assert f"{device} {str(where).replace(' ', chr(92) + '040')} erofs ro" in mounts()
    assert shown(name, where) == []
    ok("--unmount", where)
    assert_nothing_left()


# --- images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "lz4hc", "chunk-indexes", "offset"])
def test_images_on_the_old_kernel(name: str, where: Path) -> None:
    check_image(name, where)


@pytest.mark.kernel("6.12")
@pytest.mark.parametrize(
    "name",
    ["lzma", "deflate-C32k-dict", "dedupe-frag-zstd", "b512", "tar-index", "blobdev"],
)
def test_images_on_the_new_kernel(name: str, where: Path) -> None:
    check_image(name, where)


def test_a_device_has_the_bytes_of_its_source() -> None:
    device = attach(PLAIN)
    assert sha256(Path(device)) == sha256(PLAIN)
    assert int(Path(f"/sys/block/{device[5:]}/size").read_text()) * 512 == PLAIN.stat().st_size
    with pytest.raises(PermissionError), open(device, "r+b") as f:
        f.write(b"x" * 512)
    ok("--disconnect", device)
    assert_nothing_left()


def test_a_source_that_ends_within_a_sector(tmp_path: Path) -> None:
    source = tmp_path / "odd"
    source.write_bytes(bytes(range(256)) * 3 + b"end")
    device = attach(source)
    found = Path(device).read_bytes()
    assert found == source.read_bytes().ljust(1024, b"\0")
    ok("--disconnect", device)


def test_several_at_once(tmp_path: Path) -> None:
    names = ["plain", "lz4hc", "chunk-indexes"]
    found = {}
    for name in names:
        where = tmp_path / name
        where.mkdir()
        found[attach(golden(name), "--mount", where)] = where
    assert len(found) == 3
    for name, where in zip(names, found.values(), strict=True):
        assert shown(name, where) == []
    rows = {row["device"]: row for row in listed()}
    assert set(rows) == set(found)
    for device, where in found.items():
        row = rows[device]
        assert (row["state"], row["mountpoints"]) == ("alive", [str(where)])
        assert row["fetched"] > 0
    for device in found:
        ok("--unmount", device)
    assert_nothing_left()


# --- settings, and what is left -------------------------------------------------------------


def test_settings(where: Path) -> None:
    device = attach(PLAIN, "--mount", where)
    queue = Path(f"/sys/block/{device[5:]}/queue")
    wanted = {"io_timeout": "2000", "max_sectors_kb": "1024", "read_ahead_kb": "1024"}
    assert {name: (queue / name).read_text().strip() for name in wanted} == wanted
    (path,) = [p for p in recovery_files() if p.suffix == ".json"]
    backend = Path(f"/sys/block/{device[5:]}/backend").read_text()
    assert backend.rstrip("\n") == str(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_plain_umount_is_the_end_of_it(where: Path) -> None:
    attach(PLAIN, "--mount", where)
    subprocess.run(["umount", where], check=True)
    assert_nothing_left()


def test_unmount_by_device_and_twice_mounted(where: Path, tmp_path: Path) -> None:
    device = attach(PLAIN, "--mount", where)
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["mount", "-o", "ro", "-t", "erofs", device, other], check=True)
    ok("--unmount", where)
    assert attached() == [device[5:]]
    assert shown("plain", other) == []
    ok("--unmount", device)
    assert_nothing_left()


def test_mount_options_reach_the_kernel(where: Path) -> None:
    image = golden("offset")
    options = f"offset={image.offset},nodev,noatime,cache_strategy=disabled,x-ours,nofail"
    device = attach(image.image, "--mount", where, "-o", options)
    (line,) = [line for line in mounts().splitlines() if line.startswith(device)]
    found = line.split(" ")[3].split(",")
    assert {"ro", "nodev", "noatime", "cache_strategy=disabled"} <= set(found)
    assert shown("offset", where) == []


def test_the_daemon_keeps_nothing(where: Path) -> None:
    device = attach(PLAIN, "--mount", where)
    pid = server_of(device)
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    for fd in ("0", "1", "2"):
        assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null"
    held = [os.readlink(p) for p in Path(f"/proc/{pid}/fd").iterdir()]
    assert not [h for h in held if "/dev/nbd" in h or str(where) in h]


def test_a_stop_unmounts_but_not_under_a_user(where: Path) -> None:
    device = attach(PLAIN, "--mount", where)
    pid = server_of(device)
    with open(where / "text", "rb"):
        os.kill(pid, signal.SIGTERM)
        assert not wait_until(lambda: pid not in servers(), 1)
        assert shown("plain", where) == []
    os.kill(pid, signal.SIGTERM)
    assert_nothing_left()


def test_the_foreground(where: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "-f", "--mount", where, PLAIN], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        device = process.stdout.readline().strip()
        assert wait_until(lambda: device in mounts())
        assert shown("plain", where) == []
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert_nothing_left()


def test_in_a_pid_namespace(where: Path) -> None:
    code = f"{SHELL} {PLAIN} --mount '{where}' && sha256sum '{where}/text'"
    done = in_namespaces("--pid", "--fork", "--mount-proc", code=code)
    assert (done.returncode, done.stderr) == (0, "")
    assert golden("plain").entries["text"]["sha256"] in done.stdout


# --- by ioctl -------------------------------------------------------------------------------


def test_by_ioctl(where: Path) -> None:
    done = run("--ioctl", "--mount", where, PLAIN)
    assert done.returncode == 0
    assert "can't be reattached" in done.stderr
    device = done.stdout.strip()
    assert shown("plain", where) == []
    assert recovery_files() == []
    assert "without a recovery file" in refused("--reattach", device)
    ok("--unmount", where)
    assert_nothing_left()


def test_by_ioctl_a_chosen_device() -> None:
    done = run("--ioctl", "--nbd-device", "/dev/nbd7", PLAIN)
    assert (done.returncode, done.stdout) == (0, "/dev/nbd7\n")
    done = run("--ioctl", "--nbd-device", "/dev/nbd7", PLAIN)
    assert done.returncode == 1
    assert "/dev/nbd7: is in use" in done.stderr
    assert attached() == ["nbd7"]
    assert sha256(Path("/dev/nbd7")) == sha256(PLAIN)
    ok("--disconnect", "/dev/nbd7")
    assert_nothing_left()


# --- failures leave nothing -----------------------------------------------------------------


def test_choosing_a_device() -> None:
    assert attach(PLAIN, "--nbd-device", "/dev/nbd5") == "/dev/nbd5"
    assert "/dev/nbd5: is in use" in refused("--nbd-device", "nbd5", PLAIN)
    assert attached() == ["nbd5"]
    assert len([p for p in recovery_files() if p.suffix == ".json"]) == 1
    ok("--disconnect", "nbd5")
    assert_nothing_left()


def test_no_such_source(where: Path) -> None:
    assert "No such file" in refused("/no/such/image", "--mount", where)
    assert_nothing_left()


def test_an_empty_source(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert "is empty" in refused(tmp_path / "empty")
    assert_nothing_left()


def test_no_such_mount_point() -> None:
    assert "/no/such/place" in refused(PLAIN, "--mount", "/no/such/place")
    assert_nothing_left()


def test_not_an_image(where: Path, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(os.urandom(1 << 16))
    assert "can't be mounted" in refused(tmp_path / "noise", "--mount", where)
    assert_nothing_left()


def test_an_option_that_the_kernel_does_not_know(where: Path) -> None:
    assert "nonsense" in refused(PLAIN, "--mount", where, "-o", "nonsense")
    assert_nothing_left()


def test_the_wrong_devices(where: Path) -> None:
    image = golden("blobdev")
    message = refused(image.image, "--device", PLAIN, "--device", PLAIN, "--mount", where)
    assert "device" in message or "can't be mounted" in message
    assert_nothing_left()


def test_settings_that_can_not_be_made() -> None:
    def before() -> None:
        unshare(NEWNS)
        subprocess.run(["mount", "--bind", "/sys", "/sys"], check=True)
        subprocess.run(["mount", "-o", "bind,remount,ro", "/sys"], check=True)

    assert "io_timeout" in refused(PLAIN, before=before)
    assert_nothing_left()


def test_no_device_nodes() -> None:
    def before() -> None:
        unshare(NEWNS)
        subprocess.run(["mount", "-t", "tmpfs", "none", "/dev"], check=True)
        os.mknod("/dev/null", 0o20666, os.makedev(1, 3))

    message = refused(PLAIN, before=before)
    assert "/dev/nbd" in message
    assert "devtmpfs" in message
    assert_nothing_left()


def test_without_privilege() -> None:
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", *COMMAND, PLAIN],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "--socket" in done.stderr
    assert "pyerofs-fuse" in done.stderr
    assert_nothing_left()


def test_in_another_network_namespace() -> None:
    assert "network namespace" in refused(PLAIN, before=lambda: unshare(NEWNET))
    assert_nothing_left()


# the root directory is not in the first segment of 1 MiB, so that it can be kept from a mount
FAR = hm.Sparse(hm.build({b"file": hm.inline(b"far away")}, first_nid=50_000))


def keep_waiting(request: Request, _: Site) -> Response:
    return Response(delay=600)


@pytest.mark.parametrize(
    ("number", "hangs"),
    [(signal.SIGTERM, True), (signal.SIGTERM, False), (signal.SIGKILL, True)],
)
def test_interrupted_while_mounting(number: int, hangs: bool, where: Path) -> None:
    """The mount may be stuck because its source is, or just about to succeed."""
    with Server(Content(FAR.read_at(0, FAR.size))) as server:
        if hangs:
            server.inject(keep_waiting, when=lambda request: (request.range or (0, 0))[0] > 0)
        process = subprocess.Popen(
            [*COMMAND, "--mount", where, server.url, "--insecure", "--no-cache"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert wait_until(attached)
        if hangs:
            time.sleep(0.5)
            assert str(where) not in mounts()
        start = time.monotonic()
        process.send_signal(number)
        if process.wait(60) == 0:  # the signal came too late
            assert not hangs
            assert str(where) in mounts()
            ok("--unmount", where)
        assert_nothing_left()
        taken = time.monotonic() - start
    what = "hangs" if hangs else "does not hang"
    report(f"signal {number} to a mount that {what}: nothing is left after {taken:.2f} s")
    assert taken < 8  # and not what takes 10 s to be given up


def test_a_server_that_dies_while_mounting(where: Path) -> None:
    """Its parent ends all the same, and leaves nothing."""
    process = subprocess.Popen(
        [*COMMAND, "--mount", where, PLAIN], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert wait_until(lambda: len(servers()) == 2)
    for pid in servers():
        if pid != process.pid:
            os.kill(pid, signal.SIGKILL)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the server ended unexpectedly" in message
    assert_nothing_left()


def test_a_disconnect_under_a_mount_says_so(where: Path) -> None:
    device = attach(PLAIN, "--mount", where)
    done = run("--disconnect", where)
    assert done.returncode == 0
    assert "still mounted" in done.stderr
    assert wait_until(lambda: not servers())
    assert [row["state"] for row in listed()] == ["disconnected"]
    subprocess.run(["umount", where], check=True)
    assert device not in mounts()
    assert_nothing_left()


def test_not_attached() -> None:
    for mode in ("--unmount", "--disconnect", "--reattach", "--takeover"):
        assert "/dev/nbd3: is not attached" in refused(mode, "/dev/nbd3")
        assert "neither" in refused(mode, "/usr")
    assert ok("--list") == ""
    assert ok("--reattach", "--all") == ""


def test_devices_of_others_are_shown_and_left_alone(tmp_path: Path) -> None:
    """Attached by nbd-client, from our own server."""
    path = tmp_path / "socket"
    with subprocess.Popen([*COMMAND, "--socket", path, PLAIN], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline().startswith(b"nbd+unix://")
            subprocess.run(["nbd-client", "-unix", path, "/dev/nbd2"], check=True,
                           capture_output=True)  # fmt: skip
            assert sha256(Path("/dev/nbd2")) == sha256(PLAIN)
            (row,) = listed()
            assert (row["device"], row["state"], row["source"]) == ("/dev/nbd2", "unknown", None)
            assert ok("--reattach", "--all") == ""
            assert "without a recovery file" in refused("--reattach", "/dev/nbd2")
            assert attach(PLAIN) not in ("/dev/nbd2", None)
            subprocess.run(["nbd-client", "-d", "/dev/nbd2"], check=True, capture_output=True)
        finally:
            server.terminate()


def test_a_control_socket_is_no_door(where: Path) -> None:
    attach(PLAIN, "--mount", where)
    (path,) = [p for p in recovery_files() if p.suffix == ".sock"]
    for packet in (b"", b"nonsense", b"[]", b'{"ask": "nothing"}', b"x" * 60000):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
            channel.settimeout(10)
            channel.connect(str(path))
            channel.send(packet)
            assert channel.recv(100) == b""
    assert shown("plain", where) == []


def test_reading_all_of_a_device_at_once() -> None:
    device = attach(golden("kitchen-sink").image)
    readers = [Reader(device) for _ in range(3)]
    assert {reader.result().digest for reader in readers} == {sha256(golden("kitchen-sink").image)}

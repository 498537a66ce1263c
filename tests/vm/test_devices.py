"""Images with extra devices that they don't map: several NBD devices make one mount."""

from __future__ import annotations

import hashlib
import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyerofs.format import ondisk
from pyerofs.format.crc32c import crc32c
from tests import handmade as hm
from tests.manifests import Manifest, differences, entries_below, golden
from tests.vm.tools import (
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
)

BLOCK = 4096
PIECES = 2048  # blocks of the file on two devices: 8 MiB
FAR = 16  # a block behind what else is in the image


@pytest.fixture(autouse=True)
def _cleaned() -> Iterator[None]:
    with cleaned():
        yield


@pytest.fixture
def where(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def unmapped(name: str, scratch: Path) -> Manifest:
    """A golden image with its devices taken out of its address space."""
    want = golden(name)
    raw = bytearray(want.image.read_bytes())
    fields = ondisk.SUPERBLOCK.unpack_from(raw, ondisk.SUPER_OFFSET)
    found = ondisk.SuperBlock(*fields)
    for i in range(found.extra_devices):
        at = found.devt_slotoff * ondisk.DEVICE_SLOT.size + i * ondisk.DEVICE_SLOT.size
        tag, blocks, _, blocks_high, _ = ondisk.DEVICE_SLOT.unpack_from(raw, at)
        ondisk.DEVICE_SLOT.pack_into(raw, at, tag, blocks, 0, blocks_high, 0)
    block = 1 << found.blkszbits
    covered = block - ondisk.SUPER_OFFSET if block > ondisk.SUPER_OFFSET else block
    checksum = ondisk.SUPER_OFFSET + 4
    struct.pack_into("<I", raw, checksum, 0)
    sum_of = bytes(raw[ondisk.SUPER_OFFSET : ondisk.SUPER_OFFSET + covered])
    struct.pack_into("<I", raw, checksum, crc32c(sum_of))
    image = scratch / f"{name}-unmapped"
    image.write_bytes(raw)
    return replace(want, image=image)


def on_two_devices(scratch: Path) -> tuple[list[Path], bytes]:
    """An image with a file whose blocks are on two others in turns; paths, and the file's content.

    No block follows the number of the one before it: the kernel would make one request of both,
    whatever their devices."""
    half = PIECES // 2
    one, two = hm.noise(half * BLOCK, 1), hm.noise(half * BLOCK, 2)
    places = [
        (1, i // 2) if i % 2 == 0 else (2, (i // 2 + half // 2) % half) for i in range(PIECES)
    ]
    content = b"".join(
        (one, two)[device - 1][block * BLOCK : (block + 1) * BLOCK] for device, block in places
    )
    # the indices are longer than a block, so the inode is where nothing else is
    inode = hm.chunks(len(content), places)
    image = hm.build(
        {b"small": hm.inline(b"small\n")},
        {FAR: inode},
        incompat=ondisk.INCOMPAT_CHUNKED_FILE,
        devices=[(half, 0)] * 2,
        elsewhere={b"file": ((FAR * BLOCK - hm.METADATA) // 32, ondisk.FT_REG_FILE)},
    )
    paths = [scratch / name for name in ("primary", "one", "two")]
    hm.save(image, paths[0])
    paths[1].write_bytes(one)
    paths[2].write_bytes(two)
    return paths, content


def mount(paths: list[Path], where: Path, *options: str) -> str:
    image, *devices = paths
    extra = [word for path in devices for word in ("--device", path)]
    return attach(image, *extra, "--mount", where, *options)


def server() -> int:
    """The process that serves all the devices there are."""
    (found,) = {row["pid"] for row in listed()}
    assert isinstance(found, int)
    return found


def check(want: Manifest, where: Path) -> None:
    device = attach(want, "--mount", where)
    assert len(attached()) == 1 + len(want.devices)
    assert {row["state"] for row in listed()} == {"alive"}
    assert differences(want, entries_below(where)) == []

    kill(server())
    assert {row["state"] for row in listed()} == {"dead"}
    forget_caches()
    assert ok("--reattach", where) == f"{device}\n"
    assert differences(want, entries_below(where)) == []
    ok("--unmount", where)
    assert_nothing_left()


def test_one_that_is_not_mapped_on_the_old_kernel(where: Path, tmp_path: Path) -> None:
    check(unmapped("blobdev", tmp_path), where)


@pytest.mark.kernel("6.12")
@pytest.mark.parametrize("name", ["blobdev", "tar-index"])
def test_one_that_is_not_mapped_on_the_new_kernel(name: str, where: Path, tmp_path: Path) -> None:
    check(unmapped(name, tmp_path), where)


def test_one_that_is_mapped_on_a_kernel_that_does_not_mount_it_as_one(where: Path) -> None:
    check(golden("blobdev"), where)


def test_two_of_them_end_with_the_mount(where: Path, tmp_path: Path) -> None:
    paths, content = on_two_devices(tmp_path)
    device = mount(paths, where)
    rows = listed()
    assert [row["size"] for row in rows] == [path.stat().st_size for path in paths]
    assert [row["mountpoints"] for row in rows] == [[str(where)]] * 3
    assert rows[0]["device"] == device
    assert len([p for p in recovery_files() if p.suffix == ".json"]) == 3
    assert (where / "file").read_bytes() == content
    subprocess.run(["umount", where], check=True)
    assert_nothing_left()


def test_a_reader_of_both_waits_for_the_new_server(where: Path, tmp_path: Path) -> None:
    paths, content = on_two_devices(tmp_path)
    device = mount(paths, where)
    pid = server()
    reader = Reader(where / "file", waiting=True)
    os.kill(pid, signal.SIGSTOP)  # so that something is in flight when it dies
    reader.begin()
    time.sleep(0.5)
    kill(pid)
    assert ok("--reattach", device) == f"{device}\n"
    back = time.monotonic()
    found = reader.result()
    report(f"three devices of one image: {found.until - back:.2f} s from --reattach on")
    assert found.digest == hashlib.sha256(content).hexdigest()
    ok("--unmount", device)
    assert_nothing_left()


def test_a_supervised_image_on_three_devices(where: Path, tmp_path: Path) -> None:
    paths, content = on_two_devices(tmp_path)
    mount(paths, where, "--supervise")
    reader = Reader(where / "file", 0.02)
    kill(server())
    found = reader.result()
    report(f"three devices of one image, supervised: the longest read took {found.longest:.2f} s")
    assert found.digest == hashlib.sha256(content).hexdigest()
    assert {row["state"] for row in listed()} == {"alive"}
    subprocess.run(["umount", where], check=True)
    assert_nothing_left()


def test_no_device_goes_while_another_is_in_use(where: Path, tmp_path: Path) -> None:
    """Only the first one is what the kernel shows as mounted."""
    paths, content = on_two_devices(tmp_path)
    device = mount(paths, where)
    others = [row["device"] for row in listed()[1:]]
    with (where / "file").open("rb"):
        os.kill(server(), signal.SIGTERM)
        for target in (where, device, *others):
            assert "busy" in refused("--unmount", target)
        assert len(attached()) == 3
        forget_caches()
        assert (where / "file").read_bytes() == content
    again = tmp_path / "again"
    again.mkdir()
    options = ",".join(["ro", *(f"device={other}" for other in others)])
    subprocess.run(["mount", "-t", "erofs", "-o", options, device, again], check=True)
    ok("--unmount", where)
    forget_caches()
    assert (again / "file").read_bytes() == content
    ok("--unmount", others[-1])
    assert_nothing_left()


def test_a_stop_ends_all(where: Path, tmp_path: Path) -> None:
    paths, _ = on_two_devices(tmp_path)
    mount(paths, where)
    os.kill(server(), signal.SIGTERM)
    assert_nothing_left()


def test_a_disconnect_takes_all(tmp_path: Path) -> None:
    paths, _ = on_two_devices(tmp_path)
    attach(paths[0], "--device", paths[1], "--device", paths[2])
    others = [row["device"] for row in listed()]
    assert len(others) == 3
    ok("--disconnect", others[1])
    assert_nothing_left()


def test_failures_on_the_way_leave_none(where: Path, tmp_path: Path) -> None:
    paths, _ = on_two_devices(tmp_path)
    words: list[str | Path] = [paths[0], "--device", paths[1]]
    assert "can't be mounted" in refused(*words, "--mount", where)  # one too few
    assert_nothing_left()
    words += ["--device", paths[2]]
    assert "nonsense" in refused(*words, "--mount", where, "-o", "nonsense")
    assert_nothing_left()
    assert "needs 3 devices" in refused(*words, "--nbd-device", "/dev/nbd4")
    assert_nothing_left()


def test_several_by_ioctl(where: Path, tmp_path: Path) -> None:
    paths, content = on_two_devices(tmp_path)
    done = run("--ioctl", "--mount", where, paths[0], "--device", paths[1], "--device", paths[2])
    assert done.returncode == 0
    assert len(attached()) == 3
    assert (where / "file").read_bytes() == content
    ok("--unmount", where)
    assert_nothing_left()

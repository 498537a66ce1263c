"""An image in a registry, mounted by the kernel."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.manifests import differences, entries_below, golden
from tests.remote import registry as rigs
from tests.remote.oci import image, publish
from tests.remote.reading import SEGMENT, SMALL, many
from tests.remote.server import Server
from tests.vm.tools import (
    COMMAND,
    assert_nothing_left,
    cleaned,
    forget_caches,
    kill,
    listed,
    ok,
    recovery_files,
    refused,
    report,
    server_of,
    wait_until,
)

WANT = golden("lz4hc")
BIG_ONES = (3, 17, 40)


@pytest.fixture(autouse=True)
def _cleaned() -> Iterator[None]:
    with cleaned():
        yield


@pytest.fixture(name="registry")
def start_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[rigs.Registry]:
    if not rigs.available():
        pytest.skip("no docker-registry")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    storage = tmp_path / "storage"
    storage.mkdir()
    with rigs.running(storage) as found:
        yield found


def test_from_a_registry(registry: rigs.Registry, tmp_path: Path) -> None:
    """Mounted, killed, and served again, although the tag leads elsewhere by then."""
    push = rigs.pushing_to(registry)
    publish(push, "app", "1", image(WANT.image.read_bytes()))
    where = tmp_path / "mnt"
    where.mkdir()
    reference = f"{registry.authority}/app:1"
    device = ok("--oci", reference, "--insecure", "--mount", where).strip()
    (where / "text").read_bytes()
    (row,) = listed()
    report(
        f"one file of {WANT.image.stat().st_size} bytes from a registry: {row['fetched']} fetched"
    )
    assert reference.partition(":1")[0] in row["source"]
    assert differences(WANT, entries_below(where)) == []
    assert wait_until(lambda: listed()[0]["verified"] is True)  # all of it has been read
    (path,) = [p for p in recovery_files() if p.suffix == ".json"]
    assert "sha256:" in path.read_text()

    kill(server_of(device))
    publish(push, "app", "1", image(golden("plain").image.read_bytes()))
    forget_caches()
    assert ok("--reattach", where) == f"{device}\n"
    assert differences(WANT, entries_below(where)) == []
    ok("--unmount", where)
    assert_nothing_left()


def test_a_boot_takes_a_part(registry: rigs.Registry, tmp_path: Path) -> None:
    """A listing, a few small files and three large ones of an image with 48 of these."""
    found = many()
    publish(rigs.pushing_to(registry), "app", "1", image(found.image))
    where = tmp_path / "mnt"
    where.mkdir()
    with Server(rigs.Relay(registry.url)) as relay:
        # (not in a fork of this process, which has threads now)
        words = ["--insecure", "--mount", str(where), "--oci", f"{relay.authority}/app:1"]
        subprocess.run([*COMMAND, *words], check=True, capture_output=True, timeout=60)
        begun = len(relay.requests), relay.sent
        assert len(os.listdir(where)) == found.directories + 48
        for number in (0, 1234, 3999):
            path = where / f"dir-{number // 100:02}" / f"file-{number % 100:03}"
            assert path.read_bytes() == SMALL % number
        for number in BIG_ONES:
            content = (where / f"large-{number:02}").read_bytes()
            assert content == b"%06d" % number + found.large[6:]
        (row,) = listed()
        assert row["verified"] is False  # not everything is there that its digest is about
        requests, sent = relay.requests, relay.sent
    report(
        f"a boot from a registry: {len(requests)} requests, {sent / SEGMENT:.1f} of"
        f" {len(found.image) / SEGMENT:.1f} MiB; to be mounted, {begun[0]} requests,"
        f" {begun[1] / SEGMENT:.1f} MiB"
    )
    metadata = -(-found.metadata // SEGMENT)
    documents = [request for request in requests if "/blobs/" not in request.path]
    assert len(documents) <= 3
    # the first segment comes with the first answer; behind each large file it may read ahead
    assert len(requests) - len(documents) <= metadata + 3 * len(BIG_ONES)
    assert sent <= (metadata + 4 * len(BIG_ONES)) * SEGMENT + 10_000
    ok("--unmount", where)
    assert_nothing_left()


def test_what_a_registry_does_not_have(registry: rigs.Registry, tmp_path: Path) -> None:
    message = refused("--oci", f"{registry.authority}/no/such:1", "--insecure", "--mount", tmp_path)
    assert "no/such" in message
    assert_nothing_left()
    registry.stop()
    refused("--oci", f"{registry.authority}/no/such:1", "--insecure", "--timeout", "2")
    assert_nothing_left()
    assert os.listdir(tmp_path)

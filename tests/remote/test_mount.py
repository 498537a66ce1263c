"""pyerofs-fuse over images from afar."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuse import mounting
from tests.fuse.mounting import (
    COMMAND,
    assert_one_line,
    cleaned,
    daemons,
    foreground,
    is_mounted,
    mounts_at,
    run,
    unmount,
    wait_until,
)
from tests.manifests import Manifest, all_manifests, differences, entries_below, golden
from tests.remote import faults, oci, verity
from tests.remote.conftest import Registries
from tests.remote.pretend import Pretend, SignedStore, serve
from tests.remote.reading import SEGMENT, big, command, file_name, many
from tests.remote.registry import PASSWORD, USER
from tests.remote.server import Content, Pages, Server, Site

pytestmark = [
    pytest.mark.skipif(
        not COMMAND.exists()
        or shutil.which("fusermount3") is None
        or not os.access("/dev/fuse", os.R_OK | os.W_OK),
        reason="can't mount here",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="manifests hold trusted.*, which root alone sees"),
]

BIG = big()
# every kind of layout, codec and device once or twice; all others go through the library
MOUNTED = (
    "kitchen-sink", "b512", "chunk-indexes", "blobdev", "offset", "lzma", "dedupe-frag-zstd",
    "metabox",
)  # fmt: skip
LAYERS = ("plain", "tar-index", "lz4", "extents-ztail", "48bit", "zdir")
every_other = [m for m in all_manifests() if m.oracle == "kernel"]


@pytest.fixture(params=mounting.ENGINES, scope="module", autouse=True)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    with mounting.using(request.param) as name:
        yield name


@pytest.fixture(name="where")
def mount_point(tmp_path: Path) -> Iterator[Path]:
    with cleaned(tmp_path / "mnt"):
        yield tmp_path / "mnt"


@pytest.fixture(name="registry")
def pretend() -> Iterator[tuple[Pretend, Server]]:
    registry = Pretend()
    oci.publish(registry, "app", "1", oci.image(BIG.image))
    with serve(registry) as server:
        yield registry, server


def mount(*words: object, where: Path, quiet: bool = True, **how: Any) -> str:
    """Mount; what was said on stderr."""
    done = run(*map(str, words), where, **how)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert not quiet or done.stderr == ""
    return done.stderr


def remount(*words: object, where: Path, **how: Any) -> str:
    unmount(where)
    assert wait_until(lambda: not daemons(where))
    return mount(*words, where=where, **how)


# --- golden images ----------------------------------------------------------------------------


@pytest.mark.parametrize("want", [golden(name) for name in MOUNTED], ids=str)
def test_golden_over_http(want: Manifest, where: Path) -> None:
    """Mounted, compared; and again from the cache, the server being stopped."""
    paths = (want.image, *want.devices)
    pages: dict[str, Site] = {f"/{p.name}": Content(p.read_bytes()) for p in paths}
    with Server(Pages(pages)) as server:
        image, *devices = (f"{server.url}/{p.name}" for p in paths)
        words = [f"--offset={want.offset}", *(f"--device={d}" for d in devices), image]
        mount(*words, where=where)
        assert differences(want, entries_below(where)) == []
    remount("--timeout=2", *words, where=where, quiet=False)
    assert differences(want, entries_below(where)) == []


@pytest.mark.parametrize("want", [golden(name) for name in LAYERS], ids=str)
def test_golden_layers(want: Manifest, where: Path, registries: Registries) -> None:
    """As layers of images in a real registry."""
    name = f"mounted/{file_name(want)}"
    for i, path in enumerate((want.image, *want.devices)):
        oci.publish(registries.push, name, f"d{i}", oci.image(path.read_bytes()))
    what = registries.open.reference(name)
    devices = [f"--device={what}:d{i + 1}" for i in range(len(want.devices))]
    mount("--insecure", f"--offset={want.offset}", *devices, f"{what}:d0", where=where)
    assert differences(want, entries_below(where)) == []


def test_many_golden_layers_at_once(tmp_path: Path, registry: tuple[Pretend, Server]) -> None:
    """Mounts share one cache."""
    some = [m for m in every_other if not m.devices and not m.offset][::15]
    places = [tmp_path / m.name for m in some]
    for want in some:
        oci.publish(registry[0], file_name(want), "1", oci.image(want.image.read_bytes()))
    try:
        for want, place in zip(some, places, strict=True):
            place.mkdir()
            what = f"oci://{registry[1].authority}/{file_name(want)}:1"
            mount("--insecure", what, where=place)
        for want, place in zip(some, places, strict=True):
            assert differences(want, entries_below(place)) == []
    finally:
        for place in places:
            with cleaned(place):
                pass


# --- words ------------------------------------------------------------------------------------


class TestWords:
    """However the image is named, it is the same one."""

    @pytest.mark.parametrize(
        "words",
        [
            ["--insecure", "oci://{a}/app:1"],
            ["--insecure", "--oci", "{a}/app:1"],
            ["-o", "insecure", "oci://{a}/app:1"],
            ["-o", "oci.insecure", "{a}/app:1"],
            ["-o", "oci.insecure,oci.layer=0", "{a}/app:1"],
            ["-o", "oci.insecure,oci.blob={d}", "{a}/app:1"],
            ["-o", "oci.insecure,oci.platform=linux/amd64", "{a}/app:1"],
            ["--insecure", "--layer=0", "oci://{a}/app:1"],
            ["--insecure", "--blob", "{d}", "oci://{a}/app:1"],
            ["--insecure", "oci://{a}/app@{m}"],
        ],
        ids=" ".join,
    )
    def test_registry(
        self, registry: tuple[Pretend, Server], where: Path, words: list[str]
    ) -> None:
        store, server = registry
        names = {
            "a": server.authority,
            "d": oci.digest_of(BIG.image),
            "m": store.manifests["app", "1"].digest,
        }
        mount(*(word.format(**names) for word in words), where=where)
        assert (where / "small").read_bytes() == b"small\n"

    def test_layout(self, tmp_path: Path, where: Path) -> None:
        layout = oci.Layout(tmp_path / "layout")
        oci.publish(layout, "", "1", oci.image(BIG.image))
        mount("oci-layout:layout:1", where=where, cwd=tmp_path)
        assert (where / "big").read_bytes() == BIG.content

    def test_name_in_the_list_of_mounts(self, where: Path) -> None:
        with Server(Content(BIG.image)) as server:
            mount(f"{server.url}/image?X-Signature=topsecret", where=where)
            (line,) = mounts_at(where)
            assert line.source == f"{server.url}/image"

    @pytest.mark.skipif(not verity.available(), reason="no veritysetup")
    def test_verity(self, where: Path, tmp_path: Path) -> None:
        path = tmp_path / "image"
        path.write_bytes(BIG.image)
        tree = verity.make(path)
        data = bytearray(path.read_bytes())
        data[SEGMENT + (5 << 20)] ^= 1
        with Server(Content(bytes(data))) as server:
            words = [f"--verity-root-hash={tree.root_hash}"]
            words += [f"--verity-hash-offset={tree.hash_offset}"]
            mount(*words, server.url, where=where)
            assert read(where, 0, 1 << 20) == BIG.content[: 1 << 20]
            assert_eio(where, 5 << 20)
            assert read(where, 2 << 20, 1 << 20) == BIG.content[2 << 20 : 3 << 20]


def read(where: Path, offset: int, length: int = 10) -> bytes:
    with (where / "big").open("rb", buffering=0) as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(f.fileno(), length, offset)


def assert_eio(where: Path, offset: int) -> None:
    with pytest.raises(OSError) as caught:
        read(where, offset)
    assert caught.value.errno == errno.EIO


# --- trouble ----------------------------------------------------------------------------------


class TestTrouble:
    def test_nothing_there(self, registry: tuple[Pretend, Server], where: Path) -> None:
        for what in ("http://127.0.0.1:1/x", f"oci://{registry[1].authority}/nothing:1"):
            done = run("--insecure", "--timeout=2", what, where)
            assert_one_line(done)
            assert not is_mounted(where)

    def test_an_outage(self, registry: tuple[Pretend, Server], where: Path) -> None:
        """EIO, what is here stays, and afterwards all is well: the mount outlives it."""
        server = registry[1]
        what = f"oci://{server.authority}/app:1"
        mount("--insecure", "--timeout=1.5", "--prefetch=none", what, where=where)
        assert read(where, 0) == BIG.content[:10]
        server.inject(faults.refused(503))
        assert_eio(where, 5 << 20)
        assert read(where, 0) == BIG.content[:10]
        assert (where / "small").read_bytes() == b"small\n"
        server.heal()
        assert (where / "big").read_bytes() == BIG.content

    def test_readers_can_be_killed_in_an_outage(
        self, registry: tuple[Pretend, Server], where: Path
    ) -> None:
        server = registry[1]
        what = f"oci://{server.authority}/app:1"
        mount("--insecure", "--prefetch=none", what, where=where)
        read(where, 0)
        server.inject(faults.silent)
        server.forget()
        with subprocess.Popen(["tail", "-c", "100", where / "big"]) as process:
            assert wait_until(lambda: server.requests)
            process.terminate()
            assert process.wait(timeout=20) == -signal.SIGTERM
        server.heal()

    def test_the_daemon_can_be_stopped_in_an_outage(
        self, registry: tuple[Pretend, Server], where: Path
    ) -> None:
        server = registry[1]
        what = f"oci://{server.authority}/app:1"
        with foreground("--insecure", "--prefetch=none", what, where=where) as process:
            read(where, 0)
            server.inject(faults.silent)
            server.forget()
            failed = threading.Event()

            def reader() -> None:
                try:
                    read(where, 5 << 20)
                except OSError:
                    failed.set()

            thread = threading.Thread(target=reader)
            thread.start()
            assert wait_until(lambda: server.requests)
            process.terminate()
            assert process.wait(timeout=20) == 0
            thread.join(timeout=20)
            assert failed.is_set()
        assert not is_mounted(where)

    @pytest.mark.parametrize("denied", [401, 403])
    def test_tokens_expire(self, where: Path, denied: int, tmp_path: Path) -> None:
        """Mid-mount, again and again, with blobs on another server."""
        registry = Pretend("Bearer", {USER: PASSWORD}, denied=denied)
        oci.publish(registry, "app", "1", oci.image(BIG.image))
        (tmp_path / "password").write_text(PASSWORD)
        with serve(registry) as server, Server(SignedStore(registry)) as store:
            registry.elsewhere = store.url
            words = ["--insecure", "--prefetch=none", f"--username={USER}"]
            words += [f"--password-file={tmp_path / 'password'}"]
            mount(*words, f"oci://{server.authority}/app:1", where=where)
            for n in range(6):
                registry.revoke()
                assert read(where, n << 20) == BIG.content[n << 20 :][:10]
            assert not any("authorization" in r.headers for r in store.requests)

    def test_changes_on_the_server(self, where: Path) -> None:
        content = Content(BIG.image)
        with Server(content) as server:
            mount("--prefetch=none", server.url, where=where)
            assert read(where, 0) == BIG.content[:10]
            content.data, content.etag = big(seed=2).image, '"second"'
            assert_eio(where, 5 << 20)
            assert read(where, 0) == BIG.content[:10]

    def test_everything_is_cached_and_the_server_gone(
        self, registry: tuple[Pretend, Server], where: Path
    ) -> None:
        server = registry[1]
        what = f"oci://{server.authority}/app:1"
        mount("--insecure", what, where=where)
        assert (where / "big").read_bytes() == BIG.content
        server.stop()
        remount("--insecure", "--timeout=2", what, where=where, quiet=False)
        assert (where / "big").read_bytes() == BIG.content


def test_status(registry: tuple[Pretend, Server], where: Path) -> None:
    """What `pyerofs mounts` says of a mount is what the server has seen of it."""
    server = registry[1]
    what = f"oci://{server.authority}/app:1"
    mount("--insecure", "--prefetch=none", what, where=where)
    server.inject(faults.refused(503), times=2)
    assert (where / "big").read_bytes() == BIG.content

    def numbers() -> dict[str, Any]:
        (found,) = json.loads(command("mounts", "--json").stdout)
        assert found["mountpoint"] == str(where)
        (source,) = found["sources"]
        assert isinstance(source, dict)
        return source

    assert wait_until(lambda: numbers()["complete"])
    source = numbers()
    assert source["size"] == source["cached"] == len(BIG.image)
    assert source["fetched"] >= len(BIG.image)
    assert source["retries"] == 2
    data = [r for r in server.requests if r.status == 206]
    assert len(data) <= source["requests"] <= len(server.requests) + 1  # one may have met no TLS
    unmount(where)
    assert wait_until(lambda: not daemons(where))
    assert json.loads(command("mounts", "--json").stdout) == []


# --- laziness and prefetching -----------------------------------------------------------------


class TestLaziness:
    IMAGE = many()

    @pytest.fixture(name="server")
    def serve_many(self) -> Iterator[Server]:
        with Server(Content(self.IMAGE.image)) as server:
            yield server

    def count(self, where: Path) -> int:
        """``ls -lR``."""
        found = 0
        for top, _, files in os.walk(where):
            for name in files:
                os.lstat(os.path.join(top, name))
            found += len(files)
        return found

    @pytest.mark.parametrize("prefetch", ["none", "metadata"])
    def test_walking(self, server: Server, where: Path, prefetch: str) -> None:
        metadata = -(-self.IMAGE.metadata // SEGMENT)
        mount(f"--prefetch={prefetch}", server.url, where=where)
        assert self.count(where) == self.IMAGE.directories * self.IMAGE.files + 48
        assert len(server.requests) <= 2 + metadata
        assert server.sent <= (metadata + 2) * SEGMENT

    def test_one_file(self, server: Server, where: Path) -> None:
        mount("--prefetch=none", server.url, where=where)
        os.stat(where / "large-20")
        server.forget()
        assert (where / "large-20").read_bytes()[6:] == self.IMAGE.large[6:]
        assert len(server.requests) <= 3
        assert server.sent <= 4 * SEGMENT

    def test_prefetching_all(self, server: Server, where: Path) -> None:
        mount("--prefetch=all", server.url, where=where)
        assert wait_until(lambda: server.sent >= len(self.IMAGE.image), 30)
        server.forget()
        assert (where / "large-47").read_bytes()[:6] == b"000047"
        assert self.count(where) > 0
        assert len(server.requests) <= 2

    def test_prefetching_yields(self, server: Server, where: Path) -> None:
        """While the background fetches slowly, a reader is served within a few requests."""
        server.inject(faults.late(0.05))
        mount("--prefetch=all", "--prefetch-rate=8M", server.url, where=where)
        server.forget()
        assert (where / "large-47").read_bytes()[:6] == b"000047"
        assert server.sent <= 30 * SEGMENT  # it did not wait for all the rest

    def test_recording_and_replaying(self, server: Server, where: Path, tmp_path: Path) -> None:
        record = tmp_path / "touched"
        mount("--prefetch=none", f"--record={record}", server.url, where=where)
        for name in ("large-31", "large-07"):
            (where / name).read_bytes()
        unmount(where)
        assert wait_until(lambda: not daemons(where))
        names = record.read_text().split("\n")
        assert [n.strip("/") for n in names if n] == ["large-31", "large-07"]
        server.forget()
        words = ["--no-cache", "--prefetch=none", f"--prefetch-list={record}"]
        mount(*words, server.url, where=where)

        def asked_for(n: int) -> bool:
            at = SEGMENT * (-(-self.IMAGE.metadata // SEGMENT) + n)
            return any(
                r.range[0] <= at < (r.range[1] or 1 << 62) for r in server.requests if r.range
            )

        assert wait_until(lambda: asked_for(31) and asked_for(7))
        assert not asked_for(20)

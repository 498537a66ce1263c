"""What is kept on disk: for whom, for how long, and that it is never wrong."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import zstandard

import pyerofs
from pyerofs.errors import IntegrityError, SourceError
from tests.remote import faults, oci
from tests.remote.pretend import Pretend, serve
from tests.remote.reading import (
    HANG,
    SEGMENT,
    access,
    assert_all_right,
    big,
    cache_files,
    command,
    data_files,
    opened,
    read_pieces,
    reader,
)
from tests.remote.server import Content, Server, anything

BIG = big()
DIGEST = sha256(BIG.content).hexdigest()


@pytest.fixture(name="server")
def serve_big() -> Iterator[Server]:
    with Server(Content(BIG.image)) as server:
        yield server


@pytest.fixture(name="registry")
def pretend() -> Iterator[tuple[Pretend, Server]]:
    registry = Pretend()
    oci.publish(registry, "app", "1", oci.image(BIG.image))
    with serve(registry) as server:
        yield registry, server


def read_whole(what: str, how: pyerofs.Access | None = None) -> None:
    with opened(what, how) as image:
        assert_all_right(read_pieces(image, BIG.content))


def read_without_error(what: str) -> None:
    with opened(what) as image:
        assert read_pieces(image, BIG.content).wrong == 0


def tried(work: Callable[[], object]) -> str | None:
    """What a SourceError said, if there was one."""
    try:
        work()
    except SourceError as e:
        return str(e)
    return None


def wait_complete(what: str) -> None:
    """Read it all, and wait until that was found to be right."""
    with opened(what) as image:
        assert_all_right(read_pieces(image, BIG.content))
        for _ in range(200):
            if "verified" in command("cache", "ls").stdout:
                return
            time.sleep(0.05)
    pytest.fail("it was never complete")


# --- offline ----------------------------------------------------------------------------------


class TestOffline:
    def test_what_is_there_in_part(
        self, registry: tuple[Pretend, Server], caplog: pytest.LogCaptureFixture
    ) -> None:
        """With a warning; what is missing is an error, what is there is right."""
        server = registry[1]
        what = f"oci://{server.authority}/app:1"
        with opened(what) as image:
            image.read("/big", 3 << 20, 100)
        server.stop()
        with caplog.at_level(logging.WARNING), opened(what, access(timeout=1.0)) as image:
            assert caplog.records
            found = read_pieces(image, BIG.content, [3 << 20, 0])
            assert (found.right, found.wrong, len(found.errors)) == (1, 0, 1)

    def test_whole(self, registry: tuple[Pretend, Server], caplog: Any) -> None:
        caplog.set_level(logging.CRITICAL)
        server = registry[1]
        wait_complete(f"oci://{server.authority}/app:1")
        server.stop()
        read_whole(f"oci://{server.authority}/app:1", access(timeout=1.0))

    def test_never_seen(self, registry: tuple[Pretend, Server]) -> None:
        registry[1].stop()
        with pytest.raises(SourceError, match=registry[1].authority):
            opened(f"oci://{registry[1].authority}/app:1", access(timeout=1.0))

    def test_a_silent_registry(
        self, registry: tuple[Pretend, Server], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Not to answer is another way of not being there."""
        caplog.set_level(logging.CRITICAL)
        what = f"oci://{registry[1].authority}/app:1"
        wait_complete(what)
        registry[1].inject(faults.silent, when=anything)
        read_whole(what, access(timeout=2.0))

    def test_a_tag_that_moves(self, registry: tuple[Pretend, Server]) -> None:
        """While the registry answers, its answer counts."""
        store, server = registry
        what = f"oci://{server.authority}/app:1"
        read_whole(what)
        other = big(seed=2)
        oci.publish(store, "app", "1", oci.image(other.image))
        with opened(what) as image:
            assert_all_right(read_pieces(image, other.content))

    def test_a_tag_that_is_deleted(self, registry: tuple[Pretend, Server]) -> None:
        store, server = registry
        what = f"oci://{server.authority}/app:1"
        read_whole(what)
        del store.manifests["app", "1"]
        with pytest.raises(SourceError):
            opened(what)


# --- sharing ----------------------------------------------------------------------------------


class TestSharing:
    def test_by_names(self, registry: tuple[Pretend, Server]) -> None:
        """A verified blob is a blob, whatever repository it came from."""
        store, server = registry
        oci.publish(store, "other/name", "7", oci.image(BIG.image, note="another manifest"))
        wait_complete(f"oci://{server.authority}/app:1")
        server.forget()
        read_whole(f"oci://{server.authority}/other/name:7")
        assert server.of("/blobs/") == []

    def test_by_processes(self, server: Server, tmp_path: Path) -> None:
        """Two that fetch the same blob at once: each byte about once."""
        processes = [reader(server.url, tmp_path / "shared") for _ in range(2)]
        for process in processes:
            out, err = process.communicate(timeout=HANG)
            assert (process.returncode, out, err) == (0, DIGEST + "\n", "")
        # both ask for the beginning before they know what it is the beginning of
        assert server.sent <= len(BIG.image) + 2 * SEGMENT

    def test_by_many_processes(self, registry: tuple[Pretend, Server], tmp_path: Path) -> None:
        server = registry[1]
        what = f"oci://{server.authority}/app:1"
        processes = [reader(what, tmp_path / "shared") for _ in range(4)]
        for process in processes:
            out, err = process.communicate(timeout=HANG)
            assert (process.returncode, out, err) == (0, DIGEST + "\n", "")
        assert sum(r.sent for r in server.of("/blobs/")) <= 1.5 * len(BIG.image)

    def test_a_process_that_dies_while_it_fetches(self, server: Server, tmp_path: Path) -> None:
        """Its locks die with it: the other one goes on."""
        server.inject(faults.trickle(1 << 20), skip=1)
        first = reader(server.url, tmp_path / "shared")
        while len(server.requests) < 2:
            time.sleep(0.01)
        second = reader(server.url, tmp_path / "shared")
        time.sleep(0.3)
        first.kill()
        first.communicate()
        server.heal()
        out, err = second.communicate(timeout=HANG)
        assert (second.returncode, out, err) == (0, DIGEST + "\n", "")

    def test_of_a_url_by_versions(self, server: Server) -> None:
        """Another version is another blob."""
        content = server.site
        assert isinstance(content, Content)
        read_whole(server.url)
        other = big(seed=2)
        content.data, content.etag = other.image, '"second"'
        with opened(server.url) as image:
            assert_all_right(read_pieces(image, other.content))

    def test_private(self, server: Server) -> None:
        """Nobody else may look in."""
        read_whole(server.url)
        for path in cache_files():
            assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0
        assert (Path(os.environ["XDG_CACHE_HOME"]) / "pyerofs").stat().st_mode & 0o077 == 0


# --- damage -----------------------------------------------------------------------------------


class TestDamage:
    @pytest.mark.parametrize("complete", [False, True], ids=["in part", "complete"])
    @pytest.mark.parametrize("how", ["bit", "zeros", "cut", "empty", "gone", "grown"])
    def test_of_data(self, registry: tuple[Pretend, Server], how: str, complete: bool) -> None:
        """Found by its checksum, and fetched again."""
        what = f"oci://{registry[1].authority}/app:1"
        if complete:
            wait_complete(what)
        else:
            with opened(what) as image:
                image.read("/big", 0, 3 << 20)
        for path in data_files():
            spoil(path, how)
        for _ in range(2):
            with opened(what) as image:
                assert_all_right(read_pieces(image, BIG.content))

    @pytest.mark.parametrize("how", ["bit", "zeros", "cut", "empty", "gone", "noise"])
    def test_of_anything_else(self, registry: tuple[Pretend, Server], how: str) -> None:
        what = f"oci://{registry[1].authority}/app:1"
        wait_complete(what)
        for path in cache_files():
            if path not in data_files():
                spoil(path, how)
        said = tried(lambda: read_without_error(what))
        if said is not None:
            assert "cache" in said  # and what to do about it
            assert command("cache", "rm", "--all").returncode == 0
        with opened(what) as image:
            assert_all_right(read_pieces(image, BIG.content))

    def test_while_it_is_read(self, registry: tuple[Pretend, Server]) -> None:
        """What was checked is what is returned: a complete file that changes later is either still
        right or an error, since every process checks a segment when it first meets it."""
        what = f"oci://{registry[1].authority}/app:1"
        wait_complete(what)
        with opened(what) as image:
            image.read("/small")
            for path in data_files():
                spoil(path, "bit", at=4 << 20)
            assert_all_right(read_pieces(image, BIG.content))

    def test_verify(self, registry: tuple[Pretend, Server]) -> None:
        what = f"oci://{registry[1].authority}/app:1"
        wait_complete(what)
        assert command("cache", "verify").returncode == 0
        (path,) = data_files()
        spoil(path, "bit", at=2 << 20)
        done = command("cache", "verify")
        assert done.returncode == 1
        assert done.stdout + done.stderr
        registry[1].forget()
        read_whole(what)
        assert 0 < sum(r.sent for r in registry[1].of("/blobs/")) <= 2 * SEGMENT


def spoil(path: Path, how: str, at: int | None = None) -> None:
    size = path.stat().st_size
    at = size // 2 if at is None else at
    with path.open("r+b") as f:
        if how == "bit" and size:
            f.seek(at)
            was = f.read(1)
            f.seek(at)
            f.write(bytes([was[0] ^ 16]))
        elif how == "zeros":
            f.write(bytes(min(size, 2 * SEGMENT)))
        elif how == "noise":
            f.write(random.Random(5).randbytes(size))
        elif how == "cut":
            f.truncate(size // 2)
        elif how == "empty":
            f.truncate(0)
        elif how == "grown":
            f.truncate(size + 4096)
    if how == "gone":
        path.unlink()


# --- room -------------------------------------------------------------------------------------


class TestRoom:
    def test_the_oldest_go(self, server: Server) -> None:
        registry = Pretend()
        with serve(registry) as server:
            for seed in (1, 2, 3):
                made = big(seed=seed)
                oci.publish(registry, "app", str(seed), oci.image(made.image))
                what = f"oci://{server.authority}/app:{seed}"
                with opened(what, access(cache_limit=16 << 20)) as image:
                    assert_all_right(read_pieces(image, made.content))
                for path in cache_files():  # times may be coarse
                    status = path.stat()
                    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**10))
            assert command("cache", "prune", "--cache-limit", "16M").returncode == 0
            assert stored() <= 16 << 20
            server.forget()
            with opened(f"oci://{server.authority}/app:3") as image:
                assert_all_right(read_pieces(image, big(seed=3).content))
            assert server.of("/blobs/") == []  # the newest is still there

    def test_nothing_goes_that_is_in_use(self, server: Server) -> None:
        with opened(server.url) as image:
            assert_all_right(read_pieces(image, BIG.content))
            command("cache", "prune", "--cache-limit", "1M")
            command("cache", "rm", "--all")
            server.stop()
            assert_all_right(read_pieces(image, BIG.content))
        assert command("cache", "rm", "--all").returncode == 0
        assert data_files() == []

    def test_commands(self, registry: tuple[Pretend, Server]) -> None:
        what = f"oci://{registry[1].authority}/app:1"
        assert command("cache", "ls").returncode == 0
        wait_complete(what)
        listed = command("cache", "ls")
        assert oci.digest_of(BIG.image)[:15] in listed.stdout
        found = json.loads(command("cache", "ls", "--json").stdout)
        assert found
        done = command("cache", "rm", oci.digest_of(BIG.image))
        assert (done.returncode, done.stderr) == (0, "")
        assert data_files() == []
        assert command("cache", "rm", "sha256:" + "0" * 64).returncode == 1

    def test_none_is_wanted(self, server: Server, tmp_path: Path) -> None:
        """--no-cache: nothing on disk, and no more is held in memory than need be."""
        read_whole(server.url, access(cache=False))
        assert cache_files() == []
        assert not (tmp_path / "cache" / "pyerofs").exists()

    def test_elsewhere(self, server: Server, tmp_path: Path) -> None:
        read_whole(server.url, access(cache_dir=str(tmp_path / "there" / "deep")))
        assert cache_files() == []
        assert data_files(tmp_path / "there" / "deep")

    def test_where_nothing_can_be_written(
        self, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A cache that can't be used is no reason not to read."""
        (tmp_path / "file").write_text("not a directory")
        how = access(cache_dir=str(tmp_path / "file" / "cache"))
        with caplog.at_level(logging.WARNING):
            said = tried(lambda: read_whole(server.url, how))
        assert "file" in said if said is not None else caplog.records

    @pytest.mark.parametrize("megabytes", [1, 4])
    def test_a_full_disk(
        self,
        registry: tuple[Pretend, Server],
        tmp_path: Path,
        megabytes: int,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Goes on without, with a warning; and what did get kept is right."""
        what = f"oci://{registry[1].authority}/app:1"
        with small_disk(tmp_path / "disk", megabytes) as disk:
            how = access(cache_dir=str(disk / "cache"))
            for _ in range(2):
                with caplog.at_level(logging.WARNING):
                    read_whole(what, how)
                assert caplog.records
                caplog.clear()
            for path in disk.rglob("*.data"):
                path.unlink()

    def test_a_full_disk_and_zstd(
        self, registry: tuple[Pretend, Server], tmp_path: Path, caplog: Any
    ) -> None:
        caplog.set_level(logging.CRITICAL)
        store, server = registry
        packed = oci.layer(zstandard.compress(BIG.image), oci.EROFS_ZSTD)
        made = oci.manifest(packed, diff_ids=[oci.digest_of(BIG.image)])
        oci.publish(store, "app", "zstd", made)
        with small_disk(tmp_path / "disk", 2) as disk:
            how = access(cache_dir=str(disk / "cache"))
            said = tried(lambda: read_whole(f"oci://{server.authority}/app:zstd", how))
        assert said is None or "space" in said


@contextmanager
def small_disk(where: Path, megabytes: int) -> Iterator[Path]:
    """A file system with little room."""
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("only root can make small disks")
    where.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(where)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("can't mount a tmpfs here")
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)


def stored() -> int:
    return sum(path.stat().st_blocks * 512 for path in cache_files())


class TestZstd:
    def test_kept_unpacked(self, registry: tuple[Pretend, Server]) -> None:
        """Fetched once; from then on it is the same blob as the plain one."""
        store, server = registry
        packed = oci.layer(zstandard.compress(BIG.image), oci.EROFS_ZSTD)
        made = oci.manifest(packed, diff_ids=[oci.digest_of(BIG.image)])
        oci.publish(store, "app", "zstd", made)
        for _ in range(2):
            read_whole(f"oci://{server.authority}/app:zstd")
        read_whole(f"oci://{server.authority}/app:1")
        assert sum(r.sent for r in server.of("/blobs/")) <= len(packed.data) + 10_000

    def test_in_memory(self, registry: tuple[Pretend, Server]) -> None:
        store, server = registry
        packed = oci.layer(zstandard.compress(BIG.image), oci.EROFS_ZSTD)
        made = oci.manifest(packed, diff_ids=[oci.digest_of(BIG.image)])
        oci.publish(store, "app", "zstd", made)
        read_whole(f"oci://{server.authority}/app:zstd", access(cache=False))
        assert cache_files() == []


def test_wrong_blobs_are_not_kept(
    registry: tuple[Pretend, Server], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    store, server = registry
    store.blobs[oci.digest_of(BIG.image)] = BIG.image[:-5] + b"wrong"
    what = f"oci://{server.authority}/app:1"
    with opened(what) as image:
        read_pieces(image, BIG.content)
        for _ in range(200):
            if read_pieces(image, BIG.content, [0]).failed == {IntegrityError}:
                break
            time.sleep(0.05)
        else:
            pytest.fail("nobody noticed")
    assert data_files() == []

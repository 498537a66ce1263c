"""What a password in the environment, and a layer that can not be unpacked, leave behind: nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zstandard

from pyerofs.errors import SourceError
from tests.fuse.mounting import COMMAND, cleaned, daemons, foreground, run, wait_until
from tests.manifests import golden
from tests.remote import faults, oci
from tests.remote.oci import image, layer, manifest, publish
from tests.remote.pretend import Pretend, serve
from tests.remote.reading import (
    HANG,
    ROOT,
    assert_all_right,
    big,
    cache_files,
    command,
    opened,
    read_pieces,
)
from tests.remote.registry import PASSWORD, USER
from tests.remote.server import Server

SECRET = "what-is-in-PYEROFS_PASSWORD"
NBD = [sys.executable, "-m", "pyerofs_nbd"]

can_mount = pytest.mark.skipif(
    importlib.util.find_spec("pyfuse3") is None
    or not COMMAND.exists()
    or shutil.which("fusermount3") is None
    or not os.access("/dev/fuse", os.R_OK | os.W_OK),
    reason="can't mount here",
)


# --- credential helpers ---------------------------------------------------------------------


@dataclass
class Rig:
    """A registry, and a helper that writes down what it is told."""

    registry: Pretend
    server: Server
    notes: Path

    @property
    def what(self) -> str:
        return f"oci://{self.server.authority}/app:1"

    def environments(self) -> list[dict[str, str]]:
        """That of each helper that has been run."""
        assert self.notes.exists(), "no helper was run"
        texts = self.notes.read_bytes().split(b"\0END\0")[:-1]
        lines = [os.fsdecode(text).split("\0") for text in texts]
        return [dict(line.split("=", 1) for line in found if "=" in line) for found in lines]

    def assert_untold(self) -> None:
        """The helpers were run, with an environment, but without the password."""
        for found in self.environments():
            # names only: what else is in there is no business of a report's
            assert "PATH" in list(found)
            assert [name for name in found if name == "PYEROFS_PASSWORD"] == []
            assert [name for name, value in found.items() if SECRET in value] == []


@pytest.fixture(name="rig", params=["credHelpers", "credsStore"])
def build(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rig]:
    registry = Pretend("Bearer", {USER: PASSWORD})
    publish(registry, "app", "1", image(big().image))
    programs, config = tmp_path / "programs", tmp_path / "docker"
    programs.mkdir()
    config.mkdir()
    notes = tmp_path / "notes"
    helper = programs / "docker-credential-xyz"
    answer = json.dumps({"ServerURL": "", "Username": USER, "Secret": PASSWORD})
    lines = ["#!/bin/sh", f"env -0 >>{notes}", f"printf '\\0END\\0' >>{notes}", "cat >/dev/null"]
    helper.write_text("\n".join([*lines, f"echo '{answer}'", ""]))
    helper.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_CONFIG", str(config))
    monkeypatch.setenv("PYEROFS_PASSWORD", SECRET)
    with serve(registry) as server:
        kinds: dict[str, object] = {
            "credHelpers": {"credHelpers": {server.authority: "xyz"}},
            "credsStore": {"credsStore": "xyz"},
        }
        helpers = kinds[request.param]
        (config / "config.json").write_text(json.dumps(helpers))
        yield Rig(registry, server, notes)


def test_a_helper_of_a_command(rig: Rig) -> None:
    done = command("cat", rig.what, "small", "--insecure")
    assert (done.returncode, done.stdout) == (0, "small\n"), done.stderr
    rig.assert_untold()


def test_a_helper_beside_a_password_file(rig: Rig, tmp_path: Path) -> None:
    """Then nobody has even looked at the variable."""
    path = tmp_path / "password"
    path.write_text("something\n")
    done = command("cat", rig.what, "small", "--insecure", "--password-file", path)
    assert (done.returncode, done.stdout) == (0, "small\n"), done.stderr
    rig.assert_untold()


@can_mount
def test_a_helper_of_a_mount(rig: Rig, tmp_path: Path) -> None:
    with foreground("--insecure", "--prefetch=none", rig.what, where=tmp_path / "mnt"):
        assert (tmp_path / "mnt" / "small").read_bytes() == b"small\n"
    rig.assert_untold()


@can_mount
def test_a_helper_that_a_daemon_runs_later(rig: Rig, tmp_path: Path) -> None:
    """Its tokens and what the helper had said are no good any more."""
    with cleaned(tmp_path / "mnt") as where:
        done = run("--insecure", "--prefetch=none", rig.what, where)
        assert (done.returncode, done.stderr) == (0, "")
        rig.notes.unlink()
        rig.registry.users = {USER: "another"}
        rig.registry.revoke()
        with pytest.raises(OSError, match="Input/output error"):
            (where / "big").read_bytes()
    rig.assert_untold()


def test_a_helper_of_a_server(rig: Rig, tmp_path: Path) -> None:
    with nbd_server("--insecure", "--prefetch", "none", rig.what, path=tmp_path / "socket"):
        pass
    rig.assert_untold()


# --- what can be seen of a process ----------------------------------------------------------


@contextmanager
def nbd_server(*words: str | Path, path: Path, **how: Any) -> Iterator[subprocess.Popen[str]]:
    """The server, once it serves."""
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen(
        [*NBD, "--socket", path, *words], text=True, stdin=subprocess.DEVNULL, **(settings | how)
    ) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                pytest.fail(f"it does not serve: {process.communicate(timeout=HANG)}")
            yield process
        finally:
            process.kill()


def environment_of(pid: int) -> bytes:
    """As its owner, root and whoever has a dump of it can see it."""
    return Path(f"/proc/{pid}/environ").read_bytes()


WITH_SECRET = {"PYEROFS_PASSWORD": SECRET, "AFTERWARDS": "stays"}


def assert_forgotten(pid: int) -> None:
    found = environment_of(pid).split(b"\0")
    assert [line for line in found if line.startswith(b"AFTERWARDS=")] == [b"AFTERWARDS=stays"]
    assert [line for line in found if SECRET.encode() in line] == []


@can_mount
@pytest.mark.parametrize("source", ["here", "far", "password file"])
def test_the_environment_of_a_daemon(source: str, tmp_path: Path) -> None:
    """Of every process of it, whether or not it had a use for the password."""
    path = tmp_path / "password"
    path.write_text(SECRET)
    registry = Pretend("Bearer", {USER: SECRET})
    publish(registry, "app", "1", image(big().image))
    with serve(registry) as server, cleaned(tmp_path / "mnt") as where:
        far: list[str | Path] = ["--insecure", "--username", USER]
        far.append(f"oci://{server.authority}/app:1")
        words: dict[str, list[str | Path]] = {
            "here": [golden("plain").image],
            "far": far,
            "password file": [f"--password-file={path}", *far],
        }
        done = run(*words[source], where, env=os.environ | WITH_SECRET)
        assert (done.returncode, done.stderr) == (0, "")
        assert daemons(where)
        for pid in daemons(where):
            assert_forgotten(pid)
        assert os.listdir(where)


@can_mount
def test_the_environment_of_a_mount_in_the_foreground(tmp_path: Path) -> None:
    image = golden("plain").image
    with foreground(image, where=tmp_path / "mnt", env=os.environ | WITH_SECRET) as process:
        assert_forgotten(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG) == 0


def test_the_environment_of_a_server(tmp_path: Path) -> None:
    image = golden("plain").image
    with nbd_server(image, path=tmp_path / "socket", env=os.environ | WITH_SECRET) as process:
        assert_forgotten(process.pid)


def test_a_password_in_the_environment_is_used(tmp_path: Path) -> None:
    """Once it is taken out, it is still known."""
    registry = Pretend("Bearer", {USER: SECRET})
    publish(registry, "app", "1", image(big().image))
    with serve(registry) as server:
        what = f"oci://{server.authority}/app:1"
        environment = os.environ | WITH_SECRET
        words = ["--insecure", "--username", USER]
        done = command("cat", what, "small", *words, env=environment)
        assert (done.returncode, done.stdout) == (0, "small\n"), done.stderr
        with nbd_server(*words, what, path=tmp_path / "socket", env=environment):
            pass


# --- layers that can not be unpacked --------------------------------------------------------


def locks() -> list[str]:
    return [path.name for path in cache_files() if "lock" in path.name]


@pytest.mark.parametrize("fault", ["diff id", "frame", "cut", "bomb", "gone"])
def test_no_lock_is_left_where_a_layer_can_not_be_unpacked(fault: str) -> None:
    packed = bytearray(zstandard.compress(big().image))
    diff_id = oci.digest_of(b"something else" if fault == "diff id" else big().image)
    if fault == "frame":
        packed[10] ^= 0x55
    elif fault == "cut":
        del packed[-1000:]
    elif fault == "bomb":
        packed = bytearray(zstandard.compress(bytes(64 << 20)))
    made = layer(bytes(packed), oci.EROFS_ZSTD)
    registry = Pretend()
    publish(registry, "app", "1", manifest(made, diff_ids=[diff_id]))
    with serve(registry) as server:
        if fault == "gone":
            server.inject(faults.refused(404), when=lambda r: "/blobs/" in r.path)
        with pytest.raises(SourceError):
            opened(f"oci://{server.authority}/app:1")
        assert locks() == []


def test_no_lock_is_left_where_unpacking_is_interrupted(tmp_path: Path) -> None:
    registry = Pretend()
    packed = zstandard.compress(big().image)
    made = manifest(layer(packed, oci.EROFS_ZSTD), diff_ids=[oci.digest_of(big().image)])
    publish(registry, "app", "1", made)
    with serve(registry) as server:
        server.inject(faults.silent, when=lambda r: made.blobs[1].digest in r.path)
        with subprocess.Popen(
            [sys.executable, "-m", "pyerofs", "ls", f"oci://{server.authority}/app:1",
             "--insecure"],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            try:
                assert wait_until(
                    lambda: any(made.blobs[1].digest in r.path for r in server.requests)
                )
                process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=HANG)
            finally:
                process.kill()
    assert "Traceback" not in said
    assert process.returncode == 130
    assert locks() == []


def test_no_lock_is_left_where_a_layer_was_unpacked() -> None:
    registry = Pretend()
    packed = zstandard.compress(big().image)
    made = manifest(layer(packed, oci.EROFS_ZSTD), diff_ids=[oci.digest_of(big().image)])
    publish(registry, "app", "1", made)
    with serve(registry) as server, opened(f"oci://{server.authority}/app:1") as found:
        assert_all_right(read_pieces(found, big().content, [0]))
    assert locks() == []

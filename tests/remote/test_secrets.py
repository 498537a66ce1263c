"""Passwords and tokens are seen by nobody: not in arguments, process lists, logs at any level, status
files, messages or the cache."""

from __future__ import annotations

import base64
import importlib.util
import logging
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyerofs.errors import ErofsError
from tests.fuse.mounting import COMMAND, cleaned, daemons, foreground, run, wait_until
from tests.remote import faults
from tests.remote.oci import image, publish
from tests.remote.pretend import Pretend, SignedStore, serve
from tests.remote.reading import (
    HANG,
    ROOT,
    access,
    big,
    cache_files,
    command,
    opened,
    read_pieces,
)
from tests.remote.server import Content, Server, anything

USER = "ada"
PASSWORD = "hunter2-correct-horse"
SIGNATURE = "f00dfeedc0ffee"

can_mount = pytest.mark.skipif(
    importlib.util.find_spec("pyfuse3") is None
    or not COMMAND.exists()
    or not os.access("/dev/fuse", os.R_OK | os.W_OK),
    reason="can't mount here",
)


@dataclass
class Rig:
    """A registry with everything that is secret about it."""

    registry: Pretend
    server: Server
    store: Server

    @property
    def what(self) -> str:
        return f"oci://{self.server.authority}/app:1"

    @property
    def secrets(self) -> list[str]:
        """Whatever must not be seen, in all the forms that it takes."""
        pair = f"{USER}:{PASSWORD}"
        signatures = {
            m[1]
            for r in self.store.requests
            if (m := re.search("X-Signature=([0-9a-f]+)", r.target))
        }
        return [
            PASSWORD,
            base64.b64encode(PASSWORD.encode()).decode().rstrip("="),
            base64.b64encode(pair.encode()).decode().rstrip("="),
            *self.registry.issued,
            *signatures,
        ]

    def assert_none_in(self, text: str | bytes, where: str) -> None:
        raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        for secret in self.secrets:
            assert secret.encode() not in raw, f"{where} holds {secret}"


@pytest.fixture(name="rig")
def build() -> Iterator[Rig]:
    registry = Pretend("Bearer", {USER: PASSWORD})
    publish(registry, "app", "1", image(big().image))
    with serve(registry) as server, Server(SignedStore(registry)) as store:
        registry.elsewhere = store.url
        yield Rig(registry, server, store)


@pytest.fixture(name="password_file")
def write_password(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    path.chmod(0o600)
    return path


def everything_said(caplog: pytest.LogCaptureFixture) -> str:
    """All log records of all libraries, with their arguments and tracebacks."""
    lines = [record.getMessage() for record in caplog.records]
    lines += [repr(record.__dict__) for record in caplog.records]
    lines += [record.exc_text or "" for record in caplog.records]
    return "\n".join(lines)


def trouble(rig: Rig) -> list[str]:
    """Read with everything going wrong that can; what the exceptions say."""
    said = []
    how = access(password=PASSWORD, timeout=1.5)
    with opened(rig.what, how, username=USER) as found:
        read_pieces(found, big().content, [0])
        rig.registry.revoke()
        read_pieces(found, big().content, [1 << 20])
        for fault in (
            faults.refused(403), faults.refused(401), faults.refused(503), faults.hanging_up,
            faults.short(), faults.redirected("http://127.0.0.1:1/?X-Signature=" + SIGNATURE),
        ):  # fmt: skip
            for server in (rig.server, rig.store):
                server.inject(fault, when=anything)
                outcome = read_pieces(found, big().content, [4 << 20, 5 << 20])
                said += [f"{e} {e!r} {e.__cause__!r} {e.__context__!r}" for e in outcome.errors]
                server.heal()
    rig.registry.users = {USER: "something else"}
    rig.registry.revoke()
    try:
        opened(rig.what, how, username=USER)
    except ErofsError as e:
        said.append(f"{e} {e!r} {e.__cause__!r} {e.__context__!r}")
    return said


def test_messages_and_logs(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        said = trouble(rig)
    assert said
    rig.assert_none_in("\n".join(said), "a message")
    assert SIGNATURE not in "\n".join(said)
    for name in {record.name.partition(".")[0] for record in caplog.records}:
        # httpx logs URLs, and httpcore headers; if theirs are heard at all, they hold no secrets
        texts = [r.getMessage() for r in caplog.records if r.name.partition(".")[0] == name]
        if name == "pyerofs":
            rig.assert_none_in("\n".join(texts), f"the log of {name}")
            assert SIGNATURE not in "\n".join(texts)


def test_other_libraries_logs(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """A program that turns on all logs at debug level does not find our secrets in them."""
    with caplog.at_level(logging.DEBUG):
        trouble(rig)
    rig.assert_none_in(everything_said(caplog), "the log")


def test_cache(rig: Rig) -> None:
    trouble(rig)
    files = cache_files()
    assert files
    for path in files:
        rig.assert_none_in(path.read_bytes(), path.name)
        rig.assert_none_in(str(path), "a file name")


def test_representations(rig: Rig) -> None:
    how = access(password=PASSWORD)
    rig.assert_none_in(repr(how), "Access")
    with opened(rig.what, how, username=USER) as found:
        rig.assert_none_in(repr(found), "the image")
        for source in found.sources:
            rig.assert_none_in(f"{source!r} {source.name} {vars(source)}", "a source")


def test_signed_urls(caplog: pytest.LogCaptureFixture) -> None:
    with Server(Content(big().image)) as server, caplog.at_level(logging.DEBUG, "pyerofs"):
        url = f"{server.url}/image?X-Signature={SIGNATURE}"
        with opened(url, access(timeout=1.0)) as found:
            server.inject(faults.refused(503))
            (error,) = read_pieces(found, big().content, [4 << 20]).errors
    assert SIGNATURE not in str(error)
    assert SIGNATURE not in everything_said(caplog)
    for path in cache_files():
        assert SIGNATURE.encode() not in path.read_bytes()


# --- processes --------------------------------------------------------------------------------


def shown_of(pid: int) -> bytes:
    """What anybody on the machine can see of a process, and what its owner can."""
    found = b""
    for name in ("cmdline", "comm", "status"):
        found += Path(f"/proc/{pid}/{name}").read_bytes()
    listed = subprocess.run(
        ["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, check=False
    )
    return found + listed.stdout


def test_commands(rig: Rig, password_file: Path) -> None:
    words = ["--insecure", "--username", USER, "--password-file", password_file]
    done = command("info", rig.what, *words)
    assert done.returncode == 0
    rig.assert_none_in(done.stdout + done.stderr, "the output")
    rig.registry.users = {USER: "another"}
    rig.registry.revoke()
    done = command("info", rig.what, *words, "--cache-dir", password_file.parent / "new")
    assert done.returncode == 1
    rig.assert_none_in(done.stdout + done.stderr, "the output")
    assert PASSWORD not in done.stderr


def test_process_list(rig: Rig, password_file: Path) -> None:
    rig.store.inject(faults.late(1.0))
    words = [rig.what, "big", "--insecure", "--username", USER, "--password-file"]
    words += [str(password_file)]
    with subprocess.Popen(
        [sys.executable, "-m", "pyerofs", "cat", *words], cwd=ROOT, stdout=subprocess.DEVNULL
    ) as process:
        assert wait_until(lambda: rig.store.requests, 20)
        rig.assert_none_in(shown_of(process.pid), "the process list")
        process.kill()


def test_prompt(rig: Rig) -> None:
    """On a terminal the password is asked for and not echoed."""
    words = [sys.executable, "-m", "pyerofs", "cat", rig.what, "small", "--insecure"]
    words += ["--username", USER]
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover - the child
        os.chdir(ROOT)
        os.execv(sys.executable, words)
    said = b""
    end = time.monotonic() + HANG
    typed = False
    while time.monotonic() < end:
        try:
            got = os.read(terminal, 4096)
        except OSError:
            break  # it has ended
        if not got:
            break
        said += got
        if not typed and b"assword" in said:
            time.sleep(0.3)  # until the echo is off
            os.write(terminal, PASSWORD.encode() + b"\n")
            typed = True
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert typed
    assert os.waitstatus_to_exitcode(status) == 0
    assert b"small" in said
    rig.assert_none_in(said, "the terminal")


@can_mount
@pytest.mark.parametrize("words", [["-f"], ["-f", "--dbglevel=9"], ["-d"]], ids=" ".join)
def test_mounts(rig: Rig, password_file: Path, tmp_path: Path, words: list[str]) -> None:
    """Logs of the daemon at all levels, the list of mounts, the status that others can read."""
    where = tmp_path / "mnt"
    given = [*words, "--insecure", f"--username={USER}", f"--password-file={password_file}"]
    with foreground(*given, "--timeout=1.5", rig.what, where=where) as process:
        rig.assert_none_in(shown_of(process.pid), "the process list")
        (where / "small").read_bytes()
        rig.registry.revoke()
        (where / "big").read_bytes()[:10]
        rig.assert_none_in(Path("/proc/self/mountinfo").read_bytes(), "the list of mounts")
        status = command("mounts", "--json")
        assert str(where) in status.stdout
        rig.assert_none_in(status.stdout + status.stderr, "the status")
        for top in (tmp_path / "run", tmp_path / "cache", tmp_path / "home"):
            for path in top.rglob("*"):
                if path.is_file():
                    rig.assert_none_in(path.read_bytes(), str(path))
        process.terminate()
        out, err = process.communicate(timeout=20)
    rig.assert_none_in(out + err, "the daemon's log")


@can_mount
def test_daemons(rig: Rig, password_file: Path, tmp_path: Path) -> None:
    """A password in ``-o`` is mount.erofs' way: it has to be hidden at once."""
    where = tmp_path / "mnt"
    with cleaned(where):
        words = f"oci.insecure,oci.username={USER}"
        env = os.environ | {"PYEROFS_PASSWORD": PASSWORD}
        done = run("-o", words, rig.what.removeprefix("oci://"), where, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        for pid in daemons(where):
            rig.assert_none_in(shown_of(pid), "the process list")
        assert (where / "small").read_bytes() == b"small\n"

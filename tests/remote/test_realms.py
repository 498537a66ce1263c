"""Where passwords go: to the server that was named, to the token server that it names, and there not
in clear text; and messages of those who have no way in, or took a wrong one."""

from __future__ import annotations

import base64
import json
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest import mock

import pytest

from pyerofs.errors import AuthenticationError
from tests.remote.oci import image, publish
from tests.remote.pretend import Pretend
from tests.remote.reading import access, assert_all_right, big, command, opened, read_pieces
from tests.remote.server import Content, Request, Response, Server
from tests.remote.tls import Authority

USER, PASSWORD = "ada", "hunter2-correct-horse"
OTHER = "127.0.0.2"  # another host, as far as names go


class Elsewhere(Server):
    """A server on another host."""

    def __init__(self, *args: Any, **how: Any) -> None:
        create = socket.create_server

        def create_there(address: tuple[str, int], **options: Any) -> socket.socket:
            return create((OTHER, address[1]), **options)

        with mock.patch.object(socket, "create_server", create_there):
            super().__init__(*args, **how)

    @property
    def authority(self) -> str:
        return f"{OTHER}:{self.port}"


@dataclass
class Rig:
    """A registry that wants tokens, and other places where these might be had."""

    registry: Pretend
    server: Server
    authority: Authority
    stack: ExitStack
    password_file: Path

    @property
    def what(self) -> str:
        return f"oci://{self.server.authority}/app:1"

    def tokens(self, *, there: bool = True, tls: bool = False) -> Server:
        """A token server, which the registry names from now on."""
        kind, host = (Elsewhere, OTHER) if there else (Server, "127.0.0.1")
        found = kind(self.registry, tls=self.authority.context(host) if tls else None)
        self.stack.enter_context(found)
        self.registry.realm = f"{found.url}/token"
        return found

    def ls(self, *more: object, cacert: bool = True) -> CompletedProcess[str]:
        words = ["--username", USER, "--password-file", self.password_file, "--timeout", 5]
        trust = ["--cacert", self.authority.certificate] if cacert else []
        return command("ls", self.what, *words, *trust, *more)

    def opened(self, **fields: Any) -> None:
        """Open and read in this process."""
        fields = {"username": USER, "cacert": str(self.authority.certificate)} | fields
        how = access(password=PASSWORD, timeout=5.0)
        with opened(self.what, how, **({"insecure": False} | fields)) as found:
            assert_all_right(read_pieces(found, big().content, [0]))


@pytest.fixture(name="rig")
def build(tmp_path: Path) -> Iterator[Rig]:
    authority = Authority(tmp_path)
    registry = Pretend("Bearer", {USER: PASSWORD})
    publish(registry, "app", "1", image(big().image))
    password_file = tmp_path / "password"
    password_file.write_text(PASSWORD + "\n")
    password_file.chmod(0o600)
    with ExitStack() as stack:
        server = Server(registry, tls=authority.context("127.0.0.1"))
        stack.enter_context(server)
        yield Rig(registry, server, authority, stack, password_file)


def secrets(requests: list[Request]) -> list[Request]:
    """Those that hold the password."""
    pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    return [
        r for r in requests
        if pair in r.headers.get("authorization", "") or PASSWORD in f"{r.target}{r.body!r}"
    ]  # fmt: skip


def assert_refused(done: CompletedProcess[str], *more: str) -> None:
    """One line that says these words."""
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("pyerofs: ")
    for each in more:
        assert each in done.stderr
    assert PASSWORD not in done.stderr


# --- token servers ----------------------------------------------------------------------------


def test_plain_http_elsewhere(rig: Rig) -> None:
    tokens = rig.tokens()
    assert_refused(rig.ls(), "--insecure", tokens.authority)
    assert tokens.requests == []
    with pytest.raises(AuthenticationError, match="--insecure"):
        rig.opened()
    assert tokens.requests == []


def test_plain_http_elsewhere_if_insecure(rig: Rig) -> None:
    tokens = rig.tokens()
    done = rig.ls("--insecure")
    assert (done.returncode, done.stderr) == (0, "")
    assert secrets(tokens.requests)


def test_plain_http_here(rig: Rig) -> None:
    """The same host is no excuse."""
    tokens = rig.tokens(there=False)
    assert_refused(rig.ls(), "--insecure")
    assert tokens.requests == []


@pytest.mark.parametrize("written", ["HTTP://{0}/token", "Http://{0}/token", "//{0}/token?x"])
def test_other_ways_to_write_it(rig: Rig, written: str) -> None:
    """Nothing is sent in clear text, however the place is spelt."""
    tokens = rig.tokens()
    rig.registry.realm = written.format(tokens.authority)
    done = rig.ls()
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert secrets(tokens.requests) == []


def test_nobody_asks_for_clear_text_without_a_password(rig: Rig) -> None:
    """A token for everyone is no secret worth a refusal; or it is refused as well, in one line."""
    rig.registry.users = {}
    rig.tokens()
    done = command("ls", rig.what, "--cacert", rig.authority.certificate)
    assert done.returncode == 0 or done.stderr.count("\n") == 1


def test_identity_tokens_in_clear_text(rig: Rig, tmp_path: Path) -> None:
    """Those of credential files are passwords, too."""
    tokens = rig.tokens()
    rig.registry.refresh_tokens = {"identity-of-ada"}
    config = tmp_path / "home" / ".docker" / "config.json"
    config.parent.mkdir()
    entry = {"identitytoken": "identity-of-ada"}
    config.write_text(json.dumps({"auths": {rig.server.authority: entry}}))
    done = command("ls", rig.what, "--cacert", rig.authority.certificate)
    assert_refused(done, "--insecure")
    assert tokens.requests == []


@pytest.mark.parametrize("tls", [True, False], ids=["https", "--insecure"])
def test_elsewhere_is_said(rig: Rig, tls: bool, caplog: pytest.LogCaptureFixture) -> None:
    tokens = rig.tokens(tls=tls)
    with caplog.at_level(logging.INFO, "pyerofs"):
        rig.opened(**({} if tls else {"insecure": True, "cacert": None}))
    assert secrets(tokens.requests)
    records = [r for r in caplog.records if r.name == "pyerofs" and OTHER in r.getMessage()]
    assert records, "nobody was told that the password went to another host"
    assert {r.levelno for r in records} == {logging.INFO}
    assert any("password" in r.getMessage() for r in records)
    assert PASSWORD not in caplog.text


def test_elsewhere_by_https(rig: Rig) -> None:
    tokens = rig.tokens(tls=True)
    done = rig.ls()
    assert (done.returncode, done.stderr) == (0, "")
    assert secrets(tokens.requests)


def test_here_is_not_worth_a_word(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.registry.realm = f"{rig.server.url}/token"
    with caplog.at_level(logging.WARNING, "pyerofs"):
        rig.opened()
    assert caplog.records == []


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_token_servers_that_redirect(rig: Rig, status: int) -> None:
    """The password stays with the server that was named; a redirect is not a name."""
    there = rig.stack.enter_context(Elsewhere(rig.registry))
    tls = rig.authority.context("127.0.0.1")

    def redirecting(request: Request) -> Response:
        return Response(status, {"Location": f"{there.url}/token"})

    here = rig.stack.enter_context(Server(redirecting, tls=tls))
    rig.registry.realm = f"{here.url}/token"
    for more in ((), ("--insecure",)):
        done = rig.ls(*more)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert secrets(there.requests) == []


# --- messages ---------------------------------------------------------------------------------


def serving(scheme: str) -> Server:
    registry = Pretend(scheme, {USER: PASSWORD})
    publish(registry, "app", "1", image(big().image))
    server = Server(registry)
    registry.realm = f"{server.url}/token"
    return server


@pytest.mark.parametrize("scheme", ["Basic", "Bearer"])
def test_wrong_passwords(scheme: str, tmp_path: Path) -> None:
    """Who gave a user name is not told to give one."""
    wrong = tmp_path / "wrong"
    wrong.write_text("not it\n")
    with serving(scheme) as server:
        what = f"oci://{server.authority}/app:1"
        done = command(
            "ls", what, "--insecure", "--username", USER, "--password-file", wrong
        )  # fmt: skip
        assert_refused(done, "401")
        assert "try --username" not in done.stderr
        assert "not it" not in done.stderr
        done = command("ls", what, "--insecure")
        assert_refused(done, "--username")


def test_wrong_passwords_for_urls(tmp_path: Path) -> None:
    content = Content(big().image)

    def site(request: Request) -> Response:
        return content(request) if "x" in request.path else Response(401)

    wrong = tmp_path / "wrong"
    wrong.write_text("not it\n")
    with Server(site) as server:
        words = ["ls", f"{server.url}/image", "--insecure"]
        done = command(*words, "--username", USER, "--password-file", wrong)
        assert_refused(done, "401")
        assert "try --username" not in done.stderr
        assert_refused(command(*words), "--username")


@pytest.mark.parametrize(
    "reference",
    [
        "registry.example/app:1",
        "registry.example:5000/team/app",
        "ghcr.io/org/app@sha256:" + "0" * 64,
        "docker.io/library/alpine",
        "localhost:5000/app:latest",
    ],
)
@pytest.mark.parametrize("verb", ["ls", "info"])
def test_references_without_a_scheme(verb: str, reference: str, tmp_path: Path) -> None:
    done = command(verb, reference, cwd=tmp_path, env=environment())
    assert_refused(done, f"oci://{reference}")


@pytest.mark.parametrize("name", ["none.erofs", "./none.img", "images/none", "../x/none.erofs"])
def test_files_that_are_not_there(name: str, tmp_path: Path) -> None:
    """What does not look like a reference is only missing."""
    done = command("ls", name, cwd=tmp_path, env=environment())
    assert_refused(done, "No such file")
    assert "oci://" not in done.stderr


def test_files_that_look_like_references(tmp_path: Path) -> None:
    path = tmp_path / "registry.example" / "app:1"
    path.parent.mkdir()
    path.write_bytes(big().image)
    done = command("ls", "registry.example/app:1", cwd=tmp_path, env=environment())
    assert (done.returncode, done.stdout.split()) == (0, ["big", "small"])


def environment() -> dict[str, str]:
    """For a command that runs somewhere else."""
    import os

    from tests.remote.reading import ROOT

    return {**os.environ, "PYTHONPATH": str(ROOT)}

"""Who we are to a registry: challenges, tokens that expire, and where credentials are kept."""

from __future__ import annotations

import base64
import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyerofs
from pyerofs.errors import AuthenticationError, SourceError
from tests.remote import faults
from tests.remote.conftest import Registries
from tests.remote.oci import basic, image, publish
from tests.remote.pretend import Pretend, SignedStore, serve
from tests.remote.reading import (
    access,
    assert_all_right,
    big,
    command,
    in_threads,
    opened,
    read_pieces,
)
from tests.remote.registry import PASSWORD, USER
from tests.remote.server import Response, Server, anything

LOGIN: dict[str, Any] = {"username": USER}


def how(password: str = PASSWORD, **fields: Any) -> pyerofs.Access:
    return access(password=password, **fields)


@pytest.fixture(name="registry")
def pretend() -> Iterator[Pretend]:
    """It wants tokens, for USER only, and has app:1."""
    registry = Pretend("Bearer", {USER: PASSWORD})
    publish(registry, "app", "1", image(big().image))
    with serve(registry) as server:
        registry.server = server  # type: ignore[attr-defined]
        yield registry


def server_of(registry: Pretend) -> Server:
    found = registry.server  # type: ignore[attr-defined]
    assert isinstance(found, Server)
    return found


def what(registry: Pretend) -> str:
    return f"oci://{server_of(registry).authority}/app:1"


# --- real registries --------------------------------------------------------------------------


class TestRealRegistries:
    @pytest.fixture(autouse=True)
    def _image(self, registries: Registries) -> None:
        publish(registries.push, "auth/app", "1", image(big().image))

    def test_anonymous(self, registries: Registries) -> None:
        with opened(registries.open.reference("auth/app:1")) as found:
            assert_all_right(read_pieces(found, big().content))

    def test_basic(self, registries: Registries) -> None:
        reference = registries.htpasswd.reference("auth/app:1")
        with opened(reference, how(), **LOGIN) as found:
            assert_all_right(read_pieces(found, big().content))
        for settings, fields in ((how("wrong"), LOGIN), (access(), {})):
            with pytest.raises(AuthenticationError) as caught:
                opened(reference, settings, cacert=None, **fields)
            assert "wrong" not in str(caught.value).replace("are wrong", "")

    def test_tokens(self, registries: Registries) -> None:
        reference = registries.by_token.reference("auth/app:1")
        with opened(reference, how(), **LOGIN) as found:
            assert_all_right(read_pieces(found, big().content))
        asked = registries.token_server.requests[-1]
        assert asked.query["service"] == ["registry.test"]
        assert asked.query["scope"] == ["repository:auth/app:pull"]
        with pytest.raises(AuthenticationError):
            opened(reference, how("wrong"), **LOGIN)

    @pytest.mark.parametrize("honest", [True, False], ids=["says so", "claims five minutes"])
    def test_tokens_that_expire_early(self, registries: Registries, honest: bool) -> None:
        """Renewed before their end where that is known, otherwise when they are refused."""
        tokens = registries.tokens
        tokens.lifetime, tokens.claimed = 1, None if honest else 300
        try:
            before = tokens.issued
            reference = registries.by_token.reference("auth/app:1")
            with opened(reference, how(cache=False), **LOGIN) as found:
                assert_all_right(read_pieces(found, big().content, [0]))
                time.sleep(2.2)
                assert_all_right(read_pieces(found, big().content))
            assert tokens.issued - before >= 2
        finally:
            tokens.lifetime, tokens.claimed = 300, None

    def test_redirected_blobs(self, registries: Registries) -> None:
        """Blobs are on another port: they arrive, our password does not."""
        registries.blob_server.forget()
        reference = registries.redirecting.reference("auth/app:1")
        with opened(reference, how(), **LOGIN) as found:
            assert_all_right(read_pieces(found, big().content))
        assert registries.blob_server.sent >= len(big().image)
        for request in registries.blob_server.requests:
            assert "authorization" not in request.headers
            assert not {PASSWORD, "Basic"} & set(" ".join(request.headers.values()).split())


# --- tokens -----------------------------------------------------------------------------------


class TestTokens:
    def test_one_is_enough(self, registry: Pretend) -> None:
        with opened(what(registry), how(), **LOGIN) as found:
            assert_all_right(read_pieces(found, big().content))
        assert len(registry.issued) == 1
        asked = server_of(registry).of("/token")[0]
        assert asked.query["service"] == ["pretend.test"]
        assert asked.query["scope"] == ["repository:app:pull"]
        assert asked.headers["authorization"] == basic(USER, PASSWORD)

    def test_anonymous_ones(self, registry: Pretend) -> None:
        registry.users = {}
        with opened(what(registry)) as found:
            assert_all_right(read_pieces(found, big().content))
        assert "authorization" not in server_of(registry).of("/token")[0].headers

    @pytest.mark.parametrize("denied", [401, 403])
    def test_revoked_in_the_middle(self, registry: Pretend, denied: int) -> None:
        """Some registries say 403 rather than 401 to a token that has expired."""
        registry.denied = denied
        with opened(what(registry), how(), **LOGIN) as found:
            for n in range(3):
                registry.revoke()
                assert_all_right(read_pieces(found, big().content, [n * (2 << 20)]))
        assert len(registry.issued) == 4

    def test_revoked_under_many_readers(self, registry: Pretend) -> None:
        """They share the new token."""
        content = big().content
        with opened(what(registry), how(), **LOGIN) as found:
            registry.revoke()
            reads = [lambda at=at: found.read("/big", at, 10) for at in range(0, 6 << 20, 1 << 19)]
            got = in_threads(reads)
        assert got == [content[at : at + 10] for at in range(0, 6 << 20, 1 << 19)]
        assert len(registry.issued) <= 3

    def test_no_expiry_said(self, registry: Pretend) -> None:
        registry.expires_in = None
        registry.token_field = "access_token"
        with opened(what(registry), how(), **LOGIN) as found:
            assert_all_right(read_pieces(found, big().content))

    def test_realm_with_a_query(self, registry: Pretend) -> None:
        registry.realm += "?account=a%20b&x=1"
        with opened(what(registry), how(), **LOGIN) as found:
            assert found.read("/small") == b"small\n"
        query = server_of(registry).of("/token")[0].query
        assert query["account"] == ["a b"]
        assert query["scope"] == ["repository:app:pull"]

    def test_signed_blobs(self, registry: Pretend) -> None:
        """Tokens and signatures go stale together; nobody else gets our token."""
        with Server(SignedStore(registry)) as store:
            registry.elsewhere = store.url
            with opened(what(registry), how(), **LOGIN) as found:
                for n in range(3):
                    assert_all_right(read_pieces(found, big().content, [n * (2 << 20)]))
                    registry.revoke()
                assert_all_right(read_pieces(found, big().content))
            assert store.requests
            assert not any("authorization" in r.headers for r in store.requests)

    def test_signatures_are_used_again(self, registry: Pretend) -> None:
        with Server(SignedStore(registry)) as store:
            registry.elsewhere = store.url
            with opened(what(registry), how(), **LOGIN) as found:
                assert_all_right(read_pieces(found, big().content))
        assert len(server_of(registry).of("/blobs/")) < len(store.requests) or (
            len(store.requests) == 1
        )

    @pytest.mark.parametrize(
        "answer",
        [
            Response(200, body=b"not json"),
            Response(200, body=b"{}"),
            Response(200, body=b"[]"),
            Response(200, body=b'{"token": ""}'),
            Response(200, body=b'{"token": 5}'),
            Response(200, body=b'{"token": "a\\r\\nX-Injected: 1"}'),
            Response(200, body=b" " * (4 << 20)),
            Response(500, body=b"oh"),
            Response(404),
            Response(302, {"Location": "http://127.0.0.1:1/"}),
        ],
        ids=["text", "empty", "list", "blank", "number", "header", "endless", "500", "404", "302"],
    )
    def test_broken_token_servers(self, registry: Pretend, answer: Response) -> None:
        server = server_of(registry)
        server.inject(lambda request, site: answer, when=lambda r: r.path == "/token")
        with pytest.raises(SourceError) as caught:
            opened(what(registry), how(timeout=2.0), **LOGIN)
        said = str(caught.value)
        assert "\n" not in said
        assert PASSWORD not in said

    @pytest.mark.parametrize(
        "challenge",
        [
            'Bearer realm="{r}",service="pretend.test",scope="repository:app:pull"',
            'bearer realm="{r}", service="pretend.test" , scope="repository:app:pull"',
            'BEARER service="pretend.test",realm="{r}"',
            'Bearer realm={r},service=pretend.test',
            'Basic realm="x", Bearer realm="{r}",service="pretend.test"',
            'Bearer realm="{r}",service="pretend.test",error="insufficient_scope, really"',
            'Bearer error="invalid_token",realm="{r}",service="pretend.test", Basic realm="y"',
            'Negotiate, Bearer realm="{r}",service="pretend.test"',
        ],
    )  # fmt: skip
    def test_ways_to_write_a_challenge(self, registry: Pretend, challenge: str) -> None:
        text = challenge.replace("{r}", registry.realm)
        registry._challenge = lambda request: text  # type: ignore[method-assign]
        with opened(what(registry), how(), **LOGIN) as found:
            assert found.read("/small") == b"small\n"

    @pytest.mark.parametrize(
        "challenge", ["", "Negotiate", "Digest realm=x", "Bearer", 'Bearer realm="file:///etc/passwd"']
    )  # fmt: skip
    def test_no_way_in(self, registry: Pretend, challenge: str) -> None:
        registry._challenge = lambda request: challenge  # type: ignore[method-assign]
        with pytest.raises(SourceError) as caught:
            opened(what(registry), how(timeout=2.0), **LOGIN)
        assert PASSWORD not in str(caught.value)

    def test_basic_after_all(self, registry: Pretend) -> None:
        registry.scheme = "Basic"
        with opened(what(registry), how(), **LOGIN) as found:
            assert_all_right(read_pieces(found, big().content))

    def test_a_registry_that_always_refuses(self, registry: Pretend) -> None:
        """It gives out tokens and accepts none: an end, not a loop."""
        server = server_of(registry)
        server.inject(faults.refused(401), when=lambda r: r.path != "/token")
        registry.scheme = "Bearer"
        with pytest.raises(AuthenticationError):
            opened(what(registry), how(), **LOGIN)
        assert len(server.requests) < 20

    def test_credentials_stay_with_their_registry(self, registry: Pretend) -> None:
        """A challenge from what we were redirected to gets no answer."""

        def evil(request: Any) -> Response:
            return Response(401, {"WWW-Authenticate": f'Basic realm="{registry.realm}"'})

        with Server(evil) as store:
            registry.elsewhere = store.url
            with pytest.raises(SourceError):
                opened(what(registry), how(), **LOGIN)
            assert not any("authorization" in r.headers for r in store.requests)


# --- where credentials are kept ---------------------------------------------------------------


def auth(user: str = USER, password: str = PASSWORD) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def write(path: Path, config: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def helper(directory: Path, name: str, body: str) -> None:
    """A credential helper: a shell script."""
    path = directory / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(stat.S_IRWXU)


@pytest.fixture(name="home")
def find_home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture(name="programs")
def program_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "programs"
    found.mkdir()
    monkeypatch.setenv("PATH", f"{found}:{os.environ['PATH']}")
    return found


def assert_opens(registry: Pretend) -> None:
    with opened(what(registry)) as found:
        assert found.read("/small") == b"small\n"


def assert_refused(registry: Pretend) -> None:
    with pytest.raises(AuthenticationError):
        opened(what(registry))


class TestConfigurationFiles:
    def test_none(self, registry: Pretend) -> None:
        assert_refused(registry)

    @pytest.mark.parametrize("place", ["docker", "DOCKER_CONFIG", "podman", "runtime", "REGISTRY"])
    def test_places(
        self, registry: Pretend, home: Path, tmp_path: Path, monkeypatch: Any, place: str
    ) -> None:
        config = {"auths": {server_of(registry).authority: {"auth": auth()}}}
        if place == "docker":
            write(home / ".docker/config.json", config)
        elif place == "DOCKER_CONFIG":
            write(tmp_path / "elsewhere/config.json", config)
            monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "elsewhere"))
        elif place == "podman":
            write(home / ".config/containers/auth.json", config)
        elif place == "runtime":
            write(tmp_path / "run/containers/auth.json", config)
        else:
            monkeypatch.setenv("REGISTRY_AUTH_FILE", str(write(tmp_path / "x.json", config)))
        assert_opens(registry)

    @pytest.mark.parametrize(
        "key", ["{host}", "https://{host}", "https://{host}/v1/", "http://{host}/v2/", "{host}/app"]
    )
    def test_keys(self, registry: Pretend, home: Path, key: str) -> None:
        name = key.replace("{host}", server_of(registry).authority)
        write(home / ".docker/config.json", {"auths": {name: {"auth": auth()}}})
        assert_opens(registry)

    def test_the_longest_key_wins(self, registry: Pretend, home: Path) -> None:
        host = server_of(registry).authority
        auths = {host: auth("eve", "x"), f"{host}/app": auth(), f"{host}/app/x": auth("eve", "x")}
        config = {"auths": {key: {"auth": value} for key, value in auths.items()}}
        write(home / ".docker/config.json", config)
        assert_opens(registry)

    def test_user_and_password_apart(self, registry: Pretend, home: Path) -> None:
        entry = {"username": USER, "password": PASSWORD}
        write(home / ".docker/config.json", {"auths": {server_of(registry).authority: entry}})
        assert_opens(registry)

    def test_identity_tokens(self, registry: Pretend, home: Path) -> None:
        registry.refresh_tokens = {"identity-1"}
        entry = {"auth": auth("<token>", ""), "identitytoken": "identity-1"}
        write(home / ".docker/config.json", {"auths": {server_of(registry).authority: entry}})
        assert_opens(registry)
        assert server_of(registry).of("/token")[0].method == "POST"

    def test_the_command_line_wins(self, registry: Pretend, home: Path) -> None:
        entry = {"auth": auth("eve", "wrong")}
        write(home / ".docker/config.json", {"auths": {server_of(registry).authority: entry}})
        with opened(what(registry), how(), **LOGIN) as found:
            assert found.read("/small") == b"small\n"

    @pytest.mark.parametrize(
        "config",
        ["", "{", "[]", "null", {"auths": 5}, {"auths": {"H": 5}}, {"auths": {"H": {"auth": 5}}},
         {"auths": {"H": {"auth": "!!!"}}}, {"auths": {"H": {"auth": "////"}}}, {"auths": {"H": {}}},
         {"credHelpers": 5}, {"credHelpers": {"H": "../../bin/sh"}}, {"credsStore": "absent"},
         {"credsStore": 7}],
        ids=range(14),
    )  # fmt: skip
    def test_nonsense_counts_for_nothing(
        self, registry: Pretend, home: Path, config: object
    ) -> None:
        text = config if isinstance(config, str) else json.dumps(config)
        host = server_of(registry).authority
        write(home / ".docker/config.json", text.replace('"H"', f'"{host}"'))
        assert_refused(registry)
        registry.users = {}
        assert_opens(registry)

    def test_unreadable_for_a_moment(self, registry: Pretend, home: Path) -> None:
        """They are read again when what they said is refused: another tool may have logged in."""
        path = home / ".docker/config.json"
        host = server_of(registry).authority
        write(path, {"auths": {host: {"auth": auth()}}})
        with opened(what(registry)) as found:
            registry.users = {USER: "a new password"}
            registry.revoke()
            write(path, {"auths": {host: {"auth": auth(USER, "a new password")}}})
            assert_all_right(read_pieces(found, big().content))


class TestHelpers:
    def test_for_a_host(self, registry: Pretend, home: Path, programs: Path) -> None:
        host = server_of(registry).authority
        answer = json.dumps({"ServerURL": host, "Username": USER, "Secret": PASSWORD})
        helper(programs, "test", f'test "$1" = get && test "$(cat)" = {host} && echo \'{answer}\'')
        write(home / ".docker/config.json", {"credHelpers": {host: "test"}})
        assert_opens(registry)

    def test_for_all(self, registry: Pretend, home: Path, programs: Path) -> None:
        host = server_of(registry).authority
        helper(programs, "test", f"""echo '{{"Username": "{USER}", "Secret": "{PASSWORD}"}}'""")
        write(home / ".docker/config.json", {"credsStore": "test", "auths": {host: {}}})
        assert_opens(registry)

    def test_identity_token(self, registry: Pretend, home: Path, programs: Path) -> None:
        registry.refresh_tokens = {"identity-2"}
        helper(programs, "test", """echo '{"Username": "<token>", "Secret": "identity-2"}'""")
        write(home / ".docker/config.json", {"credsStore": "test"})
        assert_opens(registry)

    def test_renewed_secrets(
        self, registry: Pretend, home: Path, programs: Path, tmp_path: Path
    ) -> None:
        """What clouds give out lives for some hours; the helper knows the next one."""
        secret = tmp_path / "secret"
        secret.write_text(PASSWORD)
        helper(
            programs, "cloud",
            f"""printf '{{"Username": "{USER}", "Secret": "%s"}}' "$(cat {secret})" """,
        )  # fmt: skip
        write(home / ".docker/config.json", {"credsStore": "cloud"})
        with opened(what(registry)) as found:
            for n in range(3):
                registry.users = {USER: f"secret-{n}"}
                registry.revoke()
                secret.write_text(f"secret-{n}")
                assert_all_right(read_pieces(found, big().content, [n * (2 << 20)]))

    @pytest.mark.parametrize(
        "body", ["exit 1", "echo nonsense", "echo '{}'", "echo '[]'", "kill -9 $$", "echo no >&2"]
    )
    def test_that_fail(self, registry: Pretend, home: Path, programs: Path, body: str) -> None:
        helper(programs, "test", body)
        write(home / ".docker/config.json", {"credsStore": "test"})
        assert_refused(registry)
        registry.users = {}
        assert_opens(registry)


# --- passwords of the commands ----------------------------------------------------------------


class TestCommandLine:
    def test_file(self, registry: Pretend, tmp_path: Path) -> None:
        path = tmp_path / "password"
        path.write_text(PASSWORD + "\n")
        words = ["--insecure", "--username", USER, "--password-file", path]
        done = command("cat", what(registry), "small", *words)
        assert (done.returncode, done.stdout, done.stderr) == (0, "small\n", "")

    def test_variable(self, registry: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYEROFS_PASSWORD", PASSWORD)
        done = command("cat", what(registry), "small", "--insecure", "--username", USER)
        assert (done.returncode, done.stdout, done.stderr) == (0, "small\n", "")

    def test_nobody_to_ask(self, registry: Pretend) -> None:
        """Standard input is no terminal: it says what to do, and does not wait."""
        done = command("cat", what(registry), "small", "--insecure", "--username", USER)
        assert done.returncode
        assert "password" in done.stderr
        assert "Traceback" not in done.stderr

    def test_none_on_the_command_line(self, registry: Pretend) -> None:
        done = command("cat", what(registry), "small", "--password", PASSWORD)
        assert done.returncode == 2

    def test_no_user_in_urls(self) -> None:
        with pytest.raises(SourceError) as caught:
            opened(f"http://{USER}:{PASSWORD}@127.0.0.1:1/image")
        assert PASSWORD not in str(caught.value)


def test_threads_end(registry: Pretend) -> None:
    before = threading.active_count()
    server_of(registry).inject(faults.late(0.01), when=anything)
    for _ in range(5):
        with opened(what(registry), how(), **LOGIN) as found:
            found.read("/small")
    assert threading.active_count() <= before + 20

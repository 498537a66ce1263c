"""Servers for the tests: the real registries are started once, when first wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.remote.reading", "tests.fuse.mounting")

from tests.remote import registry as rigs  # noqa: E402  after that
from tests.remote.oci import Pushing  # noqa: E402
from tests.remote.server import Server  # noqa: E402
from tests.remote.tokens import TokenServer, make_key  # noqa: E402


@dataclass
class Registries:
    """Real registries on one storage, each started when it is first wanted."""

    directory: Path
    stack: ExitStack
    _started: dict[str, rigs.Registry] = field(default_factory=dict)
    _servers: dict[str, Server] = field(default_factory=dict)
    _tokens: TokenServer | None = None

    @property
    def storage(self) -> Path:
        return self.directory / "storage"

    @property
    def open(self) -> rigs.Registry:
        """Everyone may read and write."""
        return self._registry("open", {})

    @property
    def push(self) -> Pushing:
        """Puts images into all of them."""
        return Pushing(self.open.url)

    @property
    def htpasswd(self) -> rigs.Registry:
        """Basic authentication."""
        return self._registry("htpasswd", rigs.htpasswd(self.directory / "htpasswd"))

    @property
    def tokens(self) -> TokenServer:
        """Who hands out tokens for ``by_token``."""
        if self._tokens is None:
            self._tokens = TokenServer(*make_key(self.directory), {rigs.USER: rigs.PASSWORD})
        return self._tokens

    @property
    def token_server(self) -> Server:
        if "tokens" not in self._servers:
            self._servers["tokens"] = self.stack.enter_context(Server(self.tokens))
        return self._servers["tokens"]

    @property
    def by_token(self) -> rigs.Registry:
        """Bearer authentication."""
        realm = f"{self.token_server.url}/token"
        return self._registry("token", rigs.by_token(realm, self.directory / "token.crt"))

    @property
    def blob_server(self) -> Server:
        """Where ``redirecting`` sends those who want blobs."""
        if "blobs" not in self._servers:
            site = rigs.BlobSite(self.storage)
            self._servers["blobs"] = self.stack.enter_context(Server(site))
        return self._servers["blobs"]

    @property
    def redirecting(self) -> rigs.Registry:
        """Basic authentication, and its blobs are elsewhere."""
        settings = rigs.htpasswd(self.directory / "htpasswd-2")
        settings |= rigs.redirecting(self.blob_server.url)
        return self._registry("redirecting", settings)

    def _registry(self, name: str, settings: dict[str, object]) -> rigs.Registry:
        if name not in self._started:
            found = self.stack.enter_context(rigs.running(self.storage, settings))
            self._started[name] = found
        return self._started[name]


@pytest.fixture(scope="session", name="registries")
def start_registries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registries]:
    if not rigs.available():
        pytest.skip("no docker-registry")
    with ExitStack() as stack:
        found = Registries(tmp_path_factory.mktemp("registries"), stack)
        found.storage.mkdir()
        yield found


@pytest.fixture(autouse=True)
def _private_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's credentials or proxies, or touches the user's cache."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "home").mkdir()
    (tmp_path / "run").mkdir(mode=0o700)
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name}_proxy".upper(), raising=False)
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "PYEROFS_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """httpx leaves its own generators to the collector where a body is not read to its end; the
    connection is closed all the same."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            ignored = "ignore:Async generator 'http:ResourceWarning"
            item.add_marker(pytest.mark.filterwarnings(ignored))

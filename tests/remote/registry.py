"""Real registries: Debian's docker-registry, with and without authentication, on one storage.

What is pushed to one of them is in all.  Before a registry one can put a Relay, which counts what
goes through it, and with faults if need be.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.remote.oci import Pushing
from tests.remote.server import Content, Request, Response
from tests.remote.tokens import ISSUER, SERVICE

PROGRAM = "docker-registry"
PATIENCE = 20.0
BLOBS = "/docker/registry/v2/blobs/"

USER, PASSWORD = "ada", "correct-horse-battery"


def available() -> bool:
    """Whether there is a registry to test with."""
    return shutil.which(PROGRAM) is not None


class Registry:
    """A docker-registry process."""

    def __init__(self, storage: Path, settings: dict[str, Any] | None = None) -> None:
        self.port = free_port()
        self.storage = storage
        found: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(storage)}},
            "http": {"addr": self.authority, "relativeurls": True},
        } | (settings or {})
        config = storage.parent / f"registry-{self.port}.yml"
        config.write_text(json.dumps(found))  # JSON is YAML
        self._log = config.with_suffix(".log").open("wb")
        self._process = subprocess.Popen(
            [PROGRAM, "serve", config], stdout=self._log, stderr=subprocess.STDOUT
        )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    @property
    def authority(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.authority}"

    def reference(self, name: str) -> str:
        """How the commands call an image in it."""
        return f"oci://{self.authority}/{name}"

    def stop(self) -> None:
        """Idempotent."""
        self._process.terminate()
        self._process.wait(timeout=PATIENCE)
        self._log.close()

    def _wait(self) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            said = Path(self._log.name).read_text(errors="replace")
            assert self._process.poll() is None, f"the registry did not start: {said}"
            assert time.monotonic() < end, f"the registry does not answer: {said}"
            time.sleep(0.02)


def free_port() -> int:
    """A port that nobody listens at, most likely."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def htpasswd(path: Path) -> dict[str, Any]:
    """Settings: only USER may come in."""
    words = ["htpasswd", "-Bbn", "-C", "4", USER, PASSWORD]
    made = subprocess.run(words, check=True, capture_output=True, timeout=30)
    path.write_bytes(made.stdout)
    return {"auth": {"htpasswd": {"realm": "registry", "path": str(path)}}}


def by_token(realm: str, certificate: Path) -> dict[str, Any]:
    """Settings: who has a token may come in."""
    found = {
        "realm": realm,
        "service": SERVICE,
        "issuer": ISSUER,
        "rootcertbundle": str(certificate),
    }
    return {"auth": {"token": found}}


def redirecting(url: str) -> dict[str, Any]:
    """Settings: blobs are elsewhere."""
    return {"middleware": {"storage": [{"name": "redirect", "options": {"baseurl": url}}]}}


class BlobSite:
    """The other server that a redirecting registry sends people to: its storage, by path."""

    def __init__(self, storage: Path) -> None:
        self._storage = storage

    def __call__(self, request: Request) -> Response:
        path = self._storage / request.path.lstrip("/")
        if not request.path.startswith(BLOBS) or not path.is_file():
            return Response(404)
        return Content(path.read_bytes(), etag=None)(request)


class Relay:
    """A site that passes everything on to another server and its answers back."""

    def __init__(self, url: str) -> None:
        self._authority = urlsplit(url).netloc

    def __call__(self, request: Request) -> Response:
        connection = http.client.HTTPConnection(self._authority, timeout=30)
        try:
            connection.request(request.method, request.target, request.body, request.headers)
            answer = connection.getresponse()
            body = answer.read()
            hop = ("connection", "transfer-encoding", "keep-alive")
            headers = {k: v for k, v in answer.getheaders() if k.lower() not in hop}
            if request.method != "HEAD":
                headers.pop("Content-Length", None)  # ours may be cut by a fault: say it anew
            return Response(answer.status, headers, body)
        finally:
            connection.close()


@contextmanager
def running(storage: Path, settings: dict[str, Any] | None = None) -> Iterator[Registry]:
    """A registry while it is needed."""
    registry = Registry(storage, settings)
    try:
        yield registry
    finally:
        registry.stop()


def pushing_to(registry: Registry) -> Pushing:
    """For ``oci.publish``."""
    return Pushing(registry.url)

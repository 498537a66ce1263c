"""A token server, as registries have it, that signs RS256 with the openssl command."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from pathlib import Path

from tests.remote.oci import basic
from tests.remote.server import Request, Response

ISSUER = "pyerofs-tests"
SERVICE = "registry.test"
LEEWAY = 60  # seconds that docker-registry tolerates of a token that has expired


def make_key(directory: Path) -> tuple[Path, Path]:
    """A private key and its self-signed certificate."""
    key, certificate = directory / "token.key", directory / "token.crt"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30"]
    words += ["-subj", f"/CN={ISSUER}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    return key, certificate


class TokenServer:
    """The site that hands out tokens.  ``users``: passwords by name; nobody else gets one, unless
    there are none.  A token is good for ``lifetime`` seconds and claims to be for ``claimed``."""

    def __init__(
        self,
        key: Path,
        certificate: Path,
        users: dict[str, str] | None = None,
        *,
        lifetime: float = 300,
        claimed: float | None = None,
    ) -> None:
        self._key = key
        lines = certificate.read_text().splitlines()
        self._x5c = "".join(line for line in lines if not line.startswith("-----"))
        self._users = users or {}
        self.lifetime = lifetime
        self.claimed = claimed
        self.issued = 0

    def __call__(self, request: Request) -> Response:
        allowed = {basic(name, password) for name, password in self._users.items()}
        if allowed and request.headers.get("authorization") not in allowed:
            return Response(401, {"WWW-Authenticate": 'Basic realm="tokens"'})
        query = request.query
        if query.get("service") != [SERVICE]:
            return Response(400, body=b"no such service")
        access: list[dict[str, object]] = []
        for scope in query.get("scope", []):
            kind, name, actions = scope.split(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        token = self.token(access)
        claimed = self.lifetime if self.claimed is None else self.claimed
        body = {"token": token, "access_token": token, "expires_in": max(1, int(claimed))}
        return Response(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def token(self, access: list[dict[str, object]]) -> str:
        """A signed token."""
        self.issued += 1
        now = int(time.time())
        claims = {
            "iss": ISSUER, "aud": SERVICE, "sub": "", "jti": str(self.issued), "access": access,
            "exp": int(now + self.lifetime) - LEEWAY, "nbf": now - 600, "iat": now - 600,
        }  # fmt: skip
        head = {"typ": "JWT", "alg": "RS256", "x5c": [self._x5c]}
        signed = f"{_packed(head)}.{_packed(claims)}"
        words = ["openssl", "dgst", "-sha256", "-sign", str(self._key)]
        made = subprocess.run(words, input=signed.encode(), check=True, capture_output=True)
        return f"{signed}.{_base64url(made.stdout)}"


def _packed(value: object) -> str:
    return _base64url(json.dumps(value).encode())


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

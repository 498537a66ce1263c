"""A registry in this process that does what no real one can be made to do.

Its tokens can be revoked at any moment; it may answer 403 where others say 401; blobs may live on
another server, behind signed URLs that expire.  It keeps what it is given, right or wrong.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, field

from tests.remote.oci import Blob, basic
from tests.remote.server import Content, Request, Response, Server

_ROUTE = re.compile(r"/v2/(?P<name>.+)/(?P<what>blobs|manifests)/(?P<reference>[^/]+)")
SERVICE = "pretend.test"


@dataclass
class Pretend:
    """A registry as a site.

    ``scheme``: ``Basic`` or ``Bearer`` where one has to log in (Bearer: at ``/token``, anonymous if
    there are no ``users``).  ``denied`` is what expired tokens get.  ``realm`` is said in the
    challenge; the tests fill it in."""

    scheme: str | None = None
    users: dict[str, str] = field(default_factory=dict)
    denied: int = 401
    realm: str = ""
    expires_in: int | None = 300
    token_field: str = "token"
    elsewhere: str | None = None  # where blobs are, if not here
    digest_header: bool = True
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[tuple[str, str], Blob] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    signatures: set[str] = field(default_factory=set)
    issued: list[str] = field(default_factory=list)
    refresh_tokens: set[str] = field(default_factory=set)

    def put_blob(self, repository: str, blob: Blob) -> None:
        self.blobs[blob.digest] = blob.data

    def put_manifest(self, repository: str, reference: str, blob: Blob) -> None:
        self.manifests[repository, reference] = self.manifests[repository, blob.digest] = blob

    def revoke(self) -> None:
        """No token that was issued, and no URL that was signed, is good any more."""
        self.tokens.clear()
        self.signatures.clear()

    # as a site ----------------------------------------------------------------------------

    def __call__(self, request: Request) -> Response:
        if request.path == "/token":
            return self._token(request)
        known = request.headers.get("authorization", "")
        if self.scheme and not self._admits(known):
            status = self.denied if known.startswith("Bearer ") else 401
            challenge = {"WWW-Authenticate": self._challenge(request)} if status == 401 else {}
            return Response(status, challenge, b'{"errors": [{"code": "UNAUTHORIZED"}]}')
        if request.path == "/v2/":
            return Response(200, body=b"{}")
        route = _ROUTE.fullmatch(request.path)
        if route is None:
            return Response(404)
        if route["what"] == "manifests":
            return self._manifest(request, route["name"], route["reference"])
        return self._blob(request, route["reference"])

    def _admits(self, authorization: str) -> bool:
        if self.scheme == "Basic":
            return authorization in {basic(n, p) for n, p in self.users.items()}
        return authorization.removeprefix("Bearer ") in self.tokens

    def _challenge(self, request: Request) -> str:
        if self.scheme == "Basic":
            return 'Basic realm="pretend, a registry"'
        route = _ROUTE.fullmatch(request.path)
        scope = f',scope="repository:{route["name"]}:pull"' if route else ""
        return f'Bearer realm="{self.realm}",service="{SERVICE}"{scope}'

    def _token(self, request: Request) -> Response:
        allowed = {basic(n, p) for n, p in self.users.items()}
        known = request.headers.get("authorization")
        if request.method == "POST":  # OAuth2: with what `docker login` calls an identity token
            form = Request("POST", "/?" + request.body.decode(), {}).query
            if form.get("refresh_token", [""])[0] not in self.refresh_tokens:
                return Response(401)
        elif allowed and known not in allowed:
            return Response(401)
        token = "token-" + secrets.token_hex(16)
        self.tokens.add(token)
        self.issued.append(token)
        body: dict[str, object] = {self.token_field: token}
        if self.expires_in is not None:
            body["expires_in"] = self.expires_in
        return Response(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _manifest(self, request: Request, name: str, reference: str) -> Response:
        found = self.manifests.get((name, reference))
        if found is None:
            return Response(404, body=b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}')
        headers = {"Content-Type": found.kind}
        if self.digest_header:
            headers["Docker-Content-Digest"] = found.digest
        return Response(200, headers, found.data)

    def _blob(self, request: Request, digest: str) -> Response:
        if digest not in self.blobs:
            return Response(404, body=b'{"errors": [{"code": "BLOB_UNKNOWN"}]}')
        if self.elsewhere is None:
            return Content(self.blobs[digest], etag=f'"{digest}"')(request)
        signature = secrets.token_hex(16)
        self.signatures.add(signature)
        where = f"{self.elsewhere}/store/{digest.replace(':', '/')}?X-Signature={signature}"
        return Response(307, {"Location": where})


class SignedStore:
    """Where the blobs of a Pretend are, for who has a signed URL."""

    def __init__(self, registry: Pretend) -> None:
        self._registry = registry

    def __call__(self, request: Request) -> Response:
        algorithm, _, value = request.path.removeprefix("/store/").partition("/")
        if request.query.get("X-Signature", [""])[0] not in self._registry.signatures:
            return Response(403, body=b"<Error>the request has expired</Error>")
        return Content(self._registry.blobs[f"{algorithm}:{value}"])(request)


def serve(registry: Pretend) -> Server:
    """On a port; its realm is itself unless it has one."""
    server = Server(registry)
    registry.realm = registry.realm or f"{server.url}/token"
    return server

"""Answers to a server's challenge: Basic, and the Bearer tokens of registries.

(RFC 9110 section 11; the token protocol is that of the distribution project, which the OCI
distribution specification refers to.)
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Awaitable, Callable
from functools import partial
from urllib.parse import urlencode

import httpx
import trio

from pyerofs.errors import AuthenticationError, SourceError
from pyerofs.sources.net.credentials import Credentials
from pyerofs.sources.net.transport import Target, Transport, joined, origin, retrying

log = logging.getLogger("pyerofs")

MAX_TOKEN = 1 << 20
DEFAULT_LIFE = 60.0  # seconds that a token lives if the server does not say
MARGIN = 0.1  # fraction of a token's life before its end at which it is renewed
TOKEN_TIMEOUT = 30.0

LONGEST_LIFE = 1e9

_TOKEN = re.compile(r"[\x21-\x7e]{1,65536}")
MAX_CHALLENGE = 16 << 10  # characters of a header that are parsed
# the lookbehind anchors names at word starts; otherwise a long word would take quadratic time
_CHALLENGE = re.compile(
    r'(?<![A-Za-z0-9_-])([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))'
)


class BasicAuthority:
    """A user name and a password for one server."""

    def __init__(self, credentials: Credentials) -> None:
        self._header = credentials.basic()

    async def header(self) -> str | None:
        return self._header

    async def refused(self, response: httpx.Response) -> bool:
        return False


class RegistryAuthority:
    """Answers a registry's challenges.

    ``find`` looks up credentials: once at the first challenge, and once more whenever they are
    refused, since other tools may have renewed them."""

    def __init__(
        self,
        transport: Transport,
        scope: str,
        find: Callable[[], Awaitable[Credentials | None]],
    ) -> None:
        """``scope``: requested if the challenge names none."""
        self._transport = transport
        self._scope = scope
        self._find = find
        self._credentials: Credentials | None = None
        self._looked = False
        self._challenge: tuple[str, dict[str, str], str] | None = None
        self._header: str | None = None
        self._expires = float("inf")
        self._lock = trio.Lock()

    async def header(self) -> str | None:
        if self._challenge is not None and trio.current_time() >= self._expires:
            async with self._lock:
                if trio.current_time() >= self._expires:
                    await self._renew()
        return self._header

    async def refused(self, response: httpx.Response) -> bool:
        sent = response.request.headers.get("authorization")
        challenge = parse_challenge(response.headers.get_list("www-authenticate"))
        async with self._lock:
            if self._header is not None and self._header != sent:
                return True  # another task has renewed the header meanwhile
            if challenge is not None:
                self._challenge = (*challenge, str(response.request.url))
            if self._challenge is None:
                return False
            if sent is not None:
                self._looked = False  # other tools may have newer credentials
            await self._renew()
            return self._header is not None and self._header != sent

    async def _renew(self) -> None:
        """Make a new header for the challenge."""
        assert self._challenge is not None
        kind, given, url = self._challenge
        if not self._looked:
            self._credentials = await self._find()
            self._looked = True
        if kind == "basic":
            self._header = None
            if self._credentials is not None and self._credentials.username:
                self._header = self._credentials.basic()
            return
        self._header = None
        started = trio.current_time()
        token, life = await self._fetch_token(given, url)
        self._header = f"Bearer {token}"
        self._expires = started + life * (1 - MARGIN)

    async def _fetch_token(self, given: dict[str, str], url: str) -> tuple[str, float]:
        """Get a token and its life in seconds from the challenge's realm.  Raises SourceError."""
        realm = joined(url, given.get("realm", ""))
        if realm is None:
            raise AuthenticationError(f"{url}: the registry names no place for tokens")
        if self._credentials is not None:
            if not realm.startswith("https:") and not self._transport.insecure:
                raise AuthenticationError(
                    f"{realm}: the registry wants our password sent there in clear text; --insecure"
                    " would allow that"
                )
            # Docker's clients send it to any host that a registry names, and registries rely on that
            log.info("the password for %s is sent to %s", origin(url)[1], origin(realm)[1])
        query = {"scope": given.get("scope") or self._scope}
        if "service" in given:
            query["service"] = given["service"]
        credentials = self._credentials
        shown = realm.partition("?")[0]
        try:
            if credentials is not None and credentials.token:
                form = query | {
                    "grant_type": "refresh_token",
                    "refresh_token": credentials.token,
                    "client_id": "pyerofs",
                }
                ask = partial(self._transport.post_form, Target(realm), form, MAX_TOKEN)
            else:
                target = Target(realm + ("&" if "?" in realm else "?") + urlencode(query))
                who = None if credentials is None else BasicAuthority(credentials)
                ask = partial(self._transport.document, target, {}, who, MAX_TOKEN)
            data, _ = await retrying(ask, shown, self._transport.traffic, TOKEN_TIMEOUT)
            found = json.loads(data)
            token = found.get("token") or found.get("access_token")
            life = _life(found.get("expires_in"))
        except (ValueError, AttributeError, RecursionError):
            raise AuthenticationError(f"{shown}: sends no token that makes sense") from None
        except AuthenticationError as e:
            refused = "us without credentials" if credentials is None else "our credentials"
            raise AuthenticationError(f"{shown}: refuses {refused} ({e})") from None
        except SourceError as e:
            raise type(e)(f"no token for the registry: {e}") from None
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise AuthenticationError(f"{shown}: sends no token")
        return token, life


def _life(value: object) -> float:
    """The seconds that a token lives, from the server's ``expires_in``, which may be anything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        return DEFAULT_LIFE
    return LONGEST_LIFE if value >= LONGEST_LIFE else float(value)


def parse_challenge(headers: list[str]) -> tuple[str, dict[str, str]] | None:
    """(``bearer`` or ``basic``, parameters) of WWW-Authenticate headers; Bearer is preferred."""
    found: dict[str, dict[str, str]] = {}
    for header in (h[:MAX_CHALLENGE] for h in headers):
        # several challenges may share a header; a scheme is a word that no "=" follows
        for match in re.finditer(
            r"(?:^|,)\s*(Bearer|Basic)\b((?:(?!,\s*(?:Bearer|Basic)\s).)*)",
            header,
            re.I,
        ):
            parameters = {
                name.lower(): re.sub(r"\\(.)", r"\1", quoted) if quoted or not bare else bare
                for name, quoted, bare in _CHALLENGE.findall(match[2])
            }
            found.setdefault(match[1].lower(), parameters)
    for kind in ("bearer", "basic"):
        if kind in found:
            return kind, found[kind]
    return None

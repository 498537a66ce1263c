"""The HTTP client of all remote sources: redirects, authentication, classification of failures.

A request is sent once here.  A failure that may pass is raised as Transient; the caller, which knows
how much has been done already, retries (``http.py`` resumes, ``retrying`` starts anew).
"""

from __future__ import annotations

import logging
import random
import re
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Protocol, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx
import trio

from pyerofs.errors import AuthenticationError, SourceError
from pyerofs.sources.net.client import Pools

log = logging.getLogger("pyerofs")

T = TypeVar("T")

# what httpx raises for a server's errors; ValueError: an invalid URL or header
_FAILURES = (httpx.HTTPError, httpx.InvalidURL, ValueError)

MAX_CONNECTIONS = 8  # at one time; a registry serves other clients, too
CONNECT_TIMEOUT = 10.0
IDLE_TIMEOUT = 20.0  # seconds without a byte before a connection counts as dead
MAX_REDIRECTS = 5
PACE = 64 << 10  # bytes that a download has to bring within each timeout: a modem's speed
MAX_ATTEMPTS = 10  # in a row without any progress; the deadline usually ends it earlier
KNOCKS = (
    4  # attempts to connect to an unreachable server: a user waits, and its name may be misspelt
)
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
LONGEST_WAIT = 86400.0  # seconds: the limit of a server's Retry-After
RETRIED = {408, 425, 429, 500, 502, 503, 504}


class Transient(SourceError):
    """A failure that may pass.  ``retry_after``: the server's Retry-After, in seconds."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unreachable(Transient):
    """The server can't be connected to, or its name is misspelt."""


class Refused(AuthenticationError):
    """401 or 403, and there are no better credentials."""


class Gone(SourceError):
    """404 or 410."""


@dataclass
class Traffic:
    """Counters of network traffic."""

    requests: int = 0
    received: int = 0  # bytes of bodies
    retries: int = 0


class Pace:
    """A scope for a download of unknown length: it is cancelled when it brings less than PACE bytes
    within ``timeout`` seconds."""

    def __init__(self, timeout: float) -> None:
        self.scope = trio.CancelScope(deadline=trio.current_time() + timeout)
        self._timeout = timeout
        self._got = 0

    def advance(self, n: int) -> None:
        """Report ``n`` bytes received."""
        self._got += n
        if self._got >= PACE:
            self._got = 0
            self.scope.deadline = trio.current_time() + self._timeout


class Authority(Protocol):
    """Supplies credentials in answer to a server's challenge."""

    async def header(self) -> str | None:
        """The Authorization header for a request to the origin, if one is known to be needed."""

    async def refused(self, response: httpx.Response) -> bool:
        """Handle a 401 or 403; True if the request should be repeated with a new ``header``."""


class Target:
    """A resource: its own URL, and the URL that its last request was redirected to."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.location = url

    @property
    def shown(self) -> str:
        """The URL for messages, without its query, which may hold signatures."""
        return self.url.partition("?")[0]


def joined(base: str, url: str) -> str | None:
    """A URL sent by a server, resolved against ``base``; None if it is no HTTP URL."""
    try:
        found = urljoin(base, url)
        _ = origin(found)
    except ValueError:
        return None
    return found if found.startswith(("http://", "https://")) else None


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port: credentials are sent only within one origin."""
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or default


class Transport:
    """The HTTP client of one image.  Close it by ``aclose``."""

    def __init__(self, *, insecure: bool = False, cacert: str | None = None) -> None:
        """Raises SourceError where ``cacert`` can't be read."""
        from pyerofs import __version__

        self.insecure = insecure
        self.traffic = Traffic()
        _quieten()
        self._client = httpx.AsyncClient(
            transport=Pools(_tls(insecure, cacert), MAX_CONNECTIONS),
            timeout=httpx.Timeout(IDLE_TIMEOUT, connect=CONNECT_TIMEOUT, pool=None),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # none are kept
            headers={"User-Agent": f"pyerofs/{__version__}", "Accept-Encoding": "identity"},
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def get(
        self, target: Target, headers: Mapping[str, str], authority: Authority | None = None
    ) -> AsyncGenerator[httpx.Response, None]:
        """GET, following redirects; the body is still to be read (``body``).  The status is 2xx or
        416.  Raises Transient, Refused, Gone, SourceError."""
        hops = asked = 0
        while True:
            location = target.location  # other requests may change it meanwhile
            response = await self._send(target, location, headers, authority)
            try:
                status = response.status_code
                if status < 300 or status == 416:
                    yield response
                    return
                if status in (301, 302, 303, 307, 308):
                    hops += 1
                    self._redirect(target, location, response, hops)
                elif location != target.url and status in (401, 403, 404, 410):
                    if target.location == location:
                        target.location = target.url  # the redirect has expired
                    hops += 1
                    if hops > MAX_REDIRECTS:
                        raise Refused(
                            f"{target.shown}: is redirected to what refuses us ({status})"
                        )
                elif status in (401, 403):
                    asked += 1
                    if authority is None or asked > 2 or not await authority.refused(response):
                        raise _unwanted(target, response)
                else:
                    raise _unwanted(target, response)
            finally:
                with trio.CancelScope(shield=True):
                    await response.aclose()

    async def _send(
        self,
        target: Target,
        location: str,
        headers: Mapping[str, str],
        authority: Authority | None,
    ) -> httpx.Response:
        sent = dict(headers)
        if authority is not None and origin(location) == origin(target.url):
            header = await authority.header()
            if header is not None:
                sent["Authorization"] = header
        self.traffic.requests += 1
        try:
            request = self._client.build_request("GET", location, headers=sent)
            return await self._client.send(request, stream=True)
        except _FAILURES as e:
            raise failure(target.shown, e) from None

    def _redirect(self, target: Target, asked: str, response: httpx.Response, hops: int) -> None:
        where = response.headers.get("location")
        if where is None or hops > MAX_REDIRECTS:
            raise SourceError(f"{target.shown}: redirected {hops} times, or to nowhere")
        location = joined(asked, where)
        if location is None:
            raise SourceError(f"{target.shown}: redirected to something that is not HTTP")
        downgraded = asked.startswith("https:") and location.startswith("http:")
        if downgraded and not self.insecure:
            raise SourceError(
                f"{target.shown}: redirected to plain http; --insecure would allow that"
            )
        target.location = location

    async def body(self, response: httpx.Response, shown: str) -> AsyncGenerator[bytes, None]:
        """The chunks of a body as they arrive.  Raises Transient if the connection breaks."""
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise SourceError(f"{shown}: the server sends it encoded ({encoding}), unasked")
        try:
            async for chunk in response.aiter_raw():
                self.traffic.received += len(chunk)
                yield chunk
        except _FAILURES as e:
            raise failure(shown, e) from None

    async def document(
        self,
        target: Target,
        headers: Mapping[str, str],
        authority: Authority | None,
        limit: int,
    ) -> tuple[bytes, Mapping[str, str]]:
        """A small body as a whole, at most ``limit`` bytes, and the headers it came with."""
        async with self.get(target, headers, authority) as response:
            return await self._whole(response, target.shown, limit), response.headers

    async def post_form(
        self, target: Target, form: Mapping[str, str], limit: int
    ) -> tuple[bytes, Mapping[str, str]]:
        """Send a form; follows no redirects, since it may hold secrets.  Returns the answer."""
        self.traffic.requests += 1
        try:
            request = self._client.build_request("POST", target.url, data=dict(form))
            response = await self._client.send(request, stream=True)
        except _FAILURES as e:
            raise failure(target.shown, e) from None
        try:
            if response.status_code != 200:
                raise _unwanted(target, response)
            return await self._whole(response, target.shown, limit), response.headers
        finally:
            with trio.CancelScope(shield=True):
                await response.aclose()

    async def _whole(self, response: httpx.Response, shown: str, limit: int) -> bytes:
        found = bytearray()
        async with aclosing(self.body(response, shown)) as chunks:
            async for chunk in chunks:
                found += chunk
                if len(found) > limit:
                    raise SourceError(f"{shown}: larger than {limit} bytes")
        return bytes(found)


async def retrying(
    work: Callable[[], Awaitable[T]],
    name: str,
    traffic: Traffic,
    timeout: float,
    attempts: int = MAX_ATTEMPTS,
) -> T:
    """Retry ``work`` after transient failures, at most ``attempts`` times and ``timeout`` seconds.

    Raises Transient if further retries might have helped, other SourceErrors at once."""
    deadline = trio.current_time() + timeout
    failures = 0
    while True:
        try:
            with trio.fail_at(deadline):
                return await work()
        except trio.TooSlowError:
            raise Transient(f"{name}: no answer within {timeout:g} seconds") from None
        except Transient as e:
            failures += 1
            most = min(attempts, KNOCKS) if isinstance(e, Unreachable) else attempts
            await pause(e, failures, most, deadline)
            traffic.retries += 1


async def pause(e: Transient, failures: int, attempts: int, deadline: float) -> None:
    """Wait before a retry: exponential backoff with jitter, or the server's Retry-After.  Raises the
    failure instead if no attempts are left or the deadline would be missed."""
    delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (failures - 1)) * random.uniform(0.75, 1.25)
    if e.retry_after is not None:
        delay = e.retry_after + random.uniform(0, FIRST_DELAY)
    if failures >= attempts or trio.current_time() + delay >= deadline:
        raise e
    log.info("%s; trying again in %.1f s", e, delay)
    await trio.sleep(delay)


def _quieten() -> None:
    """Keep httpx and httpcore, which log whole URLs and headers (signatures, tokens), from logging
    below WARNING, unless the application has set their levels itself.  Done when a far source is
    opened; importing the library changes no logger."""
    for name in ("httpx", "httpcore"):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)


def failure(shown: str, e: Exception) -> SourceError:
    """The SourceError for an exception of httpx."""
    cause: BaseException | None = e
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return SourceError(
                f"{shown}: its certificate is not trusted ({cause.verify_message}); --cacert names"
                " who to trust, --insecure trusts everyone"
            )
        if isinstance(cause, ssl.SSLError) and "WRONG_VERSION" in str(cause.reason):
            return SourceError(f"{shown}: does not speak TLS; is it plain http (--insecure)?")
        cause = cause.__cause__ or cause.__context__
    if isinstance(e, (httpx.UnsupportedProtocol, httpx.InvalidURL, ValueError)):
        return SourceError(f"{shown}: not a URL that can be fetched")
    if isinstance(e, httpx.TimeoutException):
        reason = "no connection" if isinstance(e, httpx.ConnectTimeout) else "no answer"
        return Transient(f"{shown}: {reason} for a while (timed out)")
    if isinstance(e, httpx.ConnectError):
        return Unreachable(f"{shown}: can't connect ({_plain(e)})")
    return Transient(f"{shown}: the connection broke ({_plain(e)})")


def _plain(e: Exception) -> str:
    """The reason of an exception in one line; a socket's error may be wrapped several times."""
    cause: BaseException | None = e
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(e).partition("\n")[0] or type(e).__name__


def _unwanted(target: Target, response: httpx.Response) -> SourceError:
    """The SourceError for an unsuccessful status."""
    status = response.status_code
    if status in (401, 403):
        return Refused(f"{target.shown}: {_refusal(response)}")
    if status in (404, 410):
        return Gone(f"{target.shown}: not found ({status})")
    message = f"{target.shown}: the server answers {status}"
    return Transient(message, _retry_after(response)) if status in RETRIED else SourceError(message)


def _refusal(response: httpx.Response) -> str:
    if response.status_code != 401:
        return "access is refused (403)"
    if "authorization" in response.request.headers:
        return "these credentials are refused (401)"
    return "credentials are needed (401); try --username"


def _retry_after(response: httpx.Response) -> float | None:
    """Retry-After in seconds, or the seconds to its date; None if there is none."""
    value = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(min(int(value), LONGEST_WAIT))
    try:
        when = parsedate_to_datetime(value)
        now = parsedate_to_datetime(response.headers["date"])
        return min(max(0.0, (when - now).total_seconds()), LONGEST_WAIT)
    except (ValueError, TypeError, KeyError, OverflowError, IndexError):
        return None


def _tls(insecure: bool, cacert: str | None) -> ssl.SSLContext:
    """A TLS context with the system's authorities (SSL_CERT_FILE and SSL_CERT_DIR name them)."""
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if cacert is not None:
        try:
            context.load_verify_locations(cacert)
        except OSError as e:
            reason = e.strerror if not isinstance(e, ssl.SSLError) else "holds no certificates"
            raise SourceError(f"{cacert}: {reason}") from None
    return context

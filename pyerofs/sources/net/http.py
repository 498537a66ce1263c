"""A blob behind a URL: fetched in ranges, resumed where a connection breaks, never mixed with another
version of itself.  (RFC 9110, sections 13 and 14.)"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import httpx
import trio

from pyerofs.errors import ChangedError, SourceError
from pyerofs.sources.base import MAX_BLOB, SEGMENT, NoRoom
from pyerofs.sources.net.transport import (
    MAX_ATTEMPTS,
    Authority,
    Pace,
    Target,
    Traffic,
    Transient,
    Transport,
    pause,
    retrying,
)

_ETAG = re.compile(r"[\x21-\x7e]{1,1024}")  # safe to send back; RFC 9110 requires quotes around it
_DATE = re.compile(r"[\x20-\x7e]{1,64}")


@dataclass(frozen=True, slots=True)
class Version:
    """A state of a resource: its size and the server's validators (ETag, Last-Modified)."""

    size: int
    etag: str | None = None
    modified: str | None = None

    @property
    def identified(self) -> bool:
        """Whether a validator can tell that two downloads are of the same state."""
        return self.etag is not None or self.modified is not None

    def condition(self) -> dict[str, str]:
        """The If-Range header, if the ETag is a strong validator."""
        if self.etag is not None and not self.etag.startswith("W/"):
            return {"If-Range": self.etag}
        return {}

    def confirmed(self, response: httpx.Response) -> bool:
        """Whether a response has a validator of this state."""
        etag, modified = _validators(response)
        return (etag is not None and etag == self.etag) or (
            modified is not None and modified == self.modified
        )

    def differs(self, response: httpx.Response) -> bool:
        """Whether a response has the validator of another state."""
        etag, modified = _validators(response)
        if self.etag is not None and etag is not None:
            return etag != self.etag
        return None not in (self.modified, modified) and modified != self.modified


class HttpBlob:
    """Fetches ranges of one URL.  Implements ``fetcher.Remote``."""

    def __init__(
        self,
        transport: Transport,
        locate: Callable[[], Awaitable[Target]],
        version: Version,
        *,
        name: str,
        authority: Authority | None = None,
        ranged: bool = True,
        most: int = MAX_BLOB,
    ) -> None:
        """``locate`` returns the blob's URL before each request, and may send requests itself.
        ``most``: the largest size, in bytes, to accept from a server that does not send ranges."""
        self._transport = transport
        self._locate = locate
        self._version = version
        self._authority = authority
        self.name = name
        self.size = version.size
        self.ranged = ranged
        self._most = most

    @property
    def traffic(self) -> Traffic:
        return self._transport.traffic

    async def stream(
        self, start: int, end: int, pace: Pace
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """The bytes from ``start`` to ``end`` as (offset, bytes), in order.

        If the server ignores the range, the bytes run from 0 to the blob's end, and ``ranged`` is
        False from then on.  After transient failures the download resumes where it was, as long as
        ``pace`` allows.  Raises SourceError."""
        at = start
        failures = 0
        while at < end:
            try:
                async with aclosing(self._once(at, end)) as chunks:
                    async for offset, chunk in chunks:
                        yield offset, chunk
                        if offset + len(chunk) > at:
                            at = offset + len(chunk)
                            failures = 0
            except Transient as e:
                failures += 1
                await pause(e, failures, MAX_ATTEMPTS, pace.scope.deadline)
                self.traffic.retries += 1

    async def _once(self, start: int, end: int) -> AsyncGenerator[tuple[int, bytes], None]:
        """Send one request, and yield its bytes as ``stream`` does."""
        headers = self._version.condition()
        if self.ranged:
            headers["Range"] = f"bytes={start}-{end - 1}"
        transport, target = self._transport, await self._locate()
        shown = target.shown
        async with transport.get(target, headers, self._authority) as response:
            at, stop = self._span(response, shown, start, end)
            async with aclosing(transport.body(response, shown)) as body:
                async for chunk in body:
                    if at + len(chunk) > stop:
                        raise SourceError(f"{shown}: sends more than it announced")
                    yield at, chunk
                    at += len(chunk)
        if at < stop:
            raise Transient(f"{shown}: ended at byte {at}, {stop - at} bytes early")

    def _span(self, response: httpx.Response, shown: str, start: int, end: int) -> tuple[int, int]:
        """The range of bytes in a response.  Raises SourceError if it is not the one requested."""
        version = self._version
        if version.differs(response):
            raise ChangedError(f"{shown}: has changed since it was opened; open it again")
        if response.status_code == 206:
            first, last, total = content_range(response, shown)
            if total not in (None, self.size):
                raise ChangedError(f"{shown}: is {total} bytes now, not {self.size}")
            if first != start or last >= end:
                raise SourceError(f"{shown}: sends bytes {first}..{last}, not {start}..{end - 1}")
            return first, last + 1
        if response.status_code == 416:
            raise ChangedError(f"{shown}: has no bytes at {start} any more; open it again")
        length = content_length(response)
        if length not in (None, self.size):
            raise ChangedError(f"{shown}: is {length} bytes now, not {self.size}")
        if response.status_code != 200:
            raise SourceError(f"{shown}: the server answers {response.status_code}")
        if not version.confirmed(response) and (version.identified or length is None):
            # a login page, or an error that calls itself a success
            raise Transient(f"{shown}: something else was sent instead")
        if self.size > self._most:
            raise SourceError(whole_is_too_large(shown, self.size))
        self.ranged = False
        return 0, self.size

    async def aclose(self) -> None:
        await self._transport.aclose()


@dataclass(frozen=True, slots=True)
class Found:
    """The result of the first request: version, whether ranges work, and the bytes received."""

    version: Version | None  # None: the server does not say how large it is
    ranged: bool
    beginning: bytes


async def discover(
    transport: Transport,
    target: Target,
    authority: Authority | None,
    timeout: float,
    attempts: int = MAX_ATTEMPTS,
) -> Found:
    """Request the first segment, which also reveals size and version.  Raises SourceError."""

    async def ask() -> Found:
        headers = {"Range": f"bytes=0-{SEGMENT - 1}"}
        async with transport.get(target, headers, authority) as response:
            etag, modified = _validators(response)
            if response.status_code == 416:
                raise SourceError(f"{target.shown}: is empty")
            if response.status_code == 206:
                first, last, total = content_range(response, target.shown)
                if total is None or first:
                    raise SourceError(f"{target.shown}: the server does not say how large it is")
                if last >= SEGMENT:
                    raise SourceError(f"{target.shown}: sends more than was asked for")
                found = bytearray()
                async with aclosing(transport.body(response, target.shown)) as body:
                    async for chunk in body:
                        found += chunk
                        if len(found) > last + 1:
                            raise SourceError(f"{target.shown}: sends more than it announced")
                if len(found) != last + 1:
                    raise Transient(f"{target.shown}: ended early, at byte {len(found)}")
                return Found(Version(total, etag, modified), True, bytes(found))
            length = content_length(response)
            version = None if length is None else Version(length, etag, modified)
            return Found(version, False, b"")

    return await retrying(ask, target.shown, transport.traffic, timeout, attempts)


async def download(
    transport: Transport,
    target: Target,
    authority: Authority | None,
    fd: int,
    timeout: float,
    *,
    most: int,
    room: Callable[[int], bool] = lambda _: True,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Download a whole body into a file: at most ``most`` bytes, and only as ``room`` permits.

    Continues as long as data arrives (``Pace``).  Raises SourceError."""
    shown = target.shown
    pace = Pace(timeout)
    kept = 0  # bytes that ``room`` has granted, in any attempt

    async def once() -> None:
        nonlocal kept
        written = 0
        async with transport.get(target, {}, authority) as response:
            total = content_length(response)
            if total is not None and total > most:
                raise SourceError(whole_is_too_large(shown, total))
            async with aclosing(transport.body(response, shown)) as chunks:
                async for chunk in chunks:
                    end = written + len(chunk)
                    if end > most or (end > kept and not room(end - kept)):
                        raise SourceError(whole_is_too_large(shown, end))
                    kept = max(kept, end)
                    await trio.to_thread.run_sync(_write_all, fd, chunk, written)
                    written = end
                    pace.advance(len(chunk))
                    if progress is not None:
                        progress(shown, written, total or 0)
        os.ftruncate(fd, written)

    failures = 0
    with pace.scope:
        while True:
            try:
                await once()
                return
            except Transient as e:
                failures += 1
                await pause(e, failures, MAX_ATTEMPTS, pace.scope.deadline)
                transport.traffic.retries += 1
    raise Transient(f"{shown}: nothing more came within {timeout:g} seconds")


def whole_is_too_large(shown: str, size: int) -> str:
    """The error message for a blob that is too large to be fetched whole."""
    return (
        f"{shown}: its server sends no parts, and the whole ({size} bytes so far or in all) is more"
        " than may be kept (--cache-limit)"
    )


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    try:
        while view:
            n = os.pwrite(fd, view, offset)
            view, offset = view[n:], offset + n
    except OSError as e:
        raise NoRoom(f"the download can't be kept: {e.strerror}") from None


def _validators(response: httpx.Response) -> tuple[str | None, str | None]:
    """ETag and Last-Modified, as far as they can be sent back and compared."""
    etag = response.headers.get("etag", "").strip()
    modified = response.headers.get("last-modified", "").strip()
    return (
        etag if _ETAG.fullmatch(etag) else None,
        modified if _DATE.fullmatch(modified) else None,
    )


def content_range(response: httpx.Response, shown: str) -> tuple[int, int, int | None]:
    """(first, last, total or None) of a 206.  Raises SourceError."""
    text = response.headers.get("content-range", "")
    match = re.fullmatch(r"\s*bytes\s+(\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\s*", text, re.ASCII)
    if match is None:
        raise SourceError(f"{shown}: sends a part without saying which (Content-Range {text!r})")
    first, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if total is not None and total > MAX_BLOB:
        raise SourceError(f"{shown}: claims to have {total} bytes; at most {MAX_BLOB} are possible")
    if last < first or last >= (MAX_BLOB if total is None else total):
        raise SourceError(f"{shown}: sends an impossible part (Content-Range {text!r})")
    return first, last, total


def content_length(response: httpx.Response) -> int | None:
    """The announced length of a body, if there is one.  Raises SourceError where it is impossible."""
    text = response.headers.get("content-length", "")
    length = int(text) if re.fullmatch(r"\d{1,40}", text, re.ASCII) else None
    if length is not None and length > MAX_BLOB:
        raise SourceError(
            f"a body of {length} bytes was announced; at most {MAX_BLOB} are possible"
        )
    return length

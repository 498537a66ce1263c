"""A transport for httpx with larger reads.

httpcore reads at most 64 KiB from a connection at a time, with some 100 us of bookkeeping for each
piece.  The network backend here (an extension point of httpcore) reads 256 KiB: a large blob arrives
up to twice as fast over loopback.  httpx has no option for a backend, so the module replaces its
transport as well, with the proxies that httpx would take from the environment.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from urllib.request import getproxies, proxy_bypass

import httpcore
import httpx

READ = 256 << 10  # bytes of one read at most


class _Stream(httpcore.AsyncNetworkStream):
    """A connection that is read in large pieces."""

    def __init__(self, inner: httpcore.AsyncNetworkStream) -> None:
        self._inner = inner

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._inner.read(max(max_bytes, READ), timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Backend(httpcore.AsyncNetworkBackend):
    """httpcore's backend for trio, with each connection wrapped in a ``_Stream``."""

    def __init__(self) -> None:
        self._inner = httpcore.TrioBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(
            await self._inner.connect_tcp(host, port, timeout, local_address, socket_options)
        )

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


class Pools(httpx.AsyncBaseTransport):
    """An httpx transport: pooled connections to servers, and to the proxies that the environment
    names."""

    def __init__(self, tls: ssl.SSLContext, connections: int) -> None:
        """``connections``: at most at one time, per proxy and for all servers without one together."""
        self._tls = tls
        self._connections = connections
        self._proxies = getproxies()
        self._pools: dict[str | None, httpcore.AsyncConnectionPool] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        with _errors_of_httpx():
            response = await self._pool(self._proxy_of(url)).handle_async_request(
                httpcore.Request(
                    method=request.method,
                    url=httpcore.URL(
                        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
                    ),
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_Body(response),
            extensions=response.extensions,
        )

    def _proxy_of(self, url: httpx.URL) -> str | None:
        """The proxy that the environment names for a URL; None where there is none."""
        found = self._proxies.get(url.scheme) or self._proxies.get("all")
        if not found or proxy_bypass(f"{url.host}:{url.port or ''}"):
            return None
        return found if "://" in found else f"http://{found}"

    def _pool(self, proxy: str | None) -> httpcore.AsyncConnectionPool:
        if proxy not in self._pools:
            words: dict[str, Any] = {
                "ssl_context": self._tls,
                "max_connections": self._connections,
                "max_keepalive_connections": self._connections,
                "network_backend": _Backend(),
            }
            if proxy is None:
                self._pools[proxy] = httpcore.AsyncConnectionPool(**words)
            else:
                parsed = httpx.Proxy(proxy)  # raises ValueError for schemes that it does not know
                words |= {"proxy_url": str(parsed.url), "proxy_auth": parsed.raw_auth}
                by_socks = parsed.url.scheme.startswith("socks")
                kind = httpcore.AsyncSOCKSProxy if by_socks else httpcore.AsyncHTTPProxy
                self._pools[proxy] = kind(**words)
        return self._pools[proxy]

    async def aclose(self) -> None:
        for pool in self._pools.values():
            await pool.aclose()


class _Body(httpx.AsyncByteStream):
    """The body of a response.  Not a generator, so that closing it closes the inner iterator."""

    def __init__(self, response: httpcore.Response) -> None:
        self._response = response
        self._chunks = cast("AsyncGenerator[bytes, None]", response.aiter_stream())

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        with _errors_of_httpx():
            return await anext(self._chunks)

    async def aclose(self) -> None:
        with _errors_of_httpx():
            await self._chunks.aclose()
            await self._response.aclose()


# httpcore's exceptions and httpx's have the same names; subclasses come before their base classes
_ERRORS = {
    getattr(httpcore, name): getattr(httpx, name)
    for name in (
        "ConnectTimeout", "ReadTimeout", "WriteTimeout", "PoolTimeout", "TimeoutException",
        "ConnectError", "ReadError", "WriteError", "NetworkError",
        "LocalProtocolError", "RemoteProtocolError", "ProtocolError",
        "ProxyError", "UnsupportedProtocol",
    )
}  # fmt: skip


@contextmanager
def _errors_of_httpx() -> Iterator[None]:
    """Translate httpcore's exceptions into httpx's."""
    try:
        yield
    except tuple(_ERRORS) as e:
        kind = next(mine for theirs, mine in _ERRORS.items() if isinstance(e, theirs))
        raise kind(str(e)) from e

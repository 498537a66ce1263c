"""The server modes of the command: open the sources, listen, serve until a stop signal."""

from __future__ import annotations

import signal
import ssl
import sys
from collections.abc import AsyncIterator

import trio

from pyerofs.images import flat
from pyerofs.sources.base import AsyncSource
from pyerofs.sources.open import open_async
from pyerofs.sources.spec import Access
from pyerofs.system.daemon import STOPS, heeded
from pyerofs_nbd.errors import NbdError
from pyerofs_nbd.options import Serve
from pyerofs_nbd.server import listen, tls
from pyerofs_nbd.server.exports import Export, Server

SIGNALS = heeded(*STOPS)
GRACE = 10.0  # seconds for replies in flight after a stop signal


def serve(wanted: Serve, access: Access) -> None:
    """Serve until a signal, or until the only client has gone.

    Raises NbdError, ListenError, TlsError or SourceError, alone or in groups of one."""
    files = wanted.tls
    context = None
    if files is not None:
        context = tls.server_context(files.certificate, files.key, files.authority)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until ``_serve`` handles them
    listeners = listen.activated()
    passed = len(listeners)  # their addresses are not printed: the parent process knows them
    try:
        for path in wanted.sockets:
            listeners.append(listen.unix(path))
        for where in wanted.listens:
            listeners += listen.tcp(where)
        if not listeners and not wanted.stdio:
            raise NbdError("LISTEN_FDS passes no sockets, and --socket and --listen are missing")
        warning = listen.warning(listeners, tls_required=wanted.tls_required)
        if warning is not None:
            print(f"pyerofs-nbd: warning: {warning}", file=sys.stderr)
        trio.run(_serve, wanted, access, listeners, passed, context)
    finally:
        for listener in listeners:
            listener.close()


async def _serve(
    wanted: Serve,
    access: Access,
    listeners: list[listen.Listener],
    passed: int,
    context: ssl.SSLContext | None,
) -> None:
    with trio.open_signal_receiver(*SIGNALS) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        async with trio.open_nursery() as background:
            sources: list[AsyncSource] = []
            try:
                exports = []
                for name, spec in wanted.named:
                    opened = await open_async(spec, access, background)
                    if spec.is_remote and access.prefetch == "metadata":
                        from pyerofs.prefetch import prefetch_metadata_of

                        background.start_soon(prefetch_metadata_of, opened)
                    sources += opened
                    whole = await flat.combine(opened) if len(opened) > 1 else opened[0]
                    if whole is None:
                        raise NbdError(
                            f"{spec.name}: the image does not map its devices into one; export"
                            " each on its own (--export)"
                        )
                    exports.append(Export(name, whole, spec.name))
                server = Server(exports, tls=context, tls_required=wanted.tls_required)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_stop_on, signals, server, nursery.cancel_scope)
                    if wanted.stdio:
                        await listen.serve_stdio(server)
                    else:
                        for listener in listeners[passed:]:
                            uri = listener.uri(wanted.named[0][0], tls=wanted.tls_required)
                            print(uri, flush=True)
                        await listen.serve(server, listeners)
                    nursery.cancel_scope.cancel()
            finally:
                background.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    for source in sources:
                        await source.aclose()


async def _stop_on(signals: AsyncIterator[int], server: Server, scope: trio.CancelScope) -> None:
    async for _ in signals:
        await server.drain(GRACE)
        scope.cancel()
        return

"""Serve sources to NBD clients.

One task per connection receives all available requests, answers at once those whose bytes are cached
(``peek``, or the page cache by ``sendfile``) in one system call, and starts a task for each of the
others, which replies when it is done, in any order.  A connection that has too much in flight is not
read from until replies have gone out.  So a slow source never delays cached reads, and a client that
does not read delays only itself.

Bytes are fetched before a reply's header is sent, so failures can always be reported.  The exception
is a file that shrinks or fails during ``sendfile``: it ends the connection.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from time import perf_counter
from typing import TypeAlias

import trio

from pyerofs.errors import ErofsError
from pyerofs.sources.base import AsyncSource, Buffer
from pyerofs.system.readiness import AWAKE
from pyerofs_nbd.server import holes
from pyerofs_nbd.server import protocol as p
from pyerofs_nbd.server.batch import SMALL, Batch
from pyerofs_nbd.server.budget import Budget
from pyerofs_nbd.server.channel import GONE, Channel, SocketChannel, TlsChannel
from pyerofs_nbd.server.pagecache import PageCache

log = logging.getLogger("pyerofs-nbd")

HANDSHAKE_SECONDS = 30.0  # for all of it; users at an nbdsh prompt are slower, but can reconnect
IDLE = 1.0  # seconds without a request after which a connection may be ended for a waiting client
SILENT = 0.25  # the same for seconds of a handshake
LINGER = 30.0  # seconds that replies in flight may take after the client's DISC
STALLED = 30.0  # seconds after which a connection that reads nothing may be ended for its memory
RECEIVE = p.REQUEST.size * 2340  # just below 64 KiB, a multiple: a burst leaves no partial request
TURN = 32  # requests after which other tasks run
LARGE = 1 << 20  # bytes; larger reads are charged to the budgets before they are in memory
MAX_REQUESTS = 256  # in flight, of one connection; Linux sends at most 128
MAX_BYTES = 64 << 20  # the same in bytes: two of the largest reads
SEVERAL_PROCESSORS = len(os.sched_getaffinity(0)) > 1
ALL_BYTES = 256 << 20  # of all connections
LOG_EVERY = 1.0  # seconds between two lines about failing reads of one export


@dataclass(frozen=True, slots=True)
class Export:
    """A source under a name.  The caller owns the source, and closes it after the server is done.
    The description is text for users."""

    name: str
    source: AsyncSource
    description: str = ""


@dataclass(slots=True)
class Statistics:
    """Counters, updated just before the replies are sent.  ``bytes``: data of successful reads;
    ``errors``: requests answered by an error; ``failures``: those caused by the source."""

    connections: int = 0
    requests: int = 0
    bytes: int = 0
    errors: int = 0
    failures: int = 0


class Server:
    """Serves exports to any number of connections."""

    def __init__(
        self,
        exports: Sequence[Export],
        *,
        tls: ssl.SSLContext | None = None,
        tls_required: bool = False,
    ) -> None:
        """The first export also answers to the empty name.  With ``tls`` clients may use TLS; with
        ``tls_required`` they must.  Raises ValueError if names are not unique."""
        if not exports or len({e.name for e in exports}) < len(exports):
            raise ValueError("exports need different names")
        if tls_required and tls is None:
            raise ValueError("TLS can't be required without a certificate")
        self.exports = tuple(exports)
        self.tls = tls
        self.tls_required = tls_required
        self.statistics = Statistics()
        self.stopping = False
        self.releasing = False
        self.budget = Budget(ALL_BYTES)
        self._scopes: set[trio.CancelScope] = set()
        self._greeting: dict[trio.CancelScope, float] = {}  # handshakes, and when they began
        self._serving: dict[_Transmission, None] = {}
        self._served = {id(e): _Served(e) for e in exports}

    @property
    def serves_one(self) -> bool:
        """Whether there is a single connection, and a processor for it and one for its client."""
        return len(self._serving) == 1 and SEVERAL_PROCESSORS

    # --- connections --------------------------------------------------------------------------

    async def serve_client(self, sock: socket.socket, handshake: float | None = None) -> None:
        """Serve one client on a connected stream socket, from the handshake on, and close the socket.

        Whatever the client does ends this connection only; raises nothing but Cancelled."""
        await self.serve_channel(SocketChannel(sock), handshake)

    async def serve_channel(self, channel: Channel, handshake: float | None = None) -> None:
        """``serve_client`` for any channel.  TLS is for sockets only.  ``handshake``: seconds that the
        handshake may take, by default HANDSHAKE_SECONDS."""
        if self.stopping:
            await channel.aclose()
            return
        self.statistics.connections += 1
        found = None
        try:
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                try:
                    self._greeting[scope] = trio.current_time()
                    with trio.move_on_after(handshake or HANDSHAKE_SECONDS):
                        channel, found = await self._negotiate(channel)
                    del self._greeting[scope]
                    if found is not None:
                        await self._transmit(channel, found)
                finally:
                    self._greeting.pop(scope, None)
                    self._scopes.discard(scope)
        except* GONE:
            pass
        except* Exception:
            log.exception("internal error; closing the connection")
        finally:
            await channel.aclose()

    async def serve_transmission(self, sock: socket.socket, export: Export) -> bool:
        """Serve the kernel's side of an attached device: simple replies, no handshake.

        True if it ended with a DISC, False if the peer vanished or ``release`` was called.  The socket
        is left open, in non-blocking mode.  ``export`` need not be one of the server's."""
        self.statistics.connections += 1
        served = self._served.get(id(export)) or _Served(export)
        # the kernel reads no replies after its DISC
        transmission = _Transmission(self, SocketChannel(sock), served, linger=0.0)
        try:
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                try:
                    return await self._run(transmission, b"")
                finally:
                    self._scopes.discard(scope)
        except* GONE:
            pass
        return False

    async def drain(self, grace: float) -> None:
        """Stop: refuse new connections, answer new requests with ESHUTDOWN, give those in flight
        ``grace`` seconds, then end all connections.  Returns when no request is in flight any more;
        the connections' tasks end soon after."""
        self.stopping = True
        with trio.move_on_after(grace):
            for transmission in list(self._serving):
                await transmission.idle()
        for scope in self._scopes:
            scope.cancel()

    def release(self) -> None:
        """For handing connections over to another process: every ``serve_transmission`` receives no
        more requests, answers those received, and returns with the stream at a message boundary."""
        self.releasing = True
        for transmission in self._serving:
            transmission.channel.wake()

    # --- inside -------------------------------------------------------------------------------

    async def _negotiate(self, channel: Channel) -> tuple[Channel, p.Transmit | None]:
        """Do the handshake; None if it ends the connection.  Raises what GONE lists."""
        infos = [p.ExportInfo(e.name, e.source.size, e.description) for e in self.exports]
        tls = self.tls is not None and isinstance(channel, SocketChannel)
        shake = p.Handshake(infos, tls=tls, tls_required=self.tls_required)
        await channel.send([shake.greeting()])
        buffer = memoryview(bytearray(RECEIVE))
        while True:
            match shake.next_action():
                case None:
                    await trio.lowlevel.checkpoint()
                    received = await channel.receive(buffer)
                    if not received:
                        return channel, None
                    shake.feed(buffer[:received])
                case p.Send(data):
                    await channel.send([data])
                case p.StartTls():
                    assert self.tls is not None
                    assert isinstance(channel, SocketChannel)
                    channel = TlsChannel(channel.sock, self.tls)
                    await channel.shake_hands()
                    shake.secured()
                case p.Transmit() as found:
                    return channel, found
                case p.Close():
                    return channel, None

    async def _transmit(self, channel: Channel, found: p.Transmit) -> None:
        served = self._served[id(self.exports[found.export])]
        transmission = _Transmission(
            self, channel, served, structured=found.structured, allocation=found.allocation
        )
        await self._run(transmission, found.left)

    async def _run(self, transmission: _Transmission, left: bytes) -> bool:
        self._serving[transmission] = None
        try:
            return await transmission.run(left)
        finally:
            del self._serving[transmission]

    def give_way(self) -> None:
        """End the connection that has been idle longest, for a client that waits for a slot.  Those in
        their handshake are ended first; one with a request or reply in flight never is."""
        now = trio.current_time()
        if any(scope.cancel_called for scope in self._scopes):
            return  # a connection is ending already
        silent = [(since, s.cancel) for s, since in self._greeting.items() if now - since > SILENT]
        idle = [(t.since, t.cancel) for t in self._serving if t.idle_now and now - t.since > IDLE]
        for found in (silent, idle):
            if found:
                log.info("ending an idle connection: the limit is reached, and a new client waits")
                min(found, key=lambda pair: pair[0])[1]()
                return

    def evict(self) -> None:
        """End the connection that has held bytes of the budget for longest without reading them, for a
        connection that has waited long for bytes."""
        idle = [
            t for t in self._serving if t.held and trio.current_time() - t.channel.stalled > STALLED
        ]
        if idle:
            log.warning("ending a connection that reads no replies: others wait for its memory")
            min(idle, key=lambda t: t.channel.stalled).cancel()


class _Served:
    """An export, and the state that all its connections share."""

    def __init__(self, export: Export) -> None:
        self.export = export
        self.source = export.source
        self.cache = PageCache()
        self._silent_until = -float("inf")
        self._unsaid = 0

    def failed(self, error: Exception) -> None:
        """Log a failed read, at most once in LOG_EVERY seconds."""
        now = trio.current_time()
        if now < self._silent_until:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} more)" if self._unsaid else ""
        self._silent_until, self._unsaid = now + LOG_EVERY, 0
        if isinstance(error, ErofsError):
            log.error("%s%s", error, more)
        else:
            log.error("%s: internal error", self.source.name, exc_info=error)


class _Transmission:
    """The transmission phase of one connection."""

    def __init__(
        self,
        server: Server,
        channel: Channel,
        served: _Served,
        *,
        structured: bool = False,
        allocation: bool = False,
        linger: float = LINGER,
    ) -> None:
        self._linger = linger
        self.channel = channel
        self.held = 0  # bytes taken from the server's budget
        self._server = server
        self._served = served
        self._source = served.source
        self._structured = structured
        self._allocation = allocation
        self._head = p.structured_data if structured else p.simple_data
        self._statistics = server.statistics
        self._bytes = Budget(MAX_BYTES)
        self._requests = Budget(MAX_REQUESTS)
        self._sending = trio.Lock()
        self._batch = Batch(self._head)
        self._busy = False
        self._released = False
        self._idle = trio.Event()
        self._scope = trio.CancelScope()
        self.since = trio.current_time()  # when the last requests were answered

    @property
    def idle_now(self) -> bool:
        """Whether nothing is in flight, in either direction."""
        return (
            not self._busy
            and self._requests.free >= MAX_REQUESTS
            and self.channel.stalled == inf
            and not self._scope.cancel_called
        )

    def cancel(self) -> None:
        """End the connection, even with requests in flight."""
        self._scope.cancel()

    async def idle(self) -> None:
        """Wait until nothing is in flight."""
        while self._busy or self._requests.free < MAX_REQUESTS:
            self._idle = trio.Event()
            await self._idle.wait()

    async def run(self, left: bytes) -> bool:
        """Serve until the connection ends; ``left``: bytes already received.  True after a DISC.

        Raises what GONE lists, alone or in groups."""
        leaving = False
        with self._scope:
            async with trio.open_nursery() as nursery:
                leaving = await self._receive(left, nursery)
                if leaving:
                    nursery.cancel_scope.deadline = trio.current_time() + self._linger
                elif not self._released:
                    nursery.cancel_scope.cancel()
        return leaving

    async def _receive(self, left: bytes, nursery: trio.Nursery) -> bool:
        """Receive and answer requests; True at a DISC."""
        decoder = p.Decoder()
        buffer = memoryview(bytearray(max(RECEIVE, len(left))))
        buffer[: len(left)] = left
        filled, received = 0, len(left)
        since = 0
        soon = False  # whether the last requests came within AWAKE
        while True:
            if not received:
                if self._server.releasing and not filled and decoder.between:
                    self._released = True
                    return False
                try:
                    if since >= TURN:
                        since = 0
                        await trio.lowlevel.checkpoint()
                    start = perf_counter()
                    if soon and self._server.serves_one:
                        self.channel.look_out()
                    received = await self.channel.receive(buffer[filled:])
                    soon = perf_counter() - start < AWAKE
                except trio.ClosedResourceError:
                    if self._server.releasing:
                        continue
                    raise
                if not received:
                    return False
            filled += received
            received = 0
            requests, done = decoder.decode(buffer[:filled])
            since += len(requests) + 1
            if done < filled:
                buffer[: filled - done] = buffer[done:filled]
            filled -= done
            self._busy = True
            leaving = await self._answer(requests, nursery)
            await self._flush()
            self._busy = False
            self.since = trio.current_time()
            self._idle.set()
            if leaving or decoder.broken:
                return leaving

    async def _answer(self, requests: Sequence[p.Request], nursery: trio.Nursery) -> bool:
        """Answer the requests that need no waiting, into the batch, which is sent whenever it is full,
        and start tasks for the others; True at a DISC."""
        batch, size = self._batch, self._source.size
        self._statistics.requests += len(requests)
        at = 0
        while at < len(requests):
            if batch.full:
                await self._flush()
            backing = self._source.backing
            if backing is not None and batch.can_read and not self._server.stopping:
                taken = batch.read(requests, at, size, *backing)
                if taken > at:
                    at = taken
                    continue
            if await self._one(requests[at], nursery):
                return True
            at += 1
        return False

    async def _one(self, request: p.Request, nursery: trio.Nursery) -> bool:
        """Answer one request; True if it is a DISC, which has no reply."""
        _, _, kind, cookie, offset, length = request
        if kind == p.CMD_DISC:
            return True
        error = p.refusal(
            request, self._source.size, structured=self._structured, allocation=self._allocation
        )
        if self._server.stopping:
            error = p.ESHUTDOWN
        if error:
            self._statistics.errors += 1
            self._batch.add(p.failure(request, error, structured=self._structured))
        elif kind == p.CMD_READ:
            await self._read(request, nursery)
        elif kind == p.CMD_BLOCK_STATUS:
            await self._leave(request, self._status, nursery)
        else:
            if kind == p.CMD_CACHE:
                self._source.will_need(offset, length)
            self._batch.add(p.simple_reply(cookie))
        return False

    async def _read(self, request: p.Request, nursery: trio.Nursery) -> None:
        """Answer a read that is large, or that the batch could not take."""
        _, _, _, cookie, offset, length = request
        backing = self._source.backing
        large_file = backing is not None and length > SMALL and self.channel.sends_files
        if backing is not None and large_file:
            fd, base = backing
            if self._served.cache.holds(fd, base + offset, length):
                self._batch.add(self._head(cookie, offset, length))
                await self._send_file(fd, base + offset, length)
                return
        tried = backing is not None and length <= SMALL and self._batch.can_read
        if not tried and length <= LARGE:
            found = self._source.peek(offset, length)
            if found is not None:
                if large_file:
                    self._served.cache.mistrust()
                self._batch.add_read(cookie, offset, found)
                return
        await self._leave(request, self._fetch, nursery)

    # --- what takes longer --------------------------------------------------------------------

    async def _leave(self, request: p.Request, task: _Task, nursery: trio.Nursery) -> None:
        """Start a task for a request, once the budgets have room for it."""
        amount = request[5] if request[2] == p.CMD_READ else 0
        if not self._requests.take_now(1):
            await self._flush()
            await self._requests.take(1)
        if not self._bytes.take_now(amount):
            await self._flush()
            await self._bytes.take(amount)
        shared = self._server.budget
        if not shared.take_now(amount):
            await self._flush()
            await shared.take(amount, patience=STALLED, complain=self._server.evict)
        self.held += amount
        nursery.start_soon(self._run_task, task, request, amount)

    async def _run_task(self, task: _Task, request: p.Request, amount: int) -> None:
        try:
            await task(request)
        finally:
            self.held -= amount
            self._server.budget.give(amount)
            self._bytes.give(amount)
            self._requests.give(1)
            self.since = trio.current_time()
            self._idle.set()

    async def _fetch(self, request: p.Request) -> None:
        """Answer a read that is large or has to wait for its bytes."""
        _, _, _, cookie, offset, length = request
        try:
            # (``_read`` has not tried this for large reads: their memory was not accounted for yet)
            found = self._source.peek(offset, length) if length > LARGE else None
            if found is None:
                found = await self._source.read_at(offset, length)
            if len(found) != length:
                raise ErofsError(
                    f"{self._source.name}: read {len(found)} bytes instead of {length}"
                )
        except Exception as e:
            self._served.failed(e)
            self._statistics.errors += 1
            self._statistics.failures += 1
            reply = p.failure(request, p.EIO, structured=self._structured, message=str(e))
            await self._send([reply])
        else:
            self._statistics.bytes += length
            await self._send([self._head(cookie, offset, length), found])

    async def _status(self, request: p.Request) -> None:
        """Answer BLOCK_STATUS."""
        _, flags, _, cookie, offset, length = request
        extents = [(length, 0)]
        if (backing := self._source.backing) is not None:
            fd, base = backing
            limit = 1 if flags & p.CMD_FLAG_REQ_ONE else holes.MAX_EXTENTS
            look = partial(holes.extents, fd, base + offset, length, limit=limit)
            try:
                extents = await trio.to_thread.run_sync(look)
            except OSError:
                pass  # reading will report the error
        await self._send([p.block_status(cookie, extents)])

    # --- sending ------------------------------------------------------------------------------

    async def _flush(self) -> None:
        """Send the batch."""
        if self._batch.size:
            await self._acquire()
            try:
                await self._flush_locked()
            finally:
                self._sending.release()

    async def _flush_locked(self, *, more: bool = False) -> None:
        self._statistics.bytes += self._batch.payload
        await self.channel.send(self._batch.take(), more=more)
        self._batch.clear()

    async def _send_file(self, fd: int, offset: int, length: int) -> None:
        """Send the batch, then a range of a file."""
        await self._acquire()
        try:
            await self._flush_locked(more=True)
            self._statistics.bytes += length
            await self.channel.send_file(fd, offset, length)
        finally:
            self._sending.release()

    async def _send(self, parts: Sequence[Buffer]) -> None:
        await self._acquire()
        try:
            await self.channel.send(parts)
        finally:
            self._sending.release()

    async def _acquire(self) -> None:
        """Take the send lock; a checkpoint only if another task holds it."""
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()


_Task: TypeAlias = Callable[[p.Request], Awaitable[None]]

"""A client's byte stream: a socket, a pair of pipes, or TLS over a socket.

Calls on sockets and pipes are checkpoints only if they have to wait: a checkpoint costs as much as a
dozen small reads.  One task at a time may send; cancelling it leaves a partial message in the stream.
If the client has disconnected, any call raises one of GONE, or ``receive`` returns 0.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Sequence
from math import inf
from typing import Protocol

import trio

from pyerofs.sources.base import Buffer
from pyerofs.system.readiness import look_out, reading

MAX_SENDFILE = 2 << 20  # bytes per call, which delays all other clients meanwhile
CHUNK = 64 << 10  # bytes per call of a TLS stream, which copies them
LAST = int(socket.MSG_NOSIGNAL)  # plain integers: combining enum flags takes microseconds
MORE = int(socket.MSG_NOSIGNAL | socket.MSG_MORE)
GONE = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError)


class Channel(Protocol):
    """One client's connection.  ``stalled``: the trio time since which sending has been blocked,
    because the client does not read; inf otherwise."""

    stalled: float

    async def receive(self, into: memoryview) -> int:
        """Receive into a buffer; returns the number of bytes, 0 at end of stream."""

    async def send(self, parts: Sequence[Buffer], *, more: bool = False) -> None:
        """Send all parts.  ``more``: whether further data follows at once."""

    def look_out(self) -> None:
        """Return when there is something to receive, or after AWAKE.  Blocks the event loop; does
        nothing where a kind of channel can't do it."""

    @property
    def sends_files(self) -> bool:
        """Whether ``send_file`` can be used."""

    async def send_file(self, fd: int, offset: int, length: int) -> None:
        """Send a range of a file by sendfile(2).  Blocks the event loop if the range has to be read
        from the disk.  Raises OSError also if the file ends early."""

    def wake(self) -> None:
        """Have a waiting ``receive`` raise trio.ClosedResourceError; no data is lost, and ``send``
        continues."""

    async def aclose(self) -> None:
        """Close the connection.  Raises only Cancelled, and closes it even then."""


class SocketChannel:
    """A connected stream socket, without a layer between it and the system calls."""

    sends_files = True

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.stalled = inf
        self._fd = sock.fileno()
        self._reading = reading(self._fd)

    def look_out(self) -> None:
        look_out(self._reading)

    async def receive(self, into: memoryview) -> int:
        sock = self.sock
        try:
            return sock.recv_into(into)
        except BlockingIOError:
            pass
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                return sock.recv_into(into)
            except BlockingIOError:
                continue

    async def send(self, parts: Sequence[Buffer], *, more: bool = False) -> None:
        flags = MORE if more else LAST
        sizes = sum(map(len, parts))
        while True:
            try:
                sent = self.sock.sendmsg(parts, (), flags)
            except BlockingIOError:
                sent = 0
            sizes -= sent
            if not sizes:
                return
            parts = unsent(parts, sent)
            await _writable(self, self._fd)

    async def send_file(self, fd: int, offset: int, length: int) -> None:
        while True:
            try:
                sent = os.sendfile(self._fd, fd, offset, min(length, MAX_SENDFILE))
            except BlockingIOError:
                await _writable(self, self._fd)
                continue
            if not sent:
                raise OSError(f"the file ended at {offset} while it was being sent")
            offset += sent
            length -= sent
            if not length:
                return

    def wake(self) -> None:
        trio.lowlevel.notify_closing(self.sock)

    async def aclose(self) -> None:
        close(self.sock)


class PipeChannel:
    """Two pipes (or terminals, or whatever else stdin and stdout may be).  Owns them."""

    sends_files = False

    def __init__(self, read: int, write: int) -> None:
        self.stalled = inf
        self._read = read
        self._write = write
        # other processes may share the pipes, so ``aclose`` restores their blocking mode
        self._was = [(fd, os.get_blocking(fd)) for fd in (read, write)]
        for fd, _ in self._was:
            os.set_blocking(fd, False)

    def look_out(self) -> None:
        pass

    async def receive(self, into: memoryview) -> int:
        while True:
            try:
                return os.readv(self._read, [into])
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._read)

    async def send(self, parts: Sequence[Buffer], *, more: bool = False) -> None:
        sizes = sum(map(len, parts))
        while True:
            try:
                sent = os.writev(self._write, parts)
            except BlockingIOError:
                sent = 0
            sizes -= sent
            if not sizes:
                return
            parts = unsent(parts, sent)
            await _writable(self, self._write)

    async def send_file(self, fd: int, offset: int, length: int) -> None:
        raise NotImplementedError

    def wake(self) -> None:
        trio.lowlevel.notify_closing(self._read)

    async def aclose(self) -> None:
        was, self._was = self._was, []
        self._read = self._write = -1
        for fd, blocking in was:
            trio.lowlevel.notify_closing(fd)
            try:
                os.set_blocking(fd, blocking)
                os.close(fd)
            except OSError:
                pass  # closed already


class TlsChannel:
    """TLS over a socket; a few times slower, since bytes are copied several times."""

    sends_files = False

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.stalled = inf
        self._sock = sock
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        # https_compatible: a client need not send close_notify
        self._stream = trio.SSLStream(stream, context, server_side=True, https_compatible=True)

    async def shake_hands(self) -> None:
        """Do the TLS handshake.  Raises what GONE lists."""
        await self._stream.do_handshake()

    def look_out(self) -> None:
        pass

    async def receive(self, into: memoryview) -> int:
        found = await self._stream.receive_some(min(len(into), CHUNK))
        into[: len(found)] = found
        return len(found)

    async def send(self, parts: Sequence[Buffer], *, more: bool = False) -> None:
        for part in parts if len(parts[-1]) > CHUNK else [b"".join(parts)]:
            view = memoryview(part)
            for at in range(0, len(view), CHUNK):
                self.stalled = trio.current_time()
                try:
                    await self._stream.send_all(view[at : at + CHUNK])
                finally:
                    self.stalled = inf

    async def send_file(self, fd: int, offset: int, length: int) -> None:
        raise NotImplementedError

    def wake(self) -> None:
        trio.lowlevel.notify_closing(self._sock)

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        except GONE:
            pass


async def _writable(channel: Channel, fd: int) -> None:
    """Wait until a descriptor can be written to."""
    channel.stalled = trio.current_time()
    try:
        await trio.lowlevel.wait_writable(fd)
    except trio.ClosedResourceError:
        pass  # woken by ``wake``; or closed, which the next attempt reports
    finally:
        channel.stalled = inf


def unsent(parts: Sequence[Buffer], sent: int) -> list[Buffer]:
    """The remainder of ``parts`` after their first ``sent`` bytes."""
    for n, part in enumerate(parts):
        if sent < len(part):
            return [memoryview(part)[sent:], *parts[n + 1 :]]
        sent -= len(part)
    return []


def close(sock: socket.socket) -> None:
    """Close a socket that tasks may be waiting for.  Idempotent."""
    if sock.fileno() >= 0:
        trio.lowlevel.notify_closing(sock)
        sock.close()

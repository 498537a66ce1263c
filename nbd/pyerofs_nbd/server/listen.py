"""Listen for clients: on unix sockets, TCP, stdin and stdout, sockets passed by systemd.

Except ``serve`` and ``serve_stdio``, everything here is synchronous and returns at once (apart from the
lookup of a host's name).  Failures are ListenErrors of one line.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
import stat
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import quote

import trio

from pyerofs_nbd.errors import NbdError
from pyerofs_nbd.server.channel import Channel, PipeChannel, SocketChannel
from pyerofs_nbd.server.exports import Server
from pyerofs_nbd.server.protocol import DEFAULT_PORT

log = logging.getLogger("pyerofs-nbd")

BACKLOG = 64
MAX_CONNECTIONS = 128  # at once; for one more, an idle one is ended
HANDSHAKE_TIMEOUT = 10.0  # seconds that a client may take for its handshake
PLACE = 0.1  # seconds between attempts to free a slot for a client
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
PAUSE = 0.2  # seconds to wait for descriptors or memory before accepting again
PATH_MAX = 107  # bytes: sun_path without its final zero
FIRST_FD = 3  # sd_listen_fds(3)


class ListenError(NbdError):
    """An address can't be served; the message is one line."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that clients connect to, or (``connected``) one client's socket, passed by a parent.

    ``path`` is the unix socket made here that ``close`` removes; ``identity`` is its device and inode
    number."""

    sock: socket.socket
    connected: bool = False
    path: str | None = None
    identity: tuple[int, int] | None = None

    def uri(self, name: str = "", *, tls: bool = False) -> str:
        """The NBD URI of an export on this socket."""
        return uri_of(self.sock.getsockname(), name, tls=tls)

    @property
    def exposed(self) -> bool:
        """Whether other machines can connect."""
        if self.sock.family == socket.AF_UNIX:
            return False
        return not ipaddress.ip_address(self.sock.getsockname()[0].partition("%")[0]).is_loopback

    def close(self) -> None:
        """Stop listening; remove the socket's file if its identity is unchanged.  Idempotent."""
        self.sock.close()
        if self.path is not None:
            try:
                if _identity(self.path) == self.identity:
                    os.unlink(self.path)
            except OSError:
                pass  # the file is gone, or may not be removed any more


# --- unix sockets -----------------------------------------------------------------------------


def unix(path: str) -> Listener:
    """Listen on a unix socket that only its owner (and root) can connect to.  Replaces a socket whose
    server is dead.  Raises ListenError."""
    path = os.path.abspath(path)
    if len(os.fsencode(path)) > PATH_MAX:
        raise ListenError(f"{path}: is longer than the {PATH_MAX} bytes of a socket's path")
    sock = socket.socket(socket.AF_UNIX)
    try:
        os.fchmod(sock.fileno(), 0o600)  # bind(2) gives the file the socket's mode
        try:
            sock.bind(path)
        except OSError as e:
            if e.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            sock.bind(path)
        identity = _identity(path)
        sock.listen(BACKLOG)
    except OSError as e:
        sock.close()
        raise ListenError(f"{path}: {e.strerror}") from None
    except ListenError:
        sock.close()
        raise
    return Listener(sock, path=path, identity=identity)


def _remove_stale(path: str) -> None:
    """Remove a socket file without a listener.  Raises ListenError if the file is anything else."""
    found = os.lstat(path)
    if not stat.S_ISSOCK(found.st_mode):
        raise ListenError(f"{path}: exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # EAGAIN, from a full backlog, means a living server
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            pass
        except (BlockingIOError, FileNotFoundError):
            raise ListenError(f"{path}: another server is using it") from None
        else:
            raise ListenError(f"{path}: a server listens there already")
    if _identity(path) == (found.st_dev, found.st_ino):
        os.unlink(path)


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


# --- TCP --------------------------------------------------------------------------------------


def tcp(where: str) -> list[Listener]:
    """Listen on HOST:PORT, HOST or :PORT (localhost only); IPv6 addresses in brackets.  A host name
    may have several addresses; port 0 is any free port.  Raises ListenError."""
    host, port = parse_address(where)
    listeners: list[Listener] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, _, _, address in dict.fromkeys(found):
            if port == 0 and listeners:  # the same port for all addresses
                chosen = listeners[0].sock.getsockname()[1]
                address = cast("tuple[str, int]", (address[0], chosen, *address[2:]))
            sock = socket.socket(family, kind)
            listeners.append(Listener(sock))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind(address)
                sock.listen(BACKLOG)
            except OSError as e:
                if e.errno != errno.EADDRNOTAVAIL or len(found) == 1:
                    raise
                listeners.pop().close()  # localhost resolves to ::1 even without IPv6
    except (OSError, UnicodeError) as e:
        for listener in listeners:
            listener.close()
        reason = e.strerror if isinstance(e, OSError) else "is not a host name"
        raise ListenError(f"{where}: {reason}") from None
    if not listeners:
        raise ListenError(f"{where}: none of this host's addresses is on this machine")
    return listeners


def parse_address(where: str) -> tuple[str, int]:
    """HOST and PORT.  Raises ListenError."""
    host, colon, port = where.rpartition(":")
    if where.endswith("]") or not colon or (":" in host and not host.startswith("[")):
        host, port = where, str(DEFAULT_PORT)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ListenError(f"{where}: {port!r} is not a port")
    return host or "localhost", int(port)


def warning(listeners: Iterable[Listener], *, tls_required: bool) -> str | None:
    """The warning for listeners that other machines can connect to without TLS; None without such."""
    exposed = [listener for listener in listeners if listener.exposed]
    if not exposed or tls_required:
        return None
    where = ", ".join(listener.uri() for listener in exposed)
    return f"{where}: anyone who can reach this address can read, without TLS (see --tls-required)"


# --- systemd ----------------------------------------------------------------------------------


def activated(environment: MutableMapping[str, str] = os.environ) -> list[Listener]:
    """The sockets passed by systemd (or nbdcopy, nbdinfo ...), if any.  Removes the variables that
    announce them, so that no child process takes them for its own.  Raises ListenError.

    See sd_listen_fds(3).  With ``Accept=yes`` the socket is one client's connection."""
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return []
    if not count.isdigit():
        raise ListenError(f"LISTEN_FDS={count}: is not a number")
    return [_activated(fd) for fd in range(FIRST_FD, FIRST_FD + int(count))]


def _activated(fd: int) -> Listener:
    try:
        sock = socket.socket(fileno=fd)
        if sock.type != socket.SOCK_STREAM:
            raise ListenError(f"descriptor {fd}: is not a stream socket")
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as e:
        raise ListenError(f"descriptor {fd}: {e.strerror}") from None
    sock.set_inheritable(False)
    return Listener(sock, connected=not listening)


# --- stdin and stdout -------------------------------------------------------------------------


def stdio() -> Channel:
    """The channel of the client on stdin and stdout: a socket, or two pipes.  Replaces both by
    /dev/null, so that no other output gets into the stream.  Raises ListenError."""
    try:
        read, write = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1):
            os.dup2(null, fd)
        os.close(null)
        if stat.S_ISSOCK(os.fstat(read).st_mode):
            os.close(write)  # as from inetd: both are the same socket
            return SocketChannel(socket.socket(fileno=read))
        return PipeChannel(read, write)
    except OSError as e:
        raise ListenError(f"stdin and stdout: {e.strerror}") from None


# --- serving ----------------------------------------------------------------------------------


def uri_of(address: object, name: str = "", *, tls: bool = False) -> str:
    """The NBD URI of an export at a socket's address (as ``getsockname`` gives it).

    See the NBD project's doc/uri.md."""
    scheme = "nbds" if tls else "nbd"
    path = "/" + quote(name) if name else ""
    if isinstance(address, tuple):
        host, port = address[:2]
        host = f"[{host}]" if ":" in host else host
        at = "" if port == DEFAULT_PORT else f":{port}"
        return f"{scheme}://{host}{at}{path or '/'}"
    text = address if isinstance(address, bytes) else os.fsencode(str(address))
    return f"{scheme}+unix://{path or '/'}?socket={quote(text)}"


async def serve(
    server: Server, listeners: Sequence[Listener], *, limit: int = MAX_CONNECTIONS
) -> None:
    """Serve all clients, at most ``limit`` at once, until cancelled; or, if every listener is one
    client's socket, until these clients have disconnected.  Closes the listeners.

    If a client waits for a slot, the connection that has been idle longest is ended for it; one with a
    request in flight never is."""
    slots = trio.Semaphore(limit)
    try:
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                if listener.connected:
                    nursery.start_soon(server.serve_client, listener.sock)
                else:
                    nursery.start_soon(_accept, server, listener.sock, slots, nursery)
    finally:
        for listener in listeners:
            listener.close()


async def _accept(
    server: Server, listening: socket.socket, slots: trio.Semaphore, nursery: trio.Nursery
) -> None:
    listening.setblocking(False)
    short = False
    while True:
        await trio.lowlevel.wait_readable(listening)
        await _place(server, slots)
        try:
            client, _ = listening.accept()
        except OSError as e:
            slots.release()
            if e.errno in NO_ROOM:
                if not short:
                    log.warning("can't accept connections: %s; trying again", e.strerror)
                short = True
                await trio.sleep(PAUSE)
            continue  # otherwise the client has disconnected already
        except BaseException:
            slots.release()
            raise
        short = False
        nursery.start_soon(_serve_one, server, client, slots)


async def _place(server: Server, slots: trio.Semaphore) -> None:
    """Acquire a slot for a client, ending idle connections while there is none."""
    while True:
        try:
            slots.acquire_nowait()
            return
        except trio.WouldBlock:
            server.give_way()
        with trio.move_on_after(PLACE):
            await slots.acquire()
            return


async def _serve_one(server: Server, client: socket.socket, slots: trio.Semaphore) -> None:
    try:
        if client.family in (socket.AF_INET, socket.AF_INET6):
            try:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            except OSError:
                pass  # disconnected already, which ``serve_client`` will notice
        await server.serve_client(client, HANDSHAKE_TIMEOUT)
    finally:
        slots.release()


async def serve_stdio(server: Server) -> None:
    """Serve the one client on stdin and stdout.  Raises ListenError."""
    await server.serve_channel(stdio())

"""An NBD client that is made for tests: blocking, and free to break every rule."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

from pyerofs_nbd.server import protocol as p

PATIENCE = 30.0  # seconds for what should take none; a virtual machine may stand still for some


def option(number: int, data: bytes = b"") -> bytes:
    """An option as it is sent."""
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def string(text: str | bytes) -> bytes:
    """A string with its length before it."""
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack(">I", len(data)) + data


def go(name: str | bytes = "", kinds: Sequence[int] = (), number: int = p.OPT_GO) -> bytes:
    """GO (or INFO), asking for kinds of information."""
    return option(number, string(name) + struct.pack(f">H{len(kinds)}H", len(kinds), *kinds))


def contexts(name: str, queries: Sequence[str], number: int = p.OPT_SET_META_CONTEXT) -> bytes:
    """SET_META_CONTEXT (or LIST_META_CONTEXT)."""
    body = struct.pack(">I", len(queries)) + b"".join(map(string, queries))
    return option(number, string(name) + body)


def request(
    kind: int, offset: int = 0, length: int = 0, *, cookie: int = 1, flags: int = 0
) -> bytes:
    """A request as it is sent."""
    return p.REQUEST.pack(p.REQUEST_MAGIC, flags, kind, cookie, offset, length)


def read(offset: int, length: int, cookie: int = 1) -> bytes:
    return request(p.CMD_READ, offset, length, cookie=cookie)


DISC = request(p.CMD_DISC)


class OptionReply(NamedTuple):
    option: int
    kind: int
    data: bytes


class Chunk(NamedTuple):
    """A structured reply's chunk."""

    flags: int
    kind: int
    cookie: int
    data: bytes


class Client:
    """One connection.  Reading beyond its end raises EOFError."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        self.sock = sock

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, *parts: bytes) -> None:
        self.sock.sendall(b"".join(parts))

    def receive(self, length: int) -> bytes:
        """Exactly so many bytes."""
        found = bytearray()
        while len(found) < length:
            more = self.sock.recv(length - len(found))
            if not more:
                raise EOFError
            found += more
        return bytes(found)

    def ended(self) -> bool:
        """Whether the server has hung up, with nothing left to read."""
        try:
            return not self.sock.recv(1)
        except ConnectionResetError:
            return True

    # --- handshake ----------------------------------------------------------------------------

    def greet(self, flags: int = p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES) -> None:
        assert self.receive(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.send(struct.pack(">I", flags))

    def replies(self) -> list[OptionReply]:
        """The replies to one option, up to the last."""
        found: list[OptionReply] = []
        while not found or found[-1].kind in (p.REP_SERVER, p.REP_INFO, p.REP_META_CONTEXT):
            magic, number, kind, length = struct.unpack(">QIII", self.receive(20))
            assert magic == p.OPTION_REPLY_MAGIC
            found.append(OptionReply(number, kind, self.receive(length)))
        return found

    def ask(self, message: bytes) -> list[OptionReply]:
        """Send an option; its replies."""
        self.send(message)
        return self.replies()

    def start(self, name: str = "", *, structured: bool = False, allocation: bool = False) -> int:
        """The whole handshake; returns the export's size."""
        self.greet()
        if structured:
            assert self.ask(option(p.OPT_STRUCTURED_REPLY))[-1].kind == p.REP_ACK
        if allocation:
            assert len(self.ask(contexts(name, [p.ALLOCATION]))) == 2
        info, ack = self.ask(go(name))
        assert ack.kind == p.REP_ACK
        return int.from_bytes(info.data[2:10], "big")

    # --- transmission -------------------------------------------------------------------------

    def reply(self) -> tuple[int, int]:
        """A simple reply's error and cookie; its data, if any, is still to be received."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == p.SIMPLE_REPLY_MAGIC
        return error, cookie

    def read(self, offset: int, length: int) -> bytes:
        """Read with a simple reply that has to succeed."""
        self.send(read(offset, length, 77))
        assert self.reply() == (0, 77)
        return self.receive(length)

    def error(self, message: bytes) -> int:
        """Send a request that is answered by a simple reply without data; its error."""
        self.send(message)
        return self.reply()[0]

    def chunk(self) -> Chunk:
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.receive(20))
        assert magic == p.STRUCTURED_REPLY_MAGIC
        return Chunk(flags, kind, cookie, self.receive(length))

"""The NBD protocol without I/O: bytes go in, values and bytes come out.

Facts are from the NBD project's ``doc/proto.md``; docstrings name its sections.  Input from clients is
hostile: the constants below bound the memory kept for it.  This module knows no sockets, no trio and
no sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import NamedTuple, TypeAlias

# --- constants ("Values") ---------------------------------------------------------------------

DEFAULT_PORT = 10809

INIT_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

FLAG_FIXED_NEWSTYLE = 1  # the same bit for server ("Handshake flags") and client ("Client flags")
FLAG_NO_ZEROES = 2

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERR_UNSUP = 2**31 + 1
REP_ERR_POLICY = 2**31 + 2
REP_ERR_INVALID = 2**31 + 3
REP_ERR_TLS_REQD = 2**31 + 5
REP_ERR_UNKNOWN = 2**31 + 6
REP_ERR_SHUTDOWN = 2**31 + 7
REP_ERR_TOO_BIG = 2**31 + 9

INFO_EXPORT = 0
INFO_NAME = 1
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3

TRANSMISSION_HAS_FLAGS = 1 << 0
TRANSMISSION_READ_ONLY = 1 << 1
TRANSMISSION_SEND_FLUSH = 1 << 2
TRANSMISSION_SEND_DF = 1 << 7
TRANSMISSION_CAN_MULTI_CONN = 1 << 8
TRANSMISSION_SEND_CACHE = 1 << 10
TRANSMISSION_FLAGS = (
    TRANSMISSION_HAS_FLAGS
    | TRANSMISSION_READ_ONLY
    | TRANSMISSION_SEND_FLUSH
    | TRANSMISSION_CAN_MULTI_CONN
    | TRANSMISSION_SEND_CACHE
)

CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_CACHE = 5
CMD_WRITE_ZEROES = 6
CMD_BLOCK_STATUS = 7

CMD_FLAG_DF = 4
CMD_FLAG_REQ_ONE = 8

REPLY_FLAG_DONE = 1
REPLY_NONE = 0
REPLY_OFFSET_DATA = 1
REPLY_BLOCK_STATUS = 5
REPLY_ERROR = 2**15 + 1

# "Error values": the numbers on the wire, independent of this platform's errno
EPERM = 1
EIO = 5
EINVAL = 22
ESHUTDOWN = 108

ALLOCATION = "base:allocation"
ALLOCATION_ID = 1
STATE_HOLE = 1  # "`base:allocation` metadata context"
STATE_ZERO = 2

# --- limits -----------------------------------------------------------------------------------

MIN_BLOCK = 1
PREFERRED_BLOCK = 4096
MAX_READ = 32 << 20  # "Size constraints": the size that clients may assume without negotiation

MAX_STRING = 4096  # "Conventions": longer strings need not be supported
MAX_OPTION = 64 << 10  # a name, and more queries than metadata contexts exist
MAX_OPTIONS = 4096  # per handshake; a client asks a few times about each export listed to it

REQUEST = Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
_OPTION = Struct(">8sII")
_OPTION_REPLY = Struct(">QIII")
_SIMPLE = Struct(">IIQ")
_CHUNK = Struct(">IHHQI")
_DATA_CHUNK = Struct(">IHHQIQ")
_DESCRIPTOR = Struct(">II")
_U32 = Struct(">I")


class ProtocolError(Exception):
    """The client broke the protocol in a way that requires ending the connection."""


# --- handshake --------------------------------------------------------------------------------


class ExportInfo(NamedTuple):
    """The properties of an export that clients see.  ``size`` in bytes."""

    name: str
    size: int
    description: str = ""


class Send(NamedTuple):
    """Send these bytes to the client."""

    data: bytes


class StartTls(NamedTuple):
    """Start TLS once everything has been sent; no plain text follows."""


class Transmit(NamedTuple):
    """The handshake is over; ``left``, received after it, begins the transmission phase."""

    export: int  # index into the exports
    structured: bool  # reads are to be answered by structured replies
    allocation: bool  # base:allocation was selected
    left: bytes


class Close(NamedTuple):
    """The handshake is over; close the connection."""


Action: TypeAlias = Send | StartTls | Transmit | Close


class Handshake:
    """The server's side of "Fixed newstyle negotiation".

    Send ``greeting()``; then ``feed`` the bytes received, and perform each ``next_action`` until it
    returns None.  Replies are made one by one, so a client that requests much and reads nothing costs
    no memory.  At most MAX_OPTION bytes and those fed last are kept."""

    def __init__(
        self, exports: Sequence[ExportInfo], *, tls: bool = False, tls_required: bool = False
    ) -> None:
        """``tls``: offer STARTTLS; ``tls_required``: and refuse other options before it."""
        self._exports = exports
        self._index = {_text(e.name): n for n, e in reversed(list(enumerate(exports)))}
        if exports:
            self._index.setdefault(b"", 0)
        self._tls = tls
        self._locked = tls_required
        self._secure = False
        self._no_zeroes = False
        self._fixed = False
        self._greeted = False  # the client's flags have come
        self._structured = False
        self._allocation: int | None = None  # the export that base:allocation was selected for
        self._options = 0
        self._skip = 0  # bytes of an option's data that are still to be dropped
        self._buffer = bytearray()
        self._replies: Iterator[Action] = iter(())

    def greeting(self) -> bytes:
        """The server's first message ("Newstyle negotiation")."""
        flags = FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES
        return INIT_MAGIC + OPTION_MAGIC + flags.to_bytes(2, "big")

    def feed(self, data: bytes | memoryview) -> None:
        """Add bytes received from the client."""
        self._buffer += data

    def secured(self) -> None:
        """Call this once TLS is on; discards the earlier negotiation ("`NBD_OPT_STARTTLS`")."""
        self._secure = True
        self._locked = False
        self._structured = False
        self._allocation = None

    def next_action(self) -> Action | None:
        """The next action to perform; None if that depends on more input."""
        while True:
            action = next(self._replies, None)
            if action is not None:
                return action
            try:
                replies = self._step()
            except ProtocolError:
                return Close()
            if replies is None:
                return None
            self._replies = replies

    def _step(self) -> Iterator[Action] | None:
        """Take one message out of the buffer; None if none is complete."""
        if self._skip:
            dropped = min(self._skip, len(self._buffer))
            del self._buffer[:dropped]
            self._skip -= dropped
        if not self._greeted:
            return self._client_flags()
        if self._skip or len(self._buffer) < _OPTION.size:
            return None
        magic, option, length = _OPTION.unpack_from(self._buffer)
        if magic != OPTION_MAGIC or self._options == MAX_OPTIONS:
            raise ProtocolError
        if length > MAX_OPTION:
            return self._too_big(option, length)
        if len(self._buffer) < _OPTION.size + length:
            return None
        data = bytes(self._buffer[_OPTION.size : _OPTION.size + length])
        del self._buffer[: _OPTION.size + length]
        self._options += 1
        return self._option(option, data)

    def _client_flags(self) -> Iterator[Action] | None:
        if len(self._buffer) < _U32.size:
            return None
        (flags,) = _U32.unpack_from(self._buffer)
        if flags & ~(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES):
            raise ProtocolError
        del self._buffer[: _U32.size]
        self._fixed = bool(flags & FLAG_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & FLAG_NO_ZEROES)
        self._greeted = True
        return iter(())

    def _too_big(self, option: int, length: int) -> Iterator[Action]:
        if option == OPT_EXPORT_NAME or not self._fixed:
            raise ProtocolError
        del self._buffer[: _OPTION.size]
        self._options += 1
        self._skip = length
        return iter([_reply(option, REP_ERR_TOO_BIG, b"the option is too long")])

    def _option(self, option: int, data: bytes) -> Iterator[Action]:
        if not self._fixed and option != OPT_EXPORT_NAME:
            raise ProtocolError  # such a client does not expect replies
        if option == OPT_ABORT:
            return iter([_reply(option, REP_ACK), Close()])
        if self._locked and option != OPT_STARTTLS:
            if option == OPT_EXPORT_NAME:
                raise ProtocolError
            return iter([_reply(option, REP_ERR_TLS_REQD, b"use TLS")])
        handler = _HANDLERS.get(option)
        if handler is None:
            return iter([_reply(option, REP_ERR_UNSUP)])
        return handler(self, option, data)

    def _export_name(self, option: int, data: bytes) -> Iterator[Action]:
        """ "`NBD_OPT_EXPORT_NAME`": the only refusal is to close the connection."""
        export = self._find(data)
        if export is None:
            yield Close()
            return
        found = self._exports[export].size.to_bytes(8, "big") + self._flags().to_bytes(2, "big")
        yield Send(found if self._no_zeroes else found + bytes(124))
        yield self._transmit(export)

    def _list(self, option: int, data: bytes) -> Iterator[Action]:
        if data:
            yield _reply(option, REP_ERR_INVALID, b"LIST takes no data")
            return
        for export in self._exports:
            name = _text(export.name)
            found = _U32.pack(len(name)) + name + _text(export.description)
            yield _reply(option, REP_SERVER, found)
        yield _reply(option, REP_ACK)

    def _start_tls(self, option: int, data: bytes) -> Iterator[Action]:
        if data or self._secure:
            yield _reply(option, REP_ERR_INVALID)
        elif not self._tls:
            yield _reply(option, REP_ERR_POLICY, b"TLS is not configured")
        elif self._buffer:
            # plain text injected before the TLS handshake would count as encrypted afterwards
            yield Close()
        else:
            yield _reply(option, REP_ACK)
            yield StartTls()

    def _go(self, option: int, data: bytes) -> Iterator[Action]:
        """ "`NBD_OPT_INFO` and `NBD_OPT_GO`"."""
        try:
            name, rest = _string(data)
            wanted = _u16s(rest)
        except ProtocolError:
            yield _reply(option, REP_ERR_INVALID)
            return
        index = self._find(name)
        if index is None:
            yield _reply(option, REP_ERR_UNKNOWN, b"no export has this name")
            return
        export = self._exports[index]
        found = {
            INFO_EXPORT: export.size.to_bytes(8, "big") + self._flags().to_bytes(2, "big"),
            INFO_NAME: _text(export.name),
            INFO_DESCRIPTION: _text(export.description),
            INFO_BLOCK_SIZE: b"".join(map(_U32.pack, (MIN_BLOCK, PREFERRED_BLOCK, MAX_READ))),
        }
        for kind, value in found.items():
            if kind == INFO_EXPORT or (kind in wanted and value):
                yield _reply(option, REP_INFO, kind.to_bytes(2, "big") + value)
        yield _reply(option, REP_ACK)
        if option == OPT_GO:
            yield self._transmit(index)

    def _structured_reply(self, option: int, data: bytes) -> Iterator[Action]:
        if data:
            yield _reply(option, REP_ERR_INVALID)
            return
        self._structured = True
        yield _reply(option, REP_ACK)

    def _meta_context(self, option: int, data: bytes) -> Iterator[Action]:
        """ "`NBD_OPT_LIST_META_CONTEXT`" and "`NBD_OPT_SET_META_CONTEXT`"."""
        setting = option == OPT_SET_META_CONTEXT
        if setting:
            self._allocation = None  # also when this fails
        try:
            name, rest = _string(data)
            queries = _strings(rest)
        except ProtocolError:
            yield _reply(option, REP_ERR_INVALID)
            return
        if not self._structured:
            yield _reply(option, REP_ERR_INVALID, b"ask for structured replies first")
            return
        export = self._find(name)
        if export is None:
            yield _reply(option, REP_ERR_UNKNOWN, b"no export has this name")
            return
        known = ALLOCATION.encode()
        if known in queries or (not setting and (not queries or b"base:" in queries)):
            context = ALLOCATION_ID if setting else 0
            yield _reply(option, REP_META_CONTEXT, _U32.pack(context) + known)
            if setting:
                self._allocation = export
        yield _reply(option, REP_ACK)

    def _find(self, name: bytes) -> int | None:
        """The index of the export with this name; None if there is none."""
        return self._index.get(name)

    def _flags(self) -> int:
        return TRANSMISSION_FLAGS | (TRANSMISSION_SEND_DF if self._structured else 0)

    def _transmit(self, export: int) -> Transmit:
        left = bytes(self._buffer)
        self._buffer.clear()
        return Transmit(export, self._structured, self._allocation == export, left)


_HANDLERS = {
    OPT_EXPORT_NAME: Handshake._export_name,
    OPT_LIST: Handshake._list,
    OPT_STARTTLS: Handshake._start_tls,
    OPT_INFO: Handshake._go,
    OPT_GO: Handshake._go,
    OPT_STRUCTURED_REPLY: Handshake._structured_reply,
    OPT_LIST_META_CONTEXT: Handshake._meta_context,
    OPT_SET_META_CONTEXT: Handshake._meta_context,
}


def _reply(option: int, kind: int, data: bytes = b"") -> Send:
    """A reply to an option ("Option reply types").  The data of errors is text for users."""
    return Send(_OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data)


def _text(text: str) -> bytes:
    """A string for the wire ("Conventions"): at most MAX_STRING bytes."""
    return text.encode("utf-8", "replace")[:MAX_STRING]


def _string(data: bytes) -> tuple[bytes, bytes]:
    """A length-prefixed string, and the bytes after it.  Raises ProtocolError."""
    if len(data) < _U32.size:
        raise ProtocolError
    (length,) = _U32.unpack_from(data)
    end = _U32.size + length
    if end > len(data):
        raise ProtocolError
    return data[_U32.size : end], data[end:]


def _strings(data: bytes) -> list[bytes]:
    """A counted list of strings, and nothing after it.  Raises ProtocolError."""
    if len(data) < _U32.size:
        raise ProtocolError
    (count,) = _U32.unpack_from(data)
    at, found = _U32.size, []
    if count > len(data) // _U32.size:
        raise ProtocolError
    for _ in range(count):
        if at + _U32.size > len(data):
            raise ProtocolError
        end = at + _U32.size + _U32.unpack_from(data, at)[0]
        if end > len(data):
            raise ProtocolError
        found.append(data[at + _U32.size : end])
        at = end
    if at != len(data):
        raise ProtocolError
    return found


def _u16s(data: bytes) -> set[int]:
    """A counted list of 16-bit numbers, and nothing after it.  Raises ProtocolError."""
    if len(data) < 2 or len(data) != 2 + 2 * int.from_bytes(data[:2], "big"):
        raise ProtocolError
    return {int.from_bytes(data[at : at + 2], "big") for at in range(2, len(data), 2)}


# --- requests ---------------------------------------------------------------------------------

Request: TypeAlias = tuple[int, int, int, int, int, int]  # as REQUEST: magic, flags, type, ...


class Decoder:
    """Decodes the client's stream in the transmission phase ("Request message").

    A write's payload is dropped, whatever its length, and its request is returned only after that.
    ``broken``: the stream is out of sync, and no more requests are returned."""

    def __init__(self) -> None:
        self.broken = False
        self._skip = 0
        self._held: Request | None = None

    def decode(self, data: memoryview) -> tuple[list[Request], int]:
        """All complete requests in ``data``, and the number of bytes consumed."""
        found: list[Request] = []
        end, at = len(data), 0
        while not self.broken:
            if self._held is not None:
                dropped = min(self._skip, end - at)
                at += dropped
                self._skip -= dropped
                if self._skip:
                    break
                found.append(self._held)
                self._held = None
            whole = (end - at) // REQUEST.size * REQUEST.size
            for request in REQUEST.iter_unpack(data[at : at + whole]):
                if request[0] != REQUEST_MAGIC:
                    self.broken = True
                    break
                at += REQUEST.size
                if request[2] == CMD_WRITE:
                    self._held, self._skip = request, request[5]
                    break
                found.append(request)
            else:
                break
        return found, at

    @property
    def between(self) -> bool:
        """Whether no request's payload is being dropped."""
        return self._held is None


def refusal(request: Request, size: int, *, structured: bool, allocation: bool) -> int:
    """The error with which a request must be answered, 0 if it is valid ("Request types").

    ``size`` is the export's, in bytes."""
    _, flags, kind, _, offset, length = request
    if kind in (CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES):
        return EPERM
    if kind == CMD_FLUSH:
        return EINVAL if flags else 0
    allowed = {CMD_READ: CMD_FLAG_DF if structured else 0, CMD_CACHE: 0}
    if allocation:
        allowed[CMD_BLOCK_STATUS] = CMD_FLAG_REQ_ONE
    if kind not in allowed or flags & ~allowed[kind]:
        return EINVAL
    if not length or offset + length > size:
        return EINVAL
    return EINVAL if kind == CMD_READ and length > MAX_READ else 0


# --- replies ----------------------------------------------------------------------------------


def simple_data(cookie: int, offset: int, length: int) -> bytes:
    """The header before the ``length`` bytes of a read in a simple reply ("Simple reply message")."""
    return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, cookie)


def structured_data(cookie: int, offset: int, length: int) -> bytes:
    """The header in a structured reply of one chunk ("Structured reply chunk message")."""
    return _DATA_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_OFFSET_DATA, cookie, 8 + length, offset
    )


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """A simple reply without data."""
    return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def structured_error(cookie: int, error: int, message: str = "") -> bytes:
    """A structured reply that only reports an error.  The message is text for users."""
    text = message.encode("utf-8", "replace")[:MAX_STRING]
    head = _CHUNK.pack(STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_ERROR, cookie, 6 + len(text))
    return head + _U32.pack(error) + len(text).to_bytes(2, "big") + text


def failure(request: Request, error: int, *, structured: bool, message: str = "") -> bytes:
    """The reply that reports an error in the form that the request's type demands."""
    if structured and request[2] in (CMD_READ, CMD_BLOCK_STATUS):
        return structured_error(request[3], error, message)
    return simple_reply(request[3], error)


def block_status(cookie: int, extents: Sequence[tuple[int, int]]) -> bytes:
    """The reply to BLOCK_STATUS: (length, state) of consecutive ranges, from the offset asked for."""
    found = b"".join(_DESCRIPTOR.pack(*extent) for extent in extents)
    head = _CHUNK.pack(
        STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_BLOCK_STATUS, cookie, 4 + len(found)
    )
    return head + _U32.pack(ALLOCATION_ID) + found

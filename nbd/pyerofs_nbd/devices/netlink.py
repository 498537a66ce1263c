"""The kernel's nbd driver by generic netlink: messages as bytes, and the socket that carries them.

Everything but ``Netlink`` is plain functions over bytes.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

# linux/netlink.h, linux/genetlink.h
NLM_F_REQUEST, NLM_F_ACK = 0x01, 0x04
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLMSGERR_ATTR_MSG = 1
NETLINK_GENERIC = 16
SOL_NETLINK = 270
ADD_MEMBERSHIP, CAP_ACK, EXT_ACK = 1, 10, 11
NLA_TYPE_MASK = 0x3FFF
NLA_F_NESTED = 0x8000
GENL_ID_CTRL = 0x10
CTRL_GETFAMILY = 3
CTRL_FAMILY_ID, CTRL_FAMILY_NAME, CTRL_MAXATTR, CTRL_MCAST_GROUPS = 1, 2, 5, 7
GROUP_NAME, GROUP_ID = 1, 2

# linux/nbd-netlink.h
FAMILY, GROUP = "nbd", "nbd_mc_group"
CONNECT, DISCONNECT, RECONFIGURE, LINK_DEAD, STATUS = 1, 2, 3, 4, 5
INDEX, SIZE_BYTES, BLOCK_SIZE, TIMEOUT, SERVER_FLAGS, CLIENT_FLAGS, SOCKETS = 1, 2, 3, 4, 5, 6, 7
DEAD_TIMEOUT, DEVICE_LIST, IDENTIFIER = 8, 9, 10
SOCKET_ITEM, SOCKET_FD = 1, 1
DEVICE_ITEM, DEVICE_INDEX, DEVICE_CONNECTED = 1, 1, 2
DISCONNECT_ON_CLOSE = 2

HAS_FLAGS, READ_ONLY = 1, 2  # transmission flags of the NBD protocol
ANSWER_IN = 30.0  # seconds; CONNECT and DISCONNECT may wait for the device's queue

_MESSAGE = struct.Struct("=IHHII")
_GENERIC = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")


class NetlinkError(OSError):
    """An error from the kernel: its ``errno``, and in the text its extended-ack message, if any."""

    def __init__(self, number: int, said: str = "") -> None:
        super().__init__(number, os.strerror(number) + (f" ({said})" if said else ""))


@dataclass(frozen=True)
class Message:
    """One netlink message; the payload of a generic one is a command with attributes."""

    kind: int
    flags: int
    sequence: int
    payload: bytes

    @property
    def command(self) -> int:
        return self.payload[0] if len(self.payload) >= _GENERIC.size else 0

    @property
    def attributes(self) -> bytes:
        return self.payload[_GENERIC.size :]


@dataclass(frozen=True)
class Family:
    """The nbd netlink family: message type, highest known attribute, multicast groups."""

    id: int
    max_attribute: int
    groups: dict[str, int] = field(default_factory=dict)


# --- encoding -------------------------------------------------------------------------------


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to 4 bytes."""
    head = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind)
    return head + value + bytes(-len(value) % 4)


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def u64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=Q", value))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, os.fsencode(value) + b"\0")


def nested(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | NLA_F_NESTED, b"".join(parts))


def request(kind: int, command: int, body: bytes, sequence: int) -> bytes:
    """A generic netlink request that the kernel acknowledges (NLM_F_ACK)."""
    payload = _GENERIC.pack(command, 1, 0) + body
    flags = NLM_F_REQUEST | NLM_F_ACK
    return _MESSAGE.pack(_MESSAGE.size + len(payload), kind, flags, sequence, 0) + payload


def sockets(fds: Sequence[int]) -> bytes:
    """The attribute that hands sockets to the driver, one for each hardware queue."""
    return nested(SOCKETS, *(nested(SOCKET_ITEM, u32(SOCKET_FD, fd)) for fd in fds))


def connect(
    size: int,
    fds: Sequence[int],
    *,
    block_size: int,
    dead_timeout: int,
    identifier: str | None,
    index: int | None = None,
) -> bytes:
    """The body of CONNECT for a read-only device.  ``size`` in bytes, ``dead_timeout`` in seconds.

    No request ever times out by itself (TIMEOUT=0): a slow source must not cost the connection."""
    body = b"" if index is None else u32(INDEX, index)
    body += u64(SIZE_BYTES, size) + u64(BLOCK_SIZE, block_size) + u64(TIMEOUT, 0)
    body += u64(SERVER_FLAGS, HAS_FLAGS | READ_ONLY) + u64(DEAD_TIMEOUT, dead_timeout)
    if identifier is not None:
        body += text(IDENTIFIER, identifier)
    return body + sockets(fds)


def reconfigure(
    index: int,
    *,
    identifier: str | None = None,
    fds: Sequence[int] = (),
    client_flags: int | None = None,
    size: int | None = None,
) -> bytes:
    """The body of RECONFIGURE: sockets in place of dead ones, other flags, another size."""
    body = u32(INDEX, index)
    if size is not None:
        body += u64(SIZE_BYTES, size)
    if client_flags is not None:
        body += u64(CLIENT_FLAGS, client_flags)
    if identifier is not None:
        body += text(IDENTIFIER, identifier)
    return body + (sockets(fds) if fds else b"")


# --- decoding -------------------------------------------------------------------------------


def messages(data: bytes) -> Iterator[Message]:
    """The messages of one datagram.  Raises NetlinkError (EBADMSG) if one is truncated."""
    at = 0
    while at + _MESSAGE.size <= len(data):
        length, kind, flags, sequence, _ = _MESSAGE.unpack_from(data, at)
        if length < _MESSAGE.size or at + length > len(data):
            raise NetlinkError(errno.EBADMSG)
        yield Message(kind, flags, sequence, data[at + _MESSAGE.size : at + length])
        at += (length + 3) & ~3


def attributes(data: bytes) -> list[tuple[int, bytes]]:
    """(type, value) of each attribute in a message or attribute.  Raises NetlinkError."""
    found = []
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > len(data):
            raise NetlinkError(errno.EBADMSG)
        found.append((kind & NLA_TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]))
        at += (length + 3) & ~3
    return found


def number(value: bytes) -> int:
    """An integer attribute of any width."""
    return int.from_bytes(value, "little" if struct.pack("=H", 1)[0] else "big")


def string(value: bytes) -> str:
    """A text attribute."""
    return os.fsdecode(value.split(b"\0", 1)[0])


def check(message: Message) -> None:
    """Raise NetlinkError if a message reports an error (an acknowledgement reports error 0)."""
    if message.kind != NLMSG_ERROR:
        return
    if len(message.payload) < 4 + _MESSAGE.size:
        raise NetlinkError(errno.EBADMSG)
    (code,) = struct.unpack_from("=i", message.payload)
    if not code:
        return
    said = ""
    if message.flags & NLM_F_ACK_TLVS:
        (length,) = struct.unpack_from("=I", message.payload, 4)
        echoed = _MESSAGE.size if message.flags & NLM_F_CAPPED else max(length, _MESSAGE.size)
        found = dict(attributes(message.payload[4 + ((echoed + 3) & ~3) :]))
        said = string(found.get(NLMSGERR_ATTR_MSG, b""))
    raise NetlinkError(-code, said)


def family(body: bytes) -> Family:
    """Decode the controller's answer to GETFAMILY.  Raises NetlinkError."""
    found = dict(attributes(body))
    groups = {}
    for _, item in attributes(found.get(CTRL_MCAST_GROUPS, b"")):
        group = dict(attributes(item))
        groups[string(group.get(GROUP_NAME, b""))] = number(group.get(GROUP_ID, b""))
    return Family(
        number(found.get(CTRL_FAMILY_ID, b"")), number(found.get(CTRL_MAXATTR, b"")), groups
    )


def index_of(body: bytes) -> int | None:
    """The number of the device that a message is about, or None."""
    found = dict(attributes(body)).get(INDEX)
    return None if found is None else number(found)


def connected(body: bytes) -> dict[int, bool]:
    """Decode the answer to STATUS: device -> configured (also True while its server is dead)."""
    states = {}
    for _, item in attributes(dict(attributes(body)).get(DEVICE_LIST, b"")):
        device = dict(attributes(item))
        if DEVICE_INDEX in device:
            states[number(device[DEVICE_INDEX])] = bool(number(device.get(DEVICE_CONNECTED, b"")))
    return states


# --- the socket -----------------------------------------------------------------------------


class Netlink:
    """A connection to the driver.  All calls block until the kernel answers.

    Raises NetlinkError; ENOENT from the constructor means that this namespace has no nbd driver."""

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_GENERIC)
        self._sequence = 0
        try:
            for option in (CAP_ACK, EXT_ACK):
                try:
                    self._socket.setsockopt(SOL_NETLINK, option, 1)
                except OSError:
                    pass  # before Linux 4.12: errors come without a message
            self._socket.bind((0, 0))
            self._socket.settimeout(ANSWER_IN)
            answer = self._ask(GENL_ID_CTRL, CTRL_GETFAMILY, text(CTRL_FAMILY_NAME, FAMILY))
            self.family = family(answer or b"")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Netlink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    @property
    def has_identifiers(self) -> bool:
        """Whether the driver keeps a device's identifier (Linux 5.14), which recovery requires."""
        return self.family.max_attribute >= IDENTIFIER

    def connect(self, body: bytes) -> int:
        """Attach a device; returns its number.  No other process can attach it meanwhile."""
        found = index_of(self._ask(self.family.id, CONNECT, body) or b"")
        if found is None:
            raise NetlinkError(errno.EBADMSG)
        return found

    def reconfigure(self, body: bytes) -> None:
        self._ask(self.family.id, RECONFIGURE, body)

    def disconnect(self, index: int) -> None:
        """Disconnect a device, even if it is in use.  No error if it is not attached."""
        self._ask(self.family.id, DISCONNECT, u32(INDEX, index))

    def status(self) -> dict[int, bool]:
        """Whether each device is attached, by number."""
        return connected(self._ask(self.family.id, STATUS, b"") or b"")

    def watch(self) -> None:
        """Subscribe to LINK_DEAD; the connection must not be used for anything else."""
        self._socket.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, self.family.groups[GROUP])
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def dead(self) -> set[int]:
        """The devices whose connection has died since the last call; doesn't block."""
        found: set[int] = set()
        while True:
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                return found
            except OSError as e:
                if e.errno == errno.ENOBUFS:
                    continue  # messages were lost; the supervisor also watches its child process
                raise
            for message in messages(data):
                if message.kind == self.family.id and message.command == LINK_DEAD:
                    index = index_of(message.attributes)
                    if index is not None:
                        found.add(index)

    def _ask(self, kind: int, command: int, body: bytes) -> bytes | None:
        """Send a request; returns the attributes of the answer, None if it is only acknowledged."""
        self._sequence += 1
        self._socket.send(request(kind, command, body, self._sequence))
        end = time.monotonic() + ANSWER_IN
        found = None
        while time.monotonic() < end:
            if not select.select([self._socket], [], [], ANSWER_IN)[0]:
                break
            for message in messages(self._socket.recv(65536)):
                if message.sequence != self._sequence:
                    continue  # a late answer to a request that has timed out
                if message.kind == NLMSG_ERROR:
                    check(message)
                    return found
                if message.kind == kind:
                    found = message.attributes
        raise NetlinkError(errno.ETIMEDOUT)

"""Send and receive messages over a unix socket, with descriptors where needed."""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Sequence

from pyerofs_nbd.errors import NbdError
from pyerofs_nbd.lifecycle.messages import Message, parse

MAX_PACKET = 1 << 16
MAX_FDS = 250
PATIENCE = 5.0  # seconds to wait for an answer that takes no work


def pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a channel that preserves packet boundaries."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(channel: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Send a message.  Raises OSError if the peer has closed the channel."""
    extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    channel.sendmsg([json.dumps(message.packet()).encode()], extra)


def receive(channel: socket.socket) -> tuple[Message | None, list[int]]:
    """Receive a message (None at end of stream) and its descriptors (close-on-exec).

    Raises OSError."""
    room = socket.CMSG_SPACE(MAX_FDS * 4)
    data, extra, _, _ = channel.recvmsg(MAX_PACKET, room, socket.MSG_CMSG_CLOEXEC)
    return decode(data, extra)


def decode(data: bytes, extra: list[tuple[int, int, bytes]]) -> tuple[Message | None, list[int]]:
    """The message and descriptors in what recvmsg returned."""
    fds = array.array("i")
    for level, kind, value in extra:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(value[: len(value) - len(value) % fds.itemsize])
    if not data:
        return None, list(fds)
    try:
        packet = json.loads(data)
    except (ValueError, RecursionError):
        packet = None
    return parse(packet), list(fds)


def dial(path: str) -> socket.socket:
    """Connect to a server's socket; its path may exceed sun_path.  Raises NbdError."""
    where, name = os.path.split(path)
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        fd = os.open(where, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            channel.connect(f"/proc/self/fd/{fd}/{name}")
        finally:
            os.close(fd)
    except OSError as e:
        channel.close()
        raise NbdError(f"{path}: {e.strerror}") from None
    channel.settimeout(PATIENCE)
    return channel


def listen(path: str) -> socket.socket:
    """Listen on a socket at ``path``, atomically replacing an earlier one.  Raises OSError."""
    where, name = os.path.split(path)
    scratch = f".{os.getpid()}.new"
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = os.open(where, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            os.unlink(scratch, dir_fd=fd)
        except FileNotFoundError:
            pass
        channel.bind(f"/proc/self/fd/{fd}/{scratch}")
        os.chmod(scratch, 0o600, dir_fd=fd)
        channel.listen(8)
        os.rename(scratch, name, src_dir_fd=fd, dst_dir_fd=fd)
    except BaseException:
        channel.close()
        raise
    finally:
        os.close(fd)
    return channel


def ask(path: str, question: Message) -> Message | None:
    """Send a request and return its answer; None if no server answers."""
    try:
        with dial(path) as channel:
            send(channel, question)
            return receive(channel)[0]
    except (NbdError, OSError):
        return None

"""The direct engine without a kernel: requests and replies over a pair of sockets."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("pyerofs_fuse")

from pyerofs_fuse.answers import Answers
from pyerofs_fuse.direct.listings import SMALL, Clients, Form
from pyerofs_fuse.direct.server import DirectServer, Session

import pyerofs
from pyerofs.format import directory, tree
from pyerofs.system.fuse import wire
from pyerofs.system.fuse.wire import Flag, Opcode
from pyerofs.system.keeper import Server, Slot

IMAGE = Path(__file__).parents[1] / "images" / "lz4.erofs"
EVERYTHING = Flag(~0 & (1 << 64) - 1)


class Kernel:
    """The kernel's end of the connection: one datagram is one message, as with /dev/fuse."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._unique = 0

    def send(self, opcode: int, node: int = 1, body: bytes = b"", *, pid: int = 1, uid: int = 0,
             unique: int | None = None) -> int:  # fmt: skip
        self._unique += 2
        number = self._unique if unique is None else unique
        length = wire.HEADER.size + len(body)
        self._end.send(wire.HEADER.pack(length, opcode, number, node, uid, 0, pid, 0, 0) + body)
        return number

    def ask(self, opcode: int, node: int = 1, body: bytes = b"", **how: int) -> bytes | int:
        """The payload of the reply, or the errno."""
        number = self.send(opcode, node, body, **how)
        reply = self._end.recv(4 << 20)
        length, error, unique = wire.REPLY.unpack_from(reply)
        assert (length, unique) == (len(reply), number)
        assert error <= 0
        return -error if error else reply[wire.REPLY.size :]

    def data(self, opcode: int, node: int = 1, body: bytes = b"", **how: int) -> bytes:
        found = self.ask(opcode, node, body, **how)
        assert isinstance(found, bytes), os.strerror(found)
        return found


@contextmanager
def served(
    image: pyerofs.Image, flags: Flag = EVERYTHING, poisoned: tuple[int, ...] = (), **how: int
) -> Iterator[Kernel]:
    """A server of an image."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
    session = Session(wire.Init(7, 45, 0, flags), owner=how.get("owner"))
    server = DirectServer(theirs.fileno(), Answers(image.volume), session)
    words = memoryview(bytearray(16)).cast("Q")
    thread = threading.Thread(target=server.run, args=[Server([Slot(words)], poisoned)])
    thread.start()
    ours.settimeout(30)
    try:
        yield Kernel(ours)
    finally:
        ours.close()
        thread.join(30)
        theirs.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def image() -> Iterator[pyerofs.Image]:
    with pyerofs.open(IMAGE) as found:
        yield found


@pytest.fixture
def kernel(image: pyerofs.Image) -> Iterator[Kernel]:
    with served(image) as found:
        yield found


def read_in(offset: int, size: int) -> bytes:
    return struct.pack("=QQIIQII", 0, offset, size, 0, 0, 0, 0)


def node_of(image: pyerofs.Image, path: str) -> int:
    return Answers(image.volume).node_of(image.lookup(path, follow_symlinks=False).nid)


def entries(data: bytes, skip: int) -> list[tuple[str, int, int, int, int]]:
    """(name, type, inode number, cookie, node) of each entry in a listing; ``skip``: its attributes."""
    found = []
    at = 0
    while at < len(data):
        node = struct.unpack_from("=Q", data, at)[0] if skip else 0
        number, cookie, length, kind = wire.DIRENT.unpack_from(data, at + skip)
        name = data[at + skip + wire.DIRENT.size :][:length]
        found.append((tree.decode(name), kind, number, cookie, node))
        at += skip + wire.padded(length)
    assert at == len(data)
    return found


# --- what is answered -------------------------------------------------------------------------


def test_nothing_has_to_be_opened(kernel: Kernel, image: pyerofs.Image) -> None:
    file = node_of(image, "/text")
    assert kernel.ask(Opcode.OPEN, file, bytes(8)) == errno.ENOSYS
    assert kernel.ask(Opcode.OPENDIR, 1, bytes(8)) == errno.ENOSYS


def test_old_kernels_open(image: pyerofs.Image) -> None:
    file = node_of(image, "/text")
    with served(image, Flag(0)) as kernel:
        assert wire.OPEN_OUT.unpack(kernel.data(Opcode.OPEN, file, bytes(8)))[1] == 2
        assert wire.OPEN_OUT.unpack(kernel.data(Opcode.OPENDIR, 1, bytes(8)))[1] == 2 | 8
        assert kernel.data(Opcode.RELEASE, file, bytes(24)) == b""


def test_a_file(kernel: Kernel, image: pyerofs.Image) -> None:
    entry = kernel.data(Opcode.LOOKUP, 1, b"text\0")
    node, _, entry_valid, attr_valid, *_ = wire.ENTRY.unpack(entry)
    inode = image.lookup("/text")
    want = image.read(inode)
    assert entry_valid == attr_valid == wire.FOREVER
    assert wire.ATTR_OUT.unpack(kernel.data(Opcode.GETATTR, node, bytes(16)))[4] == len(want)
    got = b"".join(
        kernel.data(Opcode.READ, node, read_in(at, 5000)) for at in range(0, len(want) + 5000, 5000)
    )
    assert got == want


def test_what_is_missing_is_remembered_by_the_kernel(kernel: Kernel) -> None:
    node, _, valid, *_ = wire.ENTRY.unpack(kernel.data(Opcode.LOOKUP, 1, b"missing\0"))
    assert (node, valid) == (0, wire.FOREVER)
    assert kernel.ask(Opcode.LOOKUP, 1, b"x" * 256 + b"\0") == errno.ENAMETOOLONG


@pytest.mark.parametrize("size", [500, 4096, 32768])
@pytest.mark.parametrize("path", ["/", "/many", "/empty-dir"])
def test_listings(kernel: Kernel, image: pyerofs.Image, path: str, size: int) -> None:
    node = node_of(image, path)
    for opcode, skip in ((Opcode.READDIR, 0), (Opcode.READDIRPLUS, wire.ENTRY.size)):
        cookie = 0
        found = []
        while data := kernel.data(opcode, node, read_in(cookie, size)):
            assert len(data) <= size
            found += entries(data, skip)
            cookie = found[-1][3]
        want = [*directory.entries(image.volume, image.lookup(path))]
        assert [(name, number) for name, _, number, _, _ in found] == [
            (tree.decode(e.name), tree.inode_number(image.volume, e.nid)) for e in want
        ]


def test_unknown_requests(kernel: Kernel) -> None:
    for opcode in (0, 4, 16, 36, 40, 47, 52, 4096, 2**32 - 1):
        assert kernel.ask(opcode, 1, bytes(64)) == errno.ENOSYS


def test_what_forgets_gets_no_reply(kernel: Kernel) -> None:
    kernel.send(Opcode.FORGET, 1, bytes(8))
    kernel.send(Opcode.BATCH_FORGET, 0, bytes(24))
    assert kernel.data(Opcode.STATFS)  # the next reply is to the next request


def test_a_request_that_has_killed_servers(image: pyerofs.Image) -> None:
    with served(image, poisoned=(12,)) as kernel:
        assert kernel.ask(Opcode.GETATTR, 1, bytes(16), unique=12 | wire.RESENT) == errno.EIO
        assert kernel.data(Opcode.GETATTR, 1, bytes(16), unique=12)  # a new one of this number
        assert kernel.data(Opcode.GETATTR, 1, bytes(16), unique=14 | wire.RESENT)


def test_allow_root(image: pyerofs.Image) -> None:
    with served(image, owner=1000) as kernel:
        assert kernel.data(Opcode.GETATTR, 1, bytes(16), uid=0)
        assert kernel.data(Opcode.GETATTR, 1, bytes(16), uid=1000)
        assert kernel.ask(Opcode.GETATTR, 1, bytes(16), uid=1001) == errno.EACCES


def test_the_label(kernel: Kernel, image: pyerofs.Image) -> None:
    def ask(command: int, room: int) -> bytes | int:
        body = wire.IOCTL_IN.pack(0, 0, command, 0, 0, room)
        return kernel.ask(Opcode.IOCTL, node_of(image, "/text"), body)

    found = ask(0x81009431, 256)
    assert isinstance(found, bytes)
    assert found[16:].rstrip(b"\0") == image.superblock.volume_name
    assert ask(0x81009431, 16) == errno.ENOTTY
    assert ask(0x80086601, 8) == errno.ENOTTY


NAMES = st.one_of(
    st.binary(max_size=300), st.sampled_from([b".\0", b"..\0", b"text\0", b"\0", b""])
)
NUMBERS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**63, 2**64 - 1, 36, 4096]))


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_request_ends_a_server(data: st.DataObject, image: pyerofs.Image) -> None:
    """Whatever a kernel, or somebody who has its end, could send."""
    with served(image) as kernel:
        for _ in range(data.draw(st.integers(1, 8))):
            opcode = data.draw(st.one_of(st.sampled_from([int(o) for o in Opcode]), NUMBERS))
            body = data.draw(
                st.one_of(
                    NAMES,
                    st.builds(struct.pack, st.just("=QQQI"), NUMBERS, NUMBERS, NUMBERS,
                              st.integers(0, 1 << 20)),
                )
            )  # fmt: skip
            if opcode in (Opcode.FORGET, Opcode.BATCH_FORGET):
                kernel.send(opcode, data.draw(NUMBERS), body)
            else:
                kernel.ask(
                    opcode % 2**32, data.draw(NUMBERS), body, uid=data.draw(st.integers(0, 2))
                )
        assert kernel.data(Opcode.STATFS)


# --- who gets attributes with a listing ---------------------------------------------------------


def test_who_only_lists_gets_names() -> None:
    clients = Clients()
    assert clients.form(7, 1, 0, SMALL) is Form.FULL  # ls -l of one directory
    assert [clients.form(7, node, 0, SMALL) for node in range(2, 9)] == [Form.BARE] * 7


def test_who_looks_at_a_file_gets_attributes() -> None:
    clients = Clients()
    clients.form(7, 1, 0, SMALL)
    clients.form(7, 2, 0, SMALL)
    clients.looked_up(7, 2, is_directory=True)
    assert clients.form(7, 3, 0, SMALL) is Form.BARE
    clients.looked_up(7, 3, is_directory=False)
    assert clients.form(7, 4, 0, 50) is Form.FULL
    assert clients.form(8, 4, 0, 50) is Form.BARE  # another client, and a large directory


def test_looking_elsewhere_says_nothing() -> None:
    clients = Clients()
    clients.form(7, 1, 0, SMALL)
    clients.looked_up(7, 1, is_directory=False)  # listed with attributes: it is another's look-up
    assert clients.form(7, 2, 0, SMALL) is Form.BARE

"""Answer the kernel's requests: a blocking read of /dev/fuse, an answer, a write.

Where the kernel allows it, OPEN and OPENDIR are answered with ENOSYS.  The kernel then never asks
again: files and directories are opened without a message, READ names the node, and the kernel caches
pages and listings.  So the server has no handles, and any server can answer a request at any time.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, TypeAlias

from pyerofs.errors import ErofsError
from pyerofs.format.data import Cut
from pyerofs.format.memory import estimate_ns
from pyerofs.format.model import ENCODED
from pyerofs.sources.base import Buffer
from pyerofs.system.fuse import wire
from pyerofs.system.fuse.wire import Flag, Opcode
from pyerofs.system.keeper import Server, Slot
from pyerofs.system.readiness import AWAKE, look_out, reading
from pyerofs_fuse.answers import Answers, Refused
from pyerofs_fuse.direct.assist import Bell
from pyerofs_fuse.direct.encode import Encoder
from pyerofs_fuse.direct.listings import Clients, Form, Listings

if TYPE_CHECKING:
    from pyerofs_fuse.direct.record import Record

log = logging.getLogger("pyerofs-fuse")

MAX_READERS = 256  # files whose last read is remembered
NEAR = 4 << 20  # bytes that a read may be away from the last one and still continue it: read-ahead
NO_ENTRY = wire.ENTRY.pack(0, 0, wire.FOREVER, 0, 0, 0, *(0,) * 16)
FS_IOC_GETFSLABEL = 0x81009431
LABEL_SIZE = 256

Payload: TypeAlias = Sequence[Buffer] | None  # of a reply; None: there is no reply
Answer: TypeAlias = Callable[["Request"], Payload]


class Request:
    """The request in hand; one object serves all."""

    __slots__ = ("body", "node", "opcode", "pid", "uid", "unique")

    opcode: int
    unique: int
    node: int
    uid: int
    pid: int
    body: memoryview


@dataclass(frozen=True)
class Session:
    """What was agreed with the kernel at INIT, and what the mount's options ask for.

    ``owner``: with allow_root, the user who may enter beside root.  ``record``: takes the nids of the
    files that are opened."""

    init: wire.Init
    owner: int | None = None
    record: Record | None = None

    @property
    def opens(self) -> bool:
        """Whether OPEN has to be answered each time: to be recorded or refused, or for old kernels."""
        asked = self.record is not None or self.owner is not None
        return asked or not self.init.flags & Flag.NO_OPEN_SUPPORT

    @property
    def opens_directories(self) -> bool:
        """The same for OPENDIR."""
        return self.owner is not None or not self.init.flags & Flag.NO_OPENDIR_SUPPORT


class DirectServer:
    """One server of a mount."""

    def __init__(
        self, fd: int, answers: Answers, session: Session, bell: Bell | None = None
    ) -> None:
        """``bell``: wakes the other servers of the mount, if there are any."""
        self._fd = fd
        self._reading = reading(fd)
        self._bell = bell
        self._answers = answers
        self._session = session
        self._encoder = Encoder(answers)
        self._listings = Listings(answers, self._encoder)
        self._clients = Clients()
        self._is_debugging = log.isEnabledFor(logging.DEBUG)
        self._reads: dict[int, int] = {}  # node -> where its last read ended
        self._table: dict[int, Answer] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._forget,
            Opcode.GETATTR: self._getattr,
            Opcode.READLINK: self._readlink,
            Opcode.OPEN: self._open,
            Opcode.RELEASE: self._nothing,
            Opcode.OPENDIR: self._opendir,
            Opcode.RELEASEDIR: self._nothing,
            Opcode.READ: self._read,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.STATFS: self._statfs,
            Opcode.GETXATTR: self._getxattr,
            Opcode.LISTXATTR: self._listxattr,
            Opcode.LSEEK: self._lseek,
            Opcode.IOCTL: self._ioctl,
            Opcode.DESTROY: self._nothing,
        }

    def run(self, server: Server) -> None:
        """Answer requests until the mount has gone.  Blocks.  Raises OSError."""
        fd, poisoned = self._fd, server.poisoned
        slot = server.slots[0]
        readv, writev = os.readv, os.writev
        header, reply, size = wire.HEADER.unpack_from, wire.REPLY.pack, wire.REPLY.size
        buffer = bytearray(wire.REQUEST_SIZE)
        buffers = [buffer]
        view = memoryview(buffer)
        request = Request()
        slot.ready()
        assistant = server.number - 1  # -1: the first server
        bell = self._bell
        soon = False  # whether the last request came within AWAKE
        while True:
            if bell is not None:  # there are several processors
                if assistant >= 0:
                    bell.wait(assistant)
                elif soon:
                    soon = look_out(self._reading)
            start = perf_counter()
            try:
                if readv(fd, buffers) < wire.HEADER.size:
                    return  # not from the kernel, whose requests are whole
            except OSError as e:
                if e.errno == errno.ENODEV:
                    return
                if e.errno in (errno.ENOENT, errno.EAGAIN):  # the request was interrupted
                    continue
                raise
            soon = soon or perf_counter() - start < AWAKE
            length, request.opcode, unique, request.node, request.uid, _, request.pid, _, _ = (
                header(buffer)
            )
            request.body = view[wire.HEADER.size : length]
            request.unique = unique
            slot.begin(unique)
            payload, code = self._answer(request, poisoned)
            try:
                if code:
                    writev(fd, (reply(size, -code, unique),))
                elif payload is not None:
                    length = size + sum(map(len, payload))
                    writev(fd, (reply(length, 0, unique), *payload))
            except OSError as e:
                # ENOENT: the client has gone, or another server has answered
                if e.errno != errno.ENOENT:
                    raise
            slot.end()

    def _answer(self, request: Request, poisoned: Container[int]) -> tuple[Payload, int]:
        """The payload of the reply, and the errno or 0.  Raises nothing that the image causes."""
        if self._is_debugging:
            log.debug("%s(%d)", _NAMES.get(request.opcode, request.opcode), request.node)
        if request.unique & wire.RESENT and request.unique & ~wire.RESENT in poisoned:
            log.error("request %d has ended several servers and fails", request.unique)
            return None, errno.EIO
        try:
            answer = self._table.get(request.opcode)
            if answer is None:
                return None, errno.ENOSYS
            if self._session.owner is not None and self._is_stranger(request):
                return None, errno.EACCES
            return answer(request), 0
        except Refused as e:
            return None, e.code
        except ErofsError as e:
            return None, self._answers.code_of(e, metadata=request.opcode != Opcode.READ)
        except Exception:
            log.exception("internal error in request %d", request.opcode)
            return None, errno.EIO

    def _is_stranger(self, request: Request) -> bool:
        """With allow_root: whether the user may not begin anything on this mount."""
        return request.uid not in (0, self._session.owner) and request.opcode not in _FOLLOWING

    # names and attributes -------------------------------------------------------------------

    def _lookup(self, request: Request) -> Payload:
        inode = self._answers.lookup(request.node, bytes(request.body[:-1]))
        if inode is None:
            return (NO_ENTRY,)
        self._clients.looked_up(request.pid, request.node, inode.is_dir)
        return (self._encoder.entry(inode),)

    def _getattr(self, request: Request) -> Payload:
        return (self._encoder.attr(self._answers.inode(request.node)),)

    def _readlink(self, request: Request) -> Payload:
        return (self._answers.readlink(request.node),)

    def _statfs(self, request: Request) -> Payload:
        s = self._answers.statfs()
        return (
            wire.STATFS_OUT.pack(
                s.blocks, 0, 0, s.files, s.free_files, s.block_size, s.name_length, s.block_size, 0
            ),
        )

    def _forget(self, request: Request) -> Payload:
        return None

    def _nothing(self, request: Request) -> Payload:
        return ()

    # extended attributes ----------------------------------------------------------------------

    def _getxattr(self, request: Request) -> Payload:
        name = bytes(request.body[wire.GETXATTR_IN.size : -1])
        return _sized(request, self._answers.getxattr(request.node, name, request.uid))

    def _listxattr(self, request: Request) -> Payload:
        names = self._answers.listxattr(request.node, request.uid)
        return _sized(request, b"".join(name + b"\0" for name in names))

    # directories ------------------------------------------------------------------------------

    def _opendir(self, request: Request) -> Payload:
        self._answers.directory(request.node)
        if not self._session.opens_directories:
            raise Refused(errno.ENOSYS)
        return (wire.OPEN_OUT.pack(0, wire.FOPEN_KEEP_CACHE | wire.FOPEN_CACHE_DIR, 0),)

    def _readdir(self, request: Request) -> Payload:
        _, cookie, size = wire.READ_IN.unpack_from(request.body)
        return self._listings.reply(self._answers.directory(request.node), cookie, size, Form.PLAIN)

    def _readdirplus(self, request: Request) -> Payload:
        _, cookie, size = wire.READ_IN.unpack_from(request.body)
        parent = self._answers.directory(request.node)
        blocks = self._answers.blocks_of(parent)
        form = self._clients.form(request.pid, request.node, cookie, blocks)
        return self._listings.reply(parent, cookie, size, form)

    # file data --------------------------------------------------------------------------------

    def _open(self, request: Request) -> Payload:
        inode = self._answers.file(request.node)
        if not self._session.opens:
            raise Refused(errno.ENOSYS)
        if self._session.record is not None:
            self._session.record.add(inode.nid)
        return (wire.OPEN_OUT.pack(0, wire.FOPEN_KEEP_CACHE, 0),)

    def _read(self, request: Request) -> Payload:
        _, offset, size = wire.READ_IN.unpack_from(request.body)
        node = request.node
        sparse = self._is_sparse(node, offset, size)
        inode = self._answers.inode(node)
        cuts = self._answers.cuts(inode, offset, size)
        if self._bell is not None:
            self._bell.ring(_cost(cuts))
        return [self._answers.piece(inode, cut, sparse) for cut in cuts]

    def _is_sparse(self, node: int, offset: int, size: int) -> bool:
        """Whether a read is one of a random reader, so that what follows it is hardly read soon."""
        reads = self._reads
        last = reads.get(node, 0)
        if node not in reads and len(reads) >= MAX_READERS:
            reads.clear()
        reads[node] = offset + size
        return not last - NEAR <= offset <= last + size

    def _lseek(self, request: Request) -> Payload:
        _, offset, whence = wire.LSEEK_IN.unpack_from(request.body)
        return (wire.LSEEK_OUT.pack(self._answers.seek(request.node, offset, whence)),)

    def _ioctl(self, request: Request) -> Payload:
        """The label of the file system, as the kernel's driver gives it; nothing else."""
        *_, command, _, _, room = wire.IOCTL_IN.unpack_from(request.body)
        if command != FS_IOC_GETFSLABEL or room < LABEL_SIZE:
            raise Refused(errno.ENOTTY)
        label = self._answers.label().ljust(LABEL_SIZE, b"\0")
        return (wire.IOCTL_OUT.pack(0, 0, 0, 0), label)


def _cost(cuts: list[Cut]) -> float:
    """The nanoseconds that decoding takes, if nothing of it is in the cache."""
    return sum(
        estimate_ns(extent.algorithm, extent.length)
        for extent, _, _ in cuts
        if extent.kind == ENCODED
    )


def run_threads(server: Server, several: Sequence[DirectServer]) -> None:
    """Answer requests in a thread for each slot, until the mount has gone.  An error in one of them
    ends the process."""

    def work(one: DirectServer, slot: Slot) -> None:
        try:
            one.run(Server([slot], server.poisoned))
        except BaseException:
            log.exception("a server ends")
            os._exit(1)

    threads = [
        threading.Thread(target=work, args=pair, daemon=True)
        for pair in zip(several, server.slots, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


_NAMES = {int(opcode): opcode.name.lower() for opcode in Opcode}
# requests that follow others, which were permitted
_FOLLOWING = frozenset(
    {Opcode.READ, Opcode.RELEASE, Opcode.READDIR, Opcode.READDIRPLUS, Opcode.RELEASEDIR,
     Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.DESTROY}
)  # fmt: skip


def _sized(request: Request, value: bytes) -> Payload:
    """The answer to GETXATTR or LISTXATTR, whose caller may ask how long it is.  Raises Refused
    (ERANGE)."""
    (room,) = wire.GETXATTR_IN.unpack_from(request.body)
    if not room:
        return (wire.GETXATTR_OUT.pack(len(value)),)
    if len(value) > room:
        raise Refused(errno.ERANGE)
    return (value,)

"""The messages between the kernel and a FUSE server, for a read-only file system.  No input or output.

A request is one read of /dev/fuse, a reply one write.  All numbers are in the machine's byte order.
The layouts are those of the kernel's include/uapi/linux/fuse.h; only those are here that a read-only
file system needs.  Protocol 7.23 (Linux 3.15) is the oldest that is spoken.
"""

from __future__ import annotations

import struct
import sys
from enum import IntEnum, IntFlag
from typing import NamedTuple, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

MAJOR = 7
MINOR = 45  # the newest whose requests are known here (Linux 6.18)
OLDEST_MINOR = 23
ROOT_NODE = 1
FOREVER = 1 << 40  # seconds: how long names and attributes of an image that can't change are valid


class Opcode(IntEnum):
    """What a request asks for."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class Flag(IntFlag):
    """Flags of INIT; those from bit 32 on travel in a field of their own, ``flags2``.

    The comments name the protocol's minor version that brought a flag, and what it means when the
    server sets it, or (asked) when the kernel does."""

    ASYNC_READ = 1 << 0  # 7.6: several reads of a file at once
    EXPORT_SUPPORT = 1 << 4  # 7.10: "." and ".." can be looked up, for file handles
    DO_READDIRPLUS = 1 << 13  # 7.21: listings with attributes
    ASYNC_DIO = 1 << 15  # 7.22: several direct reads of a file at once
    NO_OPEN_SUPPORT = 1 << 17  # 7.23, asked: ENOSYS to OPEN means that no file has to be opened
    PARALLEL_DIROPS = 1 << 18  # 7.25: look-ups and listings in one directory at once
    POSIX_ACL = 1 << 20  # 7.26: the kernel checks ACLs
    MAX_PAGES = 1 << 22  # 7.28: ``max_pages`` is used
    CACHE_SYMLINKS = 1 << 23  # 7.28
    NO_OPENDIR_SUPPORT = 1 << 24  # 7.29, asked: the same for OPENDIR; then listings are cached
    INIT_EXT = 1 << 30  # 7.36: ``flags2`` is used
    HAS_RESEND = 1 << 39  # 7.40, asked: NOTIFY_RESEND is understood


WANTED = (
    Flag.ASYNC_READ
    | Flag.EXPORT_SUPPORT
    | Flag.DO_READDIRPLUS
    | Flag.ASYNC_DIO
    | Flag.PARALLEL_DIROPS
    | Flag.MAX_PAGES
    | Flag.CACHE_SYMLINKS
    | Flag.INIT_EXT
)

FOPEN_KEEP_CACHE = 1 << 1  # OPEN: pages that are cached stay valid
FOPEN_CACHE_DIR = 1 << 3  # OPENDIR: the kernel caches the listing (7.28)
RESENT = 1 << 63  # of ``unique``: the request was sent before; replies repeat the bit
NOTIFY_RESEND = 7  # 7.40: send all requests again that have not been answered

MAX_BACKGROUND = 64  # read-ahead requests at once; the kernel's default of 12 starves readers
CONGESTED = 48
MAX_PAGES = 256  # of one read, the most that every kernel allows
MAX_READ = 1 << 20
MAX_READ_AHEAD = 2 << 20  # bytes; the kernel takes what its administrator allows
# Larger than what any request of a read-only mount needs; the kernel demands at least 8 KiB.
REQUEST_SIZE = 64 << 10
MAX_WRITE = REQUEST_SIZE - 4096

HEADER = struct.Struct("=IIQQIIIHH")  # as ``Request``, without the body
REPLY = struct.Struct("=IiQ")  # length with this header, -errno, unique
_INIT_IN = struct.Struct("=IIII")  # major, minor, max_readahead, flags
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
ATTR = "QQQqqqIIIIIIIIII"
ENTRY = struct.Struct("=QQQQII" + ATTR)  # node, generation, entry and attr validity (s, then ns)
ATTR_OUT = struct.Struct("=QII" + ATTR)  # validity (s, ns, padding)
DIRENT = struct.Struct("=QQII")  # inode number, cookie of the next entry, length of the name, type
READ_IN = struct.Struct("=QQI")  # file handle, offset, size: READ, READDIR, READDIRPLUS
OPEN_OUT = struct.Struct("=QII")  # file handle, flags, padding
STATFS_OUT = struct.Struct("=QQQQQIIII24x")
GETXATTR_IN = struct.Struct("=I4x")  # size of the caller's buffer, 0: it asks how large one must be
GETXATTR_OUT = struct.Struct("=I4x")
LSEEK_IN = struct.Struct("=QQI4x")  # file handle, offset, whence
LSEEK_OUT = struct.Struct("=Q")
IOCTL_IN = struct.Struct("=QIIQII")  # file handle, flags, command, argument, sizes in and out
IOCTL_OUT = struct.Struct("=iIII")  # result, flags, buffers in and out


class Init(NamedTuple):
    """The kernel's INIT: what it speaks and offers.  ``max_read_ahead`` is in bytes."""

    major: int
    minor: int
    max_read_ahead: int
    flags: Flag


class ProtocolError(Exception):
    """The kernel speaks a protocol that this module does not know."""


def parse_init(body: Buffer) -> Init:
    """Read an INIT request.  Raises ProtocolError."""
    if len(body) < _INIT_IN.size:
        raise ProtocolError(f"INIT of {len(body)} bytes")
    major, minor, read_ahead, flags = _INIT_IN.unpack_from(body)
    if flags & Flag.INIT_EXT and len(body) >= _INIT_IN.size + 4:
        flags |= int.from_bytes(body[_INIT_IN.size : _INIT_IN.size + 4], sys.byteorder) << 32
    return Init(major, minor, read_ahead, Flag(flags))


def init_reply(init: Init, wanted: Flag = WANTED) -> bytes:
    """The body of the answer to INIT.  A kernel with a newer major version sends INIT again.

    Raises ProtocolError where the kernel is too old."""
    if init.major > MAJOR:
        return _INIT_OUT.pack(MAJOR, MINOR, *(0,) * 9)
    if (init.major, init.minor) < (MAJOR, OLDEST_MINOR):
        raise ProtocolError(
            f"the kernel speaks FUSE {init.major}.{init.minor}; {MAJOR}.{OLDEST_MINOR} is needed"
        )
    flags = init.flags & wanted
    return _INIT_OUT.pack(
        MAJOR,
        min(init.minor, MINOR),
        min(init.max_read_ahead, MAX_READ_AHEAD),
        flags & 0xFFFFFFFF,
        MAX_BACKGROUND,
        CONGESTED,
        MAX_WRITE,
        1,  # time stamps are precise to the nanosecond
        MAX_PAGES,
        0,
        flags >> 32,
    )


def padded(length: int) -> int:
    """The size of a directory entry with a name of this length, which is padded to 8 bytes."""
    return DIRENT.size + length + (-length % 8)

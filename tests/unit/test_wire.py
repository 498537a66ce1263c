"""The kernel's FUSE messages: INIT of old and new kernels, and the sizes of all records."""

from __future__ import annotations

import struct

import pytest

from pyerofs.system.fuse import wire
from pyerofs.system.fuse.wire import Flag

# what Linux 3.15, 4.20, 5.1, 6.1 and 6.12 and later offer, as far as it matters here
OLD = Flag.ASYNC_READ | Flag.EXPORT_SUPPORT | Flag.DO_READDIRPLUS | Flag.NO_OPEN_SUPPORT
NEW = OLD | Flag.MAX_PAGES | Flag.CACHE_SYMLINKS | Flag.NO_OPENDIR_SUPPORT | Flag.INIT_EXT
NEWEST = NEW | Flag.HAS_RESEND
KINDS = [(23, OLD), (28, OLD | Flag.MAX_PAGES), (29, NEW & ~Flag.INIT_EXT), (36, NEW), (45, NEWEST)]


def init(minor: int, flags: int, *, major: int = 7) -> bytes:
    """An INIT as the kernel sends it: with ``flags2`` and room for more since 7.36."""
    body = struct.pack("=IIII", major, minor, 128 << 10, flags & 0xFFFFFFFF)
    return body + struct.pack("=I44x", flags >> 32) if minor >= 36 else body


def replied(body: bytes) -> dict[str, int]:
    names = (
        "major", "minor", "read_ahead", "flags", "background", "congested", "max_write", "grain",
        "max_pages", "alignment", "flags2",
    )  # fmt: skip
    assert len(body) == 64  # since 7.23
    return dict(zip(names, struct.unpack_from("=IIIIHHIIHHI", body), strict=True))


@pytest.mark.parametrize(("minor", "flags"), KINDS)
def test_init(minor: int, flags: Flag) -> None:
    found = wire.parse_init(init(minor, flags))
    assert (found.major, found.minor, found.max_read_ahead) == (7, minor, 128 << 10)
    assert found.flags == flags
    reply = replied(wire.init_reply(found))
    assert (reply["major"], reply["minor"]) == (7, minor)
    assert reply["read_ahead"] == 128 << 10
    agreed = reply["flags"] | reply["flags2"] << 32
    assert agreed & ~flags == 0  # nothing that was not offered
    assert agreed == flags & wire.WANTED


def test_flags2_count_only_where_they_are_announced() -> None:
    body = init(36, Flag.HAS_RESEND)
    assert Flag.HAS_RESEND not in wire.parse_init(body).flags
    assert Flag.HAS_RESEND in wire.parse_init(init(40, Flag.HAS_RESEND | Flag.INIT_EXT)).flags


def test_a_newer_kernel_speaks_no_newer_minor() -> None:
    found = wire.parse_init(init(99, NEWEST))
    assert replied(wire.init_reply(found))["minor"] == wire.MINOR


def test_a_newer_major_is_told_ours() -> None:
    found = wire.parse_init(init(1, 0, major=8))
    assert replied(wire.init_reply(found))["major"] == 7


@pytest.mark.parametrize(("major", "minor"), [(7, 22), (7, 8), (6, 40), (0, 0)])
def test_too_old(major: int, minor: int) -> None:
    with pytest.raises(wire.ProtocolError, match=r"7\.23 is needed"):
        wire.init_reply(wire.parse_init(init(minor, 0, major=major)))


def test_half_an_init() -> None:
    with pytest.raises(wire.ProtocolError, match="15 bytes"):
        wire.parse_init(init(23, 0)[:15])


def test_sizes() -> None:
    """As in the kernel's header."""
    sizes = {
        wire.HEADER: 40, wire.REPLY: 16, wire.ENTRY: 128, wire.ATTR_OUT: 104, wire.DIRENT: 24,
        wire.OPEN_OUT: 16, wire.STATFS_OUT: 80, wire.GETXATTR_IN: 8, wire.GETXATTR_OUT: 8,
        wire.LSEEK_IN: 24, wire.LSEEK_OUT: 8, wire.IOCTL_IN: 32, wire.IOCTL_OUT: 16,
    }  # fmt: skip
    assert {record: record.size for record in sizes} == sizes


@pytest.mark.parametrize(("length", "size"), [(1, 32), (8, 32), (9, 40), (255, 280)])
def test_padding(length: int, size: int) -> None:
    assert wire.padded(length) == size

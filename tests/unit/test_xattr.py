"""Extended attributes: entries inline and shared, long prefixes, and the name filter."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

import pyerofs
from pyerofs import Image
from pyerofs.format import ondisk, xattr
from pyerofs.format.xattr import filter_bit, xxh32
from pyerofs.sources import MemorySource
from tests import handmade as hm
from tests.helpers import every_image, handmade, open_golden
from tests.manifests import Manifest, golden

PRIME = 2654435761
SHARED_BLOCK = 3  # of hand-made images


def bytes_of_xxhash() -> bytes:
    """What xxHash's own sanity check hashes."""
    found, generator = bytearray(), PRIME
    for _ in range(101):
        found.append(generator >> 24)
        generator = generator * generator & 0xFFFFFFFF
    return bytes(found)


@pytest.mark.parametrize(
    ("length", "seed", "expected"),
    [
        (0, 0, 0x02CC5D05),
        (0, PRIME, 0x36B78AE7),
        (1, 0, 0xB85CBEE5),
        (1, PRIME, 0xD5845D64),
        (14, 0, 0xE5AA0AB4),
        (14, PRIME, 0x4481951D),
        (101, 0, 0x1F1AA412),
        (101, PRIME, 0x498EC8E2),
    ],
)
def test_xxh32_against_its_own_vectors(length: int, seed: int, expected: int) -> None:
    assert xxh32(bytes_of_xxhash()[:length], seed) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a", 0x550D7456),
        (b"abc", 0x32D153FF),
        (b"Nobody inspects the spammish repetition", 0xE2293B2F),
    ],
)
def test_xxh32_against_known_values(text: bytes, expected: int) -> None:
    assert xxh32(text, 0) == expected


# --- the name filter --------------------------------------------------------------------------


@every_image
def test_the_filter_denies_no_name_that_is_there(want: Manifest) -> None:
    with open_golden(want) as image:
        for path in want.entries:
            inode = image.lookup(path, follow_symlinks=False)
            for name in xattr.names(image.volume, inode):
                assert not xattr.filtered_out(image.volume, inode, name)


def test_the_filter_denies_most_others() -> None:
    with open_golden(golden("xattr-filter")) as image:
        inode = image.lookup("xattr-4")
        names = [b"user.absent-%d" % i for i in range(200)]
        denied = [n for n in names if xattr.filtered_out(image.volume, inode, n)]
        assert len(denied) > 150
        assert all(xattr.get(image.volume, inode, n) is None for n in names)


def test_what_the_filter_denies_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_golden(golden("xattr-filter")) as image:
        inode = image.lookup("xattr-4")
        (denied, *_) = [
            n
            for n in (b"user.absent-%d" % i for i in range(200))
            if xattr.filtered_out(image.volume, inode, n)
        ]
        monkeypatch.setattr(xattr, "_entries", lambda *_: pytest.fail("searched"))
        with pytest.raises(pyerofs.NoSuchXattr):
            image.getxattr(inode, denied)
        with pytest.raises(pyerofs.NoSuchXattr):
            image.getxattr(inode, "no-namespace")
        with pytest.raises(pytest.fail.Exception, match="searched"):
            image.getxattr(inode, "user.common")


def test_filter_bits() -> None:
    """The prefix is not hashed, its number is part of the seed."""
    assert filter_bit(b"user.x") == xxh32(b"x", ondisk.XATTR_FILTER_SEED + 1) & 31
    assert filter_bit(b"trusted.x") == xxh32(b"x", ondisk.XATTR_FILTER_SEED + 4) & 31
    assert filter_bit(b"security.x") == xxh32(b"x", ondisk.XATTR_FILTER_SEED + 6) & 31
    assert filter_bit(b"system.posix_acl_access") == xxh32(b"", ondisk.XATTR_FILTER_SEED + 2) & 31
    assert filter_bit(b"system.other") is None
    assert filter_bit(b"x") is None


# --- entries by hand --------------------------------------------------------------------------


def open_file(
    inlined: bytes, shared: Mapping[int, bytes] | None = None, *, denied: int = 0, compat: int = 0
) -> Image:
    """An image with one file, ``f``, that has these inline entries and, at these offsets of the
    shared area, others; ``denied``: its name filter."""
    shared = shared or {}
    attributes = bytearray(hm.xattrs(inlined, list(shared)))
    attributes[:4] = denied.to_bytes(4, "little")
    area = bytearray(4096)
    for offset, item in shared.items():
        area[offset : offset + len(item)] = item
    image = handmade(
        {b"f": hm.inline(b"content", xattrs=bytes(attributes))},
        data={SHARED_BLOCK: bytes(area)},
        xattr_blkaddr=SHARED_BLOCK,
        compat=compat,
    )
    return pyerofs.open(MemorySource(image))


def test_every_namespace() -> None:
    inlined = (
        hm.xattr(1, b"a", b"1")
        + hm.xattr(2, b"", b"access")
        + hm.xattr(3, b"", b"default")
        + hm.xattr(4, b"overlay.opaque", b"y")
        + hm.xattr(6, b"selinux", b"label\0")
    )
    with open_file(inlined) as image:
        assert image.xattrs("f") == {
            "user.a": b"1",
            "system.posix_acl_access": b"access",
            "system.posix_acl_default": b"default",
            "trusted.overlay.opaque": b"y",
            "security.selinux": b"label\0",
        }
        assert image.read("f") == b"content"


def test_namespaces_without_a_public_name_are_left_out() -> None:
    with open_file(
        hm.xattr(5, b"x", b"1") + hm.xattr(7, b"y", b"2") + hm.xattr(1, b"z", b"3")
    ) as i:
        assert i.xattrs("f") == {"user.z": b"3"}


def test_shared_entries_follow_inline_ones_and_the_first_counts() -> None:
    shared = {8: hm.xattr(1, b"both", b"shared"), 64: hm.xattr(1, b"shared", bytes(300))}
    with open_file(hm.xattr(1, b"both", b"inline"), shared) as image:
        assert list(image.xattrs("f")) == ["user.both", "user.shared"]
        assert image.getxattr("f", "user.both") == image.xattrs("f")["user.both"] == b"inline"
        assert image.getxattr("f", b"user.shared") == bytes(300)


def test_names_that_are_not_utf8() -> None:
    with open_file(hm.xattr(1, b"latin-\xe9", b"v")) as image:
        assert image.xattrs("f") == {"user.latin-\udce9": b"v"}
        assert image.getxattr("f", "user.latin-\udce9") == b"v"
        assert image.getxattr("f", b"user.latin-\xe9") == b"v"


def test_values_of_any_size() -> None:
    with open_file(hm.xattr(1, b"empty", b"") + hm.xattr(1, b"x" * 250, b"v" * 999)) as image:
        assert image.xattrs("f") == {"user.empty": b"", "user." + "x" * 250: b"v" * 999}


@pytest.mark.parametrize(
    "name", ["user.", "user", "", "user.aa", "trusted.a", "a", "USER.A", "user.a\0"]
)
def test_names_that_are_almost_right(name: str) -> None:
    with open_file(hm.xattr(1, b"a", b"1")) as image:
        with pytest.raises(pyerofs.NoSuchXattr) as error:
            image.getxattr("f", name)
        assert error.value.path == name.encode()


def test_a_file_without_any() -> None:
    with pyerofs.open(MemorySource(handmade({b"f": hm.inline(b"x")}))) as image:
        assert image.xattrs("f") == {}
        with pytest.raises(pyerofs.NoSuchXattr):
            image.getxattr("f", "user.a")


def test_a_wrong_filter_hides_from_get_but_not_from_the_list() -> None:
    """As with the kernel; ``pyerofs check`` reports it."""
    entry = hm.xattr(1, b"a", b"1")
    with open_file(entry, denied=0xFFFFFFFF, compat=ondisk.COMPAT_XATTR_FILTER) as image:
        assert image.xattrs("f") == {"user.a": b"1"}
        with pytest.raises(pyerofs.NoSuchXattr):
            image.getxattr("f", "user.a")
    with open_file(entry, denied=0, compat=ondisk.COMPAT_XATTR_FILTER) as image:
        assert image.getxattr("f", "user.a") == b"1"


def test_without_the_feature_there_is_no_filter() -> None:
    with open_file(hm.xattr(1, b"a", b"1"), denied=0xFFFFFFFF) as image:
        assert image.getxattr("f", "user.a") == b"1"


@pytest.mark.parametrize(
    ("inlined", "shared", "what"),
    [
        (ondisk.XATTR_ENTRY.pack(200, 1, 0) + b"abcd", {}, "reaches beyond"),
        (ondisk.XATTR_ENTRY.pack(1, 1, 65535) + b"a\0\0\0", {}, "reaches beyond"),
        (b"", {4090: b""}, "beyond the end|reach"),
    ],
)
def test_entries_that_do_not_fit(inlined: bytes, shared: dict[int, bytes], what: str) -> None:
    if shared:
        image = handmade(
            {b"f": hm.inline(b"x", xattrs=hm.xattrs(b"", [1 << 30]))}, xattr_blkaddr=SHARED_BLOCK
        )
        opened = pyerofs.open(MemorySource(image))
    else:
        opened = open_file(inlined)
    with opened, pytest.raises(pyerofs.CorruptImage, match=what):
        opened.xattrs("f")


def test_more_shared_entries_than_fit() -> None:
    attributes = bytearray(hm.xattrs(hm.xattr(1, b"a", b"1")))
    attributes[4] = 200
    image = handmade({b"f": hm.inline(b"x", xattrs=bytes(attributes))})
    with (
        pyerofs.open(MemorySource(image)) as opened,
        pytest.raises(pyerofs.CorruptImage, match="200 shared xattrs do not fit") as error,
    ):
        opened.xattrs("f")
    assert error.value.nid == 2


# --- long prefixes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["xattr-prefix", "xattr-prefix-fragments", "xattr-plain-prefix-fragments", "metabox-xattr"],
)
def test_prefixes_wherever_they_lie(name: str) -> None:
    want = golden(name)
    with open_golden(want) as image:
        assert image.superblock.xattr_prefix_count > 0
        found = image.xattrs("xattr-3")
        assert any(n.startswith("user.some.long.prefix.") for n in found)
        assert {n: v.hex() for n, v in found.items()} == want.entries["xattr-3"]["xattrs"]


def prefixed(records: bytes, count: int, inlined: bytes) -> Image:
    image = handmade(
        {b"f": hm.inline(b"x", xattrs=hm.xattrs(inlined))},
        data={SHARED_BLOCK: records},
        incompat=ondisk.INCOMPAT_XATTR_PREFIXES,
        xattr_prefix_start=SHARED_BLOCK * 4096 // 4,
        xattr_prefix_count=count,
    )
    return pyerofs.open(MemorySource(image))


def record(index: int, infix: bytes) -> bytes:
    body = bytes([index]) + infix
    found = len(body).to_bytes(2, "little") + body
    return found + bytes(-len(found) % 4)


def test_prefixes_by_hand() -> None:
    records = record(1, b"") + record(4, b"overlay.") + record(1, b"a.long.one.")
    inlined = (
        hm.xattr(0x80, b"x", b"1") + hm.xattr(0x81, b"opaque", b"2") + hm.xattr(0x82, b"", b"3")
    )
    with prefixed(records, 3, inlined) as image:
        assert image.xattrs("f") == {
            "user.x": b"1",
            "trusted.overlay.opaque": b"2",
            "user.a.long.one.": b"3",
        }
        assert image.getxattr("f", "trusted.overlay.opaque") == b"2"


def test_a_prefix_that_is_not_there() -> None:
    with prefixed(record(1, b"p."), 1, hm.xattr(0x85, b"x", b"1") + hm.xattr(1, b"y", b"2")) as i:
        assert i.xattrs("f") == {"user.y": b"2"}


def test_a_name_that_is_too_long_with_its_prefix() -> None:
    inlined = hm.xattr(0x80, b"x" * 200, b"1") + hm.xattr(1, b"y", b"2")
    with prefixed(record(1, b"p" * 100), 1, inlined) as image:
        assert image.xattrs("f") == {"user.y": b"2"}


@pytest.mark.parametrize("length", [0, 257, 65535])
def test_a_prefix_of_a_wrong_length(length: int) -> None:
    records = length.to_bytes(2, "little") + b"\1abc"
    with (
        prefixed(records, 1, hm.xattr(0x80, b"x", b"1")) as image,
        pytest.raises(pyerofs.CorruptImage, match=f"prefix of {length} bytes"),
    ):
        image.xattrs("f")

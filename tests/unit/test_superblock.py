"""The superblock: every field, every check, and what is not known yet."""

from __future__ import annotations

import struct
from typing import Any
from uuid import UUID

import pytest

import pyerofs
from pyerofs import Device, Superblock
from pyerofs.format import ondisk, superblock
from pyerofs.format.crc32c import crc32c
from pyerofs.sources import MemorySource
from tests import handmade as hm
from tests.helpers import every_image, handmade, open_golden, primary
from tests.manifests import Manifest, golden

BASE = ondisk.SUPER_OFFSET


def load(image: bytes) -> Superblock:
    return superblock.load(lambda at, n: MemorySource(image).read_at(at, n), len(image))


def changed(image: bytes, *, sealed: bool = True, **fields: Any) -> bytes:
    """The image with other fields in its superblock, and the checksum that goes with them."""
    found = bytearray(image)
    raw = ondisk.SuperBlock._make(ondisk.SUPERBLOCK.unpack_from(found, BASE))
    ondisk.SUPERBLOCK.pack_into(found, BASE, *raw._replace(**fields))
    if sealed:
        struct.pack_into("<I", found, BASE + 4, 0)
        block = 1 << found[BASE + 12]
        length = block - BASE if block > BASE else block
        struct.pack_into("<I", found, BASE + 4, crc32c(found[BASE : BASE + length]))
    return bytes(found)


@pytest.fixture(name="plain", scope="module")
def read_plain() -> bytes:
    return primary(golden("plain"))


@pytest.fixture(name="compressed", scope="module")
def read_compressed() -> bytes:
    return primary(golden("multi-algo"))


# --- what the golden images say ---------------------------------------------------------------


@every_image
def test_golden_images(want: Manifest) -> None:
    with open_golden(want) as image:
        sb = image.superblock
        assert sb.block_size * sb.blocks <= image.volume.memory.sizes[0]
        names = [e for e in want.entries if e not in ("hard-3", "many/hard-2")]
        assert sb.inodes >= len(names)
        assert len(sb.devices) == len(want.devices)
        assert sb.total_blocks == sb.blocks + sum(d.blocks for d in sb.devices)
        assert sb.directory_block_size == sb.block_size
        assert len(sb.feature_names) == (sb.feature_compat | sb.feature_incompat << 16).bit_count()


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("plain", {"sb_chksum", "mtime"}),
        ("nosbcrc", {"mtime"}),
        ("lz4", {"sb_chksum", "mtime", "lz4_0padding"}),
        ("lz4-legacy", {"sb_chksum", "mtime", "lz4_0padding"}),
        ("xattr-filter", {"sb_chksum", "mtime", "xattr_filter"}),
        ("xattr-prefix", {"sb_chksum", "mtime", "xattr_prefixes"}),
        ("chunk4k", {"sb_chksum", "mtime", "chunked_file"}),
        ("blobdev", {"sb_chksum", "mtime", "chunked_file", "device_table/compr_head2"}),
        (
            "frag-zstd",
            {"sb_chksum", "mtime", "lz4_0padding", "compr_cfgs/big_pcluster", "fragments/dedupe"},
        ),
    ],
)
def test_features_by_name(name: str, features: set[str]) -> None:
    with open_golden(golden(name)) as image:
        assert features <= set(image.superblock.feature_names)
        assert image.superblock.zero_padded == ("lz4_0padding" in features)


def test_label_and_uuid() -> None:
    with open_golden(golden("label-uuid")) as image:
        assert image.superblock.volume_name == b"pyerofs-test"
        assert image.superblock.uuid == UUID("12345678-1234-5678-1234-567812345678")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("b512", "block_size", 512),
        ("b64k-lz4", "block_size", 65536),
        ("lzma-C64k", "lzma_dict_size", 65536),
        ("lz4hc-C64k", "lz4_max_pcluster_blocks", 16),
        ("multi-algo", "algorithms", 1 << ondisk.ALG_LZ4 | 1 << ondisk.ALG_ZSTD),
        ("multi-algo-lzma", "algorithms", 1 << ondisk.ALG_LZMA | 1 << ondisk.ALG_DEFLATE),
        ("zstd-dict", "zstd_window_log", 16),
        ("xattr-prefix", "xattr_prefix_count", 2),
        ("inode-digest", "ishare_prefix", 0),
        ("plain", "ishare_prefix", None),
        ("plain", "packed_nid", 0),
        ("xattr-filter", "xattr_filter", True),
        ("plain", "size", 128),
        ("metabox", "size", 144),
    ],
)
def test_fields(name: str, field: str, value: object) -> None:
    with open_golden(golden(name)) as image:
        assert getattr(image.superblock, field) == value


def test_blobdev_s_device() -> None:
    want = golden("blobdev")
    with open_golden(want) as image:
        (device,) = image.superblock.devices
        assert isinstance(device, Device)
        assert device.blocks * 4096 == want.devices[0].stat().st_size
        assert image.superblock.device_mask == 1


# --- features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bit", range(9, 32))
def test_unknown_incompatible_features_are_refused(plain: bytes, bit: int) -> None:
    with pytest.raises(pyerofs.UnsupportedFeature, match=f"{1 << bit:#x}"):
        load(changed(plain, feature_incompat=1 << bit))


@pytest.mark.parametrize("bit", range(6, 32))
def test_unknown_compatible_features_are_shown(plain: bytes, bit: int) -> None:
    sb = load(changed(plain, feature_compat=ondisk.COMPAT_SB_CHKSUM | 1 << bit))
    assert sb.feature_names == ["sb_chksum", f"compat:{1 << bit:#x}"]


def test_all_known_features_have_a_name() -> None:
    assert sum(ondisk.INCOMPAT_NAMES) == ondisk.ALL_INCOMPAT
    assert len(set(ondisk.INCOMPAT_NAMES.values()) | set(ondisk.COMPAT_NAMES.values())) == 15


def test_unknown_algorithms_are_refused(compressed: bytes) -> None:
    with pytest.raises(pyerofs.UnsupportedFeature, match="algorithms 0x10"):
        load(changed(compressed, available_compr_algs=0x13))


# --- checksum ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "b512", "b1024", "b2048", "b8k", "b64k-lz4"])
def test_any_changed_byte_is_found(name: str) -> None:
    image = primary(golden(name))
    block = 1 << image[BASE + 12]
    length = block - BASE if block > BASE else block
    last = BASE + length - 1
    for at in (BASE + 7, BASE + 40, BASE + 64, last):
        broken = bytearray(image)
        broken[at] ^= 1
        with pytest.raises(pyerofs.CorruptImage, match="checksum") as error:
            load(bytes(broken))
        assert error.value.offset == BASE + 4
    beyond = bytearray(image)
    beyond[last + 1] ^= 1
    assert load(bytes(beyond)) == load(image)


def test_without_the_feature_the_checksum_is_ignored(plain: bytes) -> None:
    image = changed(plain, sealed=False, checksum=0x12345678, feature_compat=0)
    assert load(image).checksum == 0x12345678


def test_the_checksum_s_own_bytes_do_not_count(plain: bytes) -> None:
    assert changed(plain) == plain


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],
)
def test_crc32c_against_known_values(data: bytes, expected: int) -> None:
    """RFC 3720, B.4, whose values are inverted at the end."""
    assert crc32c(data) ^ 0xFFFFFFFF == expected


# --- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 1023, 1024, 1151])
def test_too_short_for_a_superblock(plain: bytes, length: int) -> None:
    with pytest.raises(pyerofs.CorruptImage, match="too short"):
        load(plain[:length])
    with pytest.raises(pyerofs.CorruptImage, match="too short"):
        pyerofs.open(MemorySource(plain[:length]))


@pytest.mark.parametrize("length", [1152, 1167, 2000, 4095])
def test_ends_within_its_first_block(plain: bytes, length: int) -> None:
    with pytest.raises(pyerofs.CorruptImage, match="ends within") as error:
        load(plain[:length])
    assert error.value.offset == length


def test_the_shortest_superblock_there_can_be(plain: bytes) -> None:
    image = changed(plain, sealed=False, feature_compat=0)[: BASE + 128]
    assert load(image).inodes == load(plain).inodes


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"magic": 0xE0F5E1E3}, "no EROFS superblock"),
        ({"blkszbits": 8}, "block size of 2\\^8"),
        ({"blkszbits": 17}, "block size of 2\\^17"),
        ({"blkszbits": 255}, "block size of 2\\^255"),
        ({"dirblkbits": 9}, "directory blocks"),
        ({"dirblkbits": 255}, "directory blocks"),
        ({"packed_nid": 1 << 63}, "packed inode inside the metabox"),
        ({"packed_nid": (1 << 64) - 1}, "packed inode inside the metabox"),
        ({"feature_incompat": ondisk.INCOMPAT_METABOX}, "metabox without"),
        (
            {
                "feature_incompat": ondisk.INCOMPAT_METABOX,
                "sb_extslots": 1,
                "metabox_nid": 1 << 63 | 7,
            },
            "metabox inode inside the metabox",
        ),
        (
            {"feature_compat": ondisk.COMPAT_SB_CHKSUM | ondisk.COMPAT_ISHARE_XATTRS},
            "digest xattr prefix 0 of 0",
        ),
    ],
)
def test_what_contradicts_the_format(plain: bytes, fields: dict[str, Any], what: str) -> None:
    with pytest.raises(pyerofs.CorruptImage, match=what):
        load(changed(plain, sealed=fields.get("blkszbits", 12) == 12, **fields))


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (
            {"rootnid_2b": 0xFFFF},
            "beyond the end|file type|inode format|data layout|not a directory",
        ),
        ({"meta_blkaddr": 0x7FFFFFFF}, "beyond the end"),
        ({"meta_blkaddr": 0xFFFFFFFF}, "beyond the end"),
    ],
)
def test_a_root_that_is_nowhere(plain: bytes, fields: dict[str, Any], what: str) -> None:
    with pytest.raises(pyerofs.ErofsError, match=what):
        pyerofs.open(MemorySource(changed(plain, **fields)))


def test_a_root_that_is_a_file() -> None:
    with pytest.raises(pyerofs.CorruptImage, match="root inode is not a directory") as error:
        pyerofs.open(MemorySource(handmade({b"file": hm.inline(b"x")}, rootnid_2b=2)))
    assert error.value.nid == 2


# --- extension slots, times, 48 bits ----------------------------------------------------------


def test_fields_in_slots_that_are_not_there_do_not_count() -> None:
    """What follows the superblock may be anything, if it is said to end before."""
    image = primary(golden("metabox"))
    nid = load(image).metabox_nid
    assert nid
    with pytest.raises(pyerofs.CorruptImage, match="metabox without"):
        load(changed(image, sb_extslots=0))
    without = changed(image, sb_extslots=0, feature_incompat=0)
    assert load(without).metabox_nid == 0


@pytest.mark.parametrize("slots", [0, 1, 2, 255])
def test_slots(plain: bytes, slots: int) -> None:
    assert load(changed(plain, sb_extslots=slots)).size == 128 + 16 * slots


@pytest.mark.parametrize("slots", [1, 2, 255])
def test_slots_beyond_the_end(plain: bytes, slots: int) -> None:
    image = changed(plain, sealed=False, feature_compat=0, sb_extslots=slots)
    length = BASE + 128 + 16 * slots
    assert load(image[:length]).size == length - BASE
    with pytest.raises(pyerofs.CorruptImage, match=f"superblock of {length - BASE} bytes"):
        load(image[: length - 1])


def test_times(plain: bytes) -> None:
    sb = load(changed(plain, epoch=1_000_000, fixed_nsec=5, build_time=77))
    assert (sb.epoch, sb.fixed_nsec, sb.build_time) == (1_000_000, 5, 1_000_077)


def test_volume_name(plain: bytes) -> None:
    assert load(changed(plain, volume_name=b"a\0bc".ljust(16, b"\0"))).volume_name == b"a"
    assert load(changed(plain, volume_name=b"x" * 16)).volume_name == b"x" * 16


def test_48_bits(plain: bytes) -> None:
    fields: dict[str, Any] = {"rootnid_8b": 1 << 40, "rootnid_2b": 3, "blocks_lo": 7}
    sb = load(changed(plain, feature_incompat=ondisk.INCOMPAT_48BIT, **fields))
    assert (sb.root_nid, sb.blocks) == (1 << 40, 3 << 32 | 7)
    sb = load(changed(plain, **fields))
    assert (sb.root_nid, sb.blocks) == (3, 7)
    sb = load(changed(plain, feature_incompat=ondisk.INCOMPAT_48BIT, rootnid_8b=0, rootnid_2b=3))
    assert sb.root_nid == 3


def test_the_filter_s_reserved_byte_turns_it_off() -> None:
    image = primary(golden("xattr-filter"))
    assert load(image).xattr_filter
    assert not load(changed(image, xattr_filter_reserved=1)).xattr_filter


# --- compression configurations ---------------------------------------------------------------


def configured(**configs: bytes) -> bytes:
    numbers = {f"alg{n}": n for n in range(4)}
    found = {numbers[name]: config for name, config in configs.items()}
    return handmade({b"file": hm.inline(b"x")}, configs=found)


@pytest.mark.parametrize(
    ("configs", "field", "value"),
    [
        ({"alg0": ondisk.LZ4_CFGS.pack(65535, 256)}, "lz4_max_pcluster_blocks", 256),
        ({"alg0": ondisk.LZ4_CFGS.pack(65535, 0)}, "lz4_max_pcluster_blocks", 1),
        ({"alg0": ondisk.LZ4_CFGS.pack(99, 1) + b"more"}, "lz4_max_distance", 99),
        ({"alg1": ondisk.LZMA_CFGS.pack(4096, 0)}, "lzma_dict_size", 4096),
        ({"alg1": ondisk.LZMA_CFGS.pack(8 << 20, 0)}, "lzma_dict_size", 8 << 20),
        ({"alg2": ondisk.DEFLATE_CFGS.pack(9)}, "deflate_window_bits", 9),
        ({"alg3": ondisk.ZSTD_CFGS.pack(0, 10)}, "zstd_window_log", 20),
        (
            {
                "alg0": ondisk.LZ4_CFGS.pack(1, 1) + b"\1",
                "alg1": ondisk.LZMA_CFGS.pack(4096, 0) + b"\1\2",
                "alg3": ondisk.ZSTD_CFGS.pack(0, 3),
            },
            "zstd_window_log",
            13,
        ),
    ],
)
def test_configurations(configs: dict[str, bytes], field: str, value: int) -> None:
    assert getattr(load(configured(**configs)), field) == value


@pytest.mark.parametrize(
    ("configs", "error", "what"),
    [
        ({"alg0": ondisk.LZ4_CFGS.pack(1, 257)}, pyerofs.CorruptImage, "pclusters of 257 blocks"),
        ({"alg0": b"short"}, pyerofs.CorruptImage, "lz4 configuration of 5 bytes"),
        ({"alg3": b""}, pyerofs.CorruptImage, "zstd configuration of 0 bytes"),
        ({"alg1": ondisk.LZMA_CFGS.pack(4095, 0)}, pyerofs.UnsupportedFeature, "4095 bytes"),
        ({"alg1": ondisk.LZMA_CFGS.pack(9 << 20, 0)}, pyerofs.UnsupportedFeature, "LZMA"),
        ({"alg1": ondisk.LZMA_CFGS.pack(4096, 1)}, pyerofs.UnsupportedFeature, "LZMA format 1"),
        ({"alg2": ondisk.DEFLATE_CFGS.pack(16)}, pyerofs.UnsupportedFeature, "window of 2\\^16"),
        ({"alg3": ondisk.ZSTD_CFGS.pack(1, 0)}, pyerofs.UnsupportedFeature, "Zstandard format 1"),
        ({"alg3": ondisk.ZSTD_CFGS.pack(0, 11)}, pyerofs.UnsupportedFeature, "window log 21"),
    ],
)
def test_configurations_that_are_refused(
    configs: dict[str, bytes], error: type[pyerofs.ErofsError], what: str
) -> None:
    with pytest.raises(error, match=what):
        load(configured(**configs))


# --- devices ----------------------------------------------------------------------------------


def test_device_table() -> None:
    image = handmade({b"file": hm.inline(b"x")}, devices=[(10, 100), (1 << 40, 0), (5, 1 << 33)])
    sb = load(image)
    assert [(d.blocks, d.uniaddr) for d in sb.devices] == [(10, 100), (0, 0), (5, 0)]
    assert sb.device_mask == 3
    assert sb.total_blocks == sb.blocks + 15
    wide = handmade(
        {b"file": hm.inline(b"x")},
        devices=[(1 << 40, 0), (5, 1 << 33)],
        incompat=ondisk.INCOMPAT_48BIT,
    )
    assert [(d.blocks, d.uniaddr) for d in load(wide).devices] == [(1 << 40, 0), (5, 1 << 33)]


@pytest.mark.parametrize("count", [4097, 65535])
def test_more_devices_than_anybody_has(plain: bytes, count: int) -> None:
    image = changed(plain, feature_incompat=ondisk.INCOMPAT_DEVICE_TABLE, extra_devices=count)
    with pytest.raises(pyerofs.UnsupportedFeature, match=f"{count} extra devices"):
        load(image)


def test_a_device_table_beyond_the_end(plain: bytes) -> None:
    image = changed(
        plain, feature_incompat=ondisk.INCOMPAT_DEVICE_TABLE, extra_devices=9, devt_slotoff=65535
    )
    with pytest.raises(pyerofs.CorruptImage, match="beyond the end"):
        pyerofs.open(MemorySource(image))


def test_tags_lose_their_padding(plain: bytes) -> None:
    image = bytearray(handmade({b"file": hm.inline(b"x")}, devices=[(1, 0)]))
    image[hm.DEVICE_TABLE : hm.DEVICE_TABLE + 6] = b"sha:ab"
    assert load(changed(bytes(image))).devices[0].tag == b"sha:ab"


# --- where it lies ----------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1, 512, 4096, 1 << 20])
@pytest.mark.parametrize("name", ["lz4", "b512"])
def test_an_image_anywhere_in_a_file(offset: int, name: str) -> None:
    image = b"\xe2" * offset + primary(golden(name))
    with pyerofs.open(MemorySource(image), offset=offset) as opened:
        assert opened.stat("text").st_size == 40425
        assert len(opened.read("text")) == 40425


def test_repr_and_equality(plain: bytes) -> None:
    assert load(plain) == load(plain)
    assert "block_bits=12" in repr(load(plain))
    with pytest.raises(AttributeError):
        load(plain).inodes = 5  # type: ignore[misc]

"""``pyerofs info``: show the superblock and statistics of an image."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from typing import Any

from pyerofs.cli.common import open_image, print_json
from pyerofs.format import inode as inodes
from pyerofs.format import ondisk, tree, xattr
from pyerofs.format.model import Inode
from pyerofs.image import Image
from pyerofs.units import format_size


def info(args: argparse.Namespace) -> int:
    """Print the superblock's fields and statistics over all inodes."""
    with open_image(args) as image:
        found = describe(image)
    if args.json:
        print_json(found)
        return 0
    for key, value in found.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, number in value.items():
                print(f"  {name + ':':<20} {number}")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"{key}:")
            for item in value:
                print("  " + ", ".join(f"{k} {v}" for k, v in item.items()))
        else:
            shown = ", ".join(value) if isinstance(value, list) else value
            print(f"{key + ':':<22} {'-' if shown in (None, '') else shown}")
    return 0


def describe(image: Image) -> dict[str, Any]:
    """The superblock's fields and the statistics, ready for JSON."""
    sb = image.superblock
    digest = xattr.digest_prefix(image.volume)
    return {
        "volume name": sb.volume_name.decode("utf-8", "surrogateescape"),
        "uuid": str(sb.uuid),
        "built": _time(sb.build_time),
        "block size": sb.block_size,
        "directory block size": sb.directory_block_size,
        "blocks": sb.blocks,
        "size": sb.blocks * sb.block_size,
        "inodes": sb.inodes,
        "root nid": sb.root_nid,
        "packed nid": sb.packed_nid or None,
        "metabox nid": sb.metabox_nid or None,
        "metadata block": sb.meta_blkaddr,
        "shared xattr block": sb.xattr_blkaddr,
        "xattr prefixes": sb.xattr_prefix_count,
        "digest xattr": None if digest is None else digest.decode("utf-8", "surrogateescape"),
        "checksum": f"{sb.checksum:#010x}"
        if sb.feature_compat & ondisk.COMPAT_SB_CHKSUM
        else None,
        "features": sb.feature_names,
        "algorithms": _algorithms(image),
        "devices": [
            {"tag": d.tag.decode("ascii", "backslashreplace"), "blocks": d.blocks,
             "mapped at block": d.uniaddr}
            for d in sb.devices
        ],
        "statistics": _statistics(image),
    }  # fmt: skip


def _algorithms(image: Image) -> list[str]:
    sb = image.superblock
    if not sb.feature_incompat & ondisk.INCOMPAT_COMPR_CFGS:
        return ["lz4"] if sb.zero_padded else []
    return [name for number, name in ondisk.ALG_NAMES.items() if sb.algorithms >> number & 1]


def _time(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        return f"{seconds} s since 1970"


def _statistics(image: Image) -> dict[str, Any]:
    """Counts by type and layout, and bytes before and after compression."""
    types: dict[str, int] = {}
    layouts: dict[str, int] = {}
    plain = encoded = original = 0
    seen: set[int] = set()

    def count(inode: Inode) -> None:
        nonlocal plain, encoded, original
        if inode.nlink > 1 and not inode.is_dir:
            if inode.nid in seen:
                return
            seen.add(inode.nid)
        kind = tree.file_type(inode)
        types[kind] = types.get(kind, 0) + 1
        if not (inode.is_file or inode.is_dir or inode.is_symlink):
            return
        layout = ondisk.LAYOUT_NAMES[inode.layout]
        layouts[layout] = layouts.get(layout, 0) + 1
        if inode.is_compressed:
            original += inode.size
            encoded += inode.blocks * image.superblock.block_size
        else:
            plain += inode.size

    count(image.root)
    for _, _, inode in tree.walk(image.volume, image.root):
        count(inode)
    if image.superblock.packed_nid:  # fragments: their original size counts with their files
        packed = inodes.load(image.volume, image.superblock.packed_nid)
        encoded += packed.blocks * image.superblock.block_size if packed.is_compressed else 0
    found: dict[str, Any] = {f"{k} count": n for k, n in sorted(types.items())}
    found |= {f"{k} layout": n for k, n in sorted(layouts.items())}
    found["uncompressed files"] = format_size(plain)
    found["compressed files"] = format_size(original)
    if original:
        found["their pclusters"] = f"{format_size(encoded)} ({100 * encoded / original:.1f} %)"
    return found

"""``pyerofs ls``, ``tree``, ``stat`` and ``cat``."""

from __future__ import annotations

import argparse
import os
import stat as st
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from pyerofs.cli.common import open_image, print_json, printable
from pyerofs.format import tree as trees
from pyerofs.format.model import KIND_NAMES, Extent, Inode
from pyerofs.format.ondisk import ALG_NAMES, LAYOUT_NAMES
from pyerofs.image import DirEntry, Image

PIECE = 1 << 20


def ls(args: argparse.Namespace) -> int:
    """List the paths; directories by their entries."""
    with open_image(args) as image:
        if args.json:
            rows = [row for path in args.paths for row in _rows(image, path, args.recursive)]
            print_json([_describe(image, path, inode) for path, inode in rows])
            return 0
        several = len(args.paths) > 1 or args.recursive
        for number, path in enumerate(args.paths):
            inode = image.lookup(path, follow_symlinks=False)
            if inode.is_symlink and not args.long:
                inode = image.lookup(path)
            if not inode.is_dir:
                _print_row(image, path, inode, args.long)
                continue
            walk = image.walk(path)
            for directory, directories, others in walk:
                if several:
                    print("" if not number and directory == path else "\n", end="")
                    print(f"{printable(directory)}:")
                entries = sorted(directories + others, key=lambda e: e.dirent.name)
                for entry in entries:
                    _print_row(image, entry.name, entry.inode, args.long)
                if not args.recursive:
                    break
    return 0


def _rows(image: Image, path: str, recursive: bool) -> Iterator[tuple[str, Inode]]:
    inode = image.lookup(path, follow_symlinks=False)
    if not inode.is_dir:
        yield path, inode
        return
    for _, directories, others in image.walk(path):
        for entry in sorted(directories + others, key=lambda e: e.dirent.name):
            yield entry.path, entry.inode
        if not recursive:
            return


def _print_row(image: Image, name: str, inode: Inode, long: bool) -> None:
    if not long:
        print(printable(name))
        return
    if st.S_ISCHR(inode.mode) or st.S_ISBLK(inode.mode):
        size = f"{os.major(inode.rdev)}, {os.minor(inode.rdev)}"
    else:
        size = str(inode.size)
    arrow = f" -> {printable(image.readlink(inode))}" if inode.is_symlink else ""
    print(
        f"{st.filemode(inode.mode)} {inode.nlink:>3} {inode.uid:>5} {inode.gid:>5} {size:>10} "
        f"{_time(inode)} {printable(name)}{arrow}"
    )


def _time(inode: Inode) -> str:
    try:
        return datetime.fromtimestamp(inode.mtime).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return f"@{inode.mtime}"


def tree(args: argparse.Namespace) -> int:
    """Draw a directory and everything below it."""
    with open_image(args) as image:
        inode = image.lookup(args.path)
        print(printable(args.path))
        if inode.is_dir:
            directories, files = _draw(image, args.path, inode, args.level)
            print(f"\n{directories} directories, {files} files")
    return 0


def _draw(image: Image, top: str, start: Inode, level: int | None) -> tuple[int, int]:
    directories = files = 0
    seen = {start.nid}
    # (entries still to print, prefix of their lines)
    stack: list[tuple[Iterator[tuple[DirEntry, bool]], str]] = [(_with_last(image, start), "")]
    while stack:
        entries, indent = stack[-1]
        step = next(entries, None)
        if step is None:
            stack.pop()
            continue
        entry, last = step
        inode = entry.inode
        arrow = f" -> {printable(image.readlink(inode))}" if inode.is_symlink else ""
        print(f"{indent}{'`-- ' if last else '|-- '}{printable(entry.name)}{arrow}")
        if not inode.is_dir:
            files += 1
            continue
        directories += 1
        trees.once(seen, inode)
        if level is None or len(stack) < level:
            deeper = indent + ("    " if last else "|   ")
            stack.append((_with_last(image, inode), deeper))
    return directories, files


def _with_last(image: Image, inode: Inode) -> Iterator[tuple[DirEntry, bool]]:
    """The entries of a directory, each with a flag: whether it is the last one."""
    entries = image.scandir(inode)
    held = next(entries, None)
    while held is not None:
        following = next(entries, None)
        yield held, following is None
        held = following


def stat(args: argparse.Namespace) -> int:
    """Show attributes, xattrs and extents of the paths."""
    with open_image(args) as image:
        found = []
        for path in args.paths:
            inode = image.lookup(path, follow_symlinks=args.follow)
            found.append(_describe(image, path, inode, extents=args.extents or args.json))
    if args.json:
        print_json(found)
        return 0
    for facts in found:
        for key, value in facts.items():
            if key == "xattrs":
                for name, data in value.items():
                    print(f"  xattr {printable(name)} = {data}")
            elif key == "extents":
                for extent in value:
                    print("  extent " + ", ".join(f"{k} {v}" for k, v in extent.items()))
            else:
                print(f"{key + ':':<12} {printable(str(value))}")
    return 0


def _describe(image: Image, path: str, inode: Inode, extents: bool = False) -> dict[str, Any]:
    s = image.stat(inode)
    facts: dict[str, Any] = {
        "path": path,
        "type": trees.file_type(inode),
        "mode": f"{st.S_IMODE(inode.mode):04o}",
        "uid": inode.uid,
        "gid": inode.gid,
        "nlink": inode.nlink,
        "size": inode.size,
        "blocks": s.st_blocks,
        "mtime_ns": inode.mtime_ns,
        "ino": s.st_ino,
        "nid": inode.nid,
        "layout": LAYOUT_NAMES[inode.layout],
    }
    if st.S_ISCHR(inode.mode) or st.S_ISBLK(inode.mode):
        facts["rdev"] = [os.major(inode.rdev), os.minor(inode.rdev)]
    if inode.is_symlink:
        facts["target"] = image.readlink(inode)
    xattrs = image.xattrs(inode)
    if xattrs:
        facts["xattrs"] = {name: value.hex() for name, value in xattrs.items()}
    if extents and (inode.is_file or inode.is_dir or inode.is_symlink):
        facts["extents"] = [_extent(e) for e in image.extents(inode)]
    return facts


def _extent(extent: Extent) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "start": extent.start,
        "length": extent.length,
        "kind": KIND_NAMES[extent.kind],
    }
    if facts["kind"] != "hole":
        facts |= {"device": extent.device, "address": extent.address}
    if facts["kind"] == "encoded":
        facts |= {"encoded": extent.size, "algorithm": ALG_NAMES[extent.algorithm]}
        if extent.partial:
            facts["partial"] = True
    return facts


def cat(args: argparse.Namespace) -> int:
    """Write the files' bytes to stdout, unchanged."""
    out = sys.stdout.buffer
    with open_image(args) as image:
        for path in args.paths:
            inode = image.lookup(path)
            trees.require_file(inode, path)
            for offset in range(0, inode.size, PIECE):
                out.write(image.read(inode, offset, PIECE))
    out.flush()
    return 0

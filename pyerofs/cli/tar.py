"""``pyerofs tar``: write the tree as a PAX stream (POSIX.1-2001), for ``tar`` and container tools.

The headers are written here and not by the standard library, whose PAX writer rounds times to a
float, can't carry binary attribute values in a form that other tools read, and is ten times slower.
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
from typing import BinaryIO

from pyerofs.cli.common import open_image
from pyerofs.cli.messages import complain
from pyerofs.errors import CorruptImage, ErofsError
from pyerofs.format import data, tree, xattr
from pyerofs.format.model import Inode
from pyerofs.image import Image
from pyerofs.system.libc import keep_freed_memory

BLOCK = 512
RECORD = 20 * BLOCK  # tar pads its archives to this
PIECE = 1 << 20
MAX_PATH = 64 << 10  # bytes, 16 times PATH_MAX; each member stores its full path
MAX_OCTAL_7 = 0o7777777
MAX_OCTAL_11 = 0o77777777777


def tar(args: argparse.Namespace) -> int:
    """Write the stream.  Sockets, which tar can't hold, are left out and counted on stderr."""
    keep_freed_memory()
    with open_image(args, whole=not args.path.strip("/")) as image:
        if args.output is None:
            with open(os.dup(sys.stdout.fileno()), "wb", buffering=PIECE) as stdout:
                return _write(image, args, stdout)
        if os.path.lexists(args.output) and not stat.S_ISREG(os.lstat(args.output).st_mode):
            with open(args.output, "wb", buffering=PIECE) as file:  # a device, fifo or link
                return _write(image, args, file)
        temporary = f"{args.output}.partial"
        try:
            with open(temporary, "wb", buffering=PIECE) as file:
                status = _write(image, args, file)
            image.verify(rest=not args.path.strip("/"))
            os.replace(temporary, args.output)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
        return status


def _write(image: Image, args: argparse.Namespace, out: BinaryIO) -> int:
    writer = TarWriter(image, out, xattrs=not args.no_xattrs)
    top = image.lookup(args.path)
    if not top.is_dir:
        raise ErofsError(f"{args.path}: not a directory")
    writer.add_tree(top)
    writer.close()
    if writer.sockets:
        complain(f"{writer.sockets} sockets left out (tar can't hold them)")
    return 1 if writer.problems else 0


class TarWriter:
    """Writes tar members one after another.  ``sockets`` counts sockets, which tar can't hold;
    ``problems`` counts corrupt entries.  Both are left out."""

    def __init__(self, image: Image, out: BinaryIO, *, xattrs: bool = True) -> None:
        self._image = image
        self._vol = image.volume
        self._out = out
        self._xattrs = xattrs
        self._written = 0
        self._first: dict[int, bytes] = {}
        self.sockets = 0
        self.problems = 0

    def _report(self, error: CorruptImage) -> None:
        self.problems += 1
        complain(str(error))

    def add_tree(self, top: Inode) -> None:
        """Add a directory as ``./`` and everything below it, parents before children.  Raises
        ErofsError for a path of more than MAX_PATH bytes."""
        trail = tree.Trail(top)
        while (step := trail.next()) is not None:
            place, here = step
            base = place.path()
            if len(base) > MAX_PATH:
                raise ErofsError(f"a path of {len(base)} bytes is too long for a tar stream")
            self.add(b"./" + base + b"/" if base else b"./", here)
            directories = []
            for entry in tree.orderly_entries(self._vol, here, self._report):
                inode = self._image.inode(entry.nid)
                if inode.is_dir:
                    directories.append((entry.name, inode))
                else:
                    self.add(b"./" + (base + b"/" if base else b"") + entry.name, inode)
            trail.enter(directories)

    def add(self, name: bytes, inode: Inode) -> None:
        """Add one member; further names of a file with several links become hard links."""
        if stat.S_ISSOCK(inode.mode):
            self.sockets += 1
            return
        kind, target, size = _TYPES[stat.S_IFMT(inode.mode)], b"", 0
        if not inode.is_dir and inode.nlink > 1:
            first = self._first.setdefault(inode.nid, name)
            if first is not name:
                kind, target = b"1", first
        if kind == b"2":
            target = tree.link_target(self._vol, inode)
        elif kind == b"0":
            size = inode.size
        records = self._records(name, target, size, inode)
        if kind != b"1" and self._xattrs and inode.xattr_size:
            records += [
                (b"SCHILY.xattr." + _escaped(key), value)
                for key, value in xattr.items(self._vol, inode)
            ]
        if records:
            body = b"".join(_record(key, value) for key, value in records)
            header = _header(b"./PaxHeaders/" + name[-80:].lstrip(b"/"), b"x", len(body))
            self._put(header + body + bytes(-len(body) % BLOCK))
        self._put(_header(name, kind, size, target, inode))
        if size:
            self._data(inode)
            self._put(bytes(-size % BLOCK))

    def close(self) -> None:
        """Write the end of the archive and flush; the file stays open."""
        self._put(bytes(2 * BLOCK))
        self._put(bytes(-self._written % RECORD))
        self._out.flush()

    def _records(
        self, name: bytes, target: bytes, size: int, inode: Inode
    ) -> list[tuple[bytes, bytes]]:
        """PAX records (key, value) for the fields that the ustar header can't hold."""
        found = []
        if len(name) > 100 or not name.isascii():
            found.append((b"path", name))
        if len(target) > 100 or not target.isascii():
            found.append((b"linkpath", target))
        if size > MAX_OCTAL_11:
            found.append((b"size", b"%d" % size))
        if inode.uid > MAX_OCTAL_7:
            found.append((b"uid", b"%d" % inode.uid))
        if inode.gid > MAX_OCTAL_7:
            found.append((b"gid", b"%d" % inode.gid))
        if inode.mtime_nsec or not 0 <= inode.mtime <= MAX_OCTAL_11:
            found.append((b"mtime", _pax_time(inode)))
        return found

    def _data(self, inode: Inode) -> None:
        for offset in range(0, inode.size, PIECE):
            self._put(data.read(self._vol, inode, offset, PIECE))

    def _put(self, what: bytes | bytearray | memoryview) -> None:
        self._out.write(what)
        self._written += len(what)


_TYPES = {
    stat.S_IFREG: b"0",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}


def _escaped(key: bytes) -> bytes:
    """An attribute's name for a PAX key, which ends at its first ``=``; escaped as GNU tar does."""
    return key.replace(b"%", b"%25").replace(b"=", b"%3D")


def _pax_time(inode: Inode) -> bytes:
    if inode.mtime >= 0 or not inode.mtime_nsec:
        return b"%d.%09d" % (inode.mtime, inode.mtime_nsec)
    # before 1970 the fraction counts away from zero
    seconds, nanoseconds = divmod(-inode.mtime_ns, 1_000_000_000)
    return b"-%d.%09d" % (seconds, nanoseconds)


def _record(key: bytes, value: bytes) -> bytes:
    """``LENGTH KEY=VALUE\\n``, where LENGTH counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _header(
    name: bytes, kind: bytes, size: int, target: bytes = b"", inode: Inode | None = None
) -> bytes:
    """One 512-byte ustar header.  Values that do not fit are cut or 0; a PAX record has them in
    full."""
    mode, uid, gid, mtime, major, minor = 0o644, 0, 0, 0, 0, 0
    if inode is not None:
        mode = stat.S_IMODE(inode.mode)
        uid = inode.uid if inode.uid <= MAX_OCTAL_7 else 0
        gid = inode.gid if inode.gid <= MAX_OCTAL_7 else 0
        mtime = inode.mtime if 0 <= inode.mtime <= MAX_OCTAL_11 else 0
        major, minor = os.major(inode.rdev), os.minor(inode.rdev)
    header = b"%s%07o\0%07o\0%07o\0%011o\0%011o\0        %s%sustar\00000%s%07o\0%07o\0%s" % (
        name[:100].ljust(100, b"\0"),
        mode,
        uid,
        gid,
        size if size <= MAX_OCTAL_11 else 0,
        mtime,
        kind,
        target[:100].ljust(100, b"\0"),
        bytes(64),
        major & MAX_OCTAL_7,
        minor & MAX_OCTAL_7,
        bytes(167),
    )
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]

"""What a mounted image answers: the semantics of the file system, for both engines.

Plain synchronous functions of a Volume.  With a FaultingMemory they raise Fault where bytes are
missing; the caller gets these and calls again.  Every request names a node id, which is computed from
the nid and back, so no answer depends on one before it.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import NamedTuple

from pyerofs.errors import CorruptImage, ErofsError
from pyerofs.format import data, directory, tree, xattr
from pyerofs.format import inode as inodes
from pyerofs.format.extent import extents
from pyerofs.format.model import HOLE, Dirent, Inode
from pyerofs.format.ondisk import FT_DIR, NAME_LEN
from pyerofs.format.volume import Volume
from pyerofs.sources.base import Buffer
from pyerofs.system.fuse.wire import ROOT_NODE

log = logging.getLogger("pyerofs-fuse")

MAX_INODES = 4096  # in the cache: requests for one inode come in bursts
MAX_REPORTED = 1024  # damaged inodes that are remembered, so that each is logged once

# FUSE reserves node id 1 for the root, 0 for "none".  An inode number of 0 or 1 gets a node id at the
# upper end, where no nid can be (such an inode would lie 2^68 bytes into the image).
_NODE_OF = {0: 2**64 - 2, 1: 2**64 - 1}
_NUMBER_OF = {node: number for number, node in _NODE_OF.items()}


class Refused(Exception):
    """A request that is answered with an errno."""

    def __init__(self, code: int) -> None:
        super().__init__(os.strerror(code))
        self.code = code


class Statfs(NamedTuple):
    """What statvfs(2) gives, in blocks of ``block_size`` bytes."""

    block_size: int
    blocks: int
    files: int
    free_files: int
    name_length: int


class Answers:
    """What one image answers."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self._root_nid = volume.sb.root_nid
        self._inodes: dict[int, Inode] = {}
        self._reported: set[int] = set()

    # node ids ----------------------------------------------------------------------------

    def nid_of(self, node: int) -> int:
        """The nid for a node id."""
        if node == ROOT_NODE:
            return self._root_nid
        return tree.nid_of(self.volume, _NUMBER_OF.get(node, node))

    def node_of(self, nid: int) -> int:
        """The node id for a nid."""
        if nid == self._root_nid:
            return ROOT_NODE
        number = tree.inode_number(self.volume, nid)
        return _NODE_OF.get(number, number)

    def number(self, nid: int) -> int:
        """st_ino, which the kernel's driver shows, too."""
        return tree.inode_number(self.volume, nid)

    def inode(self, node: int) -> Inode:
        """The inode of a node id."""
        found = self._inodes.get(node)
        if found is None:
            found = inodes.load(self.volume, self.nid_of(node))
            if len(self._inodes) >= MAX_INODES:
                self._inodes.clear()
            self._inodes[node] = found
        return found

    def directory(self, node: int) -> Inode:
        """The inode of a directory.  Raises Refused (ENOTDIR)."""
        found = self.inode(node)
        if not found.is_dir:
            raise Refused(errno.ENOTDIR)
        return found

    # names and attributes -------------------------------------------------------------------

    def lookup(self, node: int, name: bytes) -> Inode | None:
        """The inode of an entry; None where there is none.  ``.`` is the directory itself.

        Raises Refused (ENAMETOOLONG, ENOTDIR)."""
        if len(name) > NAME_LEN:
            raise Refused(errno.ENAMETOOLONG)
        if name == b".":  # for a file handle, of any inode: the kernel has forgotten it
            return self.inode(node)
        return tree.lookup(self.volume, self.directory(node), name)

    def blocks(self, inode: Inode) -> int:
        """st_blocks, in units of 512 bytes."""
        return tree.blocks_512(self.volume, inode)

    def readlink(self, node: int) -> bytes:
        """The target of a symbolic link."""
        return tree.link_target(self.volume, self.inode(node))

    def statfs(self) -> Statfs:
        """As the kernel's driver has it: all inodes but the used ones are free."""
        sb = self.volume.sb
        most = 2**64 - 1
        return Statfs(sb.block_size, sb.total_blocks, most, most - sb.inodes, NAME_LEN)

    def label(self) -> bytes:
        """The volume's name."""
        return self.volume.sb.volume_name

    # extended attributes ----------------------------------------------------------------------

    def getxattr(self, node: int, name: bytes, uid: int) -> bytes:
        """The value of an attribute.  ``trusted.*`` is for root.  Raises Refused (ENODATA)."""
        if uid == 0 or not name.startswith(b"trusted."):
            value = xattr.get(self.volume, self.inode(node), name)
            if value is not None:
                return value
        raise Refused(errno.ENODATA)

    def listxattr(self, node: int, uid: int) -> list[bytes]:
        """The names of all attributes that a user may see."""
        names = xattr.names(self.volume, self.inode(node))
        return [name for name in names if uid == 0 or not name.startswith(b"trusted.")]

    # directories ------------------------------------------------------------------------------

    def blocks_of(self, parent: Inode) -> int:
        """How many blocks a directory has."""
        return -(-parent.size // self.volume.sb.directory_block_size)

    def entries(self, parent: Inode, index: int, first: int = 0) -> list[Dirent]:
        """The entries of one block of a directory, from the entry numbered ``first`` on."""
        return directory.block_entries(self.volume, parent, index, first)

    def dot(self, parent: Inode) -> Dirent | None:
        """The entry ``.``, if the image leaves it out: then it is the last, as the kernel has it."""
        if not parent.dot_omitted:
            return None
        end = self.blocks_of(parent) * self.volume.sb.directory_block_size
        return Dirent(b".", parent.nid, FT_DIR, end + 1)

    def entry_inode(self, name: bytes, nid: int) -> Inode | None:
        """The inode of an entry, for a listing with attributes; None for ``.`` and ``..``, which need
        none.  Also None for a damaged inode, which is logged: the entry is listed, and stat(2) returns
        the error."""
        if name in (b".", b".."):
            return None
        try:
            return inodes.load(self.volume, nid)
        except ErofsError as e:
            self.report(e)
            return None

    # file data --------------------------------------------------------------------------------

    def file(self, node: int) -> Inode:
        """The inode of a regular file.  Raises Refused (EISDIR, EINVAL)."""
        inode = self.inode(node)
        if not inode.is_file:
            raise Refused(errno.EISDIR if inode.is_dir else errno.EINVAL)
        return inode

    def cuts(self, inode: Inode, offset: int, length: int) -> list[data.Cut]:
        """The extents that a read needs, and the part of each; see ``data.cuts``."""
        return [*data.cuts(self.volume, inode, offset, length)]

    def piece(self, inode: Inode, cut: data.Cut, sparse: bool) -> Buffer:
        """The bytes of one of them; see ``data.piece``."""
        return data.piece(self.volume, inode, *cut, sparse)

    def seek(self, node: int, offset: int, whence: int) -> int:
        """lseek(2) for SEEK_DATA and SEEK_HOLE.  Raises Refused (ENXIO, EINVAL)."""
        inode = self.file(node)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise Refused(errno.EINVAL)
        if not 0 <= offset < inode.size:
            raise Refused(errno.ENXIO)
        for extent in extents(self.volume, inode, offset, inode.size - offset):
            if (extent.kind == HOLE) == (whence == os.SEEK_HOLE):
                return max(offset, extent.start)
        if whence == os.SEEK_HOLE:
            return inode.size
        raise Refused(errno.ENXIO)

    # errors -----------------------------------------------------------------------------------

    def code_of(self, e: ErofsError, *, metadata: bool) -> int:
        """The errno for an error, as from the kernel's driver: EUCLEAN for corrupt metadata, EIO for
        corrupt data.  Logs the error."""
        self.report(e)
        if isinstance(e, CorruptImage) and not metadata:
            return errno.EIO
        return e.errno or errno.EIO

    def report(self, e: ErofsError) -> None:
        """Log an error, unless it is about a path (OSError); of CorruptImage only the first of each
        inode."""
        if isinstance(e, CorruptImage) and e.nid is not None:
            if e.nid in self._reported:
                return
            if len(self._reported) < MAX_REPORTED:
                self._reported.add(e.nid)
        if not isinstance(e, OSError):
            log.error("%s", e)

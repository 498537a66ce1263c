"""Directories: lookup by binary search, listing block by block.

A directory's data is a sequence of blocks.  A block starts with 12-byte records, sorted by name
(byte order) across the whole directory; the names follow.  A record gives the offset of its name;
the first name's offset therefore tells how many records there are, and each name ends where the
next one starts.  The last name ends at a NUL or at the end of the block (or directory).
"""

from __future__ import annotations

from collections.abc import Iterator

from pyerofs.errors import CorruptImage
from pyerofs.format.data import read
from pyerofs.format.model import Dirent, Inode
from pyerofs.format.ondisk import DIRENT, FT_DIR, NAME_LEN
from pyerofs.format.volume import Volume

_RECORD = DIRENT.unpack_from
_SIZE = DIRENT.size  # 12


def lookup(vol: Volume, directory: Inode, name: bytes) -> tuple[int, int] | None:
    """(nid, file type) of an entry, or None if there is none.  Reads O(log n) blocks.

    Raises CorruptImage, SourceError, or Fault (FaultingMemory only)."""
    if name == b"." and directory.dot_omitted:
        return directory.nid, FT_DIR
    size = vol.sb.directory_block_size
    low, high = 0, -(-directory.size // size)
    block, count = b"", 0
    while low < high:  # find the last block whose first name is not after ``name``
        middle = (low + high) // 2
        candidate, n = _block(vol, directory, middle)
        first = _name(candidate, 0, n, directory)
        if first == name:
            nid, _, file_type = _RECORD(candidate, 0)
            return nid, file_type
        if first < name:
            low = middle + 1
            block, count = candidate, n
        else:
            high = middle
    low, high = 1, count
    while low < high:
        middle = (low + high) // 2
        found = _name(block, middle, count, directory)
        if found == name:
            nid, _, file_type = _RECORD(block, middle * _SIZE)
            return nid, file_type
        if found < name:
            low = middle + 1
        else:
            high = middle
    return None


def entries(vol: Volume, directory: Inode, cookie: int = 0) -> Iterator[Dirent]:
    """The entries from ``cookie`` on, in stored order, including ``.`` and ``..`` if they are
    stored.

    Names are checked to be legal file names, but not to be sorted.  Raises as ``lookup`` does."""
    size = vol.sb.directory_block_size
    index, skip = divmod(cookie, size)
    while index * size < directory.size:
        yield from block_entries(vol, directory, index, -(-skip // _SIZE))
        index += 1
        skip = 0


def block_entries(vol: Volume, directory: Inode, index: int, first: int = 0) -> list[Dirent]:
    """The entries of one directory block, from number ``first`` on."""
    block, count = _block(vol, directory, index)
    if first >= count:
        return []
    base = index * vol.sb.directory_block_size
    records = [*DIRENT.iter_unpack(block[: count * _SIZE])]
    starts = [start for _, start, _ in records]
    last = starts[-1]
    length = len(block[last:].split(b"\0", 1)[0])
    ends = [*starts[1:], last + length]
    names = [block[start:end] for start, end in zip(starts, ends, strict=True)]
    # check all names at once: none may be empty, too long, or contain a NUL or slash
    text = block[count * _SIZE : last + length]
    lengths = [*map(len, names)]
    if (
        min(lengths) == 0
        or max(lengths) > NAME_LEN
        or sum(lengths) != len(text)
        or b"/" in text
        or b"\0" in text
    ):
        raise CorruptImage(f"bad name in directory block {index}", nid=directory.nid)
    cookies = [
        *range(base + _SIZE, base + count * _SIZE, _SIZE),
        base + vol.sb.directory_block_size,
    ]
    rows = zip(names, [r[0] for r in records], [r[2] for r in records], cookies, strict=True)
    found = [*map(Dirent._make, rows)]
    return found[first:] if first else found


def _block(vol: Volume, directory: Inode, index: int) -> tuple[bytes, int]:
    """One directory block, and its number of records."""
    size = vol.sb.directory_block_size
    block = bytes(read(vol, directory, index * size, size))
    if len(block) < _SIZE:
        raise CorruptImage(f"directory block {index} of {len(block)} bytes", nid=directory.nid)
    start = block[8] | block[9] << 8
    if start < _SIZE or start > len(block) or start % _SIZE:
        raise CorruptImage(
            f"first name of directory block {index} at byte {start}", nid=directory.nid
        )
    return block, start // _SIZE


def _name(block: bytes, i: int, count: int, directory: Inode) -> bytes:
    """The name of record ``i``, checked only to be non-empty: for comparisons."""
    at = i * _SIZE
    start = block[at + 8] | block[at + 9] << 8
    if i + 1 < count:
        end = block[at + 20] | block[at + 21] << 8
        name = block[start:end]
    else:
        name = block[start:].split(b"\0", 1)[0]
    if not name:
        raise CorruptImage(f"directory entry {i} without a name", nid=directory.nid)
    return name

"""dm-verity in user space: every read is checked against a hash tree, down from one trusted root hash.

The tree's blocks hold the digests of the blocks one level below; the lowest level holds those of the
data.  The levels lie one after another, the top one first.  (Linux's admin-guide, device-mapper/verity;
the superblock is cryptsetup's.)

A VeritySource sits above the cache, so it detects a corrupt cache; wrong blocks are dropped from the
cache and read once more.  The buffer returned is the one that was checked.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import threading
from dataclasses import dataclass
from typing import Any

import trio

from pyerofs.errors import IntegrityError, SourceError
from pyerofs.sources.base import AsyncSource, Buffer, Wrapper, check_range, within
from pyerofs.sources.spec import VeritySpec

log = logging.getLogger("pyerofs")

ALGORITHMS = {"sha1": 20, "sha256": 32, "sha512": 64}
MIN_BLOCK, MAX_BLOCK = 512, 1 << 19
MAX_SALT = 256
MAX_NODES = 16 << 20  # bytes of checked hash blocks that are kept
INLINE = 64 << 10  # bytes that are hashed on the event loop: 40 us; more are hashed in a thread

# signature, version, hash type, uuid, algorithm, data and hash block size, data blocks, salt size, salt
SUPERBLOCK = struct.Struct("<8sII16s32sIIQH6x256s168x")
SIGNATURE = b"verity\0\0"
assert SUPERBLOCK.size == 512


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of a hash tree; checked by ``check_parameters``."""

    root_hash: bytes
    algorithm: str
    salt: bytes
    data_block_size: int
    hash_block_size: int
    data_blocks: int
    start: int  # where the top level lies in the hash device
    old_format: bool = False  # hash type 0: the salt comes last, digests are not padded

    @property
    def digest_size(self) -> int:
        return ALGORITHMS[self.algorithm]

    @property
    def fan_out_bits(self) -> int:
        """Log2 of the number of digests in a hash block."""
        return (self.hash_block_size // self.digest_size).bit_length() - 1

    @property
    def entry_size(self) -> int:
        """Bytes from one digest to the next in a hash block."""
        if self.old_format:
            return self.digest_size
        return 1 << (self.digest_size - 1).bit_length()

    def digest(self, block: Buffer) -> bytes:
        """The salted digest of a block."""
        if self.old_format:
            found = hashlib.new(self.algorithm, block)
            found.update(self.salt)
        else:
            found = hashlib.new(self.algorithm, self.salt)
            found.update(block)
        return found.digest()


def levels(p: Parameters) -> list[tuple[int, int]]:
    """(offset, blocks) of each level in the hash device, the lowest first."""
    sizes = []
    blocks = p.data_blocks
    while blocks > 1:
        blocks = (blocks + (1 << p.fan_out_bits) - 1) >> p.fan_out_bits
        sizes.append(blocks)
    found = []
    position = p.start
    for size in reversed(sizes):
        found.append((position, size))
        position += size * p.hash_block_size
    return found[::-1]


def check_parameters(p: Parameters, name: str) -> Parameters:
    """Return the parameters if they are valid.  Raises SourceError."""
    for what, size in (("data", p.data_block_size), ("hash", p.hash_block_size)):
        if size & (size - 1) or not MIN_BLOCK <= size <= MAX_BLOCK:
            raise SourceError(f"{name}: a verity {what} block size of {size} makes no sense")
    if len(p.root_hash) != p.digest_size:
        raise SourceError(
            f"{name}: the verity root hash has {len(p.root_hash)} bytes, {p.algorithm} has"
            f" {p.digest_size}"
        )
    if len(p.salt) > MAX_SALT:
        raise SourceError(f"{name}: the verity salt is longer than {MAX_SALT} bytes")
    if not 0 < p.data_blocks <= 1 << 50:
        raise SourceError(f"{name}: {p.data_blocks} verity data blocks make no sense")
    if p.start % p.hash_block_size:
        raise SourceError(f"{name}: the hash tree's offset is no multiple of its block size")
    return p


def parse_superblock(data: Buffer, spec: VeritySpec, name: str) -> Parameters:
    """The parameters in a superblock.  Raises SourceError."""
    signature, version, kind, _, algorithm, data_size, hash_size, blocks, salt_size, salt = (
        SUPERBLOCK.unpack(data)
    )
    if signature != SIGNATURE:
        raise SourceError(
            f"{name}: no verity superblock there (without one, use --verity-no-superblock)"
        )
    if version != 1 or kind not in (0, 1):
        raise SourceError(f"{name}: verity superblock version {version}, type {kind}: not known")
    if salt_size > MAX_SALT:
        raise SourceError(f"{name}: the verity superblock's salt is {salt_size} bytes long")
    if not MIN_BLOCK <= hash_size <= MAX_BLOCK:
        raise SourceError(f"{name}: a verity hash block size of {hash_size} makes no sense")
    start = (spec.hash_offset or 0) + SUPERBLOCK.size
    return Parameters(
        _hex(spec.root_hash, name),
        _algorithm(algorithm.rstrip(b"\0").decode("ascii", "replace"), name),
        salt[:salt_size],
        data_size,
        hash_size,
        blocks,
        (start + hash_size - 1) // hash_size * hash_size,
        kind == 0,
    )


def given_parameters(spec: VeritySpec, size: int, name: str) -> Parameters:
    """The parameters of a tree without a superblock.  ``size``: bytes of the data's source."""
    blocks = spec.data_blocks
    if blocks is None:
        end = size if spec.hash_device is not None else spec.hash_offset or 0
        blocks = end // max(spec.data_block_size, 1)
    return Parameters(
        _hex(spec.root_hash, name),
        _algorithm(spec.algorithm, name),
        _hex(spec.salt, name),
        spec.data_block_size,
        spec.hash_block_size,
        blocks,
        spec.hash_offset or 0,
    )


def _hex(text: str, where: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise SourceError(f"{where}: {text!r} is not hexadecimal") from None


def _algorithm(name: str, where: str) -> str:
    lowered = name.lower().replace("-", "")
    if lowered not in ALGORITHMS:
        raise SourceError(f"{where}: the verity algorithm {name!r} is none of sha256, sha512, sha1")
    return lowered


async def open_verity(
    source: AsyncSource, spec: VeritySpec, hashes: AsyncSource | None
) -> VeritySource:
    """A source checked against its tree, which is in ``hashes`` or in ``source``.  Owns both.

    Raises SourceError."""
    tree = hashes if hashes is not None else source
    offset = spec.hash_offset or 0
    if spec.superblock:
        try:
            data = await tree.read_at(offset, SUPERBLOCK.size)
        except SourceError as e:
            raise SourceError(f"{tree.name}: no verity superblock at {offset} ({e})") from None
        found = parse_superblock(data, spec, tree.name)
    else:
        found = given_parameters(spec, source.size, tree.name)
    check_parameters(found, tree.name)
    if found.data_blocks * found.data_block_size > source.size:
        raise SourceError(
            f"{source.name}: has {source.size} bytes, its verity tree covers"
            f" {found.data_blocks * found.data_block_size}"
        )
    end = sum(size for _, size in levels(found)) * found.hash_block_size + found.start
    if end > tree.size:
        raise SourceError(f"{tree.name}: ends at {tree.size}, within its hash tree ({end})")
    return VeritySource(source, found, tree)


class VeritySource(Wrapper):
    """The data area of ``inner``, checked.  A mismatch raises IntegrityError, naming the block."""

    blocking = None  # blocking reads would be unchecked; ``peek`` checks bytes in memory
    backing = None
    quick = False
    verifiable = None  # each block is checked when it is read

    def __init__(self, inner: AsyncSource, parameters: Parameters, hashes: AsyncSource) -> None:
        super().__init__(inner)
        self.size = parameters.data_blocks * parameters.data_block_size
        self._hashes = hashes
        self._p = parameters
        self._levels = levels(parameters)
        self._nodes: dict[tuple[int, int], Buffer] = {}  # checked hash blocks
        self._lock = threading.Lock()
        self._max_nodes = max(MAX_NODES // parameters.hash_block_size, 64)

    def peek(self, offset: int, length: int) -> Buffer | None:
        if length <= 0 or length > INLINE or not within(self.size, offset, length):
            return None
        start, end = self._widened(offset, length)
        data = self.inner.peek(start, end - start)
        if data is None:
            return None
        first = start // self._p.data_block_size
        for number, want in self._wanted_now(first, end // self._p.data_block_size):
            if want is None or self._differs(data, number - first, want):
                return None  # read_at waits for the digests, or reads the block again
        return memoryview(data)[offset - start : offset - start + length]

    async def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        if not length:
            return b""
        start, end = self._widened(offset, length)
        size = self._p.data_block_size
        wanted = [await self._expected(0, n) for n in range(start // size, end // size)]
        data = await self.inner.read_at(start, end - start)
        wrong = await self._first_wrong(data, wanted)
        if wrong is not None and await self.inner.forget(start, end - start):
            log.warning(
                "%s: block %d is spoiled; reading it again", self.name, start // size + wrong
            )
            data = await self.inner.read_at(start, end - start)
            wrong = await self._first_wrong(data, wanted)
        if wrong is not None:
            block = start // size + wrong
            raise IntegrityError(
                f"{self.name}: block {block} (offset {block * size}) is not what its hash tree says"
            )
        return memoryview(data)[offset - start : offset - start + length]

    def status(self) -> dict[str, Any]:
        return self.inner.status() | {"verified": True}

    async def aclose(self) -> None:
        await self.inner.aclose()
        if self._hashes is not self.inner:
            await self._hashes.aclose()

    def _widened(self, offset: int, length: int) -> tuple[int, int]:
        """The range of whole blocks around a range."""
        size = self._p.data_block_size
        return offset // size * size, -(-(offset + length) // size) * size

    async def _first_wrong(self, data: Buffer, wanted: list[bytes]) -> int | None:
        """The first block of a buffer that differs from its digest."""

        def check() -> int | None:
            return next((i for i, want in enumerate(wanted) if self._differs(data, i, want)), None)

        if len(data) <= INLINE:
            return check()
        return await trio.to_thread.run_sync(check)

    def _differs(self, data: Buffer, index: int, want: bytes) -> bool:
        size = self._p.data_block_size
        return self._p.digest(memoryview(data)[index * size : (index + 1) * size]) != want

    # the tree ----------------------------------------------------------------------------

    def _entry(self, node: Buffer, index: int) -> bytes:
        """The digest of a block, from the hash block that holds it."""
        at = (index & ((1 << self._p.fan_out_bits) - 1)) * self._p.entry_size
        return bytes(node[at : at + self._p.digest_size])

    async def _expected(self, level: int, index: int) -> bytes:
        """The digest that a block must have: a data block at level 0, else a hash block."""
        if level == len(self._levels):
            return self._p.root_hash
        number = index >> self._p.fan_out_bits
        node = self._nodes.get((level, number))
        if node is None:
            want = await self._expected(level + 1, number)
            node = await self._load(level, number, want)
        return self._entry(node, index)

    async def _load(self, level: int, number: int, want: bytes) -> Buffer:
        offset, size = self._position(level, number), self._p.hash_block_size
        node = await self._hashes.read_at(offset, size)
        if self._p.digest(node) != want and await self._hashes.forget(offset, size):
            log.warning("%s: the hash block at %d is spoiled; reading it again", self.name, offset)
            node = await self._hashes.read_at(offset, size)
        if self._p.digest(node) != want:
            hint = "; is it the right root hash?" if level == len(self._levels) - 1 else ""
            raise IntegrityError(
                f"{self._hashes.name}: the hash block at {offset} is not what the one above it"
                f" says{hint}"
            )
        return self._keep(level, number, node)

    def _position(self, level: int, number: int) -> int:
        return self._levels[level][0] + number * self._p.hash_block_size

    def _keep(self, level: int, number: int, node: Buffer) -> Buffer:
        with self._lock:  # peek may be called from any thread
            while len(self._nodes) >= self._max_nodes:
                del self._nodes[next(iter(self._nodes))]
            self._nodes[level, number] = node
        return node

    def _wanted_now(self, first: int, end: int) -> list[tuple[int, bytes | None]]:
        """(number, digest) of data blocks; None for a digest that is not available without waiting."""
        return [(n, self._expected_now(0, n)) for n in range(first, end)]

    def _expected_now(self, level: int, index: int) -> bytes | None:
        """``_expected`` without waiting."""
        if level == len(self._levels):
            return self._p.root_hash
        number = index >> self._p.fan_out_bits
        node = self._nodes.get((level, number))
        if node is None:
            want = self._expected_now(level + 1, number)
            if want is None:
                return None
            node = self._hashes.peek(self._position(level, number), self._p.hash_block_size)
            if node is None or self._p.digest(node) != want:
                return None
            self._keep(level, number, node)
        return self._entry(node, index)

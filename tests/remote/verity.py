"""dm-verity trees, made by veritysetup."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tree:
    """Where a tree is, and all one has to say about it."""

    data: Path
    hashes: Path  # the same as data if the tree is appended
    root_hash: str
    hash_offset: int
    data_blocks: int
    superblock: bool
    algorithm: str
    salt: str
    data_block_size: int
    hash_block_size: int

    @property
    def appended(self) -> bool:
        return self.data == self.hashes

    @property
    def covered(self) -> int:
        """Bytes that can be verified."""
        return self.data_blocks * self.data_block_size


def available() -> bool:
    return veritysetup() is not None


def veritysetup() -> str | None:
    return shutil.which("veritysetup", path="/usr/sbin:/sbin:/usr/bin:/bin")


def make(
    data: Path,
    *,
    appended: bool = True,
    superblock: bool = True,
    algorithm: str = "sha256",
    salt: str | None = None,
    data_block_size: int = 4096,
    hash_block_size: int = 4096,
) -> Tree:
    """A tree over a file, which grows to whole blocks.  ``salt``: hex, ``""`` for none, None for a
    random one."""
    size = data.stat().st_size
    size += -size % max(data_block_size, hash_block_size)
    with data.open("r+b") as f:
        f.truncate(size)
    hashes = data if appended else data.with_name(data.name + ".verity")
    blocks = size // data_block_size
    words = [
        f"--hash={algorithm}",
        f"--data-block-size={data_block_size}",
        f"--hash-block-size={hash_block_size}",
        f"--data-blocks={blocks}",
    ]
    if salt is not None:
        words.append(f"--salt={salt or '-'}")
    if appended:
        words.append(f"--hash-offset={size}")
    if not superblock:
        words.append("--no-superblock")
    program = veritysetup()
    assert program is not None
    made = subprocess.run(
        [program, "format", *words, data, hashes],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    said = dict(line.split(":", 1) for line in made.stdout.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in said.items()}
    shown = found["Salt"]
    return Tree(
        data=data,
        hashes=hashes,
        root_hash=found["Root hash"],
        hash_offset=size if appended else 0,
        data_blocks=int(found["Data blocks"]),
        superblock=superblock,
        algorithm=found["Hash algorithm"],
        salt="" if shown == "-" else shown,
        data_block_size=int(found["Data block size"]),
        hash_block_size=int(found["Hash block size"]),
    )


def spoil(path: Path, offset: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as f:
        f.seek(offset)
        found = f.read(1)
        f.seek(offset)
        f.write(bytes([found[0] ^ 1]))

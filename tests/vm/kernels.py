"""Debian's kernels for the test machine: fetched with apt into a cache, unpacked, never installed.

A private apt state is used, so that neither the machine's sources nor its package lists matter.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITES = {"6.1": "bookworm", "6.12": "bookworm-backports"}
# what the guest needs until it has its root file system, and erofs; nbd stays out: `pyerofs-nbd`
# is to load it
MODULES = (
    "virtio_pci", "9pnet_virtio", "9p", "overlay", "crc32c_generic", "libcrc32c", "erofs", "fuse",
)  # fmt: skip
LATER = "nbd"


class Unavailable(Exception):
    """The kernel can't be had; the message says why."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: ``vmlinuz``, ``order`` and ``modules/NAME.ko`` in a directory."""

    release: str
    where: Path

    @property
    def image(self) -> Path:
        return self.where / "vmlinuz"

    @property
    def at_boot(self) -> list[Path]:
        """The modules to insert, in order."""
        names = (self.where / "order").read_text().split()
        return [self.where / "modules" / f"{name}.ko" for name in names]

    @property
    def later(self) -> Path:
        return self.where / "modules" / f"{LATER}.ko"


def cache() -> Path:
    """Where kernels are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "pyerofs-test-vm"


def kernel(version: str) -> Kernel:
    """A kernel, fetched if it is not there yet (100 MB).  Raises Unavailable."""
    where = cache() / f"{version}-{zlib.crc32(' '.join(MODULES).encode()):08x}"
    if not (where / "release").exists():
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache(), prefix="fetching-") as scratch:
            made = _unpack(_download(SUITES[version], Path(scratch)), Path(scratch))
            try:
                made.rename(where)
            except OSError:  # somebody else was faster
                if not (where / "release").exists():
                    raise
    return Kernel((where / "release").read_text().strip(), where)


def _run(*words: str | Path, cwd: Path) -> str:
    try:
        done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=600)
    except FileNotFoundError:
        raise Unavailable(f"there is no {words[0]}") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{words[0]} takes too long") from None
    if done.returncode:
        lines = (done.stderr.strip() or "no reason given").splitlines()
        raise Unavailable(f"{words[0]}: {lines[-1]}")
    return done.stdout


def _download(suite: str, scratch: Path) -> Path:
    if not KEYRING.exists():
        raise Unavailable(f"{KEYRING} is missing (package debian-archive-keyring)")
    for name in ("lists/partial", "archives/partial"):
        (scratch / name).mkdir(parents=True)
    sources = scratch / "sources.list"
    sources.write_text(f"deb [arch=amd64 signed-by={KEYRING}] {MIRROR} {suite} main\n")
    status = scratch / "status"
    status.touch()
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/nonexistent",
        "Dir::State": scratch,
        "Dir::State::Lists": scratch / "lists",
        "Dir::State::Status": status,
        "Dir::Cache": scratch,
        "Acquire::Languages": "none",
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
        "APT::Update::Error-Mode": "any",
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    _run("apt-get", "-q", *options, "update", cwd=scratch)
    listed = _run("apt-cache", *options, "depends", "linux-image-amd64", cwd=scratch)
    found = re.search(r"Depends: (linux-image-[0-9]\S+)", listed)
    if found is None:
        raise Unavailable(f"{suite} has no linux-image-amd64")
    _run("apt-get", "-q", *options, "download", found[1], cwd=scratch)
    return next(scratch.glob("*.deb"))


def _unpack(package: Path, scratch: Path) -> Path:
    root, made = scratch / "root", scratch / "made"
    root.mkdir()
    (made / "modules").mkdir(parents=True)
    _run("dpkg", "-x", package, root, cwd=scratch)
    image = next((root / "boot").glob("vmlinuz-*"))
    shutil.copy(image, made / "vmlinuz")
    there = {
        path.name.split(".")[0].replace("-", "_"): path
        for tree in ("lib/modules", "usr/lib/modules")
        for path in (root / tree).glob("**/*.ko*")
    }
    order: list[str] = []
    for name in MODULES:
        _collect(name, there, made / "modules", order)
    (made / "order").write_text("\n".join(order))
    late: list[str] = []
    _collect(LATER, there, made / "modules", late)
    assert late == [LATER], "it needs others"
    (made / "release").write_text(image.name.removeprefix("vmlinuz-"))
    return made


def _collect(name: str, there: dict[str, Path], where: Path, order: list[str]) -> None:
    """Copy a module and what it needs; the built-in ones are not there as files."""
    if name in order or name not in there:
        return
    path = there[name]
    data = path.read_bytes()
    if path.suffix == ".xz":
        data = lzma.decompress(data)
    found = re.search(rb"\0depends=([^\0]*)\0", data)
    for other in filter(None, found[1].decode().split(",") if found else []):
        _collect(other.replace("-", "_"), there, where, order)
    (where / f"{name}.ko").write_bytes(data)
    order.append(name)

"""Mount images for tests, and leave nothing of it behind."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pyerofs.system.status import live
from tests.fuse import libc
from tests.helpers import words
from tests.manifests import Manifest

COMMAND = Path(sysconfig.get_path("scripts")) / "pyerofs-fuse"
ENGINES = ("direct", "pyfuse3")
OPTIONS: list[str] = []  # of all mounts: the engine
PATIENCE = 30.0  # seconds for what should take none; a virtual machine may stand still for some

Word = str | Path


def run(*arguments: Word, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run pyerofs-fuse; returns when it has ended and nobody holds its output open any more."""
    return subprocess.run(
        [COMMAND, *OPTIONS, *arguments],
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=30,
        **how,
    )


@contextmanager
def using(engine: str) -> Iterator[str]:
    """An engine for all mounts.  Skips the test if it is not installed."""
    if engine == "pyfuse3" and importlib.util.find_spec(engine) is None:
        pytest.skip("pyfuse3 is not installed")
    OPTIONS[:] = [f"--engine={engine}"]
    yield engine
    OPTIONS.clear()


@contextmanager
def mounted(image: Path | Manifest, where: Path, *options: Word, **how: Any) -> Iterator[Path]:
    """An image mounted in the background at ``where``, a directory that is made if need be."""
    named = words(image) if isinstance(image, Manifest) else [image]
    with cleaned(where):
        done = run(*options, *named, where, **how)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        yield where


@contextmanager
def foreground(*arguments: Word, where: Path, **how: Any) -> Iterator[subprocess.Popen[str]]:
    """``pyerofs-fuse -f``, once it has mounted."""
    with (
        cleaned(where),
        subprocess.Popen(
            [COMMAND, "-f", *OPTIONS, *arguments, where],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how,
        ) as process,
    ):  # fmt: skip
        try:
            assert wait_until(lambda: is_mounted(where) or process.poll() is not None)
            assert process.poll() is None, process.communicate()
            yield process
        finally:
            process.kill()


@contextmanager
def cleaned(where: Path) -> Iterator[Path]:
    """A mount point; afterwards nothing is mounted there and no daemon of it runs."""
    if not os.path.lexists(where):
        where.mkdir()
    try:
        yield where
    finally:
        while is_mounted(where):
            unmount(where, "-z")
        assert wait_until(lambda: not kill(where))


def assert_one_line(done: subprocess.CompletedProcess[str]) -> None:
    """It failed, and said why in one line."""
    assert re.fullmatch(r"pyerofs-fuse: [^\n]+\n", done.stderr)
    assert (done.returncode, done.stdout) == (1, "")


def assert_refused(done: subprocess.CompletedProcess[str], where: Path) -> None:
    """It did not mount, said why in one line and left nothing behind."""
    assert_one_line(done)
    assert not is_mounted(where)
    assert wait_until(lambda: not daemons(where))


@contextmanager
def kernel_mounted(manifest: Manifest, where: Path) -> Iterator[Path]:
    """An image mounted by the kernel's own driver.  Skips the test where that is not possible."""
    options = [f"device={device}" for device in manifest.devices]
    options += [f"fsoffset={manifest.offset}"] if manifest.offset else []
    where.mkdir(exist_ok=True)
    try:
        libc.mount(manifest.image, where, "erofs", ",".join(options))
    except OSError as e:
        pytest.skip(f"the kernel's driver can't mount {manifest.image.name} here: {e.strerror}")
    try:
        yield where
    finally:
        libc.unmount(where)


def unmount(where: Path, *options: str, **how: Any) -> None:
    """What users do.  Again where it is busy: the daemon may be looking at its new mount itself."""
    command: list[Word] = ["fusermount3", "-u", *options, where]
    for _ in range(20):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, **how)
        if "busy" not in done.stderr:
            break
        time.sleep(0.05)
    assert done.returncode == 0, done.stderr


def wait_until(condition: Callable[[], object], patience: float = PATIENCE) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


class MountLine(NamedTuple):
    """A line of /proc/self/mounts, its escapes decoded."""

    source: str
    where: str
    kind: str
    options: list[str]


def mounts() -> list[MountLine]:
    """What is mounted in this namespace."""
    lines = Path("/proc/self/mounts").read_bytes().splitlines()
    return [_mount_line([_unescaped(field) for field in line.split(b" ")]) for line in lines]


def _mount_line(fields: list[str]) -> MountLine:
    return MountLine(fields[0], fields[1], fields[2], fields[3].split(","))


def _unescaped(field: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), field))


def mounts_at(where: Path) -> list[MountLine]:
    return [line for line in mounts() if line.where == os.fspath(where)]


def is_mounted(where: Path) -> bool:
    """Whether something is mounted there, alive or dead."""
    return bool(mounts_at(where))


def daemons(where: Path) -> list[int]:
    """The processes of pyerofs-fuse for one mount point."""
    return [
        pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _serves(pid, where)
    ]


def kill(where: Path) -> list[int]:
    """Kill all of these processes that there are now; each would replace another that has died."""
    found = daemons(where)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def keeper(where: Path) -> int:
    """The process of a mount that all others come from."""
    pids = daemons(where)
    return next((pid for pid in pids if parent(pid) not in (*pids, 0)), 0)


def servers(where: Path) -> list[int]:
    """The other processes of a mount."""
    main = keeper(where)
    return [pid for pid in daemons(where) if pid != main]


def status_of(where: Path) -> dict[str, Any]:
    """What a mount publishes of itself; empty while there is nothing."""
    return next((found for found in live() if found["mountpoint"] == os.fspath(where)), {})


def restart(where: Path) -> subprocess.CompletedProcess[str]:
    """``pyerofs mounts --restart``."""
    words = [sys.executable, "-m", "pyerofs", "mounts", "--restart", os.fspath(where)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


def digests(where: Path) -> dict[str, str]:
    """The SHA-256 of every regular file."""
    found = {}
    for folder, _, names in os.walk(where):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path):
                data = Path(path).read_bytes()
                found[os.path.relpath(path, where)] = hashlib.sha256(data).hexdigest()
    return found


def parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _serves(pid: int, where: Path) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")  # empty for zombies
    except OSError:
        return False  # ended meanwhile
    return os.fsencode(where) in words and os.fsencode(COMMAND) in words

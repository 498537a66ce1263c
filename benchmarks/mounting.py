"""Mount images in all the ways there are to compare, and look at the daemons that serve them."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from common import Report, cpu, drop_caches, find, memory

KERNEL, EROFSFUSE, PYEROFS, PYFUSE3 = SYSTEMS = ("kernel", "erofsfuse", "pyerofs", "pyfuse3")
READ = 1 << 20


class CannotMount(Exception):
    """This system does not mount this image; the message is one line."""


class System(Protocol):
    """Something that mounts."""

    name: str

    def mount(self, image: Path, where: Path) -> None:
        """Mount; return once it is live.  Raises CannotMount."""

    def daemons(self, where: Path) -> list[int]:
        """The processes that serve a mount; none where that is the kernel."""


class Command:
    """A command that mounts and leaves a daemon behind, or none."""

    def __init__(self, name: str, *words: str) -> None:
        self.name = name
        self._words = words

    def mount(self, image: Path, where: Path) -> None:
        self._run(image, where)

    def _run(self, *words: str | Path) -> None:
        """Run the command with more words.  Raises CannotMount."""
        done = subprocess.run(
            [*self._words, *words], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise CannotMount(said[-1] if said else f"exit status {done.returncode}")

    def daemons(self, where: Path) -> list[int]:
        """Their command lines name the mount point."""
        pids: list[int] = []
        if self.name != KERNEL:
            for found in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    if os.fsencode(where) in (found / "cmdline").read_bytes().split(b"\0"):
                        pids.append(int(found.name))
        return pids


def commands(report: Report) -> list[System]:
    """The systems that this machine has; notes about the others."""
    found: list[System] = []
    with open("/proc/filesystems") as f:
        known = "\terofs\n" in f.read()
    if os.geteuid():
        report.note("not root: the kernel's driver is skipped")
    elif not known and subprocess.run(["modprobe", "-q", "erofs"], check=False).returncode:
        report.note("this kernel has no erofs driver: skipped")
    else:
        found.append(Command(KERNEL, "mount", "-t", "erofs", "-o", "ro,loop"))
    for name, program, *words in (
        (EROFSFUSE, "erofsfuse"),
        (PYEROFS, "pyerofs-fuse", "--engine=direct"),
        (PYFUSE3, "pyerofs-fuse", "--engine=pyfuse3"),
    ):
        if path := find(program):
            found.append(Command(name, path, *words))
        else:
            report.note(f"{program} is not on PATH: skipped")
    return found


class Mount:
    """``with Mount(system, image) as m``: a new mount of an image, so that the kernel knows nothing
    of what is in it.  The image itself is in the page cache, unless it is to be ``cold``."""

    def __init__(self, system: System, image: Path, *, cold: bool = False) -> None:
        self.system = system
        self.path = Path()
        self.first_ls = 0.0  # seconds from the command to the first listing
        self._image = image
        self._cold = cold
        self._pids: list[int] = []

    def __enter__(self) -> Mount:
        if self._cold:
            drop_caches()
        else:
            warm(self._image)
        self.path = Path(tempfile.mkdtemp(prefix="pyerofs-bench-"))
        start = time.perf_counter()
        try:
            self.system.mount(self._image, self.path)
            os.listdir(self.path)
            self.first_ls = time.perf_counter() - start
            if not self.path.is_mount():
                raise CannotMount("nothing is mounted, though nothing was said")
        except BaseException:
            self._clean()
            raise
        self._pids = self.system.daemons(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._clean()

    def cpu(self) -> float:
        """CPU seconds the daemon has used so far, with all its processes; 0 if there is none."""
        return sum(map(cpu, self._pids))

    def memory(self) -> float:
        """MiB the daemon has now, with all its processes; 0 if there is none."""
        return sum(map(memory, self._pids))

    def _clean(self) -> None:
        if self.path.is_mount():
            unmount(self.path)
        end = time.monotonic() + 10  # a daemon that is still ending would disturb what comes next
        while any(map(alive, self._pids)) and time.monotonic() < end:
            time.sleep(0.01)
        self.path.rmdir()


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie (which its parent may never look after)."""
    with suppress(OSError):
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    return False


def unmount(where: Path) -> None:
    """Unmount, patiently."""
    words = [find("fusermount3") or "fusermount3", "-u"] if os.geteuid() else ["umount"]
    for _ in range(100):
        if not subprocess.run([*words, where], capture_output=True, check=False).returncode:
            return
        time.sleep(0.05)
    subprocess.run([*words, "-z" if os.geteuid() else "-l", where], check=False)


def warm(image: Path) -> None:
    """Get an image into the page cache."""
    read_files([str(image)])


# --- what is done with a mount ----------------------------------------------------------------


def walk(top: Path | str) -> list[str]:
    """List and lstat everything below a directory; returns the paths of the files."""
    files = []
    todo = [str(top)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    files.append(entry.path)
    return files


def names(top: Path | str) -> None:
    """List everything below a directory without a look at the files."""
    subprocess.run(["find", str(top)], stdout=subprocess.DEVNULL, check=True)


def read_files(paths: list[str]) -> int:
    """Read files from beginning to end; returns how many bytes that was."""
    buffer = bytearray(READ)
    total = 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            while True:
                n = os.readv(fd, [buffer])
                total += n
                if n < READ:
                    break
        finally:
            os.close(fd)
    return total

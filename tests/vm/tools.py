"""Attach, look and clean up, inside the test machine."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pyerofs_nbd import cli
from pyerofs_nbd.lifecycle import holder

from tests.helpers import words
from tests.manifests import Manifest

PATIENCE = 60.0  # seconds for what should take few, emulated and on a busy machine
RECOVERY = Path("/run/pyerofs/nbd")
COMMAND = [sys.executable, "-m", "pyerofs_nbd"]

NAME = b"pyerofs-nbd"
NEWNS, NEWNET = 0x20000, 0x40000000  # linux/sched.h
PRELOADED = holder  # so that forks need not load it

Word = str | Path


def run(
    *arguments: Word, before: Callable[[], None] = lambda: None
) -> subprocess.CompletedProcess[str]:
    """Run pyerofs-nbd; returns when it has ended and nobody holds its output open any more.

    ``before`` is called first, in the process that is then the command.
    In a fork of this process: it takes an emulated machine seconds to start Python."""
    sys.stdout.flush()
    sys.stderr.flush()
    pipes = [os.pipe() for _ in range(2)]
    pid = os.fork()
    if not pid:
        _be_the_command([str(w) for w in arguments], [write for _, write in pipes], before)
    for _, write in pipes:
        os.close(write)
    out, err = _all_of([read for read, _ in pipes])
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return subprocess.CompletedProcess([], status, out, err)


def unshare(flags: int) -> None:
    """Go into namespaces of one's own (CLONE_NEWNS: without mounts leaking out)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")
    if flags & NEWNS:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def _be_the_command(arguments: list[str], outputs: list[int], before: Callable[[], None]) -> None:
    status = 70
    try:
        for fd, wanted in ((os.open(os.devnull, os.O_RDWR), 0), (outputs[0], 1), (outputs[1], 2)):
            os.dup2(fd, wanted)
        sys.stdin, sys.stdout, sys.stderr = (
            open(fd, mode, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
            for fd, mode in ((0, "r"), (1, "w"), (2, "w"))
        )
        ctypes.CDLL(None).prctl(15, NAME, 0, 0, 0)  # PR_SET_NAME; servers() looks for it
        os.closerange(3, 1024)
        before()
        status = cli.main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as e:
        status = int(e.code or 0)
    finally:
        os._exit(status)


def _all_of(fds: list[int]) -> list[str]:
    """What comes out of some pipes until their ends."""
    found = dict.fromkeys(fds, b"")
    end = time.monotonic() + PATIENCE
    with selectors.DefaultSelector() as selector:
        for fd in fds:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0, end - time.monotonic()))
            assert ready, f"hangs, having said {found}"
            for key, _ in ready:
                data = os.read(key.fd, 65536)
                found[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
                    os.close(key.fd)
    return [found[fd].decode("utf-8", "surrogateescape") for fd in fds]


def attach(image: Path | Manifest, *options: Word) -> str:
    """Attach an image; returns the device."""
    named = words(image) if isinstance(image, Manifest) else [image]
    done = run(*options, *named)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found = re.fullmatch(r"(/dev/nbd\d+)\n", done.stdout)
    assert found, done.stdout
    return found[1]


def ok(*arguments: Word) -> str:
    """Run pyerofs-nbd, which must succeed and have nothing to complain about; what it printed."""
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def refused(*arguments: Word, before: Callable[[], None] = lambda: None) -> str:
    """Run pyerofs-nbd, which must fail with one line; what that says."""
    done = run(*arguments, before=before)
    assert (done.returncode, done.stdout) == (1, "")
    found = re.fullmatch(r"pyerofs-nbd: ([^\n]+)\n", done.stderr)
    assert found, done.stderr
    return found[1]


def attached() -> list[str]:
    """The devices that are attached."""
    return sorted(p.parent.name for p in Path("/sys/block").glob("nbd*/pid"))


def recovery_files() -> list[Path]:
    return sorted(RECOVERY.iterdir()) if RECOVERY.exists() else []


def servers() -> dict[int, list[str]]:
    """The processes of pyerofs-nbd: their command lines."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{name}/cmdline").read_bytes()  # empty for zombies
            comm = Path(f"/proc/{name}/comm").read_bytes() if command else b""
        except OSError:
            continue
        if b"pyerofs_nbd" in command or comm == NAME + b"\n":
            found[int(name)] = [os.fsdecode(w) for w in command.split(b"\0")]
    return found


def listed() -> list[dict[str, Any]]:
    found = json.loads(ok("--list", "--json"))
    assert isinstance(found, list)
    return found


def server_of(device: str) -> int:
    """The process that serves a device, as --list says."""
    (row,) = [row for row in listed() if row["device"] == device]
    assert isinstance(row["pid"], int)
    return row["pid"]


def wait_until(condition: Callable[[], object], patience: float = PATIENCE) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def nothing_left() -> bool:
    """No device, no file, no process, no mount."""
    return not (attached() or recovery_files() or servers() or "/dev/nbd" in mounts())


def assert_nothing_left() -> None:
    wait_until(nothing_left, 15)
    assert (attached(), recovery_files(), servers()) == ([], [], {})
    assert "/dev/nbd" not in mounts()


def mounts() -> str:
    return Path("/proc/self/mounts").read_text()


@contextmanager
def cleaned() -> Iterator[None]:
    """Afterwards nothing is attached, mounted or running, whatever went wrong."""
    try:
        yield
    finally:
        for pid in servers():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not servers(), 10)
        for name in attached():
            run("--disconnect", f"/dev/{name}")
        for line in reversed(mounts().splitlines()):
            if line.startswith("/dev/nbd"):
                where = line.split(" ")[1].replace("\\040", " ")
                subprocess.run(["umount", "-l", where], check=False)
        for path in recovery_files():
            path.unlink()


def kill(pid: int) -> None:
    """kill -9, and wait until it is gone (its parent may be anybody)."""
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: pid not in servers())


def forget_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3")


class Read(NamedTuple):
    """What came of reading a file: its hash, how many seconds the longest read took, and when that
    one ended, by ``time.monotonic()``, which is the same in all processes."""

    digest: str
    longest: float
    until: float


class Reader:
    """Another process that hashes a file from a device, again and again without caches."""

    CODE = """
import hashlib, sys, time
gap, end, last = 0, 0, time.monotonic()
digest = hashlib.sha256()
with open(sys.argv[1], "rb", buffering=0) as f:
    print("open", flush=True)
    sys.stdin.readline()
    while data := f.read(1 << 16):
        now = time.monotonic()
        gap, end = max((gap, end), (now - last, now))
        digest.update(data)
        time.sleep(float(sys.argv[2]))
        last = time.monotonic()
print(digest.hexdigest(), gap, end, flush=True)
"""

    def __init__(self, path: Word, pause: float = 0.0, *, waiting: bool = False) -> None:
        """With ``waiting`` it only opens the file, and reads it from ``begin`` on."""
        forget_caches()
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, str(path), str(pause)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "open\n"
        if not waiting:
            self.begin()

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def result(self) -> Read:
        out, _ = self.process.communicate(timeout=PATIENCE)
        digest, longest, until = out.split()
        return Read(digest, float(longest), float(until))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def report(what: str) -> None:
    """Say a figure on the console, and with -s or -rP."""
    print(f"@@ {what}")

"""A mount outlives its servers, and its keeper: kills, stops, and requests that kill."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.fuse.mounting import (
    COMMAND,
    PATIENCE,
    daemons,
    digests,
    is_mounted,
    keeper,
    kill,
    mounted,
    parent,
    servers,
    unmount,
    wait_until,
)
from tests.manifests import IMAGES

IMAGE = IMAGES / "lz4hc.erofs"


def has_succeeded(where: Path, before: list[int]) -> bool:
    """Whether one of these servers has become the keeper, and has as many servers."""
    return keeper(where) in before and len(servers(where)) == len(before)


READER = """
import hashlib, os, random, sys, time
where, seconds = sys.argv[1], float(sys.argv[2])
want = dict(line.rstrip("\\0").rsplit("=", 1) for line in sys.stdin.read().split("\\0\\0") if line)
end = time.monotonic() + seconds
count = 0
names = sorted(want)
random.seed(os.getpid())
while time.monotonic() < end:
    name = random.choice(names)
    path = os.path.join(where, name)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    digest = hashlib.sha256()
    while data := os.read(fd, 1 << 16):
        digest.update(data)
    os.close(fd)
    assert digest.hexdigest() == want[name], name
    os.listdir(os.path.dirname(path))
    os.stat(path)
    count += 1
print(count)
"""


class Readers:
    """Processes that read files of a mount at random and compare them."""

    def __init__(self, where: Path, want: dict[str, str], seconds: float, count: int = 4) -> None:
        text = "\0\0".join(f"{name}={digest}" for name, digest in want.items())
        self._running = []
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-c", READER, where, str(seconds)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                errors="surrogateescape",
            )  # fmt: skip
            assert process.stdin is not None
            process.stdin.write(text)
            process.stdin.close()
            process.stdin = None
            self._running.append(process)

    @property
    def are_running(self) -> bool:
        return any(process.poll() is None for process in self._running)

    def finish(self, patience: float = 60) -> int:
        """How many files they have read; fails if one of them has."""
        total = 0
        for process in self._running:
            output, errors = process.communicate(timeout=patience)
            assert process.returncode == 0, errors[-500:]
            total += int(output)
        return total


def drop_caches() -> None:
    with suppress(PermissionError):
        Path("/proc/sys/vm/drop_caches").write_text("3")


def test_servers_are_killed_again_and_again(mount: Path, want: dict[str, str]) -> None:
    readers = Readers(mount, want, 5)
    kills = 0
    while readers.are_running:
        time.sleep(random.uniform(0.05, 0.3))
        for pid in servers(mount):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                kills += 1
        drop_caches()
    assert readers.finish() > 0
    assert kills > 5
    assert digests(mount) == want


def test_a_stopped_server_is_replaced(mount: Path, want: dict[str, str]) -> None:
    before = servers(mount)
    for pid in before:
        os.kill(pid, signal.SIGSTOP)
    readers = Readers(mount, want, 0.5, count=2)
    assert readers.finish() > 0
    assert not set(before) <= set(daemons(mount))


def test_the_keeper_is_killed(mount: Path, want: dict[str, str]) -> None:
    for _ in range(3):
        before = servers(mount)
        os.kill(keeper(mount), signal.SIGKILL)
        assert wait_until(partial(has_succeeded, mount, before))
        assert digests(mount) == want
        for pid in servers(mount):
            os.kill(pid, signal.SIGKILL)
        drop_caches()
        assert digests(mount) == want
    unmount(mount)
    assert wait_until(lambda: not daemons(mount))


def test_both_are_killed(mount: Path) -> None:
    assert wait_until(lambda: not kill(mount))
    with pytest.raises(OSError) as caught:
        os.listdir(mount)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_a_server_changes_nothing(number: signal.Signals, mount: Path) -> None:
    before = servers(mount)
    for pid in before:
        os.kill(pid, number)
    time.sleep(0.2)
    assert os.listdir(mount)
    assert servers(mount) == before


def test_another_image_in_the_place_of_the_first(
    tmp_path: Path, where: Path, want: dict[str, str]
) -> None:
    """A successor reads the image that was mounted, not what has its name now."""
    path = tmp_path / "image"
    path.write_bytes(IMAGE.read_bytes())
    with mounted(path, where):
        other = tmp_path / "other"
        other.write_bytes((IMAGES / "zstd.erofs").read_bytes())
        other.rename(path)
        for pid in servers(where):
            os.kill(pid, signal.SIGKILL)
        drop_caches()
        assert digests(where) == want


@pytest.mark.parametrize("moment", [0.0, 0.001, 0.003, 0.01, 0.05])
def test_unmounting_while_a_server_is_replaced(moment: float, mount: Path) -> None:
    for pid in servers(mount):
        os.kill(pid, signal.SIGKILL)
    time.sleep(moment)
    unmount(mount)
    assert not is_mounted(mount)
    assert wait_until(lambda: not daemons(mount))


def test_what_the_processes_have_open(mount: Path) -> None:
    """Nothing of the command that started them, and the keeper nothing but what servers need."""
    for pid in daemons(mount):
        links = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        files = {link for link in links if link.startswith("/") and link != os.devnull}
        assert {link for link in files if not link.startswith("/run/")} == {
            "/dev/fuse",
            os.fspath(IMAGE),
        }


def alter(change: str, tmp_path: Path) -> Path:
    """A program that changes the code of pyerofs-fuse before it runs it."""
    program = tmp_path / "altered.py"
    program.write_text(
        "import os, sys, time\n"
        "from pyerofs.system import keeper\n"
        "from pyerofs_fuse.cli import run\n"
        "from pyerofs_fuse.direct import server\n"
        f"{change}\n"
        "sys.argv[:2] = sys.argv[1:2]\n"
        "run()\n"
    )
    return program


def mount_altered(change: str, where: Path, tmp_path: Path) -> None:
    """Mount by a command that has changed its own code before it runs."""
    program = alter(change, tmp_path)
    done = subprocess.run(
        [sys.executable, program, COMMAND, IMAGE, where], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def assert_that_file_fails(where: Path) -> None:
    """One file fails, the others do not."""
    with pytest.raises(OSError) as caught:
        (where / "size-4097").read_bytes()
    assert caught.value.errno == errno.EIO
    assert len((where / "size-4096").read_bytes()) == 4096


DEADLY = """
read = server.DirectServer._read
def deadly(self, request):
    inode = self._answers.inode(request.node)
    if inode.size == 4097:
        os.kill(os.getpid(), 11)
    return read(self, request)
server.DirectServer._read = deadly
"""


def test_a_request_that_kills_every_server_fails(where: Path, tmp_path: Path) -> None:
    mount_altered(DEADLY, where, tmp_path)
    assert_that_file_fails(where)


STUCK = """
keeper.Keeper.__init__.__kwdefaults__["patience"] = 0.5
read = server.DirectServer._read
def stuck(self, request):
    if self._answers.inode(request.node).size == 4097:
        time.sleep(1000)
    return read(self, request)
server.DirectServer._read = stuck
"""


def test_a_request_that_every_server_is_stuck_at_fails(where: Path, tmp_path: Path) -> None:
    mount_altered(STUCK, where, tmp_path)
    assert_that_file_fails(where)


BROKEN = """
server.DirectServer.run = lambda self, what: os._exit(9)
"""


def test_servers_that_never_start(where: Path, tmp_path: Path) -> None:
    mount_altered(BROKEN, where, tmp_path)
    assert wait_until(lambda: not daemons(where))
    with pytest.raises(OSError) as caught:
        os.listdir(where)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)


def test_the_first_server_dies_while_it_opens_a_far_image(where: Path) -> None:
    """The command says so, instead of waiting for a report that will not come."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/image"
        command = [os.fspath(COMMAND), "--engine=direct", url, os.fspath(where)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert wait_until(lambda: is_mounted(where))
            connection, _ = silent.accept()  # a server is opening the image
            with connection:
                daemon = next(pid for pid in daemons(where) if parent(pid) == process.pid)
                (server,) = (pid for pid in daemons(where) if parent(pid) == daemon)
                os.kill(server, signal.SIGKILL)
                _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert errors == f"pyerofs-fuse: {url}: the server died while it opened the image\n"
    assert not is_mounted(where)
    assert wait_until(lambda: not daemons(where))

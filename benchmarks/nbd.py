"""How fast does pyerofs-nbd serve what is at hand?

Compares it with nbdkit's file plugin, qemu-nbd and nbd-server: one connection over a unix socket, a
local file that is in the page cache.  The client (nbdload.py) is a process of its own that does next
to nothing but keep requests in flight; nbdcopy, where installed, checks its findings.  All servers run
all the time, idle but for their turn, and take turns in every round.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import common
from common import HERE, Report, options, parse, say, timed

OURS = "pyerofs-nbd"
SIZE = 512 << 20
QUICK_SIZE = 32 << 20
SERVING = "--serve"


@dataclass(frozen=True)
class Probe:
    """A load: reads of ``size`` bytes, ``depth`` in flight, ``total`` in all."""

    what: str
    size: int
    depth: int
    total: int
    random: bool = False

    @property
    def unit(self) -> str:
        return "kIOPS" if self.random else "MB/s"


PROBES = (
    Probe("sequential 256 KiB, depth 8", 256 << 10, 8, 16384),
    Probe("random 4 KiB, depth 16", 4096, 16, 200_000, random=True),
    Probe("random 4 KiB, depth 1", 4096, 1, 20_000, random=True),
)


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    name: str
    socket: Path
    export: str
    pid: int

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.export}?socket={quote(str(self.socket))}"


def commands(image: Path, where: Path) -> dict[str, Sequence[str | Path]]:
    """What starts each server, in the foreground, on ``where/NAME``."""
    config = where / "nbd-server.conf"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]  # nbd-server wants one, whatever else it listens on
    config.write_text(
        f"[generic]\nunixsock = {where / 'nbd-server'}\nlistenaddr = 127.0.0.1\nport = {port}\n"
        f"[disk]\nexportname = {image}\nreadonly = true\n"
    )
    return {
        OURS: [sys.executable, __file__, SERVING, where / OURS, image],
        "nbdkit": ["nbdkit", "-f", "-r", "-U", where / "nbdkit", "file", image],
        "qemu-nbd": [
            "qemu-nbd",
            "-r",
            "-t",
            "-f",
            "raw",
            "-e",
            "4",
            "-k",
            where / "qemu-nbd",
            image,
        ],
        "nbd-server": ["nbd-server", "-C", config, "-p", where / "nbd-server.pid"],
    }


@contextmanager
def serving(name: str, command: Sequence[str | Path], where: Path) -> Iterator[Served]:
    """A server, once it listens.  Raises ValueError if it does not."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid = child.pid
    try:
        for _ in range(500):
            if answers(where / name):
                break
            time.sleep(0.02)
        else:
            raise ValueError(f"{name} does not start")
        if (note := where / f"{name}.pid").exists():
            pid = int(note.read_text())  # it has left for the background
        yield Served(name, where / name, "disk" if name == "nbd-server" else "", pid)
    finally:
        if pid != child.pid:
            os.kill(pid, signal.SIGTERM)
        child.terminate()
        child.wait()


def answers(path: Path) -> bool:
    """Whether a server listens on a unix socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def serve(path: str, image: str) -> None:
    """Be the server: what pyerofs-nbd does with --socket."""
    import trio
    from pyerofs_nbd.server import listen
    from pyerofs_nbd.server.exports import Export, Server

    from pyerofs.sources import FileSource
    from pyerofs.sources.local.threaded import ThreadedSource

    async def main() -> None:
        server = Server([Export("", ThreadedSource(FileSource(image)))])
        await listen.serve(server, [listen.unix(path)])

    trio.run(main)


def measure(probe: Probe, served: Served, span: int, shrink: int) -> float:
    """One sample, in the probe's unit."""
    count = max(probe.depth, probe.total // shrink)
    words = [served.socket, served.export, probe.size, probe.depth, count, span]
    words += ["random"] if probe.random else []
    command = [sys.executable, str(HERE / "nbdload.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = float(done.stdout)
    return (count / 1e3 if probe.random else count * probe.size / 1e6) / seconds


def main() -> None:
    """Measure all that is installed."""
    parser = options(__doc__, rounds=5, images=False)
    args = parse(parser)
    common.MORE_IS_BETTER.add("kIOPS")
    size, shrink = (QUICK_SIZE, 50) if args.quick else (SIZE, 1)
    others = ["nbdkit", "qemu-nbd", "nbd-server"]
    report = Report(
        "nbd", "NBD servers, a cached local file over a unix socket", [OURS, *others], others, OURS
    )
    with ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        image = where / "image"
        with image.open("wb") as f:
            for _ in range(size >> 20):
                f.write(os.urandom(1 << 20))
            os.fsync(f.fileno())  # pages under writeback may not count as cached
        running = []
        for name, command in commands(image, where).items():
            if name != OURS and shutil.which(name) is None:
                report.note(f"{name} is not installed")
                continue
            try:
                running.append(stack.enter_context(serving(name, command, where)))
            except ValueError as e:
                report.note(str(e))
        copier = shutil.which("nbdcopy")
        for n in range(args.rounds):
            say(f"round {n + 1} of {args.rounds}")
            for probe in PROBES:
                for served in running:
                    before = common.cpu(served.pid)
                    value = measure(probe, served, size, shrink)
                    report.add("nbdload", probe.what, probe.unit, served.name, value)
                    used = common.cpu(served.pid) - before
                    if served.name != "nbd-server":  # which forks for every client
                        report.add("nbdload", f"{probe.what}: CPU", "s", served.name, used)
            for served in running if copier else ():
                words = ["nbdcopy", "--connections=1", served.uri, "null:"]
                seconds = timed(lambda words=words: subprocess.run(words, check=True))
                report.add("nbdcopy", "the whole file", "MB/s", served.name, size / 1e6 / seconds)
    report.finish(args)


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVING]:
        serve(*sys.argv[2:4])
    else:
        main()

"""``pyerofs extract`` and ``check`` by several processes, as with large images: the same comes out."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from pyerofs.cli.workers import MANY, Threads, Workers, WorkersEnded, hire
from tests.helpers import extracted, words
from tests.manifests import Manifest, differences, golden

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

# Work with processes however few inodes there are; and say whether that was so.
SCRIPT = """
import os, sys
from pyerofs.cli import workers
from pyerofs.cli.main import main
workers.MANY = 0
fork, forked = os.fork, []
os.fork = lambda: forked.append(1) or fork()
os.cpu_count = lambda: 3
status = main(sys.argv[1:])
assert len(forked) == 3
sys.exit(status)
"""


def extract(want: Manifest, where: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, "extract", *words(want), "-C", str(where)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def check(image: Path, *more: str, script: bool) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-c", SCRIPT] if script else [sys.executable, "-m", "pyerofs"]
    command = [*start, "check", "--json", str(image), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@as_root
@pytest.mark.parametrize(
    "name", ["plain", "kitchen-sink", "dedupe-frag-zstd", "lzma", "xattr-filter"]
)
def test_everything_is_as_it_was(name: str, tmp_path: Path) -> None:
    """Hard links across directories, devices, holes and all."""
    want = golden(name)
    done = extract(want, tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert differences(want, extracted(want, tmp_path / "out")) == []


def test_what_is_there_already_is_counted(tmp_path: Path) -> None:
    want = golden("plain")
    (tmp_path / "text").write_text("mine")
    done = extract(want, tmp_path)
    assert done.returncode == 1
    assert "text: File exists" in done.stderr
    assert "1 files could not be extracted" in done.stderr
    assert (tmp_path / "text").read_text() == "mine"


@as_root
def test_a_full_disk_ends_it(tmp_path: Path) -> None:
    """One line, and nobody waits for anybody for ever."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("can't mount a tmpfs here")
    try:
        done = extract(golden("plain"), tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert done.returncode == 1
    assert done.stderr.endswith("No space left on device\n")
    assert "Traceback" not in done.stderr


def test_workers_share_the_jobs() -> None:
    done: list[int] = []
    workers = Workers[int, list[int]](lambda n, _: done.append(n), lambda: done)
    for number in range(1000):
        workers.submit(number)
    found = workers.close()
    assert sorted(n for part in found for n in part) == list(range(1000))
    assert done == []


def keep_busy(workers: Workers[int, None] | Threads[int, None]) -> None:
    while True:
        workers.submit(1)


def test_a_worker_that_dies() -> None:
    workers = Workers[int, None](lambda *_: os._exit(7), lambda: None)
    with pytest.raises(WorkersEnded):
        keep_busy(workers)
    with pytest.raises(OSError, match="worker process died"):
        workers.close()


@pytest.mark.parametrize("inodes", [0, MANY])
def test_an_error_is_raised_where_it_can_be_told(inodes: int) -> None:
    def work(_: int, fd: int) -> None:
        raise OSError(28, "full", "here")

    workers = hire(work, lambda: None, inodes)
    assert isinstance(workers, Workers if inodes and os.cpu_count() != 1 else Threads)
    with pytest.raises(WorkersEnded):
        keep_busy(workers)
    with pytest.raises(OSError, match="full") as caught:
        workers.close()
    assert (caught.value.errno, caught.value.filename) == (28, "here")


@pytest.mark.parametrize("name", ["plain", "kitchen-sink", "dedupe-frag-zstd", "metabox"])
def test_a_check_of_what_is_sound(name: str) -> None:
    want = golden(name)
    done = check(want.image, *(f"--device={d}" for d in want.devices), script=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout
        == check(want.image, *(f"--device={d}" for d in want.devices), script=False).stdout
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_check_of_what_is_not(seed: int, tmp_path: Path) -> None:
    """The same problems are found, whoever looks."""
    image = bytearray(golden("dedupe-frag-zstd").image.read_bytes())
    chance = random.Random(seed)
    for _ in range(40):  # behind the superblock
        image[chance.randrange(4096, len(image))] ^= 0xFF
    broken = tmp_path / "broken.erofs"
    broken.write_bytes(image)
    done = check(broken, script=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == check(broken, script=False).stdout
    assert len(json.loads(done.stdout)["problems"]) > 1

"""Processes that fetch are killed at random moments; what they leave behind is never wrong.

PYEROFS_CRASHES says how often: 20 times by default.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from pyerofs.errors import ErofsError
from tests.remote import faults, oci
from tests.remote.pretend import Pretend, serve
from tests.remote.reading import (
    HANG,
    SEGMENT,
    access,
    assert_all_right,
    big,
    command,
    opened,
    read_pieces,
    reader,
)
from tests.remote.server import Content, Request, Server

CRASHES = int(os.environ.get("PYEROFS_CRASHES", "20"))
IMAGE = big(24)
DIGEST = hashlib.sha256(IMAGE.content).hexdigest() + "\n"
SLOWLY = faults.trickle(100 << 20)  # so that there is a middle to be killed in


@pytest.mark.parametrize("kind", ["http", "oci"])
def test_killed(kind: str, tmp_path: Path) -> None:
    """Every cache is crashed into twice: while it is made, and while it is filled further."""
    chance = random.Random(7)
    registry = Pretend()
    oci.publish(registry, "app", "1", oci.image(IMAGE.image))
    with serve(registry) if kind == "oci" else Server(Content(IMAGE.image)) as server:
        what = f"oci://{server.authority}/app:1" if kind == "oci" else server.url
        kept = 0
        for n in range(max(2, CRASHES // 2)):
            directory = tmp_path / f"cache-{n // 2}"
            server.inject(SLOWLY)
            server.forget()
            process = reader(what, directory)
            _kill_somewhere(process, server, chance)
            kept += _right_segments(server, what, directory)
            server.heal()
            with opened(what, access(cache_dir=str(directory))) as image:
                some = [0, 7 << 20, chance.randrange(24 << 20)]
                assert_all_right(read_pieces(image, IMAGE.content, some))
        for directory in tmp_path.glob("cache-*"):
            _check_and_finish(what, directory)
    assert kept  # some of them came late enough to leave something


def _kill_somewhere(process: subprocess.Popen[str], server: Server, chance: random.Random) -> None:
    """Kill it when a random part of the blob has been sent, or a little after all of it."""
    moment = chance.random() * 1.2 * len(IMAGE.image)
    while server.sent < min(moment, len(IMAGE.image)) and process.poll() is None:
        time.sleep(0.0005)
    time.sleep(chance.random() * (0.1 if moment > len(IMAGE.image) else 0.003))
    process.kill()
    _, err = process.communicate(timeout=HANG)
    assert err == ""


def _right_segments(server: Server, what: str, directory: Path) -> int:
    """How many segments are there, seen while the server gives out no more; none may be wrong."""

    def is_data(request: Request) -> bool:
        # over HTTP the first segment comes with the news about the version
        return request.range is not None and (request.range[0] > 0 or "/blobs/" in request.path)

    server.heal()
    server.inject(faults.refused(404), when=is_data)
    try:
        with opened(what, access(cache_dir=str(directory))) as image:
            found = read_pieces(image, IMAGE.content, length=SEGMENT)
    except ErofsError:
        return 0  # not even the beginning is there
    assert found.wrong == 0
    return found.right


def _check_and_finish(what: str, directory: Path) -> None:
    done = command("cache", "verify", "--cache-dir", directory)
    assert done.returncode == 0, done.stdout + done.stderr
    process = reader(what, directory)
    assert process.communicate(timeout=HANG) == (DIGEST, "")


def test_killed_one_by_one(tmp_path: Path) -> None:
    """Four share a cache; the last one has to finish what the others began."""
    chance = random.Random(3)
    with Server(Content(IMAGE.image), rate=30 << 20) as server:
        processes = [reader(server.url, tmp_path / "cache") for _ in range(4)]
        for i, process in enumerate(processes[:3]):
            while server.sent < (i + 1) * (6 << 20) and process.poll() is None:
                time.sleep(0.001)
            time.sleep(chance.random() * 0.02)
            process.kill()
            process.communicate(timeout=HANG)
        assert processes[3].communicate(timeout=HANG) == (DIGEST, "")
    _check_and_finish_offline(tmp_path / "cache")


def _check_and_finish_offline(directory: Path) -> None:
    done = command("cache", "verify", "--cache-dir", directory)
    assert done.returncode == 0, done.stdout + done.stderr

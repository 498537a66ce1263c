"""What the NBD tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.nbd.client", "tests.nbd.rig", "tests.nbd.fuzz_streams")

from pyerofs.sources import FileSource  # noqa: E402  after that
from pyerofs.sources.local.threaded import ThreadedSource  # noqa: E402
from tests.nbd.rig import DATA, Rig, memory  # noqa: E402


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A server of DATA, from memory."""
    with Rig(memory()) as running:
        yield running


@pytest.fixture
def file_rig(tmp_path: Path) -> Iterator[Rig]:
    """A server of DATA, from a file."""
    path = tmp_path / "data"
    path.write_bytes(DATA)
    with Rig(ThreadedSource(FileSource(path))) as running:
        yield running

"""What the FUSE tests need of the machine, and places to mount at."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.fuse.mounting")

from tests.fuse.mounting import COMMAND, cleaned  # noqa: E402  after that


@pytest.fixture(scope="session", autouse=True)
def _able_to_mount() -> None:
    if importlib.util.find_spec("pyfuse3") is None:
        pytest.skip("pyfuse3 is not installed")
    if not COMMAND.exists():
        pytest.skip("pyerofs is not installed, only importable")
    if shutil.which("fusermount3") is None:
        pytest.skip("no fusermount3")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse can't be opened")


@pytest.fixture
def where(tmp_path: Path) -> Iterator[Path]:
    """A mount point."""
    with cleaned(tmp_path / "mnt"):
        yield tmp_path / "mnt"

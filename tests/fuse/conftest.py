"""What the FUSE tests need of the machine, and places to mount at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.fuse.mounting")

from tests.fuse import mounting  # noqa: E402  after that
from tests.fuse.mounting import COMMAND, cleaned  # noqa: E402  after that
from tests.manifests import IMAGES  # noqa: E402  after that

LZ4HC = IMAGES / "lz4hc.erofs"


@pytest.fixture(scope="session", autouse=True)
def _able_to_mount() -> None:
    if not COMMAND.exists():
        pytest.skip("pyerofs is not installed, only importable")
    if shutil.which("fusermount3") is None:
        pytest.skip("no fusermount3")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse can't be opened")


@pytest.fixture(params=mounting.ENGINES, scope="session", autouse=True)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs with each engine."""
    with mounting.using(request.param) as name:
        yield name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The keeper is the direct engine's."""
    items[:] = [
        item
        for item in items
        if "[pyfuse3" not in item.nodeid
        or not any(name in item.nodeid for name in ("test_keeper.py", "test_restart.py"))
    ]


@pytest.fixture
def where(tmp_path: Path) -> Iterator[Path]:
    """A mount point."""
    with cleaned(tmp_path / "mnt"):
        yield tmp_path / "mnt"


@pytest.fixture
def mount(where: Path) -> Iterator[Path]:
    """A mount of LZ4HC, whose files ``want`` describes."""
    with mounting.mounted(LZ4HC, where):
        yield where


@pytest.fixture(scope="module")
def want(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The SHA-256 of every regular file of LZ4HC."""
    where = tmp_path_factory.mktemp("want") / "mnt"
    with mounting.mounted(LZ4HC, where):
        return mounting.digests(where)

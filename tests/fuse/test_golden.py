"""Every golden image, mounted, shows what its manifest says."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fuse.mounting import mounted
from tests.helpers import every_image
from tests.manifests import (
    ALL_FEATURES,
    Manifest,
    all_manifests,
    differences,
    entries_below,
    without_trusted,
)


def visible(manifest: Manifest) -> Manifest:
    """What of it we may see: ``trusted.*`` is for root."""
    return manifest if os.geteuid() == 0 else without_trusted(manifest)


@every_image
def test_shows_what_its_manifest_says(want: Manifest, where: Path) -> None:
    with mounted(want, where):
        assert differences(visible(want), entries_below(where)) == []


def test_larger_images_too(tmp_path: Path) -> None:
    manifests = all_manifests(ALL_FEATURES)
    if not manifests:
        pytest.skip(f"no images in {ALL_FEATURES}")

    def check(manifest: Manifest) -> list[str]:
        with mounted(manifest, tmp_path / manifest.name) as where:
            return differences(visible(manifest), entries_below(where))

    with ThreadPoolExecutor() as threads:
        found = threads.map(check, manifests)
        assert {m.name: lines for m, lines in zip(manifests, found, strict=True) if lines} == {}

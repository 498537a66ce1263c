"""Every golden image, mounted, shows what its manifest says."""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fuse.mounting import mounted
from tests.manifests import ALL_FEATURES, Manifest, all_manifests, differences, entries_below


def visible(manifest: Manifest) -> Manifest:
    """What of it we may see: ``trusted.*`` is for root."""
    if os.geteuid() == 0:
        return manifest
    return without_trusted(manifest)


def without_trusted(manifest: Manifest) -> Manifest:
    entries = {}
    for path, entry in manifest.entries.items():
        xattrs = entry.get("xattrs", {})
        kept = {name: value for name, value in xattrs.items() if not name.startswith("trusted.")}
        entries[path] = {k: v for k, v in entry.items() if k != "xattrs"}
        entries[path] |= {"xattrs": kept} if kept else {}
    return dataclasses.replace(manifest, entries=entries)


@pytest.mark.parametrize("manifest", all_manifests(), ids=str)
def test_shows_what_its_manifest_says(manifest: Manifest, where: Path) -> None:
    with mounted(manifest, where):
        assert differences(visible(manifest), entries_below(where)) == []


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

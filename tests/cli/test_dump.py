"""``pyerofs dump``: every byte of an image has an owner."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pyerofs.format import ondisk
from tests import handmade as hm
from tests.cli.conftest import Run
from tests.helpers import every_image, handmade, open_golden, words
from tests.manifests import Manifest, golden

# What mkfs.erofs has left behind: nothing refers to it.
LEFT_BEHIND = {
    # the inline tail of the last file, once more, in the first block of the padding to 64 blocks
    "fsalign": {(0x24532, 0x40000)},
}


# And the rests of blocks with something in them: bytes of an earlier attempt, which a shorter
# pcluster (they need not fill blocks in 48-bit images) or an index that is not used did not cover.
SLACK = {"extents-zstd", "extents-frag", "kitchen-sink-zdir"}


def regions(run: Run, *arguments: object) -> list[dict[str, Any]]:
    done = run("dump", "--json", *arguments)
    assert (done.status, done.err) == (0, "")
    found: list[dict[str, Any]] = done.json
    return found


@every_image
def test_every_byte_is_accounted_for(run: Run, want: Manifest) -> None:
    found = regions(run, *words(want))
    unaccounted = {(r["start"], r["end"]) for r in found if r["what"] == "unaccounted"}
    assert unaccounted == LEFT_BEHIND.get(want.name, set())
    assert [r for r in found if r["what"] == "error"] == []


@every_image
def test_slack_is_only_where_it_is_known(run: Run, want: Manifest) -> None:
    found = regions(run, *words(want))
    before = {a["what"] for a, b in pairwise(found) if b["what"] == "slack"}
    assert before <= ({"pcluster zstd", "compression index"} if want.name in SLACK else set())


@every_image
def test_regions_come_in_order_and_without_gaps(run: Run, want: Manifest) -> None:
    found = regions(run, *words(want))
    assert found[0]["start"] == 0
    assert all(r["start"] < r["end"] for r in found)
    assert all(a["start"] <= b["start"] for a, b in pairwise(found))
    end = 0
    for region in found:
        assert region["start"] <= end
        end = max(end, region["end"])
    assert end == want.image.stat().st_size - want.offset


@every_image
def test_nothing_overlaps_but_what_is_shared(run: Run, want: Manifest) -> None:
    """Deduplicated pclusters start where others do; everything else is on its own."""
    end, last = 0, {"what": "", "detail": ""}
    for region in regions(run, *words(want)):
        if region["start"] < end:
            shared = region["what"].partition(" ")[0]
            assert shared in ("pcluster", "data")
            assert shared == last["what"].partition(" ")[0]
        if region["end"] > end:
            end, last = region["end"], region


@every_image
def test_what_is_called_padding_is_zero(run: Run, want: Manifest) -> None:
    data = want.image.read_bytes()[want.offset :]
    for region in regions(run, *words(want)):
        if region["what"] == "padding":
            assert not data[region["start"] : region["end"]].strip(b"\0")


@pytest.mark.parametrize("name", ["plain", "zstd", "chunk-indexes", "xattr-shared-all", "zdir"])
def test_what_is_where(run: Run, name: str) -> None:
    want = golden(name)
    found = regions(run, *words(want))
    kinds = {r["what"] for r in found}
    assert {"boot area", "superblock", "inode"} <= kinds
    assert found[1]["start"] == ondisk.SUPER_OFFSET
    with open_golden(want) as image:
        nids = {image.lookup(p, follow_symlinks=False).nid for p in want.entries}
        inodes = [r for r in found if r["what"] == "inode"]
        assert {int(r["detail"].split()[1]) for r in inodes} == nids
        assert len(inodes) == len(nids)
        for region in inodes:
            nid = int(region["detail"].split()[1])
            assert image.volume.inode_position(nid) == (0, region["start"])
    expected = {
        "plain": {"data", "inline data", "inline directory", "inline link target"},
        "zstd": {"pcluster zstd", "compression index", "compression config"},
        "chunk-indexes": {"chunk table", "data"},
        "xattr-shared-all": {"shared xattr", "inline xattrs"},
        "zdir": {"pcluster lz4", "compression index"},
    }
    assert expected[name] <= kinds


def test_deduplicated_pclusters_are_listed_once(run: Run) -> None:
    found = regions(run, *words(golden("dedupe-lz4")))
    pclusters = [r for r in found if r["what"] == "pcluster lz4"]
    assert any(r["detail"].endswith(" more") for r in pclusters)
    assert len({(r["start"], r["end"]) for r in pclusters}) == len(pclusters)


def test_text(run: Run) -> None:
    want = golden("zstd-C128k")
    done = run("dump", *words(want))
    assert (done.status, done.err) == (0, "")
    body, _, sums = done.text.partition("\n\n")
    rows = [line.split(maxsplit=3) for line in body.splitlines() if line.startswith("0x")]
    assert [(int(r[0], 16), int(r[1])) for r in rows] == [
        (r["start"], r["end"] - r["start"]) for r in regions(run, *words(want))
    ]
    assert "pcluster zstd" in sums


def test_what_nothing_refers_to(run: Run, tmp_path: Path) -> None:
    image = handmade({b"f": hm.inline(b"x")}, data={20: b"forgotten"})
    (tmp_path / "image").write_bytes(image)
    (left,) = [r for r in regions(run, tmp_path / "image") if r["what"] == "unaccounted"]
    assert left["start"] <= 20 * 4096 < left["end"]


def test_inodes_that_can_not_be_mapped(run: Run, tmp_path: Path) -> None:
    """They are errors in the list, and the rest goes on."""
    bad = hm.inode(ondisk.LAYOUT_COMPRESSED_FULL, 100_000, 1, bytes(64), align=8)
    image = handmade({b"bad": bad, b"good": hm.inline(b"x")})
    (tmp_path / "image").write_bytes(image)
    found = regions(run, tmp_path / "image")
    assert {r["detail"].partition(":")[0] for r in found if r["what"] == "error"} == {"/bad"}
    assert any(r["detail"].endswith(" /good") for r in found)

"""``pyerofs info``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pyerofs.format.tree import _TYPES
from tests import handmade as hm
from tests.cli.conftest import Run
from tests.helpers import every_image, handmade, words
from tests.manifests import Manifest, golden


@every_image
def test_json(run: Run, want: Manifest) -> None:
    done = run("info", *words(want), "--json")
    assert (done.status, done.err) == (0, "")
    facts = done.json
    assert facts["block size"] in (512, 1024, 2048, 4096, 8192, 16384, 65536)
    assert facts["size"] == facts["blocks"] * facts["block size"]
    assert len(facts["devices"]) == len(want.devices)
    once = {p for p in want.entries if p not in ("hard-3", "many/hard-2")}
    types = Counter(_TYPES[want.entries[p]["mode"] & 0o170000] for p in once)
    statistics = facts["statistics"]
    assert {k: n for k, n in statistics.items() if k.endswith(" count")} == {
        f"{kind} count": n for kind, n in sorted(types.items())
    }
    layouts = sum(n for k, n in statistics.items() if k.endswith(" layout"))
    assert layouts == types["file"] + types["directory"] + types["symlink"]


def test_text(run: Run) -> None:
    done = run("info", *words(golden("label-uuid")))
    assert (done.status, done.err) == (0, "")
    facts = dict(line.split(":", 1) for line in done.lines)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    assert facts["volume name"] == "pyerofs-test"
    assert facts["uuid"] == "12345678-1234-5678-1234-567812345678"
    assert facts["block size"] == "4096"
    assert facts["packed nid"] == "-"
    assert "sb_chksum" in facts["features"]
    assert facts["directory count"] == "16"


@pytest.mark.parametrize(
    ("name", "algorithms"),
    [
        ("plain", []),
        ("lz4", ["lz4"]),
        ("zstd", ["zstd"]),
        ("multi-algo", ["lz4", "zstd"]),
        ("multi-algo-lzma", ["lzma", "deflate"]),
    ],
)
def test_algorithms(run: Run, name: str, algorithms: list[str]) -> None:
    facts = run("info", *words(golden(name)), "--json").json
    assert facts["algorithms"] == algorithms
    assert ("compressed_compact layout" in facts["statistics"]) == bool(algorithms)


def test_devices_in_text(run: Run) -> None:
    done = run("info", *words(golden("tar-index")))
    (line,) = [line for line in done.lines if line.startswith("  tag")]
    assert "blocks 1086, mapped at block 39" in line


def test_times_out_of_range(run: Run, tmp_path: Path) -> None:
    image = handmade({b"f": hm.inline(b"x")}, epoch=1 << 60)
    (tmp_path / "image").write_bytes(image)
    done = run("info", tmp_path / "image")
    assert done.status == 0
    assert f"{1 << 60} s since 1970" in done.text


def test_a_volume_name_that_is_not_utf8(run: Run, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(handmade({}, volume_name=b"caf\xe9"))
    assert b"caf\xe9" in run("info", tmp_path / "image").out
    assert run("info", tmp_path / "image", "--json").json["volume name"] == "caf\udce9"

"""Who may import whom: the house rules of docs/design.md, read from the imports themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.house import (
    ORDER,
    PACKAGES,
    ROOT,
    figure,
    modules,
    ours,
    packages,
    parting,
    shown,
)

HEAVY = ("trio", "lz4", "zstandard", "lzma", "isal", "httpx", "pyfuse3", "fsspec", "argparse")
FAR = (
    "net.http",
    "net.client",
    "net.auth",
    "net.transport",
    "oci.registry",
    "remote",
    "cache.fetcher",
    "cache.background",
    "cache.cached",
    "cache.verifier",
    "oci.zstd_layer",
)
CODECS = {"lz4", "zstandard", "lzma", "isal", "zlib"}


def top(name: str) -> str:
    return name.partition(".")[0]


def wing(name: str) -> str:
    """``pyerofs.sources.local.file`` -> ``sources``."""
    return [*name.split("."), ""][1]


def knows_version(name: str) -> bool:
    """Whether a module may import the package itself, for its ``__version__``."""
    return name in ("pyerofs.cli.main", "pyerofs.sources.net.transport") or top(name) != "pyerofs"


@pytest.mark.parametrize("package", ORDER)
def test_every_room_has_its_place(package: str) -> None:
    if package:
        below = {n for n in modules() if n.rpartition(".")[0] == package}
        assert {n.rpartition(".")[2] for n in below} == set(ORDER[package])
    assert packages() == set(ORDER)


@pytest.mark.parametrize("name", list(modules()))
def test_imports_go_down(name: str) -> None:
    """Inside functions, too; so there are no circles."""
    for imported in ours(modules()[name].all):
        package, mine, other = parting(name, imported)
        if imported == "pyerofs":
            assert knows_version(name)
        elif not mine:  # a package's own __init__, which hands on names
            assert package == "pyerofs.sources"
        elif other:  # else a package of mine, for names that it hands on
            order = ORDER[package]
            assert order.index(other) < order.index(mine), f"{name} imports {imported}"


def test_the_figure_in_the_docs_is_true() -> None:
    assert shown() == figure(), "python -m tests.house writes it anew"


@pytest.mark.parametrize("name", ["pyerofs.errors", "pyerofs.format.ondisk", "pyerofs.units"])
def test_the_ground_stands_on_nothing(name: str) -> None:
    assert not ours(modules()[name].all)


def test_the_model_knows_the_format_only() -> None:
    assert ours(modules()["pyerofs.format.model"].all) == {"pyerofs.format.ondisk"}


@pytest.mark.parametrize("name", [n for n in modules() if wing(n) in ("sources", "system")])
def test_sources_and_system_know_nothing_of_erofs(name: str) -> None:
    for imported in ours(modules()[name].all) - {"pyerofs"}:
        assert wing(imported) in ("errors", "units", "system", wing(name))
        assert wing(imported) != "sources" or wing(name) == "sources"


@pytest.mark.parametrize("name", [n for n in modules() if wing(n) == "format"])
def test_the_format_knows_the_contract_of_sources_and_nothing_of_the_machine(name: str) -> None:
    for imported in ours(modules()[name].all):
        assert imported in ("pyerofs.errors", "pyerofs.sources.base") or wing(imported) == "format"


@pytest.mark.parametrize("name", [n for n in modules() if top(n) == "pyerofs_nbd"])
def test_a_network_block_device_is_just_bytes(name: str) -> None:
    """What is known of EROFS there, ``images`` and ``prefetch`` know."""
    for imported in ours(modules()[name].all):
        assert wing(imported) not in ("format", "image", "pager", "aio", "path", "fsspec") or (
            top(imported) != "pyerofs"
        )


@pytest.mark.parametrize("name", list(modules()))
def test_who_may_know_trio(name: str) -> None:
    if any(top(n) == "trio" for n in modules()[name].all):
        assert (
            name in ("pyerofs.aio", "pyerofs.pager", "pyerofs.prefetch", "pyerofs.system.status")
            or wing(name) == "sources"
            or top(name) != "pyerofs"
        )


@pytest.mark.parametrize("name", list(modules()))
def test_nobody_loads_httpx_before_it_is_needed(name: str) -> None:
    """What deals in HTTP imports it at once, and is imported later itself."""
    if "httpx" in {top(n) for n in modules()[name].all}:
        assert wing(name) == "sources"
    far = {f"pyerofs.sources.{n}" for n in FAR}
    if name not in far:
        assert not modules()[name].at_once & far


@pytest.mark.parametrize("name", list(modules()))
def test_codecs_are_loaded_where_they_are_used(name: str) -> None:
    used = {top(n) for n in modules()[name].all} & CODECS
    # the cache's checksums, and layers that are compressed as a whole
    others = {
        "pyerofs.sources.cache.blobfiles": {"isal", "zlib"},
        "pyerofs.sources.oci.zstd_layer": {"zstandard"},
    }
    assert not used or name == "pyerofs.format.codecs" or used <= others.get(name, set())
    assert not {top(n) for n in modules()[name].at_once} & (CODECS - {"zlib"})


@pytest.mark.parametrize("name", [n for n in modules() if top(n) == "pyerofs"])
def test_the_library_does_not_know_its_front_ends(name: str) -> None:
    found = {top(n) for n in modules()[name].all}
    assert not found & {"pyerofs_fuse", "pyerofs_nbd", "pyfuse3"}
    assert "fsspec" not in found or name == "pyerofs.fsspec"


@pytest.mark.parametrize("name", [n for n in modules() if top(n) != "pyerofs"])
def test_front_ends_do_not_know_each_other(name: str) -> None:
    others = set(PACKAGES) - {"pyerofs", top(name)}
    assert not others & {top(n) for n in modules()[name].all}


@pytest.mark.parametrize("name", [n for n in modules() if not n.startswith("pyerofs.cli")])
def test_nobody_imports_the_command_but_itself(name: str) -> None:
    imported = {n for n in modules()[name].all if n.startswith("pyerofs.cli")}
    assert not imported or name == "pyerofs.__main__"


# --- in a fresh interpreter -------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """The top-level modules that are there afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import pyerofs",
        "import pyerofs; pyerofs.open, pyerofs.Path, pyerofs.ErofsError",
        "import pyerofs.cli.main",
    ],
)
def test_importing_loads_nothing_heavy(code: str) -> None:
    heavy = set(HEAVY) - ({"argparse"} if "cli" in code else set())
    assert not loaded_by(code) & heavy


def test_importing_the_package_loads_none_of_its_modules() -> None:
    assert {n for n in loaded_by("import pyerofs") if n.startswith("pyerofs.")} == set()


@pytest.mark.parametrize(
    ("name", "codec"),
    [("zstd-C128k", "zstandard"), ("lz4hc-C64k", "lz4"), ("lzma", "lzma"), ("plain", None)],
)
def test_reading_loads_the_codec_that_is_needed(name: str, codec: str | None) -> None:
    image = ROOT / "tests" / "images" / f"{name}.erofs"
    loaded = loaded_by(f"import pyerofs; pyerofs.open({str(image)!r}).read('text')")
    assert loaded & {"zstandard", "lz4", "lzma", "trio"} == ({codec} if codec else set())


def test_aio_loads_no_codec() -> None:
    # (lzma comes with shutil, which trio needs)
    assert not loaded_by("import pyerofs.aio") & {"lz4", "zstandard", "isal", "httpx"}

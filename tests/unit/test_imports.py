"""Who may import whom: the house rules of docs/design.md, read from the imports themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "pyerofs": ROOT / "pyerofs",
    "pyerofs_fuse": ROOT / "fuse" / "pyerofs_fuse",
    "pyerofs_nbd": ROOT / "nbd" / "pyerofs_nbd",
}

# From the ground up; a module may import those before it only.
LAYERS = [
    "errors",
    "private",
    "ondisk",
    "recognise",
    "streams",
    "units",
    "daemon",
    "progress",
    "model",
    "sources",
    "crc32c",
    "decompress",
    "memory",
    "superblock",
    "layout",
    "volume",
    "inode",
    "zmap",
    "extent",
    "data",
    "directory",
    "xattr",
    "tree",
    "image",
    "aio",
    "prefetch",
    "status",
    "path",
    "fsspec",
    "cli",
]
HEAVY = ("trio", "lz4", "zstandard", "lzma", "isal", "httpx", "pyfuse3", "fsspec", "argparse")
FAR = ("http", "auth", "transport", "registry", "remote", "cached", "unpack")
CODECS = {"lz4", "zstandard", "lzma", "isal", "zlib"}


@dataclass
class Module:
    """What one module imports, by full names: when it is imported itself, and later."""

    name: str
    at_once: set[str] = field(default_factory=set)
    later: set[str] = field(default_factory=set)

    @property
    def all(self) -> set[str]:
        return self.at_once | self.later


@cache
def modules() -> dict[str, Module]:
    """All modules of all packages that are there."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            name = ".".join(parts).removesuffix(".__init__")
            module = found[name] = Module(name)
            _collect(ast.parse(path.read_text(), str(path)), module, at_once=True)
    return found


def _collect(node: ast.AST, module: Module, *, at_once: bool) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            (module.at_once if at_once else module.later).update(_names(child))
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        _collect(child, module, at_once=at_once and not inside)


def _names(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.module is not None, "no relative imports"
    assert node.level == 0, "no relative imports"
    for alias in node.names:
        full = f"{node.module}.{alias.name}"
        yield full if _is_module(full) else node.module


def _is_module(name: str) -> bool:
    package, *rest = name.split(".")
    path = PACKAGES.get(package, Path("/nowhere")).joinpath(*rest)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def top(name: str) -> str:
    return name.partition(".")[0]


def layer(name: str) -> str:
    """``pyerofs.sources.file`` -> ``sources``."""
    return [*name.split("."), ""][1]


def ours(names: set[str]) -> set[str]:
    return {name for name in names if top(name) in PACKAGES}


PARSER = [n for n in modules() if top(n) == "pyerofs" and layer(n) in LAYERS]


def test_every_module_has_its_place() -> None:
    placed = {n for n in modules() if top(n) == "pyerofs"} - {"pyerofs", "pyerofs.__main__"}
    assert {layer(n) for n in placed} == set(LAYERS)


@pytest.mark.parametrize("name", PARSER)
def test_imports_go_down(name: str) -> None:
    """Which also means: no cycles."""
    mine = LAYERS.index(layer(name))
    for imported in ours(modules()[name].all):
        if layer(imported) == layer(name) and layer(name) in ("sources", "cli"):
            continue
        if imported == "pyerofs":
            assert layer(name) == "cli" or name == "pyerofs.sources.transport", "for __version__"
            continue
        assert LAYERS.index(layer(imported)) < mine, f"{name} imports {imported}"


@pytest.mark.parametrize("name", ["pyerofs.errors", "pyerofs.ondisk"])
def test_the_ground_stands_on_nothing(name: str) -> None:
    assert not ours(modules()[name].all)


def test_the_model_knows_the_format_only() -> None:
    assert ours(modules()["pyerofs.model"].all) == {"pyerofs.ondisk"}


@pytest.mark.parametrize("name", [n for n in modules() if n.startswith("pyerofs.sources")])
def test_sources_know_nothing_of_erofs(name: str) -> None:
    for imported in ours(modules()[name].all):
        if imported == "pyerofs":
            assert name == "pyerofs.sources.transport", "for __version__"
            continue
        assert layer(imported) in ("errors", "units", "private", "sources")


def test_no_cycles_within_packages() -> None:
    graph = {n: ours(m.at_once) & set(modules()) for n, m in modules().items()}
    while leaves := [n for n, needs in graph.items() if not needs & set(graph)]:
        for leaf in leaves:
            del graph[leaf]
    assert graph == {}


@pytest.mark.parametrize("name", list(modules()))
def test_who_may_know_trio(name: str) -> None:
    if any(top(n) == "trio" for n in modules()[name].all):
        assert (
            name in ("pyerofs.aio", "pyerofs.prefetch", "pyerofs.status")
            or layer(name) == "sources"
            or top(name) != "pyerofs"
        )


@pytest.mark.parametrize("name", list(modules()))
def test_nobody_loads_httpx_before_it_is_needed(name: str) -> None:
    """What deals in HTTP imports it at once, and is imported later itself."""
    if "httpx" in {top(n) for n in modules()[name].all}:
        assert layer(name) == "sources"
    far = {f"pyerofs.sources.{n}" for n in FAR}
    if name not in far:
        assert not modules()[name].at_once & far


@pytest.mark.parametrize("name", list(modules()))
def test_codecs_are_loaded_where_they_are_used(name: str) -> None:
    used = {top(n) for n in modules()[name].all} & CODECS
    # the cache's checksums, and layers that are compressed as a whole
    others = {"pyerofs.sources.store": {"isal", "zlib"}, "pyerofs.sources.unpack": {"zstandard"}}
    assert not used or name == "pyerofs.decompress" or used <= others.get(name, set())
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

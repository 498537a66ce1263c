"""The house: its rooms in their order, who imports whom, and both as text for docs/design.md.

``python -m tests.house`` writes the figure in docs/design.md anew.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
DESIGN = ROOT / "docs" / "design.md"
PACKAGES = {
    "pyerofs": ROOT / "pyerofs",
    "pyerofs_fuse": ROOT / "fuse" / "pyerofs_fuse",
    "pyerofs_nbd": ROOT / "nbd" / "pyerofs_nbd",
}

# The rooms of each package from the ground up: a room imports those before it only, inside functions
# as well.
ORDER: dict[str, list[str]] = {
    "": ["pyerofs", "pyerofs_fuse", "pyerofs_nbd"],
    "pyerofs": [
        "errors", "units", "system", "sources", "format", "images", "image", "pager", "aio", "prefetch",
        "path", "fsspec", "cli", "__main__",
    ],
    "pyerofs.system": [
        "arguments", "libc", "mountinfo", "private", "readiness", "streams", "progress", "daemon",
        "status", "fuse", "keeper",
    ],
    "pyerofs.sources": [
        "base", "spec", "portal", "local", "net", "cache", "oci", "verity", "remote", "open",
    ],
    "pyerofs.sources.local": [
        "buffer", "concat", "slice", "file", "sparse", "threaded", "digested",
    ],
    "pyerofs.sources.net": ["credentials", "client", "transport", "auth", "http"],
    "pyerofs.sources.cache": [
        "blobfiles", "memorystore", "store", "blobstore", "claim", "cachedir",
        "ahead", "fetcher", "background", "verifier", "cached",
    ],
    "pyerofs.sources.oci": ["reference", "manifest", "layout", "registry", "zstd_layer"],
    "pyerofs.format": [
        "ondisk", "recognise", "model", "crc32c", "codecs", "memory", "lclusters", "superblock",
        "placement", "volume", "inode", "zmap", "extent", "data", "directory", "xattr", "tree",
    ],
    "pyerofs.images": ["flat"],
    "pyerofs.cli": [
        "messages", "common", "directories", "workers", "cache", "check", "dump", "extract", "info",
        "listing", "mounts", "tar", "main", "completion",
    ],
    "pyerofs.system.fuse": ["wire", "mounting"],
    "pyerofs_fuse": ["options", "mount", "answers", "direct", "pyfuse", "cli"],
    "pyerofs_fuse.direct": [
        "record", "handover", "assist", "encode", "listings", "server", "far", "life",
    ],
    "pyerofs_fuse.pyfuse": ["operations", "life"],
    "pyerofs_nbd": ["errors", "devices", "options", "server", "lifecycle", "cli", "__main__"],
    "pyerofs_nbd.devices": [
        "netlink", "sysfs", "driver", "ioctl", "recovery", "groups", "foreign", "mounting",
    ],
    "pyerofs_nbd.server": [
        "protocol", "budget", "channel", "pagecache", "holes", "batch", "exports", "listen", "tls",
        "modes",
    ],
    "pyerofs_nbd.lifecycle": [
        "parameters", "messages", "control", "holder", "attach", "reattach", "inventory", "supervise",
        "teardown",
    ],
}  # fmt: skip


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
    """All modules of all packages."""
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


def ours(names: set[str]) -> set[str]:
    """Those of our own packages."""
    return {name for name in names if name.partition(".")[0] in PACKAGES}


def packages() -> set[str]:
    """The modules that hold others."""
    return {name.rpartition(".")[0] for name in modules()}


def parting(importer: str, imported: str) -> tuple[str, str, str]:
    """The innermost package that holds both, and the rooms in it that lead to each; "" where one is
    that package itself."""
    above: list[str] = []
    one, other = importer.split("."), imported.split(".")
    while one and other and one[0] == other[0]:
        above.append(one.pop(0))
        other.pop(0)
    return ".".join(above), (one or [""])[0], (other or [""])[0]


def depth(package: str) -> int:
    """How many floors the rooms of a package need, when each stands above all that it imports."""
    below = rooms(package)
    floors: dict[str, int] = {}
    for room in ORDER[package]:
        floors[room] = 1 + max((floors[other] for other in below[room]), default=0)
    return max(floors.values())


def rooms(package: str) -> dict[str, set[str]]:
    """Which rooms of a package each of them imports."""
    found: dict[str, set[str]] = {room: set() for room in ORDER[package]}
    for module in modules().values():
        for imported in ours(module.all):
            above, mine, other = parting(module.name, imported)
            if above == package and mine and other:
                found[mine].add(other)
    return found


def figure() -> str:
    """Who imports whom, the top floor first."""
    lines = []
    for package, order in ORDER.items():
        below = rooms(package)
        name = package or "the packages"
        lines.append(f"{name}: {len(order)} rooms on {depth(package)} floors")
        for room in reversed(order):
            imported = [other for other in reversed(order) if other in below[room]]
            lines.append(f"  {room:<13}{' '.join(imported) or '-'}")
        lines.append("")
    return "\n".join(lines).rstrip()


BEGIN, END = "<!-- who imports whom -->\n```text\n", "\n```\n<!-- end -->"


def shown() -> str:
    """The figure as docs/design.md has it."""
    return DESIGN.read_text().partition(BEGIN)[2].partition(END)[0]


def write() -> None:
    """Put the figure into docs/design.md."""
    before, _, rest = DESIGN.read_text().partition(BEGIN)
    DESIGN.write_text(f"{before}{BEGIN}{figure()}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    write()

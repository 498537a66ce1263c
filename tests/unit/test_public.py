"""What the package promises by name."""

from __future__ import annotations

import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest

import pyerofs
import pyerofs.aio
from pyerofs import Image
from pyerofs.aio import AsyncImage

MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(pyerofs.__path__, "pyerofs.")
    if not m.name.endswith("__main__")
)


@pytest.mark.parametrize("name", pyerofs.__all__)
def test_public_names_exist_and_are_documented(name: str) -> None:
    found = getattr(pyerofs, name)
    assert inspect.getdoc(found)
    assert inspect.isclass(found) or inspect.isfunction(found)
    assert found.__module__.startswith("pyerofs.")


def test_all_is_sorted_and_complete() -> None:
    assert sorted(pyerofs.__all__) == pyerofs.__all__
    assert set(pyerofs.__all__) == set(pyerofs._HOME_OF)
    assert set(pyerofs.__all__) <= set(dir(pyerofs))


def test_star() -> None:
    names: dict[str, object] = {}
    exec("from pyerofs import *", names)
    assert set(pyerofs.__all__) <= set(names)


def test_what_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pyerofs.nonsense  # noqa: B018
    with pytest.raises(ImportError):
        exec("from pyerofs import nonsense")


PATHS = {  # where people import from, besides the package itself
    "pyerofs.aio": ["AsyncFile", "AsyncImage", "open"],
    "pyerofs.errors": [n for n in pyerofs.__all__ if n.endswith("Error")],
    "pyerofs.fsspec": ["ErofsFileSystem"],
    "pyerofs.image": ["DirEntry", "Image", "open"],
    "pyerofs.path": ["Path"],
    "pyerofs.sources": [
        "AsyncSource", "Buffer", "ConcatSource", "FileObjectSource", "FileSource", "MemorySource",
        "SliceSource", "Source",
    ],
    "pyerofs.sources.base": ["AsyncSource", "Buffer", "Source"],
    "pyerofs.sources.spec": ["Access", "SourceSpec", "VeritySpec"],
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_public_import_paths(name: str) -> None:
    module = import_module(name)
    assert all(hasattr(module, public) for public in PATHS[name])


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_documented(name: str) -> None:
    module = import_module(name)
    assert (module.__doc__ or "").strip()


@pytest.mark.parametrize(
    "cls",
    [getattr(pyerofs, n) for n in pyerofs.__all__ if inspect.isclass(getattr(pyerofs, n))]
    + [AsyncImage],
)
def test_public_classes_are_documented(cls: type) -> None:
    assert inspect.getdoc(cls)
    documented = [
        name
        for name, member in vars(cls).items()
        if not name.startswith("_") and inspect.isfunction(member) and not inspect.getdoc(member)
    ]
    trivial = {"exists", "is_dir", "is_file", "is_symlink", "close"}
    assert set(documented) <= trivial


def test_both_apis_have_the_same_methods_and_arguments() -> None:
    own = {
        "call", "resume", "start", "child", "block_entries", "read_data", "read_now",
        "decode_ahead", "will_need", "inode_needed", "status",
    }  # fmt: skip  # for front-ends
    blocking = {n for n, m in vars(Image).items() if n[0] != "_" and inspect.isfunction(m)}
    waiting = {n for n, m in vars(AsyncImage).items() if n[0] != "_" and inspect.isfunction(m)}
    assert waiting - own == blocking - {"close"}
    for name in waiting - own:
        ours = inspect.signature(getattr(Image, name)).parameters
        theirs = inspect.signature(getattr(AsyncImage, name)).parameters
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def test_opening_is_the_same_for_both() -> None:
    ours = inspect.signature(pyerofs.open).parameters
    theirs = inspect.signature(pyerofs.aio.open).parameters
    assert list(ours) == list(theirs) == ["what", "offset", "devices", "cache_size", "access"]
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def test_version() -> None:
    assert pyerofs.__version__ == importlib.metadata.version("pyerofs")


def test_entry_points() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert scripts["pyerofs"].value == "pyerofs.cli.main:run"
    assert callable(scripts["pyerofs"].load())
    assert importlib.metadata.entry_points(group="fsspec.specs")["erofs"].value == (
        "pyerofs.fsspec:ErofsFileSystem"
    )


def test_types_are_published() -> None:
    assert pkgutil.get_data("pyerofs", "py.typed") is not None


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyerofs", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"pyerofs {pyerofs.__version__}\n"

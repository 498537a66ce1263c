"""Read EROFS images.

    import pyerofs

    with pyerofs.open("system.erofs") as image:
        print(image.read("etc/os-release").decode())

``pyerofs.open`` returns an Image; ``pyerofs.Path`` wraps one in pathlib's interface;
``pyerofs.aio`` is the same API for trio.  Importing the package is cheap: codecs and trio are
loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyerofs.errors import (
        AuthenticationError,
        ChangedError,
        CorruptImage,
        DeviceMissing,
        ErofsError,
        IntegrityError,
        IsADirectory,
        NoSuchXattr,
        NotADirectory,
        NotAFile,
        NotASymlink,
        NotFound,
        RegistryError,
        SourceDenied,
        SourceError,
        SourceNotFound,
        SourceThroughFile,
        TooManySymlinks,
        TruncatedRead,
        UnsupportedFeature,
    )
    from pyerofs.format.model import Extent, Inode
    from pyerofs.format.superblock import Device, Superblock
    from pyerofs.format.tree import Stat
    from pyerofs.image import DirEntry, Image, open
    from pyerofs.path import Path
    from pyerofs.sources.spec import Access, SourceSpec, VeritySpec

__version__ = "0.1.0"

_HOMES = {
    "errors": (
        "AuthenticationError", "ChangedError", "CorruptImage", "DeviceMissing", "ErofsError",
        "IntegrityError", "IsADirectory", "NoSuchXattr", "NotADirectory", "NotAFile",
        "NotASymlink", "NotFound", "RegistryError", "SourceDenied", "SourceError",
        "SourceNotFound", "SourceThroughFile", "TooManySymlinks", "TruncatedRead",
        "UnsupportedFeature",
    ),
    "image": ("DirEntry", "Image", "open"),
    "format.model": ("Extent", "Inode"),
    "path": ("Path",),
    "sources.spec": ("Access", "SourceSpec", "VeritySpec"),
    "format.superblock": ("Device", "Superblock"),
    "format.tree": ("Stat",),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Access",
    "AuthenticationError",
    "ChangedError",
    "CorruptImage",
    "Device",
    "DeviceMissing",
    "DirEntry",
    "ErofsError",
    "Extent",
    "Image",
    "Inode",
    "IntegrityError",
    "IsADirectory",
    "NoSuchXattr",
    "NotADirectory",
    "NotAFile",
    "NotASymlink",
    "NotFound",
    "Path",
    "RegistryError",
    "SourceDenied",
    "SourceError",
    "SourceNotFound",
    "SourceSpec",
    "SourceThroughFile",
    "Stat",
    "Superblock",
    "TooManySymlinks",
    "TruncatedRead",
    "UnsupportedFeature",
    "VeritySpec",
    "open",
]


def __getattr__(name: str) -> Any:
    """Import public names on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pyerofs' has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(f"pyerofs.{_HOME_OF[name]}"), name)
    globals()[name] = found
    return found

"""Open what a user names, as sources."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, cast

from pyerofs.errors import SourceError, SourceNotFound
from pyerofs.sources.base import AsyncSource, Source
from pyerofs.sources.local.file import FileObjectSource, FileSource
from pyerofs.sources.local.slice import AsyncSlice, SliceSource
from pyerofs.sources.local.sparse import unsparsed
from pyerofs.sources.spec import HTTP, LAYOUT, OCI, Access, SourceSpec, parse_spec

if TYPE_CHECKING:
    import trio

Openable: TypeAlias = str | os.PathLike[str] | BinaryIO | Source | SourceSpec


def open_source(what: Openable, access: Access | None = None) -> Source:
    """Open a path, a URL, a reference or a seekable binary file object as a source; a source is
    returned unchanged.  An Android sparse image on this machine reads as the image that it encodes.

    Blocks.  Raises SourceError."""
    spec = _far(what)
    if spec is not None:
        from pyerofs.sources.portal import open_blocking

        return open_blocking(partial(open_async, spec, access or Access()))[0]
    if isinstance(what, SourceSpec):
        return _image_in(_open_file(what.what), what.offset)
    if isinstance(what, (str, os.PathLike)):
        return _image_in(_open_file(what))
    if hasattr(what, "read_at"):
        return cast(Source, what)
    return unsparsed(FileObjectSource(what))


def open_sources(
    what: Openable, offset: int, devices: Sequence[Openable], access: Access | None = None
) -> list[Source]:
    """Open the image, from ``offset`` on, and its extra devices; returns them in this order.  Blocks.
    Raises SourceError, with none left open."""
    opened: list[Source] = []
    try:
        for item in named(what, offset, devices):  # one by one: those before a failure are closed
            opened.append(open_source(item, access))  # noqa: PERF401
    except BaseException:
        for source in opened:
            source.close()
        raise
    return opened


def open_files(spec: SourceSpec) -> list[FileSource]:
    """Open the files of an image on this machine (see ``is_near``) and of its devices.

    Raises SourceError."""
    return [_open_file(item.what) for item in (spec, *spec.devices)]


def images_in(files: Sequence[FileSource], spec: SourceSpec) -> list[Source]:
    """An image and its devices, which own their files: what is encoded as an Android sparse image, or
    starts at an offset.  Raises SourceError."""
    items = (spec, *spec.devices)
    return [_image_in(file, item.offset) for file, item in zip(files, items, strict=True)]


async def open_async(spec: SourceSpec, access: Access, nursery: trio.Nursery) -> list[AsyncSource]:
    """Open the image that a spec names, and its devices.  ``nursery`` runs the tasks that fetch in the
    background; cancel it before closing the sources.

    Raises SourceError, with none left open."""
    opened: list[AsyncSource] = []
    try:
        for item in (spec, *spec.devices):
            opened.append(await open_one(item, access, nursery))  # noqa: PERF401
    except BaseException:
        import trio

        with trio.CancelScope(shield=True):
            for source in opened:
                await source.aclose()
        raise
    return opened


async def open_one(what: Openable, access: Access, nursery: trio.Nursery) -> AsyncSource:
    """Open one image or device (without the devices of a spec).  Raises SourceError."""
    from pyerofs.sources.local.threaded import ThreadedSource

    spec = _far(what)
    if spec is None:
        return ThreadedSource(open_source(what))
    if spec.is_remote or spec.is_layout:
        from pyerofs.sources.remote import open_remote

        source = await open_remote(spec, access, nursery)
    else:
        source = ThreadedSource(_image_in(_open_file(spec.what)))
    try:
        if spec.verity is not None:
            from pyerofs.sources.verity import open_verity

            hashes = None
            if spec.verity.hash_device is not None:
                hashes = await open_one(parse_spec(spec.verity.hash_device), access, nursery)
            source = await open_verity(source, spec.verity, hashes)
        return AsyncSlice(source, spec.offset) if spec.offset else source
    except BaseException:
        import trio

        with trio.CancelScope(shield=True):
            await source.aclose()
        raise


def named(what: Openable, offset: int, devices: Sequence[Openable]) -> list[Openable]:
    """The image, from its offset on, and its devices, to be opened one by one.

    Raises SourceError; ValueError if ``offset`` or ``devices`` are given beside a SourceSpec."""
    if isinstance(what, SourceSpec):
        if offset or devices:
            raise ValueError("offset and devices have to be fields of the SourceSpec")
        return [replace(what, devices=()), *what.devices]
    if (spec := _far(what)) is not None:
        what = replace(spec, offset=offset)
    elif offset:
        what = _slice(open_source(what), offset)
    return [what, *devices]


def _open_file(path: str | os.PathLike[str]) -> FileSource:
    """Open a file on this machine.  Raises SourceError, with a hint if the path looks like an image
    reference."""
    try:
        return FileSource(path)
    except SourceNotFound as e:
        text = os.fsdecode(path)
        if not _looks_like_reference(text):
            raise
        hint = f"{e} (for an image in a registry write oci://{text})"
        raise SourceNotFound(hint, text) from None


def _looks_like_reference(text: str) -> bool:
    """Whether a path has the form ``HOST[:PORT]/NAME[:TAG]``."""
    host, slash, _ = text.partition("/")
    if not slash or host.startswith(".") or not ("." in host or ":" in host or host == "localhost"):
        return False
    from pyerofs.sources.oci.reference import parse_reference

    try:
        parse_reference(text)
    except SourceError:
        return False
    return True


def _image_in(file: FileSource, offset: int = 0) -> Source:
    """The image in a file, perhaps encoded as an Android sparse image, from ``offset`` on.  Raises
    SourceError."""
    source = unsparsed(file)
    return _slice(source, offset) if offset else source


def _slice(source: Source, offset: int) -> Source:
    """A source from ``offset`` on.  Raises SourceError, after closing the source."""
    try:
        return SliceSource(source, offset)
    except BaseException:
        source.close()
        raise


def pinned_spec(spec: SourceSpec, pins: Sequence[SourceSpec | None]) -> SourceSpec:
    """A spec of exactly the bytes that were opened, with digests in place of tags.  ``pins``: what
    ``AsyncSource.pinned`` says of the image and of each device."""
    primary, *devices = pins
    pinned = tuple(p or d for p, d in zip(devices, spec.devices, strict=True))
    return replace(primary or spec, devices=pinned)


def is_near(spec: SourceSpec) -> bool:
    """Whether an image and its devices are plain files on this machine, without dm-verity."""
    return all(_far(item) is None for item in (spec, *spec.devices))


def _far(what: Openable) -> SourceSpec | None:
    """The spec of a source that needs a network, an OCI layout or dm-verity; None for others."""
    if isinstance(what, SourceSpec):
        near = not (what.is_remote or what.is_layout) and what.verity is None
        return None if near else what
    if isinstance(what, str) and what.startswith((*HTTP, OCI, LAYOUT)):
        return parse_spec(what)
    return None

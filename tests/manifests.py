"""The golden images and what an oracle says is in them.

``NAME.json`` beside an image holds the image's file name, its extra devices, its offset and, path by
path, what Linux's driver showed when it had mounted the image (``oracle`` is ``kernel``) or, where
blocks are larger than a page, what ``fsck.erofs --extract`` wrote (``fsck``).  Extended attributes are
the kernel's there, too, of an image of the same tree with smaller blocks (``xattrs_from``), because
fsck.erofs stops at the first one whose value is empty.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

IMAGES = Path(__file__).parent / "images"
ALL_FEATURES = Path(__file__).parents[2] / "shared" / "corpus" / "full"  # may not be there

Entry = dict[str, Any]  # mode, uid, gid, mtime_ns; where known nlink, size, sha256, target …
Entries = dict[str, Entry]  # by path: text with surrogate escapes, "." is the root


@dataclass(frozen=True)
class Manifest:
    """One image and what it shows."""

    name: str
    image: Path
    devices: tuple[Path, ...]
    offset: int
    oracle: str
    entries: Entries

    def __str__(self) -> str:
        return self.name

    def tolerates_more_xattrs(self, path: str) -> bool:
        """Whether the oracle is known to have missed extended attributes of this path.

        The kernel misses the shared ones of ``xattr-0`` in kitchen-sink: it keeps a buffer of the
        metabox where it wants a block of the image, because the two happen to have the same
        number."""
        return (self.name, path) == ("kitchen-sink", "xattr-0")


def load(path: Path) -> Manifest:
    """Read ``NAME.json``."""
    found = json.loads(path.read_text())
    return Manifest(
        path.stem,
        path.parent / found["image"],
        tuple(path.parent / device for device in found["devices"]),
        found.get("offset", 0),
        found["oracle"],
        found["entries"],
    )


def golden(name: str) -> Manifest:
    """The manifest of one golden image."""
    return load(IMAGES / f"{name}.json")


def all_manifests(directory: Path = IMAGES) -> list[Manifest]:
    """All of a directory, by name; [] if it does not exist."""
    return [load(path) for path in sorted(directory.glob("*.json"))]


def without_trusted(manifest: Manifest) -> Manifest:
    """What of it users other than root see: no ``trusted.*``."""
    entries = {}
    for path, full in manifest.entries.items():
        entries[path] = {field: value for field, value in full.items() if field != "xattrs"}
        xattrs = full.get("xattrs", {})
        if kept := {name: xattrs[name] for name in xattrs if not name.startswith("trusted.")}:
            entries[path]["xattrs"] = kept
    return dataclasses.replace(manifest, entries=entries)


class StatLike(Protocol):
    """What os.stat_result and pyerofs.Stat have in common."""

    @property
    def st_mode(self) -> int: ...
    @property
    def st_uid(self) -> int: ...
    @property
    def st_gid(self) -> int: ...
    @property
    def st_nlink(self) -> int: ...
    @property
    def st_size(self) -> int: ...
    @property
    def st_rdev(self) -> int: ...
    @property
    def st_mtime_ns(self) -> int: ...


def entry(
    status: StatLike,
    *,
    content: bytes | None = None,
    target: str | None = None,
    xattrs: Mapping[str, bytes] | None = None,
) -> Entry:
    """One entry, as the manifests have it: ``content`` of regular files, ``target`` of links."""
    found: Entry = {
        "mode": status.st_mode,
        "uid": status.st_uid,
        "gid": status.st_gid,
        "nlink": status.st_nlink,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }
    if content is not None:
        found["sha256"] = hashlib.sha256(content).hexdigest()
    if target is not None:
        found["target"] = target
    if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        found["rdev"] = [os.major(status.st_rdev), os.minor(status.st_rdev)]
    if xattrs:
        found["xattrs"] = {name: value.hex() for name, value in xattrs.items()}
    return found


def entries_below(top: Path) -> Entries:
    """The entries of a tree in the file system: of a mount, or of what was extracted."""
    return {os.path.relpath(path, top): entry_at(path) for path in _paths(os.fspath(top))}


def _paths(top: str) -> Iterator[str]:
    def fail(e: OSError) -> None:
        raise e

    yield top
    for directory, directories, others in os.walk(top, onerror=fail):
        for name in directories + others:
            yield os.path.join(directory, name)


def entry_at(path: str) -> Entry:
    """The entry of one file in the file system."""
    status = os.lstat(path)
    return entry(
        status,
        content=Path(path).read_bytes() if stat.S_ISREG(status.st_mode) else None,
        target=os.readlink(path) if stat.S_ISLNK(status.st_mode) else None,
        xattrs={
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
        },
    )


def differences(want: Manifest, got: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where ``got`` contradicts the manifest, one line each; [] if it agrees.

    All fields count, of all paths, but the ones that the oracle can't know: see the module's text
    about fsck (no ``size`` and ``nlink`` of directories) and ``tolerates_more_xattrs``."""
    lines = [f"{path!r}: missing" for path in want.entries if path not in got]
    lines += [f"{path!r}: not in the manifest" for path in got if path not in want.entries]
    for path, expected in want.entries.items():
        if path in got:
            lines += (f"{path!r}: {line}" for line in _differing(want, path, expected, got[path]))
    return lines


def _differing(
    want: Manifest, path: str, expected: Entry, found: Mapping[str, Any]
) -> Iterator[str]:
    found = dict(found)
    if want.oracle == "fsck" and stat.S_ISDIR(expected["mode"]):
        found.pop("size", None)
        found.pop("nlink", None)
    if want.tolerates_more_xattrs(path):
        known = expected.get("xattrs", {})
        shown = {n: v for n, v in found.pop("xattrs", {}).items() if n in known}
        found |= {"xattrs": shown} if shown else {}
    for field in sorted(expected.keys() | found.keys()):
        if expected.get(field) != found.get(field):
            yield f"{field} is {found.get(field)!r:.80}, not {expected.get(field)!r:.80}"

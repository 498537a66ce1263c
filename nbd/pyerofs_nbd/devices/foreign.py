"""Recovery files of mount.erofs (erofs-utils 1.9): one line, ``TYPE field field…``.

Exactly one space separates fields, so two spaces in a row have an empty field between them; the
last field may be empty or missing.  Types that pyerofs-nbd does not support are refused by name.
"""

from __future__ import annotations

import base64
import binascii
import os
import re

from pyerofs.errors import SourceError
from pyerofs.sources.spec import OCI, Access, SourceSpec, parse_spec
from pyerofs_nbd.devices.recovery import Record
from pyerofs_nbd.errors import NbdError

_DIGEST = re.compile(r"sha256:[0-9a-fA-F]{64}")


def parse(data: bytes, *, accept_unpinned: bool) -> Record:
    """Parse a recovery file.  A password in it goes into the record's ``access``, in memory only.

    Raises NbdError.  ``accept_unpinned``: whether a layer may be given by position, not digest."""
    line = data.split(b"\n", 1)[0]
    if b"\0" in line or not line:
        raise NbdError("not a recovery file")
    kind, blank, rest = os.fsdecode(line).partition(" ")
    if kind in ("TARINDEX_OCI_BLOB", "S3_OBJECT"):
        raise NbdError(
            f"the device was attached by mount.erofs with a source that pyerofs-nbd does not"
            f" support ({kind}); use mount.erofs --reattach"
        )
    if kind not in ("LOCAL", "OCI_LAYER", "OCI_NATIVE_BLOB") or not blank:
        raise NbdError("not a recovery file of pyerofs-nbd or mount.erofs")
    if kind == "LOCAL":
        if not os.path.isabs(rest):
            raise NbdError(f"{rest!r} is not an absolute path")
        return Record(SourceSpec(rest), None)
    return _oci(kind, rest.split(" "), accept_unpinned)


def _oci(kind: str, fields: list[str], accept_unpinned: bool) -> Record:
    if not 3 <= len(fields) <= 4:
        raise NbdError(f"{kind} with {len(fields)} fields, not 3 or 4")
    reference, platform, which = fields[:3]
    if not reference:
        raise NbdError(f"{kind} without an image")
    username, password = _credentials(fields[3] if len(fields) == 4 else "")
    layer = blob = None
    if kind == "OCI_NATIVE_BLOB":
        if not _DIGEST.fullmatch(which):
            raise NbdError(f"{which!r} is not a sha256 digest")
        blob = which.lower()
    else:
        if not which.isascii() or not which.isdecimal() or len(which) > 6:
            raise NbdError(f"{which!r} is not the number of a layer")
        layer = int(which)
        if not accept_unpinned:
            raise NbdError(
                f"layer {which} of {reference} is recorded without its digest, and the image may"
                " have changed since; --accept-unpinned uses its current content"
            )
    try:
        spec = parse_spec(
            OCI + reference, platform=platform or None, layer=layer, blob=blob, username=username
        )
    except SourceError as e:
        raise NbdError(str(e)) from None
    return Record(spec, None, Access(password=password))


def _credentials(field: str) -> tuple[str | None, str | None]:
    """Decode user name and password; both None if the field is empty.  Raises NbdError."""
    if not field:
        return None, None
    try:
        user, colon, password = base64.b64decode(field, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        raise NbdError("its user name and password can't be decoded") from None
    if not colon:
        raise NbdError("its user name has no password")
    return user or None, password or None

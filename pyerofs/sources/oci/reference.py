"""References to images in registries: ``[HOST[:PORT]/]NAME[:TAG][@DIGEST]``.

The grammar is that of the OCI distribution specification and of Docker's references, with Docker's
shorthand: no host means Docker Hub, and names without a slash there are below ``library/``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pyerofs.errors import SourceError

HUB = "docker.io"
HUB_SERVER = "registry-1.docker.io"

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(?::\d{{1,5}})?")
_WORD = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_WORD}(?:/{_WORD})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
MAX_NAME = 255


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference.  ``digest`` takes precedence over ``tag``."""

    registry: str
    repository: str
    tag: str | None
    digest: str | None

    @property
    def server(self) -> str:
        """The host (and port) to talk to."""
        return HUB_SERVER if self.registry == HUB else self.registry

    @property
    def wanted(self) -> str:
        """The digest or tag to request from the registry."""
        return self.digest or self.tag or "latest"

    def __str__(self) -> str:
        text = f"{self.registry}/{self.repository}"
        if self.tag is not None:
            text += f":{self.tag}"
        if self.digest is not None:
            text += f"@{self.digest}"
        return text


def is_digest(text: str) -> bool:
    """Whether the text is a digest of an algorithm that can be verified."""
    return _DIGEST.fullmatch(text) is not None


def parse_digest(text: str) -> str:
    """A digest, with or without ``sha256:`` in front.  Raises SourceError."""
    digest = text if ":" in text else f"sha256:{text}"
    if not is_digest(digest):
        raise SourceError(f"{text!r} is no digest (sha256: and 64 hexadecimal digits)")
    return digest


def parse_reference(text: str) -> Reference:
    """Parse a reference.  Raises SourceError if the text is none."""
    rest = text.removeprefix("docker://")
    text = text if text.isprintable() else repr(text)
    digest = tag = None
    if "@" in rest:
        rest, _, digest = rest.partition("@")
        if not is_digest(digest):
            raise SourceError(
                f"{text}: {digest!r} is no digest (sha256: and 64 hexadecimal digits)"
            )
    first, slash, others = rest.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first != first.lower()):
        registry, rest = first, others
    else:
        registry = HUB
    name, colon, after = rest.rpartition(":")
    if colon:
        rest, tag = name, after
        if not _TAG.fullmatch(tag):
            raise SourceError(f"{text}: {tag!r} is no tag")
    if registry in ("index.docker.io", HUB_SERVER):
        registry = HUB
    if registry == HUB and "/" not in rest and rest:
        rest = f"library/{rest}"
    if not _HOST.fullmatch(registry):
        raise SourceError(f"{text}: {registry!r} is no host name")
    if not _NAME.fullmatch(rest) or len(registry) + len(rest) + 1 > MAX_NAME:
        hint = " (names are in lower case)" if rest != rest.lower() else ""
        raise SourceError(f"{text}: {rest!r} is no repository name{hint}")
    return Reference(registry, rest, tag or (None if digest else "latest"), digest)

"""What the user named, as values: ``SourceSpec`` (what it is; no secrets, fit for a file) and
``Access`` (how to get at it; never written anywhere).

All commands, their ``-o`` words, the library and recovery files go through here, so the same words
mean the same everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

from pyerofs.errors import SourceError
from pyerofs.system.arguments import Takes
from pyerofs.units import parse_size

T = TypeVar("T")

DEFAULT_TIMEOUT = 60.0  # seconds for one read, retries included
DEFAULT_CACHE_LIMIT = 10 << 30
PREFETCH = ("none", "metadata", "all")

HTTP = ("http://", "https://")
OCI = "oci://"
LAYOUT = "oci-layout:"


@dataclass(frozen=True, slots=True)
class VeritySpec:
    """A dm-verity tree over a source.  Offsets and sizes are bytes; ``root_hash`` and ``salt`` hex.

    Either ``hash_device`` names what holds the tree, or it lies in the source itself at
    ``hash_offset``.  With ``superblock`` the rest is read from there."""

    root_hash: str
    hash_offset: int | None = None
    hash_device: str | None = None
    superblock: bool = True
    algorithm: str = "sha256"
    salt: str = ""
    data_block_size: int = 4096
    hash_block_size: int = 4096
    data_blocks: int | None = None


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """One image (or extra device), as named by the user.

    ``what`` is a path, an http(s) URL, ``oci://REFERENCE`` or
    ``oci-layout:DIR[:TAG|@DIGEST]``.  ``layer`` (counted from 0) or ``blob`` (a digest) choose within
    an OCI image."""

    what: str
    offset: int = 0
    devices: tuple[SourceSpec, ...] = ()
    verity: VeritySpec | None = None
    platform: str | None = None
    layer: int | None = None
    blob: str | None = None
    username: str | None = None
    insecure: bool = False
    cacert: str | None = None

    @property
    def name(self) -> str:
        """How messages call it: a URL's query, which may hold a signature, is left out."""
        return self.what.partition("?")[0] if self.is_http else self.what

    @property
    def is_http(self) -> bool:
        return self.what.startswith(HTTP)

    @property
    def is_registry(self) -> bool:
        return self.what.startswith(OCI)

    @property
    def is_layout(self) -> bool:
        return self.what.startswith(LAYOUT)

    @property
    def is_remote(self) -> bool:
        """Whether it takes a network to read it."""
        return self.is_http or self.is_registry

    def absolute(self) -> SourceSpec:
        """The same with absolute paths, for those who leave the current directory."""
        verity = self.verity
        if verity is not None and verity.hash_device is not None:
            verity = replace(verity, hash_device=_absolute(verity.hash_device))
        devices = tuple(d.absolute() for d in self.devices)
        return replace(self, what=_absolute(self.what), devices=devices, verity=verity)

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults, as plain values."""
        blank = SourceSpec("")
        found = {k: v for k, v in asdict(self).items() if k == "what" or v != getattr(blank, k)}
        if self.devices:
            found["devices"] = [d.to_json() for d in self.devices]
        return found

    @classmethod
    def from_json(cls, value: object) -> SourceSpec:
        """The reverse of ``to_json``.  Raises SourceError where it is none."""
        try:
            given = dict(value)  # type: ignore[call-overload]
            devices = tuple(cls.from_json(d) for d in given.pop("devices", ()))
            verity = given.pop("verity", None)
            if verity is not None:
                verity = _checked(VeritySpec(**verity))
            return _checked(cls(**given, devices=devices, verity=verity))
        except (TypeError, ValueError) as e:
            raise SourceError(f"this does not describe a source: {e}") from None


def _checked(record: T) -> T:
    """Hold a record made from JSON to the types of its fields, as far as they are plain."""
    kinds = {"str": str, "int": int, "bool": bool}
    for f in fields(record):  # type: ignore[arg-type]
        kind, _, optional = str(f.type).partition(" | ")
        value = getattr(record, f.name)
        if kind in kinds and not (optional and value is None) and type(value) is not kinds[kind]:
            raise ValueError(f"{f.name} is {value!r}, not {f.type}")
    return record


def _absolute(what: str) -> str:
    if what.startswith(LAYOUT):
        return LAYOUT + os.path.abspath(what.removeprefix(LAYOUT))
    return what if what.startswith((*HTTP, OCI)) else os.path.abspath(what)


@dataclass(frozen=True, slots=True)
class Access:
    """How remote sources are got at.

    ``timeout`` bounds, in seconds, each read with all its retries.  ``prefetch_rate`` bounds what is
    fetched in the background, in bytes a second (None: as fast as it comes).  ``verify``: fetch all of
    each blob and check its digest before any of it is used.  ``progress`` is called
    with (what, bytes done, bytes in all or 0) while opening waits for a download."""

    password: str | None = field(default=None, repr=False)
    timeout: float = DEFAULT_TIMEOUT
    cache: bool = True
    cache_dir: str | None = None
    cache_limit: int = DEFAULT_CACHE_LIMIT
    prefetch: str = "metadata"
    prefetch_rate: int | None = None
    verify: bool = False
    progress: Callable[[str, int, int], None] | None = None


class Word(NamedTuple):
    """One option: what its value is called (None for a switch), how it is read, what it does."""

    metavar: str | None
    read: Callable[[str], Any]
    help: str


def parse_spec(what: str, **options: Any) -> SourceSpec:
    """A spec for what was typed.  ``options`` are other fields.

    Raises SourceError where it can't be meant."""
    if what.startswith("oci-layout://"):
        raise SourceError(f"{what}: write oci-layout:DIR, with no slashes after the colon")
    if what.startswith(HTTP):
        authority = what.split("/", 3)[2]
        if "@" in authority:
            raise SourceError(
                "a URL with a user name or password in it is visible to everyone on this machine;"
                " use --username and --password-file"
            )
    spec = SourceSpec(what, **options)
    if spec.layer is not None and spec.blob is not None:
        raise SourceError("--layer and --blob exclude each other")
    if (spec.layer, spec.blob) != (None, None) and not (spec.is_registry or spec.is_layout):
        raise SourceError(f"{spec.name}: --layer and --blob are for OCI images")
    if spec.verity is not None:
        naked = [d for d in spec.devices if d.verity is None]
        if naked:
            raise SourceError(
                f"{naked[0].name}: the image is verified, so this device needs a"
                " --verity-root-hash of its own (after its --device)"
            )
    return spec


def _whole(text: str) -> int:
    value = int(text, 0)
    if value < 0:
        raise ValueError("must not be negative")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e7:
        raise ValueError("must be a positive number of seconds")
    return value


def _hex(text: str) -> str:
    bytes.fromhex(text)
    return text.lower()


def _prefetch(text: str) -> str:
    if text not in PREFETCH:
        raise ValueError(f"is one of {', '.join(PREFETCH)}")
    return text


# What belongs to the image or device that was named last, in the order of the command line.
_VERITY: Mapping[str, tuple[str, Word]] = {
    "verity-root-hash": (
        "root_hash",
        Word("HEX", _hex, "check every read against this dm-verity root hash"),
    ),
    "verity-hash-offset": (
        "hash_offset",
        Word("N", _whole, "the hash tree lies in the same source, at this byte"),
    ),
    "verity-hash-device": (
        "hash_device",
        Word("SOURCE", str, "the hash tree is a file of its own"),
    ),
    "verity-no-superblock": (
        "superblock",
        Word(None, lambda _: False, "the tree has no superblock; the next options describe it"),
    ),
    "verity-algorithm": ("algorithm", Word("NAME", str, "sha256 (default), sha512 or sha1")),
    "verity-salt": ("salt", Word("HEX", _hex, "none by default")),
    "verity-data-block-size": ("data_block_size", Word("N", _whole, "4096 by default")),
    "verity-hash-block-size": ("hash_block_size", Word("N", _whole, "4096 by default")),
    "verity-data-blocks": ("data_blocks", Word("N", _whole, "how many blocks are covered")),
}

_SPEC: Mapping[str, Word] = {
    "offset": Word("N", _whole, "the image starts at this byte of its source"),
    "device": Word("SOURCE", str, "an extra device of the image; repeat it, in order"),
    "platform": Word(
        "OS/ARCH[/VARIANT]", str, "which image of a multi-platform index (default: this machine's)"
    ),
    "layer": Word("N", _whole, "use this layer, counted from 0"),
    "blob": Word("DIGEST", str, "use the layer with this digest"),
    "username": Word("NAME", str, "log in to the registry or server; the password is asked for"),
    "insecure": Word(None, lambda _: True, "allow plain http and unverified certificates"),
    "cacert": Word("FILE", os.path.abspath, "trust the certificate authorities in this file"),
}

_ACCESS: Mapping[str, Word] = {
    "password-file": Word("FILE", str, "take the password from a file (or from $PYEROFS_PASSWORD)"),
    "timeout": Word("SECONDS", _seconds, "how long one read may take, retries included (60)"),
    "cache-dir": Word(
        "DIR", os.path.abspath, "keep what was fetched here ($XDG_CACHE_HOME/pyerofs)"
    ),
    "cache-limit": Word("SIZE", parse_size, "how much to keep in all (10G)"),
    "prefetch": Word(
        "WHAT", _prefetch, "what a mount or export fetches unasked: none, metadata (default) or all"
    ),
    "prefetch-rate": Word("SIZE", parse_size, "at most so many bytes a second of that"),
    "verify": Word(
        None, lambda _: True, "fetch all of it and check its digest before any of it is used"
    ),
    "no-cache": Word(None, lambda _: True, "keep nothing on disk"),
}

WORDS: Mapping[str, Word] = {**_SPEC, **_ACCESS, **{k: word for k, (_, word) in _VERITY.items()}}
TAKES: Mapping[str, Takes] = {
    name: Takes.NOTHING if word.metavar is None else Takes.VALUE for name, word in WORDS.items()
}

# mount.erofs' names for some of them; ``oci.password`` exists only here.
_MOUNT_WORDS = {
    "oci.blob": "blob", "oci.layer": "layer", "oci.platform": "platform",
    "oci.username": "username", "oci.insecure": "insecure",
}  # fmt: skip


class SourceWords:
    """Collects options as they come, from any command line, and makes the values of them."""

    def __init__(self) -> None:
        self.oci = False  # mount.erofs: some oci.* word was given, so the name is a reference
        self.password: str | None = None
        self.environment: str | None = None  # what $PYEROFS_PASSWORD was, once it was needed
        self._spec: dict[str, Any] = {}
        self._access: dict[str, Any] = {}
        self._verity: list[dict[str, Any]] = [{}]
        self._devices: list[str] = []

    def set(self, name: str, value: str) -> None:
        """Take one option.  Raises ValueError with a message that starts with its name."""
        word = WORDS[name]
        try:
            found = word.read(value)
        except ValueError as e:
            raise ValueError(f"{name}={value}: {e}") from None
        if name in _VERITY:
            self._verity[-1][_VERITY[name][0]] = found
        elif name == "device":
            self._devices.append(found)
            self._verity.append({})
        elif name in _SPEC:
            self._spec[name] = found
        else:
            self._access[name.replace("-", "_")] = found

    def set_mount_word(self, name: str, value: str) -> bool:
        """Take a word of ``-o``, ours or mount.erofs'; False where it is neither.

        Raises ValueError."""
        if name == "oci.password":
            self.password = value
            self.oci = True
        elif name in _MOUNT_WORDS:
            self.set(_MOUNT_WORDS[name], value)
            self.oci = True
        elif (ours := name.replace("_", "-")) in WORDS:
            if WORDS[ours].metavar is not None and not value:
                raise ValueError(f"{name} needs a value")
            self.set(ours, value)
        else:
            return False
        return True

    def spec(self, what: str) -> SourceSpec:
        """The image, with its devices, all paths absolute.  Raises SourceError."""
        return self.spec_as_typed(what).absolute()

    def spec_as_typed(self, what: str) -> SourceSpec:
        """The same with paths as they are, for messages.  Raises SourceError."""
        if self.oci and not what.startswith((OCI, LAYOUT)):
            what = OCI + what
        shared = {k: v for k, v in self._spec.items() if k not in ("offset", "layer", "blob")}
        verities = [self._verity_of(found) for found in self._verity]
        devices = tuple(
            parse_spec(name, verity=verity, **shared)
            for name, verity in zip(self._devices, verities[1:], strict=True)
        )
        return parse_spec(what, devices=devices, verity=verities[0], **self._spec)

    def _verity_of(self, found: dict[str, Any]) -> VeritySpec | None:
        if not found:
            return None
        if "root_hash" not in found:
            raise SourceError("--verity-root-hash is missing; nothing can be verified without it")
        if ("hash_offset" in found) == ("hash_device" in found):
            raise SourceError(
                "say where the hash tree is: --verity-hash-offset or --verity-hash-device"
            )
        return VeritySpec(**found)

    def _from_environment(self) -> str | None:
        """The password in the environment; it is taken out of there, so that no child gets it."""
        self.environment = os.environ.pop("PYEROFS_PASSWORD", self.environment)
        return self.environment

    def access(self, ask: Callable[[str], str | None] = lambda _: None) -> Access:
        """How to get at it.  The password comes from its file, from $PYEROFS_PASSWORD, or from
        ``ask`` (None: there is no terminal) where there is a user name.  Raises SourceError."""
        given = dict(self._access)
        environment = self._from_environment()
        password = self.password
        if (path := given.pop("password_file", None)) is not None:
            try:
                with open(path, encoding="utf-8") as f:
                    password = f.read(65536).rstrip("\r\n")
            except (OSError, ValueError) as e:
                reason = e.strerror if isinstance(e, OSError) else "is not text"
                raise SourceError(f"{path}: {reason}") from None
        if password is None:
            password = environment
        if password is None and "username" in self._spec:
            password = ask(f"Password for {self._spec['username']}: ")
            if password is None:
                raise SourceError(
                    "--username needs a password: --password-file, or $PYEROFS_PASSWORD"
                )
        cache = not given.pop("no_cache", False)
        return Access(password=password, cache=cache, **given)

"""What the user named, as values: ``SourceSpec`` says which source (it has no secrets and may be
written to a file), ``Access`` how to read it (it is never written to a file).

All commands, their ``-o`` options, the library and recovery files use this module, so an option means
the same everywhere.
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
    """A dm-verity hash tree over a source.  Offsets and sizes are in bytes; ``root_hash`` and ``salt``
    in hex.

    Either ``hash_device`` names the source that holds the tree, or the tree is in the checked source at
    ``hash_offset``.  With ``superblock``, the fields after it come from the tree's superblock."""

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

    ``what`` is a path, an http(s) URL, ``oci://REFERENCE`` or ``oci-layout:DIR[:TAG|@DIGEST]``.
    ``layer`` (counted from 0) or ``blob`` (a digest) chooses a layer of an OCI image."""

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
        """The name for messages: ``what`` without a URL's query, which may hold a signature."""
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
        """Whether reading the source needs a network."""
        return self.is_http or self.is_registry

    def absolute(self) -> SourceSpec:
        """The same with absolute paths, for processes that change their working directory."""
        verity = self.verity
        if verity is not None and verity.hash_device is not None:
            verity = replace(verity, hash_device=_absolute(verity.hash_device))
        devices = tuple(d.absolute() for d in self.devices)
        return replace(self, what=_absolute(self.what), devices=devices, verity=verity)

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON values."""
        blank = SourceSpec("")
        changed = {k: v for k, v in asdict(self).items() if k == "what" or v != getattr(blank, k)}
        if self.devices:
            changed["devices"] = [d.to_json() for d in self.devices]
        return changed

    @classmethod
    def from_json(cls, value: object) -> SourceSpec:
        """The reverse of ``to_json``.  Raises SourceError if ``value`` does not describe a source."""
        try:
            given = dict(value)  # type: ignore[call-overload]
            devices = tuple(cls.from_json(d) for d in given.pop("devices", ()))
            verity = given.pop("verity", None)
            if verity is not None:
                verity = _checked(VeritySpec(**verity))
            return _checked(cls(**given, devices=devices, verity=verity))
        except (TypeError, ValueError) as e:
            raise SourceError(f"not the description of a source: {e}") from None


def _checked(record: T) -> T:
    """Check that the str, int and bool fields of a record made from JSON have these types.  Raises
    ValueError."""
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
    """How to read remote sources.

    ``timeout`` bounds each read with all its retries, in seconds.  ``cache_limit`` is in bytes.
    ``prefetch_rate`` bounds each task that fetches in the background, in bytes a second (None: no
    bound).  ``verify``: fetch each whole blob and check its digest before any of its bytes is used.
    ``progress`` is called with (what, bytes done, bytes in total or 0) while opening waits for a
    download."""

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
    """One option: the name of its value (None for a switch), the function that parses the value, and
    the help text."""

    metavar: str | None
    read: Callable[[str], Any]
    help: str


def parse_spec(what: str, **options: Any) -> SourceSpec:
    """The spec of a source as the user typed it.  ``options``: the other fields of the spec.

    Raises SourceError if the combination is not valid."""
    if what.startswith("oci-layout://"):
        raise SourceError(f"{what}: write oci-layout:DIR, with no slashes after the colon")
    if what.startswith(HTTP):
        authority = what.split("/", 3)[2]
        if "@" in authority:
            raise SourceError(
                "a user name or password in a URL is visible to other users of this machine;"
                " use --username and --password-file"
            )
    spec = SourceSpec(what, **options)
    if spec.layer is not None and spec.blob is not None:
        raise SourceError("--layer and --blob exclude each other")
    if (spec.layer, spec.blob) != (None, None) and not (spec.is_registry or spec.is_layout):
        raise SourceError(f"{spec.name}: --layer and --blob apply to OCI images only")
    if spec.verity is not None:
        naked = [d for d in spec.devices if d.verity is None]
        if naked:
            raise SourceError(
                f"{naked[0].name}: the image is checked by dm-verity, so this device needs its own"
                " --verity-root-hash, after its --device"
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
        raise ValueError(f"must be one of {', '.join(PREFETCH)}")
    return text


# Options for the image or device that was named last on the command line.
_VERITY: Mapping[str, tuple[str, Word]] = {
    "verity-root-hash": (
        "root_hash",
        Word("HEX", _hex, "check every read against this dm-verity root hash"),
    ),
    "verity-hash-offset": (
        "hash_offset",
        Word("N", _whole, "the hash tree is in the same source, at this byte"),
    ),
    "verity-hash-device": (
        "hash_device",
        Word("SOURCE", str, "the hash tree is in this other source"),
    ),
    "verity-no-superblock": (
        "superblock",
        Word(None, lambda _: False, "the tree has no superblock; the next options describe it"),
    ),
    "verity-algorithm": (
        "algorithm",
        Word("NAME", str, "the hash: sha256 (default), sha512 or sha1"),
    ),
    "verity-salt": ("salt", Word("HEX", _hex, "the salt (default: none)")),
    "verity-data-block-size": (
        "data_block_size",
        Word("N", _whole, "bytes in a data block (default 4096)"),
    ),
    "verity-hash-block-size": (
        "hash_block_size",
        Word("N", _whole, "bytes in a hash block (default 4096)"),
    ),
    "verity-data-blocks": (
        "data_blocks",
        Word("N", _whole, "how many data blocks the tree covers"),
    ),
}

_SPEC: Mapping[str, Word] = {
    "offset": Word("N", _whole, "the image starts at this byte of its source"),
    "device": Word("SOURCE", str, "an extra device of the image; repeat for more, in order"),
    "platform": Word(
        "OS/ARCH[/VARIANT]", str, "which image of a multi-platform index (default: this machine's)"
    ),
    "layer": Word("N", _whole, "use this layer, counted from 0"),
    "blob": Word("DIGEST", str, "use the layer with this digest"),
    "username": Word("NAME", str, "log in to the registry or server; asks for the password"),
    "insecure": Word(None, lambda _: True, "allow plain http and unverified certificates"),
    "cacert": Word("FILE", os.path.abspath, "trust the certificate authorities in this file"),
}

_ACCESS: Mapping[str, Word] = {
    "password-file": Word("FILE", str, "read the password from a file (or set $PYEROFS_PASSWORD)"),
    "timeout": Word("SECONDS", _seconds, "limit for one read with its retries (default 60)"),
    "cache-dir": Word(
        "DIR", os.path.abspath, "the cache directory (default $XDG_CACHE_HOME/pyerofs)"
    ),
    "cache-limit": Word("SIZE", parse_size, "limit for all of the cache (default 10G)"),
    "prefetch": Word(
        "WHAT", _prefetch, "what a mount or export prefetches: none, metadata (default) or all"
    ),
    "prefetch-rate": Word("SIZE", parse_size, "limit for prefetching, in bytes a second"),
    "verify": Word(
        None, lambda _: True, "fetch the whole blob and check its digest before using any of it"
    ),
    "no-cache": Word(None, lambda _: True, "store nothing on disk"),
}

WORDS: Mapping[str, Word] = {**_SPEC, **_ACCESS, **{k: word for k, (_, word) in _VERITY.items()}}
TAKES: Mapping[str, Takes] = {
    name: Takes.NOTHING if word.metavar is None else Takes.VALUE for name, word in WORDS.items()
}

# mount.erofs' names for these options.  ``oci.password`` has no other name.
_MOUNT_WORDS = {
    "oci.blob": "blob", "oci.layer": "layer", "oci.platform": "platform",
    "oci.username": "username", "oci.insecure": "insecure",
}  # fmt: skip


class SourceWords:
    """Collects a command line's options, in order, and makes a SourceSpec and an Access of them."""

    def __init__(self) -> None:
        self.oci = False  # an oci.* option of mount.erofs was given: the source is a reference
        self.password: str | None = None
        self.environment: str | None = None  # the value of $PYEROFS_PASSWORD, once it was read
        self._spec: dict[str, Any] = {}
        self._access: dict[str, Any] = {}
        self._verity: list[dict[str, Any]] = [{}]
        self._devices: list[str] = []

    def set(self, name: str, value: str) -> None:
        """Take one option.  Raises ValueError with a message that starts with the option's name."""
        word = WORDS[name]
        try:
            parsed = word.read(value)
        except ValueError as e:
            raise ValueError(f"{name}={value}: {e}") from None
        if name in _VERITY:
            self._verity[-1][_VERITY[name][0]] = parsed
        elif name == "device":
            self._devices.append(parsed)
            self._verity.append({})
        elif name in _SPEC:
            self._spec[name] = parsed
        else:
            self._access[name.replace("-", "_")] = parsed

    def set_mount_word(self, name: str, value: str) -> bool:
        """Take a ``-o`` option of pyerofs or mount.erofs; False if it is neither.

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
        """The spec of the image with its devices; all paths are absolute.  Raises SourceError."""
        return self.spec_as_typed(what).absolute()

    def spec_as_typed(self, what: str) -> SourceSpec:
        """The same with the paths as the user typed them, for messages.  Raises SourceError."""
        if self.oci and not what.startswith((OCI, LAYOUT)):
            what = OCI + what
        shared = {k: v for k, v in self._spec.items() if k not in ("offset", "layer", "blob")}
        verities = [self._verity_of(found) for found in self._verity]
        devices = tuple(
            parse_spec(name, verity=verity, **shared)
            for name, verity in zip(self._devices, verities[1:], strict=True)
        )
        return parse_spec(what, devices=devices, verity=verities[0], **self._spec)

    def _verity_of(self, options: dict[str, Any]) -> VeritySpec | None:
        if not options:
            return None
        if "root_hash" not in options:
            raise SourceError("the other --verity options need --verity-root-hash")
        if ("hash_offset" in options) == ("hash_device" in options):
            raise SourceError(
                "--verity-root-hash needs either --verity-hash-offset or --verity-hash-device"
            )
        return VeritySpec(**options)

    def _from_environment(self) -> str | None:
        """The password in the environment; the variable is removed, so that no child inherits it."""
        self.environment = os.environ.pop("PYEROFS_PASSWORD", self.environment)
        return self.environment

    def access(self, ask: Callable[[str], str | None] = lambda _: None) -> Access:
        """The Access of the options.  The password comes from --password-file, oci.password,
        $PYEROFS_PASSWORD or, if a user name was given, ``ask`` (which returns None without a
        terminal), in this order.  Raises SourceError."""
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
                    "--username needs a password: use --password-file or $PYEROFS_PASSWORD"
                )
        cache = not given.pop("no_cache", False)
        return Access(password=password, cache=cache, **given)

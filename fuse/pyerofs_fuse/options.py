"""The command line of pyerofs-fuse: words -> Options.  Compatible with erofsfuse and mount(8)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from pyerofs.units import parse_size

USAGE = """\
usage: pyerofs-fuse [options] IMAGE MOUNTPOINT

Mount an EROFS image, read-only, without being root.  Returns once the mount is live; a daemon stays
behind until it is unmounted (fusermount3 -u MOUNTPOINT, or umount).

options:
  --offset=N        the image starts at byte N of the file
  --device=PATH     an extra device of the image; repeat it, in order
  --cache-size=N    bytes to keep decoded in memory (64M; K, M and G are understood)
  --dbglevel=N      0 (errors only) to 9; 3 and above log each request
  -f                stay in the foreground and log to stderr
  -d                like -f, and log requests
  -s                accepted for compatibility: one event loop serves all requests anyway
  -o OPT[,OPT...]   mount options: allow_other, allow_root, default_permissions, auto_unmount,
                    nodev, nosuid, noexec, max_read=N, fsname=NAME, subtype=NAME; also offset=N,
                    device=PATH, cache_size=N, dbglevel=N
  -h, --help        this text
  -V, --version     the version

exit status: 0 mounted, 1 not mounted (one line on stderr says why)
"""

# Words for libfuse and the kernel; with "=" they take a value.
_PASSED = {
    "allow_other", "allow_root", "default_permissions", "auto_unmount", "dev", "nodev", "suid",
    "nosuid", "exec", "noexec", "atime", "noatime", "diratime", "nodiratime", "relatime",
    "norelatime", "strictatime", "nostrictatime", "sync", "async", "dirsync", "max_read=",
    "fsname=", "subtype=", "context=", "fscontext=", "defcontext=", "rootcontext=",
}  # fmt: skip
# Words of fstab and mount(8) that are not about us, and what a read-only image is anyway.
_IGNORED = {
    "ro", "rw", "defaults", "auto", "noauto", "user", "nouser", "users", "group", "owner", "nofail",
    "_netdev", "loop", "default", "silent", "loud", "intr", "nointr",
}  # fmt: skip


class UsageError(Exception):
    """The words make no sense; the message says why."""


@dataclass
class Options:
    """What the command line asks for."""

    image: str = ""
    mountpoint: str = ""
    offset: int = 0
    devices: list[str] = field(default_factory=list)
    cache_size: int = 64 << 20
    foreground: bool = False
    debug: int = 0
    fuse: list[str] = field(default_factory=list)
    show: str = ""  # "help" or "version": only that

    @property
    def shared(self) -> bool:
        """Whether users other than the owner may look in."""
        return "allow_other" in self.fuse or "allow_root" in self.fuse


def parse(words: list[str]) -> Options:
    """Parse the words after the command's name.  Raises UsageError."""
    options = Options()
    names: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            names += rest
        elif word.startswith("--"):
            _long(options, word[2:], rest)
        elif word == "-o":
            _mount_options(options, _value("-o", None, rest))
        elif word.startswith("-o"):
            _mount_options(options, word[2:])
        elif word.startswith("-") and word != "-":
            for letter in word[1:]:
                _short(options, letter)
        else:
            names.append(word)
    if options.show:
        return options
    if len(names) != 2:
        raise UsageError(
            "needs an image and a mount point" if len(names) < 2 else f"unexpected {names[2]!r}"
        )
    if not all(names):
        raise UsageError("an empty name is no image and no mount point")
    options.image, options.mountpoint = names
    return options


def _value(name: str, given: str | None, rest: object) -> str:
    value = given if given is not None else next(rest, None)  # type: ignore[call-overload]
    if value is None:
        raise UsageError(f"{name} needs a value")
    return str(value)


def _long(options: Options, word: str, rest: object) -> None:
    name, equals, given = word.partition("=")
    value = given if equals else None
    if name in ("help", "version"):
        options.show = name
    elif name in ("offset", "device", "cache-size", "dbglevel"):
        _own(options, name.replace("-", "_"), _value(f"--{name}", value, rest))
    elif name == "foreground":
        options.foreground = True
    else:
        raise UsageError(f"unknown option --{name}")


def _short(options: Options, letter: str) -> None:
    if letter == "f":
        options.foreground = True
    elif letter == "d":
        options.foreground = True
        options.debug = max(options.debug, 3)
    elif letter == "h":
        options.show = "help"
    elif letter == "V":
        options.show = "version"
    elif letter not in "sn":  # -n: mount(8) passes it on
        raise UsageError(f"unknown option -{letter}")


def _own(options: Options, name: str, value: str) -> None:
    try:
        if name == "offset":
            options.offset = int(value, 0)
        elif name == "device":
            options.devices.append(value)
        elif name == "cache_size":
            options.cache_size = parse_size(value)
        else:
            options.debug = int(value)
    except ValueError:
        raise UsageError(f"{name}={value}: not a number") from None
    if options.offset < 0:
        raise UsageError(f"offset={value}: negative")


def _mount_options(options: Options, text: str) -> None:
    for word in filter(None, _split(text)):
        name, equals, value = word.partition("=")
        if name in ("offset", "device", "cache_size", "dbglevel") and equals:
            _own(options, name, value)
        elif name in _IGNORED or name.startswith("x-") or name == "comment":
            continue
        elif name == "debug":
            options.debug = max(options.debug, 3)
        elif name + equals in _PASSED:
            options.fuse.append(word)
        else:
            raise UsageError(f"unknown mount option {word!r}")


def _split(text: str) -> list[str]:
    """Split at commas that no backslash precedes."""
    words = [""]
    escaped = False
    for c in text:
        if escaped:
            words[-1] += c
            escaped = False
        elif c == "\\":
            escaped = True
        elif c == ",":
            words.append("")
        else:
            words[-1] += c
    return words


def fuse_words(options: Options) -> list[str]:
    """What libfuse is to be told, escaped for its parser, ASCII only."""
    words = ["ro"]
    given = {w.partition("=")[0] for w in options.fuse}
    if "fsname" not in given:
        words.append("fsname=" + os.path.abspath(options.image))
    if "subtype" not in given:
        words.append("subtype=pyerofs-fuse")
    if options.shared and "default_permissions" not in given:
        words.append("default_permissions")
    return [_escape(w) for w in words + options.fuse]


def _escape(word: str) -> str:
    """libfuse splits at commas and reads backslash escapes; pyfuse3 passes ASCII only."""
    return "".join(
        chr(b) if 0x20 <= b < 0x7F and b not in b",\\" else f"\\{b:03o}" for b in os.fsencode(word)
    )

"""The command line of pyerofs-fuse, parsed into Options.  Compatible with erofsfuse and mount(8)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from pyerofs.sources.spec import OCI, WORDS, SourceSpec, SourceWords, split_words
from pyerofs.units import parse_size

T = TypeVar("T")

USAGE = """\
usage: pyerofs-fuse [options] IMAGE MOUNTPOINT
       pyerofs-fuse [options] --oci REFERENCE MOUNTPOINT

Mount an EROFS image, read-only, without being root.  Returns once the mount is live; a daemon stays
behind until it is unmounted (fusermount3 -u MOUNTPOINT, or umount).

IMAGE is a file, a block device, a URL (https://...), oci://REFERENCE or oci-layout:DIR[:TAG].

options:
  --cache-size=N    bytes to keep decoded in memory (64M; K, M and G are understood)
  --dbglevel=N      0 (errors only) to 9; 3 and above log each request
  -f                stay in the foreground and log to stderr
  -d                like -f, and log requests
  -s                serve with one process, rather than one for each processor
  -o OPT[,OPT...]   mount options: allow_other, allow_root, default_permissions, auto_unmount,
                    nodev, nosuid, noexec, fsname=NAME, subtype=NAME; also all options
                    with values below and above (cache_size=N), and mount.erofs' oci.blob=,
                    oci.layer=, oci.platform=, oci.username=, oci.password=, oci.insecure
  -h, --help        this text
  -V, --version     the version

where the image is:
  --oci=REFERENCE   the same as oci://REFERENCE
{words}
  --prefetch-list=FILE  fetch the files that are listed here first, a path a line
  --record=FILE     write such a list when unmounted: the files that were opened

exit status: 0 mounted, 1 not mounted (one line on stderr says why)
"""


def usage() -> str:
    """The help text."""
    lines = []
    for name, word in WORDS.items():
        shown = f"--{name}" + (f"={word.metavar}" if word.metavar else "")
        gap = "\n" + " " * 20 if len(shown) > 17 else " " * (18 - len(shown))
        lines.append(f"  {shown}{gap}{word.help}")
    return USAGE.replace("{words}", "\n".join(lines))


# Mount options for libfuse and the kernel; those with "=" take a value.
_PASSED = {
    "allow_other", "allow_root", "default_permissions", "auto_unmount", "dev", "nodev", "suid",
    "nosuid", "exec", "noexec", "atime", "noatime", "diratime", "nodiratime", "relatime",
    "norelatime", "strictatime", "nostrictatime", "sync", "async", "dirsync",
    "fsname=", "subtype=", "context=", "fscontext=", "defcontext=", "rootcontext=",
}  # fmt: skip
# Ignored: options that only fstab and mount(8) use, and those that a read-only image implies.
_IGNORED = {
    "ro", "rw", "defaults", "auto", "noauto", "user", "nouser", "users", "group", "owner", "nofail",
    "_netdev", "loop", "default", "silent", "loud", "intr", "nointr",
    "max_read",  # would also have to be set through pyfuse3, which does not support it
    # erofsfuse passes these to libfuse's own loop, cache and id mapping, which are not used here
    "max_threads", "max_idle_threads", "clone_fd", "kernel_cache", "auto_cache", "noforget",
    "umask", "uid", "gid", "entry_timeout", "negative_timeout", "attr_timeout", "ac_attr_timeout",
    "remember", "modules",
}  # fmt: skip


_OWN = {"cache-size", "dbglevel", "record", "prefetch-list"}


class UsageError(Exception):
    """The command line is invalid; the message says why."""


@dataclass
class Options:
    """The parsed command line."""

    image: str = ""
    mountpoint: str = ""
    source: SourceWords = field(default_factory=SourceWords)
    prefetch_list: str | None = None
    record: str | None = None
    cache_size: int = 64 << 20
    foreground: bool = False
    single: bool = False  # one process
    debug: int = 0
    fuse: list[str] = field(default_factory=list)
    show: str = ""  # "help" or "version": only that

    @property
    def spec(self) -> SourceSpec:
        """The source to mount, with absolute paths.  Raises SourceError."""
        return self.source.spec(self.image)

    @property
    def shared(self) -> bool:
        """Whether users other than the owner may access the mount."""
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
    if options.image:
        names.insert(0, options.image)
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
    elif name == "oci":
        options.image = OCI + _value("--oci", value, rest)
    elif options.source.knows(name):
        wanted = WORDS[name].metavar is not None
        if equals and not wanted:
            raise UsageError(f"--{name} takes no value")
        _source(options.source.set, name, _value(f"--{name}", value, rest) if wanted else "")
    elif name in _OWN:
        _own(options, name, _value(f"--{name}", value, rest))
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
    elif letter == "s":
        options.single = True
    elif letter != "n":  # mount(8) passes -n on
        raise UsageError(f"unknown option -{letter}")


def _source(take: Callable[[str, str], T], name: str, value: str) -> T:
    try:
        return take(name, value)
    except ValueError as e:
        raise UsageError(str(e)) from None


def _own(options: Options, name: str, value: str) -> None:
    try:
        if name == "cache-size":
            options.cache_size = parse_size(value)
        elif name == "dbglevel":
            options.debug = int(value)
        elif name == "record":
            options.record = os.path.abspath(value)
        else:
            options.prefetch_list = os.path.abspath(value)
    except ValueError:
        raise UsageError(f"{name}={value}: not a number") from None


def _is_ignored(name: str) -> bool:
    return name in _IGNORED or name.startswith("x-") or name == "comment"


def _mount_options(options: Options, text: str) -> None:
    for word in filter(None, split_words(text)):
        name, equals, value = word.partition("=")
        own = name.replace("_", "-")
        if own in _OWN and equals:
            _own(options, own, value)
        elif _source(options.source.set_mount_word, name, value) or _is_ignored(name):
            continue
        elif name == "debug":
            options.debug = max(options.debug, 3)
        elif name + equals in _PASSED:
            options.fuse.append(word)
        else:
            raise UsageError(f"unknown mount option {word!r}")


def fuse_words(options: Options, name: str) -> list[str]:
    """The mount options for libfuse, escaped for its parser, ASCII only.  ``name``: the source's
    name."""
    words = ["ro"]
    given = {w.partition("=")[0] for w in options.fuse}
    if "fsname" not in given:
        words.append("fsname=" + name)
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

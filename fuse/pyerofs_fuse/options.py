"""The command line of pyerofs-fuse, parsed into Options.  Compatible with erofsfuse and mount(8)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from pyerofs.sources.spec import OCI, TAKES, WORDS, SourceSpec, SourceWords
from pyerofs.system.arguments import MountOption, Operand, Option, Takes, UsageError, read
from pyerofs.units import parse_size

T = TypeVar("T")

USAGE = """\
usage: pyerofs-fuse [options] IMAGE MOUNTPOINT
       pyerofs-fuse [options] --oci REFERENCE MOUNTPOINT

Mount an EROFS image read-only, without being root.  The command returns once the mount is live; a
daemon serves the mount until it is unmounted (fusermount3 -u MOUNTPOINT, or umount).

IMAGE is a file, a block device, a URL (https://...), oci://REFERENCE or oci-layout:DIR[:TAG].

options:
  --cache-size=N    memory for metadata and decoded data (default 64M; K, M, G)
  --dbglevel=N      0 (errors only) to 9; 3 and above log each request
  -f                stay in the foreground and log to stderr
  -d                like -f, and log requests
  -s                ignored, for erofsfuse's sake
  --engine=NAME     direct (speaks the kernel's protocol itself; survives its server's death) or
                    pyfuse3 (default for images that are not on this machine, where it is installed)
  -o OPT[,OPT...]   mount options: allow_other, allow_root, default_permissions, auto_unmount,
                    nodev, nosuid, noexec, fsname=NAME, subtype=NAME; also all options
                    of this text that have values (cache_size=N), and mount.erofs' oci.blob=,
                    oci.layer=, oci.platform=, oci.username=, oci.password=, oci.insecure
  -h, --help        show this text
  -V, --version     show the version

where the image is:
  --oci=REFERENCE   the same as oci://REFERENCE
{words}
  --prefetch-list=FILE  prefetch the files listed in FILE first, one path per line
  --record=FILE     at unmounting, write the files that were opened to FILE, as such a list

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


# Followed by a descriptor, in place of all other arguments: go on with a mount (``direct.handover``)
RESUME = "--resume="

_VALUED = ("cache-size", "dbglevel", "record", "prefetch-list", "engine")
ENGINES = ("direct", "pyfuse3")
_TAKES = {
    **TAKES,
    "oci": Takes.VALUE,
    **dict.fromkeys(_VALUED, Takes.VALUE),
    **dict.fromkeys(("help", "version", "foreground"), Takes.NOTHING),
}
_LETTERS = {
    "f": "foreground",
    "d": "debug",
    "s": "single",  # erofsfuse's: serve with one thread
    "n": "no-mtab",  # mount(8) passes it on
    "h": "help",
    "V": "version",
}


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
    engine: str | None = None  # one of ENGINES; None: what suits the source
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
    for item in read(words, _TAKES, _LETTERS):
        if isinstance(item, Operand):
            names.append(item.text)
        elif isinstance(item, Option):
            _option(options, item)
        else:
            _mount_option(options, item)
    if options.show:
        return options
    if options.image:
        names.insert(0, options.image)
    if len(names) != 2:
        raise UsageError(
            "needs an image and a mount point"
            if len(names) < 2
            else f"unexpected argument {names[2]!r}"
        )
    if not all(names):
        raise UsageError("the image and the mount point must not be empty")
    options.image, options.mountpoint = names
    return options


def _option(options: Options, item: Option) -> None:
    name = item.name
    if name in ("help", "version"):
        options.show = name
    elif name == "oci":
        options.image = OCI + item.text
    elif name in WORDS:
        _source(options.source.set, name, item.value or "")
    elif name in _VALUED:
        _own(options, name, item.text)
    elif name in ("foreground", "debug"):
        options.foreground = True
        if name == "debug":
            options.debug = max(options.debug, 3)


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
        elif name == "engine":
            if value not in ENGINES:
                raise UsageError(f"{name}={value}: is one of {', '.join(ENGINES)}")
            options.engine = value
        else:
            options.prefetch_list = os.path.abspath(value)
    except ValueError:
        raise UsageError(f"{name}={value}: not a valid number") from None


def _is_ignored(name: str) -> bool:
    return name in _IGNORED or name.startswith("x-") or name == "comment"


def _mount_option(options: Options, item: MountOption) -> None:
    name, value = item.name, item.value
    own = name.replace("_", "-")
    if own in _VALUED and value is not None:
        _own(options, own, value)
    elif _source(options.source.set_mount_word, name, value or "") or _is_ignored(name):
        return
    elif name == "debug":
        options.debug = max(options.debug, 3)
    elif name + ("" if value is None else "=") in _PASSED:
        options.fuse.append(item.word)
    else:
        raise UsageError(f"unknown mount option {item.word!r}")


def mount_words(options: Options) -> tuple[str | None, str, list[str]]:
    """The name and the kind of file system that are shown (None: the source's name), and the other
    options of mount(8).  Who lets others in has the kernel check permissions."""
    name, subtype, words = None, "pyerofs-fuse", []
    for word in options.fuse:
        key, _, value = word.partition("=")
        if key == "fsname":
            name = value
        elif key == "subtype":
            subtype = value
        else:
            words.append(word)
    if options.shared and "default_permissions" not in words:
        words.append("default_permissions")
    return name, subtype, words

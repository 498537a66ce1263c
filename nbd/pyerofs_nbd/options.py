"""The command line of pyerofs-nbd: words -> Options."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pyerofs.sources.spec import WORDS, SourceWords, split_words
from pyerofs_nbd.devices.sysfs import index_of

DEAD_TIMEOUT = 3600

_HEAD = """\
usage: pyerofs-nbd [options] SOURCE | --oci REFERENCE
       pyerofs-nbd [options] --socket PATH | --listen HOST:PORT | --stdio  [SOURCE]
       pyerofs-nbd --list | --disconnect | --unmount | --reattach | --takeover  [TARGET]

Make an image, a file, or what a web server or registry has, a network block device: attach it as
/dev/nbdN (Linux, root) and leave a daemon, or serve it to NBD clients.  SOURCE is a path, a URL,
oci://REFERENCE or oci-layout:DIR.  TARGET is /dev/nbdN or where it is mounted.

attach (prints the device):
  --oci REF              the source is an image in a registry
  --mount DIR            mount it there as erofs; the device goes with the mount
  -o OPT[,OPT...]        mount options; source options may be among them (offset=N, oci.layer=N)
  --nbd-device DEVICE    take this device (default: any free one)
  --dead-timeout TIME    how long reads wait for a new server when one dies (1h; s, m, h, d)
  --supervise            stay, and start a new server when one dies
  --ioctl                for kernels without nbd's netlink interface; a dead server is the end then
  -f, --foreground       stay in the foreground and log to stderr
  --log-file FILE        log there, not to syslog
  -v, --verbose          log more

look after devices:
  --list [--json]        devices, whether their servers live, sources, mounts, bytes fetched
  --unmount TARGET       unmount, and disconnect the device
  --disconnect TARGET    disconnect the device, whoever uses it
  --reattach TARGET      start a new server for a device whose server has died
  --reattach --all       the same for all of them
  --takeover TARGET      replace a living server without interruption
  --accept-unpinned      with --reattach: a source that may have changed since will do

serve:
  --socket PATH          on a unix socket
  --listen HOST:PORT     on TCP (port 10809 if none is given)
  --stdio                one client on stdin and stdout
  --export NAME=SOURCE   serve it under this name; repeat it
  --tls-cert FILE --tls-key FILE   offer TLS
  --tls-ca FILE          let only clients in with a certificate of this authority
  --tls-required         refuse clients without TLS
                         (sockets passed by systemd are served without any of these)

source:
"""

_TAIL = """\

  -h, --help             this text
  -V, --version          the version

exit status: 0 done, 1 failed (one line on stderr says why), 2 the command line makes no sense
"""


def usage() -> str:
    """The text of --help."""
    lines = []
    for name, word in WORDS.items():
        left = f"--{name} {word.metavar}" if word.metavar else f"--{name}"
        gap = f"\n{'':25}" if len(left) > 20 else " " * (23 - len(left))
        lines.append(f"  {left}{gap}{word.help}")
    return _HEAD + "\n".join(lines) + "\n" + _TAIL


class UsageError(Exception):
    """The command line is invalid; the message says why."""


@dataclass
class Options:
    """What the command line asks for."""

    mode: str = "attach"  # serve, list, disconnect, unmount, reattach, takeover, help, version
    source: str | None = None
    oci: str | None = None
    words: SourceWords = field(default_factory=SourceWords)
    given: list[tuple[str, str]] = field(default_factory=list)  # source options, in order
    mount: str | None = None
    mount_words: list[str] = field(default_factory=list)
    target: str | None = None
    all: bool = False
    nbd_device: int | None = None
    dead_timeout: int = DEAD_TIMEOUT
    ioctl: bool = False
    supervise: bool = False
    foreground: bool = False
    verbose: bool = False
    log_file: str | None = None
    json: bool = False
    accept_unpinned: bool = False
    sockets: list[str] = field(default_factory=list)
    listens: list[str] = field(default_factory=list)
    stdio: bool = False
    exports: list[tuple[str, str]] = field(default_factory=list)
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    tls_required: bool = False
    secret_typed: bool = False  # oci.password= is on the command line

    @property
    def what(self) -> str | None:
        """The source, as ``SourceWords.spec`` takes it."""
        return self.source if self.oci is None else f"oci://{self.oci}"

    @property
    def password_file(self) -> str | None:
        """The last --password-file."""
        found = [value for name, value in self.given if name == "password-file"]
        return os.path.abspath(found[-1]) if found else None


class _Own(NamedTuple):
    """An option that is not a source option: whether it takes a value, and its modes."""

    value: bool
    modes: frozenset[str]


_ATTACH = frozenset({"attach"})
_SERVE = frozenset({"serve"})
_RENEW = frozenset({"reattach", "takeover"})
_ANY = _ATTACH | _SERVE | _RENEW | {"list", "disconnect", "unmount"}
_OWN = {
    "oci": _Own(True, _ATTACH | _SERVE),
    "mount": _Own(True, _ATTACH),
    "nbd-device": _Own(True, _ATTACH),
    "dead-timeout": _Own(True, _ATTACH),
    "ioctl": _Own(False, _ATTACH),
    "supervise": _Own(False, _ATTACH | _RENEW),
    "foreground": _Own(False, _ATTACH | _RENEW | _SERVE),
    "verbose": _Own(False, _ANY),
    "log-file": _Own(True, _ATTACH | _RENEW | _SERVE),
    "json": _Own(False, frozenset({"list"})),
    "all": _Own(False, frozenset({"reattach"})),
    "accept-unpinned": _Own(False, frozenset({"reattach"})),
    "export": _Own(True, _SERVE),
    "tls-cert": _Own(True, _SERVE),
    "tls-key": _Own(True, _SERVE),
    "tls-ca": _Own(True, _SERVE),
    "tls-required": _Own(False, _SERVE),
}
# the options that select a mode, and the modes' names
_MODES = {
    "socket": "serve", "listen": "serve", "stdio": "serve", "list": "list",
    "disconnect": "disconnect", "unmount": "unmount", "reattach": "reattach",
    "takeover": "takeover",
}  # fmt: skip
_TARGETED = ("disconnect", "unmount", "reattach", "takeover")
_SHORT = {"f": "foreground", "v": "verbose", "h": "help", "V": "version"}
# the source options that apply to one image, not to all exports
_OF_ONE = ("offset", "device", "layer", "blob")
# the source options that may be given again for a device's new server
_AGAIN = ("username", "password-file", "insecure", "cacert")


class _Parser:
    """One pass over the command line."""

    def __init__(self) -> None:
        self.options = Options()
        self.names: list[str] = []
        self.modes: list[str] = []  # the options that select a mode, as given
        self.used: list[str] = []  # the other options of _OWN, as given
        self.mounted = False  # -o was given

    def parse(self, words: list[str]) -> None:
        rest = iter(words)
        for word in rest:
            if word == "--":
                self.names += rest
            elif word.startswith("--"):
                name, equals, given = word[2:].partition("=")
                self._long(name, given if equals else None, rest)
            elif word.startswith("-o"):
                self.mounted = True
                self._mount_words(word[2:] or _value("-o", None, rest))
            elif word.startswith("-") and word != "-":
                for letter in word[1:]:
                    if letter not in _SHORT:
                        raise UsageError(f"unknown option -{letter}")
                    self._long(_SHORT[letter], None, rest)
            else:
                self.names.append(word)

    def _long(self, name: str, given: str | None, rest: Iterator[str]) -> None:
        options = self.options
        if name in ("help", "version"):
            options.mode = name
        elif name in _MODES:
            self.modes.append(name)
            if name in ("socket", "listen"):
                (options.sockets if name == "socket" else options.listens).append(
                    _value(f"--{name}", given, rest)
                )
            elif given is not None:
                if name not in _TARGETED:
                    raise UsageError(f"--{name} takes no value")
                self.names.append(given)
        elif name in _OWN:
            self.used.append(name)
            if _OWN[name].value:
                self._set(name, _value(f"--{name}", given, rest))
            elif given is not None:
                raise UsageError(f"--{name} takes no value")
            else:
                setattr(options, name.replace("-", "_"), True)
        elif name in WORDS:
            if WORDS[name].metavar is not None:
                given = _value(f"--{name}", given, rest)
            elif given is not None:
                raise UsageError(f"--{name} takes no value")
            self._source_word(name, given or "", "--")
        else:
            raise UsageError(f"unknown option --{name}")

    def _set(self, name: str, value: str) -> None:
        options = self.options
        if name == "mount":
            if options.mount is not None:
                raise UsageError("--mount can be given once")
            if not value:
                raise UsageError("--mount needs a directory")
            options.mount = os.path.abspath(value)
        elif name == "nbd-device":
            options.nbd_device = index_of(value)
            if options.nbd_device is None:
                raise UsageError(f"--nbd-device {value}: is not like /dev/nbd0 (--device names an"
                                 " extra device of the image)")  # fmt: skip
        elif name == "dead-timeout":
            options.dead_timeout = _duration(value)
        elif name == "export":
            export, equals, source = value.partition("=")
            if not (export and equals and source):
                raise UsageError(f"--export {value}: write NAME=SOURCE")
            if export in [n for n, _ in options.exports]:
                raise UsageError(f"--export {export}: is there twice")
            options.exports.append((export, source))
        elif name == "oci":
            options.oci = value
        else:
            setattr(options, name.replace("-", "_"), os.path.abspath(value))

    def _source_word(self, name: str, value: str, prefix: str) -> None:
        try:
            self.options.words.set(name, value)
        except ValueError as e:
            raise UsageError(f"{prefix}{e}") from None
        self.options.given.append((name, value))

    def _mount_words(self, text: str) -> None:
        options = self.options
        for word in filter(None, split_words(text)):
            name, _, value = word.partition("=")
            try:
                ours = options.words.set_mount_word(name, value)
            except ValueError as e:
                raise UsageError(f"-o {e}") from None
            if name.startswith("oci.") and not ours:
                raise UsageError(f"-o {name}: is not supported")
            if ours:
                options.secret_typed |= name == "oci.password"
                options.given.append((name.removeprefix("oci.").replace("_", "-"), value))
            else:
                options.mount_words.append(word)


def parse(words: list[str], *, activated: bool = False) -> Options:
    """Parse the words after the command's name.  ``activated``: systemd has passed sockets.

    Raises UsageError."""
    parser = _Parser()
    parser.parse(words)
    options = parser.options
    if options.mode in ("help", "version"):
        return options
    modes = dict.fromkeys(_MODES[name] for name in parser.modes)
    if len(modes) > 1:
        first, second = list(dict.fromkeys(parser.modes))[:2]
        raise UsageError(f"--{first} and --{second} exclude each other")
    attaching = [n for n in parser.used if _OWN[n].modes == _ATTACH]
    options.mode = next(iter(modes), "serve" if activated and not attaching else "attach")
    options.stdio = "stdio" in parser.modes
    _check_modes(parser)
    if options.mode in _TARGETED:
        _check_target(parser)
    elif options.mode == "list":
        _none_of(parser, parser.names, "--list takes no argument")
        _none_of(parser, options.given, "--list takes no source options")
    else:
        _check_source(parser)
    return options


def _check_modes(parser: _Parser) -> None:
    mode = parser.options.mode
    here = f"--{parser.modes[0]}" if parser.modes else "attaching a device"
    for name in parser.used:
        if mode not in _OWN[name].modes:
            needs = {
                _SERVE: " (serve with --socket, --listen or --stdio)",
                frozenset({"list"}): " (it belongs to --list)",
                frozenset({"reattach"}): " (it belongs to --reattach)",
            }.get(_OWN[name].modes, "")
            raise UsageError(f"--{name} does not go with {here}{needs}")
    if parser.mounted and mode != "attach":
        raise UsageError(f"-o does not go with {here}")


def _none_of(parser: _Parser, found: object, message: str) -> None:
    if found:
        raise UsageError(message)


def _check_target(parser: _Parser) -> None:
    options, names = parser.options, parser.names
    mode = options.mode
    if len(parser.modes) > 1:
        raise UsageError(f"--{mode} can be given once")
    allowed = _AGAIN if mode in ("reattach", "takeover") else ()
    for name, _ in options.given:
        if name not in allowed:
            raise UsageError(f"--{name} does not go with --{mode}")
    if options.all:
        _none_of(parser, names, "--all and a device exclude each other")
        _none_of(parser, options.supervise or options.foreground,
                 "--all leaves daemons: no --supervise, no --foreground")  # fmt: skip
        return
    if not names or not names[0]:
        more = ", or --all" if mode == "reattach" else ""
        raise UsageError(f"--{mode} needs /dev/nbdN or where it is mounted{more}")
    if len(names) > 1:
        raise UsageError(f"unexpected {names[1]!r}")
    options.target = names[0] if index_of(names[0]) is not None else os.path.abspath(names[0])


def _check_source(parser: _Parser) -> None:
    options, names = parser.options, parser.names
    if len(names) > 1:
        raise UsageError(f"unexpected {names[1]!r}")
    if names and options.oci is not None:
        raise UsageError(f"{names[0]!r} and --oci exclude each other")
    if (names and not names[0]) or options.oci == "":
        raise UsageError("an empty name is no source")
    options.source = names[0] if names else None
    if options.what is None and not options.exports:
        raise UsageError("needs a source")
    if options.mode == "serve":
        _check_serving(options)
        return
    if options.mount is None and options.mount_words:
        raise UsageError(f"-o {options.mount_words[0]}: is for --mount DIR")
    if options.ioctl:
        for name in ("dead-timeout", "supervise"):
            if name in parser.used:
                raise UsageError(
                    f"--{name} does not go with --ioctl: a dead server can't be replaced there"
                )
    if options.foreground and options.log_file is not None:
        raise UsageError("--log-file is for daemons; --foreground logs to stderr")


def _check_serving(options: Options) -> None:
    if options.stdio and (options.sockets or options.listens):
        raise UsageError("--stdio excludes --socket and --listen")
    if options.exports and options.what is None:
        for name, _ in options.given:
            if name in _OF_ONE or name.startswith("verity"):
                raise UsageError(f"--{name} is about SOURCE, not about what --export names")
    if (options.tls_cert is None) != (options.tls_key is None):
        raise UsageError("--tls-cert and --tls-key belong together")
    if options.tls_cert is None and (options.tls_ca is not None or options.tls_required):
        raise UsageError("TLS needs --tls-cert and --tls-key")
    if options.tls_ca is not None:  # else clients without a certificate could connect without TLS
        options.tls_required = True
    if options.tls_cert is not None and options.stdio:
        raise UsageError("--stdio is without TLS")


def for_exports(options: Options) -> SourceWords:
    """The source options that apply to the sources of --export as well."""
    words = SourceWords()
    for name, value in options.given:
        if name not in _OF_ONE and not name.startswith("verity"):
            words.set(name, value)
    return words


def _value(name: str, given: str | None, rest: Iterator[str]) -> str:
    value = given if given is not None else next(rest, None)
    if value is None:
        raise UsageError(f"{name} needs a value")
    return value


def _duration(text: str) -> int:
    """``90``, ``90s``, ``10m``, ``1h`` or ``30d`` in seconds."""
    scale = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:], 0)
    digits = text[:-1] if scale else text
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 9):
        raise UsageError(f"--dead-timeout {text}: is no time like 90s, 10m, 1h or 30d")
    return int(digits) * (scale or 1)

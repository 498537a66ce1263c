"""The command line of pyerofs-nbd: words -> the mode that they ask for, a dataclass for each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from pyerofs.sources.spec import OCI, TAKES, WORDS, SourceSpec, SourceWords
from pyerofs.system.arguments import MountOption, Operand, Option, Takes, UsageError, read
from pyerofs_nbd.devices.sysfs import index_of

DEAD_TIMEOUT = 3600

_HEAD = """\
usage: pyerofs-nbd [options] SOURCE | --oci REFERENCE
       pyerofs-nbd [options] --socket PATH | --listen HOST:PORT | --stdio  [SOURCE]
       pyerofs-nbd --list | --disconnect | --unmount | --reattach | --takeover  [TARGET]

Make an image a network block device: attach it as /dev/nbdN (Linux, root), served by a daemon, or
serve it to NBD clients.  SOURCE is a path, a URL, oci://REFERENCE or oci-layout:DIR.  TARGET is
/dev/nbdN or its mount point.

attach (prints the device):
  --oci REF              the source is an image in a registry
  --mount DIR            mount the device there as erofs; unmounting disconnects it
  -o OPT[,OPT...]        mount options; source options may be among them (offset=N, oci.layer=N)
  --nbd-device DEVICE    use this device (default: any free one)
  --dead-timeout TIME    how long reads wait for a new server when one dies (default 1h; s, m, h, d)
  --supervise            stay running, and start a new server when one dies
  --ioctl                for kernels without nbd's netlink interface; can't replace a dead server
  -f, --foreground       stay in the foreground and log to stderr
  --log-file FILE        log to FILE instead of syslog
  -v, --verbose          log more

manage devices:
  --list [--json]        show devices, whether their servers live, sources, mounts, bytes fetched
  --unmount TARGET       unmount, and disconnect the device
  --disconnect TARGET    disconnect the device, even if it is in use
  --reattach TARGET      start a new server for a device whose server has died
  --reattach --all       the same for all such devices
  --takeover TARGET      replace a living server without interruption
  --accept-unpinned      with --reattach: accept a source that may have changed

serve:
  --socket PATH          on a unix socket
  --listen HOST:PORT     on TCP (port 10809 if none is given)
  --stdio                one client on stdin and stdout
  --export NAME=SOURCE   serve SOURCE under this name; repeat for more
  --tls-cert FILE --tls-key FILE   offer TLS
  --tls-ca FILE          require client certificates of this authority
  --tls-required         refuse clients without TLS
                         (sockets passed by systemd are served without any of these)

source:
"""

_TAIL = """\

  -h, --help             show this text
  -V, --version          show the version

exit status: 0 done, 1 failed (one line on stderr says why), 2 the command line is invalid
"""


def usage() -> str:
    """The text of --help."""
    lines = []
    for name, word in WORDS.items():
        left = f"--{name} {word.metavar}" if word.metavar else f"--{name}"
        gap = f"\n{'':25}" if len(left) > 20 else " " * (23 - len(left))
        lines.append(f"  {left}{gap}{word.help}")
    return _HEAD + "\n".join(lines) + "\n" + _TAIL


# --- the modes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The source that is named on the command line.

    ``secret_typed``: its password is on the command line."""

    what: str
    words: SourceWords
    password_file: str | None = None
    secret_typed: bool = False

    def spec(self) -> SourceSpec:
        """Raises SourceError."""
        return self.words.spec(self.what)


@dataclass(frozen=True)
class Behaviour:
    """How the server process runs.  ``log_file`` is absolute."""

    foreground: bool = False
    verbose: bool = False
    log_file: str | None = None
    supervise: bool = False


@dataclass(frozen=True)
class Attach:
    """Attach a source to a device, and mount it where ``mount``, an absolute path, is given.

    ``dead_timeout`` is in seconds; ``device`` is the index of the device to take."""

    source: Source
    behaviour: Behaviour
    mount: str | None
    mount_words: tuple[str, ...]
    device: int | None
    dead_timeout: int
    ioctl: bool


@dataclass(frozen=True)
class Certificates:
    """TLS by these files; with ``authority``, only for clients that it has certified."""

    certificate: str
    key: str
    authority: str | None
    required: bool


@dataclass(frozen=True)
class Serve:
    """Serve sources to NBD clients; ``named`` are the names and sources of all exports."""

    named: tuple[tuple[str, SourceSpec], ...]
    words: SourceWords
    behaviour: Behaviour
    sockets: tuple[str, ...]
    listens: tuple[str, ...]
    stdio: bool
    tls: Certificates | None

    @property
    def tls_required(self) -> bool:
        """Whether clients without TLS are refused."""
        return self.tls is not None and self.tls.required


@dataclass(frozen=True)
class ListDevices:
    """List all devices."""

    json: bool


@dataclass(frozen=True)
class Unmount:
    """Unmount ``target``, a device or an absolute path, and disconnect its devices."""

    target: str


@dataclass(frozen=True)
class Disconnect:
    """Disconnect ``target``, a device or an absolute path, whoever uses it."""

    target: str


@dataclass(frozen=True)
class Login:
    """Source options that are given anew for a device's new server; None: as before."""

    words: SourceWords
    username: str | None = None
    insecure: bool = False
    cacert: str | None = None


@dataclass(frozen=True)
class Reattach:
    """Start a new server for ``target``, or (None) for all devices whose servers have died."""

    target: str | None
    login: Login
    behaviour: Behaviour
    accept_unpinned: bool


@dataclass(frozen=True)
class TakeOver:
    """Replace the living server of ``target``."""

    target: str
    login: Login
    behaviour: Behaviour


@dataclass(frozen=True)
class Show:
    """Print a text, and do nothing else: ``what`` is help or version."""

    what: str


Mode = Attach | Serve | ListDevices | Unmount | Disconnect | Reattach | TakeOver | Show


# --- which options there are ----------------------------------------------------------------

_ATTACH = frozenset({"attach"})
_SERVE = frozenset({"serve"})
_RENEW = frozenset({"reattach", "takeover"})
_ANY = _ATTACH | _SERVE | _RENEW | {"list", "disconnect", "unmount"}
# The options that are not source options: what they take, and the modes that they belong to.
_OWN: dict[str, tuple[Takes, frozenset[str]]] = {
    "oci": (Takes.VALUE, _ATTACH | _SERVE),
    "mount": (Takes.VALUE, _ATTACH),
    "nbd-device": (Takes.VALUE, _ATTACH),
    "dead-timeout": (Takes.VALUE, _ATTACH),
    "ioctl": (Takes.NOTHING, _ATTACH),
    "supervise": (Takes.NOTHING, _ATTACH | _RENEW),
    "foreground": (Takes.NOTHING, _ATTACH | _RENEW | _SERVE),
    "verbose": (Takes.NOTHING, _ANY),
    "log-file": (Takes.VALUE, _ATTACH | _RENEW | _SERVE),
    "json": (Takes.NOTHING, frozenset({"list"})),
    "all": (Takes.NOTHING, frozenset({"reattach"})),
    "accept-unpinned": (Takes.NOTHING, frozenset({"reattach"})),
    "export": (Takes.VALUE, _SERVE),
    "tls-cert": (Takes.VALUE, _SERVE),
    "tls-key": (Takes.VALUE, _SERVE),
    "tls-ca": (Takes.VALUE, _SERVE),
    "tls-required": (Takes.NOTHING, _SERVE),
}
# The options that select a mode: what they take, and the mode.
_MODES: dict[str, tuple[Takes, str]] = {
    "socket": (Takes.VALUE, "serve"),
    "listen": (Takes.VALUE, "serve"),
    "stdio": (Takes.NOTHING, "serve"),
    "list": (Takes.NOTHING, "list"),
    "disconnect": (Takes.JOINED, "disconnect"),
    "unmount": (Takes.JOINED, "unmount"),
    "reattach": (Takes.JOINED, "reattach"),
    "takeover": (Takes.JOINED, "takeover"),
}
_SHOWN = ("help", "version")
_TAKES = {
    **TAKES,
    **{name: takes for name, (takes, _) in (*_OWN.items(), *_MODES.items())},
    **dict.fromkeys(_SHOWN, Takes.NOTHING),
}
_LETTERS = {"f": "foreground", "v": "verbose", "h": "help", "V": "version"}
# the source options that apply to one image, not to all exports
_OF_ONE = ("offset", "device", "layer", "blob")
# the source options that may be given again for a device's new server
_AGAIN = ("username", "password-file", "insecure", "cacert")


# --- reading them ---------------------------------------------------------------------------


@dataclass
class _Given:
    """The command line as it was given, before it is known what it asks for."""

    operands: list[str] = field(default_factory=list)
    modes: list[Option] = field(default_factory=list)  # the options that select a mode
    own: list[Option] = field(default_factory=list)  # the other options of _OWN
    shown: str | None = None
    source: list[tuple[str, str]] = field(default_factory=list)  # the source options
    words: SourceWords = field(default_factory=SourceWords)  # what they say
    secret_typed: bool = False
    has_mount_options: bool = False
    mount_words: list[str] = field(default_factory=list)

    def has(self, name: str) -> bool:
        """Whether an option of _OWN was given."""
        return any(option.name == name for option in self.own)

    def values(self, name: str) -> list[str]:
        """The values of an option that selects no mode."""
        return [option.text for option in self.own if option.name == name]

    def last(self, name: str) -> str | None:
        """The last value of an option."""
        return next(iter(reversed(self.values(name))), None)

    def last_path(self, name: str) -> str | None:
        """The same, as an absolute path."""
        value = self.last(name)
        return None if value is None else os.path.abspath(value)

    def selected(self, name: str) -> list[str]:
        """The values of an option that selects a mode."""
        return [option.text for option in self.modes if option.name == name]


def parse(words: list[str], *, activated: bool = False) -> Mode:
    """Parse the words after the command's name.  ``activated``: systemd has passed sockets.

    Raises UsageError, and SourceError where a source can't be meant."""
    given = _read(words)
    if given.shown is not None:
        return Show(given.shown)
    chosen = list(dict.fromkeys(option.name for option in given.modes))
    modes = list(dict.fromkeys(_MODES[name][1] for name in chosen))
    if len(modes) > 1:
        raise UsageError(f"--{chosen[0]} and --{chosen[1]} exclude each other")
    attaching = any(_OWN[option.name][1] == _ATTACH for option in given.own)
    mode = modes[0] if modes else "serve" if activated and not attaching else "attach"
    _check_mode(given, mode, f"--{chosen[0]}" if chosen else "attaching a device")
    return _BUILDERS[mode](given)


def _read(words: list[str]) -> _Given:
    given = _Given()
    for item in read(words, _TAKES, _LETTERS):
        if isinstance(item, Operand):
            given.operands.append(item.text)
        elif isinstance(item, MountOption):
            _take_mount_option(given, item)
        elif item.name in _SHOWN:
            given.shown = item.name
        elif item.name in _OWN:
            given.own.append(item)
        elif item.name in WORDS:
            try:
                given.words.set(item.name, item.value or "")
            except ValueError as e:
                raise UsageError(f"--{e}") from None
            given.source.append((item.name, item.value or ""))
        else:
            given.modes.append(item)
            if _TAKES[item.name] is Takes.JOINED and item.value is not None:
                given.operands.append(item.value)
    return given


def _take_mount_option(given: _Given, item: MountOption) -> None:
    name, value = item.name, item.value or ""
    given.has_mount_options = True
    try:
        is_source_word = given.words.set_mount_word(name, value)
    except ValueError as e:
        raise UsageError(f"-o {e}") from None
    if name.startswith("oci.") and not is_source_word:
        raise UsageError(f"-o {name}: is not supported")
    if is_source_word:
        given.secret_typed |= name == "oci.password"
        given.source.append((name.removeprefix("oci.").replace("_", "-"), value))
    else:
        given.mount_words.append(item.word)


def _check_mode(given: _Given, mode: str, here: str) -> None:
    for option in given.own:
        _, modes = _OWN[option.name]
        if mode not in modes:
            needs = {
                _SERVE: " (serve with --socket, --listen or --stdio)",
                frozenset({"list"}): " (it belongs to --list)",
                frozenset({"reattach"}): " (it belongs to --reattach)",
            }.get(modes, "")
            raise UsageError(f"--{option.name} does not go with {here}{needs}")
    if given.has_mount_options and mode != "attach":
        raise UsageError(f"-o does not go with {here}")


# --- one function for each mode -------------------------------------------------------------


def _attach(given: _Given) -> Attach:
    what = _what(given)
    if what is None:
        raise UsageError("needs a source")
    mounts = given.values("mount")
    if len(mounts) > 1:
        raise UsageError("--mount can be given only once")
    if mounts and not mounts[0]:
        raise UsageError("--mount needs a directory")
    if not mounts and given.mount_words:
        raise UsageError(f"-o {given.mount_words[0]}: needs --mount DIR")
    for name in ("dead-timeout", "supervise"):
        if given.has("ioctl") and given.has(name):
            raise UsageError(
                f"--{name} does not go with --ioctl: a dead server can't be replaced there"
            )
    if given.has("foreground") and given.has("log-file"):
        raise UsageError("--log-file is for daemons; --foreground logs to stderr")
    return Attach(
        Source(what, given.words, _password_file(given), given.secret_typed),
        _behaviour(given),
        given.last_path("mount"),
        tuple(given.mount_words),
        _device(given.last("nbd-device")),
        _duration(given.last("dead-timeout")),
        given.has("ioctl"),
    )


def _serve(given: _Given) -> Serve:
    what = _what(given)
    exports: dict[str, str] = {}
    for value in given.values("export"):
        name, equals, source = value.partition("=")
        if not (name and equals and source):
            raise UsageError(f"--export {value}: write NAME=SOURCE")
        if name in exports:
            raise UsageError(f"--export {name}: given twice")
        exports[name] = source
    if what is None and not exports:
        raise UsageError("needs a source")
    shared = SourceWords()
    for name, value in given.source:
        if name not in _OF_ONE and not name.startswith("verity"):
            shared.set(name, value)
        elif what is None:
            raise UsageError(f"--{name} applies to SOURCE only, not to --export")
    sockets, listens = given.selected("socket"), given.selected("listen")
    stdio = any(option.name == "stdio" for option in given.modes)
    if stdio and (sockets or listens):
        raise UsageError("--stdio excludes --socket and --listen")
    named = [] if what is None else [("", given.words.spec(what))]
    named += [(name, shared.spec(source)) for name, source in exports.items()]
    return Serve(
        tuple(named), given.words, _behaviour(given), tuple(sockets), tuple(listens), stdio,
        _certificates(given, stdio=stdio),
    )  # fmt: skip


def _list(given: _Given) -> ListDevices:
    if given.operands:
        raise UsageError("--list takes no argument")
    if given.source:
        raise UsageError("--list takes no source options")
    return ListDevices(given.has("json"))


def _unmount(given: _Given) -> Unmount:
    _check_source_options(given, "unmount", ())
    return Unmount(_target(given, "unmount"))


def _disconnect(given: _Given) -> Disconnect:
    _check_source_options(given, "disconnect", ())
    return Disconnect(_target(given, "disconnect"))


def _reattach(given: _Given) -> Reattach:
    _check_source_options(given, "reattach", _AGAIN)
    if given.has("all"):
        if given.operands:
            raise UsageError("--all and a device exclude each other")
        if given.has("supervise") or given.has("foreground"):
            raise UsageError(
                "--all starts daemons; it does not go with --supervise or --foreground"
            )
        target = None
    else:
        target = _target(given, "reattach", ", or --all")
    return Reattach(target, _login(given), _behaviour(given), given.has("accept-unpinned"))


def _take_over(given: _Given) -> TakeOver:
    _check_source_options(given, "takeover", _AGAIN)
    return TakeOver(_target(given, "takeover"), _login(given), _behaviour(given))


_BUILDERS: dict[str, Callable[[_Given], Mode]] = {
    "attach": _attach,
    "serve": _serve,
    "list": _list,
    "unmount": _unmount,
    "disconnect": _disconnect,
    "reattach": _reattach,
    "takeover": _take_over,
}


# --- the parts of a mode --------------------------------------------------------------------


def _what(given: _Given) -> str | None:
    """The source, as ``SourceWords.spec`` takes it."""
    names, reference = given.operands, given.last("oci")
    if len(names) > 1:
        raise UsageError(f"unexpected argument {names[1]!r}")
    if names and reference is not None:
        raise UsageError(f"{names[0]!r} and --oci exclude each other")
    if "" in (*names, reference):
        raise UsageError("the name of the source must not be empty")
    return OCI + reference if reference is not None else names[0] if names else None


def _check_source_options(given: _Given, mode: str, allowed: tuple[str, ...]) -> None:
    if len(given.modes) > 1:
        raise UsageError(f"--{mode} can be given only once")
    for name, _ in given.source:
        if name not in allowed:
            raise UsageError(f"--{name} does not go with --{mode}")


def _target(given: _Given, mode: str, more: str = "") -> str:
    names = given.operands
    if not names or not names[0]:
        raise UsageError(f"--{mode} needs /dev/nbdN or its mount point{more}")
    if len(names) > 1:
        raise UsageError(f"unexpected argument {names[1]!r}")
    return names[0] if index_of(names[0]) is not None else os.path.abspath(names[0])


def _behaviour(given: _Given) -> Behaviour:
    return Behaviour(
        given.has("foreground"),
        given.has("verbose"),
        given.last_path("log-file"),
        given.has("supervise"),
    )


def _login(given: _Given) -> Login:
    found = dict(given.source)
    cacert = found.get("cacert")
    return Login(
        given.words,
        found.get("username"),
        "insecure" in found,
        None if cacert is None else os.path.abspath(cacert),
    )


def _password_file(given: _Given) -> str | None:
    path = dict(given.source).get("password-file")
    return None if path is None else os.path.abspath(path)


def _certificates(given: _Given, *, stdio: bool) -> Certificates | None:
    certificate, key, authority = map(given.last_path, ("tls-cert", "tls-key", "tls-ca"))
    required = given.has("tls-required")
    if (certificate is None) != (key is None):
        raise UsageError("--tls-cert and --tls-key must be given together")
    if certificate is None or key is None:
        if authority is not None or required:
            raise UsageError("TLS needs --tls-cert and --tls-key")
        return None
    if stdio:
        raise UsageError("--stdio does not support TLS")
    # with an authority, a client without a certificate must not get in by not asking for TLS
    return Certificates(certificate, key, authority, required or authority is not None)


def _device(text: str | None) -> int | None:
    """The index of a device that is named like /dev/nbd0."""
    index = None if text is None else index_of(text)
    if text is not None and index is None:
        raise UsageError(
            f"--nbd-device {text}: is not like /dev/nbd0 (--device names an extra device of the"
            " image)"
        )
    return index


def _duration(text: str | None) -> int:
    """``90``, ``90s``, ``10m``, ``1h`` or ``30d`` in seconds."""
    if text is None:
        return DEAD_TIMEOUT
    scale = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:], 0)
    digits = text[:-1] if scale else text
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 9):
        raise UsageError(f"--dead-timeout {text}: is not a time such as 90s, 10m, 1h or 30d")
    return int(digits) * (scale or 1)

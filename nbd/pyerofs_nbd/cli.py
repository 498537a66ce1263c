"""The command ``pyerofs-nbd``: parse its command line, run a mode.  Heavy imports come late."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

from pyerofs.errors import ErofsError, one_line
from pyerofs.system.daemon import STOPS, access_to, ask_password, heeded
from pyerofs.system.streams import open_standard_streams
from pyerofs_nbd.devices.sysfs import node
from pyerofs_nbd.errors import NbdError, sole_cause
from pyerofs_nbd.options import Options, UsageError, for_exports, parse, usage

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyerofs.sources.spec import Access, SourceSpec
    from pyerofs_nbd.devices.recovery import Credentials, Record
    from pyerofs_nbd.lifecycle.attach import Attached, Behaviour
    from pyerofs_nbd.lifecycle.reattach import Group

COMMAND = "pyerofs-nbd"


def run() -> None:
    """The command's entry point."""
    open_standard_streams()
    sys.exit(main(sys.argv[1:]))


def main(words: list[str]) -> int:
    """Run the command; returns its exit status."""
    try:
        options = parse(words, activated=os.environ.get("LISTEN_PID") == str(os.getpid()))
    except UsageError as e:
        print(f"{COMMAND}: {one_line(str(e))} (--help shows how)", file=sys.stderr)
        return 2
    if options.mode == "help":
        print(usage(), end="")
        return 0
    if options.mode == "version":
        from pyerofs import __version__

        print(f"{COMMAND} {__version__}")
        return 0
    try:
        return _MODES[options.mode](options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except BaseExceptionGroup as e:
        return _failed(sole_cause(e))
    except Exception as e:
        return _failed(e)


def _failed(e: BaseException) -> int:
    """Print an error in one line; returns the exit status."""
    if isinstance(e, (ErofsError, NbdError)):
        message = str(e)
    elif isinstance(e, KeyboardInterrupt):
        return 130
    elif isinstance(e, OSError):
        where = f"{e.filename}: " if e.filename else ""
        message = f"{where}{e.strerror or e}"
    elif isinstance(e, ImportError):
        message = f"{e}; is pyerofs installed with all it needs?"
    else:
        message = f"unexpected {type(e).__name__}: {e}; please report it"
        if os.environ.get("PYEROFS_DEBUG"):
            raise e
    print(f"{COMMAND}: {one_line(message)}", file=sys.stderr)
    return 1


# --- sources --------------------------------------------------------------------------------


def _source(options: Options) -> tuple[SourceSpec, Record]:
    """The source, and the template of the recovery files."""
    from pyerofs_nbd.devices.recovery import Record

    what = options.what
    assert what is not None
    spec = options.words.spec(what)
    access = access_to(options.words)
    record = Record(
        spec, None, access, credentials(options, access), mountpoint=_mountpoint(options)
    )
    return spec, record


def _mountpoint(options: Options) -> str | None:
    return None if options.mount is None else os.path.realpath(options.mount)


def credentials(options: Options, access: Access) -> Credentials:
    """Where the password comes from, for the recovery file."""
    from pyerofs_nbd.devices.recovery import Credentials

    if options.password_file is not None:
        return Credentials("file", options.password_file)
    if access.password is None:
        return Credentials()
    typed = options.secret_typed or options.words.environment is None
    return Credentials("terminal" if typed else "environment")


# --- modes ----------------------------------------------------------------------------------


def _behaviour(options: Options) -> Behaviour:
    from pyerofs_nbd.lifecycle.attach import Behaviour

    return Behaviour(options.foreground, options.verbose, options.log_file, options.supervise)


def _attach(options: Options) -> int:
    from pyerofs_nbd.devices.driver import check_privilege
    from pyerofs_nbd.lifecycle.attach import Plan, attach

    check_privilege()
    spec, record = _source(options)
    if not spec.is_remote and not spec.is_layout:
        os.close(os.open(spec.what, os.O_RDONLY | os.O_CLOEXEC))  # report a wrong path early
    plan = Plan(
        record,
        _behaviour(options),
        mount_words=tuple(options.mount_words),
        wanted=options.nbd_device,
        ioctl=options.ioctl,
        dead_timeout=options.dead_timeout,
    )
    return _leave(lambda: attach(plan), [record], plan.behaviour)


def _leave(make: Callable[[], Attached], records: list[Record], behaviour: Behaviour) -> int:
    """Call ``make``, which starts a server; leave the server as a daemon, or stay with it."""
    from pyerofs_nbd.lifecycle.attach import settle, stay

    _end_on_signals()
    if behaviour.supervise and not behaviour.foreground:
        return _leave_supervisor(make, records, behaviour)
    found = make()
    print(node(found.indices[0]), flush=True)
    if not found.paths:
        print(f"{COMMAND}: the device can't be saved if its server dies", file=sys.stderr)
    if behaviour.supervise:
        return _supervise(found, records, behaviour)
    if behaviour.foreground:
        settle(found, behaviour)
        return stay(found)
    _ignore_signals()  # so that 130 means that nothing is left, and 0 that the devices stay
    settle(found, behaviour)
    return 0


def _leave_supervisor(
    make: Callable[[], Attached], records: list[Record], behaviour: Behaviour
) -> int:
    from pyerofs.system.daemon import fork, start_logging

    report = fork(COMMAND)
    start_logging(COMMAND, foreground=False, debug=int(behaviour.verbose))
    try:
        found = make()
        print(node(found.indices[0]), flush=True)
    except (ErofsError, NbdError) as e:
        report.failed(str(e))
    except BaseException as e:
        report.failed(f"unexpected {type(e).__name__}: {e}")
    report.ready()
    return _supervise(found, records, behaviour)


def _supervise(found: Attached, records: list[Record], behaviour: Behaviour) -> int:
    from dataclasses import replace

    from pyerofs_nbd.devices import recovery
    from pyerofs_nbd.lifecycle.attach import settle
    from pyerofs_nbd.lifecycle.supervise import supervise

    access = records[0].access
    known = [replace(recovery.load(path), access=access) for path in found.paths]
    settle(found, behaviour)
    return supervise(found, known, behaviour)


def _end_on_signals() -> None:
    """Have SIGTERM and SIGHUP undo all steps so far, as Ctrl-C does."""
    import signal

    def interrupt(number: int, _: object) -> NoReturn:
        raise KeyboardInterrupt

    for number in heeded(signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


def _ignore_signals() -> None:
    """Have signals undo nothing any more."""
    import signal

    for number in heeded(*STOPS):
        signal.signal(number, signal.SIG_IGN)


def _serve(options: Options) -> int:
    from pyerofs.system.daemon import start_logging

    named: list[tuple[str, SourceSpec]] = []
    if options.what is not None:
        named.append(("", options.words.spec(options.what)))
    shared = for_exports(options)
    named += [(name, shared.spec(source)) for name, source in options.exports]
    access = access_to(options.words)
    start_logging(COMMAND, foreground=True, debug=int(options.verbose), log_file=options.log_file)
    from pyerofs_nbd.server.modes import serve

    serve(options, named, access)
    return 0


def _list(options: Options) -> int:
    from pyerofs_nbd.lifecycle import inventory

    text = inventory.as_json() if options.json else inventory.as_table()
    if text:
        print(text)
    return 0


def _unmount(options: Options) -> int:
    from pyerofs_nbd.lifecycle.teardown import unmount_target

    unmount_target(str(options.target))
    return 0


def _disconnect(options: Options) -> int:
    from pyerofs_nbd.lifecycle.teardown import disconnect_target

    for where in disconnect_target(str(options.target)):
        print(
            f"{COMMAND}: {one_line(where)} is still mounted and can't be read any more; unmount it",
            file=sys.stderr,
        )
    return 0


def _renewed(options: Options, group: Group) -> Group:
    """The group with its password, and with the source options given anew."""
    from dataclasses import replace

    first = _with_access(options, group.records[0])
    records = [replace(r, source=first.source, access=first.access) for r in group.records]
    return replace(group, records=records)


def _with_access(options: Options, record: Record) -> Record:
    from dataclasses import replace

    changes = {
        name: value for name, value in options.given if name in ("username", "insecure", "cacert")
    }
    spec = record.source
    if "username" in changes:
        spec = replace(spec, username=changes["username"])
    if "insecure" in changes:
        spec = replace(spec, insecure=True)
    if "cacert" in changes:
        spec = replace(spec, cacert=os.path.abspath(changes["cacert"]))
    password = access_to(options.words).password
    if password is None:
        password = record.access.password or _password_of(record)
    return replace(record, source=spec, access=replace(record.access, password=password))


def _password_of(record: Record) -> str | None:
    found = record.credentials
    if found.source == "file" and found.path is not None:
        try:
            with open(found.path, encoding="utf-8") as f:
                return f.read(65536).rstrip("\r\n")
        except (OSError, ValueError) as e:
            raise NbdError(f"{found.path}: {getattr(e, 'strerror', None) or 'is not text'}") from e
    if found.source == "none":
        return None
    password = ask_password(f"Password for {record.source.name}: ")
    if password is not None:
        return password
    how = "was typed" if found.source == "terminal" else "came from $PYEROFS_PASSWORD"
    raise NbdError(f"{record.source.name}: the password {how}; give it again (--password-file)")


def _reattach(options: Options) -> int:
    from pyerofs_nbd.lifecycle.reattach import Alive, group_of, reattach, resolve

    if options.all:
        return _reattach_all(options)
    behaviour = _behaviour(options)
    group = group_of(resolve(str(options.target)), accept_unpinned=options.accept_unpinned)
    group = _renewed(options, group)
    try:
        return _leave(lambda: reattach(group, behaviour), group.records, behaviour)
    except Alive as e:
        print(f"{COMMAND}: {e}", file=sys.stderr)
        return 0


def _reattach_all(options: Options) -> int:
    """Reattach all dead devices of pyerofs-nbd and mount.erofs, but none of other programs."""
    from pyerofs_nbd.devices import recovery, sysfs
    from pyerofs_nbd.devices.driver import check_privilege
    from pyerofs_nbd.lifecycle.attach import settle
    from pyerofs_nbd.lifecycle.reattach import Alive, group_of, reattach

    check_privilege()
    status = 0
    done: set[int] = set()
    behaviour = _behaviour(options)
    for index in sysfs.devices():
        path = sysfs.backend(index)
        if index in done or not path or recovery.alive(path) or not os.path.isfile(path):
            continue
        try:
            group = group_of(index, accept_unpinned=options.accept_unpinned)
            done.update(group.indices)
            group = _renewed(options, group)
            found = reattach(group, behaviour)
            settle(found, behaviour)
            print(node(index), flush=True)
        except Alive:
            continue
        except (NbdError, ErofsError) as e:
            print(f"{COMMAND}: {one_line(str(e))}", file=sys.stderr)
            status = 1
    recovery.collect()
    return status


def _takeover(options: Options) -> int:
    from pyerofs_nbd.lifecycle.reattach import group_of, resolve, take_over

    behaviour = _behaviour(options)
    group = group_of(resolve(str(options.target)))
    group = _renewed(options, group)
    return _leave(lambda: take_over(group, behaviour), group.records, behaviour)


_MODES = {
    "attach": _attach,
    "serve": _serve,
    "list": _list,
    "unmount": _unmount,
    "disconnect": _disconnect,
    "reattach": _reattach,
    "takeover": _takeover,
}

"""The command ``pyerofs-nbd``: parse its command line, run a mode.  Heavy imports come late."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

from pyerofs.errors import ErofsError, SourceError, one_line
from pyerofs.system.arguments import UsageError
from pyerofs.system.daemon import STOPS, access_to, ask_password, heeded
from pyerofs.system.streams import open_standard_streams
from pyerofs_nbd.devices.sysfs import node
from pyerofs_nbd.errors import NbdError, sole_cause
from pyerofs_nbd.options import (
    Attach,
    Behaviour,
    Disconnect,
    ListDevices,
    Login,
    Mode,
    Reattach,
    Serve,
    Show,
    Source,
    TakeOver,
    Unmount,
    parse,
    usage,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyerofs.sources.spec import Access
    from pyerofs_nbd.devices.recovery import Credentials, Record
    from pyerofs_nbd.lifecycle.attach import Attached
    from pyerofs_nbd.lifecycle.reattach import Group

COMMAND = "pyerofs-nbd"


def run() -> None:
    """The command's entry point."""
    open_standard_streams()
    sys.exit(main(sys.argv[1:]))


def main(words: list[str]) -> int:
    """Run the command; returns its exit status."""
    try:
        mode = parse(words, activated=os.environ.get("LISTEN_PID") == str(os.getpid()))
    except UsageError as e:
        print(f"{COMMAND}: {one_line(str(e))} (--help shows how)", file=sys.stderr)
        return 2
    except SourceError as e:
        return _failed(e)
    try:
        return _run(mode)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except BaseExceptionGroup as e:
        return _failed(sole_cause(e))
    except Exception as e:
        return _failed(e)


def _run(mode: Mode) -> int:
    match mode:
        case Show():
            return _show(mode)
        case Attach():
            return _attach(mode)
        case Serve():
            return _serve(mode)
        case ListDevices():
            return _list(mode)
        case Unmount():
            return _unmount(mode)
        case Disconnect():
            return _disconnect(mode)
        case Reattach(target=None):
            return _reattach_all(mode)
        case Reattach():
            return _reattach(mode)
        case TakeOver():
            return _take_over(mode)


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
        message = f"{e}; is pyerofs installed with all its dependencies?"
    else:
        message = f"internal error: {type(e).__name__}: {e}; please report it"
        if os.environ.get("PYEROFS_DEBUG"):
            raise e
    print(f"{COMMAND}: {one_line(message)}", file=sys.stderr)
    return 1


# --- modes ----------------------------------------------------------------------------------


def _show(mode: Show) -> int:
    if mode.what == "help":
        print(usage(), end="")
    else:
        from pyerofs import __version__

        print(f"{COMMAND} {__version__}")
    return 0


def _attach(wanted: Attach) -> int:
    from pyerofs_nbd.devices.driver import check_privilege
    from pyerofs_nbd.devices.recovery import Record
    from pyerofs_nbd.lifecycle.attach import attach

    check_privilege()
    spec = wanted.source.spec()
    access = access_to(wanted.source.words)
    template = Record(
        spec,
        None,
        access,
        credentials(wanted.source, access),
        mountpoint=None if wanted.mount is None else os.path.realpath(wanted.mount),
    )
    if not spec.is_remote and not spec.is_layout:
        os.close(os.open(spec.what, os.O_RDONLY | os.O_CLOEXEC))  # report a wrong path early
    return _leave(lambda: attach(wanted, template), [template], wanted.behaviour)


def credentials(source: Source, access: Access) -> Credentials:
    """Where the password comes from, for the recovery file."""
    from pyerofs_nbd.devices.recovery import Credentials

    if source.password_file is not None:
        return Credentials("file", source.password_file)
    if access.password is None:
        return Credentials()
    typed = source.secret_typed or source.words.environment is None
    return Credentials("terminal" if typed else "environment")


def _leave(make: Callable[[], Attached], records: list[Record], behaviour: Behaviour) -> int:
    """Call ``make``, which starts a server; leave the server as a daemon, or stay with it."""
    from pyerofs_nbd.lifecycle.attach import settle, stay

    _end_on_signals()
    if behaviour.supervise and not behaviour.foreground:
        return _leave_supervisor(make, records, behaviour)
    found = make()
    print(node(found.indices[0]), flush=True)
    if not found.paths:
        print(f"{COMMAND}: the device can't be reattached if its server dies", file=sys.stderr)
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
        report.failed(f"internal error: {type(e).__name__}: {e}; please report it")
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


def _serve(wanted: Serve) -> int:
    from pyerofs.system.daemon import start_logging

    access = access_to(wanted.words)
    behaviour = wanted.behaviour
    start_logging(
        COMMAND, foreground=True, debug=int(behaviour.verbose), log_file=behaviour.log_file
    )
    from pyerofs_nbd.server.modes import serve

    serve(wanted, access)
    return 0


def _list(wanted: ListDevices) -> int:
    from pyerofs_nbd.lifecycle import inventory

    text = inventory.as_json() if wanted.json else inventory.as_table()
    if text:
        print(text)
    return 0


def _unmount(wanted: Unmount) -> int:
    from pyerofs_nbd.lifecycle.teardown import unmount_target

    unmount_target(wanted.target)
    return 0


def _disconnect(wanted: Disconnect) -> int:
    from pyerofs_nbd.lifecycle.teardown import disconnect_target

    for where in disconnect_target(wanted.target):
        print(
            f"{COMMAND}: {one_line(where)} is still mounted and can't be read any more; unmount it",
            file=sys.stderr,
        )
    return 0


def _renewed(group: Group, login: Login) -> Group:
    """The group with its password, and with the source options given anew."""
    from dataclasses import replace

    first = _with_login(group.records[0], login)
    records = [replace(r, source=first.source, access=first.access) for r in group.records]
    return replace(group, records=records)


def _with_login(record: Record, login: Login) -> Record:
    from dataclasses import replace

    spec = record.source
    if login.username is not None:
        spec = replace(spec, username=login.username)
    if login.insecure:
        spec = replace(spec, insecure=True)
    if login.cacert is not None:
        spec = replace(spec, cacert=login.cacert)
    password = access_to(login.words).password
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


def _reattach(wanted: Reattach) -> int:
    from pyerofs_nbd.lifecycle.reattach import Alive, group_of, reattach, resolve

    assert wanted.target is not None
    behaviour = wanted.behaviour
    group = group_of(resolve(wanted.target), accept_unpinned=wanted.accept_unpinned)
    group = _renewed(group, wanted.login)
    try:
        return _leave(lambda: reattach(group, behaviour), group.records, behaviour)
    except Alive as e:
        print(f"{COMMAND}: {e}", file=sys.stderr)
        return 0


def _reattach_all(wanted: Reattach) -> int:
    """Reattach all dead devices of pyerofs-nbd and mount.erofs, but none of other programs."""
    from pyerofs_nbd.devices import recovery, sysfs
    from pyerofs_nbd.devices.driver import check_privilege
    from pyerofs_nbd.lifecycle.attach import settle
    from pyerofs_nbd.lifecycle.reattach import Alive, group_of, reattach

    check_privilege()
    status = 0
    done: set[int] = set()
    behaviour = wanted.behaviour
    for index in sysfs.devices():
        path = sysfs.backend(index)
        if index in done or not path or recovery.alive(path) or not os.path.isfile(path):
            continue
        try:
            group = group_of(index, accept_unpinned=wanted.accept_unpinned)
            done.update(group.indices)
            attached = reattach(_renewed(group, wanted.login), behaviour)
            settle(attached, behaviour)
            print(node(index), flush=True)
        except Alive:
            continue
        except (NbdError, ErofsError) as e:
            print(f"{COMMAND}: {one_line(str(e))}", file=sys.stderr)
            status = 1
    recovery.collect()
    return status


def _take_over(wanted: TakeOver) -> int:
    from pyerofs_nbd.lifecycle.reattach import group_of, resolve, take_over

    behaviour = wanted.behaviour
    group = _renewed(group_of(resolve(wanted.target)), wanted.login)
    return _leave(lambda: take_over(group, behaviour), group.records, behaviour)

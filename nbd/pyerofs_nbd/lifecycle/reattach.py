"""Start a new server for attached devices: after their server's death, or in its place."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyerofs_nbd.devices import foreign, groups, recovery, sysfs
from pyerofs_nbd.devices.driver import driver, explain, reconnect
from pyerofs_nbd.errors import NbdError
from pyerofs_nbd.lifecycle import control, messages
from pyerofs_nbd.lifecycle.attach import Attached, io_timeout, start
from pyerofs_nbd.lifecycle.messages import Devices, Ready, Serving, Taken, TakeoverAsked
from pyerofs_nbd.lifecycle.parameters import Part, ServerParameters

if TYPE_CHECKING:
    from pyerofs_nbd.devices.recovery import Record
    from pyerofs_nbd.options import Behaviour

NOTICED_IN = 10.0  # seconds for the kernel to notice the death of a server whose lock is free
FOREIGN_NOTICED_IN = 2.0  # the same for servers of other programs, which may as well be alive
HANDING_OVER = 30.0  # seconds for a server to finish its requests in flight


class Alive(NbdError):
    """The device has a server."""


@dataclass(frozen=True)
class Group:
    """Devices that were attached together, as far as they are still attached."""

    indices: list[int]
    paths: list[str]
    records: list[Record]

    @property
    def ours(self) -> bool:
        """Whether pyerofs-nbd has attached the devices, not mount.erofs."""
        return self.records[0].fingerprint is not None

    @property
    def names(self) -> str:
        return " ".join(sysfs.node(i) for i in self.indices)


def resolve(target: str) -> int:
    """The number of the device with this name, mount point or recovery file.

    Raises NbdError if it is not attached."""
    index = sysfs.index_of(target)
    if index is None:
        index = sysfs.mounted_at(os.path.realpath(target))
    if index is None and os.path.isabs(target):
        index = next(iter(sysfs.owned_by(target)), None)
    if index is None:
        raise NbdError(f"{target}: neither an nbd device nor the mount point of one")
    if not sysfs.attached(index):
        raise NbdError(f"{sysfs.node(index)}: is not attached")
    return index


def load(path: str, *, accept_unpinned: bool = False) -> Record:
    """Parse a recovery file of pyerofs-nbd or mount.erofs.  Raises NbdError."""
    data = recovery.read(path)
    if data[:1] == b"{":
        return recovery.load(path)
    try:
        return foreign.parse(data, accept_unpinned=accept_unpinned)
    except NbdError as e:
        raise NbdError(f"{path}: {e}") from None


def group_of(index: int, *, accept_unpinned: bool = False) -> Group:
    """A device and those that were attached together with it.  Raises NbdError."""
    backend = sysfs.backend(index)
    if not backend:
        raise NbdError(f"{sysfs.node(index)}: was attached without a recovery file")
    found = Group([], [], [])
    members = [(sysfs.backend(i) or "", i) for i in groups.together(index)]
    for path, member in sorted(members, key=lambda m: recovery.parted(m[0])):
        if member == index or os.path.lexists(path):  # else it has gone meanwhile
            found.indices.append(member)
            found.paths.append(path)
            found.records.append(load(path, accept_unpinned=accept_unpinned))
    if not found.indices:
        raise NbdError(f"{sysfs.node(index)}: is not attached any more")
    return found


def _parameters(
    group: Group, locks: list[int], behaviour: Behaviour, *, takeover: bool = False
) -> ServerParameters:
    parts = [
        Part(path, record, lock=lock)
        for path, record, lock in zip(group.paths, group.records, locks, strict=True)
    ]
    return ServerParameters(
        group.records[0],
        known=parts,
        takeover=takeover,
        behaviour=behaviour,
        keep=[fd for fd in locks if fd >= 0],
    )


def reattach(group: Group, behaviour: Behaviour) -> Attached:
    """Start a new server for devices whose server is dead.

    Raises Alive if it is not dead, NbdError on failure; nothing has changed then."""
    driver().close()
    if group.ours:
        recovery.directory(make=True)
    with ExitStack() as undo:
        locks: list[int] = []
        for path in group.paths:
            fd = recovery.lock(path)
            if fd is None:
                for taken in locks:
                    os.close(taken)
                raise Alive(f"{group.names}: its server lives; nothing was changed")
            locks.append(fd)
        child = start(_parameters(group, locks, behaviour))
        undo.callback(child.stop)
        ready = child.expect(Ready)
        patience = NOTICED_IN if group.ours else FOREIGN_NOTICED_IN
        with ExitStack() as ends:
            fds = []
            for index, path, offer in zip(group.indices, group.paths, ready.offers, strict=True):
                size = None if group.ours else offer.size
                fds.append(ends.enter_context(_renewed(index, path, patience, size)).fileno())
                sysfs.configure(index, io_timeout=io_timeout(behaviour))
            child.send(messages.Attached(group.indices), fds)
        child.expect(Serving)
        undo.pop_all()
    return Attached(group.indices, group.paths, child)


def _renewed(index: int, path: str, patience: float, size: int | None) -> socket.socket:
    try:
        found = reconnect(index, path, patience, size=size)
    except OSError as e:
        raise explain(e) from None
    if found is None:
        raise Alive(f"{sysfs.node(index)}: its server lives; nothing was changed")
    return found


def take_over(group: Group, behaviour: Behaviour) -> Attached:
    """Start a server that replaces a living one, without an interruption.

    Raises NbdError; the old server then continues."""
    if not group.ours or not recovery.alive(group.paths[0]):
        raise NbdError(
            f"{group.names}: no living server of pyerofs-nbd to take over from;"
            f" --reattach {sysfs.node(group.indices[0])} starts one"
        )
    with ExitStack() as undo:
        child = start(_parameters(group, [-1] * len(group.paths), behaviour, takeover=True))
        undo.callback(child.stop)
        child.expect(Ready)
        with control.dial(recovery.control_path(group.paths[0])) as old:
            old.settimeout(HANDING_OVER)
            fds: list[int] = []
            try:
                control.send(old, TakeoverAsked())
                given, fds = control.receive(old)
                wanted: list[tuple[int, str | None]] = [
                    *zip(group.indices, group.paths, strict=True)
                ]
                if given != Devices(wanted) or len(fds) != 2 * len(wanted):
                    raise NbdError(f"{group.names}: its server refuses the takeover")
                child.send(messages.Attached(group.indices), fds)
                child.expect(Serving)
                control.send(old, Taken())
            except OSError as e:
                raise NbdError(f"{group.names}: its server does not answer ({e})") from None
            finally:
                for fd in fds:
                    os.close(fd)
        undo.pop_all()
    return Attached(group.indices, group.paths, child)

"""Attach a source to an nbd device and mount it; all steps are undone if one fails.

The attaching process does everything except serving, and keeps none of the server's sockets: if the
server dies during the mount, its sockets are closed although mount(2) hangs, and the kernel notices.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeVar

from pyerofs.system.daemon import STOPS, heeded
from pyerofs_nbd.devices import recovery, sysfs
from pyerofs_nbd.devices.driver import BLOCK_SIZE, check_privilege, disconnect, driver, explain
from pyerofs_nbd.devices.mounting import mount, unmount
from pyerofs_nbd.devices.netlink import DISCONNECT_ON_CLOSE, Netlink, connect, reconfigure
from pyerofs_nbd.errors import NbdError
from pyerofs_nbd.lifecycle import control, messages
from pyerofs_nbd.lifecycle.messages import Failed, Live, Message, Offer, Ready, Serving

if TYPE_CHECKING:
    from pyerofs_nbd.devices.recovery import Record
    from pyerofs_nbd.lifecycle.parameters import ServerParameters
    from pyerofs_nbd.options import Attach, Behaviour

M = TypeVar("M")

ENDS_IN = 10.0  # seconds that a server may take to end before it is killed
# ms, see sysfs.IO_TIMEOUT: a new server is ready after 0.1 s, and the kernel's timer is up to one
# second late, so a server's death delays reads by one second on average.  The kernel logs a line
# for each request that takes longer than this timeout
SUPERVISED_TIMEOUT = 500


@dataclass
class Attached:
    """Devices that are attached together, in order; the first is the one to mount."""

    indices: list[int]
    paths: list[str]  # their recovery files; [] where there are none
    child: Child


def io_timeout(behaviour: Behaviour) -> int:
    """How long a read waits, in ms, before the driver looks for another connection."""
    return SUPERVISED_TIMEOUT if behaviour.supervise else sysfs.IO_TIMEOUT


class Child:
    """A server process, seen from its parent process."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.channel = channel
        self._status: int | None = None

    def expect(self, kind: type[M]) -> M:
        """Wait for a message of this kind.  Raises NbdError if the server fails instead."""
        message = self._receive()
        if isinstance(message, kind):
            return message
        raise self._failure(message)

    def failure(self) -> NbdError:
        """Wait for the server's last message, or without one for its end; returns the reason."""
        return self._failure(self._receive())

    def _failure(self, message: Message | None) -> NbdError:
        if isinstance(message, Failed):
            return NbdError(message.error)
        return NbdError(f"the server ended unexpectedly (status {self.wait():#x})")

    def _receive(self) -> Message | None:
        try:
            return control.receive(self.channel)[0]
        except OSError:
            return None

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message.  Raises NbdError if the server has ended."""
        try:
            control.send(self.channel, message, fds)
        except OSError:
            raise self.failure() from None

    def wait(self) -> int:
        """Wait for the server to end; returns its status as waitpid does."""
        if self._status is None:
            self._status = os.waitpid(self.pid, 0)[1]
        return self._status

    def exited(self) -> bool:
        """Whether the server has ended."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if not pid:
                return False
            self._status = status
        return True

    def stop(self) -> None:
        """End the server: close its channel, so that it undoes its steps; kill it after ENDS_IN."""
        self.channel.close()
        end = time.monotonic() + ENDS_IN
        while not self.exited():
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                self.wait()
                return
            time.sleep(0.01)


def start(parameters: ServerParameters) -> Child:
    """Start a server process, which takes over the descriptors in ``parameters.keep``."""
    ours, theirs = control.pair()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _serve(parameters, ours, theirs)
    theirs.close()
    for fd in parameters.keep:
        os.close(fd)
    parameters.keep = []
    return Child(pid, ours)


def _serve(parameters: ServerParameters, ours: socket.socket, theirs: socket.socket) -> NoReturn:
    try:
        ours.close()
        for number in heeded(*STOPS):
            signal.signal(number, signal.SIG_DFL)
        from pyerofs_nbd.lifecycle import holder

        holder.run(parameters, theirs)
    except BaseException as e:
        control.send(theirs, Failed(f"can't start the server: {e}"))
    finally:
        os._exit(1)


def attach(wanted: Attach, template: Record) -> Attached:
    """Attach the devices that are wanted, mount them if that is wanted, and leave a server process
    running.  ``template`` is what the recovery files have in common.

    Raises NbdError, with all steps undone."""
    from pyerofs_nbd.lifecycle.parameters import ServerParameters

    where = template.mountpoint
    if where is not None:
        _check_mountpoint(where)
    with ExitStack() as undo:
        netlink = None if wanted.ioctl else undo.enter_context(driver())
        if wanted.ioctl:
            check_privilege()
            sysfs.modprobe()
        recoverable = netlink is not None and netlink.has_identifiers
        if recoverable:
            recovery.directory(make=True)
            recovery.collect()
        elif wanted.behaviour.supervise:
            raise NbdError(
                "--supervise: this kernel's nbd driver (before Linux 5.14) keeps no identifiers,"
                " so a dead server can't be replaced"
            )
        name = recovery.token()
        if recoverable:
            undo.callback(_remove, name, template)
        behaviour = wanted.behaviour
        child = start(
            ServerParameters(
                template,
                name=name,
                ioctl=wanted.ioctl,
                recoverable=recoverable,
                wanted=wanted.device,
                behaviour=behaviour,
            )
        )
        undo.callback(child.stop)
        ready = child.expect(Ready)
        found = Attached([], [offer.path for offer in ready.offers if offer.path], child)
        if netlink is None:
            found.indices += ready.attached
            for index in found.indices:
                undo.callback(_disconnect, index, None)
            child.send(messages.Attached(found.indices))
        else:
            _connect(netlink, wanted, ready.offers, found, undo)
        child.expect(Serving)
        for index in found.indices:
            sysfs.check_node(index)
        watched(child, lambda: _configure(found.indices, io_timeout(behaviour)), found)
        if where is not None:
            undo.callback(_unmount, where, found.indices[0])
            words = list(wanted.mount_words)
            words += [f"device={sysfs.node(i)}" for i in found.indices[1:]]
            watched(child, lambda: mount(sysfs.node(found.indices[0]), where, words), found)
            if netlink is not None:
                _end_with_mount(netlink, found)
        undo.pop_all()
        if netlink is not None:
            netlink.close()
    return found


def _check_mountpoint(where: str) -> None:
    try:
        os.close(os.open(where, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as e:
        raise NbdError(f"{where}: {e.strerror}") from None


def _remove(name: str, record: Record) -> None:
    for part in range(1 + len(record.source.devices)):
        recovery.remove(recovery.path_of(name, part))


def _connect(
    netlink: Netlink,
    wanted: Attach,
    offers: list[Offer],
    found: Attached,
    undo: ExitStack,
) -> None:
    """Attach a device for each offer, and send the server its ends of the connections."""
    if wanted.device is not None and len(offers) > 1:
        raise NbdError(f"--nbd-device can't be used: the image needs {len(offers)} devices")
    with ExitStack() as ends:
        fds = []
        for offer in offers:
            ours, theirs = socket.socketpair()
            ends.enter_context(ours)
            with theirs:
                body = connect(
                    offer.size,
                    [theirs.fileno()],
                    block_size=BLOCK_SIZE,
                    dead_timeout=wanted.dead_timeout,
                    identifier=offer.path,
                    index=wanted.device,
                )
                try:
                    index = netlink.connect(body)
                except OSError as e:
                    if wanted.device is not None and not isinstance(e, TimeoutError):
                        raise _why_not(wanted.device, e) from None
                    raise explain(e) from None
            undo.callback(_disconnect, index, offer.path)
            found.indices.append(index)
            fds.append(ours.fileno())
        found.child.send(messages.Attached(found.indices), fds)


def _why_not(wanted: int, e: OSError) -> NbdError:
    if sysfs.attached(wanted):
        return NbdError(f"{sysfs.node(wanted)}: is in use")
    return NbdError(f"{sysfs.node(wanted)}: {explain(e)}")


def _configure(indices: Sequence[int], io_timeout: int) -> None:
    for index in indices:
        sysfs.configure(index, io_timeout=io_timeout)


def _end_with_mount(netlink: Netlink, found: Attached) -> None:
    """Have the kernel disconnect a device when it is closed for the last time.  (Set before the
    mount, any program that opened and closed the device would have disconnected it.)"""
    for index, path in zip(found.indices, _identifiers(found), strict=True):
        try:
            netlink.reconfigure(
                reconfigure(index, identifier=path, client_flags=DISCONNECT_ON_CLOSE)
            )
        except OSError as e:
            raise explain(e) from None


def _identifiers(found: Attached) -> Sequence[str | None]:
    return found.paths or [None] * len(found.indices)


def _disconnect(index: int, path: str | None) -> None:
    _cut_off(index, path)
    sysfs.wait_gone(index, path)


def _cut_off(index: int, path: str | None) -> None:
    """Disconnect a device.  It stays, without content, as long as a process has it open."""
    try:
        if sysfs.attached(index) and (path is None or sysfs.backend(index) == path):
            disconnect(index)
    except OSError:
        pass  # gone


def _unmount(where: str, index: int) -> None:
    while sysfs.mounted_at(where) == index:
        try:
            unmount(where)
        except OSError:
            return


def watched(child: Child, action: Callable[[], None], found: Attached) -> None:
    """Run ``action``, which needs the server; fail instead of hanging if the server ends meanwhile."""
    failure: list[BaseException] = []

    def act() -> None:
        try:
            action()
        except BaseException as e:
            failure.append(e)
        finally:
            os.close(done)

    wait, done = os.pipe()
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    try:
        ready = select.select([wait, child.channel.fileno()], [], [])[0]
        if wait not in ready:
            raise child.failure()
    except BaseException:
        # a hanging action then fails; a mount that still succeeds keeps its device from going
        for index, path in zip(found.indices, _identifiers(found), strict=True):
            _cut_off(index, path)
        thread.join(ENDS_IN)
        raise
    finally:
        os.close(wait)
    thread.join()
    if failure:
        raise failure[0]


# --- afterwards -----------------------------------------------------------------------------


def settle(found: Attached, behaviour: Behaviour) -> None:
    """Tell the server that attaching succeeded, and whether this process stays its parent."""
    found.child.send(Live(behaviour.foreground or behaviour.supervise))


def stay(found: Attached) -> int:
    """Wait for the server to end, forwarding stop signals to it; returns the exit status.

    Raises NbdError."""

    def forward(number: int, _: object) -> None:
        if not found.child.exited():
            os.kill(found.child.pid, number)

    for number in heeded(*STOPS):
        signal.signal(number, forward)
    return outcome(found, found.child.wait())


def outcome(found: Attached, status: int) -> int:
    """The exit status for a server's wait status.  Raises NbdError if the server failed."""
    from pyerofs_nbd.lifecycle.parameters import HANDED_OVER

    if os.WIFEXITED(status) and os.WEXITSTATUS(status) in (0, HANDED_OVER):
        return 0
    names = " ".join(sysfs.node(i) for i in found.indices)
    raise NbdError(
        f"the server of {names} has ended (status {status:#x});"
        f" start a new one: pyerofs-nbd --reattach {sysfs.node(found.indices[0])}"
    )

"""The holder: the process that serves attached devices, forked by the attacher.

It opens the sources, checks or writes the recovery files, receives the devices' connections and
serves them until the devices are gone.  ``messages`` describes what the two say to each other: a holder
whose attacher ends before Live detaches its devices again.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from enum import Enum
from typing import NoReturn

import trio

from pyerofs.errors import ErofsError, one_line
from pyerofs.images import flat
from pyerofs.sources.base import AsyncSource
from pyerofs.sources.open import open_async, pinned_spec
from pyerofs.system.daemon import STOPS, heeded, start_logging
from pyerofs.system.libc import signal_when_parent_dies
from pyerofs_nbd.devices import groups, recovery, sysfs
from pyerofs_nbd.devices.driver import disconnect, reconnect
from pyerofs_nbd.devices.mounting import mounts_flat, unmount
from pyerofs_nbd.devices.recovery import HEAD, Record
from pyerofs_nbd.errors import NbdError, sole_cause
from pyerofs_nbd.lifecycle import control
from pyerofs_nbd.lifecycle.messages import (
    Attached,
    Devices,
    Failed,
    Live,
    Message,
    Offer,
    Ready,
    Serving,
    Status,
    StatusAsked,
    Taken,
    TakeoverAsked,
)  # fmt: skip
from pyerofs_nbd.lifecycle.parameters import HANDED_OVER, Part, ServerParameters
from pyerofs_nbd.server.exports import Export, Server

log = logging.getLogger("pyerofs-nbd")

TAKING = 30.0  # seconds that another process may take to confirm that it has taken over
GRACE = 5.0  # seconds for replies when the process ends
SERVER_NAME = "pyerofs-nbd"
ORPHANED = signal.SIGUSR1  # sent by the kernel when the attacher's thread ends
LAST_WORDS = 0.5  # seconds to receive what the attacher has sent before


def run(parameters: ServerParameters, channel: socket.socket) -> NoReturn:
    """All that the holder does, from the fork to its exit.  Never returns."""
    status = 1
    try:
        _settle(parameters, channel)
        status = trio.run(_Devices(parameters, channel).run)
    except BaseException as e:
        reason = sole_cause(e)
        if isinstance(reason, (ErofsError, NbdError)):
            _tell(channel, str(reason))
        elif not isinstance(reason, _Abandoned):
            log.critical("internal error", exc_info=e)
            _tell(channel, f"the server ended unexpectedly ({type(reason).__name__}: {reason})")
    finally:
        logging.shutdown()
        os._exit(status)


class State(Enum):
    """Where a holder stands in the exchange that ``messages`` describes."""

    OPENING = "no request was answered yet"
    SERVING = "requests are answered"
    HANDING = "another process is taking over: no request is read"
    TAKEN = "another process has taken over"
    ENDING = "the attacher has failed: its devices are detached, and replies under way are dropped"


class _Abandoned(Exception):
    """The attacher has ended or failed, and can't be told anything."""


def _tell(channel: socket.socket, message: str) -> None:
    try:
        control.send(channel, Failed(one_line(message)))
    except OSError:
        log.error("%s", message)


def _settle(parameters: ServerParameters, channel: socket.socket) -> None:
    """Become a daemon: a session of its own, and only the descriptors that the holder needs."""
    os.setsid()
    os.chdir("/")
    os.umask(0o077)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    keep = {0, 1, 2, channel.fileno(), *parameters.keep}
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        if fd not in keep:
            try:
                os.close(fd)
            except OSError:
                pass  # the descriptor that listed the directory
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    behaviour = parameters.behaviour
    for fd in (0,) if behaviour.foreground else (0, 1, 2):
        os.dup2(null, fd)
    logging.root.handlers.clear()
    start_logging(
        SERVER_NAME,
        foreground=behaviour.foreground,
        debug=int(behaviour.verbose),
        log_file=None if behaviour.foreground else behaviour.log_file,
    )


class _Devices:
    """The devices that one holder serves, from opening their sources to the last reply."""

    def __init__(self, parameters: ServerParameters, channel: socket.socket) -> None:
        self._parameters = parameters
        self._channel: socket.socket | None = channel
        self._parts: list[Part] = []
        self._exports: list[Export] = []
        self._sources: list[AsyncSource] = []
        self._server: Server
        self._over = trio.Event()  # set when no request is being answered any more
        self._decided = trio.Event()  # set when a takeover has succeeded or failed
        self._state = State.OPENING
        self._orphaned = trio.Event()
        self._scope = trio.CancelScope()
        self._listener: socket.socket | None = None
        self._control_path = ""

    async def run(self) -> int:
        """Serve until the devices are gone or taken over; the exit status."""
        stops = heeded(*STOPS)
        with trio.open_signal_receiver(*stops, ORPHANED) as signals:
            signal_when_parent_dies(ORPHANED)
            async with trio.open_nursery() as background:
                try:
                    await self._open(background)
                    async with trio.open_nursery() as nursery:
                        await self._start(nursery, signals)
                        await self._serve(nursery)
                        nursery.cancel_scope.cancel()
                finally:
                    background.cancel_scope.cancel()
                    self._clean()
                    with trio.CancelScope(shield=True):
                        for source in self._sources:
                            await source.aclose()
        return HANDED_OVER if self._state is State.TAKEN else 0

    # --- start --------------------------------------------------------------------------------

    async def _open(self, background: trio.Nursery) -> None:
        parameters = self._parameters
        template = parameters.record
        spec, access = template.source, template.access
        self._sources = await open_async(spec, access, background)
        if spec.is_remote and access.prefetch == "metadata":
            from pyerofs.prefetch import prefetch_metadata_of

            background.start_soon(prefetch_metadata_of, self._sources)
        devices: Sequence[AsyncSource] = self._sources
        may_be_flat = is_flat = template.flat
        if parameters.new:
            may_be_flat = template.mountpoint is None or mounts_flat()
        if len(devices) > 1 and may_be_flat:
            combined = await flat.combine(devices)
            is_flat = combined is not None
            devices = [combined] if combined is not None else devices
        spec = pinned_spec(spec, [source.pinned for source in self._sources])
        prints = [await _fingerprint(source) for source in devices]
        if parameters.known is None:
            for i, found in enumerate(prints):
                record = replace(
                    template, source=spec, fingerprint=found, part=i, flat=is_flat,
                    mountpoint=None if i else template.mountpoint,
                )  # fmt: skip
                path = recovery.path_of(parameters.name, i) if parameters.recoverable else None
                part = Part(path, record)
                self._parts.append(part)
                if part.path is not None:
                    part.lock = recovery.write(part.path, record)
        else:
            self._parts = parameters.known
            for part in self._parts:
                if part.record.part >= len(prints):
                    raise NbdError(f"{part.path}: refers to a device that the image does not have")
                _compare(part.record, prints[part.record.part], devices[part.record.part])
        for part in self._parts:
            source = flat.whole(devices[part.record.part])
            self._exports.append(Export(part.path or str(part.record.part), source))
        self._server = Server(self._exports)

    async def _start(self, nursery: trio.Nursery, signals: AsyncIterator[int]) -> None:
        if self._parameters.ioctl:
            await self._attach_by_ioctl()
        offers = [Offer(part.path, export.source.size) for part, export in self._both()]
        await self._say(Ready(offers, [part.index for part in self._parts]))
        message, fds = await self._hear()
        if not isinstance(message, Attached):
            await self._undo()
            raise _Abandoned
        for part, index in zip(self._parts, message.indices, strict=True):
            part.index = index
        if not self._parameters.ioctl:
            connections, locks = fds[: len(self._parts)], fds[len(self._parts) :]
            for part, fd in zip(self._parts, connections, strict=True):
                part.connection = socket.socket(fileno=fd)
            if self._parameters.takeover:
                for part, fd in zip(self._parts, locks, strict=True):
                    part.lock = fd
        self._state = State.SERVING
        self._listen(nursery)
        nursery.start_soon(self._settle_in)
        nursery.start_soon(self._stop_on, signals)
        await self._say(Serving())

    def _both(self) -> list[tuple[Part, Export]]:
        return list(zip(self._parts, self._exports, strict=True))

    async def _say(self, message: Message) -> None:
        assert self._channel is not None
        try:
            control.send(self._channel, message)
        except OSError:
            pass  # the attacher has ended: the next receive tells
        await trio.lowlevel.checkpoint()

    async def _hear(self) -> tuple[Message | None, list[int]]:
        assert self._channel is not None
        await trio.lowlevel.wait_readable(self._channel)
        try:
            return control.receive(self._channel)
        except OSError:
            return None, []

    async def _settle_in(self) -> None:
        """Wait for Live; without it, detach the devices that were attached for this holder."""
        message = await self._last_word()
        if not isinstance(message, Live):
            await self._undo()
            if self._parameters.new:
                self._state = State.ENDING
                self._scope.cancel()
            return
        log.info("serving %s", ", ".join(sysfs.node(p.index) for p in self._parts))
        if not message.stay:
            assert self._channel is not None
            self._channel.close()
            self._channel = None

    async def _last_word(self) -> Message | None:
        """The attacher's last message; None where it ends without one.

        An attacher that is killed while its second thread hangs in mount(2) neither ends nor closes
        its socket until mount(2) returns, which waits for this holder.  But its first thread ends,
        and the kernel reports that as ORPHANED."""
        message = None
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                await self._orphaned.wait()
                await trio.sleep(LAST_WORDS)
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up)
            message, _ = await self._hear()
            nursery.cancel_scope.cancel()
        return message

    async def _undo(self) -> None:
        """Detach the devices of an attachment that was not completed."""
        if not self._parameters.new:
            return
        for part in self._parts:
            indices = [part.index] if part.index >= 0 else []
            if part.path is not None and not indices:
                indices = sysfs.owned_by(part.path)
            for index in indices:
                await self._release_device(index, even_busy=True)

    async def _attach_by_ioctl(self) -> None:
        from pyerofs_nbd.devices import ioctl

        for part, export in self._both():
            ours, theirs = socket.socketpair()
            part.connection = ours
            part.index = await trio.to_thread.run_sync(
                ioctl.attach, theirs, export.source.size, self._parameters.wanted
            )

    # --- serving ------------------------------------------------------------------------------

    async def _serve(self, nursery: trio.Nursery) -> None:
        """Serve until all devices are gone, or another holder has taken them over."""
        while True:
            async with trio.open_nursery() as serving:
                self._scope = serving.cancel_scope
                for part, export in self._both():
                    if part.connection is not None:
                        serving.start_soon(self._serve_one, part, export)
            if self._state is State.ENDING or all(part.connection is None for part in self._parts):
                return
            self._over.set()
            await self._decided.wait()
            if self._state is State.TAKEN:
                return
            statistics = self._server.statistics
            self._server = Server(self._exports)
            self._server.statistics = statistics

    async def _serve_one(self, part: Part, export: Export) -> None:
        while part.connection is not None:
            ended = await self._server.serve_transmission(part.connection, export)
            if not ended and self._server.releasing:
                return
            part.connection.close()
            part.connection = None
            if not ended and part.path is not None:
                part.connection = await self._connect_again(part, part.path)
        if part.path is not None:
            recovery.remove(part.path)
        log.info("%s is disconnected", sysfs.node(part.index))
        if (
            self._parameters.ioctl
        ):  # without identifiers, only this process knows the image's other devices
            for other in self._parts:
                if other.connection is not None:
                    await self._release_device(other.index, even_busy=True)

    async def _connect_again(self, part: Part, path: str) -> socket.socket | None:
        """Connect again to a device whose connection the kernel has closed; None where it is gone."""
        while sysfs.attached(part.index) and sysfs.backend(part.index) == path:
            try:
                found = await trio.to_thread.run_sync(reconnect, part.index, path, 5.0)
            except OSError as e:
                log.error("%s: can't reconnect: %s", sysfs.node(part.index), e.strerror)
                found = None
            if found is not None:
                log.warning("%s: reconnected", sysfs.node(part.index))
                return found
            await trio.sleep(1)
        return None

    def _clean(self) -> None:
        """Remove the files of devices that are gone; those of other devices stay, for recovery."""
        taken = self._state is State.TAKEN
        for part in self._parts:
            if part.path is not None and not taken and not sysfs.owned_by(part.path):
                recovery.remove(part.path)
        if self._listener is not None:
            if not taken:
                recovery.remove(self._control_path)
            self._listener.close()

    async def _stop_on(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            if number == ORPHANED:
                self._orphaned.set()
                continue
            log.info("stopping on signal %d", number)
            for part in self._parts:
                if part.connection is not None and not await self._release_device(part.index):
                    break  # the others carry the same image

    async def _release_device(self, index: int, *, even_busy: bool = False) -> bool:
        """Unmount and disconnect a device; while it is in use, only say so (unless ``even_busy``).

        Whether that was possible."""

        def release() -> None:
            for mount in groups.mounts_of(index):
                unmount(mount.where)
            if groups.in_use(index) and not even_busy:
                raise OSError(errno.EBUSY, "")
            if sysfs.attached(index):
                disconnect(index)

        try:
            await trio.to_thread.run_sync(release)
        except OSError as e:
            reason = "in use; unmount it first" if e.errno == errno.EBUSY else e.strerror
            log.warning("%s: not stopped: %s", sysfs.node(index), reason)
            return False
        return True

    # --- questions from outside ---------------------------------------------------------------

    def _listen(self, nursery: trio.Nursery) -> None:
        first = self._parts[0].path
        if first is None:
            return
        try:
            self._control_path = recovery.control_path(first)
            self._listener = control.listen(self._control_path)
        except OSError as e:
            log.warning("can't listen for status requests and takeovers: %s", e.strerror)
            return
        nursery.start_soon(self._accept, nursery)

    async def _accept(self, nursery: trio.Nursery) -> None:
        assert self._listener is not None
        self._listener.setblocking(False)
        while True:
            await trio.lowlevel.wait_readable(self._listener)
            try:
                client, _ = self._listener.accept()
            except OSError:
                await trio.sleep(0.1)
                continue
            nursery.start_soon(self._answer, client)

    async def _answer(self, client: socket.socket) -> None:
        client.setblocking(False)
        with client, trio.move_on_after(TAKING):
            try:
                await trio.lowlevel.wait_readable(client)
                message, fds = control.receive(client)
                for fd in fds:
                    os.close(fd)
                if _uid_of(client) not in (0, os.geteuid()):
                    return
                if isinstance(message, StatusAsked):
                    control.send(client, self._status())
                elif isinstance(message, TakeoverAsked) and self._state is State.SERVING:
                    await self._hand_over(client)
            except OSError:
                pass  # it has gone

    def _status(self) -> Status:
        found = self._server.statistics
        states = [source.status() for source in self._sources]
        fetched = [n for s in states if (n := s.get("fetched")) is not None]
        verified = [v for s in states if (v := s.get("verified")) is not None]
        return Status(
            os.getpid(),
            found.requests,
            found.bytes,
            found.failures,
            fetched=sum(fetched) if fetched else None,
            verified=all(verified) if verified else None,
        )

    async def _hand_over(self, client: socket.socket) -> None:
        """Send the connections and locks to another holder; serve on where it does not confirm."""
        self._over, self._decided = trio.Event(), trio.Event()
        self._state = State.HANDING
        taken = False
        try:
            self._server.release()
            await self._over.wait()
            parts = [p for p in self._parts if p.connection is not None]
            fds = [p.connection.fileno() for p in parts if p.connection is not None]
            fds += [p.lock for p in parts]
            control.send(client, Devices([(p.index, p.path) for p in parts]), fds)
            await trio.lowlevel.wait_readable(client)
            message, _ = control.receive(client)
            taken = isinstance(message, Taken)
        finally:
            if self._state is State.HANDING:  # else an undoing came in between
                self._state = State.TAKEN if taken else State.SERVING
            self._decided.set()


def _uid_of(client: socket.socket) -> int:
    found = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(found[4:8], sys.byteorder)


async def _fingerprint(source: AsyncSource) -> recovery.Fingerprint:
    if not source.size:
        raise NbdError(f"{source.name}: is empty")
    return recovery.fingerprint(source.size, bytes(await source.read_at(0, min(HEAD, source.size))))


def _compare(record: Record, found: recovery.Fingerprint, source: AsyncSource) -> None:
    """Raise NbdError where a source is not what the device showed before."""
    wanted = record.fingerprint
    if wanted is None or wanted == found:
        return
    if wanted.size != found.size:
        what = f"has {found.size} bytes now, not {wanted.size}"
    else:
        what = "begins with other bytes now"
    raise NbdError(
        f"{source.name}: {what}, so it is not what the device showed; nothing was changed"
    )

"""Supervise a server process: wait for its end, and start a new one if it has died."""

from __future__ import annotations

import logging
import os
import select
import signal
import time

from pyerofs.system.daemon import STOPS, heeded
from pyerofs_nbd.devices import recovery, sysfs
from pyerofs_nbd.devices.netlink import Netlink
from pyerofs_nbd.devices.recovery import Record
from pyerofs_nbd.errors import NbdError
from pyerofs_nbd.lifecycle.attach import Attached, settle
from pyerofs_nbd.lifecycle.parameters import HANDED_OVER
from pyerofs_nbd.lifecycle.reattach import Alive, Group, reattach
from pyerofs_nbd.options import Behaviour

log = logging.getLogger("pyerofs-nbd")

NOTICED_IN = 1.0  # seconds to wait for the kernel's LINK_DEAD after a death; it takes a millisecond
DELAYS = (0.0, 0.1, 0.5, 2.0, 10.0, 30.0)  # seconds before each try; the last one is repeated
CALM = 2.0  # seconds of life after which a server's death does not count as repeated


def supervise(found: Attached, records: list[Record], behaviour: Behaviour) -> int:
    """Replace the server whenever it dies; returns the exit status once the devices are gone or
    another process serves them.

    ``records``: of the recovery files, in order, with everything needed to open the source."""
    stopping = False

    def forward(number: int, _: object) -> None:
        nonlocal stopping
        stopping = True
        if not found.child.exited():
            os.kill(found.child.pid, number)

    for number in heeded(*STOPS):
        signal.signal(number, forward)
    with Netlink() as netlink:
        netlink.watch()
        deaths = 0
        while True:
            born = time.monotonic()
            status = _end_of(found)
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) in (0, HANDED_OVER):
                return 0
            group = _left(found, records)
            if not group.indices:
                recovery.collect()
                return 0
            log.warning("the server of %s has died (status %#x)", group.names, status)
            deaths = 0 if time.monotonic() - born > CALM else deaths
            _wait_for(netlink, set(group.indices))
            again = _again(found, records, behaviour, deaths)
            if again is None:
                return 0
            found, deaths = again, deaths + 1


def _end_of(found: Attached) -> int:
    fd = os.pidfd_open(found.child.pid)
    try:
        select.select([fd], [], [])
    finally:
        os.close(fd)
    return found.child.wait()


def _left(found: Attached, records: list[Record]) -> Group:
    """The devices that are still attached."""
    left = Group([], [], [])
    for index, path, record in zip(found.indices, found.paths, records, strict=True):
        if sysfs.attached(index) and sysfs.backend(index) == path:
            left.indices.append(index)
            left.paths.append(path)
            left.records.append(record)
    return left


def _wait_for(netlink: Netlink, indices: set[int]) -> None:
    """Wait for LINK_DEAD from the kernel for all devices; at most NOTICED_IN seconds, since it may
    have come before."""
    end = time.monotonic() + NOTICED_IN
    while indices and (left := end - time.monotonic()) > 0:
        if select.select([netlink], [], [], left)[0]:
            indices -= netlink.dead()


def _again(
    found: Attached, records: list[Record], behaviour: Behaviour, deaths: int
) -> Attached | None:
    """Start a new server, retrying until it succeeds; None if no server is needed any more."""
    attempt = deaths
    while True:
        time.sleep(DELAYS[min(attempt, len(DELAYS) - 1)] if attempt else 0)
        group = _left(found, records)
        if not group.indices:
            recovery.collect()
            return None
        try:
            again = reattach(group, behaviour)
            settle(again, behaviour)
        except Alive:
            log.warning("%s: another server has taken over", group.names)
            return None
        except NbdError as e:
            log.error("%s: %s", group.names, e)
            attempt += 1
            continue
        log.warning("%s: a new server has started", group.names)
        return again

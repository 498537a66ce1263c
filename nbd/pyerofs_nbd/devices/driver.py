"""Operations on nbd devices through the kernel's driver: connect, reconnect, disconnect."""

from __future__ import annotations

import errno
import os
import select
import socket
import time

from pyerofs_nbd.devices import sysfs
from pyerofs_nbd.devices.netlink import Netlink, NetlinkError, reconfigure
from pyerofs_nbd.devices.sysfs import NO_DRIVER, NO_PRIVILEGE
from pyerofs_nbd.errors import NbdError

BLOCK_SIZE = 512  # suits every image; the kernel's erofs sets its own block size anyway
CAP_SYS_ADMIN = 21
AGAIN = 0.05  # seconds between tries
IOCTL_DISCONNECT = 0xAB08


def check_privilege() -> None:
    """Raise NbdError if this process lacks the privilege to attach devices (CAP_SYS_ADMIN)."""
    try:
        with open("/proc/self/status") as f:
            found = next(line for line in f if line.startswith("CapEff:"))
        able = bool(int(found.split()[1], 16) >> CAP_SYS_ADMIN & 1)
    except (OSError, StopIteration, ValueError):
        able = os.geteuid() == 0
    if not able:
        raise NbdError(NO_PRIVILEGE)


def driver() -> Netlink:
    """Connect to the driver; loads its module if necessary.  Raises NbdError."""
    check_privilege()
    for attempt in range(2):
        try:
            return Netlink()
        except OSError as e:
            if e.errno != errno.ENOENT:
                raise NbdError(f"netlink: {e.strerror}") from None
        if not attempt:
            sysfs.modprobe()
    if os.path.exists("/sys/module/nbd"):
        raise NbdError(
            "the nbd driver answers in the initial network namespace only"
            " (nsenter --net=/proc/1/ns/net, or --socket PATH)"
        )
    raise NbdError(NO_DRIVER)


def explain(e: OSError) -> NbdError:
    """The NbdError, with a helpful message, for an error returned by the driver."""
    if e.errno == errno.EPERM:
        return NbdError(NO_PRIVILEGE)
    return NbdError(f"the nbd driver reports: {e.strerror}")


def disconnect(index: int) -> None:
    """Disconnect a device, by ioctl if there is no netlink interface.  Raises OSError."""
    try:
        with Netlink() as netlink:
            netlink.disconnect(index)
    except NetlinkError as e:
        if e.errno != errno.ENOENT:
            raise
        import fcntl

        fd = os.open(sysfs.node(index), os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, IOCTL_DISCONNECT)
        finally:
            os.close(fd)


def reconnect(
    index: int, identifier: str, patience: float, *, size: int | None = None
) -> socket.socket | None:
    """Give a device whose server is dead a new connection; returns this process's end of it.

    Returns None if the kernel does not accept the connection within ``patience`` seconds, because
    the device has a live one.  The answer to RECONFIGURE does not tell, but the kernel closes a
    socket that it does not accept.  Blocks.  Raises OSError."""
    end = time.monotonic() + patience
    with Netlink() as netlink:
        while True:
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    netlink.reconfigure(
                        reconfigure(index, identifier=identifier, fds=[theirs.fileno()], size=size)
                    )
                except BaseException:
                    ours.close()
                    raise
            if not _hung_up(ours):
                return ours
            ours.close()
            if time.monotonic() > end:
                return None
            time.sleep(AGAIN)


def _hung_up(sock: socket.socket) -> bool:
    """Whether the peer's end of a socket is closed."""
    poller = select.poll()
    poller.register(sock, select.POLLRDHUP)
    return bool(poller.poll(0))

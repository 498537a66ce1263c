"""What is done to devices through the driver: connect, connect again, disconnect."""

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

BLOCK_SIZE = 512  # fits every image; the kernel's erofs asks for its own anyway
CAP_SYS_ADMIN = 21
AGAIN = 0.05  # seconds between tries
IOCTL_DISCONNECT = 0xAB08


def check_privilege() -> None:
    """Raise NbdError where attaching can't work for lack of privilege."""
    try:
        with open("/proc/self/status") as f:
            found = next(line for line in f if line.startswith("CapEff:"))
        able = bool(int(found.split()[1], 16) >> CAP_SYS_ADMIN & 1)
    except (OSError, StopIteration, ValueError):
        able = os.geteuid() == 0
    if not able:
        raise NbdError(NO_PRIVILEGE)


def driver() -> Netlink:
    """The driver, loaded if need be.  Raises NbdError."""
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
            "the nbd driver answers in the first network namespace only"
            " (nsenter --net=/proc/1/ns/net, or --socket PATH)"
        )
    raise NbdError(NO_DRIVER)


def explain(e: OSError) -> NbdError:
    """A refusal by the driver, in words that help."""
    if e.errno == errno.EPERM:
        return NbdError(NO_PRIVILEGE)
    return NbdError(f"the nbd driver refuses: {e.strerror}")


def disconnect(index: int) -> None:
    """Take a device away.  Raises OSError."""
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
    """Give a device whose server is dead a new connection; returns our end of it.

    None where the kernel does not take it within ``patience`` seconds, because it has a connection
    that lives.  Its answer to RECONFIGURE says nothing about that, but it drops what it does not
    want.  Blocks.  Raises OSError."""
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
    """Whether nobody has the other end."""
    poller = select.poll()
    poller.register(sock, select.POLLRDHUP)
    return bool(poller.poll(0))

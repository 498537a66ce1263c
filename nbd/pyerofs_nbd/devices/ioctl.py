"""Attach devices by ioctl, for kernels without nbd's netlink interface.  Such a device can't be
recovered: if its server dies, the kernel fails all reads and detaches the device."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
import time

from pyerofs_nbd.devices import sysfs
from pyerofs_nbd.devices.driver import BLOCK_SIZE
from pyerofs_nbd.devices.netlink import HAS_FLAGS, READ_ONLY
from pyerofs_nbd.devices.sysfs import NO_DRIVER
from pyerofs_nbd.errors import NbdError

SET_SOCK, SET_BLKSIZE, DO_IT, CLEAR_SOCK = 0xAB00, 0xAB01, 0xAB03, 0xAB04
SET_SIZE_BLOCKS, SET_TIMEOUT, SET_FLAGS = 0xAB07, 0xAB09, 0xAB0A
PATIENCE = 10.0  # seconds until the device must be attached


def attach(theirs: socket.socket, size: int, wanted: int | None) -> int:
    """Attach a device to a socket, in a thread that lives as long as the attachment; returns the
    device's number.

    The driver binds a device to the thread that gave it its first socket, so no other process can
    attach it meanwhile.  Raises NbdError."""
    candidates = [wanted] if wanted is not None else _free()
    for index in candidates:
        found = _Attempt(index, theirs, size)
        if found.succeeded():
            return index
        if found.error != errno.EBUSY:
            reason = os.strerror(found.error)
            raise NbdError(f"{sysfs.node(index)}: can't be attached by ioctl: {reason}")
    if wanted is not None:
        raise NbdError(f"{sysfs.node(wanted)}: is in use")
    raise NbdError("all nbd devices are in use (modprobe nbd nbds_max=N makes more)")


def _free() -> list[int]:
    try:
        names = os.listdir(sysfs.SYSFS)
    except OSError:
        names = []
    found = sorted(i for i in map(sysfs.index_of, names) if i is not None)
    if not found:
        raise NbdError(NO_DRIVER)
    return [i for i in found if not sysfs.attached(i)]


class _Attempt:
    """One attempt to attach one device."""

    def __init__(self, index: int, theirs: socket.socket, size: int) -> None:
        self.error = 0
        self._index = index
        self._size = size
        self._sock = theirs
        self._decided = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"nbd{index}")
        self._thread.start()

    def succeeded(self) -> bool:
        end = time.monotonic() + PATIENCE
        self._decided.wait(PATIENCE)
        while not self.error and time.monotonic() < end:
            if sysfs.attached(self._index) and sysfs.size(self._index):
                self._sock.close()  # the kernel holds its own reference
                return True
            time.sleep(0.01)
        self.error = self.error or errno.ETIMEDOUT
        return False

    def _run(self) -> None:
        try:
            fd = os.open(sysfs.node(self._index), os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            self.error = e.errno or errno.EIO
            self._decided.set()
            return
        ours = False
        try:
            fcntl.ioctl(fd, SET_SOCK, self._sock.fileno())
            ours = True
            fcntl.ioctl(fd, SET_BLKSIZE, BLOCK_SIZE)
            fcntl.ioctl(fd, SET_SIZE_BLOCKS, self._size // BLOCK_SIZE)
            fcntl.ioctl(fd, SET_TIMEOUT, 0)
            fcntl.ioctl(fd, SET_FLAGS, HAS_FLAGS | READ_ONLY)
            self._decided.set()
            fcntl.ioctl(fd, DO_IT)
        except OSError as e:
            if not self._decided.is_set():
                self.error = e.errno or errno.EIO
        finally:
            if ours:
                try:
                    fcntl.ioctl(fd, CLEAR_SOCK)
                except OSError:
                    pass
            os.close(fd)
            self._decided.set()

"""The turn: which of several processes receives the next request.

The processes that serve a mount share the kernel's request queue.  Only the one that has the *turn*
waits for requests and receives them.  It keeps the turn while it answers requests faster than they
arrive, since waking another process would cost more; it passes the turn on before longer work.  (All
processes can't wait at once: the kernel would wake all of them for each request, and pyfuse3 would
block in ``read`` in all but the fastest.)

The turn is a semaphore of one unit, kept by the kernel in an eventfd.
"""

from __future__ import annotations

import os
import select
import time

SELECT_LIMIT = 1024  # select(2) can't watch descriptors from here on
ALONE_NS = 400_000  # that the event loop may block while no request waits,
HANDED_OVER_NS = 100_000_000  # and while another process has the turn


class Turns:
    """This process's view of the turn.  A single process always has the turn."""

    def __init__(self, processes: int) -> None:
        """Must be called before the fork."""
        self.processes = processes
        self.shared = processes > 1
        self.mine = True
        self.fd = -1  # readable while no process has the turn
        self.queue = -1  # the kernel's queue of requests, once that is known
        if self.shared:
            self.fd = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def take(self) -> bool:
        """Take the turn if it is free; returns whether this process has it."""
        if not self.mine:
            try:
                os.eventfd_read(self.fd)
                self.mine = True
            except BlockingIOError:
                pass
        return self.mine

    def pass_on(self) -> None:
        """Let another process receive the next request.  An operation does so before it waits."""
        if self.shared and self.mine:
            self.mine = False
            os.eventfd_write(self.fd, 1)

    def hold(self) -> None:
        """Give up the turn without releasing it: no process receives until ``Crew.fork`` sets it."""
        self.mine = not self.shared

    def may_be_busy(self, ns: float) -> bool:
        """Whether the event loop may block for ``ns`` nanoseconds, because no request waits or because
        another process receives requests (which may get the turn by this call)."""
        if self.mine:
            if ns < ALONE_NS and self.idle():
                return True
            self.pass_on()
        return not self.mine and ns < HANDED_OVER_NS

    def idle(self) -> bool:
        """Whether no request waits to be received (False if select(2) can't tell)."""
        return 0 <= self.queue < SELECT_LIMIT and not readable(self.queue)


def readable(fd: int, seconds: float = 0.0) -> bool:
    """Whether a descriptor becomes readable in this time; False if select(2) can't watch it."""
    return fd < SELECT_LIMIT and bool(select.select([fd], (), (), seconds)[0])


def readable_soon(fd: int, seconds: float) -> bool:
    """``readable`` by polling, yielding the processor to other processes in between: to sleep and be
    woken would take longer, above all on a virtual machine."""
    if readable(fd):
        return True
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        os.sched_yield()
        if readable(fd):
            return True
    return False

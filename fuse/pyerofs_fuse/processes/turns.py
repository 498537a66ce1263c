"""Which of several processes receives the next request.

The processes that serve a mount share the kernel's queue.  Only one of them at a time waits for it
and receives: whose turn it is.  It keeps the turn while requests are answered faster than they come,
since waking another process costs more than that; it passes the turn on when it is about to be busy
for longer.  (All waiting at once is not possible: the kernel would wake them all for
each request, and pyfuse3 would block in ``read`` where another was faster.)

The turn is the one unit of a semaphore that the kernel keeps, an eventfd.
"""

from __future__ import annotations

import os
import select
import time

SELECT_LIMIT = 1024  # select(2) can't look at descriptors from here on
ALONE_NS = 400_000  # that the event loop may be busy while nobody wants it,
HANDED_OVER_NS = 100_000_000  # and while it is another process' turn


class Turns:
    """This process's view of the turn.  Alone, it always has it."""

    def __init__(self, processes: int) -> None:
        """Made before the fork."""
        self.processes = processes
        self.shared = processes > 1
        self.mine = True
        self.fd = -1  # readable while nobody has the turn
        self.queue = -1  # the kernel's queue of requests, once that is known
        if self.shared:
            self.fd = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def take(self) -> bool:
        """Whether it is our turn; where nobody has it, from now on it is."""
        if not self.mine:
            try:
                os.eventfd_read(self.fd)
                self.mine = True
            except BlockingIOError:
                pass
        return self.mine

    def pass_on(self) -> None:
        """Let another process receive what comes next.  An operation does so before it waits."""
        if self.shared and self.mine:
            self.mine = False
            os.eventfd_write(self.fd, 1)

    def hold(self) -> None:
        """Have nobody receive anything until somebody passes the turn on."""
        self.mine = not self.shared

    def may_be_busy(self, ns: float) -> bool:
        """Whether this process may answer nothing for so many nanoseconds, because nobody wants
        anything or because, from now on, another one receives what comes."""
        if self.mine:
            if ns < ALONE_NS and self.idle():
                return True
            self.pass_on()
        return not self.mine and ns < HANDED_OVER_NS

    def idle(self) -> bool:
        """Whether no request waits to be received (as far as one can tell)."""
        return 0 <= self.queue < SELECT_LIMIT and not readable(self.queue)


def readable(fd: int, seconds: float = 0.0) -> bool:
    """Whether a descriptor becomes readable in this time; False if it can't be looked at."""
    return fd < SELECT_LIMIT and bool(select.select([fd], (), (), seconds)[0])


def readable_soon(fd: int, seconds: float) -> bool:
    """The same for a moment in which it is looked at again and again, as long as nobody else wants the
    processor: to sleep and be woken would take longer, above all on a virtual machine."""
    if readable(fd):
        return True
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        os.sched_yield()
        if readable(fd):
            return True
    return False

"""Find out whether a descriptor can be read, and stay awake for that for a moment."""

from __future__ import annotations

import os
import select
from time import perf_counter

# Seconds in which a client that asks one thing after another is expected to ask again: about twice what
# it needs for that, and to be woken itself.  To wake a server takes longer than most answers.
AWAKE = 80e-6


def reading(fd: int) -> select.poll:
    """A poll object that tells when a descriptor can be read."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return poll


def look_out(poll: select.poll) -> bool:
    """Wait without sleeping, for AWAKE at most; whether the poll object has an event.  Other processes
    that want the processor get it first: the client, for one.  Blocks."""
    end = perf_counter() + AWAKE
    while not poll.poll(0):
        if perf_counter() > end:
            return False
        os.sched_yield()
    return True

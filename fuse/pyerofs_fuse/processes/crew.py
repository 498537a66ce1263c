"""The processes that serve one mount, each with an interpreter of its own.

The processes are forked after FUSE INIT, so they share one libfuse session.  The first one (the
*leader*) made the mount, handles signals and unmounts; the others only answer requests.  If any of
them dies, programs that wait for its replies would hang; so the mount then ends, and the kernel fails
their requests.
"""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress

import trio

from pyerofs.system.daemon import STOPS, heeded
from pyerofs.system.libc import signal_when_parent_dies
from pyerofs_fuse.processes.handles import Handles
from pyerofs_fuse.processes.turns import Turns

log = logging.getLogger("pyerofs-fuse")

SIGNALS = heeded(*STOPS)


class Crew:
    """The processes of one mount, seen from the leader."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.turns = Turns(size)
        self.handles = Handles(size)
        self._others: dict[int, int] = {}  # process id -> a pipe whose other end that process holds

    def fork(self) -> bool:
        """Fork until ``size`` processes run, or as many as the system allows.  True in the leader,
        which handles signals; False in the others, which ignore them."""
        captain = os.getpid()
        for number in range(1, self.size):
            ours, theirs = os.pipe()
            try:
                child = os.fork()
            except OSError as e:
                log.warning("served by %d processes, not %d: %s", number, self.size, e.strerror)
                os.close(ours)
                os.close(theirs)
                break
            if not child:
                os.close(ours)
                self.handles.me = number
                self._enlist(captain)
                return False
            os.close(theirs)
            self._others[child] = ours
        self.turns.mine = True
        return True

    def _enlist(self, captain: int) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        signal_when_parent_dies(signal.SIGKILL)
        if os.getppid() != captain:  # the leader has died before the death signal was set
            os._exit(1)
        self.turns.mine = False
        for fd in self._others.values():
            os.close(fd)
        self._others = {}

    async def death(self) -> None:
        """Return as soon as another process has died abnormally (not because the mount ended)."""
        died = trio.Event()

        async def mind(child: int, fd: int) -> None:
            await trio.lowlevel.wait_readable(fd)
            _, status = os.waitpid(child, 0)  # noqa: ASYNC222 (its end of the pipe is closed: it ends)
            os.close(self._others.pop(child))
            if status:
                log.error("process %d, which served the mount, died (status %#x)", child, status)
                died.set()

        async with trio.open_nursery() as nursery:
            for child, fd in self._others.items():
                nursery.start_soon(mind, child, fd)
            await died.wait()
            nursery.cancel_scope.cancel()

    def end(self) -> None:
        """End the other processes."""
        for child, fd in self._others.items():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(fd)
        self._others = {}

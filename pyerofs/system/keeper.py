"""Keep a FUSE mount alive when its server dies.

The keeper holds everything that a server needs: the descriptor of /dev/fuse and, by fork, the open
image.  It never reads a request and never touches the mount, so nothing that a client or an image
does can harm it.  When a server dies, the keeper forks another and has the kernel send all requests
again that nobody answered (NOTIFY_RESEND, Linux 6.9).  Servers keep no state, so any of them can
answer any request; one that was answered already is refused by the kernel, which does no harm.

A server writes into shared memory which request it is working on.  From that the keeper learns which
request has killed a server again and again, and whether a server is stuck.

If the keeper dies, its first server takes its place.  On RESTART the keeper executes its program anew,
perhaps a newer version: the old servers go on until one of the new ones is ready.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, NoReturn

from pyerofs.system.daemon import STOPS, heeded
from pyerofs.system.fuse.wire import NOTIFY_RESEND, REPLY, RESENT
from pyerofs.system.libc import signal_when_parent_dies
from pyerofs.system.readiness import reading

log = logging.getLogger("pyerofs")

CHECK = 1.0  # seconds between two looks at the servers
STOPPED_FOR = (
    2  # looks at a stopped server before it is replaced, so a debugger's stop may be short
)
STUCK_AFTER = 30.0  # seconds that one request, or all that wait, may take a server
MAX_DEATHS = 3  # of servers that worked on the same request, before it is answered with EIO
MAX_FAILURES = 8  # servers in a row that never were ready, before the keeper gives up
DELAYS = (0.0, 0.02, 0.1, 0.3, 1.0)  # seconds before a start, by the failures before it
RESTART = signal.SIGUSR1  # asks a keeper to execute its program anew
ORPHANED = signal.SIGUSR2  # sent to a server whose keeper has died
RELIEF = 0.02  # seconds between two looks whether a new server is ready to replace old ones
GRACE = 1.0  # seconds for servers to end by themselves when the mount has gone
# The other servers of a keeper that has died end when they notice that, perhaps with a request in hand
INHERITED_LOOKS = 5
NONE = 0  # in a slot: no request is being worked on (no request has this number)


class Orphaned(BaseException):
    """Raised in a server, in its main thread, when its keeper has died."""


class Slot:
    """What a server tells its keeper, in shared memory: the request in hand, and how many it began."""

    def __init__(self, memory: memoryview) -> None:
        self.words = memory  # two numbers of 64 bits

    @property
    def unique(self) -> int:
        """The number of the request in hand, or NONE."""
        return self.words[0]

    @property
    def begun(self) -> int:
        """How many requests were begun, and how often a server became ready."""
        return self.words[1]

    def ready(self) -> None:
        """Called by the server when it can take requests."""
        self.words[1] += 1

    def begin(self, unique: int) -> None:
        """Called by the server with each request."""
        words = self.words
        words[0] = unique
        words[1] += 1

    def end(self) -> None:
        """Called by the server when the request has been answered."""
        self.words[0] = NONE


class Server(NamedTuple):
    """What a server process works with.

    ``slots``: one for each of its threads that answer requests.  ``poisoned``: the numbers of requests
    that must be answered with EIO when they are sent again.  ``number``: which of the servers it is."""

    slots: Sequence[Slot]
    poisoned: Collection[int]
    number: int = 0


class Predecessor(NamedTuple):
    """What the keeper that ran in this process before has left.

    ``servers``: the process numbers of its servers.  ``poisoned``: see Server."""

    servers: Collection[int] = ()
    poisoned: Collection[int] = ()


class _Process:
    """A server process, seen from its keeper."""

    def __init__(self, pid: int, slots: Sequence[Slot]) -> None:
        self.pid = pid
        self.slots = slots
        self.first = self.begun
        self.stopped = 0  # looks in a row that saw it stopped
        # for each slot: which request a look saw in hand, and when it was seen first
        self._seen: list[tuple[int, float]] = [(NONE, 0.0)] * len(slots)

    @property
    def begun(self) -> int:
        """How many requests all its threads have begun."""
        return sum(slot.begun for slot in self.slots)

    @property
    def is_busy(self) -> bool:
        """Whether a thread has a request in hand."""
        return any(slot.unique != NONE for slot in self.slots)

    def longest(self, now: float) -> float:
        """For how many seconds a request has been in hand, as far as looks have seen it."""
        states = [slot.unique and slot.begun for slot in self.slots]
        self._seen = [
            (state, since if state == seen else now)
            for state, (seen, since) in zip(states, self._seen, strict=True)
        ]
        return max((now - since for state, since in self._seen if state != NONE), default=0.0)


class Keeper:
    """The servers of one mount, and what is known of those that have died."""

    def __init__(
        self,
        fd: int,
        serve: Callable[[Server], None],
        unmount: Callable[[], None],
        *,
        resend: bool,
        servers: int = 1,
        threads: int = 1,
        heirs: bool = True,
        patience: float = STUCK_AFTER,
        failures: int = MAX_FAILURES,
        keeping: Callable[[], AbstractContextManager[None]] = nullcontext,
        execute: Callable[[Predecessor], None] | None = None,
        predecessor: Predecessor | None = None,
    ) -> None:
        """``fd``: /dev/fuse, after INIT.  ``serve`` runs in a forked process, and returns when the
        mount has gone.  ``unmount`` is called on a stop signal.

        ``resend``: whether the kernel knows NOTIFY_RESEND; without it, the death of a server ends the
        mount.  ``threads``: how many of each server answer requests.  ``heirs``: whether a server
        can take the keeper's place; it must have no other threads then.  Else servers go on without
        a keeper.  ``patience``: seconds that a request may take.  ``failures``: servers in a row
        that may die before they are ready.  ``keeping``: entered by each process that is the keeper,
        for as long as it is.  ``execute`` is called on RESTART, if the kernel can ``resend``:
        executes the program anew, or raises OSError.  ``predecessor``: the keeper that ran in this
        process before."""
        self._fd = fd
        self._serve = serve
        self._unmount = unmount
        self._resend = resend
        self._heirs = heirs
        self._patience = patience
        self._max_failures = failures
        words = memoryview(mmap.mmap(-1, 16 * servers * threads)).cast("Q")
        slots = [Slot(words[2 * i : 2 * i + 2]) for i in range(servers * threads)]
        self._slots = [slots[i : i + threads] for i in range(0, len(slots), threads)]
        self._keeping = keeping
        self._execute = execute if resend else None  # else requests in hand would be lost
        self._processes: dict[int, _Process] = {}
        self._deaths: Counter[int] = Counter()
        self._to_relieve = predecessor is not None
        self._old = set(() if predecessor is None else predecessor.servers)  # of the keeper before
        self._poisoned = set(() if predecessor is None else predecessor.poisoned)
        self._failures = 0
        # how many requests all servers had begun, and since when they begin none although some wait
        self._begun, self._idle_since = 0, time.monotonic()
        self._inherited = 0  # looks at which servers of a keeper that has died may still be there

    def run(self, started: Callable[[], None] = lambda: None) -> bool:
        """Start the servers, and keep them until the mount has gone (True) or a stop signal comes, on
        which it is unmounted (False).  ``started`` is called once they run.

        Raises ServersFailed where no server can be kept.  Leaves no process."""
        waited = {signal.SIGCHLD, *heeded(*STOPS)}
        if self._execute is not None:
            waited.add(RESTART)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
        try:
            for slots in self._slots:
                self._start(slots)
            started()
            ended = self._watch(waited) if self._to_relieve else None
            if ended is None:
                with self._keeping():
                    ended = self._watch(waited)
            return bool(ended)
        finally:
            for process in [*self._processes.values()]:
                self._kill(process)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _watch(self, waited: Collection[signal.Signals]) -> bool | None:
        """Keep servers until the mount has gone (True) or was unmounted (False), or until they have
        relieved old ones (None)."""
        while True:
            found = signal.sigtimedwait(waited, RELIEF if self._to_relieve else CHECK)
            if self._to_relieve and self._relieve():
                return None
            if found is None:
                self._look()
            elif found.si_signo == RESTART:
                self._restart()
            elif found.si_signo != signal.SIGCHLD:
                log.info("stopping on signal %d", found.si_signo)
                self._unmount()
                self._drain()
                return False
            elif self._reap():
                return True

    def _drain(self) -> None:
        """Give servers a moment to notice that the mount has gone."""
        end = time.monotonic() + GRACE
        while self._processes and (left := end - time.monotonic()) > 0:
            if signal.sigtimedwait({signal.SIGCHLD}, left) is not None:
                for pid in [*self._processes]:
                    if os.waitpid(pid, os.WNOHANG)[0]:
                        del self._processes[pid]

    def _restart(self) -> None:
        """Execute the program anew; goes on if that fails."""
        assert self._execute is not None
        log.info("restarting")
        try:
            self._execute(Predecessor([*self._processes, *self._old], sorted(self._poisoned)))
        except OSError as e:
            log.error("can't restart: %s", e)

    def _relieve(self) -> bool:
        """End the servers of the keeper before, once a new one is ready; whether that is so."""
        if all(process.begun == process.first for process in self._processes.values()):
            return False
        self._to_relieve = False
        for pid in self._old:
            os.kill(pid, signal.SIGKILL)  # a child, not waited for: the number is still its own
        self._send_again()
        return True

    # the life of a server ----------------------------------------------------------------

    def _start(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            slot.end()
        keeper = os.getpid()
        pid = os.fork()
        if pid:
            self._processes[pid] = _Process(pid, slots)
            return
        try:
            self._become_server(keeper, slots)
        except BaseException:
            log.exception("a server ends")
        finally:
            os._exit(1)

    def _become_server(self, keeper: int, slots: Sequence[Slot]) -> NoReturn:
        """Serve, in a forked process; on the keeper's death, keep."""
        self._processes, self._old, self._to_relieve = {}, set(), False
        number = next(i for i, own in enumerate(self._slots) if own is slots)
        for stop in STOPS:
            signal.signal(stop, signal.SIG_IGN)  # the keeper ends the servers
        signal.signal(ORPHANED, _raise_orphaned)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        try:
            if self._heirs:
                signal_when_parent_dies(ORPHANED)
                if os.getppid() != keeper:
                    raise Orphaned
            self._serve(Server(slots, frozenset(self._poisoned), number))
        except Orphaned:
            if number == 0 and self._resend:
                log.warning("the keeper has died; its first server takes its place")
                for stop in STOPS:
                    signal.signal(stop, signal.SIG_DFL)
                signal.signal(ORPHANED, signal.SIG_IGN)
                self._inherited = INHERITED_LOOKS
                self.run(self._send_again)
            os._exit(1)
        os._exit(0)

    def _reap(self) -> bool:
        """Replace servers that have died; whether the mount has gone.  Raises ServersFailed."""
        while self._processes:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            process = self._processes.pop(pid, None)
            if process is None:
                self._old.discard(pid)
                continue
            if status == 0:
                return True
            self._note_death(process, status)
            if not self._resend:
                raise ServersFailed(f"the server has died (status {status:#x})")
            if self._failures > self._max_failures:
                raise ServersFailed(f"{self._failures} servers in a row have died")
            time.sleep(DELAYS[min(self._failures, len(DELAYS) - 1)])
            self._start(process.slots)
            self._send_again()
        return False

    def _note_death(self, process: _Process, status: int) -> None:
        was_ready = process.begun > process.first
        self._failures = 0 if was_ready else self._failures + 1
        for slot in process.slots:
            unique = slot.unique & ~RESENT
            if unique != NONE:
                self._deaths[unique] += 1
                if self._deaths[unique] >= MAX_DEATHS:
                    self._poisoned.add(unique)
        if len(self._deaths) > 1000:
            self._deaths.clear()
        log.warning("a server has died (status %#x) and is replaced", status)

    def _send_again(self) -> None:
        """Have the kernel send all requests again that were received and not answered."""
        try:
            os.write(self._fd, REPLY.pack(REPLY.size, NOTIFY_RESEND, 0))
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.ENODEV, errno.ENOTCONN):
                raise

    # what goes wrong without a death -------------------------------------------------------

    def _look(self) -> None:
        """Kill servers that are stopped or stuck; their deaths are noticed as any other."""
        if self._inherited:
            self._inherited -= 1
            self._send_again()
        now = time.monotonic()
        waiting = _is_readable(self._fd)
        begun = sum(process.begun for process in self._processes.values())
        if not waiting or begun != self._begun:
            self._begun, self._idle_since = begun, now
        for process in self._processes.values():
            longest = max(process.longest(now), now - self._idle_since)
            wanted = waiting or process.is_busy
            process.stopped = process.stopped + 1 if wanted and _is_stopped(process.pid) else 0
            if process.stopped >= STOPPED_FOR or longest > self._patience:
                why = "stopped" if process.stopped else "stuck"
                log.warning("a server is %s and is replaced", why)
                os.kill(process.pid, signal.SIGKILL)

    def _kill(self, process: _Process) -> None:
        try:
            os.kill(process.pid, signal.SIGKILL)
            os.waitpid(process.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        self._processes.pop(process.pid, None)


class ServersFailed(Exception):
    """No server could be kept; the mount can't go on."""


def _raise_orphaned(number: int, frame: object) -> NoReturn:
    raise Orphaned


def _is_readable(fd: int) -> bool:
    return any(events & select.POLLIN for _, events in reading(fd).poll(0))


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal or a debugger (proc(5))."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return f.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False

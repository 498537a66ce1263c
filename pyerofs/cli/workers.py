"""Run many jobs on all CPUs: in threads, or in processes, which the GIL does not serialize.

Processes receive jobs as messages on one shared socket, so the next idle process takes the next
job.  A message may carry a file descriptor.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NoReturn, TypeVar

from pyerofs.system.libc import keep_freed_memory

Job = TypeVar("Job")
Result = TypeVar("Result")

MANY = 2000  # inodes; with fewer, processes are not worth starting
MAX_MESSAGE = 128 << 10  # bytes of a job, which has to fit the socket's buffer
MAX_WAITING = 16  # unfinished jobs of threads; further submits block


class WorkersEnded(Exception):
    """The workers have ended early; ``close`` raises the cause."""


def hire(
    work: Callable[[Job, int], None], finish: Callable[[], Result], inodes: int
) -> Workers[Job, Result] | Threads[Job, Result]:
    """Start workers for an image with ``inodes`` inodes.  Each job and its descriptor (-1: none)
    are passed to ``work``; the descriptor is closed afterwards.

    Processes are used if there are at least MANY inodes, several CPUs and no other thread: a fork
    would copy locks that other threads hold.  Remote images, whose sources run a thread, therefore
    get threads.  ``finish`` returns the results of a process; threads share all state that ``work``
    changes, so ``finish`` is not called."""
    keep_freed_memory()
    if inodes >= MANY and (os.cpu_count() or 1) > 1 and threading.active_count() == 1:
        return Workers(work, finish)
    return Threads(work)


class Threads(Generic[Job, Result]):
    """A pool of one thread more than there are CPUs.  An exception in ``work`` ends it."""

    def __init__(self, work: Callable[[Job, int], None]) -> None:
        self._work = work
        self._pool = ThreadPoolExecutor(max_workers=(os.cpu_count() or 1) + 1)
        self._waiting = threading.Semaphore(MAX_WAITING)
        self._error: BaseException | None = None

    def submit(self, job: Job, fd: int = -1) -> None:
        """Queue a job.  ``fd`` is duplicated; the caller closes its own.  Blocks while MAX_WAITING
        jobs are unfinished.  Raises WorkersEnded if a job has failed."""
        self._waiting.acquire()
        if self._error is not None:
            raise WorkersEnded
        own = os.dup(fd) if fd >= 0 else -1
        self._pool.submit(_do, self._work, job, own).add_done_callback(self._done)

    def _done(self, future: Future[None]) -> None:
        self._error = self._error or future.exception()
        self._waiting.release()

    def close(self) -> Sequence[Result]:
        """Wait for all jobs.  Raises the first exception of a job."""
        self._pool.shutdown()
        if self._error is not None:
            raise self._error
        return ()


def _do(work: Callable[[Job, int], None], job: Job, fd: int) -> None:
    try:
        work(job, fd)
    finally:
        if fd >= 0:
            os.close(fd)


class Workers(Generic[Job, Result]):
    """As many forked processes as there are CPUs.

    Each process calls ``work`` for its jobs and ``finish`` at the end, whose result it sends back.
    An OSError in ``work`` ends the process; ``close`` raises it."""

    def __init__(self, work: Callable[[Job, int], None], finish: Callable[[], Result]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._jobs, jobs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._workers: list[tuple[int, int]] = []  # pid, and the pipe for its result
        for _ in range(os.cpu_count() or 1):
            results, result = os.pipe()
            pid = os.fork()
            if not pid:
                self._jobs.close()
                _run(jobs, result, work, finish)
            os.close(result)
            self._workers.append((pid, results))
        jobs.close()

    def submit(self, job: Job, fd: int = -1) -> None:
        """Send a job, and a descriptor, which the caller still closes.  Blocks while the socket's
        buffer is full.  Raises WorkersEnded if no process is left."""
        message = pickle.dumps(job)
        assert len(message) <= MAX_MESSAGE, "jobs are made of bounded parts"
        try:
            socket.send_fds(self._jobs, [message], [fd] if fd >= 0 else [])
        except (BrokenPipeError, ConnectionResetError):
            raise WorkersEnded from None

    def close(self) -> Sequence[Result]:
        """Wait for all jobs; returns the results of ``finish``.  Raises a worker's first OSError."""
        self._jobs.close()
        found: list[Result] = []
        errors: list[OSError] = []
        for pid, results in self._workers:
            with open(results, "rb") as f:
                answer = f.read()
            os.waitpid(pid, 0)
            error, result = pickle.loads(answer) if answer else (_DIED, None)
            if error is not None:
                errors.append(error)
            if result is not None:
                found.append(result)
        if errors:
            raise errors[0]
        return found


_DIED = OSError(0, "a worker process died")


def _run(
    jobs: socket.socket, result: int, work: Callable[[Job, int], None], finish: Callable[[], Result]
) -> NoReturn:
    """The main loop of a worker process."""
    status = 1
    try:
        error: OSError | None = None
        try:
            while True:
                message, fds, _, _ = socket.recv_fds(jobs, MAX_MESSAGE, 1)
                if not message:
                    break
                _do(work, pickle.loads(message), fds[0] if fds else -1)
        except OSError as e:
            error = OSError(e.errno, e.strerror, e.filename)
        jobs.close()
        with open(result, "wb") as f:
            f.write(pickle.dumps((error, finish())))
        status = 0
    except KeyboardInterrupt:
        pass
    finally:
        sys.stderr.flush()
        os._exit(status)

"""Processes that share a queue of jobs: what Python's threads can't do at the same time, these can.

A job is a message on one socket that all workers read from, so whoever is free takes the next.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Generic, NoReturn, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

MANY = 2000  # inodes; with fewer, processes are not worth starting
MAX_MESSAGE = 128 << 10  # bytes of a job, which has to fit the socket's buffer


def worth_forking(inodes: int) -> bool:
    """Whether processes are of use here, and no other thread could be caught with a lock held."""
    return inodes >= MANY and (os.cpu_count() or 1) > 1 and threading.active_count() == 1


class WorkersEnded(Exception):
    """The workers have ended early; ``close`` tells why."""


class Workers(Generic[Job, Result]):
    """As many forked processes as there are CPUs.

    ``work`` is called in them with each job, ``finish`` at the end; what that returns is sent back.
    An OSError that ``work`` raises ends its worker, and is raised by ``close``."""

    def __init__(self, work: Callable[[Job], None], finish: Callable[[], Result]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._jobs, jobs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._workers: list[tuple[int, int]] = []  # pid, and where its result comes from
        for _ in range(os.cpu_count() or 1):
            results, result = os.pipe()
            pid = os.fork()
            if not pid:
                self._jobs.close()
                _run(jobs, result, work, finish)
            os.close(result)
            self._workers.append((pid, results))
        jobs.close()

    def submit(self, job: Job) -> bool:
        """Hand over a job; may wait.  False if no worker is left to do it.

        Raises ValueError where a job is too large."""
        message = pickle.dumps(job)
        if len(message) > MAX_MESSAGE:
            raise ValueError(f"a job of {len(message)} bytes")
        try:
            self._jobs.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def close(self) -> Sequence[Result]:
        """Wait until all is done; the results.  Raises an OSError that a worker met."""
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
    jobs: socket.socket, result: int, work: Callable[[Job], None], finish: Callable[[], Result]
) -> NoReturn:
    """The life of a worker."""
    status = 1
    try:
        error: OSError | None = None
        try:
            while message := jobs.recv(MAX_MESSAGE):
                work(pickle.loads(message))
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

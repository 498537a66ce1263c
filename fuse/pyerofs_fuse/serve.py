"""Open the image, mount it, and serve it until it is unmounted or a signal stops the daemon.

A remote image is served by one process.  A local image is served by one process per CPU, up to
MAX_PROCESSES: it is opened, checked and mounted before the process forks (see ``crew``).
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import NamedTuple, NoReturn

import pyfuse3
import trio

from pyerofs.aio import AsyncImage, open_scheduled
from pyerofs.errors import CorruptImage, ErofsError, UnsupportedFeature
from pyerofs.image import Image
from pyerofs.pager import Schedule
from pyerofs.prefetch import paths_of, prefetch_metadata, prefetch_paths
from pyerofs.sources.base import Source
from pyerofs.sources.open import is_near, open_sources
from pyerofs.sources.spec import Access, SourceSpec
from pyerofs.system.daemon import Report
from pyerofs.system.progress import Download
from pyerofs.system.status import publish
from pyerofs_fuse.mount import MountError, check, mounted, read_ahead, tune
from pyerofs_fuse.operations import Operations
from pyerofs_fuse.options import Options
from pyerofs_fuse.processes import eager
from pyerofs_fuse.processes.crew import SIGNALS, Crew

log = logging.getLogger("pyerofs-fuse")

NUDGE = 1.0  # seconds between two signals of ``_keep_moving``
GRACE = 1.0  # seconds for pending operations to finish after a stop signal
MAX_PROCESSES = 4  # each costs memory; clients and the kernel need CPUs, too


class Job(NamedTuple):
    """The image to mount, and the options for mounting it."""

    options: Options
    spec: SourceSpec
    access: Access
    first: list[str]  # paths to prefetch before anything else, of a remote image
    report: Report

    @property
    def processes(self) -> int:
        """The number of serving processes: one for a remote image (the network is the bottleneck),
        for recording opened files, or with ``-s``; else one per available CPU, up to MAX_PROCESSES."""
        if self.options.single or self.options.record is not None or not is_near(self.spec):
            return 1
        return min(len(os.sched_getaffinity(0)), MAX_PROCESSES)


def run(job: Job) -> None:
    """Mount and serve until the mount is gone.  A failure is reported and ends the process."""
    crew = Crew(job.processes)
    options = job.options
    operations = Operations(
        crew.turns, crew.handles, shared=options.shared, record=options.record is not None
    )
    eager.enable(crew.turns, lambda: operations.waiting > 0)
    try:
        check(options)
        if crew.size == 1:
            trio.run(_serve_alone, job, operations)
        else:
            _serve_together(job, operations, crew)
    except (CorruptImage, UnsupportedFeature) as e:
        job.report.failed(f"{job.spec.name}: {e}")
    except (ErofsError, MountError) as e:
        job.report.failed(str(e))


async def _serve_alone(job: Job, operations: Operations) -> None:
    waiting = Download()
    access = replace(job.access, progress=waiting.show)
    size = job.options.cache_size
    # catch signals before mounting, so that none ends the process without unmounting
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async with open_scheduled(operations, job.spec, cache_size=size, access=access) as image:
            waiting.close()
            operations.attach(image)
            with mounted(operations, job.options, job.spec.name):
                _settle()
                await _lead(job, operations, image, signals)
            if job.options.record is not None:
                await _write_record(image, operations.opened, job.options.record)


def _serve_together(job: Job, operations: Operations, crew: Crew) -> None:
    sources = open_sources(job.spec, 0, ())
    Image(sources)  # raises if the image is invalid
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with mounted(operations, job.options, job.spec.name):
            trio.run(_greet, operations)
            _settle()
            if not crew.fork():
                _work(job, operations, crew, sources)
            trio.run(_serve_with, job, operations, crew, sources)
    finally:
        crew.end()


async def _greet(operations: Operations) -> None:
    """Answer the kernel's first request, FUSE INIT, and no other."""

    async def answer() -> None:
        await pyfuse3.main()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        await operations.greeted.wait()
        nursery.cancel_scope.cancel()


async def _serve_with(
    job: Job, operations: Operations, crew: Crew, sources: Sequence[Source]
) -> None:
    with trio.open_signal_receiver(*SIGNALS) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        async with _opened(job, crew, sources, operations) as image, trio.open_nursery() as nursery:
            operations.attach(image)
            nursery.start_soon(_end_with, crew)
            await _lead(job, operations, image, signals)
            nursery.cancel_scope.cancel()


async def _end_with(crew: Crew) -> None:
    """Terminate the mount when another serving process has died."""
    await crew.death()
    pyfuse3.terminate()


def _work(job: Job, operations: Operations, crew: Crew, sources: Sequence[Source]) -> NoReturn:
    """The main loop of a forked process: answer requests until the mount is gone."""

    async def work() -> None:
        async with _opened(job, crew, sources, operations) as image:
            operations.attach(image)
            _keep_moving()
            await pyfuse3.main()
            crew.turns.pass_on()  # so that the other processes see the mount's end, too

    status = 1
    try:
        job.report.leave()
        trio.run(work)
        status = 0
    except BaseException:
        log.exception("a process that serves the mount fails")
    finally:
        os._exit(status)


def _opened(
    job: Job, crew: Crew, sources: Sequence[Source], schedule: Schedule
) -> AbstractAsyncContextManager[AsyncImage]:
    """The image in one of several processes, each with an equal share of the cache size."""
    size = job.options.cache_size // crew.size
    return open_scheduled(schedule, sources[0], devices=sources[1:], cache_size=size)


def _keep_moving() -> None:
    """Interrupt a blocked read(2) with a no-op signal every NUDGE seconds.

    A request vanishes from the kernel's queue when its client is killed.  If that happens after
    /dev/fuse was reported readable, pyfuse3 blocks in read(2) until the next request, and the event
    loop with it; a signal interrupts that read."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, NUDGE, NUDGE)


def _settle() -> None:
    """Tune this process, and those to be forked from it, for serving."""
    tune()
    gc.collect()
    gc.freeze()  # exclude objects made at start-up, which stay, from later collections


async def _lead(
    job: Job, operations: Operations, image: AsyncImage, signals: AsyncIterator[int]
) -> None:
    """Answer requests, and run the tasks that only one process of a mount, the leader, performs."""
    _keep_moving()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_background, job, image)
        nursery.start_soon(_stop_on, signals, operations, nursery.cancel_scope)
        nursery.start_soon(_announce, job, operations)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


async def _background(job: Job, image: AsyncImage) -> None:
    """Background tasks: the status file and prefetching."""
    about = {
        "command": "pyerofs-fuse",
        "mountpoint": job.options.mountpoint,
        "source": job.spec.name,
    }
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish, about, image.status)
        if image.far:
            await prefetch_paths(image, job.first)
            if job.access.prefetch != "none":
                await prefetch_metadata(image)


async def _announce(job: Job, operations: Operations) -> None:
    """Report success once the mount has answered a request: then the mount is live, and the kernel
    has negotiated its read-ahead, which can be changed only afterwards."""
    mountpoint = job.options.mountpoint
    await operations.greeted.wait()
    try:
        await trio.to_thread.run_sync(os.stat, mountpoint, abandon_on_cancel=True)
    except OSError as e:
        log.warning("%s: %s", mountpoint, e.strerror)
    read_ahead(mountpoint)
    job.report.ready()
    log.info("mounted")


async def _stop_on(
    signals: AsyncIterator[int], operations: Operations, scope: trio.CancelScope
) -> None:
    async for number in signals:
        log.info("stopping on signal %d", number)
        operations.stop()
        pyfuse3.terminate()
        await trio.sleep(GRACE)
        scope.cancel()


async def _write_record(image: AsyncImage, nids: Collection[int], path: str) -> None:
    """Write the paths of the files that were opened, in the order of opening.  Logs errors."""
    try:
        paths = await paths_of(image, nids)
        text = "".join(f"{p}\n" for p in paths if "\n" not in p)
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as f:  # noqa: ASYNC230
            f.write(text)
    except (OSError, ErofsError) as e:
        log.warning("%s: not written: %s", path, e)

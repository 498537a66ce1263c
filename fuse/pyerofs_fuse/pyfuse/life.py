"""A mount by pyfuse3: open the image, mount, and serve until it is unmounted or a signal comes."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pyfuse3
import trio

from pyerofs.aio import AsyncImage, open_scheduled
from pyerofs.errors import CorruptImage, ErofsError, UnsupportedFeature
from pyerofs.prefetch import paths_of, prefetch_metadata, prefetch_paths
from pyerofs.system.daemon import STOPS, heeded
from pyerofs.system.progress import Download
from pyerofs.system.status import publish
from pyerofs_fuse.mount import Job, MountError, check, explain, read_ahead, tune, write_record
from pyerofs_fuse.options import Options, mount_words
from pyerofs_fuse.pyfuse.operations import Operations

log = logging.getLogger("pyerofs-fuse")

SIGNALS = heeded(*STOPS)
NUDGE = 1.0  # seconds between two signals of ``_keep_moving``
GRACE = 1.0  # seconds for pending operations to finish after a stop signal


def run(job: Job) -> None:
    """Mount and serve until the mount is gone.  A failure is reported and ends the process."""
    options = job.options
    operations = Operations(shared=options.shared, record=options.record is not None)
    try:
        check(options)
        trio.run(_serve, job, operations)
    except (CorruptImage, UnsupportedFeature) as e:
        job.report.failed(f"{job.spec.name}: {e}")
    except (ErofsError, MountError) as e:
        job.report.failed(str(e))


async def _serve(job: Job, operations: Operations) -> None:
    waiting = Download()
    access = replace(job.access, progress=waiting.show)
    size = job.options.cache_size
    # catch signals before mounting, so that none ends the process without unmounting
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async with open_scheduled(operations, job.spec, cache_size=size, access=access) as image:
            waiting.close()
            operations.attach(image)
            with mounted(operations, job.options, job.spec.name):
                tune()
                await _answer(job, operations, image, signals)
            if job.options.record is not None:
                await _write_record(image, operations.opened, job.options.record)


@contextmanager
def mounted(operations: pyfuse3.Operations, options: Options, name: str) -> Iterator[None]:
    """Mount, and unmount at the end of the block.  Messages of libfuse and fusermount3 become one
    line.  ``name``: the source's name, the default for fsname.  Raises MountError."""
    said = os.memfd_create("libfuse-messages")
    sys.stderr.flush()
    stderr = os.dup(2)
    os.dup2(said, 2)
    try:
        pyfuse3.init(operations, options.mountpoint, _words(options, name))
    except RuntimeError:
        text = os.pread(said, 4096, 0).decode("utf-8", "replace")
        raise MountError(f"{options.mountpoint}: {explain(text, options.mountpoint)}") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(said)
    try:
        yield
    finally:
        pyfuse3.close()


def _words(options: Options, source: str) -> set[str]:
    """The mount options for libfuse, escaped for its parser, ASCII only."""
    name, subtype, words = mount_words(options)
    named = [f"fsname={name or source}", f"subtype={subtype}"]
    return {_escape(word) for word in ("ro", *named, *words)}


def _escape(word: str) -> str:
    """libfuse splits at commas and reads backslash escapes; pyfuse3 passes ASCII only."""
    return "".join(
        chr(b) if 0x20 <= b < 0x7F and b not in b",\\" else f"\\{b:03o}" for b in os.fsencode(word)
    )


def _keep_moving() -> None:
    """Interrupt a blocked read(2) with a no-op signal every NUDGE seconds.

    A request vanishes from the kernel's queue when its client is killed.  If that happens after
    /dev/fuse was reported readable, pyfuse3 blocks in read(2) until the next request, and the event
    loop with it; a signal interrupts that read."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, NUDGE, NUDGE)


async def _answer(
    job: Job, operations: Operations, image: AsyncImage, signals: AsyncIterator[int]
) -> None:
    """Answer requests until the mount has gone."""
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
    """Report success once INIT has been answered: then the mount is live, and the kernel has negotiated
    its read-ahead, which can be changed only afterwards.

    The mount itself is not looked at.  Were this process killed meanwhile, the thread that waits for an
    answer would keep /dev/fuse open, and wait for ever."""
    await operations.greeted.wait()  # this task goes on when pyfuse3 waits for the next request
    read_ahead(job.options.mountpoint)
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
    """Write down which files were opened.  Logs errors."""
    try:
        write_record(path, await paths_of(image, nids))
    except ErofsError as e:
        log.warning("%s: can't write the list of opened files: %s", path, e)

"""Open the image, mount it, serve it until it is unmounted or told to stop."""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import replace
from functools import partial

import pyfuse3
import trio

import pyerofs.aio
from pyerofs.aio import AsyncImage
from pyerofs.daemon import Report
from pyerofs.errors import CorruptImage, ErofsError, UnsupportedFeature
from pyerofs.prefetch import paths_of, prefetch_metadata, prefetch_paths
from pyerofs.progress import Download
from pyerofs.sources.spec import Access, SourceSpec
from pyerofs.status import publish
from pyerofs_fuse import eager
from pyerofs_fuse.operations import GRACE, Operations
from pyerofs_fuse.options import Options, fuse_words

log = logging.getLogger("pyerofs-fuse")

READ_AHEAD_KB = 1024
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class MountError(Exception):
    """The mount can't be made; the message is one line."""


async def serve(
    options: Options, spec: SourceSpec, access: Access, first: list[str], report: Report
) -> None:
    """Mount and serve.  Returns when the mount is gone.  Reports, and ends, on failure.

    ``first``: paths to be fetched before anything else, where the image is far away."""
    waiting = Download()
    try:
        # signals first: once there is a mount, none may end us without unmounting
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            access = replace(access, progress=waiting.show)
            async with pyerofs.aio.open(
                spec, cache_size=options.cache_size, access=access
            ) as image:
                waiting.close()
                operations = Operations(
                    image, shared=options.shared, record=options.record is not None
                )
                mount(operations, options, spec.name)
                try:
                    idle = eager.enable(lambda: operations.waiting > 0)
                    image.memory.alone = lambda: operations.waiting <= 1 and idle()
                    tune()
                    gc.collect()
                    background = partial(_background, image, options, spec, access, first)
                    gc.freeze()  # what start-up made stays; no need to look at it again and again
                    await _run(operations, signals, report, options.mountpoint, background)
                finally:
                    pyfuse3.close()
                if options.record is not None:
                    await write_record(image, operations.opened, options.record)
    except (CorruptImage, UnsupportedFeature) as e:
        report.failed(f"{spec.name}: {e}")
    except (ErofsError, MountError) as e:
        report.failed(str(e))


def mount(operations: Operations, options: Options, name: str) -> None:
    """Mount, and turn what libfuse and fusermount3 print into one line.  ``name``: of the source.
    Raises MountError."""
    said = os.memfd_create("libfuse-messages")
    sys.stderr.flush()
    stderr = os.dup(2)
    os.dup2(said, 2)
    try:
        pyfuse3.init(operations, options.mountpoint, set(fuse_words(options, name)))
    except RuntimeError:
        text = os.pread(said, 4096, 0).decode("utf-8", "replace")
        raise MountError(f"{options.mountpoint}: {_explain(text)}") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(said)


def _explain(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any("user_allow_other" in line for line in lines):
        return "allow_other needs the line user_allow_other in /etc/fuse.conf (or root)"
    return lines[0] if lines else "can't be mounted (libfuse gives no reason)"


def tune() -> None:
    """Fit the interpreter and the allocator to a daemon that hands out large buffers all the time."""
    sys.setswitchinterval(2e-4)  # a decoder that is done waits no longer than a request takes
    try:
        libc = ctypes.CDLL(None)
        # keep freed buffers instead of giving them back, which costs a page fault for each page
        libc.mallopt(M_TRIM_THRESHOLD, 256 << 20)
        libc.mallopt(M_MMAP_THRESHOLD, 64 << 20)
    except (OSError, AttributeError):
        pass  # another C library


def read_ahead(mountpoint: str) -> None:
    """Let the kernel read further ahead than its default of 128 KiB, where we may (as root)."""
    where = os.fsencode(mountpoint).decode("utf-8", "surrogateescape")
    try:
        with open("/proc/self/mountinfo", errors="surrogateescape") as f:
            rows = [line.split() for line in f]
        device = next(r[2] for r in reversed(rows) if _unescaped(r[4]) == where)
        with open(f"/sys/class/bdi/{device}/read_ahead_kb", "w") as f:
            f.write(str(READ_AHEAD_KB))
    except (OSError, StopIteration):
        pass


def _unescaped(text: str) -> str:
    """A path of mountinfo, which writes blanks and backslashes in octal."""
    for c in " \t\n\\":
        text = text.replace(f"\\{ord(c):03o}", c)
    return text


def check(options: Options) -> None:
    """Find, before anything is done, what libfuse would only fail at vaguely.  Raises MountError."""
    where = options.mountpoint
    try:
        mode = os.stat(where).st_mode
        os.statvfs(where)  # a dead mount may still answer stat, from the kernel's cache
    except OSError as e:
        hint = ""
        if e.errno == errno.ENOTCONN:
            hint = f" (a dead mount is in the way: fusermount3 -u {where})"
        raise MountError(f"{where}: {e.strerror}{hint}") from None
    if not stat.S_ISDIR(mode):
        raise MountError(f"{where}: not a directory")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        raise MountError(
            f"/dev/fuse: {e.strerror}; without it, try `pyerofs extract` or `pyerofs-nbd`"
        ) from None


async def _background(
    image: AsyncImage, options: Options, spec: SourceSpec, access: Access, first: list[str]
) -> None:
    """What goes on beside answering requests."""
    about = {"command": "pyerofs-fuse", "mountpoint": options.mountpoint, "source": spec.name}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish, about, image.status)
        if image.far:
            await prefetch_paths(image, first)
            if access.prefetch != "none":
                await prefetch_metadata(image)


async def write_record(image: AsyncImage, nids: Collection[int], path: str) -> None:
    """Write where the files are that were opened, in that order."""
    try:
        paths = await paths_of(image, nids)
        text = "".join(f"{p}\n" for p in paths if "\n" not in p)
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as f:  # noqa: ASYNC230
            f.write(text)
    except (OSError, ErofsError) as e:
        log.warning("%s: not written: %s", path, e)


async def _run(
    operations: Operations,
    signals: AsyncIterator[int],
    report: Report,
    mountpoint: str,
    background: Callable[[], Awaitable[None]],
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(background)
        nursery.start_soon(_stop_on, signals, operations, nursery.cancel_scope)
        nursery.start_soon(_announce, report, mountpoint)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()
    await operations.finish()


async def _announce(report: Report, mountpoint: str) -> None:
    """Report success once the mount has answered a request: from then on it is live, and the kernel
    has agreed on how far it reads ahead, so that this can be changed."""
    try:
        await trio.to_thread.run_sync(os.stat, mountpoint, abandon_on_cancel=True)
    except OSError as e:
        log.warning("%s: %s", mountpoint, e.strerror)
    read_ahead(mountpoint)
    report.ready()
    log.info("mounted")


async def _stop_on(
    signals: AsyncIterator[int], operations: Operations, scope: trio.CancelScope
) -> None:
    async for number in signals:
        log.info("stopping on signal %d", number)
        operations.stop()
        await operations.finish()
        pyfuse3.terminate()
        await trio.sleep(GRACE)
        scope.cancel()

"""A mount by the direct engine: open the image, mount, agree on the protocol, and keep servers."""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pyerofs.errors import CorruptImage, ErofsError, UnsupportedFeature
from pyerofs.format import tree
from pyerofs.image import Image
from pyerofs.image import open as open_image
from pyerofs.sources.open import is_near
from pyerofs.system import keeper
from pyerofs.system.daemon import STOPS, heeded
from pyerofs.system.fuse import mounting, wire
from pyerofs.system.fuse.mounting import HelperError, Mounted
from pyerofs.system.fuse.wire import Flag, Opcode
from pyerofs.system.status import StatusFile
from pyerofs_fuse.answers import Answers
from pyerofs_fuse.direct.assist import Bell
from pyerofs_fuse.direct.server import DirectServer, Session, run_threads
from pyerofs_fuse.mount import (
    Job,
    MountError,
    OpenFailed,
    check,
    explain,
    read_ahead,
    tune,
    write_record,
)
from pyerofs_fuse.options import Options, mount_words

MAX_SERVERS = 4  # of a near image: each costs memory; clients and the kernel need CPUs, too
FAR_THREADS = 8  # reads that may wait for the network at once
FAR_FAILURES = 60  # servers in a row that could not open the image: a minute of outage

log = logging.getLogger("pyerofs-fuse")


def run(job: Job) -> None:
    """Mount an image, and serve it until the mount has gone.  A failure is reported and ends the
    process."""
    try:
        check(job.options)
        if is_near(job.spec):
            _run_near(job)
        else:
            _run_far(job)
    except (CorruptImage, UnsupportedFeature) as e:
        job.report.failed(f"{job.spec.name}: {e}")
    except (ErofsError, MountError, OpenFailed) as e:
        job.report.failed(str(e))
    except keeper.ServersFailed as e:
        log.error("%s: %s", job.options.mountpoint, e)
        os._exit(1)  # which closes the connection: clients get ENOTCONN


def _run_near(job: Job) -> None:
    """An image on this machine is opened once; servers inherit it."""
    servers = min(len(os.sched_getaffinity(0)), MAX_SERVERS)
    image = open_image(job.spec, cache_size=job.options.cache_size // servers)
    live = Live(job)
    bell = Bell(live.fd, servers - 1) if servers > 1 else None
    answers = Answers(image.volume)
    tune()

    def serve(server: keeper.Server) -> None:
        live.leave()
        one = DirectServer(live.fd, answers, live.session, bell)
        one.run(server)
        live.record(answers, [one])

    with live.status(image) as write:

        def started() -> None:
            live.announce()
            write()

        keeper.Keeper(live.fd, serve, live.unmount, resend=live.resend, servers=servers).run(
            started
        )


def _run_far(job: Job) -> None:
    """An image behind a network is opened by each server, whose threads wait for it."""
    from pyerofs_fuse.direct.far import FarImage, prefetch, publish

    live = Live(job)
    far = FarImage(job.spec, job.access, job.options.cache_size)
    main = os.getpid()

    def serve(server: keeper.Server) -> None:
        image = far.open()
        live.leave()
        tune()
        publish(live.about, image, lambda: os.getppid() != main)
        prefetch(image, job.first)
        answers = Answers(image.volume)
        several = [DirectServer(live.fd, answers, live.session) for _ in server.slots]
        run_threads(server, several)
        live.record(answers, several)

    def started() -> None:
        far.wait()
        live.announce()

    try:
        keeper.Keeper(
            live.fd,
            serve,
            live.unmount,
            resend=live.resend,
            threads=FAR_THREADS,
            heirs=False,
            patience=job.access.timeout + keeper.STUCK_AFTER,
            failures=FAR_FAILURES,
        ).run(started)
    except (OpenFailed, KeyboardInterrupt):
        live.unmount()
        raise


class Live:
    """A mount for which INIT has been answered, and what its servers have to know."""

    def __init__(self, job: Job) -> None:
        """Mount.  Stop signals are blocked from here on, for the keeper to wait for.  Raises
        MountError."""
        options = job.options
        signal.pthread_sigmask(signal.SIG_BLOCK, heeded(*STOPS))
        self._options = options
        self._report = job.report
        self._mounted = _mount(options, job.spec.name)
        self.fd = self._mounted.fd
        init = greet(self.fd, _wanted(options))
        owner = os.getuid() if "allow_root" in options.fuse else None
        self.session = Session(init, owner, options.record is not None)
        self.resend = bool(init.flags & Flag.HAS_RESEND)
        self.about = {
            "command": "pyerofs-fuse",
            "mountpoint": options.mountpoint,
            "source": job.spec.name,
        }

    def leave(self) -> None:
        """Called in a server: give up what is the keeper's."""
        self._report.leave()
        if self._mounted.guard is not None:
            self._mounted.guard.close()

    def announce(self) -> None:
        """Report success."""
        read_ahead(self._mounted.where)
        self._report.ready()
        log.info("mounted")

    def record(self, answers: Answers, servers: Sequence[DirectServer]) -> None:
        """Called in a server at its end: write down which files were opened."""
        path = self._options.record
        if path is None:
            return
        nids = dict.fromkeys(nid for server in servers for nid in server.opened)
        try:
            write_record(path, tree.paths_of(answers.volume, nids))
        except ErofsError as e:
            log.warning("%s: can't write the list of opened files: %s", path, e)

    def unmount(self) -> None:
        """Detach the mount; logs a failure."""
        try:
            mounting.unmount(self._mounted)
        except (OSError, HelperError) as e:
            log.warning("%s: can't be unmounted: %s", self._mounted.where, e)

    @contextmanager
    def status(self, image: Image) -> Iterator[Callable[[], None]]:
        """The status file, which is optional; gives what writes it."""
        try:
            file = StatusFile(self.about)
        except OSError:
            yield lambda: None
            return
        sources = [{"name": source.name, "size": source.size} for source in image.sources]
        try:
            yield lambda: file.write(sources, protected=self.resend)
        finally:
            file.close()


def _mount(options: Options, source: str) -> Mounted:
    """Mount, without answering yet.  Raises MountError."""
    name, subtype, words = mount_words(options)
    words = ["allow_other" if word == "allow_root" else word for word in words]
    where = options.mountpoint
    try:
        return mounting.mount(where, name or source, subtype, words)
    except HelperError as e:
        raise MountError(f"{where}: {explain(str(e), where)}") from None
    except OSError as e:
        raise MountError(f"{where}: {explain(e.strerror or str(e), where)}") from None


def _wanted(options: Options) -> Flag:
    """Who lets others in has the kernel check ACLs."""
    return wire.WANTED | Flag.POSIX_ACL if options.shared else wire.WANTED


def greet(fd: int, wanted: Flag) -> wire.Init:
    """Answer the kernel's first request, INIT.  Raises MountError."""
    buffer = bytearray(wire.REQUEST_SIZE)
    while True:
        try:
            length = os.readv(fd, [buffer])
        except OSError as e:
            if e.errno == errno.ENODEV:
                raise MountError("the mount has gone before it was live") from None
            raise
        _, opcode, unique, *_ = wire.HEADER.unpack_from(buffer)
        if opcode != Opcode.INIT:
            os.write(fd, wire.REPLY.pack(wire.REPLY.size, -errno.EIO, unique))
            continue
        try:
            init = wire.parse_init(memoryview(buffer)[wire.HEADER.size : length])
            body = wire.init_reply(init, wanted)
        except wire.ProtocolError as e:
            raise MountError(str(e)) from None
        os.writev(fd, [wire.REPLY.pack(wire.REPLY.size + len(body), 0, unique), body])
        if init.major == wire.MAJOR:
            return init

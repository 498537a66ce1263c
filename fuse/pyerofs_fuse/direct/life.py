"""A mount by the direct engine: open the image, mount, agree on the protocol, and keep servers."""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from pyerofs import __version__
from pyerofs.errors import CorruptImage, ErofsError, UnsupportedFeature
from pyerofs.image import Image
from pyerofs.sources.local.file import FileSource
from pyerofs.sources.open import images_in, is_near, open_files
from pyerofs.sources.spec import Access, SourceSpec
from pyerofs.system import keeper
from pyerofs.system.daemon import STOPS, heeded, start_logging
from pyerofs.system.fuse import mounting, wire
from pyerofs.system.fuse.mounting import HelperError, Mounted
from pyerofs.system.fuse.wire import Flag, Init, Opcode
from pyerofs.system.keeper import Keeper, Predecessor, Server
from pyerofs_fuse.answers import Answers
from pyerofs_fuse.direct.assist import Bell
from pyerofs_fuse.direct.server import DirectServer, Session, run_threads
from pyerofs_fuse.mount import Job, MountError, OpenFailed, check, explain, read_ahead, tune
from pyerofs_fuse.options import Options, mount_words

if TYPE_CHECKING:
    from pyerofs.system.status import StatusFile
    from pyerofs_fuse.direct.far import FarImage
    from pyerofs_fuse.direct.handover import Handover
    from pyerofs_fuse.direct.record import Record

MAX_SERVERS = 4  # of a near image: each costs memory; clients and the kernel need CPUs, too
FAR_THREADS = 8  # reads that may wait for the network at once
FAR_FAILURES = 60  # servers in a row that could not open the image: a minute of outage

log = logging.getLogger("pyerofs-fuse")


def run(job: Job) -> None:
    """Mount an image, and serve it until the mount has gone.  A failure is reported and ends the
    process."""
    with _reporting(job):
        check(job.options)
        if is_near(job.spec):
            files = open_files(job.spec)
            image = Image(images_in(files, job.spec), _share(job.options))
            _keep_near(_begin(job), image, files)
        else:
            from pyerofs_fuse.direct.far import FarImage

            live = _begin(job)
            _keep_far(live, FarImage(job.spec, job.access, job.options.cache_size))


def resume(memory: int, program: list[str]) -> None:
    """Go on with a mount that the program which ran in this process before has handed over.
    ``memory``: the descriptor of what it has written.  A failure is logged and ends the process; the
    old servers go on then."""
    import socket

    from pyerofs_fuse.direct.handover import received

    found = received(memory)
    with suppress(OSError), open("/proc/self/comm", "w") as f:
        f.write("pyerofs-fuse")  # not the interpreter's name
    options = Options(**found.options)
    spec, access = SourceSpec.from_json(found.spec), Access(**found.access)
    job = Job(options, spec, access, found.first, Resumed(), program)
    start_logging("pyerofs-fuse", foreground=options.foreground, debug=options.debug)
    guard = None if found.guard is None else socket.socket(fileno=found.guard)
    mounted = Mounted(found.where, found.fuse, found.device, guard)
    major, minor, read_ahead, flags = found.init
    live = Live(job, mounted, Init(major, minor, read_ahead, Flag(flags)), found)
    predecessor = Predecessor(found.servers, found.poisoned)
    with _reporting(job):
        if found.images:
            names = [item.name for item in (spec, *spec.devices)]
            files = [FileSource(fd, name=n) for fd, n in zip(found.images, names, strict=True)]
            image = Image(images_in(files, spec), _share(options))
            _keep_near(live, image, files, predecessor)
        else:
            from pyerofs_fuse.direct.far import FarImage

            far = FarImage(spec, access, options.cache_size, found.known)
            _keep_far(live, far, predecessor)


class Resumed:
    """The Report of a program that goes on with a mount: no command waits for it."""

    def ready(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def failed(self, message: str) -> NoReturn:
        log.error("can't go on with the mount: %s", message)
        os._exit(1)


@contextmanager
def _reporting(job: Job) -> Iterator[None]:
    try:
        yield
    except (CorruptImage, UnsupportedFeature) as e:
        job.report.failed(f"{job.spec.name}: {e}")
    except (ErofsError, MountError, OpenFailed) as e:
        job.report.failed(str(e))
    except keeper.ServersFailed as e:
        log.error("%s: %s", job.options.mountpoint, e)
        os._exit(1)  # which closes the connection: clients get ENOTCONN


# images on this machine ---------------------------------------------------------------------


def _servers(options: Options) -> int:
    """How many processes serve a near image.  Only one can record what is opened."""
    return 1 if options.record else min(len(os.sched_getaffinity(0)), MAX_SERVERS)


def _share(options: Options) -> int:
    """The part of the cache that each of them gets."""
    return options.cache_size // _servers(options)


def _keep_near(
    live: Live, image: Image, files: Sequence[FileSource], predecessor: Predecessor | None = None
) -> None:
    """An image on this machine is opened once; servers inherit it, and its ``files``."""
    servers = _servers(live.options)
    bell = Bell(live.fd, servers - 1) if servers > 1 else None
    answers = Answers(image.volume)
    tune()

    def serve(server: Server) -> None:
        live.leave()
        DirectServer(live.fd, answers, live.session, bell).run(server)
        live.end(answers)

    def restart(left: Predecessor) -> None:
        live.restart(left, [file.descriptor for file in files])

    @contextmanager
    def keeping() -> Iterator[None]:
        sources = [{"name": s.name, "size": s.size} for s in image.sources]
        with live.published(sources):
            yield

    Keeper(
        live.fd,
        serve,
        live.unmount,
        resend=live.resend,
        servers=servers,
        keeping=keeping,
        execute=restart,
        predecessor=predecessor,
    ).run(live.announce)


# images behind a network --------------------------------------------------------------------


def _keep_far(live: Live, far: FarImage, predecessor: Predecessor | None = None) -> None:
    """An image behind a network is opened by each server, whose threads wait for it."""
    from pyerofs_fuse.direct.far import prefetch, publish

    main = os.getpid()

    def is_orphan() -> bool:
        return os.getppid() != main

    def restart(left: Predecessor) -> None:
        live.restart(left, [], far.known)

    def become_keeper(number: int, frame: object) -> None:
        """Called on RESTART in a server, which goes on without a keeper."""
        if is_orphan():
            for stop in STOPS:
                signal.signal(stop, signal.SIG_DFL)
            try:
                restart(Predecessor())
            except OSError as e:
                log.error("can't restart: %s", e)

    def facts() -> dict[str, int]:
        return {"protected": not is_orphan(), "keeper": os.getpid() if is_orphan() else main}

    def serve(server: Server) -> None:
        image = far.open()
        live.leave()
        tune()
        if live.resend:
            signal.signal(keeper.RESTART, become_keeper)
        publish(live.about, image, facts)
        prefetch(image, live.job.first)
        answers = Answers(image.volume)
        several = [DirectServer(live.fd, answers, live.session) for _ in server.slots]
        run_threads(server, several)
        live.end(answers)

    def started() -> None:
        far.wait()
        live.announce()

    try:
        Keeper(
            live.fd,
            serve,
            live.unmount,
            resend=live.resend,
            threads=FAR_THREADS,
            heirs=False,
            patience=live.job.access.timeout + keeper.STUCK_AFTER,
            failures=FAR_FAILURES,
            execute=restart,
            predecessor=predecessor,
        ).run(started)
    except (OpenFailed, KeyboardInterrupt):
        live.unmount()
        raise


# the mount ------------------------------------------------------------------------------------


class Live:
    """A mount for which INIT has been answered, and what its servers have to know."""

    def __init__(
        self, job: Job, mounted: Mounted, init: Init, before: Handover | None = None
    ) -> None:
        """``before``: what the program was that served the mount until now, if there was one."""
        self.job = job
        self.options = options = job.options
        self._mounted = mounted
        self.fd = mounted.fd
        owner = os.getuid() if "allow_root" in options.fuse else None
        self._record: Record | None = None
        if options.record is not None:
            from pyerofs_fuse.direct.record import Record

            self._record = Record(options.record, None if before is None else before.record)
        self.session = Session(init, owner, self._record)
        self.resend = bool(init.flags & Flag.HAS_RESEND)
        self._restarts = 0 if before is None else before.restarts
        self._since = int(time.time()) if before is None else before.since
        self._status: StatusFile | None = None
        self.about = {
            "command": "pyerofs-fuse",
            "version": __version__,
            "mountpoint": options.mountpoint,
            "source": job.spec.name,
            "since": self._since,
            "restarts": self._restarts,
        }

    def announce(self) -> None:
        """Report success."""
        read_ahead(self._mounted.where)
        self.job.report.ready()
        log.info("mounted")

    def leave(self) -> None:
        """Called in a server: give up what is the keeper's."""
        self.job.report.leave()
        if self._mounted.guard is not None:
            self._mounted.guard.close()
        if self._status is not None:
            self._status.leave()
            self._status = None

    def end(self, answers: Answers) -> None:
        """Called in a server when the mount has gone."""
        if self._record is not None:
            self._record.write(answers)

    def unmount(self) -> None:
        """Detach the mount; logs a failure."""
        try:
            mounting.unmount(self._mounted)
        except (OSError, HelperError) as e:
            log.warning("%s: can't be unmounted: %s", self._mounted.where, e)

    @contextmanager
    def published(self, sources: list[dict[str, object]]) -> Iterator[None]:
        """The status file of a keeper, which is optional."""
        from pyerofs.system.status import StatusFile  # late: the mount is live by now

        try:
            self._status = StatusFile(self.about)
        except OSError:
            yield
            return
        restartable = {"keeper": os.getpid()} if self.resend else {}
        self._status.write(sources, protected=self.resend, **restartable)
        try:
            yield
        finally:
            self._status.close()

    def restart(
        self, left: Predecessor, images: Sequence[int], known: dict[str, Any] | None = None
    ) -> None:
        """Execute the program anew, which goes on with the mount.  Raises OSError."""
        from pyerofs_fuse.direct.handover import Handover, execute, plain

        init, guard = self.session.init, self._mounted.guard
        handover = Handover(
            options=plain(self.options, without="source"),
            spec=self.job.spec.to_json(),
            access=plain(self.job.access, without="progress"),
            first=self.job.first,
            fuse=self.fd,
            guard=None if guard is None else guard.fileno(),
            images=[*images],
            record=None if self._record is None else self._record.fd,
            where=self._mounted.where,
            device=self._mounted.device,
            init=[*init],
            known=known,
            servers=[*left.servers],
            poisoned=[*left.poisoned],
            since=self._since,
            restarts=self._restarts + 1,
        )
        execute(self.job.program, handover, [self.job.spec.name, self.options.mountpoint])


def _begin(job: Job) -> Live:
    """Mount.  Stop signals are blocked from here on, for the keeper to wait for.  Raises MountError."""
    signal.pthread_sigmask(signal.SIG_BLOCK, heeded(*STOPS))
    mounted = _mount(job.options, job.spec.name)
    return Live(job, mounted, greet(mounted.fd, _wanted(job.options)))


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

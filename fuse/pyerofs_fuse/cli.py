"""``pyerofs-fuse``: parse, check, fork, mount.  Heavy imports come after the fork."""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING

from pyerofs.errors import SourceError, one_line
from pyerofs.sources.spec import Access, SourceSpec
from pyerofs.system.arguments import UsageError
from pyerofs.system.daemon import access_to
from pyerofs.system.streams import open_standard_streams
from pyerofs_fuse.options import RESUME, Options, parse, usage

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyerofs.system.daemon import Report
    from pyerofs_fuse.mount import Job

MAX_LIST = 16 << 20  # characters read of a list of paths


def run() -> None:
    """The command's entry point."""
    gc.disable()  # until the mount is live: what start-up makes stays, so collections find nothing
    open_standard_streams()
    sys.exit(main(sys.argv[1:]))


def main(words: list[str]) -> int:
    """Run the command; returns its exit status (in the daemon: when the mount is gone)."""
    if words and words[0].startswith(RESUME):
        from pyerofs_fuse.direct.life import resume

        resume(int(words[0].removeprefix(RESUME)), _program())
        return 0
    try:
        options = parse(words)
    except UsageError as e:
        print(f"pyerofs-fuse: {e} (--help shows how)", file=sys.stderr)
        return 1
    if options.show == "help":
        print(usage(), end="")
        return 0
    if options.show == "version":
        from pyerofs import __version__

        print(f"pyerofs-fuse {__version__}")
        return 0
    options.mountpoint = os.path.abspath(options.mountpoint)  # the daemon's working directory is /
    try:
        spec = options.spec
        access = access_to(options.source)
        first = _read_list(options.prefetch_list) if options.prefetch_list else []
    except SourceError as e:
        print(f"pyerofs-fuse: {one_line(str(e))}", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"pyerofs-fuse: {options.prefetch_list}: {e.strerror}", file=sys.stderr)
        return 1
    return _mount(options, spec, access, first)


def _program() -> list[str]:
    """The running program, to be executed again from any directory, with other arguments."""
    words = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    if words and words[-1] == sys.argv[0]:  # a script; neither -c nor -m
        words[-1] = os.path.abspath(words[-1])
    return [sys.executable, *words]


def _read_list(path: str) -> list[str]:
    """The paths in a file, one per line."""
    with open(path, encoding="utf-8", errors="surrogateescape") as f:
        return [line for line in f.read(MAX_LIST).splitlines() if line]


def _mount(options: Options, spec: SourceSpec, access: Access, first: list[str]) -> int:
    from pyerofs.system.daemon import Foreground, fork, start_logging
    from pyerofs_fuse.mount import Job

    program = _program()  # before the working directory changes
    report: Report = Foreground("pyerofs-fuse") if options.foreground else fork("pyerofs-fuse")
    job = Job(options, spec, access, first, report, program)
    start_logging("pyerofs-fuse", foreground=options.foreground, debug=options.debug)
    try:
        _engine(options, spec, report)(job)
    except KeyboardInterrupt:
        return 130
    return 0


def _engine(options: Options, spec: SourceSpec, report: Report) -> Callable[[Job], None]:
    """The engine that was asked for, or else suits the source."""
    name = options.engine
    if name is None:
        from pyerofs.sources.open import is_near

        name = "direct" if is_near(spec) or not _has_pyfuse3() else "pyfuse3"
    if name == "direct":
        from pyerofs_fuse.direct.life import run
    else:
        try:
            from pyerofs_fuse.pyfuse.life import run
        except ImportError as e:
            report.failed(f"{e}; is pyfuse3 installed?  (pip install 'pyerofs[fuse]')")
    return run


def _has_pyfuse3() -> bool:
    import importlib.util

    return importlib.util.find_spec("pyfuse3") is not None

"""``pyerofs-fuse``: parse, check, fork, mount.  Heavy imports come after the fork."""

from __future__ import annotations

import os
import sys

from pyerofs_fuse.daemon import open_standard_streams
from pyerofs_fuse.options import USAGE, Options, UsageError, parse


def run() -> None:
    """The command's entry point."""
    open_standard_streams()
    sys.exit(main(sys.argv[1:]))


def main(words: list[str]) -> int:
    """Run the command; returns its exit status (in the daemon: when the mount is gone)."""
    try:
        options = parse(words)
    except UsageError as e:
        print(f"pyerofs-fuse: {e} (--help shows how)", file=sys.stderr)
        return 1
    if options.show == "help":
        print(USAGE, end="")
        return 0
    if options.show == "version":
        from pyerofs import __version__

        print(f"pyerofs-fuse {__version__}")
        return 0
    # the daemon's working directory is /
    options.image = os.path.abspath(options.image)
    options.mountpoint = os.path.abspath(options.mountpoint)
    options.devices = [os.path.abspath(d) for d in options.devices]
    return _mount(options)


def _mount(options: Options) -> int:
    from pyerofs_fuse.daemon import Foreground, Report, fork, start_logging

    report: Report = Foreground() if options.foreground else fork()
    try:
        import trio

        from pyerofs_fuse import mount
    except ImportError as e:
        report.failed(f"{e}; is pyfuse3 installed? (it needs libfuse3-dev, pkg-config and gcc)")
    start_logging(foreground=options.foreground, debug=options.debug)
    try:
        mount.check(options)
        trio.run(mount.serve, options, report)
    except mount.MountError as e:
        report.failed(str(e))
    except KeyboardInterrupt:
        return 130
    return 0

"""A command that serves one file, for clients that start their server: ``python -m tests.nbd.runner
FILE`` takes sockets from LISTEN_FDS, otherwise stdin and stdout."""

from __future__ import annotations

import sys

import trio
from pyerofs_nbd.server import listen
from pyerofs_nbd.server.exports import Export, Server

from pyerofs.sources import FileSource
from pyerofs.sources.local.threaded import ThreadedSource


async def main() -> None:
    """Serve until killed, or until the only client is gone."""
    server = Server([Export("", ThreadedSource(FileSource(sys.argv[1])))])
    if listeners := listen.activated():
        await listen.serve(server, listeners)
    else:
        await listen.serve_stdio(server)


if __name__ == "__main__":
    trio.run(main)

"""What the command says on stderr.  Imports nothing heavy."""

from __future__ import annotations

import sys

from pyerofs.errors import one_line


class UsageError(Exception):
    """The command line makes no sense; the message says why."""


def complain(message: str) -> None:
    """Say what went wrong, on one line of stderr."""
    print(f"pyerofs: {one_line(message)}", file=sys.stderr)

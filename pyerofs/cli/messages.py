"""Error messages on stderr.  Imports nothing heavy."""

from __future__ import annotations

import sys

from pyerofs.errors import one_line


def complain(message: str) -> None:
    """Print an error message as one line on stderr."""
    print(f"pyerofs: {one_line(message)}", file=sys.stderr)

"""Make sure that the standard streams exist.  Imports nothing heavy."""

from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Open /dev/null as each of the descriptors 0 to 2 that is closed, so that no other file gets
    its number."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115

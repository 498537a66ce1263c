"""The standard streams, before anything else is opened.  Imports nothing heavy."""

from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Make sure that descriptors 0 to 2 are taken, so that no file of ours becomes one of them."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115

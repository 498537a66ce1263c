"""What holds for all tests."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Shells ignore SIGINT for what they start in the background, and nohup ignores SIGHUP.  What the
    tests start would inherit that, and rightly not end at these signals."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

"""Progress bars on stderr, for interactive use."""

from __future__ import annotations

import sys
import time


class Download:
    """The progress bar of a download for which opening an image waits."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._done = 0

    def show(self, what: str, done: int, total: int) -> None:
        """``what`` is at ``done`` of ``total`` bytes (0: unknown)."""
        if self._bar is None:
            self._bar = Progress(f"fetching {what}", total)
        self._bar.advance(done - self._done)
        self._done = done

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Progress:
    """A bar on stderr, only on a terminal, redrawn at most ten times a second."""

    def __init__(self, what: str, total: int, *, quiet: bool = False) -> None:
        self._what = what
        self._total = max(total, 1)
        self._done = 0
        self._next = 0.0
        self._shown = not quiet and sys.stderr.isatty()

    def advance(self, n: int = 1) -> None:
        self._done += n
        if not self._shown:
            return
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 0.1
            part = min(self._done / self._total, 1.0)
            bar = "#" * round(30 * part)
            sys.stderr.write(f"\r{self._what} [{bar:<30}] {part:4.0%} {self._done:,}")
            sys.stderr.flush()

    def close(self) -> None:
        """Erase the bar."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

"""Start a daemon, and tell the calling process whether it started.

``fork`` splits the process before any thread or event loop exists.  The child does the work and
reports through a pipe; the parent waits for that report and exits with it, so that the command
returns exactly when the mount is live, or says in one line why it is not.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from typing import TYPE_CHECKING, NoReturn, Protocol

from pyerofs.errors import one_line

if TYPE_CHECKING:
    from pyerofs.sources.spec import Access, SourceWords


class Report(Protocol):
    """Receives exactly one report: whether the daemon has started."""

    def ready(self) -> None:
        """Report success."""

    def failed(self, message: str) -> NoReturn:
        """Report a failure; ends the process."""

    def leave(self) -> None:
        """Give up reporting.  Called in a process that was forked from the reporting one."""


class Foreground:
    """The Report of a process that stays in the foreground: failures go to stderr."""

    def __init__(self, command: str) -> None:
        """``command``: the prefix of messages."""
        self._command = command

    def ready(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def failed(self, message: str) -> NoReturn:
        print(f"{self._command}: {one_line(message)}", file=sys.stderr)
        raise SystemExit(1)


class Background:
    """The Report of a forked child, sent through a pipe to its parent."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def ready(self) -> None:
        """Detach from the terminal and let the parent exit with 0."""
        _detach()
        os.write(self._fd, b"\0")
        self._close()

    def leave(self) -> None:
        if self._fd >= 0:  # else the forking process has reported already
            _detach()
            self._close()

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def failed(self, message: str) -> NoReturn:
        os.write(self._fd, one_line(message).encode("utf-8", "backslashreplace"))
        os._exit(1)


def _detach() -> None:
    """Redirect the standard streams to /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)


def fork(command: str) -> Background:
    """Continue in a child process, in a session of its own; never returns in the parent.

    The child closes inherited descriptors, which may hold locks or keep the reader of a pipe
    waiting: all except the standard ones and those that the command line names (/dev/fd/N)."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(write_end)
        _wait(read_end, child, command)
    os.close(read_end)
    _close_inherited(write_end)
    os.setsid()
    os.chdir("/")
    return Background(write_end)


def _close_inherited(keep: int) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != keep and not _named(fd):
            try:
                os.close(fd)
            except OSError:
                pass  # the descriptor of the listing itself


def _named(fd: int) -> bool:
    """Whether a command line argument contains the path of a descriptor."""
    path = re.compile(rf"(?:/dev|/proc/(?:self|{os.getpid()}|{os.getppid()}))/fd/{fd}\b")
    return any(path.search(word) for word in sys.argv)


def _wait(fd: int, child: int, command: str) -> NoReturn:
    message = b""
    while data := os.read(fd, 4096):
        message += data
    if message == b"\0":
        os._exit(0)
    if not message:
        _, status = os.waitpid(child, 0)
        message = f"the daemon ended unexpectedly (status {status:#x})".encode()
    print(f"{command}: {message.decode('utf-8', 'replace')}", file=sys.stderr, flush=True)
    os._exit(1)


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # signals that end a daemon


def heeded(*signals: signal.Signals) -> tuple[signal.Signals, ...]:
    """The given signals that are to end this process.  A signal that was ignored at start stays
    ignored, as nohup and shells expect of background processes; SIGTERM is never ignored."""
    return tuple(
        number
        for number in signals
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN
    )


def ask_password(question: str) -> str | None:
    """Ask for a password on the terminal; None if stdin is not a terminal.  Call before ``fork``."""
    if not sys.stdin.isatty():
        return None
    import getpass

    return getpass.getpass(question)


def access_to(words: SourceWords) -> Access:
    """``words.access`` for a command: asks on the terminal, and hides secrets from the process's
    command line and environment.  Raises SourceError."""
    access = words.access(ask_password)
    for secret in (words.password, words.environment):
        if secret:
            hide(secret)
    return access


def hide(secret: str) -> None:
    """Overwrite a secret in the command line and environment that this process exposes in /proc.
    Best effort: other processes may have read it before."""
    import ctypes

    try:
        with open("/proc/self/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()
        wanted = os.fsencode(secret)
        for first in (45, 47):  # arg_start and arg_end, env_start and env_end: proc(5)
            start, end = int(fields[first]), int(fields[first + 1])
            shown = ctypes.string_at(start, end - start)
            at = shown.find(wanted)
            while wanted and at >= 0:
                ctypes.memset(start + at, ord("x"), len(wanted))
                at = shown.find(wanted, at + len(wanted))
    except (OSError, ValueError, IndexError):
        pass


class OneLine(logging.Formatter):
    """Escapes log messages, so that no name in them reaches a terminal or journal unescaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)


def start_logging(
    command: str, *, foreground: bool, debug: int, log_file: str | None = None
) -> None:
    """Log to ``log_file``, else in the foreground to stderr, else to syslog (which the journal
    reads) if there is one.  Raises OSError if the file can't be opened."""
    level = logging.DEBUG if debug >= 3 else logging.INFO if debug else logging.WARNING
    handler: logging.Handler
    if log_file is not None:
        handler = logging.FileHandler(log_file)
        handler.setFormatter(OneLine(f"%(asctime)s {command}[%(process)d]: %(message)s"))
    elif foreground:
        handler = logging.StreamHandler()
        handler.setFormatter(OneLine(f"{command}: %(message)s"))
    else:
        handler = logging.NullHandler()
        if os.path.exists("/dev/log"):
            from logging.handlers import SysLogHandler

            try:
                handler = SysLogHandler("/dev/log", SysLogHandler.LOG_DAEMON)
                handler.setFormatter(OneLine(f"{command}[%(process)d]: %(message)s"))
            except OSError:
                pass  # a socket without a listener
    logging.basicConfig(level=level, handlers=[handler])
    for name in ("httpx", "httpcore"):  # they log whole URLs and headers: signatures, tokens
        logging.getLogger(name).setLevel(max(level, logging.WARNING))

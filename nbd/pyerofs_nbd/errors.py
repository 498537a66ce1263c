"""The exceptions whose messages are shown to the user."""

from __future__ import annotations


class NbdError(Exception):
    """An operation failed; the message is one line: what, where, what to do."""


def sole_cause(error: BaseException) -> BaseException:
    """Unwrap exception groups of one, in which a nursery raises a single failure."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error

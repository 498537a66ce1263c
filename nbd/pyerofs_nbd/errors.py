"""What a user is told when something can't be done."""

from __future__ import annotations


class NbdError(Exception):
    """Something can't be done; the message is one line: what, where, what to do."""


def sole_cause(error: BaseException) -> BaseException:
    """The exception within groups of one, which is how a nursery raises a single failure."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error

"""A bound on the bytes or requests in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio


class Budget:
    """A FIFO semaphore counted in bytes (or requests)."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.free = limit
        self._waiting: deque[tuple[int, trio.Event]] = deque()

    def take_now(self, amount: int) -> bool:
        """Take an amount if that needs no waiting; returns whether it was taken."""
        if self._waiting or amount > self.free:
            return False
        self.free -= amount
        return True

    async def take(
        self,
        amount: int,
        *,
        patience: float = float("inf"),
        complain: Callable[[], None] | None = None,
    ) -> None:
        """Take an amount of at most ``limit``.  ``complain`` is called after every ``patience``
        seconds of waiting.  A checkpoint only if it has to wait."""
        if self.take_now(amount):
            return
        entry = (amount, trio.Event())
        self._waiting.append(entry)
        try:
            while not entry[1].is_set():
                with trio.move_on_after(patience) as scope:
                    await entry[1].wait()
                if scope.cancelled_caught and complain is not None:
                    complain()
        except BaseException:
            if entry[1].is_set():
                self.give(amount)
            else:
                self._waiting.remove(entry)
                self.give(0)  # the next waiters may fit
            raise

    def give(self, amount: int) -> None:
        """Return an amount, and wake the waiters that fit then."""
        self.free += amount
        while self._waiting and self._waiting[0][0] <= self.free:
            wanted, granted = self._waiting.popleft()
            self.free -= wanted
            granted.set()

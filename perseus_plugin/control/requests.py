"""Clock requests that wait for their time: the newest wins, and nothing is switched twice or too often.
Pure."""

from __future__ import annotations

from typing import NamedTuple


class Request(NamedTuple):
    """One request.

    Attributes:
        seq: rising number; a later request has a higher one.
        frequency_mhz: the clock, None to give up the lock.
        requested_s: when it was sent.
        apply_at_s: when to apply it (in the past: at once).
    """

    seq: int
    frequency_mhz: int | None
    requested_s: float
    apply_at_s: float


class PendingRequests:
    """The requests that are still to be applied.

    A new request replaces those with a later or equal apply time: they were made knowing less. Of several
    that are due at once only the last is applied. A request for the clock that is set already is dropped.
    After a change a lower clock waits until `min_dwell_s` has passed; a higher one or a reset never waits.

    Args:
        min_dwell_s: shortest time between two changes.
    """

    def __init__(self, min_dwell_s: float = 0.0) -> None:
        self._min_dwell_s = min_dwell_s
        self._waiting: list[Request] = []
        self._set: int | None = None
        self._changed_s = float("-inf")

    def dwell(self, min_dwell_s: float) -> None:
        """This is the shortest time between two changes from now on."""
        self._min_dwell_s = min_dwell_s

    def push(self, request: Request) -> None:
        """Add a request."""
        while self._waiting and self._waiting[-1].apply_at_s >= request.apply_at_s:
            self._waiting.pop()
        self._waiting.append(request)

    def next_s(self) -> float | None:
        """When to call `take` next; None: not before another `push`."""
        if not self._waiting:
            return None
        first = self._waiting[0]
        return max(first.apply_at_s, self._changed_s + self._min_dwell_s) if self._lowers(first) else first.apply_at_s

    def take(self, now_s: float) -> Request | None:
        """The request to apply now, if there is one that changes the clock. The caller applies it and calls
        `set`."""
        due = [request for request in self._waiting if request.apply_at_s <= now_s]
        if not due:
            return None
        newest = due[-1]
        if self._lowers(newest) and now_s < self._changed_s + self._min_dwell_s:
            del self._waiting[: len(due) - 1]
            return None
        del self._waiting[: len(due)]
        return None if newest.frequency_mhz == self._set else newest

    def _lowers(self, request: Request) -> bool:
        mhz = request.frequency_mhz
        return mhz is not None and (self._set is None or mhz < self._set)

    def set(self, frequency_mhz: int | None, now_s: float) -> None:
        """The clock is now asked to be `frequency_mhz`."""
        self._set, self._changed_s = frequency_mhz, now_s

    @property
    def asked_mhz(self) -> int | None:
        """The clock that `set` was told last."""
        return self._set

    def clear(self) -> None:
        """Forget everything that waits."""
        self._waiting.clear()

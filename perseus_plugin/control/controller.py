"""What clock to ask for when: a plan, or one clock for a whole iteration, turned into requests on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class ClockRequests(Protocol):
    """Where requests go; returns at once and never raises (see `control.client.ClockHelper`)."""

    def request(self, frequency_mhz: int | None, apply_at_s: float = 0.0) -> None:
        """Ask for a clock, now or at a `time.monotonic()` time; None gives up the lock."""
        ...


class Controller:
    """Requests clocks at instruction boundaries.

    A drop is asked for when the slower instruction really begins, a rise so much before the running instruction's
    planned end that it has taken effect by then: both err on the side of speed.

    Args:
        requests: where requests go.
        rise_lead_s: how early a rise is asked for (the measured switch latency).
    """

    def __init__(self, requests: ClockRequests, rise_lead_s: float = 0.0) -> None:
        self._requests = requests
        self.rise_lead_s = rise_lead_s
        self._now: list[int | None] = []
        self._next: list[tuple[int | None, float] | None] = []

    def hold(self, frequency_mhz: int | None) -> None:
        """One clock from now on for everything; None: full clocks, no lock."""
        self._now, self._next = [], []
        self._requests.request(frequency_mhz)

    def follow(self, clocks_mhz: Sequence[int], times_s: Sequence[float]) -> None:
        """Follow a plan from the next iteration on, every iteration again.

        Args:
            clocks_mhz: one clock per controllable instruction of this stage, in program order.
            times_s: how long each of them takes at its clock.
        """
        self._now = list(clocks_mhz)
        # After the last instruction comes the end of the batch (gradient reduction, optimizer): full clock.
        following: list[int | None] = [*clocks_mhz[1:], None]
        self._next = [
            (after, max(0.0, time_s - self.rise_lead_s)) if after is None or after > now else None
            for now, after, time_s in zip(clocks_mhz, following, times_s, strict=True)
        ]

    def begin(self, position: int, now_s: float) -> None:
        """The instruction at `position` (among the controllable ones of this iteration) begins at `now_s`."""
        if position >= len(self._now):
            return
        self._requests.request(self._now[position])
        rise = self._next[position]
        if rise is not None:
            self._requests.request(rise[0], now_s + rise[1])

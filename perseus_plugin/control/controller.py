"""What clock to ask for when: a plan, or one clock for a whole iteration, turned into requests on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from perseus_plugin.control.lateness import Lateness

if TYPE_CHECKING:
    from perseus_plugin.exchange.messages import CatchUpPart


class ClockRequests(Protocol):
    """Where requests go; returns at once and never raises (see `control.client.ClockHelper`)."""

    def request(self, frequency_mhz: int | None, apply_at_s: float = 0.0) -> None:
        """Ask for a clock, now or at a `time.monotonic()` time; None gives up the lock."""
        ...


class Controller:
    """Requests clocks at instruction boundaries.

    A drop is asked for when the slower instruction really begins, a rise so much before the running instruction's
    planned end that it has taken effect by then: both err on the side of speed. An instruction that begins too late
    runs faster than planned, if the plan says what too late is.

    Args:
        requests: where requests go.
    """

    def __init__(self, requests: ClockRequests) -> None:
        self._requests = requests
        self._rise_lead_s = 0.0
        self._now: list[int | None] = []
        self._next: list[tuple[int | None, float] | None] = []
        self._lateness: Lateness | None = None

    def hold(self, frequency_mhz: int | None) -> None:
        """One clock from now on for everything; None: full clocks, no lock."""
        self._now, self._next, self._lateness = [], [], None
        self._requests.request(frequency_mhz)

    def follow(
        self,
        clocks_mhz: Sequence[int],
        times_s: Sequence[float],
        catch_up: CatchUpPart | None = None,
        *,
        rise_lead_s: float = 0.0,
    ) -> None:
        """Follow a plan from the next iteration on, every iteration again.

        Args:
            clocks_mhz: one clock per controllable instruction of this stage, in program order.
            times_s: how long each of them takes at its clock.
            catch_up: when an instruction is late; None: never.
            rise_lead_s: how early a rise is asked for (the measured switch latency).

        Raises:
            ValueError: these do not fit each other.
        """
        self._rise_lead_s = rise_lead_s
        self._now = list(clocks_mhz)
        # After the last instruction comes the end of the batch (gradient reduction, optimizer): full clock.
        following: list[int | None] = [*clocks_mhz[1:], None]
        self._next = [
            (after, max(0.0, time_s - self._rise_lead_s)) if after is None or after > now else None
            for now, after, time_s in zip(clocks_mhz, following, times_s, strict=True)
        ]

        self._lateness = None if catch_up is None else Lateness(catch_up, clocks_mhz, times_s)

    def start(self, begin_s: float) -> None:
        """An iteration has begun at `begin_s`, which latest starts count from."""
        if self._lateness is not None:
            self._lateness.start(begin_s)

    def begin(self, position: int, now_s: float) -> int | None:
        """The instruction at `position` (among the controllable ones of this iteration) begins at `now_s`.

        Returns:
            The clock that it runs at instead of the plan's, as it is late; None if it is not.
        """
        if position >= len(self._now):
            return None
        rise = self._next[position]
        faster = None if self._lateness is None else self._lateness.begin(position, now_s)
        if faster is None:
            self._requests.request(self._now[position])
            if rise is not None:
                self._requests.request(rise[0], now_s + rise[1])
            return None
        clock, time_s = faster
        self._requests.request(clock)
        if rise is not None and (rise[0] is None or rise[0] > clock):
            self._requests.request(rise[0], now_s + max(0.0, time_s - self._rise_lead_s))
        return clock

    def end(self, now_s: float) -> None:
        """The instruction that began last has ended at `now_s`."""
        if self._lateness is not None:
            self._lateness.end(now_s)

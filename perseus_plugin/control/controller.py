"""What clock to ask for when: a plan, or one clock for a whole iteration, turned into requests on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from perseus_plugin.control.graphed import GraphClocks
from perseus_plugin.control.lateness import Lateness
from perseus_plugin.control.waits import Waits

if TYPE_CHECKING:
    from perseus_plugin.exchange.messages import CatchUpPart, PhasesPart, WaitPart

_PLANS_KEPT = 8  # whose waits, or replays, are remembered: iterations alternate between a few plans


class ClockRequests(Protocol):
    """Where requests go; returns at once and never raises (see `control.client.ClockHelper`)."""

    def request(self, frequency_mhz: int | None, apply_at_s: float = 0.0) -> None:
        """Ask for a clock, now or at a `time.monotonic()` time; None gives up the lock."""
        ...


class Controller:
    """Requests clocks at instruction boundaries.

    A drop is asked for when the slower instruction really begins, a rise so much before the running instruction's
    planned end that it has taken effect by then: both err on the side of speed. An instruction that begins too late
    runs faster than planned, if the plan says what too late is. Waits that the plan names are spent at the clock that
    it gives them, see `waits`.

    Of a step that is one CUDA graph no instruction is seen: all of its clocks are asked for at its launch, each for its
    time, and what is left of them is taken back at its end; see `graphed`.

    Args:
        requests: where requests go.
    """

    def __init__(self, requests: ClockRequests) -> None:
        self._requests = requests
        self._rise_lead_s = 0.0
        self._now: list[int | None] = []
        self._next: list[tuple[int | None, float] | None] = []
        self._lateness: Lateness | None = None
        self._waits: Waits | None = None
        self._known: dict[tuple[tuple[int, ...], tuple[WaitPart, ...]], Waits] = {}
        self._graph: GraphClocks | None = None
        self._known_graphs: dict[PhasesPart, GraphClocks] = {}
        self._launched_s: float | None = None
        self._period_s: float | None = None
        self._replays = False
        self._position = -1
        self._raised = False
        self._early = 0

    def hold(self, frequency_mhz: int | None) -> None:
        """One clock from now on for everything; None: full clocks, no lock."""
        self._forget()
        self._requests.request(frequency_mhz)

    def _forget(self) -> None:
        self._now, self._next, self._lateness, self._waits = [], [], None, None
        self._graph, self._launched_s, self._replays = None, None, False

    def follow(
        self,
        clocks_mhz: Sequence[int],
        times_s: Sequence[float],
        catch_up: CatchUpPart | None = None,
        waits: Sequence[WaitPart] = (),
        *,
        rise_lead_s: float = 0.0,
    ) -> None:
        """Follow a plan from the next iteration on, every iteration again.

        Args:
            clocks_mhz: one clock per controllable instruction of this stage, in program order.
            times_s: how long each of them takes at its clock.
            catch_up: when an instruction is late; None: never.
            waits: those with a clock of their own.
            rise_lead_s: how early a rise is asked for (the measured switch latency; 0: unknown, and the clock is not
                lowered in waits).

        Raises:
            ValueError: these do not fit each other.
        """
        self._forget()
        self._rise_lead_s = rise_lead_s
        self._now = list(clocks_mhz)
        # After the last instruction comes the end of the batch (gradient reduction, optimizer): full clock.
        following: list[int | None] = [*clocks_mhz[1:], None]
        self._next = [
            (after, max(0.0, time_s - self._rise_lead_s)) if after is None or after > now else None
            for now, after, time_s in zip(clocks_mhz, following, times_s, strict=True)
        ]
        self._lateness = None if catch_up is None else Lateness(catch_up, clocks_mhz, times_s)
        self._waits = self._waits_of((tuple(clocks_mhz), tuple(waits))) if waits else None

    def follow_by_time(self, part: PhasesPart, *, lead_s: float) -> None:
        """Follow a plan in steps that are one CUDA graph, from the next `launched` on.

        Args:
            part: the plan.
            lead_s: how long a clock change takes.
        """
        self._forget()
        self._rise_lead_s = lead_s
        self._graph = self._known_graphs.pop(part, None) or GraphClocks(part)
        self._known_graphs[part] = self._graph
        while len(self._known_graphs) > _PLANS_KEPT:
            del self._known_graphs[next(iter(self._known_graphs))]

    def launched(self, now_s: float) -> None:
        """The GPU has got to the graph of a step at `now_s`."""
        if self._graph is None:
            return
        self._period_s = None if self._launched_s is None else now_s - self._launched_s
        self._launched_s, self._replays = now_s, True
        for clock, after_s in self._graph.requests(self._rise_lead_s):
            self._requests.request(clock, now_s + after_s if after_s > 0 else 0.0)

    def replayed(self, now_s: float) -> None:
        """The graph has ended at `now_s`: what was asked for and is not due yet would be the next step's."""
        if self._graph is not None and self._launched_s is not None and self._replays:
            self._replays = False
            self._requests.request(None)
            self._graph.saw(now_s - self._launched_s, self._period_s)

    def _waits_of(self, plan: tuple[tuple[int, ...], tuple[WaitPart, ...]]) -> Waits:
        """What is known of a plan's waits outlives iterations under others in between."""
        waits = self._known.pop(plan, None) or Waits(plan[1])
        self._known[plan] = waits
        while len(self._known) > _PLANS_KEPT:
            del self._known[next(iter(self._known))]
        return waits

    def start(self, begin_s: float) -> int | None:
        """An iteration has begun at `begin_s`, which latest starts count from.

        Returns:
            See `end`.
        """
        if self._lateness is not None:
            self._lateness.start(begin_s)
        self._position, self._raised, self._early = -1, False, 0
        return self._wait(begin_s)

    def begin(self, position: int, now_s: float) -> int | None:
        """The instruction at `position` (among the controllable ones of this iteration) begins at `now_s`.

        Returns:
            The clock that it runs at instead of the plan's, as it is late; None if it is not.
        """
        if position >= len(self._now):
            return None
        rise = self._next[position]
        self._position, self._raised = position, False
        if self._waits is not None:
            self._early += self._waits.end(now_s)
            if self._waits.lowers(position, self._rise_lead_s):
                rise = None  # it comes at the end of the wait
        faster = None if self._lateness is None else self._lateness.begin(position, now_s)
        if faster is None:
            self._requests.request(self._now[position])
            if rise is not None:
                self._requests.request(rise[0], now_s + rise[1])
            return None
        self._raised = True  # and waits for less long than usual, if at all
        rise = self._next[position]
        clock, time_s = faster
        self._requests.request(clock)
        if rise is not None and (rise[0] is None or rise[0] > clock):
            self._requests.request(rise[0], now_s + max(0.0, time_s - self._rise_lead_s))
        return clock

    def end(self, now_s: float) -> int | None:
        """The instruction that began last has ended at `now_s`.

        Returns:
            The clock at which the wait that follows is spent, if that is one of its own.
        """
        if self._lateness is not None:
            self._lateness.end(now_s)
        return self._wait(now_s)

    def finish(self, now_s: float) -> int:
        """The iteration has ended at `now_s`.

        Returns:
            How many of its waits ended before the clock was back.
        """
        if self._replays:  # its end was not seen
            self._replays = False
            self._requests.request(None)
        if self._waits is not None and self._waits.end(now_s):
            self._early += 1
            self._requests.request(None)  # else what comes between iterations ran at the wait's clock
        return self._early

    def _wait(self, now_s: float) -> int | None:
        if self._waits is None:
            return None
        lowering = self._waits.begin(self._position, now_s, self._rise_lead_s)
        if lowering is None or self._raised:
            return None
        self._waits.back_at(lowering.until_s + self._rise_lead_s)
        following: list[int | None] = [*self._now[self._position + 1 :], None]
        self._requests.request(lowering.frequency_mhz, lowering.from_s if lowering.from_s > now_s else 0.0)
        self._requests.request(following[0], lowering.until_s)
        return lowering.frequency_mhz

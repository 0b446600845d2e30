from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.control.controller import Controller
from perseus_plugin.control.requests import PendingRequests, Request

TOP_MHZ = 1410
LEAD_S = 0.005


class Noted:
    """Notes requests."""

    def __init__(self) -> None:
        self.made: list[tuple[int | None, float]] = []

    def request(self, frequency_mhz: int | None, apply_at_s: float = 0.0) -> None:
        self.made.append((frequency_mhz, apply_at_s))


class SimulatedGpu:
    """Applies requests as the helper does; each takes effect `latency_s` later. Time is what the caller says."""

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._pending = PendingRequests()
        self._numbers = itertools.count(1)
        self.now_s = 0.0
        self.effective: list[tuple[float, int]] = [(0.0, TOP_MHZ)]
        self.asked: list[tuple[float, int | None]] = []

    def request(self, frequency_mhz: int | None, apply_at_s: float = 0.0) -> None:
        self._pending.push(Request(next(self._numbers), frequency_mhz, self.now_s, apply_at_s))

    def run_until(self, now_s: float) -> None:
        """Let time pass; what is due is applied on the way."""
        while (due_s := self._pending.next_s()) is not None and max(due_s, self.now_s) <= now_s:
            self.now_s = max(due_s, self.now_s)
            taken = self._pending.take(self.now_s)
            if taken is not None:
                self._pending.set(taken.frequency_mhz, self.now_s)
                self.asked.append((self.now_s, taken.frequency_mhz))
                self.effective.append((self.now_s + self._latency_s, taken.frequency_mhz or TOP_MHZ))
        self.now_s = max(self.now_s, now_s)

    def lowest_mhz(self, start_s: float, end_s: float) -> int:
        """The lowest clock that was in effect in a stretch of time."""
        changes = [*self.effective, (float("inf"), TOP_MHZ)]
        return min(
            clock
            for (from_s, clock), (until_s, _) in itertools.pairwise(changes)
            if from_s < end_s - 1e-9 and until_s > start_s + 1e-9
        )


CLOCKS = st.lists(st.sampled_from([1410, 1290, 1005, 705]), min_size=1, max_size=12)


@st.composite
def iterations(draw: st.DrawFn) -> tuple[list[int], list[float], list[list[tuple[float, float]]]]:
    """A plan whose instructions take longer than the lead, and some iterations: (wait before, time) of each."""
    clocks = draw(CLOCKS)
    times_s = draw(st.lists(st.floats(LEAD_S, 0.1), min_size=len(clocks), max_size=len(clocks)))
    wait = st.floats(0, 0.05)
    late = st.floats(1, 1.5)  # an instruction may take longer than planned
    seen = draw(
        st.lists(st.lists(st.tuples(wait, late), min_size=len(clocks), max_size=len(clocks)), min_size=1, max_size=3)
    )
    return clocks, times_s, [[(w, t * f) for (w, f), t in zip(row, times_s, strict=True)] for row in seen]


@given(iterations())
def test_no_instruction_ever_runs_slower_than_planned(
    job: tuple[list[int], list[float], list[list[tuple[float, float]]]],
) -> None:
    clocks, times_s, seen = job
    gpu = SimulatedGpu(LEAD_S)
    controller = Controller(gpu)
    controller.follow(clocks, times_s, rise_lead_s=LEAD_S)
    spans: list[tuple[int, float, float, float]] = []
    for iteration in seen:
        for position, (wait_s, time_s) in enumerate(iteration):
            start_s = gpu.now_s + wait_s
            gpu.run_until(start_s)
            controller.begin(position, start_s)
            gpu.run_until(start_s + time_s)
            spans.append((clocks[position], start_s, start_s + times_s[position], start_s + time_s))
        end_s = gpu.now_s
        gpu.run_until(end_s + LEAD_S)
        assert gpu.effective[-1][1] == TOP_MHZ, "full clock after the last instruction"
        assert gpu.effective[-1][0] <= end_s + 1e-9
    for clock, start_s, _, end_s in spans:
        assert gpu.lowest_mhz(start_s, end_s) >= clock
    # And it saves what it can: nobody asks for another clock between the beginning of an instruction and `lead` before
    # its planned end.
    for asked_s, asked in gpu.asked:
        for clock, start_s, planned_end_s, _ in spans:
            if start_s + 1e-9 < asked_s < planned_end_s - LEAD_S - 1e-9:
                assert asked == clock


@given(iterations())
def test_long_instructions_run_at_their_clock_from_the_switch_latency_on(
    job: tuple[list[int], list[float], list[list[tuple[float, float]]]],
) -> None:
    clocks, times_s, _ = job
    gpu = SimulatedGpu(LEAD_S)
    controller = Controller(gpu)
    controller.follow(clocks, [time_s + 3 * LEAD_S for time_s in times_s], rise_lead_s=LEAD_S)
    for position, (clock, time_s) in enumerate(zip(clocks, times_s, strict=True)):
        start_s = gpu.now_s
        controller.begin(position, start_s)
        gpu.run_until(start_s + time_s + 3 * LEAD_S)
        assert gpu.lowest_mhz(start_s + LEAD_S, start_s + time_s + 2 * LEAD_S) == clock


def test_a_rise_is_asked_for_early_and_a_drop_at_the_start() -> None:
    noted = Noted()
    controller = Controller(noted)
    controller.follow([705, 1410, 1005], [1.0, 2.0, 4.0], rise_lead_s=0.25)
    assert noted.made == [], "the plan holds from the next iteration on"
    controller.begin(0, 10.0)
    assert noted.made == [(705, 0.0), (1410, 10.75)]
    controller.begin(1, 12.0)
    assert noted.made[2:] == [(1410, 0.0)], "the drop waits for the slower instruction"
    controller.begin(2, 14.0)
    assert noted.made[3:] == [(1005, 0.0), (None, 17.75)], "full clock after the last one"


def test_equal_clocks_need_no_request_ahead() -> None:
    noted = Noted()
    controller = Controller(noted)
    controller.follow([900, 900], [1.0, 1.0], rise_lead_s=0.1)
    controller.begin(0, 0.0)
    assert noted.made == [(900, 0.0)]


def test_a_rise_after_an_instruction_shorter_than_the_lead_is_asked_for_at_once() -> None:
    noted = Noted()
    controller = Controller(noted)
    controller.follow([705, 1410], [0.03, 1.0], rise_lead_s=0.1)
    controller.begin(0, 5.0)
    assert noted.made == [(705, 0.0), (1410, 5.0)]
    gpu = SimulatedGpu(0.1)
    controller = Controller(gpu)
    controller.follow([705, 1410], [0.03, 1.0], rise_lead_s=0.1)
    gpu.run_until(5.0)
    controller.begin(0, 5.0)
    gpu.run_until(6.0)
    assert gpu.lowest_mhz(0.0, 6.0) == TOP_MHZ, "a drop that is over before it takes effect"


@pytest.mark.parametrize("clock", [705, None])
def test_hold_asks_once_and_boundaries_ask_no_more(clock: int | None) -> None:
    noted = Noted()
    controller = Controller(noted)
    controller.follow([705, 1410], [1.0, 1.0], rise_lead_s=0.1)
    controller.hold(clock)
    controller.begin(0, 1.0)
    assert noted.made == [(clock, 0.0)]


def test_a_new_plan_replaces_the_old_one_and_the_new_lead_holds() -> None:
    noted = Noted()
    controller = Controller(noted)
    controller.follow([705, 1410], [1.0, 1.0], rise_lead_s=0.1)
    controller.follow([1005], [2.0], rise_lead_s=0.5)
    controller.begin(0, 0.0)
    controller.begin(1, 2.0)
    assert noted.made == [(1005, 0.0), (None, 1.5)]


def test_a_plan_with_a_time_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        Controller(Noted()).follow([705, 1410], [1.0])

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.control.controller import Controller
from perseus_plugin.control.requests import PendingRequests, Request
from perseus_plugin.exchange.messages import WaitPart

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


# Waits with a clock of their own.

WAIT_MHZ = 600


def part(after: int, **work_s: float) -> WaitPart:
    return WaitPart(after=after, frequency_mhz=WAIT_MHZ, duration_s=1.0, **work_s)


def run(
    gpu: SimulatedGpu,
    controller: Controller,
    waits_s: list[float],
    times_s: list[float],
) -> tuple[list[tuple[float, float]], int]:
    """One iteration, waits around its instructions; what each instruction spans, and how many waits ended early."""
    spans = []
    controller.start(gpu.now_s)
    for position, (wait_s, time_s) in enumerate(zip(waits_s[:-1], times_s, strict=True)):
        gpu.run_until(gpu.now_s + wait_s)
        controller.begin(position, gpu.now_s)
        spans.append((gpu.now_s, gpu.now_s + time_s))
        gpu.run_until(gpu.now_s + time_s)
        controller.end(gpu.now_s)
    gpu.run_until(gpu.now_s + waits_s[-1])
    return spans, controller.finish(gpu.now_s)


@given(
    st.lists(st.sampled_from([1410, 1005, 705]), min_size=1, max_size=5),
    st.data(),
)
def test_waits_at_a_lower_clock_slow_no_instruction_while_they_are_as_long_as_they_were(
    clocks: list[int], data: st.DataObject
) -> None:
    times_s = [0.03] * len(clocks)
    shortest_s = data.draw(st.lists(st.floats(0, 0.1), min_size=len(clocks) + 1, max_size=len(clocks) + 1))
    longer = st.lists(st.floats(0, 0.05), min_size=len(clocks) + 1, max_size=len(clocks) + 1)
    gpu = SimulatedGpu(LEAD_S)
    controller = Controller(gpu)
    parts = [part(after) for after in range(-1, len(clocks))]
    controller.follow(clocks, times_s, None, parts, rise_lead_s=LEAD_S)
    run(gpu, controller, shortest_s, times_s)
    for _ in range(data.draw(st.integers(1, 4))):
        waits_s = [a + b for a, b in zip(shortest_s, data.draw(longer), strict=True)]
        spans, early = run(gpu, controller, waits_s, times_s)
        assert early == 0
        for clock, (start_s, end_s) in zip(clocks, spans, strict=True):
            assert gpu.lowest_mhz(start_s, end_s) >= clock
        assert gpu.effective[-1][1] == TOP_MHZ, "full clock at the end of the iteration"


def test_a_wait_is_spent_at_its_clock_once_its_length_is_known() -> None:
    gpu = SimulatedGpu(LEAD_S)
    controller = Controller(gpu)
    controller.follow([1410, 1410], [0.03, 0.03], None, [part(0)], rise_lead_s=LEAD_S)
    for number in range(4):
        begin_s = gpu.now_s
        run(gpu, controller, [0.0, 0.06, 0.0], [0.03, 0.03])
        lowest_mhz = gpu.lowest_mhz(begin_s + 0.03 + LEAD_S, begin_s + 0.09 - LEAD_S)
        assert lowest_mhz == (TOP_MHZ if number < 2 else WAIT_MHZ), "the first iterations are watched"
    assert [clock for _, clock in gpu.asked] == [1410, None] * 2 + [1410, WAIT_MHZ, 1410, None] * 2


def test_a_wait_that_ends_early_costs_one_clock_change_and_is_counted_on() -> None:
    gpu = SimulatedGpu(LEAD_S)
    controller = Controller(gpu)
    controller.follow([1410, 1410], [0.03, 0.03], None, [part(0)], rise_lead_s=LEAD_S)
    for _ in range(3):
        _, early = run(gpu, controller, [0.0, 0.06, 0.0], [0.03, 0.03])
        assert early == 0
    spans, early = run(gpu, controller, [0.0, 0.03, 0.0], [0.03, 0.03])
    assert early == 1
    start_s, end_s = spans[1]
    assert gpu.lowest_mhz(start_s, start_s + LEAD_S) == WAIT_MHZ
    assert gpu.lowest_mhz(start_s + LEAD_S, end_s) == TOP_MHZ
    for _ in range(3):
        spans, early = run(gpu, controller, [0.0, 0.03, 0.0], [0.03, 0.03])
        assert early == 0, "the shortest of late is what it reckons with"
        assert gpu.lowest_mhz(*spans[1]) == TOP_MHZ


def test_work_around_a_wait_runs_at_the_clocks_of_before_and_after() -> None:
    gpu = SimulatedGpu(LEAD_S)
    controller = Controller(gpu)
    parts = [part(1, work_before_s=0.02, work_after_s=0.03)]
    controller.follow([1005, 1005], [0.03, 0.03], None, parts, rise_lead_s=LEAD_S)
    for _ in range(3):
        begin_s = gpu.now_s
        run(gpu, controller, [0.0, 0.0, 0.1], [0.03, 0.03])
    end_s = begin_s + 0.06
    assert gpu.lowest_mhz(end_s, end_s + 0.02) == 1005
    assert gpu.lowest_mhz(end_s + 0.02 + LEAD_S, end_s + 0.07 - LEAD_S) == WAIT_MHZ
    assert gpu.lowest_mhz(end_s + 0.07, end_s + 0.1) == TOP_MHZ


def test_without_a_known_latency_no_clock_is_lowered() -> None:
    gpu = SimulatedGpu(0.0)
    controller = Controller(gpu)
    controller.follow([1410], [0.03], None, [part(-1), part(0)])
    for _ in range(4):
        run(gpu, controller, [0.5, 0.5], [0.03])
    assert gpu.lowest_mhz(0.0, gpu.now_s) == TOP_MHZ


def test_what_is_known_of_waits_outlives_iterations_at_full_clocks() -> None:
    gpu = SimulatedGpu(LEAD_S)
    controller = Controller(gpu)
    follow = lambda: controller.follow([1410], [0.03], None, [part(-1)], rise_lead_s=LEAD_S)  # noqa: E731
    follow()
    for _ in range(2):
        run(gpu, controller, [0.1, 0.0], [0.03])
    controller.hold(None)
    run(gpu, controller, [0.1, 0.0], [0.03])
    assert WAIT_MHZ not in [clock for _, clock in gpu.asked]
    follow()
    run(gpu, controller, [0.1, 0.0], [0.03])
    assert WAIT_MHZ in [clock for _, clock in gpu.asked]


def test_an_iteration_that_ends_before_its_last_wait_was_to_end_leaves_no_low_clock() -> None:
    gpu = SimulatedGpu(LEAD_S)
    controller = Controller(gpu)
    controller.follow([1005], [0.03], None, [part(0)], rise_lead_s=LEAD_S)
    for _ in range(3):
        _, early = run(gpu, controller, [0.0, 0.2], [0.03])
        assert early == 0
    _, early = run(gpu, controller, [0.0, 0.05], [0.03])
    assert early == 1
    ended_s = gpu.now_s
    gpu.run_until(ended_s + 1.0)
    assert gpu.lowest_mhz(ended_s + LEAD_S, ended_s + 1.0) == TOP_MHZ

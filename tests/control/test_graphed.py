from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.control.graphed import (
    MOST_REQUESTS,
    OF_LATE,
    Fit,
    GraphClocks,
    TimedRequest,
    requests_for,
)
from perseus_plugin.exchange.messages import PhasesPart

LEAD_S = 0.005
EXACT = Fit(0.0, 1.0, 0.0)
PART = PhasesPart(clocks_mhz=(1410, 810, 1200), starts_s=(0.0, 0.2, 0.5), end_s=0.8, iteration_s=1.0)


def in_force(requests: list[TimedRequest], time_s: float, latency_s: float = LEAD_S) -> float:
    """The clock that the GPU runs at, full clocks as infinity; before the first request takes effect they are full."""
    clock = float("inf")
    for request in requests:
        if request.after_s + latency_s <= time_s + 1e-12:
            clock = float("inf") if request.frequency_mhz is None else request.frequency_mhz
    return clock


def test_drops_come_when_they_are_due_rises_a_change_earlier_and_the_end_is_at_full_clocks() -> None:
    found = requests_for(PART.clocks_mhz, PART.starts_s, PART.end_s, EXACT, LEAD_S)
    assert found == [
        TimedRequest(1410, 0.0),
        TimedRequest(810, 0.2),
        TimedRequest(1200, pytest.approx(0.495)),
        TimedRequest(None, pytest.approx(0.795)),
    ]


def test_what_is_uncertain_runs_at_the_faster_clock() -> None:
    found = requests_for(PART.clocks_mhz, PART.starts_s, PART.end_s, Fit(0.1, 2.0, 0.1), LEAD_S)
    assert found == [
        TimedRequest(1410, 0.0),
        TimedRequest(810, pytest.approx((0.1 + 0.4) * 1.1)),
        TimedRequest(1200, pytest.approx((0.1 + 1.0) * 0.9 - LEAD_S)),
        TimedRequest(None, pytest.approx((0.1 + 1.6) * 0.9 - LEAD_S)),
    ]


def test_a_phase_that_is_shorter_than_what_is_known_of_it_is_left_out() -> None:
    found = requests_for((1410, 810, 1200), (0.0, 0.50, 0.51), 0.8, Fit(0.0, 1.0, 0.05), LEAD_S)
    assert [one.frequency_mhz for one in found] == [1410, 1200, None]


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[int], list[float], float]:
    clocks = draw(st.lists(st.sampled_from([1410, 1290, 1005, 705]), min_size=1, max_size=12))
    lengths = draw(st.lists(st.floats(0.0, 0.1), min_size=len(clocks), max_size=len(clocks)))
    ends = list(itertools.accumulate(lengths))
    return clocks, [0.0, *ends[:-1]], ends[-1]


FITS = st.builds(Fit, st.floats(0, 0.2), st.floats(0.5, 2), st.floats(0, 0.3))


@given(plans(), FITS, st.floats(0, 1), st.floats(-1, 1))
def test_within_what_is_known_no_phase_runs_slower_than_planned(
    plan: tuple[list[int], list[float], float], fit: Fit, share: float, off: float
) -> None:
    """Wherever a phase really lies, as long as it is within the spread."""
    clocks, starts_s, end_s = plan
    found = requests_for(clocks, starts_s, end_s, fit, LEAD_S)
    assert [one.after_s for one in found] == sorted(one.after_s for one in found)
    assert found[-1].frequency_mhz is None
    for clock, start_s, finish_s in zip(clocks, starts_s, [*starts_s[1:], end_s], strict=True):
        planned_s = start_s + share * (finish_s - start_s)
        real_s = (fit.begin_s + fit.pace * planned_s) * (1 + off * fit.spread)
        assert in_force(found, real_s) >= clock


@given(plans(), FITS, st.floats(0, 0.3), st.floats(0, 1))
def test_knowing_less_is_never_slower(
    plan: tuple[list[int], list[float], float], fit: Fit, more: float, share: float
) -> None:
    wider = fit._replace(spread=fit.spread + more)
    at_s = share * (fit.begin_s + fit.pace * plan[2])
    assert in_force(requests_for(*plan, wider, LEAD_S), at_s) >= in_force(requests_for(*plan, fit, LEAD_S), at_s)


def fitted(*took_s: float, periods_s: tuple[float, ...] = ()) -> Fit:
    clocks = GraphClocks(PART)
    for number, one in enumerate(took_s):
        clocks.saw(one, periods_s[number] if periods_s else None)
    return clocks.fit


def test_until_some_replays_were_seen_the_plans_times_are_taken_with_room() -> None:
    first = GraphClocks(PART).fit
    assert (first.begin_s, first.pace) == (0.0, 1.0)
    assert fitted(1.2, 1.2) == first
    assert first.spread > fitted(0.8, 0.8, 0.8).spread


def test_a_plans_times_are_stretched_to_what_replays_take() -> None:
    assert fitted(1.0, 1.0, 1.0).pace == pytest.approx(1.25)
    assert fitted(1.0, 1.1, 1.0).spread == pytest.approx(0.1), "and may be off by as much as they were"


def test_one_replay_that_took_long_is_forgotten_after_a_while() -> None:
    assert fitted(4.0, *[0.8] * OF_LATE) == fitted(*[0.8] * OF_LATE)


def test_a_stage_that_waits_within_its_replay_for_the_one_before_begins_later() -> None:
    """Without anything at a step's end to wait for, the next one is launched where the last instruction ends."""
    waits = fitted(1.0, 1.0, 1.0, periods_s=(1.0, 1.0, 1.0))
    assert (waits.begin_s, waits.pace) == (pytest.approx(0.2), 1.0)
    together = fitted(0.8, 0.8, 0.8, periods_s=(1.0, 1.0, 1.0))
    assert (together.begin_s, together.pace) == (0.0, pytest.approx(1.0))
    # What comes between two steps and is not in the plan is no waiting.
    assert fitted(0.8, 0.8, 0.8, periods_s=(1.1, 1.1, 1.1)) == together


def test_there_are_never_more_requests_than_fit_into_a_pipe() -> None:
    count = 3 * MOST_REQUESTS
    part = PhasesPart(
        clocks_mhz=tuple((1410, 810)[at % 2] for at in range(count)),
        starts_s=tuple(0.01 * at for at in range(count)),
        end_s=0.01 * count,
        iteration_s=0.01 * count,
    )
    clocks = GraphClocks(part)
    for _ in range(3):
        clocks.saw(part.end_s)
    found = clocks.requests(0.0)
    assert 1 < len(found) <= MOST_REQUESTS
    assert found[-1].frequency_mhz is None

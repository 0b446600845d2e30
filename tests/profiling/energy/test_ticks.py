import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_plugin.profiling.energy.ticks import durations_s, tick_times, timeline
from perseus_plugin.profiling.observations import Activity, ClockRun


def polled(times: np.ndarray, poll_s: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Intervals in which a poller sees the ticks."""
    rng = np.random.default_rng(seed)
    polls = times[0] - 3 * poll_s + np.cumsum(poll_s * rng.uniform(0.5, 1.5, int(3 * np.ptp(times) / poll_s) + 50))
    after = np.searchsorted(polls, times, side="left")
    return polls[after - 1], polls[after]


@settings(max_examples=30, deadline=None)
@given(
    period=st.sampled_from([0.02, 0.1]),
    phase=st.floats(0, 0.1),
    poll=st.floats(0.001, 0.008),
    seed=st.integers(0, 1000),
)
def test_a_regular_grid_is_found_to_a_fraction_of_the_poll_interval(
    period: float, phase: float, poll: float, seed: int
) -> None:
    times = 1000 + phase + period * np.arange(100)
    before, seen = polled(times, poll, seed)
    found, use, blur = tick_times(before, seen)
    assert use.all()
    assert blur == 0
    assert np.abs(found - times).max() < 0.25 * poll
    assert ((found >= before) & (found <= seen)).all()


def test_irregular_ticks_stay_in_their_intervals() -> None:
    rng = np.random.default_rng(1)
    times = np.cumsum(rng.uniform(0.01, 0.03, 200))
    before, seen = polled(times, 0.002, 2)
    found, use, blur = tick_times(before, seen)
    assert use.mean() > 0.9
    assert blur == pytest.approx(0.002, rel=0.3)
    assert (np.abs(found - times) <= (seen - before) / 2 + 1e-12).all()


def test_timeline_gives_every_moment_to_one_kind() -> None:
    activities = (
        Activity("backward", 1.5, 3.0),  # overlaps the forward: begins when that ends
        Activity("forward", 0.5, 2.0),
        Activity("forward", 4.0, 9.0),  # outlasts the run
        Activity("forward", 6.0, 5.5),  # ends before it begins
        Activity("evaluate", 3.2, 3.4),  # not asked for: waiting
    )
    line = timeline(ClockRun(900, 0.0, 5.0, activities, ()), ["backward", "forward"])
    table = line.seconds(np.array([0.0, 0.5, 2.0, 2.5, 5.0]))
    assert table[:, :3].tolist() == [
        [0.0, 0.0, 0.0],
        [0.5, 0.0, 0.0],
        [0.5, 0.0, 1.5],
        [0.5, 0.5, 1.5],
        [1.5, 1.0, 2.5],
    ]
    # The ramps: nothing outside executions and at their ends, the most negative in the middle.
    assert table[:, 3].tolist() == [0.0, 0.0, 0.0, -0.25, 0.0]
    assert line.seconds(np.array([0.5, 1.25, 2.0]))[:, 4].tolist() == [0.0, -0.375, 0.0]


def test_durations_skip_nonsense() -> None:
    activities = [Activity("a", 0, 1), Activity("a", 1, 1), Activity("a", 3, 2), Activity("a", 0, float("nan"))]
    assert durations_s(activities, "a").tolist() == [1.0]

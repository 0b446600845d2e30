from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_plugin.profiling.observations import Activity, ClockRun, StepMean
from perseus_plugin.profiling.step_sizes import Durations, averaged, fit_durations, step_means

from .varying import CLOCKS_MHZ, KINDS, SIZES, slowed, sweep

TOP = CLOCKS_MHZ[0]
SEEDS = range(8)


@cache
def fitted_on(name: str, seed: int, paired: bool) -> Durations:
    """Several tests look at the same jobs."""
    return fit_durations(sweep(SIZES[name], seed, paired=paired))


def ratios(fitted: Durations) -> list[tuple[float, float]]:
    """Of each instruction and lower clock: relative error of its time against the top's, and the stated one."""
    found = []
    for (stage, kind, clock), duration in fitted.at.items():
        if clock != TOP:
            ratio = duration.time_s / fitted.at[stage, kind, TOP].time_s
            found.append((ratio / slowed(kind, clock) - 1, duration.se_s / duration.time_s))
    return found


def over_seeds(name: str, *, paired: bool) -> tuple[float, float, float]:
    """Share within 1.96 stated errors, largest error, mean stated error."""
    found = [pair for seed in SEEDS for pair in ratios(fitted_on(name, seed, paired))]
    inside = [abs(error) <= 1.96 * stated for error, stated in found]
    return float(np.mean(inside)), max(abs(e) for e, _ in found), float(np.mean([s for _, s in found]))


@pytest.mark.parametrize("name", SIZES)
def test_in_paired_rounds_a_clock_is_compared_on_the_same_work(name: str) -> None:
    inside, largest, stated = over_seeds(name, paired=True)
    assert 0.91 <= inside <= 0.99
    assert largest < 0.01
    assert stated < 0.003


@pytest.mark.parametrize("name", SIZES)
def test_where_all_stages_run_at_one_clock_the_errors_say_what_sizes_hide(name: str) -> None:
    inside, largest, stated = over_seeds(name, paired=False)
    assert inside >= 0.92
    assert largest < 6 * stated
    if name in {"buckets", "log-normal"}:
        assert stated > 0.05  # 20 % over the root of five steps
    if name == "even":
        assert stated < 0.004


@pytest.mark.parametrize("name", ["buckets", "log-normal", "curriculum and buckets"])
@pytest.mark.parametrize("paired", [True, False])
def test_no_clock_looks_free_by_luck(name: str, paired: bool) -> None:
    """A slower clock is never found faster than the top by more than its errors allow."""
    for seed in SEEDS:
        fitted = fitted_on(name, seed, paired)
        for (stage, kind, clock), duration in fitted.at.items():
            if clock != TOP:
                assert duration.time_s + 4 * duration.se_s > fitted.at[stage, kind, TOP].time_s * slowed(kind, clock)


def test_stages_may_feel_the_size_of_a_step_differently() -> None:
    """Attention grows with the square of the length, other layers do not; noise hides little of that."""
    inside = []
    for seed in SEEDS:
        fitted = fit_durations(sweep(SIZES["buckets"], seed, paired=True, sensitivities=(0.9, 1.0, 1.1, 1.2)))
        found = ratios(fitted)
        inside += [abs(error) <= 1.96 * stated for error, stated in found]
        assert max(abs(error) for error, _ in found) < 0.03
    assert np.mean(inside) >= 0.85


def test_spread_between_steps_is_what_the_sizes_vary_by() -> None:
    sd = float(np.std([1.0, 1.3, 1.6])) / 1.3
    found = [fitted_on("buckets", seed, True).spread[0, "forward"] for seed in SEEDS]
    assert np.mean([spread.between for spread in found]) == pytest.approx(sd, rel=0.05)
    assert all(abs(spread.between - sd) < 4 * spread.between_se for spread in found)
    assert all(spread.within == pytest.approx(0.02) for spread in found)


def test_even_jobs_have_next_to_no_spread() -> None:
    spread = fitted_on("even", 0, False).spread[1, "backward"]
    assert spread.between == pytest.approx(0.004, rel=0.3)


def test_more_steps_make_the_comparison_better_as_their_number_grows() -> None:
    def stated(steps: int) -> float:
        fitted = fit_durations(sweep(SIZES["buckets"], 1, paired=True, steps_per_clock=steps))
        return float(np.mean([stated for _, stated in ratios(fitted)]))

    assert stated(12) == pytest.approx(stated(3) / 2, rel=0.2)


@settings(max_examples=30)
@given(st.floats(0.01, 100.0), st.integers(0, 5))
def test_a_scale_common_to_all_changes_no_comparison(factor: float, seed: int) -> None:
    plain = sweep(SIZES["buckets"], seed, paired=True, steps_per_clock=2, stages=2)
    scaled: Mapping[int, list[StepMean]] = {
        stage: [StepMean(m.step, m.frequency_mhz, m.kind, m.mean_s * factor, m.count, m.spread) for m in means]
        for stage, means in plain.items()
    }
    before, after = fit_durations(plain), fit_durations(scaled)
    for key, duration in before.at.items():
        assert after.at[key].time_s == pytest.approx(factor * duration.time_s, rel=1e-6)
        assert after.at[key].se_s == pytest.approx(factor * duration.se_s, rel=1e-4)


def test_a_hiccup_of_one_step_on_one_rank_is_not_the_clocks() -> None:
    seen = sweep(SIZES["even"], 3, paired=False)
    clock = CLOCKS_MHZ[4]
    at = next(i for i, mean in enumerate(seen[2]) if mean.frequency_mhz == clock)
    slow = seen[2][at]
    seen[2][at] = StepMean(slow.step, clock, slow.kind, 2 * slow.mean_s, slow.count, slow.spread)
    fitted = fit_durations(seen)
    ratio = fitted.at[2, slow.kind, clock].time_s / fitted.at[2, slow.kind, TOP].time_s
    assert ratio == pytest.approx(slowed(slow.kind, clock), rel=0.02)


def run_of(steps: list[list[float]], clock: int = 1410, first: int = 0) -> ClockRun:
    """Steps of forwards that last so long."""
    activities, ends, now_s = [], [], 0.0
    for number, durations in enumerate(steps):
        for duration_s in durations:
            activities.append(Activity("forward", now_s, now_s + duration_s))
            now_s += duration_s
        now_s += 0.01
        ends.append((first + number, now_s))
    return ClockRun(clock, 0.0, now_s, tuple(activities), (), steps=tuple(ends))


def test_means_are_taken_step_by_step() -> None:
    means = step_means([run_of([[1.0, 1.2], [2.0]], first=7)])
    assert [(m.step, m.frequency_mhz, m.kind, m.count) for m in means] == [
        (7, 1410, "forward", 2),
        (8, 1410, "forward", 1),
    ]
    assert [m.mean_s for m in means] == pytest.approx([1.1, 2.0])
    assert means[0].spread == pytest.approx(math.sqrt(0.02) / 1.1)
    assert math.isnan(means[1].spread)


def test_a_rare_execution_far_from_its_step_is_a_hiccup() -> None:
    rng = np.random.default_rng(0)
    steps = [list(0.01 * (1 + 0.01 * rng.standard_normal(10))) for _ in range(10)]
    steps[4][3] = 0.2
    means = step_means([run_of(steps)])
    assert [m.count for m in means] == [10] * 4 + [9] + [10] * 5
    assert max(m.mean_s for m in means) < 0.0105


def test_long_microbatches_that_come_again_and_again_are_the_jobs() -> None:
    """Most are alike to a percent, every tenth takes three times as long: none is dropped."""
    rng = np.random.default_rng(1)
    steps = [[*(0.01 * (1 + 0.01 * rng.standard_normal(9))), 0.03] for _ in range(10)]
    assert all(m.count == 10 for m in step_means([run_of([list(map(float, step)) for step in steps])]))


def test_ranks_in_lock_step_are_averaged() -> None:
    one, two = (StepMean(3, 1410, "forward", time_s, 8, 0.1) for time_s in (1.0, 1.2))
    other = StepMean(4, 1410, "forward", 2.0, 8, 0.1)
    joined = {mean.step: mean for mean in averaged([[one, other], [two]])}
    assert joined[3].mean_s == pytest.approx(1.1)
    assert joined[4] == other
    assert joined[3].spread == pytest.approx(0.1)


def test_nothing_gives_nothing() -> None:
    assert fit_durations({}) == fit_durations({0: []}) == Durations({}, {})


@given(
    st.lists(
        st.builds(
            StepMean,
            st.integers(0, 30),
            st.sampled_from([1410, 900]),
            st.sampled_from(list(KINDS)),
            st.floats(1e-6, 1e4),
            st.integers(1, 9),
            st.one_of(st.just(math.nan), st.floats(0, 3)),
        ),
        max_size=12,
    )
)
def test_whatever_was_seen_gives_figures(means: list[StepMean]) -> None:
    fitted = fit_durations({0: means})
    assert set(fitted.at) == {(0, m.kind, m.frequency_mhz) for m in means}
    for duration in fitted.at.values():
        assert 0 < duration.time_s < math.inf
        assert 0 < duration.se_s < math.inf

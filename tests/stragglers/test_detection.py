from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.exchange.messages import CatchUpPart, PlanPart
from perseus_plugin.iteration.instructions import Compute, Constant
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.stragglers.detection import OwnPast, StragglerDetector, iteration_slowdown
from tests.factories import record


def part(clocks: Sequence[int], times_s: Sequence[float], slowdown: float = 1.0) -> PlanPart:
    return PlanPart(version=1, schedule="1F1B", clocks_mhz=tuple(clocks), times_s=tuple(times_s), slowdown=slowdown)


def iteration(times_s: Sequence[float], gap_s: float = 0.0, constant_s: float = 0.005) -> IterationRecord:
    operations = [*(Compute("forward", m) for m in range(len(times_s))), Constant("step", collective=True)]
    return record(0, durations_s=[*times_s, constant_s], operations=operations, gap_s=gap_s)


def noisy(rng: random.Random, noise: float, slowdown: float = 1.0) -> Iterator[float]:
    while True:
        yield slowdown * rng.lognormvariate(0.0, noise)


# One iteration.


@given(st.floats(1.0, 10.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_only_computation_counts(slowdown: float, gap_s: float, constant_s: float) -> None:
    planned = [0.01, 0.02, 0.01, 0.02, 0.01]
    seen = iteration_slowdown(iteration([slowdown * t for t in planned], gap_s, constant_s), part([810] * 5, planned))
    assert seen == (pytest.approx(slowdown), True)


def test_planned_slow_clocks_and_unequal_stages_are_no_slowness() -> None:
    assert iteration_slowdown(iteration([0.5] * 4), part([810] * 4, [0.5] * 4)) == (pytest.approx(1.0), True)


def test_the_slowdown_that_was_planned_for_is_part_of_it() -> None:
    planned = part([1410] * 4, [0.0125] * 4, slowdown=1.25)
    assert iteration_slowdown(iteration([0.0125] * 4), planned) == (pytest.approx(1.25), True)
    assert iteration_slowdown(iteration([0.010] * 4), planned) == (pytest.approx(1.0), True)


def test_instructions_that_caught_up_are_held_against_the_clock_that_they_ran_at() -> None:
    catch_up = CatchUpPart(
        latest_starts_s=(0.0,) * 6,
        usual_delays_s=(0.0,) * 6,
        kinds=("forward",) * 6,
        options={"forward": ((1410, 0.010, 200.0), (810, 0.016, 100.0))},
        size_weight=0.0,
    )
    planned = part([810] * 6, [0.016] * 6).model_copy(update={"catch_up": catch_up})
    late = iteration([1.1 * t for t in (0.016, 0.016, 0.010, 0.010, 0.010, 0.010)])
    late.raised.extend((position, 1410) for position in (2, 3, 4, 5))
    assert iteration_slowdown(late, planned) == (pytest.approx(1.1), True)


def test_instructions_with_a_clock_change_are_left_out_where_others_remain() -> None:
    clocks = [810] * 4 + [1410] * 4
    times = [0.02] * 4 + [0.01] * 4
    seen = [0.02, 0.02, 0.02, 0.014, 0.008, 0.01, 0.01, 0.01]
    assert iteration_slowdown(iteration(seen), part(clocks, times)) == (pytest.approx(1.0), True)
    alternating = part([810, 1410] * 2, [0.02, 0.01] * 2)
    found = iteration_slowdown(iteration([0.018, 0.01] * 2), alternating)
    assert found == (pytest.approx(0.056 / 0.06), False)


def test_one_interrupted_instruction_makes_no_straggler() -> None:
    seen = [0.01] * 19 + [0.5]
    found = iteration_slowdown(iteration(seen), part([810] * 20, [0.01] * 20))
    assert found is not None
    assert found[0] < 1.03


def test_what_does_not_fit_says_nothing() -> None:
    assert iteration_slowdown(iteration([0.01] * 3), part([810] * 4, [0.01] * 4)) is None
    cut = iteration([0.01] * 4)
    del cut.ends_s[-1]
    assert iteration_slowdown(cut, part([810] * 4, [0.01] * 4)) is None
    assert iteration_slowdown(record(0, operations=[]), part([], [])) is None


# One rank over time.


@pytest.mark.parametrize("noise", [0.003, 0.01, 0.03])
def test_noise_alone_raises_no_alarm(noise: float) -> None:
    for seed in range(3):
        detector, trace = StragglerDetector(), noisy(random.Random(seed), noise)
        assert [level for _ in range(3000) if (level := detector.add(next(trace))) is not None] == []


def test_a_straggler_of_5_percent_is_found_within_10_iterations_at_1_percent_noise() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        detector, normal, slow = StragglerDetector(), noisy(rng, 0.01), noisy(rng, 0.01, 1.05)
        for _ in range(100):
            assert detector.add(next(normal)) is None
        found = [level for _ in range(10) if (level := detector.add(next(slow))) is not None]
        assert found, f"seed {seed}: not found"
        assert found[0] == pytest.approx(1.05, abs=0.02)


def test_a_large_slowdown_is_found_after_min_duration_and_taken_back_at_once() -> None:
    detector = StragglerDetector(min_duration=3)
    for _ in range(50):
        assert detector.add(1.0) is None
    assert [detector.add(1.25) for _ in range(3)] == [None, None, 1.25]
    assert [detector.add(1.25) for _ in range(20)] == [None] * 20
    assert detector.add(1.0) == 1.0
    assert detector.level == 1.0


def test_a_hiccup_shorter_than_min_duration_is_nothing() -> None:
    detector = StragglerDetector()
    told = []
    for number in range(500):
        told.append(detector.add(5.0 if number % 50 in (30, 31) else 1.0))
    assert told == [None] * 500


def test_a_slowdown_that_grows_is_told_again() -> None:
    detector = StragglerDetector()
    rng = random.Random(1)
    for slowdown in (1.0, 1.2, 1.5):
        trace = noisy(rng, 0.01, slowdown)
        for _ in range(40):
            detector.add(next(trace))
        assert detector.level == pytest.approx(slowdown, abs=0.02)
    trace = noisy(rng, 0.01, 1.2)
    for _ in range(40):
        detector.add(next(trace))
    assert detector.level == pytest.approx(1.2, abs=0.02), "and so is one that shrinks"


def test_at_the_threshold_the_level_does_not_flap() -> None:
    changes = 0
    trace = noisy(random.Random(2), 0.01, 1.03)
    detector = StragglerDetector(threshold=0.03)
    for _ in range(2000):
        changes += detector.add(next(trace)) is not None
    assert changes <= 20


@pytest.mark.parametrize("slowdown", [1.04, 1.1, 1.3])
@pytest.mark.parametrize("noise", [0.003, 0.01, 0.03])
def test_a_rank_that_was_slow_is_let_go(slowdown: float, noise: float) -> None:
    for seed in range(10):
        rng = random.Random(seed)
        detector = StragglerDetector()
        for level, count in ((1.0, 100), (slowdown, 100), (1.0, 60)):
            trace = noisy(rng, noise, level)
            for _ in range(count):
                detector.add(next(trace))
        assert detector.level == 1.0


@given(st.lists(st.floats(0.1, 50.0), max_size=200), st.integers(4, 20), st.integers(1, 30))
def test_any_trace_gives_levels_from_1(trace: list[float], window: int, min_duration: int) -> None:
    detector = StragglerDetector(window=window, min_duration=min_duration)
    for value in trace:
        level = detector.add(value)
        assert level is None or level == 1.0 or level > 1.03
        assert level is None or level <= max(trace)


# A plan's own past.


def test_what_clock_changes_take_off_is_corrected_plan_by_plan() -> None:
    past = OwnPast(window=4)
    assert [past.correct(0.9, 1) for _ in range(4)] == [None] * 4
    assert past.correct(0.9, 1) == pytest.approx(1.0)
    assert past.correct(0.99, 1) == pytest.approx(1.1)
    assert past.correct(0.95, 2) is None, "another plan has another past"


def test_a_rank_that_is_slow_from_the_start_does_not_become_the_norm() -> None:
    past = OwnPast(window=4)
    assert [past.correct(1.25, 1) for _ in range(6)] == [1.25] * 6
    halved = OwnPast(window=2)
    for _ in range(2):
        halved.correct(0.5, 1)
    assert halved.correct(0.8, 1) == pytest.approx(1.0), "no clock change takes half"

"""What is made of times, ticks and estimates, on data whose truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from perseus_plugin.cli.verification.arithmetic import (
    Steady,
    changes_s,
    extra_s,
    gaps_s,
    kind_of_work,
    pattern,
    spread,
    steady,
)
from perseus_plugin.control.wire import Tick
from perseus_plugin.profiling.estimator import estimate_stage
from tests.profiling import sensor

PERIOD_S = 0.1


def ticks(power_w: float, count: int, begin_s: float = 10.0, epoch: int = 0, capped: float = 0.0) -> list[Tick]:
    """A counter that moves every 100 ms, seen by polls 4 ms apart, of a GPU that draws the same all the time."""
    times = [begin_s + PERIOD_S * number for number in range(count)]
    return [
        Tick(at_s - 0.004, at_s, power_w * at_s, 1410 - 15 * (number % 2), capped * at_s, epoch)
        for number, at_s in enumerate(times)
    ]


def test_the_pattern_is_an_iteration_of_a_middle_stage() -> None:
    steps, after_s = pattern({"forward": 0.02, "backward": 0.04})
    assert [step.kind for step in steps[:4]] == ["forward", "forward", "forward", "backward"]
    assert sorted((step.kind, step.microbatch) for step in steps) == sorted(
        itertools.product(("forward", "backward"), range(6))
    )
    waits_s = [step.wait_s for step in steps]
    assert min(waits_s) >= 0
    assert after_s > 0
    assert sum(wait_s > 0 for wait_s in waits_s[4:-3]) >= 2, "it waits in the middle, too"


def test_power_is_what_the_counter_says_within_the_stretches_only() -> None:
    seen = [*ticks(500.0, 20), *ticks(100.0, 20, begin_s=12.5, capped=0.25)]
    first = steady(seen, [(9.0, 12.2)])
    assert first.power_w == pytest.approx(500.0)
    assert first.seconds == pytest.approx(1.9)
    assert 1395 <= first.clock_mhz <= 1410
    assert steady(seen, [(12.45, 20.0)]).capped == pytest.approx(0.25)
    both = steady(seen, [(9.0, 12.2), (12.45, 20.0)])
    assert both.power_w == pytest.approx(300.0)


def test_a_counter_that_began_anew_or_hardly_moved_says_nothing() -> None:
    anew = [*ticks(500.0, 5), *ticks(500.0, 5, begin_s=11.0, epoch=1)]
    assert math.isnan(steady(anew, [(9.0, 12.0)]).power_w)
    assert math.isnan(steady(ticks(500.0, 2), [(9.0, 12.0)]).power_w)
    assert gaps_s(anew) == pytest.approx([PERIOD_S] * 8)


def test_spreads_are_of_sizes() -> None:
    seen = spread([-0.001, 0.002, -0.003], 1e3)
    assert (seen.median, seen.highest, seen.samples) == (2.0, 3.0, 3)


def test_what_takes_turns_is_compared_in_pairs() -> None:
    rng = np.random.default_rng(1)
    slow_machine = rng.uniform(1.0, 2.0, 400)  # both of a pair feel it
    bare = slow_machine + 0.01 * rng.standard_normal(400)
    hooked = slow_machine + 0.1 + 0.01 * rng.standard_normal(400)
    extra, error = extra_s(list(bare), list(hooked))
    assert extra == pytest.approx(0.1, abs=4 * error)
    assert 0.0005 < error < 0.002


def test_changes_of_a_reading_are_found_between_repeats() -> None:
    readings = [(0.01 * number, float(number // 5)) for number in range(30)]
    assert changes_s(readings) == pytest.approx([0.05] * 4)
    assert changes_s([(0.0, 1.0), (1.0, 1.0)]) == []


def test_the_estimators_error_is_told_against_steady_runs() -> None:
    job = sensor.two_kinds(0.02, iterations=20)
    runs, truth = sensor.simulate(job, sensor.A100, 3, (1410,))
    estimate = estimate_stage(runs)
    for kind, work in job.work.items():
        alone = Steady(work.power_w, 1400.0, 0.0, 10.0)
        found = kind_of_work(
            kind, estimate, in_pattern=Steady(clock_mhz=1410.0), alone=alone, steady_time_s=truth.time_s[kind, 1410]
        )
        assert found.error_percent is not None
        assert abs(found.error_percent) < 5
        assert found.steady_clock_mhz == 1400.0
        off = kind_of_work(
            kind,
            estimate,
            in_pattern=Steady(),
            alone=Steady(2 * work.power_w),
            steady_time_s=truth.time_s[kind, 1410],
        )
        assert off.error_percent == pytest.approx(found.error_percent / 2 - 50, abs=1e-6)
        assert off.clock_mhz is None, "unknown is null in the file"

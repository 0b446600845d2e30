from __future__ import annotations

import math

import numpy as np
import pytest

from perseus_plugin.errors import ConfigError
from perseus_plugin.reporting.record.iterations import FULL, PLAN, PROFILING, STRAGGLER, WARM_UP, Sort, Stretch
from perseus_plugin.reporting.record.records import Series
from perseus_plugin.reporting.report.phrases import left_out
from perseus_plugin.reporting.report.worth import FullClocks, PerIteration, Rates, amount, project, so_far

KWH = 3.6e6
PER = PerIteration(full_j=1000.0, full_s=2.0, plan_j=800.0, plan_s=2.5, predicted=False)
FULL_OF = {"a": FullClocks(1000.0, 2.0)}


def run(*parts: tuple[str, int, float, float], schedules: str = "") -> Series:
    """(state, iterations, time, energy) one after another; a letter each names their schedules, "a" for all without."""
    stretches, first = [], 0
    for (state, count, time_s, energy_j), schedule in zip(parts, schedules or "a" * len(parts), strict=True):
        sort = Sort(state, schedule=schedule)
        stretches.append(Stretch(first, count, 0.0, time_s, time_s, energy_j, count, sort))
        first += count
    return Series(stretches, np.array([energy_j for *_, energy_j in parts]))


def test_a_kwh_of_gpus_is_worth_what_the_site_takes_for_it() -> None:
    worth = amount(KWH, Rates(price=0.25, intensity_g=400.0, pue=1.5))
    assert worth.site_kwh == pytest.approx(1.5)
    assert worth.money == pytest.approx(0.375)
    assert worth.carbon_kg == pytest.approx(0.6)


def test_without_a_price_there_is_no_money() -> None:
    assert amount(KWH, Rates()).money is None
    assert amount(KWH, Rates(price=0.0)).money == 0.0


def test_the_defaults_are_the_sourced_averages() -> None:
    worth = amount(KWH, Rates())
    assert worth.site_kwh == pytest.approx(1.54)
    assert worth.carbon_kg == pytest.approx(1.54 * 0.445)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"price": -0.1}, "--price: got -0.1"),
        ({"price": math.nan}, "--price: got nan"),
        ({"intensity_g": -1.0}, "--intensity: got -1.0"),
        ({"intensity_g": 1e6}, "--intensity"),
        ({"pue": 0.9}, "--pue: got 0.9"),
        ({"price": 0.1, "gpu_hour": -1.0}, "--price-gpu-hour: got -1.0"),
        ({"gpu_hour": 1.0}, "--price-gpu-hour: got 1.0; allowed: beside a --price"),
        ({"price": 0.0, "gpu_hour": 1.0}, "--price-gpu-hour"),
        ({"pue": math.inf}, "--pue"),
    ],
)
def test_rates_that_cannot_be_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rates(**values)  # type: ignore[arg-type]


def test_a_run_adds_up() -> None:
    told = so_far(run((WARM_UP, 2, 2.0, 900.0), (PROFILING, 10, 3.0, 950.0), (PLAN, 20, 2.5, 800.0)), FULL_OF)
    assert told.iterations == 32
    assert told.hours == pytest.approx((4 + 30 + 50) / 3600)
    assert told.used_j == pytest.approx(2 * 900 + 10 * 950 + 20 * 800)
    assert told.saved_j == pytest.approx(20 * 200)
    assert told.profiling_j == pytest.approx(-500)
    assert told.profiling_s == pytest.approx(10.0)


def test_iterations_without_a_figure_count_as_the_others_do() -> None:
    told = so_far(run((PLAN, 1, 2.5, math.nan), (PLAN, 3, 2.5, 800.0)), FULL_OF)
    assert told.used_j == pytest.approx(3200)
    assert told.saved_j == pytest.approx(800)


def test_what_is_not_known_is_not_told() -> None:
    told = so_far(run((FULL, 3, 2.0, math.nan)), FULL_OF)
    assert told.used_j is None
    assert told.saved_j == 0.0
    assert so_far(run((PLAN, 3, 2.0, 5.0)), {}).saved_j is None


def test_each_schedule_is_compared_with_its_own_full_clocks() -> None:
    ramped = run((PLAN, 100, 1.0, 1000.0), (PLAN, 100, 3.0, 3600.0), schedules="ab")
    both = {"a": FullClocks(1100.0, 1.0), "b": FullClocks(4200.0, 3.0)}
    assert so_far(ramped, both).saved_j == pytest.approx(70e3)
    assert so_far(ramped, both).left_out == 0
    told = so_far(ramped, {"a": both["a"]})
    assert told.saved_j == pytest.approx(10e3)
    assert told.left_out == 100
    assert left_out(told) == " (100 iterations left out: full clocks unknown for their schedule)"
    assert so_far(ramped, {"c": both["a"]}).saved_j is None


def test_profiling_is_compared_with_its_own_schedules_full_clocks() -> None:
    full = {"a": FullClocks(1000.0, 1.0), "b": FullClocks(4000.0, 3.0)}
    told = so_far(run((PROFILING, 2, 1.5, 900.0), (PROFILING, 3, 4.0, 4100.0), schedules="ab"), full)
    assert told.profiling_j == pytest.approx(2 * -100 + 3 * 100)
    assert told.profiling_s == pytest.approx(2 * 0.5 + 3 * 1.0)


def test_a_stragglers_pace_is_not_compared_with_healthy_full_clocks() -> None:
    told = so_far(run((PLAN, 10, 2.5, 800.0), (STRAGGLER, 10, 4.0, 1300.0)), FULL_OF)
    assert told.saved_j == pytest.approx(2000.0)
    assert told.used_j == pytest.approx(21000.0)


def test_a_projection_does_the_iterations_that_the_plan_does_in_that_time() -> None:
    made = project(PER, ranks=4, hours=25.0, gpus=8, rates=Rates(pue=1.0))
    iterations = 25 * 3600 / 2.5 * 2
    assert made.full.energy_j == pytest.approx(iterations * 1000)
    assert made.saved.energy_j == pytest.approx(iterations * 200)
    assert made.saved.site_kwh == pytest.approx(iterations * 200 / KWH)


def test_a_plan_that_takes_more_has_a_negative_saving() -> None:
    worse = PerIteration(1000.0, 2.0, 1100.0, 2.0, predicted=False)
    assert project(worse, 4, 1.0, 4, Rates()).saved.carbon_kg < 0


@pytest.mark.parametrize(("hours", "gpus", "message"), [(0.0, 4, "--hours: got 0.0"), (1.0, 0, "--gpus: got 0")])
def test_projections_to_nothing_are_refused(hours: float, gpus: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        project(PER, 4, hours, gpus, Rates())

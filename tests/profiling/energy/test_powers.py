from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from perseus_plugin.profiling.energy.powers import Powers, held_to_limit
from perseus_plugin.profiling.observations import Activity, ClockRun

CLOCKS = (810, 1410, 1980)
FITTED = Powers(
    instruction_w=np.array([[300.0, 320.0], [450.0, 470.0], [640.0, 660.0]]),
    instruction_se_w=np.ones((3, 2)),
    blocking_w=127.0,
    blocking_se_w=2.0,
    blocking_at_w=np.array([100.0, 107.0, 174.0]),
    blocking_at_se_w=np.array([1.0, 1.5, 8.0]),
    waited=True,
    window_s=0.1,
    lag_s=0.01,
)


def run(clock_mhz: int, *, at_limit: bool = False) -> ClockRun:
    """10 s, of which 4 s forward and 4 s backward."""
    work = (Activity("forward", 0.0, 4.0), Activity("backward", 5.0, 9.0))
    return ClockRun(clock_mhz, 0.0, 10.0, work, (), at_limit=at_limit)


def held(*limited: int, fitted: Powers = FITTED) -> Powers:
    runs = [run(clock, at_limit=clock in limited) for clock in CLOCKS]
    return held_to_limit(fitted, runs, CLOCKS, ("forward", "backward"))


def test_what_a_limit_takes_for_waiting_goes_back_to_the_work_of_the_same_iterations() -> None:
    made = held(1980)
    assert made.blocking_at_w.tolist() == [100.0, 107.0, 107.0]
    assert made.blocking_at_se_w.tolist() == [1.0, 1.5, 1.5]
    assert made.blocking_w == pytest.approx(np.mean([100.0, 107.0, 107.0]))
    for powers in (FITTED, made):
        whole_j = powers.instruction_w[2] @ [4.0, 4.0] + powers.blocking_at_w[2] * 2.0
        assert whole_j == pytest.approx(640.0 * 4 + 660.0 * 4 + 174.0 * 2)
    assert (made.instruction_w[:2] == FITTED.instruction_w[:2]).all()


@pytest.mark.parametrize("limited", [(), CLOCKS], ids=["nowhere", "everywhere"])
def test_without_a_limit_or_without_anything_to_compare_with_figures_stay(limited: tuple[int, ...]) -> None:
    assert held(*limited) is FITTED


def test_waiting_that_is_assumed_or_not_above_that_of_other_clocks_stays() -> None:
    assumed = replace(FITTED, waited=False)
    assert held(1980, fitted=assumed) is assumed
    low = replace(FITTED, blocking_at_w=np.array([100.0, 107.0, 105.0]))
    assert held(1980, fitted=low).blocking_at_w.tolist() == [100.0, 107.0, 105.0]

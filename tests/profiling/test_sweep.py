import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.profiling.observations import BLOCKING, InstructionEstimate, StageEstimate
from perseus_plugin.profiling.sweep import (
    choose_clocks,
    good_enough,
    is_pareto_candidate,
    sweep_order,
    worth_trying,
)
from perseus_plugin.profiling.waiting import WaitingPower

CLOCKS = (1410, 1300, 1200, 1100, 1000, 900, 800, 700)


def bowl(clocks: tuple[int, ...], lowest_mhz: int, error_j: float = 0.001) -> StageEstimate:
    """A stage whose effective energy is lowest at `lowest_mhz`."""
    rows = []
    for clock in clocks:
        time_s = 0.05 * 1410 / clock
        effective_j = 5.0 + 4.0 * ((clock - lowest_mhz) / 1000) ** 2
        rows.append(InstructionEstimate("forward", clock, time_s, 1e-6, effective_j + 90 * time_s, error_j, 80))
    return StageEstimate(tuple(rows), 90.0, 0.1, 0.1, 0.0, frozenset())


@given(
    supported=st.lists(st.integers(200, 2000), min_size=1, max_size=60),
    count=st.integers(1, 20),
)
def test_chosen_clocks_are_supported_and_spread(supported: list[int], count: int) -> None:
    chosen = choose_clocks(supported, count)
    assert set(chosen) <= set(supported)
    assert len(chosen) == len(set(chosen)) == min(count, len(set(supported)))
    assert list(chosen) == sorted(chosen, reverse=True)
    assert chosen[0] == max(supported)
    if len(chosen) > 1:
        assert chosen[-1] == min(supported)


def test_choosing_clocks_evenly_and_down_to_a_limit() -> None:
    assert choose_clocks(range(210, 1411, 15), 5, lowest_mhz=800) == (1410, 1260, 1110, 960, 810)
    with pytest.raises(ValueError, match="count: got 0"):
        choose_clocks((1410,), 0)
    with pytest.raises(ValueError, match="lowest_mhz: got 1500"):
        choose_clocks((1410,), 3, lowest_mhz=1500)


@given(count=st.integers(1, 12), seed=st.integers(0, 100), revisits=st.integers(0, 4))
def test_order_visits_all_and_the_top_first_and_last(count: int, seed: int, revisits: int) -> None:
    clocks = tuple(1410 - 60 * i for i in range(count))
    order = sweep_order(clocks, seed, revisits)
    assert set(order) == set(clocks)
    assert all(order.count(clock) == 1 for clock in clocks[1:])
    assert order[0] == 1410
    if revisits and count > revisits:
        assert order[-1] == 1410
        assert order.count(1410) == 1 + revisits
    assert all(a != b for a, b in pairwise(order))
    assert order == sweep_order(clocks, seed, revisits)


def test_order_depends_on_the_seed() -> None:
    assert len({sweep_order(CLOCKS, seed) for seed in range(20)}) > 10


def test_pareto_candidates() -> None:
    stage = bowl(CLOCKS, lowest_mhz=1000)
    candidates = [clock for clock in CLOCKS if is_pareto_candidate(stage, "forward", clock)]
    assert candidates == [1410, 1300, 1200, 1100, 1000]
    assert is_pareto_candidate(stage, "forward", 650)  # not measured: nothing speaks against it
    vague = bowl(CLOCKS, lowest_mhz=1000, error_j=1.0)
    assert all(is_pareto_candidate(vague, "forward", clock) for clock in CLOCKS)
    # The less waiting draws, the less there is to gain from going slower.
    assert not is_pareto_candidate(stage, "forward", 1000, waiting=WaitingPower.constant(10.0))


def test_the_highest_clock_may_be_dominated() -> None:
    stage = bowl(CLOCKS, lowest_mhz=1000)
    top, second, *rest = stage.instructions
    slower = replace(top, time_s=second.time_s * 1.01, energy_j=second.energy_j * 1.1)
    stage = replace(stage, instructions=(slower, second, *rest))
    assert not is_pareto_candidate(stage, "forward", 1410)
    assert 1350 in worth_trying([stage], (1350, 700))


def test_worth_trying_rules_out_below_a_dominated_clock() -> None:
    early = bowl((1410, 1000, 900), lowest_mhz=1000)
    assert worth_trying([early], (1300, 1100, 950, 900, 800)) == (1300, 1100, 950)
    other_stage_likes_it_low = bowl((1410, 1000, 900), lowest_mhz=700)
    assert worth_trying([early, other_stage_likes_it_low], (950, 800)) == (950, 800)
    assert worth_trying([], (950, 800)) == (950, 800)
    unresolved = replace(early, unresolved=frozenset({"forward"}))
    assert worth_trying([unresolved], (800,)) == (800,)
    unknown = replace(early, instructions=tuple(replace(r, energy_j=math.nan) for r in early.instructions))
    assert worth_trying([unknown], (800,)) == (800,)


def test_good_enough() -> None:
    stage = bowl((1410, 1000, 900), lowest_mhz=1000, error_j=0.05)
    assert good_enough([stage], 0.02)
    assert not good_enough([stage], 0.004)
    assert not good_enough([], 0.02)
    hardly_waits = replace(stage, unresolved=frozenset({BLOCKING}), blocking_power_se_w=80.0)
    assert good_enough([stage, hardly_waits], 0.02)
    assert not good_enough([hardly_waits], 0.02)
    # A clock that no plan will use need not be known well.
    top, middle, low = stage.instructions
    wasteful = replace(low, energy_j=low.energy_j * 2, energy_se_j=1.0)
    assert good_enough([replace(stage, instructions=(top, middle, wasteful))], 0.02)

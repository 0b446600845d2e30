"""Waiting power of every stage by clock, from stages that know it more or less well."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.profiling.observations import BLOCKING, InstructionEstimate, StageEstimate
from perseus_plugin.profiling.waiting_of_stages import waiting_by_clock, waiting_powers

CLOCKS = (1410, 1200, 900)


def stage(
    watts: tuple[float, ...] = (88.0, 74.0, 66.0),
    error_w: float | tuple[float, ...] = 1.0,
    *,
    gpu: str = "A",
    clocks: tuple[int, ...] = CLOCKS,
    waited: bool = True,
) -> StageEstimate:
    errors = error_w if isinstance(error_w, tuple) else (error_w,) * len(watts)
    return StageEstimate(
        tuple(InstructionEstimate("forward", clock, 0.1, 1e-4, 30.0, 0.1, 80) for clock in clocks),
        sum(watts) / len(watts),
        max(errors),
        0.1,
        0.01,
        frozenset() if waited else frozenset({BLOCKING}),
        blocking_by_clock=tuple(zip(clocks, watts, errors, strict=True)),
        gpu=gpu,
    )


def test_one_stage_keeps_what_it_measured() -> None:
    (found,) = waiting_by_clock([stage()])
    assert found == {
        1410: pytest.approx((88.0, 1.0)),
        1200: pytest.approx((74.0, 1.0)),
        900: pytest.approx((66.0, 1.0)),
    }


def test_stages_that_differ_by_no_more_than_their_errors_are_taken_for_alike() -> None:
    found = waiting_by_clock([stage((88.5, 74.5, 66.0)), stage((87.5, 73.5, 66.0))])
    assert found[0] == found[1]
    assert found[0][1410] == pytest.approx((88.0, math.sqrt(0.5)))


def test_stages_that_clearly_differ_keep_most_of_their_own() -> None:
    found = waiting_by_clock([stage((95.0, 81.0, 73.0), 0.2), stage((85.0, 71.0, 63.0), 0.2)])
    for of_stage, watts in zip(found, (95.0, 85.0), strict=True):
        assert of_stage[1410][0] == pytest.approx(watts, abs=0.1)
        assert of_stage[1410][1] == pytest.approx(0.2, rel=0.05)


def test_who_hardly_waits_takes_the_mean_of_gpus_of_its_name_and_says_how_unsure_that_is() -> None:
    stages = [stage((95.0, 81.0, 73.0), 0.2), stage((85.0, 71.0, 63.0), 0.2), stage((50.0,) * 3, 50.0, waited=False)]
    other = stage((60.0, 55.0, 50.0), gpu="B")
    lonely = stage((30.0,) * 3, 30.0, gpu="C", waited=False)
    found = waiting_by_clock([*stages, other, lonely])
    assert found[2][1410][0] == pytest.approx(90.0, abs=0.5)
    assert found[2][1410][1] > 5.0
    assert found[3][1410][0] == pytest.approx(60.0)
    assert 60.0 < found[4][1410][0] < 95.0  # nobody with a C waited


def test_nobody_waited() -> None:
    found = waiting_by_clock([stage((60.0,) * 3, 60.0, waited=False)])
    assert [watts for watts, _ in found[0].values()] == pytest.approx([60.0] * 3)
    nothing = stage((math.nan,) * 3, math.nan, waited=False)
    assert waiting_by_clock([nothing]) == [{}]
    assert math.isnan(waiting_powers([nothing])[0].at_w(1410))
    assert waiting_by_clock([]) == []


def test_a_clock_that_nobody_knows_lies_between_those_that_are_known() -> None:
    (found,) = waiting_by_clock([stage((88.0, 10.0, 67.0), (1.0, 9.0, 1.0))])
    assert found[1200] == pytest.approx((67.0 + 21.0 * 300 / 510, 1.0))
    other_clocks = stage((70.0, 66.0), clocks=(1000, 900))
    pair = waiting_by_clock([stage((88.0, 67.0), clocks=(1410, 900)), other_clocks])
    assert set(pair[0]) == {1410, 900}
    assert set(pair[1]) == {1000, 900}


def test_without_figures_by_clock_the_mean_holds_at_all() -> None:
    plain = StageEstimate(stage().instructions, 83.0, 1.0, 0.1, 0.01, frozenset())
    assert waiting_powers([plain])[0].is_constant
    assert waiting_powers([plain])[0].lowest_w == pytest.approx(83.0)


def test_figures_that_fall_by_chance_are_averaged() -> None:
    (found,) = waiting_by_clock([stage((70.0, 74.0, 66.0))])
    assert [found[clock][0] for clock in CLOCKS] == pytest.approx([72.0, 72.0, 66.0])


@given(
    st.lists(
        st.tuples(
            st.lists(st.floats(-20, 200), min_size=3, max_size=3),
            st.lists(st.floats(0, 100), min_size=3, max_size=3),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_found_is_finite_and_never_falls(rows: list[tuple[list[float], list[float], bool]]) -> None:
    stages = [stage(tuple(watts), tuple(errors), waited=waited) for watts, errors, waited in rows]
    for found in waiting_by_clock(stages):
        watts = [found[clock][0] for clock in sorted(found)]
        assert all(math.isfinite(w) and w > 0 for w in watts)
        assert all(b >= a - 1e-9 for a, b in pairwise(watts))
        assert all(error >= 0 for _, error in found.values())

"""Figures of other detectors: planned slow clocks and unequal stages are no stragglers, real ones are."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.planner import Target, make_plan
from perseus_plugin.stragglers.external import ExternalFigures, ExternalJudge, planned_work, slowed_by
from tests.factories import BLOCKING_W, profile

STAGES = 4
EVEN: Mapping[int, float] = dict.fromkeys(range(8), 1.0)


def figures(
    slow: Mapping[int, float] | None = None,
    planned: Mapping[int, float] = EVEN,
    *,
    uneven: bool = False,
    comparable: bool = False,
    noise: random.Random | None = None,
) -> ExternalFigures:
    """What a detector sees that knows nothing of the plan; rank r is in stage r % 4."""
    times = {}
    for rank, factor in planned.items():
        of_stage = 1 + 0.5 * (rank % STAGES) if uneven else 1.0
        times[rank] = of_stage * factor * (slow or {}).get(rank, 1.0) * (1 + (noise.gauss(0, 0.003) if noise else 0))
    return ExternalFigures("other", times, comparable=comparable)


def levels(judge: ExternalJudge, told: ExternalFigures, planned: Mapping[int, float] = EVEN) -> dict[int, float]:
    return {report.rank: report.slowdown or 0.0 for report in judge.judge(told, planned)}


def test_a_slow_rank_is_found_after_two_figures_and_let_go_after_one() -> None:
    judge = ExternalJudge(0.03)
    for _ in range(4):
        assert levels(judge, figures(uneven=True)) == {}
    assert levels(judge, figures({5: 1.25}, uneven=True)) == {}
    assert levels(judge, figures({5: 1.25}, uneven=True)) == {5: pytest.approx(1.25)}
    assert levels(judge, figures({5: 1.25}, uneven=True)) == {}, "said once"
    assert levels(judge, figures(uneven=True)) == {5: 1.0}
    assert levels(judge, figures(uneven=True)) == {}


def test_what_changes_with_the_plan_alone_is_no_straggler() -> None:
    judge, generator = ExternalJudge(0.03), random.Random(1)
    for _ in range(200):
        planned = {rank: generator.uniform(1.0, 1.6) for rank in range(8)}
        assert levels(judge, figures(None, planned, uneven=True, noise=generator), planned) == {}


def test_a_slow_rank_stays_found_when_all_plan_for_its_pace() -> None:
    judge = ExternalJudge(0.03)
    for _ in range(3):
        levels(judge, figures())
    levels(judge, figures({5: 1.25}))
    assert levels(judge, figures({5: 1.25})) == {5: pytest.approx(1.25)}
    paced = {rank: 1.0 if rank == 5 else 1.25 for rank in range(8)}
    for _ in range(5):
        assert levels(judge, figures({5: 1.25}, paced), paced) == {}


def test_comparable_work_shows_a_rank_that_was_slow_from_the_start() -> None:
    judge = ExternalJudge(0.03)
    assert levels(judge, figures({2: 1.2}, comparable=True)) == {}
    assert levels(judge, figures({2: 1.2}, comparable=True)) == {2: pytest.approx(1.2)}


def test_all_ranks_slower_is_no_straggler() -> None:
    judge = ExternalJudge(0.03)
    for _ in range(3):
        levels(judge, figures())
    everybody = dict.fromkeys(range(8), 1.5)
    for _ in range(3):
        assert levels(judge, figures(everybody)) == {}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_figures_that_make_no_sense_are_left_out(value: float) -> None:
    judge = ExternalJudge(0.03)
    for _ in range(5):
        assert levels(judge, ExternalFigures("other", {0: 1.0, 1: 1.0, 2: value}, comparable=True)) == {}
    assert levels(judge, ExternalFigures("other", {0: 1.0, 2: value}, comparable=True)) == {}


def test_ranks_whose_plan_is_not_known_are_left_out() -> None:
    judge = ExternalJudge(0.03)
    for _ in range(3):
        assert levels(judge, figures({5: 1.25}, comparable=True), dict.fromkeys(range(5), 1.0)) == {}


def test_planned_work_is_that_of_the_plans_clocks() -> None:
    measured = profile(2)
    plan = make_plan(build_graph(one_f_one_b(2, 4)), measured, blocking_power_w=BLOCKING_W, target=Target.slowdown(0.2))
    time_s = {(stage, kind, m.frequency_mhz): m.time_s for stage, kind, m in measured.rows()}
    work = planned_work(plan, time_s)
    for stage in range(2):
        for kinds in (("forward",), ("backward",), ()):
            chosen = [p for p in plan.stages[stage] if not kinds or p.instruction.kind in kinds]
            planned_s = sum(p.finish_s - p.start_s for p in chosen)
            full_s = sum(measured.table[stage, p.instruction.kind][0].time_s for p in chosen)
            assert slowed_by(work, stage, kinds) == pytest.approx(planned_s / full_s)
            assert planned_s > full_s
    assert slowed_by(work, 7, ()) is None
    assert slowed_by(None, 0, ()) is None

"""Power budgets against what was drawn, by records of two nodes of two GPUs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest

from perseus_plugin.planning.power.budget import GroupBudget, NodeOverhead, Peaks, PowerBudget
from perseus_plugin.reporting.record.iterations import PLAN, Sort, Stretch
from perseus_plugin.reporting.record.lines import Header
from perseus_plugin.reporting.record.records import RankRecord
from perseus_plugin.reporting.record.samples import Reading, Sample
from perseus_plugin.reporting.report.budgets import as_run
from perseus_plugin.reporting.report.reigns import Reign
from tests.factories import placement

START_S = 1_700_000_000.0
RANKS = range(4)


def recorded(watts: Sequence[float], rank: int, samples: tuple[Sample, ...] = ()) -> RankRecord:
    """One iteration of two seconds for each; NaN: its energy is not known."""
    header = Header(
        schema="perseus-record",
        version=1,
        placement=placement(rank, 4, 2),
        started_s=START_S,
        host="a",
        gpu="test GPU",
        backend="emulated",
        emulated=True,
        facts={},
    )
    stretches = [
        Stretch(n, 1, START_S + 2 * n, 2.0, 2.0, 2 * one, int(not math.isnan(one)), Sort(PLAN, 1))
        for n, one in enumerate(watts)
    ]
    return RankRecord(header, tuple(stretches), samples=samples)


def records(watts: Sequence[float]) -> Mapping[int, RankRecord]:
    """Rank r draws r times 10 W more."""
    return {rank: recorded([one + 10 * rank for one in watts], rank) for rank in RANKS}


def reign(first: int, limit: PowerBudget | None) -> Reign:
    return Reign(first, "said", limit=limit)


def test_each_budget_is_held_against_what_its_gpus_drew_while_it_was_in_force() -> None:
    limit = PowerBudget(
        500.0,
        (GroupBudget("last", "3", 140.0), GroupBudget("node", "node", 250.0), GroupBudget("gpu", "gpu", 150.0)),
        peaks=Peaks(2.0, job_w=600.0, gpu_w=160.0),
        gpus_per_node=2,
    )
    found = as_run([reign(1, limit), reign(3, None)], records([300.0, 100.0, 140.0, 300.0]), 4)
    assert [(one.whose, one.allowed_w, one.average_w) for one in found] == [
        ("the job", 500.0, pytest.approx(540.0)),
        ("last", 140.0, pytest.approx(150.0)),
        ("node 1, which drew most of 2", 250.0, pytest.approx(290.0)),
        ("gpu 3, which drew most of 4", 150.0, pytest.approx(150.0)),
    ]
    assert [one.highest_w for one in found] == pytest.approx([620.0, 170.0, 330.0, 170.0])
    assert [one.peak_allowed_w for one in found] == pytest.approx([600.0, math.nan, math.nan, 160.0], nan_ok=True)
    assert {one.iterations for one in found} == {2}


def test_the_same_budget_at_several_times_is_one_and_the_longest_comes_first() -> None:
    once, often = PowerBudget(1000.0), PowerBudget(500.0)
    found = as_run([reign(0, often), reign(2, once), reign(3, often)], records([100.0, 100.0, 300.0, 160.0]), 4)
    assert [(one.allowed_w, one.iterations, one.average_w) for one in found] == [
        (500.0, 3, pytest.approx(540.0)),
        (1000.0, 1, pytest.approx(1260.0)),
    ]
    assert found[0].highest_w == pytest.approx(700.0)


@pytest.mark.parametrize(("window_s", "highest_w"), [(1.0, 860.0), (3.0, 860.0 * 2 / 3 + 460.0 / 3), (99.0, 660.0)])
def test_the_highest_average_is_over_any_window(window_s: float, highest_w: float) -> None:
    limit = PowerBudget(1000.0, peaks=Peaks(window_s))
    (one,) = as_run([reign(0, limit)], records([100.0, 200.0]), 4)
    assert one.highest_w == pytest.approx(highest_w, rel=0.01)


def test_within_an_iteration_the_counters_readings_tell() -> None:
    ticks = tuple(Reading(0.1 * n, 1410, 10.0 * n + (40.0 if n > 10 else 0.0)) for n in range(20))
    sample = Sample(
        number=0, state=PLAN, plan=1, schedule="", begin_s=START_S, time_s=2.0, operations=(), readings=ticks
    )
    of_ranks = {rank: recorded([120.0], rank, (sample,) if not rank else ()) for rank in RANKS}
    (one,) = as_run([reign(0, PowerBudget(peaks=Peaks(0.1, gpu_w=300.0)))], of_ranks, 4)
    assert (one.whose, one.highest_w) == ("gpu 0, which drew most of 4", pytest.approx(500.0))
    assert math.isnan(one.allowed_w)


def test_budgets_of_nodes_count_what_these_draw_beside() -> None:
    limit = PowerBudget(2000.0, (GroupBudget("each", "gpu", 150.0),), NodeOverhead(400.0, 0.5), gpus_per_node=2)
    job, gpu = as_run([reign(0, limit)], records([100.0]), 4)
    assert (job.average_w, gpu.average_w) == (pytest.approx(460.0 * 1.5 + 800.0), pytest.approx(130.0))


def test_what_is_not_known_is_not_told() -> None:
    limit = [reign(0, PowerBudget(500.0))]
    assert as_run([], records([100.0]), 4) == [], "nothing was aimed at"
    assert as_run(limit, {}, 0) == [], "neither records nor a summary"
    assert as_run(limit, {0: recorded([100.0], 0)}, 4) == [], "ranks without a record"
    assert as_run(limit, records([math.nan]), 4) == [], "no energy"
    assert as_run([reign(9, PowerBudget(500.0))], records([100.0]), 4) == [], "it has not begun"
    (one,) = as_run(limit, records([100.0, math.nan, 200.0]), 4)
    assert (one.average_w, one.highest_w) == (pytest.approx(660.0), pytest.approx(860.0)), "not over what is unknown"

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.planning.planner import Target, make_plan
from perseus_plugin.profiling.profile import Profile
from perseus_plugin.reporting.report.baseline import by_schedule, covers, full_clocks, scale_to
from perseus_plugin.reporting.report.worth import FullClocks
from tests.factories import BLOCKING_W, profile
from tests.reporting.job import Job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job") / "out", stages=3, microbatches=5)


def test_full_clocks_are_the_planners(job: Job) -> None:
    made = full_clocks(job.graph, job.profile, BLOCKING_W)
    assert made.time_s == pytest.approx(job.plan.baseline_time_s)
    assert made.energy_j == pytest.approx(job.plan.baseline_energy_j)


def test_full_clocks_wait_at_full_clocks(job: Job) -> None:
    by_clock = Profile.from_rows(
        (stage, kind, replace(row, blocking_power_w=60.0 + 10.0 * stage + (row is rows[0]) * 30.0))
        for (stage, kind), rows in job.profile.table.items()
        for row in rows
    )
    plan = make_plan(job.graph, by_clock, blocking_power_w=1.0, target=Target.slowdown(0.0))
    made = full_clocks(job.graph, by_clock, 1.0)
    assert made.energy_j == pytest.approx(plan.baseline_energy_j)
    plain = full_clocks(job.graph, job.profile, 0.0)
    busy_s = [
        sum(by_clock.table[i.stage, i.kind][0].time_s for i in job.graph.instructions if i and i.stage == stage)
        for stage in range(3)
    ]
    waiting_j = sum((90.0 + 10.0 * stage) * (made.time_s - busy_s[stage]) for stage in range(3))
    assert made.energy_j == pytest.approx(plain.energy_j + waiting_j)


def test_another_schedule_is_what_its_own_plan_would_be_compared_with(tmp_path: Path, job: Job) -> None:
    other = Job(tmp_path / "out", stages=3, microbatches=15)
    measured = FullClocks(3 * job.plan.baseline_energy_j, 2 * job.plan.baseline_time_s)
    told = by_schedule(measured, job.plan, {"1F1B": job.streams, "longer": other.streams}, job.survey)
    assert told["1F1B"] == measured
    assert told["longer"].energy_j == pytest.approx(3 * other.plan.baseline_energy_j)
    assert told["longer"].time_s == pytest.approx(2 * other.plan.baseline_time_s)


def test_what_the_profile_does_not_have_is_not_told(tmp_path: Path, job: Job) -> None:
    measured = FullClocks(1.0, 1.0)
    fewer = Job(tmp_path / "out", stages=2)
    assert by_schedule(measured, job.plan, {"other": fewer.streams}, job.survey) == {"1F1B": measured}
    assert by_schedule(measured, job.plan, {"other": job.streams}, None) == {"1F1B": measured}
    assert not covers(profile(stages=2), job.graph)
    assert covers(profile(stages=4), job.graph)


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.01, 1.3])
def test_the_scale_of_a_profile_is_found(job: Job, factor: float) -> None:
    survey = replace(job.survey, profile=job.profile.scaled(factor))
    plan = make_plan(
        build_graph(job.streams, job.survey.constant_time_s),
        survey.profile,
        blocking_power_w=BLOCKING_W,
        target=Target.slowdown(0.0),
    )
    found = scale_to(plan, job.graph, job.survey)
    assert found == pytest.approx(1.0 if factor == 1.01 else factor, rel=1e-4)

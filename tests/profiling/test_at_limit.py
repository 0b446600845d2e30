"""Sweep, plan and run on GPUs that their power limit holds, in virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perseus_plugin.gpus.emulated.physics import A100, B300, H100, GpuModel
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.planning.planner import Planner
from perseus_plugin.planning.targets import Target
from perseus_plugin.profiling.survey import Survey
from perseus_plugin.profiling.sweep import choose_clocks, sweep_order
from tests.virtual_job import VirtualJob

WITHOUT_BURSTS = replace(H100, burst_j=0.0)


def swept(model: GpuModel, limit_w: float | None = None) -> tuple[VirtualJob, Survey]:
    job = VirtualJob(model, (0.060, 0.045), (0.120, 0.090), 4, limit_w)
    return job, job.swept(sweep_order(choose_clocks(model.clocks_mhz(), 7, model.max_clock_mhz // 2), 0), 5)


@pytest.mark.parametrize(
    ("model", "limit_w", "within"),
    [
        (H100, None, 0.015),
        (B300, None, 0.02),
        (WITHOUT_BURSTS, 450.0, 0.01),
        # Far below what work would draw, how long it runs before the limit takes hold depends on the wait before.
        (H100, 450.0, 0.03),
        (A100, 300.0, 0.01),
        (A100, None, 0.001),
    ],
    ids=["H100", "B300", "H100 at 450 W without bursts", "H100 at 450 W", "A100 at 300 W", "A100"],
)
def test_plans_take_the_time_and_the_energy_that_they_promise(
    model: GpuModel, limit_w: float | None, within: float
) -> None:
    job, survey = swept(model, limit_w)
    assert survey.too_high == ()
    assert survey.unresolved == frozenset()
    planner = Planner(build_graph(job.streams), survey.profile, blocking_power_w=survey.blocking_power_w)
    full_s, full_j = job.at(model.max_clock_mhz, 4)
    for slowdown in (0.0, 0.05):
        plan = planner.plan(Target.slowdown(slowdown))
        assert plan.baseline_time_s == pytest.approx(full_s, rel=within)
        assert plan.baseline_energy_j == pytest.approx(full_j, rel=within)
        time_s, energy_j = job.follow(plan, 4)
        assert time_s == pytest.approx(plan.iteration_time_s, rel=within)
        assert energy_j == pytest.approx(plan.energy_j, rel=within)
        assert 1 - energy_j / full_j == pytest.approx(plan.saving, abs=within), "no saving is invented"
        assert energy_j < full_j


def test_locks_above_the_sustained_clock_are_no_points_of_their_own() -> None:
    """At 450 W such an H100's forwards run at 1,155 MHz, its backwards at 945, whatever higher clock is asked for."""
    job, survey = swept(WITHOUT_BURSTS, 450.0)
    held_mhz = 1155
    for estimate in job.of_stages:
        tried = {*estimate.clocks_mhz, *estimate.as_highest_mhz}
        assert len(tried) == 7
        assert {clock for clock in tried if clock > held_mhz} <= {H100.max_clock_mhz, *estimate.as_highest_mhz}
        assert estimate.as_highest_mhz
        assert H100.max_clock_mhz in estimate.held_mhz
    for (_, kind), rows in survey.profile.table.items():
        if kind == "forward":
            times_s = [row.time_s for row in rows]
            assert len(times_s) > 1
            assert times_s == sorted(times_s)
            assert times_s[1] > 1.02 * times_s[0]

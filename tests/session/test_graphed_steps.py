"""Jobs whose training step is one CUDA graph, on emulated GPUs, with real sessions, helpers and planner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.cli.job import request_of_folder
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.planning.plan import load_plan
from perseus_plugin.planning.process import plan_for
from tests.one_job import OneJob, Step
from tests.session.test_one_job import SHORT

FORWARD_S, BACKWARD_S = (0.020, 0.028), (0.040, 0.056)
BLOCK: dict[str, Any] = {
    **SHORT,
    "cuda_graph": True,
    "limits": {"max_changes_per_iteration": 6, "switch_latency_s": 0.006, "min_dwell_s": 0.0},
}


def job_of(folder: Path, block: dict[str, Any], iterations: int, **more: Any) -> OneJob:
    return OneJob(folder, [Step()] * iterations, forward_s=FORWARD_S, backward_s=BACKWARD_S, plugin=block, **more)


def planned_for(folder: Path, iterations: int) -> Any:
    left = iter(range(iterations))
    return lambda: (folder / "plan.json").exists() and next(left, None) is None


def test_a_step_that_becomes_a_graph_once_there_is_a_plan_goes_on_under_it_and_so_does_the_next_job(
    tmp_path: Path,
) -> None:
    """Eager while it is profiled. The other job is a graph from its first step on, with the first one's profile."""
    folder = tmp_path / "job"
    captured: list[int] = []

    def is_graph(iteration: int) -> bool:
        if not captured and (folder / "plan.json").exists():
            captured.append(iteration + 2)  # on all ranks alike: none is two iterations ahead
        return bool(captured) and iteration >= captured[0]

    ran = job_of(folder, BLOCK, 10_000, is_graph=is_graph, until=planned_for(folder, 24)).run()
    assert load_plan(folder / "plan.json").waits == ()
    assert ran.summary["plan"]["dropped_plans"] == 0
    assert len([at for at, state in enumerate(ran.states) if state == "plan" and at >= captured[0]]) >= 5

    other = tmp_path / "other"
    block = {**BLOCK, "profiling": {**SHORT["profiling"], "load": str(folder / "profile.csv")}}
    ran = job_of(other, block, 10_000, is_graph=lambda iteration: True, until=planned_for(other, 12)).run()
    plan = load_plan(other / "plan.json")
    assert "plan" in ran.states
    assert ran.summary["plan"]["dropped_plans"] == 0
    again = plan_for(request_of_folder(other))
    assert (again.stages, again.energy_j) == (plan.stages, plan.energy_j), "what `perseus plan FOLDER` makes"
    for stage in range(2):
        gpu = EmulatedGpu(other / "emulated_gpus" / f"rank{stage}")
        locked = {one.mhz for one in gpu.events() if one.mhz}
        assert {*plan.clocks_mhz(stage)} - {1410} <= locked <= {*plan.clocks_mhz(stage), 1410}
        assert gpu.locked_mhz() is None


def test_a_step_that_is_a_graph_too_early_stays_at_full_clocks_and_that_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = job_of(tmp_path / "job", BLOCK, 8, is_graph=lambda iteration: iteration >= 3).run()
    assert len(ran.times_s) == 8
    assert "the training step became a CUDA graph before profiling was over" in capfd.readouterr().err
    assert "plan" not in ran.states

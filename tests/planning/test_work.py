"""The same input gives the same plan however fast the clock runs; a brake that acts is told, and the plan is valid."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from perseus_plugin.cli.app import app
from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.frontier import make_frontier
from perseus_plugin.planning.plan import load_plan, plan_from_json, plan_to_json
from perseus_plugin.planning.planner import ChangeLimits, Effort, Planner, Target
from perseus_plugin.planning.process import PlanAnswer, PlanRequest, answer_to
from perseus_plugin.planning.work import BRAKE_S, Work
from perseus_plugin.profiling.profile import Measurement, Profile, save_profile
from tests.examples import examples
from tests.planning.jobs import Job, bundled_profile, jobs

Clock = Callable[[], float]


def stands_still() -> float:
    return 0.0


def steps(seconds: float) -> Clock:
    """A clock that goes forward whenever it is looked at."""
    looked = itertools.count()
    return lambda: seconds * next(looked)


def planner(clock: Clock = stands_still, stages: int = 2, microbatches: int = 4) -> Planner:
    graph = build_graph(one_f_one_b(stages, microbatches))
    return Planner(graph, bundled_profile(stages), blocking_power_w=60.0, clock=clock)


CASES = [
    pytest.param(Target.slowdown(0.03), ChangeLimits(), "normal", id="windows and the whole"),
    pytest.param(Target.slowdown(), ChangeLimits(2), "quick", id="few changes"),
    pytest.param(Target.cheapest(), ChangeLimits(None, 0.3), "quick", id="dwell"),
    pytest.param(Target.energy_budget(2000.0), ChangeLimits(6), "quick", id="budget"),
]


@pytest.mark.parametrize(("target", "limits", "effort"), CASES)
def test_a_clock_that_runs_faster_changes_nothing(target: Target, limits: ChangeLimits, effort: Effort) -> None:
    looks = 0

    def counted() -> float:
        nonlocal looks
        looks += 1
        return 0.0

    plan = planner(counted).plan(target, limits, effort)
    assert not plan.cut_short
    # The fastest clock with which the brake does not act yet.
    assert planner(steps(0.9 * BRAKE_S[effort] / looks)).plan(target, limits, effort) == plan


@pytest.mark.many
@examples(2)
@given(jobs(max_stages=3, max_microbatches=3, max_clocks=3), st.integers(0, 3), st.sampled_from(["quick", "normal"]))
def test_the_same_job_has_the_same_plan(job: Job, most: int, effort: Effort) -> None:
    def plan() -> str:
        graph = build_graph(job.streams, latency_s=job.latency_s)
        made = Planner(graph, job.profile, blocking_power_w=list(job.blocking_w))
        return plan_to_json(made.plan(Target.slowdown(0.05), ChangeLimits(most), effort))

    assert plan() == plan()


@contextmanager
def busy_machine() -> Iterator[None]:
    """More processes that compute without end than there are cores."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(1 + (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


@pytest.mark.repeated  # clocks that run faster, above, stand for it
def test_a_busy_machine_changes_nothing() -> None:
    def plan() -> str:
        # With few changes, so large a job uses up the work of effort quick.
        return plan_to_json(planner(stages=4, microbatches=24).plan(Target.slowdown(), ChangeLimits(8)))

    undisturbed = plan()
    with busy_machine():
        assert plan() == undisturbed


@pytest.mark.parametrize("looks", [1, 4])
@pytest.mark.parametrize(("target", "limits", "effort"), CASES)
def test_the_brake_gives_a_valid_plan_that_says_so(
    target: Target, limits: ChangeLimits, effort: Effort, looks: int
) -> None:
    plan = planner(steps(1.01 * BRAKE_S[effort] / looks)).plan(target, limits, effort)
    assert plan.cut_short
    assert plan.iteration_time_s <= plan.deadline_s
    assert plan.energy_j <= plan.baseline_energy_j
    if limits.max_changes is not None:
        assert max(plan.clock_changes(stage) for stage in range(len(plan.stages))) <= limits.max_changes
    assert plan_from_json(plan_to_json(plan)) == plan


@pytest.mark.parametrize(("clock", "said"), [(steps(1e9), True), (stands_still, False)])
def test_a_plan_that_is_not_found_because_of_the_brake_says_so(clock: Clock, said: bool) -> None:
    forward = Measurement(710, 1.0, 200.0), Measurement(700, 0.9, 150.0)
    backward = Measurement(710, 1.0, 200.0), Measurement(700, 1.2, 260.0)
    profile = Profile({(0, "forward"): forward, (0, "backward"): backward})
    made = Planner(build_graph(one_f_one_b(1, 2)), profile, blocking_power_w=1.0, clock=clock)
    with pytest.raises(PlanError, match="no plan was found") as caught:  # the shortest iteration changes the clock
        made.plan(Target.deadline(made.problem.shortest_s), ChangeLimits(0))
    assert ("cut short by the clock" in str(caught.value)) is said


def test_a_plan_file_without_the_field_is_one_that_was_not_cut_short() -> None:
    plan = planner(stages=2, microbatches=2).plan(Target.slowdown())
    text = plan_to_json(plan)
    assert "cut_short" not in text
    assert plan_from_json(text) == plan
    assert plan_from_json(plan_to_json(replace(plan, cut_short=True))).cut_short


def test_work_is_over_when_it_is_done_or_the_clock_says_so() -> None:
    now_s = 5.0
    work = Work(10.0, lambda: now_s)
    assert not work.over(1.0)
    work.done += 1.0
    assert work.over(1.0)
    assert not work.cut_short
    now_s = 15.0
    assert work.over(2.0)
    assert work.cut_short


def test_a_frontier_says_whether_one_of_its_plans_was_cut_short() -> None:
    def frontier(clock: Clock) -> bool:
        return make_frontier(planner(clock, 2, 2), tolerance=0.1, limits=ChangeLimits(2)).cut_short

    assert not frontier(stands_still)
    assert frontier(steps(1e9))


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for effort in BRAKE_S:
        monkeypatch.setitem(BRAKE_S, effort, 0.0)


def request(**changes: object) -> PlanRequest:
    made = PlanRequest(
        schedule="train",
        streams=one_f_one_b(3, 6),
        constant_time_s={},
        profile=bundled_profile(3),
        blocking_power_w=[60.0] * 3,
        max_changes=4,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_the_planners_answer_says_it_and_passes_through_json(no_time: None) -> None:
    answer = answer_to(request())
    assert answer.cut_short
    assert PlanAnswer.from_dict(answer.to_dict(), 0.0) == answer


def test_the_command_line_says_it(tmp_path: Path, no_time: None, caplog: pytest.LogCaptureFixture) -> None:
    save_profile(bundled_profile(3), tmp_path / "profile.csv")
    options = ["--blocking-power", "60", "--microbatches", "6", "--max-changes", "4", "-o", str(tmp_path / "p.json")]
    with caplog.at_level(logging.WARNING):
        done = CliRunner().invoke(app, ["plan", str(tmp_path / "profile.csv"), *options])
    assert done.exit_code == 0, done.output
    assert "a search for a plan was cut short by the clock" in caplog.text
    assert load_plan(tmp_path / "p.json").cut_short

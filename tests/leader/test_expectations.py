from __future__ import annotations

import math
from dataclasses import replace

import pytest

from perseus_plugin.iteration.replayed import Replayed
from perseus_plugin.leader.expectations import MODEL_ERROR, Expectations
from perseus_plugin.leader.iteration_times import IterationTimes
from perseus_plugin.leader.plan_shelf import PlanShelf
from perseus_plugin.planning.plan import Confidence, Plan
from perseus_plugin.planning.process import plan_for
from perseus_plugin.planning.request import PlanRequest
from tests.factories import BLOCKING_W, profile, stream_of

REPLAYED = Replayed(12, 0.01, False, 1.002, 1.004, 0.08, (0.07, 0.09))


def plan(microbatches: int) -> Plan:
    streams = [stream_of(2, microbatches)(stage) for stage in range(2)]
    return plan_for(PlanRequest(str(microbatches), streams, {}, profile(2), [BLOCKING_W] * 2))


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {str(count): plan(count) for count in (2, 8)}


class Job:
    def __init__(self, plans: dict[str, Plan]) -> None:
        self.plans = plans
        self.times = IterationTimes(3)
        self.shelf = PlanShelf(2)
        self.expectations = Expectations(self.shelf, self.times)

    def planned(self) -> Job:
        for key, made in self.plans.items():
            self.shelf.put(key, made, profile(2))
        return self

    def ran(self, full: str, under: str) -> None:
        for key in full.split():
            self.times.add_full(key, 1.1 * self.plans[key].baseline_time_s)
        for key in under.split():
            self.times.add_planned(key, 1.1 * self.plans[key].iteration_time_s, None)


def test_an_iteration_is_expected_to_take_what_its_own_schedule_takes(plans: dict[str, Plan]) -> None:
    job = Job(plans).planned()
    job.ran("2 2 2 2 2", "")
    for key, made in plans.items():
        assert job.expectations.planned_s(key) == pytest.approx(1.1 * made.deadline_s)
        assert job.expectations.full_s(key) == pytest.approx(1.1 * made.baseline_time_s)
    assert job.expectations.planned_s("5") is None
    assert job.expectations.planned_s("2", pace_s=9.0) == pytest.approx(9.9)


def test_a_schedule_that_was_measured_often_enough_speaks_for_itself(plans: dict[str, Plan]) -> None:
    job = Job(plans).planned()
    job.ran("2 2 2 2 2", "")
    for _ in range(4):
        job.times.add_full("8", 1.5 * plans["8"].baseline_time_s)
    assert job.expectations.full_s("8") == pytest.approx(1.5 * plans["8"].baseline_time_s)
    assert job.expectations.full_s("2") == pytest.approx(1.1 * plans["2"].baseline_time_s)


def test_full_clocks_are_scaled_to_the_schedules_that_ran_under_plans(plans: dict[str, Plan]) -> None:
    job = Job(plans).planned()
    job.ran("2 8", "2 8 2 8")
    assert job.expectations.full_clock_scale(plans["2"]) == pytest.approx((1.0, 1.0))
    longer = Job(plans).planned()
    longer.ran("2 2", "8 8")
    scale = longer.expectations.full_clock_scale(plans["8"])
    assert scale == pytest.approx(
        (
            plans["8"].baseline_time_s / plans["2"].baseline_time_s,
            plans["8"].baseline_energy_j / plans["2"].baseline_energy_j,
        )
    )
    unplanned = Job(plans)
    unplanned.shelf.put("8", plans["8"], profile(2))
    unplanned.ran("2 2", "8 8")
    assert unplanned.expectations.full_clock_scale(plans["8"]) is None


def test_what_is_predicted_is_the_replays_where_there_was_one_and_the_models_elsewhere(plans: dict[str, Plan]) -> None:
    job = Job(plans).planned()
    job.ran("2", "2 2")
    by_model = job.expectations.predicted(plans["2"], {})
    assert by_model is not None
    assert by_model.saving is None
    assert by_model.energy_ratio == pytest.approx(1 - plans["2"].saving)
    assert by_model.time_ratio == pytest.approx(plans["2"].iteration_time_s / plans["2"].baseline_time_s)
    replayed = job.expectations.predicted(plans["2"], {"2": REPLAYED, "8": None})
    assert replayed is not None
    assert replayed.energy_ratio == pytest.approx(0.92)
    assert replayed.time_ratio == pytest.approx(1.002)
    error = math.hypot(0.01, MODEL_ERROR * 0.92)
    assert replayed.saving == pytest.approx((0.08 - error, 0.08 + error))


def test_errors_of_the_profile_and_of_the_replay_add_up(plans: dict[str, Plan]) -> None:
    saving = plans["2"].saving
    sure = replace(plans["2"], confidence=Confidence(0.95, (saving - 0.03, saving + 0.04), 0.01))
    job = Job({"2": sure}).planned()
    job.ran("2", "2 2")
    by_model = job.expectations.predicted(sure, {})
    assert by_model is not None
    model = MODEL_ERROR * (1 - saving)
    assert by_model.saving == pytest.approx((saving - math.hypot(0.03, model), saving + math.hypot(0.04, model)))
    both = job.expectations.predicted(sure, {"2": replace(REPLAYED, saving_interval=(0.04, 0.11))})
    assert both is not None
    model = MODEL_ERROR * 0.92
    assert both.saving == pytest.approx((0.08 - math.hypot(0.05, model), 0.08 + math.hypot(0.05, model)))


def test_full_clocks_save_nothing_for_certain(plans: dict[str, Plan]) -> None:
    job = Job(plans).planned()
    job.ran("2", "2 2")
    nothing = job.expectations.predicted(
        plans["2"], {"2": replace(REPLAYED, saving_mean=0.0, saving_interval=(0.0, 0.0))}
    )
    assert nothing is not None
    assert nothing.saving == (0.0, 0.0)


def test_several_schedules_are_predicted_as_often_as_they_ran(plans: dict[str, Plan]) -> None:
    job = Job(plans).planned()
    job.ran("2", "2 8 8 8")
    both = job.expectations.predicted(
        plans["8"], {"2": REPLAYED, "8": replace(REPLAYED, saving_mean=0.1, saving_interval=(0.09, 0.11))}
    )
    assert both is not None
    weight = {"2": plans["2"].baseline_energy_j, "8": 3 * plans["8"].baseline_energy_j}
    expected = (0.08 * weight["2"] + 0.1 * weight["8"]) / sum(weight.values())
    assert both.energy_ratio == pytest.approx(1 - expected)
    errors = [math.hypot(0.01, MODEL_ERROR * (1 - saving)) for saving in (0.08, 0.1)]
    error = sum(e * w for e, w in zip(errors, weight.values(), strict=True)) / sum(weight.values())
    assert both.saving == pytest.approx((expected - error, expected + error))
    assert job.expectations.predicted(None, {}) is None

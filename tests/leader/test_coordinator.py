from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.config import parse_config
from perseus_plugin.exchange.messages import (
    NEWS,
    TARGETS,
    TROUBLE,
    IterationDurations,
    RankDurations,
    RankEstimate,
    RankWindow,
    RankWindows,
    Recheck,
    Seen,
    Trouble,
    durations_key,
    estimate_key,
    part_key,
    recheck_key,
    windows_key,
)
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import Compute, Constant
from perseus_plugin.iteration.timetable import Follow, FullClock, Sweep
from perseus_plugin.leader import rank_reports as reports_module
from perseus_plugin.leader.state import Phase
from perseus_plugin.planning.frontier_process import BackgroundFrontier
from perseus_plugin.planning.plan import load_plan
from perseus_plugin.planning.process import PlanRequest, answer_to
from perseus_plugin.planning.replay import by_node
from perseus_plugin.planning.targets import Target
from perseus_plugin.profiling.profile import load_profile
from perseus_plugin.profiling.survey import Survey
from perseus_plugin.reporting.live import comparison as comparison_module
from tests.factories import BLOCKING_W, CLOCKS_MHZ, placement, profile, rank_estimate, record
from tests.leader.rank_zero import FULL_S, PATIENCE, SCHEDULES, SWEEP_END, TABLE, RankZero, parts_of


class Job(RankZero):
    """As far as a test wants it to have come."""

    def __init__(
        self,
        folder: Path,
        world_size: int = 2,
        survey: Survey | None = None,
        profiling: Any = None,
        frontier: BackgroundFrontier | None = None,
        limits: Any = None,
        slowdown: float = 0.0,
        **watch: Any,
    ) -> None:
        block = {
            "margin": 0.01,
            "slowdown": slowdown,
            "stragglers": {"detect": False},
            "profiling": profiling or {},
            "limits": limits or {},
            "watch": {"patience": PATIENCE, "tolerance": 0.05, "max_replans": 2, "reference_share": 0, **watch},
        }
        super().__init__(folder, block, world_size=world_size, survey=survey, frontier=frontier)

    def publish_estimates(self, *ranks: int, **more: Any) -> None:
        for rank in ranks:
            self.exchange.publish(estimate_key(0, rank), rank_estimate(rank, 2, **more).model_dump())

    def measured(self) -> Job:
        """Up to the request of the first plan."""
        for _ in range(4):
            self.run(Sweep(0, CLOCKS_MHZ[0], kept=True), FULL_S)
        self.publish_estimates(0, 1)
        self.step()
        assert self.coordinator.phase is Phase.PLANNING
        return self

    def following(self) -> Job:
        """Up to the plan in force."""
        self.measured()
        self.planner.finish()
        self.step()
        assert self.coordinator.phase is Phase.FOLLOWING
        return self

    def following_b(self) -> Job:
        """From the plan of schedule A in force up to that of B, which is the usual one by then."""
        self.schedule = "B"
        self.step()
        self.planner.finish()
        self.step()
        self.run(Follow(1), FULL_S, 40, undisturbed=False)
        return self

    def dropped(self, excess: float = 0.2) -> Job:
        """Up to the drop of the first plan, as its iterations take too long."""
        self.following()
        expected_s = self.expected_s()
        self.run(Follow(1), (1 + excess) * expected_s, PATIENCE)
        assert self.coordinator.phase is Phase.RECHECKING
        return self

    def rechecked(self, factor: float, sequence: int = 2) -> None:
        """Every rank's instructions take `factor` times as long as in the profile."""
        for rank in range(2):
            times = {kind: factor * profile().table[rank, kind][0].time_s for kind in ("forward", "backward")}
            self.exchange.publish(recheck_key(sequence, rank), Recheck(stage=rank, time_s=times).model_dump())

    def publish_durations(self, spread: float, first: int = 0, count: int = 12) -> None:
        """Every rank's instructions took their full-clock times, each times a factor of its own."""
        streams = [SCHEDULES[self.schedule](stage) for stage in range(2)]
        graph = build_graph(streams)
        told = []
        for rank in range(2):
            kinds = [op.kind for op in streams[rank] if isinstance(op, Compute)]
            rng = random.Random(rank + first)
            full_s = [profile().table[rank, kind][0].time_s for kind in kinds]
            told.append([[math.exp(rng.gauss(0, spread)) * one for one in full_s] for _ in range(count)])
        times_s = [graph.iteration_time_s(by_node(graph, one)) for one in zip(*told, strict=True)]
        for rank in range(2):
            iterations = tuple(
                IterationDurations(
                    number=first + at,
                    schedule=self.schedule,
                    clocks_mhz=(0,),
                    durations_s=tuple(durations_s),
                    starts_s=(0.0,) * len(durations_s),
                    time_s=times_s[at],
                )
                for at, durations_s in enumerate(told[rank])
            )
            message = RankDurations(placement=placement(rank), iterations=iterations)
            self.exchange.publish(durations_key(rank), message.model_dump())


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "perseus_plugin")
    return caplog


# From estimates to a plan.


def test_nothing_is_asked_for_before_the_sweep_is_over(job: Job) -> None:
    job.publish_estimates(0, 1)
    job.iteration = SWEEP_END - 1
    job.step()
    assert job.planner.requests == []
    job.iteration = SWEEP_END
    job.step()
    assert len(job.planner.requests) == 1


def test_nothing_is_asked_for_before_all_ranks_have_told(job: Job) -> None:
    job.publish_estimates(1)
    job.step()
    job.step()
    assert job.planner.requests == []
    assert job.news is None
    job.publish_estimates(0)
    job.step()
    assert len(job.planner.requests) == 1


def test_the_request_holds_what_was_measured_and_configured(job: Job) -> None:
    job.config = parse_config({})
    job.measured()
    request = job.planner.requests[0]
    assert request.schedule == "A"
    assert request.streams == [list(SCHEDULES["A"](stage)) for stage in range(2)]
    assert [(s, k, m.time_s) for s, k, m in request.profile.rows()] == [
        (s, k, m.time_s) for s, k, m in profile(2).rows()
    ]
    assert request.blocking_power_w == pytest.approx([BLOCKING_W] * 2)
    assert (request.target, request.margin, request.effort) == (Target.slowdown(), 0.01, "quick")
    assert request.full_clock_only == frozenset()


def test_a_plan_for_a_new_target_is_only_rounded_and_the_first_one_searched_for(job: Job) -> None:
    job.following()
    assert job.planner.requests[0].search
    job.exchange.append(TARGETS, {"slowdown": 0.2})
    job.step()
    newest = job.planner.requests[-1]
    assert newest.target == Target.slowdown(0.2)
    assert not newest.search


def test_the_dwell_follows_from_the_slowest_gpus_switch_latency_unless_it_is_set(tmp_path: Path) -> None:
    for limits, dwell_s in (({}, 0.06), ({"min_dwell_s": 0.5}, 0.5), ({"switch_latency_s": 0.1}, 0.2)):
        job = Job(tmp_path, limits=limits)
        job.publish_estimates(0, switch_latency_s=0.01)
        job.publish_estimates(1, switch_latency_s=0.03)
        job.step()
        assert job.planner.requests[0].min_dwell_s == pytest.approx(dwell_s)


def test_the_profile_is_saved(job: Job) -> None:
    job.measured()
    saved = load_profile(job.folder / "profile.csv")
    assert [(s, k, m.time_s, m.energy_j) for s, k, m in saved.rows()] == [
        (s, k, m.time_s, m.energy_j) for s, k, m in profile(2).rows()
    ]


def test_constant_work_goes_into_the_request(job: Job) -> None:
    with_step = {stage: [*SCHEDULES["A"](stage), Constant("step", collective=True)] for stage in range(2)}
    job.publish_estimates(0, constants={"step": 0.3})
    job.publish_estimates(1, constants={"step": 0.1})
    job.coordinator.use_schedule("A", lambda stage: with_step[stage])
    job.coordinator.step(SWEEP_END)
    assert job.planner.requests[0].constant_time_s == {(0, "step"): 0.1, (1, "step"): 0.1}


def test_a_kind_that_is_not_known_well_stays_at_full_clock_and_is_named(
    job: Job, heard: pytest.LogCaptureFixture
) -> None:
    badly = rank_estimate(1)
    badly.estimate["unresolved"] = ["backward"]
    job.publish_estimates(0)
    job.exchange.publish(estimate_key(0, 1), badly.model_dump())
    job.step()
    assert job.planner.requests[0].full_clock_only == {(1, "backward")}
    assert "stage 1: the energy of backward is not known" in heard.text
    job.planner.finish()
    job.step()
    assert job.coordinator.plan is not None
    for planned in job.coordinator.plan.stages[1]:
        assert planned.frequency_mhz == CLOCKS_MHZ[0] or planned.instruction.kind == "forward"


def test_energies_that_the_card_cannot_draw_are_named_and_their_clocks_not_used(
    job: Job, heard: pytest.LogCaptureFixture
) -> None:
    job.publish_estimates(0)
    hot = rank_estimate(1)
    limit_w = max(row[4] / row[2] for row in hot.estimate["instructions"])
    at = next(i for i, row in enumerate(hot.estimate["instructions"]) if row[:2] == ["backward", CLOCKS_MHZ[-1]])
    hot.estimate["instructions"][at][4] = 1.1 * limit_w * hot.estimate["instructions"][at][2]
    job.exchange.publish(estimate_key(0, 1), hot.model_copy(update={"power_limit_w": limit_w}).model_dump())
    job.step()
    assert f"(first: stage 1 backward at {CLOCKS_MHZ[-1]} MHz: {1.1 * limit_w:.0f} of {limit_w:.0f} W)" in heard.text
    table = job.planner.requests[0].profile.table
    assert [row.frequency_mhz for row in table[1, "forward"]] == list(CLOCKS_MHZ[:-1])
    assert [row.frequency_mhz for row in table[0, "forward"]] == list(CLOCKS_MHZ)


def test_a_profile_from_elsewhere_is_planned_on_once_every_rank_has_checked_it(tmp_path: Path) -> None:
    job = Job(tmp_path, survey=Survey(profile(2), BLOCKING_W))
    job.step()
    assert job.planner.requests == []
    job.rechecked(1.1, sequence=0)
    job.step()
    (request,) = job.planner.requests
    for (_, _, new), (_, _, old) in zip(request.profile.rows(), profile(2).rows(), strict=True):
        assert new.time_s == pytest.approx(1.1 * old.time_s), "the times are those of this run"
    assert not (tmp_path / "profile.csv").exists(), "it was not measured here"


def test_a_profile_of_another_job_is_refused(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    job = Job(tmp_path, survey=Survey(profile(2), BLOCKING_W))
    job.rechecked(1.5, sequence=0)
    job.step()
    assert "the kept profile does not fit: stage 0 forward takes" in heard.text
    news = job.newest()
    assert (news.action, news.clocks_mhz) == ("sweep", TABLE.sweep.clocks_mhz), "a full sweep instead"
    assert job.coordinator.state.survey is None


def test_a_profile_of_another_job_that_was_asked_for_is_refused(
    tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    load = {"load": "profile.csv", "blocking_power_w": BLOCKING_W}
    job = Job(tmp_path, survey=Survey(profile(2), BLOCKING_W), profiling=load)
    job.rechecked(1.5, sequence=0)
    job.step()
    assert "the profile of perseus.profiling.load is not of this job: stage 0 forward takes" in heard.text
    assert job.newest().action == "full"


def vague(rank: int, error: float = 0.5) -> RankEstimate:
    """An estimate whose energies are hardly known, except at the top clock."""
    made = rank_estimate(rank)
    for row in made.estimate["instructions"]:
        if row[1] != CLOCKS_MHZ[0]:
            row[5] = error * row[4]
    made.estimate["unresolved"] = ["backward", "forward"]
    return made


def test_no_other_round_tries_clocks_that_are_one_point_with_the_highest(job: Job) -> None:
    for rank in range(2):
        made = vague(rank)
        made.estimate["as_highest_mhz"] = list(CLOCKS_MHZ[1 : 3 - rank])
        job.exchange.publish(estimate_key(0, rank), made.model_dump())
    job.step()
    news = job.newest()
    assert news.action == "sweep"
    assert set(news.clocks_mhz) == {CLOCKS_MHZ[0], *CLOCKS_MHZ[2:]}, "the second stage needs the third"


def test_energies_known_badly_are_measured_in_another_round(job: Job) -> None:
    for rank in range(2):
        job.exchange.publish(estimate_key(0, rank), vague(rank).model_dump())
    job.step()
    assert job.planner.requests == []
    news = job.newest()
    assert (news.action, news.switch) == ("sweep", job.iteration + 2)
    assert set(news.clocks_mhz) == set(CLOCKS_MHZ)
    assert news.clocks_mhz[0] == news.clocks_mhz[-1] == CLOCKS_MHZ[0]
    end = news.switch + 4 * len(news.clocks_mhz)
    for rank in range(2):
        job.exchange.publish(estimate_key(1, rank), rank_estimate(rank).model_dump())
    job.iteration = end - 1
    job.step()
    assert job.planner.requests == []
    job.iteration = end
    job.step()
    (request,) = job.planner.requests
    assert request.full_clock_only == frozenset()
    assert job.newest() == news


def uncertain(rank: int, errors: dict[int, float]) -> RankEstimate:
    """An estimate whose times are known so badly at these clocks."""
    made = rank_estimate(rank)
    for row in made.estimate["instructions"]:
        row[3] = errors.get(row[1], 0.0001) * row[2]
    return made


def publish_uncertain(job: Job, errors: dict[int, float], rounds: int = 1) -> None:
    for number in range(rounds):
        for rank in range(2):
            job.exchange.publish(estimate_key(number, rank), uncertain(rank, errors).model_dump())


def test_times_known_badly_are_measured_in_a_round_in_pairs(job: Job) -> None:
    publish_uncertain(job, {CLOCKS_MHZ[1]: 0.03})
    job.step()
    news = job.newest()
    assert (news.action, news.paired) == ("sweep", True)
    assert news.clocks_mhz[0] == CLOCKS_MHZ[0]
    assert sorted(news.clocks_mhz, reverse=True) == list(CLOCKS_MHZ)
    for rank in range(2):
        job.exchange.publish(estimate_key(1, rank), rank_estimate(rank).model_dump())
    job.iteration = news.switch + 4 * 2 * (len(CLOCKS_MHZ) - 1)
    job.iteration -= 1
    job.step()
    assert job.planner.requests == [], "two blocks for every clock"
    job.iteration += 1
    job.step()
    assert len(job.planner.requests) == 1


def test_an_iteration_in_pairs_is_no_iteration_at_full_clocks(job: Job) -> None:
    job.run(Sweep(0, CLOCKS_MHZ[0], kept=True, round=1, paired=True), 3 * FULL_S)
    assert job.coordinator.state.times.full_s is None


def test_a_clock_whose_time_stays_uncertain_is_not_planned_with(job: Job, heard: pytest.LogCaptureFixture) -> None:
    publish_uncertain(job, {CLOCKS_MHZ[1]: 0.03}, rounds=2)
    job.step()
    job.iteration += 100
    job.step()
    (request,) = job.planner.requests
    for rows in request.profile.table.values():
        assert CLOCKS_MHZ[1] not in {row.frequency_mhz for row in rows}
        assert len(rows) == len(CLOCKS_MHZ) - 1
    assert "times of 2 of" in heard.text
    saved = load_profile(job.folder / "profile.csv")
    assert len(saved.table[0, "forward"]) == len(CLOCKS_MHZ), "what was measured is kept whole"


def test_where_no_clock_is_known_the_job_stays_at_full_clocks_and_says_why(
    job: Job, heard: pytest.LogCaptureFixture
) -> None:
    publish_uncertain(job, dict.fromkeys(CLOCKS_MHZ, 0.03), rounds=2)
    job.step()
    job.iteration += 100
    job.step()
    assert job.newest().action == "full"
    assert job.planner.requests == []
    assert "no clock's time is known to within 2.0 % (perseus.profiling.max_time_error), but to 3.0 %" in heard.text


def test_how_well_a_clock_is_known_is_said_of_all_kinds_that_need_it(job: Job, heard: pytest.LogCaptureFixture) -> None:
    for number in range(2):
        for rank in range(2):
            told = uncertain(rank, dict.fromkeys(CLOCKS_MHZ, 0.03))
            for row in told.estimate["instructions"]:
                if row[0] == "forward":
                    row[3] = 0.001 * row[2]
            job.exchange.publish(estimate_key(number, rank), told.model_dump())
    job.step()
    job.iteration += 100
    job.step()
    assert "is known to within 2.0 % (perseus.profiling.max_time_error), but to 3.0 % at best" in heard.text


def test_after_so_many_rounds_what_is_not_known_stays_at_full_clock(job: Job) -> None:
    for round_number in range(2):
        for rank in range(2):
            job.exchange.publish(estimate_key(round_number, rank), vague(rank).model_dump())
    job.step()
    assert job.newest().action == "sweep"
    job.iteration += 100
    job.step()
    assert job.planner.requests[0].full_clock_only == {
        (stage, kind) for stage in range(2) for kind in ("forward", "backward")
    }


def test_a_new_target_does_not_wait_for_what_the_planner_works_on(job: Job) -> None:
    job.following()
    job.schedule = "B"
    job.run(Follow(1), FULL_S, 2)
    before = len(job.planner.requests)
    assert job.planner.requests[-1].schedule == "B"
    job.exchange.append(TARGETS, {"slowdown": 0.2})
    job.step()
    assert job.planner.dropped == 1
    job.step()
    assert [one.target for one in job.planner.requests[before:]] == [Target.slowdown(0.2)]
    job.exchange.append(TARGETS, {"slowdown": 0.3})
    job.step()
    assert job.planner.dropped == 1, "a quick plan is there in milliseconds"
    for _ in range(2):
        job.planner.finish()
        job.step()
    assert job.coordinator.state.goal.wish == Target.slowdown(0.3)
    assert job.planner.requests[-1].schedule == "B", "what made room is asked for again"


def test_a_first_plan_that_is_not_wanted_any_more_is_not_waited_for(job: Job) -> None:
    job.measured()
    job.step()
    assert job.planner.dropped == 0, "the same again waits"
    job.exchange.append(TARGETS, {"slowdown": 0.2})
    for _ in range(3):
        job.step()
    assert job.planner.dropped == 1
    assert [one.target for one in job.planner.requests] == [Target.slowdown(), Target.slowdown(0.2)]


def test_nothing_happens_while_the_planner_works(job: Job) -> None:
    job.measured()
    for _ in range(5):
        job.run(FullClock("planning"), FULL_S)
    assert job.news is None
    assert len(job.planner.requests) == 1


def test_a_plan_reaches_every_rank_before_the_iteration_it_begins_at(job: Job) -> None:
    job.following()
    news = job.newest()
    assert (news.sequence, news.action, news.version, news.recheck) == (1, "follow", 1, False)
    assert news.switch >= job.iteration + 2, "every rank looks for news once per iteration"
    plan = job.coordinator.plan
    assert plan is not None
    assert plan.saving > 0.02
    for stage in range(2):
        part = parts_of(job.exchange, 1, stage)["A"]
        computations = [op for op in SCHEDULES["A"](stage) if isinstance(op, Compute)]
        assert part.schedule == "A"
        assert list(part.clocks_mhz) == plan.clocks_mhz(stage)
        assert [p.instruction.kind for p in plan.stages[stage]] == [op.kind for op in computations]
        true = {(kind, m.frequency_mhz): m.time_s for s, kind, m in profile(2).rows() if s == stage}
        assert list(part.times_s) == [
            true[op.kind, clock] for op, clock in zip(computations, part.clocks_mhz, strict=True)
        ]
    assert load_plan(job.folder / "plan.json") == plan
    assert job.coordinator.state.planning_time_s == 0.1


class FakeFrontier(BackgroundFrontier):
    """Remembers what it was asked for."""

    def __init__(self, output_dir: Path) -> None:
        super().__init__(output_dir)
        self.requests: list[PlanRequest] = []

    def renew(self, request: PlanRequest) -> None:
        self.requests.append(request)


def test_every_plan_of_the_job_gets_its_frontier(tmp_path: Path) -> None:
    frontier = FakeFrontier(tmp_path)
    job = Job(tmp_path, frontier=frontier).following()
    assert [(asked.schedule, asked.pace) for asked in frontier.requests] == [("A", None)]
    job.following_b()
    assert [asked.schedule for asked in frontier.requests] == ["A", "B"]


def test_parts_are_there_before_the_news_that_names_them(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.measured()
    job.planner.finish()
    keys: list[str] = []
    publish = job.exchange.publish
    monkeypatch.setattr(job.exchange, "publish", lambda key, value: (keys.append(key), publish(key, value)))
    job.step()
    assert keys == [part_key(1, 0), part_key(1, 1), NEWS]


def test_a_plan_that_cannot_be_written_is_followed_all_the_same(job: Job, heard: pytest.LogCaptureFixture) -> None:
    job.measured()
    job.planner.finish()
    (job.folder / "plan.json").mkdir()
    job.step()
    assert job.newest().action == "follow"
    assert "cannot write plan.json" in heard.text


# What can go wrong before there is a plan.


def expect_full_clocks(job: Job, reason: str, heard: pytest.LogCaptureFixture) -> None:
    """The coordinator has given up: all ranks are told, people too, once, and it stays so."""
    news = job.newest()
    assert (news.action, news.recheck) == ("full", False)
    assert reason in news.reason
    assert heard.text.count("Training stays at full clocks.") == 1
    assert reason in heard.text
    assert job.coordinator.phase is Phase.GIVEN_UP
    job.planner.finish()
    job.run(FullClock(""), 100.0, 10)
    assert job.newest() == news
    assert job.coordinator.phase is Phase.GIVEN_UP


def test_a_rank_that_never_tells_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(reports_module.time, "monotonic", lambda: now_s)
    job = Job(tmp_path, world_size=4)
    for rank in (0, 3):
        job.exchange.publish(estimate_key(0, rank), rank_estimate(rank, 4).model_dump())
    job.step()
    now_s += 119
    job.step()
    assert job.news is None
    now_s += 2
    job.step()
    job.planner.requests.append(PlanRequest("A", [], {}, profile(), []))
    monkeypatch.setattr(job.planner, "finish", lambda: None)
    expect_full_clocks(job, "2 of 4 ranks sent no measurements within 120 s (first missing: rank 1)", heard)


def test_a_profile_that_cannot_be_used(job: Job, heard: pytest.LogCaptureFixture) -> None:
    broken = rank_estimate(1)
    broken.estimate["instructions"] = []
    job.publish_estimates(0)
    job.exchange.publish(estimate_key(0, 1), broken.model_dump())
    job.step()
    job.planner.requests.append(PlanRequest("A", [], {}, profile(), []))
    job.planner.error = "unused"
    expect_full_clocks(job, "the profile cannot be used: stage 1", heard)
    assert "A restarted job of the same sort does not profile again; remove profile-failed.json" in heard.text
    assert (job.folder / "profile-failed.json").is_file()


def test_a_profile_that_cannot_be_saved_is_planned_on_all_the_same(job: Job, heard: pytest.LogCaptureFixture) -> None:
    (job.folder / "profile.csv").mkdir()
    job.publish_estimates(0, 1)
    job.step()
    assert "profile.csv" in heard.text
    assert job.coordinator.phase is Phase.PLANNING


def test_a_plan_that_does_not_exist(job: Job, heard: pytest.LogCaptureFixture) -> None:
    job.measured()
    job.planner.error = "deadline: too short"
    job.planner.finish()
    job.step()
    expect_full_clocks(job, "there is no plan: deadline: too short", heard)


@pytest.mark.parametrize("state", ["measuring", "planning", "following", "rechecking"])
def test_trouble_of_one_rank_sends_all_to_full_clocks(job: Job, state: str, heard: pytest.LogCaptureFixture) -> None:
    {"measuring": lambda: job, "planning": job.measured, "following": job.following, "rechecking": job.dropped}[state]()
    job.exchange.publish(TROUBLE, Trouble(rank=1, reason="no permission").model_dump())
    job.step()
    assert job.newest().switch == job.iteration + 2
    job.planner.requests.append(PlanRequest("A", [], {}, profile(), []))
    job.planner.error = "unused"
    expect_full_clocks(job, "rank 1: no permission", heard)


# Watching the plan.


def test_iterations_as_long_as_expected_keep_the_plan(job: Job) -> None:
    job.following()
    expected_s = job.expected_s()
    assert expected_s == pytest.approx(FULL_S), "no slowdown was asked for"
    job.run(Follow(1), 1.04 * expected_s, 20)
    assert job.coordinator.phase is Phase.FOLLOWING
    assert job.newest().sequence == 1


def test_an_allowed_slowdown_is_expected(tmp_path: Path) -> None:
    job = Job(tmp_path, slowdown=0.5).following()
    assert job.expected_s() == pytest.approx(1.5 * FULL_S)


def test_single_slow_iterations_keep_the_plan(job: Job) -> None:
    job.following()
    for _ in range(10):
        job.run(Follow(1), FULL_S, 2)
        job.run(Follow(1), 5 * FULL_S, 1)
    assert job.coordinator.phase is Phase.FOLLOWING


@pytest.mark.parametrize("why", ["disturbed", "incomplete", "another plan", "full clocks"])
def test_iterations_that_say_nothing_of_the_plan_keep_it(job: Job, why: str) -> None:
    job.following()
    for _ in range(10):
        seen = record(job.iteration, schedule="A", undisturbed=why != "disturbed")
        seen.end_s = seen.begin_s + 5 * FULL_S
        if why == "incomplete":
            seen.ends_s.pop()
        directive = {"another plan": Follow(7), "full clocks": FullClock("")}.get(why, Follow(1))
        job.coordinator.saw(directive, seen)
        job.step()
    assert job.coordinator.phase is Phase.FOLLOWING


def test_iterations_too_long_drop_the_plan_and_measure_anew(job: Job, heard: pytest.LogCaptureFixture) -> None:
    job.dropped()
    news = job.newest()
    assert (news.sequence, news.action, news.recheck) == (2, "full", True)
    assert news.switch == job.iteration + 2
    assert "instead of" in news.reason
    assert "back to full clocks" in heard.text
    assert job.coordinator.state.dropped == 1


def test_a_plan_that_does_not_hold_is_made_anew_with_more_margin(job: Job) -> None:
    job.dropped(excess=0.2)
    job.rechecked(1.0)
    job.run(FullClock(""), FULL_S, PATIENCE)
    assert job.coordinator.phase is Phase.PLANNING
    first, second = job.planner.requests
    assert first.margin == 0.01
    assert second.margin == pytest.approx(0.01 + 0.2)
    assert second.profile == first.profile
    job.planner.finish()
    job.step()
    news = job.newest()
    assert (news.sequence, news.action, news.version) == (3, "follow", 2)
    assert parts_of(job.exchange, 2, 1)["A"].version == 2
    assert (news.since, job.exchange.fetch(part_key(1, 0))) == (news.switch, None)


def test_a_job_that_became_slower_is_planned_for_as_it_is_now(job: Job, heard: pytest.LogCaptureFixture) -> None:
    job.dropped(excess=0.5)
    job.rechecked(1.5)
    job.run(FullClock(""), 1.5 * FULL_S, PATIENCE)
    first, second = job.planner.requests
    assert second.margin == first.margin
    assert "the job itself is slower" in heard.text
    for (_, _, new), (_, _, old) in zip(second.profile.rows(), first.profile.rows(), strict=True):
        assert new.time_s == pytest.approx(1.5 * old.time_s)
    job.planner.finish()
    job.step()
    assert job.expected_s() == pytest.approx(1.5 * FULL_S)
    job.run(Follow(2), 1.5 * FULL_S, 10)
    assert job.coordinator.phase is Phase.FOLLOWING


def test_iterations_still_under_the_plan_are_no_recheck(job: Job) -> None:
    job.dropped()
    job.rechecked(1.0)
    job.run(Follow(1), 5 * FULL_S, PATIENCE)
    assert job.coordinator.phase is Phase.RECHECKING
    job.run(FullClock(""), 5 * FULL_S, PATIENCE, undisturbed=False)
    assert job.coordinator.phase is Phase.RECHECKING


def test_a_rank_that_rechecks_late_is_waited_for_a_while(job: Job) -> None:
    job.dropped()
    job.run(FullClock(""), FULL_S, 4 * PATIENCE - 1)
    assert job.coordinator.phase is Phase.RECHECKING
    job.run(FullClock(""), FULL_S)
    assert job.coordinator.phase is Phase.PLANNING
    assert job.planner.requests[1].profile == job.planner.requests[0].profile


def test_after_so_many_dropped_plans_the_job_stays_at_full_clocks(job: Job, heard: pytest.LogCaptureFixture) -> None:
    job.following()
    for dropped in range(1, 4):
        expected_s = job.expected_s()
        job.run(Follow(dropped), 1.2 * expected_s, PATIENCE)
        assert job.coordinator.state.dropped == dropped
        if dropped < 3:
            job.rechecked(1.0, sequence=2 * dropped)
            job.run(FullClock(""), FULL_S, PATIENCE)
            job.planner.finish()
            job.step()
            assert job.newest().version == dropped + 1
    expect_full_clocks(job, "under the plan", heard)


# Watching the plan by references.


def publish_windows(job: Job, since: int, slower: float, blocks: int = 5) -> None:
    """What both ranks saw of blocks of references and iterations under plans that make them so much longer."""
    for rank in range(2):
        windows = []
        for block in range(blocks):
            seen = tuple(
                Seen(
                    iteration=20 * block + number,
                    reference=number in (4, 5),
                    schedule="A",
                    time_s=FULL_S * (1 + 0.001 * (number % 3)) * (1 if number in (4, 5) else 1 + slower),
                    energy_j=100.0,
                )
                for number in range(12)
            )
            windows.append(RankWindow(since=since, block=block, seen=seen))
        job.exchange.publish(windows_key(rank), RankWindows(replica=0, windows=tuple(windows)).model_dump())


@pytest.fixture
def referring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    job = Job(tmp_path, reference_share=0.02)
    monkeypatch.setattr(job.coordinator.comparison, "_look_due_s", -1e9)
    monkeypatch.setattr(comparison_module, "_LOOK_EVERY_S", 0.0)
    return job.following()


def test_a_plan_that_references_show_to_be_slow_is_made_anew_with_that_much_more_margin(
    referring: Job, heard: pytest.LogCaptureFixture
) -> None:
    job = referring
    publish_windows(job, job.newest().since, slower=0.2)
    job.step()
    assert job.coordinator.phase is Phase.RECHECKING
    news = job.newest()
    assert (news.action, news.recheck) == ("full", True)
    assert "longer than at full clocks on the same work: back to full clocks" in heard.text
    job.rechecked(1.5)
    job.run(FullClock(""), 1.5 * FULL_S, PATIENCE)
    assert "the job itself is slower" not in heard.text, "the plan was too slow, whatever else has changed"
    assert job.planner.requests[-1].margin == pytest.approx(0.01 + 0.2, abs=0.003)
    job.planner.finish()
    job.step()
    again = job.newest()
    assert (again.action, again.since) == ("follow", again.switch), "references count anew"
    publish_windows(job, news.since, slower=0.2)
    job.step()
    assert job.coordinator.phase is Phase.FOLLOWING, "what was seen of the plans before says nothing of these"


@pytest.mark.parametrize("slower", [-0.1, 0.0, 0.005])
def test_a_plan_that_references_show_to_hold_is_kept_however_long_iterations_become(
    referring: Job, slower: float
) -> None:
    job = referring
    publish_windows(job, job.newest().since, slower=slower)
    for number in range(100):
        job.run(Follow(1, since=job.newest().since), FULL_S * (1 + number / 50))
    assert (job.coordinator.phase, job.coordinator.state.dropped) == (Phase.FOLLOWING, 0)
    assert job.coordinator.comparison.compared.time is not None


def test_a_slow_plan_of_larger_steps_is_dropped_and_larger_steps_are_not(job: Job) -> None:
    job.following()
    for number in range(30):
        size = (1.0, 1.3, 1.6)[number % 3]
        seen = record(job.iteration, schedule="A")
        seen.end_s = seen.begin_s + size * FULL_S
        job.coordinator.saw(Follow(1), seen, size)
        job.iteration += 1
        job.step()
    assert job.coordinator.state.dropped == 0
    for _ in range(PATIENCE):
        seen = record(job.iteration, schedule="A")
        seen.end_s = seen.begin_s + 1.2 * 1.6 * FULL_S
        job.coordinator.saw(Follow(1), seen, 1.6)
        job.step()
    assert job.coordinator.state.dropped == 1


# Schedules that change.


def test_a_changed_schedule_gets_a_plan_and_the_old_one_is_kept(job: Job) -> None:
    job.following()
    part_of_a = parts_of(job.exchange, 1, 0)["A"]
    job.schedule = "B"
    job.step()
    assert [request.schedule for request in job.planner.requests] == ["A", "B"]
    assert job.newest().sequence == 1, "ranks themselves run what no plan fits at full clocks"
    job.planner.finish()
    job.step()
    news = job.newest()
    assert (news.action, news.version) == ("follow", 2)
    assert {key: part.version for key, part in parts_of(job.exchange, 2, 0).items()} == {"A": 1, "B": 2}
    assert parts_of(job.exchange, 2, 0)["A"] == part_of_a
    assert news.since == job.iteration + 2, "both rest on one survey"
    job.run(Follow(2), FULL_S, 40)
    plan_b = job.coordinator.plan
    assert plan_b is not None
    assert plan_b.microbatches == 8
    job.schedule = "A"
    job.run(Follow(2), FULL_S, 40)
    assert job.newest() == news, "ranks pick the plan by the schedule: nobody need be told"
    assert len(job.planner.requests) == 2, "there is a plan for it already"
    assert load_plan(job.folder / "plan.json").microbatches == 4


def test_a_plan_for_another_schedule_is_judged_by_that_schedules_time(job: Job) -> None:
    job.following()
    plan_a = job.coordinator.plan
    job.following_b()
    plan_b = job.coordinator.plan
    assert plan_a is not None
    assert plan_b is not None
    ratio = plan_b.baseline_time_s / plan_a.baseline_time_s
    assert ratio > 1.5
    assert job.expected_s() == pytest.approx(ratio * FULL_S)
    job.run(Follow(2), ratio * FULL_S, 10)
    assert job.coordinator.phase is Phase.FOLLOWING


def test_each_iteration_is_judged_by_its_own_schedule(job: Job) -> None:
    job.following().following_b()
    longer_s = job.expected_s()
    for _ in range(10):
        job.schedule = "B"
        job.run(Follow(2), longer_s, PATIENCE)
        job.schedule = "A"
        job.run(Follow(2), FULL_S, PATIENCE - 1)
    assert job.coordinator.state.dropped == 0
    job.run(Follow(2), longer_s, PATIENCE)
    assert job.coordinator.state.dropped == 1, "for this schedule it is too long"


def test_a_schedule_that_changes_while_planning_is_planned_next(job: Job) -> None:
    job.measured()
    job.schedule = "B"
    job.run(FullClock("planning"), FULL_S)
    assert len(job.planner.requests) == 1
    job.planner.finish()
    job.step()
    job.step()
    assert [request.schedule for request in job.planner.requests] == ["A", "B"]
    assert job.newest().version == 1


def mixed(job: Job, microbatches: Sequence[int]) -> None:
    """A sweep whose iterations take turns at these microbatch counts; each count's time is what the graph says."""
    for count in microbatches:
        job.schedule = str(count)
        job.run(Sweep(0, CLOCKS_MHZ[0], kept=True), mixed_s(count))
    job.publish_estimates(0, 1)
    job.step()


def mixed_s(count: int) -> float:
    return 0.039 * (count + 1)


def test_microbatch_counts_that_take_turns_are_all_planned_for(job: Job) -> None:
    counts = list(range(2, 9))
    mixed(job, [*counts, *counts])
    job.planner.finish()
    job.step()
    first = job.newest()
    for _ in range(len(counts) + 1):
        job.planner.finish()
        job.step()
    asked = [request.schedule for request in job.planner.requests]
    assert sorted(asked) == [str(count) for count in counts], "each of them once"
    assert asked[0] == "8", "the newest first"
    news = job.newest()
    assert (news.action, news.since) == ("follow", first.switch), "plans that rest on one survey"
    assert sorted(parts_of(job.exchange, news.version, 0)) == sorted(asked)
    held = [v for v in range(1, 50) if job.exchange.fetch(part_key(v, 0)) is not None]
    assert len(held) <= 2, "the store does not grow with every set"
    for number in range(60):
        count = counts[number * 3 % len(counts)]
        job.schedule = str(count)
        job.run(Follow(news.version, since=news.since), 1.02 * mixed_s(count))
    assert (job.coordinator.state.dropped, job.newest()) == (0, news)
    scale = job.coordinator.full_clock_scale()
    assert scale is not None
    assert scale[0] == pytest.approx(1.0, rel=0.1), "the same counts, about as often"
    predicted = job.coordinator.predicted()
    assert predicted is not None
    assert 0.8 < predicted.energy_ratio < 0.98
    assert predicted.time_ratio == pytest.approx(1.0, abs=0.01)
    assert predicted.saving is not None, "the profile's errors are known"
    assert predicted.saving[0] <= 1 - predicted.energy_ratio <= predicted.saving[1]


def test_plans_that_do_not_hold_are_dropped_though_every_iteration_has_another_schedule(job: Job) -> None:
    mixed(job, [2, 3, 4, 5, 2, 3, 4, 5])
    for _ in range(6):
        job.planner.finish()
        job.step()
    news = job.newest()
    for count in (2, 5, 3, 4):
        job.schedule = str(count)
        job.run(Follow(news.version, since=news.since), 1.2 * mixed_s(count))
    assert job.coordinator.state.dropped == 1


def test_more_schedules_than_are_planned_for_are_said_once(job: Job, heard: pytest.LogCaptureFixture) -> None:
    counts = list(range(2, 20))
    mixed(job, counts)
    for _ in range(30):
        job.planner.finish()
        job.step()
    assert len(job.planner.requests) == 16
    assert heard.text.count("more than 16 schedules take turns") == 1
    assert len(parts_of(job.exchange, job.newest().version, 1)) == 16


def test_a_schedule_that_has_not_run_for_long_does_not_take_a_turn(job: Job) -> None:
    told = {str(microbatches): SCHEDULES[str(microbatches)] for microbatches in range(2, 19)}

    def run(key: str) -> None:
        job.coordinator.use_schedules(told, (key, told[key]))
        job.coordinator.saw(FullClock("planning"), record(job.iteration, schedule=key))
        job.iteration += 1

    for key in told:
        run(key)
    assert job.coordinator.state.schedules.too_many, "17 of them"
    for _ in range(300):
        run("18")
    assert job.coordinator.state.schedules.newest == "18"
    assert not job.coordinator.state.schedules.too_many


def test_a_schedule_without_a_plan_leaves_the_others_theirs(job: Job, heard: pytest.LogCaptureFixture) -> None:
    job.following()
    job.schedule = "B"
    job.planner.error = "limits: too tight"
    job.step()
    job.planner.finish()
    job.step()
    assert job.coordinator.phase is Phase.FOLLOWING
    assert (job.newest().action, job.newest().version) == ("follow", 1)
    assert heard.text.count("there is no plan for B: limits: too tight. Its iterations run at full clocks") == 1
    job.run(Follow(1), FULL_S, 5, undisturbed=False)
    assert len(job.planner.requests) == 2, "it is not asked for again"


def test_an_answer_to_what_does_not_hold_any_more_is_thrown_away(job: Job) -> None:
    job.following()
    expected_s = job.expected_s()
    job.schedule = "B"
    job.step()
    job.schedule = "A"
    job.run(Follow(1), 1.3 * expected_s, PATIENCE)
    assert job.coordinator.phase is Phase.RECHECKING
    job.planner.finish()  # for B, on the old measurements
    job.step()
    assert job.newest().action == "full"
    job.rechecked(1.0, sequence=job.newest().sequence)
    job.run(FullClock(""), FULL_S, PATIENCE)
    assert [request.schedule for request in job.planner.requests] == ["A", "B", "A"]


def test_after_a_replan_plans_of_other_schedules_are_made_anew(job: Job) -> None:
    """They rest on the survey that has been corrected since."""
    job.following().following_b()
    expected_s = job.expected_s()
    job.run(Follow(2), 1.2 * expected_s, PATIENCE)
    job.rechecked(1.2, sequence=job.newest().sequence)
    job.run(FullClock(""), 1.2 * expected_s, PATIENCE)
    job.planner.finish()
    job.step()
    job.step()
    assert [request.schedule for request in job.planner.requests] == ["A", "B", "B", "A"]
    assert job.planner.requests[-1].profile == job.planner.requests[-2].profile


def test_a_dropped_plan_of_a_longer_schedule_gets_margin_too(job: Job) -> None:
    job.following().following_b()
    full_b_s = job.expected_s()
    job.run(Follow(2), 1.2 * full_b_s, PATIENCE)
    job.rechecked(1.0, sequence=job.newest().sequence)
    job.run(FullClock(""), full_b_s, PATIENCE)  # at full clocks all is as it was
    assert job.planner.requests[-1].margin == pytest.approx(0.21)


def test_a_schedule_that_changed_right_after_the_sweep_is_not_judged_by_the_old_ones_time(job: Job) -> None:
    for _ in range(4):
        job.run(Sweep(0, CLOCKS_MHZ[0], kept=True), FULL_S)
    job.schedule = "B"
    job.publish_estimates(0, 1)
    job.step()
    job.planner.finish()
    job.step()
    job.run(Follow(1), 1.8 * FULL_S, 10)  # twice the microbatches
    assert job.coordinator.state.dropped == 0


def test_a_schedule_that_changes_during_a_recheck_is_not_mixed_up(job: Job) -> None:
    job.dropped()
    job.rechecked(1.0)
    job.run(FullClock(""), FULL_S, 1)
    job.schedule = "B"
    job.run(FullClock(""), 1.8 * FULL_S, PATIENCE + 1)
    assert job.planner.requests[-1].margin == pytest.approx(0.21)


# Plans are held against measured iterations.


def test_a_plan_is_replayed_over_the_iterations_that_ranks_have_published(
    job: Job, heard: pytest.LogCaptureFixture
) -> None:
    job.publish_durations(0.002)
    job.following()
    assert job.planner.requests[0].samples is not None
    assert job.planner.requests[0].quantile == 0.9
    assert "replayed over 12 measured iterations" in heard.text
    replayed = job.coordinator.state.replayed["A"]
    assert replayed is not None
    assert replayed.saving_mean > 0.02


def test_where_nothing_holds_the_job_stays_at_full_clocks_and_says_why(
    job: Job, heard: pytest.LogCaptureFixture
) -> None:
    job.publish_durations(0.8)
    job.following()
    assert "nothing can be saved for A" in heard.text
    assert "varies by" in heard.text
    for stage in range(2):
        assert set(parts_of(job.exchange, 1, stage)["A"].clocks_mhz) == {CLOCKS_MHZ[0]}
    assert job.coordinator.phase is Phase.FOLLOWING


def test_what_ranks_need_to_catch_up_travels_with_the_plan(tmp_path: Path) -> None:
    job = Job(tmp_path, limits={"switch_latency_s": 0.01})
    job.publish_durations(0.0)
    job.measured()
    asked = job.planner.requests[0]
    assert asked.catch_up
    assert asked.latency_s == 0.01
    # As without samples, where ranks catch up in any case.
    job.planner.answer = answer_to(dataclasses.replace(asked, samples=None))
    job.step()
    for stage in range(2):
        part = parts_of(job.exchange, 1, stage)["A"]
        assert part.catch_up is not None
        assert len(part.catch_up.latest_starts_s) == len(part.clocks_mhz)
        assert part.catch_up.dwell_s == 0.02


def test_ranks_that_have_measured_no_starts_do_not_catch_up(job: Job) -> None:
    job.following()
    assert not job.planner.requests[0].catch_up
    assert parts_of(job.exchange, 1, 0)["A"].catch_up is None


def reviewed(job: Job, spread: float) -> None:
    """Iterations go by under the plan until it is looked at again."""
    job.publish_durations(spread, first=1000)
    job.run(Follow(1), FULL_S, 101, undisturbed=False)
    assert job.planner.requests[-1].in_force is not None
    job.planner.finish()
    job.step()


def test_a_plan_that_holds_over_newer_iterations_stays(job: Job) -> None:
    job.publish_durations(0.002)
    job.following()
    before = job.newest()
    reviewed(job, 0.002)
    assert job.newest() == before
    assert len(job.planner.requests) == 2


def test_a_plan_that_does_not_hold_over_newer_iterations_is_tightened(
    job: Job, heard: pytest.LogCaptureFixture
) -> None:
    job.publish_durations(0.0)
    job.following()
    before = job.coordinator.plan
    assert before is not None
    reviewed(job, 0.2)
    assert "would not have kept to its time" in heard.text
    after = job.coordinator.plan
    assert after is not None
    assert after is not before
    assert after.energy_j > before.energy_j
    assert job.newest().version == 2
    assert job.coordinator.state.dropped == 0


def test_the_same_clocks_with_another_way_to_catch_up_come_into_force(job: Job) -> None:
    job.publish_durations(0.0)
    job.following()
    before = job.coordinator.plan
    assert before is not None
    assert parts_of(job.exchange, 1, 0)["A"].catch_up is None
    job.publish_durations(0.0, first=1000)
    job.run(Follow(1), FULL_S, 101, undisturbed=False)
    # That plan does not hold any more, but does if late ranks catch up.
    asked = dataclasses.replace(job.planner.requests[-1], samples=None, in_force=None)
    late = answer_to(asked)
    assert late.catch_up
    job.planner.answer = dataclasses.replace(late, plan=before)
    job.step()
    assert parts_of(job.exchange, job.newest().version, 0)["A"].catch_up is not None


def looked_at(job: Job, first: int) -> None:
    """Iterations that do not vary go by, and the planner looks at them."""
    job.publish_durations(0.0, first=first)
    job.run(Follow(1), FULL_S, 101, undisturbed=False)
    job.planner.finish()
    job.step()


@pytest.mark.parametrize("spread", [0.1, 0.8])
def test_a_plan_made_from_iterations_that_varied_more_makes_room_for_a_bolder_one(
    job: Job, heard: pytest.LogCaptureFixture, spread: float
) -> None:
    """Full clocks too, where nothing could be promised at first."""
    job.publish_durations(spread)
    job.following()
    before = job.coordinator.plan
    assert before is not None
    assert ("nothing can be saved" in heard.text) == (spread > 0.5)
    looked_at(job, 1000)
    looked_at(job, 2000)
    after = job.coordinator.plan
    assert after is not None
    assert after.energy_j < before.energy_j - 0.005 * before.baseline_energy_j
    assert ("there is a better one" in heard.text) == (spread < 0.5)
    replayed = job.coordinator.state.replayed["A"]
    assert replayed is not None
    assert replayed.margin == 0.01


def test_a_plan_is_not_looked_at_without_iterations_to_hold_it_against(job: Job) -> None:
    job.following()
    job.run(Follow(1), FULL_S, 150, undisturbed=False)
    assert len(job.planner.requests) == 1

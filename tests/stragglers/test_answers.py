"""The coordinator and stragglers: who is slow, what is planned, what all ranks are told."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.exchange.messages import (
    NEWS,
    STRAGGLERS,
    TROUBLE,
    PlanPart,
    RankStats,
    Recheck,
    Trouble,
    estimate_key,
    part_key,
    recheck_key,
    stats_key,
)
from perseus_plugin.exchange.store import ExchangeError, LocalExchange
from perseus_plugin.iteration.timetable import Follow, FullClock, Sweep
from perseus_plugin.leader.state import Phase
from perseus_plugin.planning.process import PlanAnswer, pace_for, plan_for
from perseus_plugin.stragglers.book import DETECTION, Report, StragglerError
from perseus_plugin.stragglers.external import ExternalFigures
from perseus_plugin.stragglers.situation import Answers
from tests.factories import CLOCKS_MHZ, placement, profile, rank_estimate
from tests.leader.rank_zero import FULL_S, PATIENCE, FakePlanner, RankZero, parts_of

INTERVAL_S = 10.0
TOLERANCE = 0.05
WINDOW = 8
DETECTION_TAKES = 6  # iterations of half a second and more, in which ranks tell each other of their paces


class Noting(LocalExchange):
    """Notes what is published: key and size."""

    def __init__(self) -> None:
        super().__init__()
        self.published: list[tuple[str, int]] = []

    def publish(self, key: str, value: Any) -> None:
        self.published.append((key, len(json.dumps(value))))
        super().publish(key, value)


class Planner(FakePlanner):
    """Answers stragglers too."""

    def finish(self) -> None:
        request = self.requests[-1]
        if self.error:
            self.answer = PlanAnswer(None, 0.1, self.error)
        elif request.pace is None:
            self.answer = PlanAnswer(plan_for(request), 0.1)
        else:
            self.answer = PlanAnswer(None, 0.2, "", pace_for(request))


class Job(RankZero):
    """Two stages; rank r is stage r % 2 of replica r // 2, or with shards one of them."""

    def __init__(
        self,
        folder: Path,
        replicas: int = 2,
        shards: int = 1,
        exchange: LocalExchange | None = None,
        refiner: FakePlanner | None = None,
        **stragglers: Any,
    ) -> None:
        block = {
            "watch": {"patience": PATIENCE, "tolerance": TOLERANCE, "max_replans": 2, "reference_share": 0},
            "stragglers": {"min_interval_s": INTERVAL_S, "window": WINDOW, **stragglers},
        }
        size = 2 * replicas * shards
        super().__init__(
            folder, block, world_size=size, shards=shards, exchange=exchange, planner=Planner(), refiner=refiner
        )
        self.desk = self.coordinator.stragglers
        for rank in range(self.world_size):
            where = placement(rank // shards, self.world_size).model_copy(update={"rank": rank, "shards": shards})
            stats = RankStats(placement=where, totals={})
            self.exchange.publish(stats_key(rank), stats.model_dump())

    def following(self) -> Job:
        for _ in range(4):
            self.run(Sweep(0, CLOCKS_MHZ[0], kept=True), FULL_S)
        for rank in range(self.world_size):
            self.exchange.publish(estimate_key(0, rank), rank_estimate(rank, self.world_size).model_dump())
        self.step()
        self.answer()
        assert self.coordinator.phase is Phase.FOLLOWING
        return self

    def answer(self) -> None:
        """The planner answers what it was asked."""
        self.planner.finish()
        self.step()

    def tell(self, rank: int, slowdown: float | None = None, **more: Any) -> None:
        """A rank appends a report to the list."""
        more.setdefault("source", "python")
        self.exchange.append(STRAGGLERS, Report(rank=rank, slowdown=slowdown, **more).model_dump())

    def seen(self, rank: int, slowdown: float) -> None:
        self.tell(rank, slowdown, source=DETECTION)

    def answered(self, rank: int = 3, slowdown: float = 1.25) -> Job:
        """Up to the answer to one slow rank."""
        self.following()
        self.tell(rank, slowdown)
        self.step()
        self.answer()
        return self

    def later(self, seconds: float = INTERVAL_S) -> None:
        self.now_s += seconds
        self.step()

    @property
    def answers(self) -> Answers:
        return self.coordinator.state.answers

    def part(self, version: int, stage: int) -> PlanPart:
        """Of the schedule in force."""
        return parts_of(self.exchange, version, stage)[self.schedule]

    def events(self) -> list[dict[str, Any]]:
        """What has to do with stragglers."""
        events = map(json.loads, (self.folder / "events.jsonl").read_text().splitlines())
        return [event for event in events if event["event"] not in ("goal", "plan")]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "perseus_plugin")
    logging.getLogger("perseus_plugin").propagate = True
    return caplog


# A slow pipeline.


def test_a_slow_replica_gets_a_plan_of_its_own_and_the_others_its_pace(job: Job) -> None:
    job.following()
    own = job.coordinator.plan
    assert own is not None
    job.tell(3, 1.25)  # stage 1 of replica 1
    job.step()
    request = job.planner.requests[-1]
    assert request.pace is not None
    assert request.pace.variants == ((1.0, 1.0), (1.0, 1.25))
    assert request.pace.clocks_mhz == tuple(tuple(own.clocks_mhz(stage)) for stage in range(2))
    assert job.newest().sequence == 1, "nothing changes while it is being planned for"
    job.answer()
    news = job.newest()
    assert (news.action, news.straggler, news.switch) == ("follow", True, job.iteration + 2)
    assert {replica: news.version_for(replica) for replica in range(3)} == {0: 2, 1: 3, 2: 2}
    fast, slow = job.part(2, 1), job.part(3, 1)
    assert sum(fast.clocks_mhz) < sum(own.clocks_mhz(1)), "the fast replica slows down"
    # The part of the slow stage says how long its instructions take now.
    times = {m.frequency_mhz: m.time_s for m in profile().table[1, "forward"]}
    assert slow.slowdown == 1.25
    assert slow.times_s[0] == pytest.approx(1.25 * times[slow.clocks_mhz[0]])
    assert (fast.slowdown, job.part(3, 0).slowdown) == (1.0, 1.0)
    assert job.coordinator.plan is own, "the job's own plan is what it goes back to"


def test_news_do_not_grow_with_the_job(tmp_path: Path) -> None:
    published = []
    for replicas in (2, 40):
        folder = tmp_path / str(replicas)
        folder.mkdir()
        exchange = Noting()
        job = Job(folder, replicas, exchange=exchange).following()
        job.tell(3, 1.25)
        exchange.published.clear()
        job.step()
        job.answer()
        published.append(list(exchange.published))
    assert [key for key, _ in published[0]] == [*(part_key(v, s) for v in (2, 3) for s in range(2)), NEWS]
    assert published[0] == published[1]


def test_recovery_goes_back_to_the_plan_there_was(job: Job) -> None:
    job.answered()
    requests = len(job.planner.requests)
    job.tell(3, 1.0)
    job.later()
    news = job.newest()
    assert (news.version, news.variants, news.straggler) == (1, {}, False)
    assert len(job.planner.requests) == requests, "it is known already"
    assert job.coordinator.phase is Phase.FOLLOWING


def test_a_pace_that_was_planned_before_is_found_again_even_for_another_replica(job: Job) -> None:
    job.answered(rank=3, slowdown=1.25)
    job.tell(3, 1.0)
    job.later()
    requests = len(job.planner.requests)
    job.tell(1, 1.2549)  # a percent is not told apart
    job.later()
    assert len(job.planner.requests) == requests
    assert {replica: job.newest().version_for(replica) for replica in range(2)} == {0: 3, 1: 2}


def test_several_at_once(tmp_path: Path) -> None:
    job = Job(tmp_path, replicas=4).following()
    job.tell(3, 1.25)
    job.tell(5, 1.25)
    job.tell(6, 1.4)
    job.tell(7, 1.1)
    job.step()
    request = job.planner.requests[-1]
    assert request.pace is not None
    assert request.pace.variants == ((1.0, 1.0), (1.0, 1.25), (1.4, 1.1))
    job.answer()
    assert [job.newest().version_for(replica) for replica in range(4)] == [2, 3, 3, 4]


def test_a_slow_stage_of_the_only_pipeline(tmp_path: Path) -> None:
    job = Job(tmp_path, replicas=1).following()
    job.seen(0, 1.5)
    job.step()
    request = job.planner.requests[-1]
    assert request.pace is not None
    assert request.pace.variants == ((1.5, 1.0),), "there is nobody else to plan for"
    job.answer()
    assert job.newest().version_for(0) == 2
    own = job.coordinator.plan
    assert own is not None
    assert sum(job.part(2, 1).clocks_mhz) < sum(own.clocks_mhz(1)), "its neighbour stops racing"


def test_a_reported_iteration_time_slows_the_others_and_leaves_that_pipeline_alone(job: Job) -> None:
    job.following()
    job.tell(3, iteration_time_s=1.3 * FULL_S)
    job.step()
    request = job.planner.requests[-1]
    assert request.pace is not None
    assert request.pace.variants == ((1.0, 1.0),)
    own = job.coordinator.plan
    assert own is not None
    assert request.pace.at_least_s == pytest.approx(1.3 * own.baseline_time_s)
    job.answer()
    assert [job.newest().version_for(replica) for replica in range(2)] == [2, 1]


def test_a_report_that_expires_is_over(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.following()
    job.tell(3, 1.25, until=time.time() + 100)
    job.step()
    job.answer()
    assert job.newest().straggler
    later = time.time() + 101
    monkeypatch.setattr(job.desk, "_now", lambda: later)
    job.later()
    assert not job.newest().straggler


def test_what_is_reported_before_there_is_a_plan_is_answered_after_it(job: Job) -> None:
    job.tell(3, 1.25)
    job.step()
    job.following()
    job.step()
    job.answer()
    assert job.newest().straggler


# Faults.


@pytest.mark.parametrize(
    "value",
    [
        None,
        "slow",
        {"rank": 99, "slowdown": 1.5, "time": 0.0},
        Report(rank=9, slowdown=1.5).model_dump(),
        Report(rank=1, slowdown=0.5).model_dump(),
        Report(rank=1, slowdown=5000.0).model_dump(),
    ],
)
def test_a_bad_report_is_refused_with_its_reason_and_changes_nothing(
    job: Job, value: Any, heard: pytest.LogCaptureFixture
) -> None:
    job.following()
    before = job.newest()
    job.exchange.append(STRAGGLERS, value)
    job.step()
    assert job.newest() == before
    assert job.coordinator.phase is Phase.FOLLOWING
    assert heard.text.count("a straggler report was refused: ") == 1
    events = job.events()
    assert [event["event"] for event in events] == ["refusal"]
    assert events[0]["reason"]
    assert job.desk.figures.refused == 1


def test_reports_that_flap_are_answered_once_per_interval(job: Job) -> None:
    job.answered()
    sequence = job.newest().sequence
    for number in range(100):  # ten times a second
        job.now_s += 0.0999
        job.tell(3, 1.0 if number % 2 == 0 else 1.25)
        job.step()
    assert job.newest().sequence == sequence
    job.tell(3, 1.0)
    job.later(0.1)
    assert job.newest().sequence == sequence + 1
    assert not job.newest().straggler
    assert len(job.planner.requests) == 2


def test_an_answer_that_cannot_be_planned_leaves_the_plan(job: Job, heard: pytest.LogCaptureFixture) -> None:
    job.following()
    job.planner.error = "no such plan"
    job.tell(3, 1.25)
    job.step()
    job.answer()
    assert job.coordinator.phase is Phase.FOLLOWING
    assert [job.newest().version_for(replica) for replica in range(2)] == [1, 1]
    assert heard.text.count("no such plan") == 1
    job.run(Follow(1), FULL_S, 20)
    assert len(job.planner.requests) == 2, "it is not asked again"


def test_a_store_that_stops_answering_is_not_swallowed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.following()

    def fail(name: str) -> list[Any]:
        raise ExchangeError("the store is gone")

    monkeypatch.setattr(job.exchange, "take_new", fail)
    with pytest.raises(ExchangeError, match="the store is gone"):
        job.step()


def test_turned_off_means_off(tmp_path: Path) -> None:
    job = Job(tmp_path, enabled=False).following()
    job.tell(3, 1.25)
    job.step()
    assert len(job.planner.requests) == 1
    with pytest.raises(StragglerError, match=r"perseus\.stragglers\.enabled is false"):
        job.desk.request({"do": "report", "report": Report(rank=3, slowdown=1.25).model_dump()})


def test_a_job_that_has_given_up_refuses_reports(job: Job) -> None:
    job.following()
    job.exchange.publish(TROUBLE, Trouble(rank=1, reason="no permission").model_dump())
    job.step()
    with pytest.raises(StragglerError, match="the job stays at full clocks: rank 1: no permission"):
        job.desk.request({"do": "report", "report": Report(rank=3, slowdown=1.25).model_dump()})
    job.tell(3, 1.25)
    job.step()
    assert job.coordinator.phase is Phase.GIVEN_UP


# The command line's requests.


def test_requests_of_the_command_line(job: Job) -> None:
    job.following()
    value = Report(rank=3, slowdown=1.25, source="cli").model_dump()
    assert job.desk.request({"do": "report", "report": value}) == {}
    assert job.woken == [True]
    assert job.desk.request({"do": "list"}) == {"reports": [value]}
    job.step()
    job.answer()
    assert job.newest().straggler
    assert job.desk.request({"do": "clear", "rank": 1}) == {"cleared": 0}
    assert job.desk.request({"do": "clear", "rank": None}) == {"cleared": 1}
    job.later()
    assert not job.newest().straggler
    for request in ({}, {"do": "dance"}, {"do": "clear", "rank": "3"}, {"do": "report"}):
        with pytest.raises(StragglerError, match="malformed request"):
            job.desk.request(request)
    with pytest.raises(StragglerError, match="the session's own"):
        job.desk.request({"do": "report", "report": {**value, "source": DETECTION}})


# With the watch over iteration times.


def test_the_watch_knows_the_new_pace(job: Job) -> None:
    job.answered()
    expected_s = job.expected_s()
    assert expected_s > 1.15 * FULL_S
    job.run(Follow(2, True), expected_s, 20)
    assert job.coordinator.state.dropped == 0
    assert job.answers.figures.iterations == 20


def test_a_pace_that_is_not_kept_is_dropped_after_all(job: Job) -> None:
    job.answered()
    expected_s = job.expected_s()
    job.run(Follow(2, True), 1.5 * expected_s, PATIENCE + WINDOW + DETECTION_TAKES)
    assert job.coordinator.phase is Phase.RECHECKING
    # What is known to be a straggler's does not get into the profile.
    sequence = job.newest().sequence
    for rank in range(4):
        factor = 1.25 if rank == 3 else 1.0
        times = {kind: factor * profile().table[rank % 2, kind][0].time_s for kind in ("forward", "backward")}
        job.exchange.publish(recheck_key(sequence, rank), Recheck(stage=rank % 2, time_s=times).model_dump())
    job.run(FullClock(""), FULL_S, PATIENCE)
    before = [(s, k, m.time_s) for s, k, m in profile().rows()]
    assert [(s, k, m.time_s) for s, k, m in job.planner.requests[-1].profile.rows()] == before
    job.answer()
    job.later()
    job.answer()
    assert job.newest().straggler, "and the straggler is planned for again"


def test_the_watch_waits_for_detection_to_speak(job: Job) -> None:
    job.following()
    job.run(Follow(1), 1.25 * FULL_S, PATIENCE + WINDOW - 1)
    assert job.coordinator.state.dropped == 0
    job.seen(3, 1.25)
    job.step()
    job.answer()
    assert job.newest().straggler
    assert job.coordinator.state.dropped == 0


def test_the_watch_waits_while_an_answer_is_not_allowed_yet(job: Job) -> None:
    job.answered(3, 1.1)
    job.seen(1, 1.5)
    job.run(Follow(2, True), 1.5 * FULL_S, PATIENCE + WINDOW + 5)
    assert job.coordinator.state.dropped == 0
    job.later()
    job.answer()
    assert job.newest().variants


def test_when_the_whole_job_is_slower_it_is_left_to_the_watch(job: Job, heard: pytest.LogCaptureFixture) -> None:
    job.following()
    for rank in range(3):
        job.seen(rank, 1.3)
    job.run(Follow(1), 1.3 * FULL_S, PATIENCE + WINDOW + DETECTION_TAKES)
    assert job.coordinator.phase is Phase.RECHECKING
    assert heard.text.count("more than half of all ranks are slower than they were") == 1
    assert len(job.planner.requests) == 1


def test_another_schedule_is_answered_for_itself(job: Job) -> None:
    job.answered()
    pace = job.part(job.newest().version_for(0), 1)
    job.schedule = "B"
    job.step()
    job.answer()
    assert parts_of(job.exchange, job.newest().version_for(0), 1)["A"] == pace, "the other schedule's answer stays"
    own = job.part(job.newest().version_for(0), 1)
    job.run(Follow(job.newest().version_for(0), True), FULL_S, 40)  # nearly all iterations run it by then
    job.later()
    assert job.planner.requests[-1].schedule == "B"
    assert job.planner.requests[-1].pace is not None
    job.answer()
    assert job.newest().straggler
    assert sum(job.part(job.newest().version_for(0), 1).clocks_mhz) < sum(own.clocks_mhz)


def test_plans_for_a_pace_are_refined_beside_the_job_and_adopted_at_an_iterations_boundary(tmp_path: Path) -> None:
    refiner = FakePlanner()
    job = Job(tmp_path, refiner=refiner)
    job.schedule = "20"
    job.answered(slowdown=1.03)
    before, asked = job.newest(), job.planner.requests[-1]
    for _ in range(30):
        job.run(Follow(before.version_for(0), True), FULL_S)
    (request,) = refiner.requests
    assert (asked.effort, asked.refine_s) == ("quick", 0)
    assert (request.effort, request.refine_s) == ("normal", job.config.refine_s)
    assert asked.pace is not None
    pace = pace_for(asked)
    assert request.pace == replace(asked.pace, at_least_s=pace.pace_s)
    less = [replace(one, energy_j=0.99 * one.energy_j) for one in pace.variants]
    refiner.answer = PlanAnswer(None, 7.0, pace=replace(pace, variants=tuple(less)))
    job.step()
    after = job.newest()
    assert after.straggler
    assert after.switch > job.iteration, "all ranks hear of it before"
    assert after.version_for(0) > before.version_for(0)
    refined = job.events()[-1]
    assert (refined["event"], refined["iteration"], refined["planning_time_s"]) == ("refined", after.switch, 7.0)
    assert refined["pace_s"] == pace.pace_s
    assert len(job.planner.requests) == 2, "whoever else becomes slow is planned for meanwhile"


# The record.


def test_everything_is_recorded(job: Job) -> None:
    job.following()
    job.seen(3, 1.25)
    job.step()
    job.answer()
    job.run(Follow(2, True), 1.2 * FULL_S, 10)
    job.seen(3, 1.0)
    job.later()
    detection, replan, switch, recovery, back = job.events()
    assert (detection["event"], detection["rank"], detection["slowdown"]) == ("detection", 3, 1.25)
    assert (replan["event"], replan["planning_time_s"]) == ("replan", 0.2)
    assert [v["slowdown"] for v in replan["variants"]] == [[1.0, 1.0], [1.0, 1.25]]
    assert replan["variants"][0]["energy_j"] < replan["variants"][0]["without_j"]
    assert (switch["event"], switch["slow"]) == ("switch", [[1, [1.0, 1.25]]])
    assert (recovery["event"], recovery["slowdown"]) == ("detection", 1.0)
    assert (back["event"], back["slow"], back["pace_s"]) == ("switch", [], None)
    reported, figures = job.desk.figures, job.answers.figures
    assert (reported.detections, reported.reports, figures.replans, figures.switches) == (1, 0, 1, 2)
    assert figures.iterations == 10
    saved_j = sum(v["without_j"] - v["energy_j"] for v in replan["variants"])
    assert figures.energy_saved_j == pytest.approx(10 * saved_j)
    assert dict(job.told[0])["Perseus/straggler/slow_replicas"] == 1
    assert dict(job.told[1])["Perseus/straggler/slow_replicas"] == 0
    assert dict(job.told[1])["Perseus/straggler/energy_saved_j"] > 0


def test_all_gpus_of_a_stage_count_for_the_energy_saved(tmp_path: Path) -> None:
    saved_j = []
    for shards in (1, 2):
        job = Job(tmp_path / str(shards), shards=shards).following()
        job.seen(3 * shards, 1.25)
        job.step()
        job.answer()
        assert job.answers.situation is not None
        assert job.answers.situation.slow == ((1, (1.0, 1.25)),)
        assert job.answers.situation.others
        job.run(Follow(2, True), 1.2 * FULL_S, 10)
        saved_j.append(job.answers.figures.energy_saved_j)
    assert saved_j[1] == pytest.approx(2 * saved_j[0])
    assert saved_j[0] > 0


def test_the_store_does_not_grow_with_every_answer(job: Job) -> None:
    job.following()
    for number in range(40):
        job.tell(3, 1.1 + 0.02 * number)
        job.later()
        job.answer()
    held = [v for v in range(1, 200) if job.exchange.fetch(part_key(v, 0)) is not None]
    assert 1 in held
    assert len(held) <= 2 * 32 + 1


def test_another_detectors_figures_are_corrected_for_the_plan(tmp_path: Path) -> None:
    job = Job(tmp_path, detect=False).following()
    assert job.coordinator.plan is not None
    measured = profile(2)

    def seen(slow: dict[int, float]) -> ExternalFigures:
        """Kernel times of a detector that does not know the plan."""
        plan = job.coordinator.plan
        assert plan is not None
        times = {}
        for rank in range(4):
            stage = rank % 2
            of_stage = [(p.instruction.kind, p.frequency_mhz) for p in plan.stages[stage]]
            rows = {(kind, m.frequency_mhz): m.time_s for s, kind, m in measured.rows() if s == stage}
            full_s = sum(measured.table[stage, kind][0].time_s for kind, _ in of_stage)
            times[rank] = slow.get(rank, 1.0) * sum(rows[one] for one in of_stage) / full_s
        return ExternalFigures("other", times, comparable=True)

    assert max(seen({}).relative_time.values()) > 1.03, "the plan alone would look like a straggler"
    for _ in range(5):
        job.coordinator.judge_external(seen({}))
    assert job.desk.figures.reports == 0
    for _ in range(2):
        job.coordinator.judge_external(seen({3: 1.3}))
    (slow,) = job.desk.book.slow_ranks(time.time())
    assert (slow.rank, slow.sources) == (3, ("other",))
    assert slow.slowdown == pytest.approx(1.3, rel=1e-6)
    job.coordinator.judge_external(seen({}))
    assert not job.desk.book.slow_ranks(time.time())


def test_another_detectors_figures_are_not_looked_at_across_a_change_of_plans(tmp_path: Path) -> None:
    job = Job(tmp_path, detect=False)
    slow = ExternalFigures("other", {0: 1.0, 1: 1.0, 2: 1.0, 3: 2.0}, comparable=True)
    for _ in range(5):
        job.coordinator.judge_external(slow)  # nothing is planned yet
    job.following()
    job.coordinator.judge_external(slow)
    assert not job.desk.book.slow_ranks(time.time())
    job.coordinator.judge_external(slow)
    job.coordinator.judge_external(slow)
    assert 3 in [one.rank for one in job.desk.book.slow_ranks(time.time())]

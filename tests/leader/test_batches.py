from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perseus_plugin.exchange.messages import (
    BATCHES,
    WORKS,
    AnnouncedWork,
    BatchNews,
    BatchPart,
    IterationDurations,
    RankDurations,
    batch_key,
    durations_key,
    estimate_key,
    receive,
)
from perseus_plugin.exchange.packing import packed, unpacked
from perseus_plugin.exchange.parts import Parts, batch_part, with_batch
from perseus_plugin.iteration.graph import FloatArray, build_graph
from perseus_plugin.iteration.instructions import Compute
from perseus_plugin.iteration.timetable import Follow, Sweep
from perseus_plugin.leader import batch_desk
from perseus_plugin.leader.batch_book import BatchBook, BatchWatch
from perseus_plugin.leader.state import Phase
from perseus_plugin.planning.batch_process import Learned, Lesson, PlannedStep, Pupil, Works, answered
from tests.factories import CLOCKS_MHZ, placement, rank_estimate, record, time_s
from tests.leader.rank_zero import FULL_S, SCHEDULES, RankZero

MICROBATCHES = 4


class InThisProcess:
    """Plans when told to, with everything through JSON as from and to the real one."""

    def __init__(self) -> None:
        self.pupil, self.lines = Pupil(), list[str]()
        self.answer: Learned | PlannedStep | None = None
        self.busy = self.closed = False

    def learn(self, lesson: Lesson) -> None:
        self._ask({"learn": lesson.request.to_dict(), "works": lesson.works})

    def plan(self, works: Works, iteration: int, base: int) -> None:
        self._ask({"plan": works, "iteration": iteration, "base": base})

    def _ask(self, what: dict[str, Any]) -> None:
        assert not self.busy
        self.busy = True
        self.lines.append(json.dumps(what))

    def finish(self) -> None:
        data = json.loads(answered(self.pupil, self.lines[-1]))
        self.busy = False
        if "replicas" in data:
            self.answer = PlannedStep(**data)
        else:
            self.answer = Learned(**data)

    def poll(self) -> Learned | PlannedStep | None:
        answer, self.answer = self.answer, None
        return answer

    def close(self) -> None:
        self.closed = True


def works_of(iteration: int) -> tuple[float, ...]:
    return tuple(np.random.default_rng(iteration).uniform(500.0, 1500.0, MICROBATCHES).tolist())


class Announced(RankZero):
    """A job whose plan is followed, and whose batches are announced."""

    def __init__(self, folder: Path) -> None:
        self.process = InThisProcess()
        block = {
            "margin": 0.01,
            "stragglers": {"detect": False},
            "watch": {"patience": 3, "tolerance": 0.05, "reference_share": 0},
        }
        super().__init__(folder, block, batch_process=lambda: self.process)
        for _ in range(4):
            self.run(Sweep(0, CLOCKS_MHZ[0], kept=True), FULL_S)
        for rank in (0, 1):
            self.exchange.publish(estimate_key(0, rank), rank_estimate(rank, 2).model_dump())
        self.step()
        self.planner.finish()
        self.step()
        assert self.coordinator.phase is Phase.FOLLOWING
        self.says: Callable[[int], Sequence[float]] = works_of

    def announce(self, *iterations: int) -> None:
        for iteration in iterations:
            message = AnnouncedWork(iteration=iteration, replica=0, work=tuple(self.says(iteration)))
            self.exchange.append(WORKS, message.model_dump())

    def tell_durations(self, *iterations: int, noise: float = 0.0) -> None:
        """All ranks tell of iterations at full clocks."""
        graph = build_graph([SCHEDULES["A"](rank) for rank in (0, 1)])
        took: dict[int, FloatArray] = {}
        for iteration in iterations:
            draw, factors = np.random.default_rng(iteration), np.array(works_of(iteration)) / 1000
            took[iteration] = np.zeros(len(graph))
            for rank, nodes in enumerate(graph.stage_nodes):
                for node in nodes.tolist():
                    if (one := graph.instructions[node]) is not None:
                        usual_s = time_s(one.kind, CLOCKS_MHZ[0], rank) * factors[one.microbatch]
                        took[iteration][node] = usual_s * (1 + noise * draw.standard_normal())
        for rank in (0, 1):
            nodes = [node for node in graph.stage_nodes[rank].tolist() if graph.instructions[node] is not None]
            told = []
            for iteration, durations_s in took.items():
                starts_s, _ = graph.times(durations_s)
                told.append(
                    IterationDurations(
                        number=iteration,
                        schedule="A",
                        clocks_mhz=(0,),
                        durations_s=tuple(durations_s[nodes].tolist()),
                        starts_s=tuple(starts_s[nodes].tolist()),
                        time_s=FULL_S,
                    )
                )
            message = RankDurations(placement=placement(rank), iterations=tuple(told))
            self.exchange.publish(durations_key(rank), message.model_dump())

    def learned(self) -> Announced:
        numbers = range(self.iteration - 8, self.iteration)
        self.announce(*numbers)
        self.tell_durations(*numbers)
        self.look()
        self.process.finish()
        self.look()
        return self

    def look(self) -> None:
        self.now_s += 0.01
        self.step()

    def iterate(self, count: int = 1, time_s: float = FULL_S, *, batch: bool = False) -> None:
        """Iterations end on rank 0, on time."""
        for _ in range(count):
            self.now_s += time_s
            seen = record(self.iteration, begin_s=self.now_s - time_s, operations=(), durations_s=(), schedule="A")
            seen.end_s = self.now_s
            self.coordinator.saw(Follow(1, batch=batch), seen)
            self.iteration += 1
            self.step()

    def part(self, iteration: int, stage: int) -> BatchPart:
        return receive(BatchPart, unpacked(self.exchange.fetch(batch_key(iteration, 0, stage))))

    @property
    def heard(self) -> tuple[int, ...]:
        value = self.exchange.heard(BATCHES)
        return () if value is None else receive(BatchNews, value).iterations


@pytest.fixture
def job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Announced:
    caplog.set_level(logging.INFO)
    return Announced(tmp_path)


def test_nothing_is_started_where_nothing_is_announced(job: Announced) -> None:
    job.tell_durations(*range(8))
    job.look()
    assert not job.process.lines
    assert job.coordinator.batches is not None
    assert job.coordinator.batches.figures is None


def test_a_step_is_planned_for_before_it_runs(job: Announced, caplog: pytest.LogCaptureFixture) -> None:
    job.learned()
    assert "batches are planned for one by one: announced works explain 100 %" in caplog.text
    job.iterate(9)
    wanted = job.iteration + 4
    job.announce(wanted)
    job.look()
    assert json.loads(job.process.lines[-1])["plan"] == [list(works_of(wanted))]
    job.process.finish()
    job.look()
    assert job.heard == (wanted,)
    for stage in (0, 1):
        part = job.part(wanted, stage)
        assert (part.iteration, part.base, part.schedule) == (wanted, job.newest().version, "A")
        ops = [op for op in SCHEDULES["A"](stage) if isinstance(op, Compute)]
        expected_s = [
            time_s(op.kind, clock, stage) * works_of(wanted)[op.microbatch] / 1000
            for op, clock in zip(ops, part.clocks_mhz, strict=True)
        ]
        assert part.times_s == pytest.approx(expected_s, rel=0.01)
        assert min(part.clocks_mhz) < CLOCKS_MHZ[0]
    assert job.part(wanted, 0).pace_s > 0


def test_what_is_announced_too_late_is_not_planned_for(job: Announced) -> None:
    job.learned()
    job.iterate(9)
    asked = len(job.process.lines)
    job.announce(job.iteration, job.iteration + 1)
    job.look()
    assert len(job.process.lines) == asked
    assert job.heard == ()


def test_far_ahead_no_plan_is_told_before_its_time(job: Announced) -> None:
    """However many steps are announced at once, ranks that look when they do hear of each that is planned."""
    job.learned()
    job.iterate(9)
    first = job.iteration
    job.announce(*range(first, first + 100))
    parts: Parts = {}
    for iteration in range(first, first + 24):
        for _ in range(8):  # far more often than ranks look
            job.look()
            if job.process.busy:
                job.process.finish()
        for heard in job.heard:
            assert job.part(heard, 0).iteration == heard
            parts = with_batch(parts, job.part(heard, 0))
        in_time = iteration > first + 6  # until it is known how long plans take, they are taken to take half a second
        assert not in_time or batch_part(parts, record(iteration, schedule="A")) is not None
        job.iterate()


def test_short_iterations_are_told_of_no_faster_than_ranks_hear(job: Announced) -> None:
    job.learned()
    job.iterate(20, 0.01)
    job.announce(*range(job.iteration, job.iteration + 300))
    told: dict[int, tuple[float, str]] = {}
    for _ in range(200):
        job.look()
        if job.process.busy:
            job.process.finish()
        job.iterate(1, 0.01)
        told |= {one: (job.now_s, batch_key(one, 0, 0)) for one in job.heard if one not in told}
    assert len(told) > 9
    times_s, keys = zip(*told.values(), strict=True)
    for at, (told_s, key) in enumerate(told.values()):
        later = [
            other for other in range(at + 1, len(told)) if times_s[other] < told_s + job.exchange.news_take_s - 0.02
        ]
        assert len(later) < 3
        assert key not in {keys[other] for other in later}


def test_a_plan_that_took_too_long_is_not_told(job: Announced) -> None:
    job.learned()
    job.iterate(9)
    job.announce(job.iteration + 4)
    job.look()
    job.now_s += 3.8 * FULL_S
    job.process.finish()
    job.look()
    assert job.heard == ()


def test_works_that_explain_nothing_are_said_once_and_the_plan_stays(
    job: Announced, caplog: pytest.LogCaptureFixture
) -> None:
    job.says = lambda iteration: works_of(iteration + 500)
    job.learned()
    job.now_s += 60
    job.learned()
    assert caplog.text.count("batches are not planned for one by one: the announced works explain") == 1
    job.iterate(9)
    job.announce(job.iteration + 4)
    job.look()
    assert job.heard == ()


def test_it_is_learned_anew_once_ranks_tell_of_newer_iterations(job: Announced) -> None:
    job.learned()
    for _ in range(3):
        job.now_s += 60
        job.look()
    assert len(job.process.lines) == 1
    job.iterate(9)
    job.now_s += 60
    job.learned()
    assert len(job.process.lines) == 2


def test_works_that_turn_out_wrong_end_in_the_usual_plan(job: Announced, caplog: pytest.LogCaptureFixture) -> None:
    job.learned()
    job.iterate(9)
    job.says = lambda iteration: works_of(iteration + 500)
    for _ in range(2):  # newer iterations each time: the first may have been a stall
        assert "batches are not planned for one by one any more: " not in caplog.text
        numbers = range(job.iteration, job.iteration + 12)
        job.announce(*numbers)
        job.iterate(12)
        job.tell_durations(*numbers)
        job.now_s += 60
        for _ in range(3):  # a step may be in work
            job.look()
            if job.process.busy:
                job.process.finish()
                job.look()
    assert "batches are not planned for one by one any more: " in caplog.text
    assert job.process.closed
    assert job.coordinator.batches is not None
    figures = job.coordinator.batches.figures
    assert figures is not None
    assert figures.ended


@pytest.mark.parametrize(
    ("lost", "why", "advice"),
    [
        (True, "the process that plans batches ended with SIGKILL", "see to memory on rank 0's machine"),
        (False, "a step could not be planned for: clocks may change too rarely", "nothing needs to be done"),
    ],
)
def test_a_lost_process_learns_anew_and_at_last_gives_way_to_the_usual_plan(
    job: Announced, caplog: pytest.LogCaptureFixture, lost: bool, why: str, advice: str
) -> None:
    for failures in (1, 2, 3):
        job.learned()
        assert caplog.text.count("batches are planned for one by one: ") == failures
        job.iterate(9)
        job.announce(*range(job.iteration + 1, job.iteration + 5))
        job.look()
        assert "plan" in json.loads(job.process.lines[-1])
        failed = PlannedStep(why_not=why.rpartition(": ")[2], lost=lost)
        job.process.answer, job.process.busy, job.process.pupil = failed, False, Pupil()
        asked = len(job.process.lines)
        job.look()
        assert (len(job.process.lines) > asked) == (failures < 3)  # a lesson, at once
        if failures < 3:
            said = f"how to plan for single batches is learned anew: {why}. Iterations follow the job's usual plan "
            assert caplog.text.count(said + f"meanwhile; if it is said again, {advice}") == failures
        while job.process.busy:  # the lesson, and steps that it is not too late for
            job.process.finish()
            job.look()
    assert f"any more: {why}, and something of the kind 2 times before. All iterations follow" in caplog.text
    assert f"usual plan; {advice}" in caplog.text
    assert "see to what is announced" not in caplog.text
    assert job.process.closed
    assert job.coordinator.phase is Phase.FOLLOWING


@pytest.mark.parametrize("part", [packed({"iteration": 1}), "nothing", ""])
def test_what_plans_nothing_that_can_be_followed_is_told_to_nobody(
    job: Announced, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    job.learned()
    job.iterate(9)
    job.announce(job.iteration + 4)
    job.look()
    job.process.answer, job.process.busy = PlannedStep([[part, part]]), False
    job.look()
    assert "how to plan for single batches is learned anew: what plans batches tells of no plan: " in caplog.text
    assert job.heard == ()


def test_steps_that_are_too_large_are_not_planned_for_and_that_is_said_once(
    job: Announced, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(isinstance(op, Compute) for stage in (0, 1) for op in SCHEDULES["A"](stage))
    monkeypatch.setattr(batch_desk, "MOST_INSTRUCTIONS", size - 1)
    for _ in range(3):
        numbers = range(job.iteration, job.iteration + 9)
        job.announce(*numbers)
        job.iterate(9)
        job.tell_durations(*numbers)
        job.look()
    assert not job.process.lines
    why = f"a step has {size} instructions in all pipelines together (most: {size - 1})"
    assert caplog.text.count(f"batches are not planned for one by one: {why}, and planning would take too long") == 1
    assert job.coordinator.batches is not None
    assert job.coordinator.batches.figures is not None
    assert job.coordinator.batches.figures.ended == why


def test_numbers_for_other_microbatches_are_said_once(job: Announced, caplog: pytest.LogCaptureFixture) -> None:
    job.says = lambda iteration: [1.0, 2.0]
    for _ in range(3):
        job.announce(job.iteration)
        job.look()
        seen = record(job.iteration)
        assert job.coordinator.batches is not None
        job.coordinator.batches.saw(Follow(1), seen)
        job.iteration += 1
    assert caplog.text.count("announced work was of no use: 2 numbers for an iteration of 1 microbatches") == 1


# The book.


def announced(iteration: int, replica: int = 0, count: int = 2) -> AnnouncedWork:
    return AnnouncedWork(iteration=iteration, replica=replica, work=(1.0,) * count)


def test_a_step_is_known_once_all_replicas_have_announced_it() -> None:
    book = BatchBook(2)
    book.take(announced(5))
    assert book.of(5, 2) is None
    book.take(announced(5, replica=1))
    assert book.of(5, 2) == [(1.0, 1.0), (1.0, 1.0)]
    assert book.of(5, 3) is None
    book.take(announced(5, replica=7))
    assert book.counts(5) == {2}


def test_the_next_step_is_one_that_there_is_time_for() -> None:
    book = BatchBook(1)
    for iteration in range(10):
        book.take(announced(iteration))
    assert book.next_in_time(2, -1, 0.0, 1.0) is None  # how long iterations take is not known
    for number in range(4):
        book.ended(number, 2.0 * number)
    # Iteration 4 began at 6 s and takes 2 s.
    assert book.next_in_time(2, -1, 6.5, 1.0) == 5
    assert book.next_in_time(2, -1, 6.5, 1.6) == 6
    assert book.next_in_time(2, 6, 6.5, 1.0) == 7
    assert book.next_in_time(2, 7, 6.5, 1.0) is None  # there is time for that one later
    assert book.next_in_time(2, 7, 8.1, 1.0) == 8
    assert book.next_in_time(2, 9, 16.0, 1.0) is None


# The watch.


def test_iterations_as_long_as_the_works_make_them_are_well() -> None:
    watch = BatchWatch(0.03)
    for _ in range(20):
        watch.saw(1.01, 1.0, reference=False)
        watch.timed([0.5, 0.6], [0.5, 0.6])
    assert watch.against == ""
    assert watch.iterations == 20


def test_iterations_that_take_longer_are_not() -> None:
    watch = BatchWatch(0.03)
    for _ in range(8):
        watch.saw(1.05, 1.0, reference=False)
    assert watch.against == "iterations planned by announced works take 5.0 % longer than these make them"


def test_what_references_have_in_common_is_not_the_plans_doing() -> None:
    watch = BatchWatch(0.03)
    for number in range(10):
        watch.saw(1.20, 1.0, reference=number < 2)
    assert watch.against == ""
    for _ in range(4):
        watch.saw(1.00, 1.0, reference=True)  # the works make steps too long
    assert watch.against.startswith("iterations planned by announced works take 20.0 % longer")


def test_on_a_busy_machine_a_few_iterations_that_take_longer_by_chance_end_nothing() -> None:
    draw = np.random.default_rng(1)

    def ended(longer: float) -> int:
        """Of 50 jobs in which now and then an iteration takes much longer."""
        count = 0
        for _ in range(50):
            watch, against = BatchWatch(0.03), ""
            for number in range(120):
                reference = number % 12 == 0
                time_s = (1.02 if reference else 1.02 + longer) + float(draw.gamma(0.5, 0.06))
                watch.saw(time_s, 1.0, reference=reference)
                against = against or watch.against
            count += bool(against)
        return count

    assert ended(0.0) < 5
    assert ended(0.05) > 45


def test_instructions_that_take_half_as_long_speak_against_the_works() -> None:
    watch = BatchWatch(0.03)
    for _ in range(8):
        watch.saw(1.0, 1.0, reference=False)
        watch.timed([0.25], [0.5])
    assert watch.against == "instructions take 0.50 times as long as the announced works make them"


def test_figures_pass_through_json() -> None:
    learned = Learned(explained=0.9, error=0.02, margin=0.03, time_ratio=1.0, saving=0.2, saving_in_force=0.1)
    assert Learned(**json.loads(json.dumps(asdict(learned)))) == learned

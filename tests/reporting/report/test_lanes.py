from __future__ import annotations

import math
from pathlib import Path

import pytest

from perseus_plugin.planning.planner import Target, make_plan
from perseus_plugin.reporting.record.samples import ClockRequest
from perseus_plugin.reporting.report.folder import JobFolder, load_folder
from perseus_plugin.reporting.report.lanes import Lanes, full_clock_lanes, planned_lanes, recorded_lanes
from tests.factories import CLOCKS_MHZ, energy_j, time_s
from tests.reporting.job import STEP_S, WAITING_W, Job, with_waiting_power


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job") / "out", stages=3, microbatches=5).planned().finished()


@pytest.fixture(scope="module")
def folder(job: Job) -> JobFolder:
    return load_folder(job.folder)


def test_full_clocks_take_what_the_planner_compares_with(job: Job, folder: JobFolder) -> None:
    lanes = full_clock_lanes("full", job.profile, job.graph)
    assert lanes.end_s == pytest.approx(job.plan.baseline_time_s - STEP_S)
    assert {block.clock_mhz for block in lanes.blocks} == {CLOCKS_MHZ[0]}
    assert [len(row) for row in lanes.rows] == [10, 10, 10]
    for block in lanes.blocks:
        i = block.instruction
        assert block.finish_s - block.start_s == pytest.approx(time_s(i.kind, CLOCKS_MHZ[0], i.stage))
        assert block.energy_j == pytest.approx(energy_j(i.kind, CLOCKS_MHZ[0], i.stage))


def test_the_plan_is_drawn_as_it_stands(job: Job) -> None:
    lanes = planned_lanes("plan", job.plan, job.profile, job.graph)
    drawn = [[(b.instruction, b.clock_mhz, b.start_s, b.finish_s) for b in row] for row in lanes.rows]
    assert drawn == [[(p.instruction, p.frequency_mhz, p.start_s, p.finish_s) for p in row] for row in job.plan.stages]
    total_j = sum(block.energy_j for block in lanes.blocks)
    waiting_j = 80.0 * (lanes.waiting_s + STEP_S * 3)
    assert total_j + waiting_j == pytest.approx(job.plan.energy_j)


def test_what_ran_is_drawn_with_the_clocks_asked_for(job: Job, folder: JobFolder) -> None:
    whole = folder.pipeline(("plan",))
    ran = recorded_lanes("ran", whole, job.profile, job.graph)
    plan = planned_lanes("plan", job.plan, job.profile, job.graph)
    assert [b.clock_mhz for b in ran.blocks] == [b.clock_mhz for b in plan.blocks]
    assert [b.start_s for b in ran.blocks] == pytest.approx([b.start_s for b in plan.blocks], abs=3e-6)
    assert ran.waiting_s == pytest.approx(plan.waiting_s, abs=1e-4)
    assert {b.instruction for b in ran.blocks if b.critical} == {b.instruction for b in plan.blocks if b.critical}


def chain(lanes: Lanes) -> list[tuple[float, float]]:
    return sorted((b.start_s, b.finish_s) for b in lanes.blocks if b.critical)


def test_the_critical_path_runs_from_the_beginning_to_the_end_without_a_gap(job: Job) -> None:
    path = chain(full_clock_lanes("full", job.profile, job.graph))
    assert path[0][0] == 0
    assert path[-1][1] == pytest.approx(job.plan.baseline_time_s - STEP_S)
    assert [start for start, _ in path[1:]] == pytest.approx([finish for _, finish in path[:-1]])


def test_without_a_graph_nothing_is_marked_and_without_a_profile_no_energy_known(job: Job, folder: JobFolder) -> None:
    lanes = recorded_lanes("ran", folder.pipeline(("full",)), None, None)
    assert not any(block.critical for block in lanes.blocks)
    assert all(block.energy_j != block.energy_j for block in lanes.blocks)
    assert len(lanes.blocks) == 30


def test_ranks_are_lined_up_by_the_time_of_day(folder: JobFolder) -> None:
    first, second, third = folder.pipeline(("plan",))
    late = second.model_copy(update={"begin_s": second.begin_s + 0.5})
    moved = recorded_lanes("moved", [first, late, third], None, None)
    plain = recorded_lanes("plain", [first, second, third], None, None)
    assert moved.rows[1][0].start_s - plain.rows[1][0].start_s == pytest.approx(0.5, abs=1e-6)
    assert moved.rows[0] == plain.rows[0]


def test_a_graph_of_something_else_is_not_used(tmp_path: Path, job: Job, folder: JobFolder) -> None:
    other = Job(tmp_path / "out", stages=3, microbatches=4)
    lanes = recorded_lanes("ran", folder.pipeline(("plan",)), job.profile, other.graph)
    assert not any(block.critical for block in lanes.blocks)


def test_waits_and_blocks_fill_every_row(job: Job) -> None:
    lanes = planned_lanes("plan", job.plan, job.profile, job.graph)
    gaps = [(wait.stage, wait.start_s, wait.finish_s) for wait in lanes.waits]
    assert sum(until_s - since_s for _, since_s, until_s in gaps) == pytest.approx(lanes.waiting_s, abs=1e-4)
    for stage, row in enumerate(lanes.rows):
        spans = sorted([(b.start_s, b.finish_s) for b in row] + [(a, b) for s, a, b in gaps if s == stage])
        assert spans[0][0] == 0
        assert spans[-1][1] == pytest.approx(lanes.end_s)
        assert [a for a, _ in spans[1:]] == pytest.approx([b for _, b in spans[:-1]], abs=2e-5)


def test_waits_are_drawn_at_their_own_clocks_and_priced_at_them(job: Job) -> None:
    profile = with_waiting_power(job.profile)
    plan = make_plan(
        job.graph, profile, blocking_power_w=1.0, target=Target.slowdown(0.0), schedule="1F1B", switch_latency_s=1e-7
    )
    assert plan.waits
    lanes = planned_lanes("plan", plan, profile, job.graph, 1.0)
    step_j = 3 * STEP_S * WAITING_W[CLOCKS_MHZ[0]]
    total_j = sum(block.energy_j for block in lanes.blocks) + lanes.waiting_j + step_j
    assert total_j == pytest.approx(plan.energy_j, rel=1e-5)
    low = [wait for wait in lanes.waits if wait.own]
    planned = [(stage, wait) for stage, waits in enumerate(plan.waits) for wait in waits]
    assert 0 < len(low) <= len(planned)
    for wait in low:
        of_stage = [one for stage, one in planned if stage == wait.stage]
        assert any(one.frequency_mhz == wait.clock_mhz and one.start_s <= wait.start_s + 1e-9 for one in of_stage)
        assert wait.energy_j == pytest.approx(WAITING_W[wait.clock_mhz] * (wait.finish_s - wait.start_s))
        assert wait.saved_j > 0
    full = full_clock_lanes("full", profile, job.graph, 1.0)
    assert not any(wait.own for wait in full.waits)
    assert full.waiting_j == pytest.approx(WAITING_W[CLOCKS_MHZ[0]] * full.waiting_s, rel=1e-3)


def test_what_was_asked_while_waiting_cuts_a_recorded_wait(job: Job, folder: JobFolder) -> None:
    profile = with_waiting_power(job.profile)
    whole = folder.pipeline(("plan",))
    plain = recorded_lanes("ran", whole, profile, None)
    longest = max(
        (wait for wait in plain.waits if wait.start_s > 0 and wait.clock_mhz > CLOCKS_MHZ[-1]),
        key=lambda wait: wait.finish_s - wait.start_s,
    )
    zero_s = min(one.begin_s + one.instructions[0].start_s for one in whole)
    sample = whole[longest.stage]
    shift_s = sample.begin_s - zero_s
    middle_s = (longest.start_s + longest.finish_s) / 2
    lowered = sample.model_copy(
        update={
            "requests": (
                ClockRequest(middle_s - shift_s, CLOCKS_MHZ[-1]),
                ClockRequest(longest.finish_s - shift_s, 0),
            )
        }
    )
    others = [lowered if stage == longest.stage else one for stage, one in enumerate(whole)]
    cut = recorded_lanes("ran", others, profile, None)
    (own,) = [one for one in cut.waits if one.stage == longest.stage and abs(one.start_s - middle_s) < 1e-6]
    assert own.clock_mhz == CLOCKS_MHZ[-1]
    assert own.finish_s == pytest.approx(longest.finish_s, abs=1e-6)
    assert own.own
    assert own.energy_j == pytest.approx(WAITING_W[CLOCKS_MHZ[-1]] * (own.finish_s - own.start_s))
    assert cut.waiting_s == pytest.approx(plain.waiting_s)


def test_without_a_profile_the_energy_of_waits_is_not_known(folder: JobFolder) -> None:
    lanes = recorded_lanes("ran", folder.pipeline(("full",)), None, None)
    assert lanes.waits
    assert all(math.isnan(wait.energy_j) and wait.clock_mhz == 0 for wait in lanes.waits)

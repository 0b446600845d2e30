from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import Compute, Constant
from perseus_plugin.iteration.replayed import Samples
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning import process as process_module
from perseus_plugin.planning.child import DROP
from perseus_plugin.planning.plan import Plan, plan_from_json
from perseus_plugin.planning.planner_process import PlannerProcess
from perseus_plugin.planning.process import PlanAnswer, PlanRequest, answered, plan_for, planner_for
from perseus_plugin.planning.targets import Target
from tests.factories import BLOCKING_W, CLOCKS_MHZ, profile
from tests.waiting import PATIENCE_S, came_true


def request(stages: int = 2, microbatches: int = 4, **changes: Any) -> PlanRequest:
    if "slowdown" in changes:
        changes["target"] = Target.slowdown(changes.pop("slowdown"))
    fields: dict[str, Any] = {
        "schedule": "1F1B",
        "streams": [[*stream, Constant("step")] for stream in one_f_one_b(stages, microbatches)],
        "constant_time_s": {(0, "step"): 0.01, (1, "step"): 0.02},
        "profile": profile(stages),
        "blocking_power_w": [BLOCKING_W] * stages,
    }
    return PlanRequest(**{**fields, **changes})


# Requests.


@given(
    margin=st.floats(0, 1),
    slowdown=st.floats(0, 10),
    effort=st.sampled_from(["quick", "normal", "thorough"]),
    max_changes=st.one_of(st.none(), st.integers(0, 100)),
    min_dwell_s=st.floats(0, 60),
    full_clock_only=st.frozensets(st.tuples(st.integers(0, 3), st.sampled_from(["forward", "backward"]))),
    search=st.booleans(),
)
def test_a_request_passes_through_json(**changes: Any) -> None:
    made = request(**changes)
    back = PlanRequest.from_dict(json.loads(json.dumps(made.to_dict())))
    for field in dataclasses.fields(PlanRequest):
        if field.name != "profile":
            assert getattr(back, field.name) == getattr(made, field.name), field.name
    rows = [
        [(s, k, m.frequency_mhz, m.time_s, m.energy_j) for s, k, m in p.rows()] for p in (back.profile, made.profile)
    ]
    assert rows[0] == rows[1]


def test_without_a_search_clocks_are_rounded_and_still_keep_the_time() -> None:
    rounded, searched = (plan_for(request(3, 4, slowdown=0.05, search=search)) for search in (False, True))
    planner = planner_for(request(3, 4))
    solution = planner.solve(Target.slowdown(0.05), search=False)
    assert rounded.energy_j == planner.to_plan(solution).energy_j
    assert rounded.iteration_time_s <= 1.05 * rounded.baseline_time_s * (1 + 1e-9)
    assert searched.energy_j <= rounded.energy_j


def measured(iterations: int, replicas: int) -> Samples:
    stages = tuple(tuple(0.1 * (stage + 1) / (position + 3) for position in range(8)) for stage in range(2))
    every = tuple((stages,) * replicas for _ in range(iterations))
    return Samples(every, every, every[:1], ((0.5,) * replicas,) * iterations)


@pytest.mark.parametrize("samples", [None, Samples(()), measured(1, 1), measured(5, 3)])
def test_a_request_in_pieces_is_the_same_request(samples: Samples | None) -> None:
    made = request(samples=samples)
    assert json.loads("".join(made.pieces())) == json.loads(json.dumps(made.to_dict()))


def test_pieces_of_a_request_do_not_grow_with_what_was_measured() -> None:
    longest = [max(map(len, request(samples=samples).pieces())) for samples in (measured(1, 1), measured(40, 20))]
    assert longest[0] == longest[1]


# Planning, and what the margin means.


def replayed(plan: Plan, wanted: PlanRequest) -> tuple[float, float]:
    """Iteration time and energy (blocking included) of a plan's clocks at the times and energies as measured."""
    graph = build_graph(wanted.streams, wanted.constant_time_s)
    clock = {p.instruction: p.frequency_mhz for stage in plan.stages for p in stage}
    rows = {(s, k, m.frequency_mhz): m for s, k, m in wanted.profile.rows()}
    chosen = [None if i is None else rows[i.stage, i.kind, clock[i]] for i in graph.instructions]
    iteration_s = graph.iteration_time_s([0.0 if m is None else m.time_s for m in chosen])
    busy_s = math.fsum(m.time_s for m in chosen if m is not None)
    energy_j = math.fsum(m.energy_j for m in chosen if m is not None)
    return iteration_s, energy_j + BLOCKING_W * (len(wanted.streams) * plan.iteration_time_s - busy_s)


def test_a_plan_covers_every_instruction_and_saves() -> None:
    wanted = request()
    plan = plan_for(wanted)
    for stage, planned in enumerate(plan.stages):
        computations = [op for op in wanted.streams[stage] if isinstance(op, Compute)]
        assert [(p.instruction.kind, p.instruction.microbatch) for p in planned] == [
            (op.kind, op.microbatch) for op in computations
        ]
    assert plan.saving > 0.02
    assert plan.iteration_time_s <= plan.deadline_s == plan.baseline_time_s


@pytest.mark.parametrize("slowdown", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("margin", [0.0, 0.01, 0.05, 0.3])
def test_with_a_margin_slowed_instructions_end_that_much_before_they_are_needed(margin: float, slowdown: float) -> None:
    wanted = request(margin=margin, slowdown=slowdown)
    plan, without = plan_for(wanted), plan_for(request(slowdown=slowdown))
    assert plan.deadline_s == without.deadline_s, "the deadline is that of full clocks"
    true = {(s, k, m.frequency_mhz): m.time_s for s, k, m in wanted.profile.rows()}
    slowed = 0
    for stage in plan.stages:
        for p in stage:
            measured_s = true[p.instruction.stage, p.instruction.kind, p.frequency_mhz]
            is_slowed = p.frequency_mhz < CLOCKS_MHZ[0]
            slowed += is_slowed
            assert p.finish_s - p.start_s == pytest.approx(measured_s * (1 + margin * is_slowed))
    assert slowed > 0
    iteration_s, _ = replayed(plan, wanted)
    assert iteration_s <= plan.iteration_time_s + 1e-12 <= plan.deadline_s + 2e-12


def test_the_margin_only_costs() -> None:
    energies = [plan_for(request(margin=margin)).energy_j for margin in (0.0, 0.02, 0.1, 0.5)]
    assert energies == sorted(energies)


@pytest.mark.parametrize("margin", [0.0, 0.05, 0.3])
def test_the_predicted_energy_is_that_of_the_clocks_as_measured(margin: float) -> None:
    """An instruction that ends before it is needed lets its GPU wait for the rest of the margin."""
    wanted = request(margin=margin)
    plan = plan_for(wanted)
    _, energy_j = replayed(plan, wanted)
    assert plan.energy_j == pytest.approx(energy_j, rel=1e-9)


def test_full_clocks_stay_possible_at_any_margin() -> None:
    plan = plan_for(request(margin=1000.0))
    assert {clock for stage in range(2) for clock in plan.clocks_mhz(stage)} == {CLOCKS_MHZ[0]}
    assert plan.saving == pytest.approx(0.0)


def test_what_must_not_be_slowed_is_not() -> None:
    plan = plan_for(request(full_clock_only=frozenset({(0, "forward"), (0, "backward")})))
    assert set(plan.clocks_mhz(0)) == {CLOCKS_MHZ[0]}
    assert min(plan.clocks_mhz(1)) >= CLOCKS_MHZ[-1]


# The process.


@pytest.fixture(scope="module")
def planner() -> Iterator[PlannerProcess]:
    process = PlannerProcess()
    yield process
    process.close()


def answer(planner: PlannerProcess, wanted: PlanRequest) -> PlanAnswer:
    planner.submit(wanted)
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        found = planner.poll()
        if found is not None:
            assert planner.poll() is None, "an answer is given once"
            assert wait_until_idle(planner)
            return found
        time.sleep(0.01)
    raise AssertionError("no answer in time")


def wait_until_idle(planner: PlannerProcess) -> bool:
    return came_true(lambda: not planner.busy, PATIENCE_S)


def test_the_process_plans_as_this_one_would(planner: PlannerProcess) -> None:
    wanted = request(margin=0.02)
    got = answer(planner, wanted)
    assert got.error == ""
    assert got.plan == plan_for(wanted)
    assert got.planning_time_s > 0


def test_an_impossible_request_is_an_error_and_the_process_lives_on(planner: PlannerProcess) -> None:
    pid = planner.pid
    bad = [
        (request(streams=one_f_one_b(3, 4)), "got 2 values"),
        (request(streams=one_f_one_b(3, 4), blocking_power_w=[80.0] * 3), "stage 2"),
        (request(streams=[[Compute("weight", 0)], []]), "weight"),
        (request(streams=[[Compute("forward", 0)], [Constant("step")] * 2], full_clock_only=frozenset({(7, "x")})), ""),
        (request(constant_time_s={(0, "step"): math.nan}), "step"),
        (request(blocking_power_w=[]), ""),
        (request(effort="hard"), ""),
    ]
    for wanted, reason in bad:
        got = answer(planner, wanted)
        if reason:
            assert got.plan is None
            assert reason in got.error
        else:
            assert (got.plan is None) == bool(got.error)
    assert answer(planner, request()).plan is not None
    assert planner.pid == pid


def test_what_is_not_wanted_any_more_is_given_up_and_the_process_lives_on(planner: PlannerProcess) -> None:
    planner.drop()  # there is nothing
    planner.submit(dataclasses.replace(request(8, 64), effort="thorough"))  # takes minutes
    found = None
    while found is None:
        planner.drop()
        time.sleep(0.05)
        found = planner.poll()
    assert (found.plan, found.dropped) == (None, True)
    assert wait_until_idle(planner)
    assert answer(planner, request()).plan is not None


def test_that_a_request_is_not_wanted_is_heard_again_where_it_was_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by pydantic, which goes on when asking for a type ends in an exception."""
    now_s, swallowed = [1000.0], []

    def swallows(request: object) -> PlanAnswer:
        for waited_s in (0.0, 0.5):  # said again at once, it does not disturb what is tidied up
            now_s[0] += waited_s
            try:
                signal.raise_signal(DROP)
            except BaseException as error:
                swallowed.append(error)
        now_s[0] += 1.0
        signal.raise_signal(DROP)
        raise AssertionError("it was not heard")

    monkeypatch.setattr("perseus_plugin.planning.process.answer_to", swallows)
    monkeypatch.setattr(process_module.time, "monotonic", lambda: now_s[0])
    before = signal.signal(DROP, process_module._drop)
    try:
        found = answered(json.dumps(request().to_dict()))
    finally:
        signal.signal(DROP, before)
    assert json.loads(found)["dropped"]
    assert len(swallowed) == 1


def test_one_request_at_a_time(planner: PlannerProcess) -> None:
    planner.submit(request(2, 16))
    with pytest.raises(PlanError, match="worked on already"):
        planner.submit(request())
    assert planner.poll() is None or not planner.busy
    assert wait_until_idle(planner)
    planner.poll()


def test_the_process_answers_line_by_line_whatever_comes_and_ends_with_its_input() -> None:
    lines = ["nonsense", "{}", "[]", '{"schedule": 1}', json.dumps(request().to_dict())]
    done = subprocess.run(
        [sys.executable, "-m", "perseus_plugin.planning.process", str(os.getpid())],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    *errors, good = [json.loads(line) for line in done.stdout.splitlines()]
    assert [reply["plan"] for reply in errors] == [None] * 4
    assert all(reply["error"] for reply in errors)
    assert good["error"] == ""
    assert plan_from_json(good["plan"]).schedule == "1F1B"
    assert "Traceback" not in done.stderr


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 5), st.floats(0, 0.2), st.floats(0, 0.5))
def test_any_margin_keeps_the_deadline(stages: int, microbatches: int, margin: float, slowdown: float) -> None:
    wanted = request(stages, microbatches, margin=margin, slowdown=slowdown)
    plan = plan_for(wanted)
    iteration_s, energy_j = replayed(plan, wanted)
    assert iteration_s <= plan.deadline_s * (1 + 1e-9)
    assert energy_j <= plan.baseline_energy_j * (1 + 1e-9) or slowdown > 0


@pytest.mark.parametrize("line", ["", "nonsense", "[]", "{}", json.dumps({"schedule": 3})])
def test_whatever_a_line_holds_its_answer_is_a_line(line: str) -> None:
    said = answered(line)
    assert "\n" not in said
    assert PlanAnswer.from_dict(json.loads(said), 0.1).error


def test_an_answer_that_cannot_be_written_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = PlanAnswer(None, math.nan, "", cut_short=object())  # type: ignore[arg-type]
    monkeypatch.setattr("perseus_plugin.planning.process.answer_to", lambda request: broken)
    told = PlanAnswer.from_dict(json.loads(answered(json.dumps(request().to_dict()))), 0.1)
    assert "not JSON serializable" in told.error

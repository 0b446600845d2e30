from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_plugin.iteration.graph import FloatArray, build_graph
from perseus_plugin.iteration.instructions import Compute, Constant
from perseus_plugin.iteration.replayed import InForce, PerStage, Samples
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.options import build_problem
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.process import answer_to, plan_for
from perseus_plugin.planning.replay import Replay, clocks_of, finishes
from perseus_plugin.planning.request import PlanAnswer, PlanRequest
from perseus_plugin.planning.robust import gaps_of, margins_from, replay_of, usual_delays
from perseus_plugin.planning.targets import Target
from tests.factories import BLOCKING_W

from .jobs import bundled_profile, made_again

STAGES, MICROBATCHES = 3, 8
STREAMS = [[*stream, Constant("step")] for stream in one_f_one_b(STAGES, MICROBATCHES)]
CONSTANTS = {(stage, "step"): 0.01 for stage in range(STAGES)}
PROFILE = bundled_profile(STAGES)
GRAPH = build_graph(STREAMS, CONSTANTS)
PROBLEM = build_problem(GRAPH, PROFILE, BLOCKING_W)


def per_stage(by_node: FloatArray) -> PerStage:
    return tuple(
        tuple(float(by_node[node]) for node in nodes if GRAPH.instructions[node] is not None)
        for nodes in GRAPH.stage_nodes
    )


def samples(factors: FloatArray, delay_s: float = 0.0) -> Samples:
    """Iterations with each instruction's full-clock time times its factor; shape (iterations, replicas, nodes)."""
    durations = [[per_stage(PROBLEM.full_clock_s * one) for one in iteration] for iteration in factors]
    starts = [
        [per_stage(delay_s + GRAPH.times(PROBLEM.full_clock_s * one)[0]) for one in iteration] for iteration in factors
    ]
    made = tuple(tuple(one) for one in durations)
    return Samples(made, made, tuple(tuple(one) for one in starts))


def request(
    made_of: Samples | None, catch_up: bool = True, effort: str = "quick", slowdown: float = 0.0
) -> PlanRequest:
    return PlanRequest(
        schedule="1F1B",
        streams=STREAMS,
        constant_time_s=CONSTANTS,
        profile=PROFILE,
        blocking_power_w=[BLOCKING_W] * STAGES,
        target=Target.slowdown(slowdown),
        margin=0.01,
        effort=effort,
        samples=made_of,
        catch_up=catch_up,
    )


def answer(made_of: Samples | None, catch_up: bool = True, effort: str = "quick", slowdown: float = 0.0) -> PlanAnswer:
    return answer_to(request(made_of, catch_up, effort, slowdown))


def noise(sigma: float, seed: int = 0, iterations: int = 12, replicas: int = 1) -> FloatArray:
    shape = (iterations, replicas, len(GRAPH))
    return np.exp(sigma * np.random.default_rng(seed).standard_normal(shape))


def test_margins_begin_at_the_least_one() -> None:
    assert margins_from(0.025)[:3] == (0.025, 0.03, 0.04)
    assert margins_from(0.01)[:2] == (0.01, 0.02)
    assert margins_from(0.5) == (0.5,)


def test_iterations_that_do_not_vary_get_the_least_margin() -> None:
    made = answer(samples(noise(0.0)))
    assert made.replayed is not None
    assert made.replayed.margin == 0.01
    assert made.replayed.time_ratio_mean == pytest.approx(1.0)
    assert made.plan is not None
    assert made.replayed.saving_mean == pytest.approx(made.plan.saving, rel=0.1)
    assert made.replayed.saving_interval == pytest.approx((made.replayed.saving_mean,) * 2)


@pytest.mark.parametrize("catch_up", [False, True])
def test_a_size_that_all_stages_share_needs_no_larger_margin(catch_up: bool) -> None:
    sizes = np.random.default_rng(1).choice([1.0, 1.3, 1.6], 12)
    varied = answer(samples(noise(0.001) * sizes[:, None, None]), catch_up)
    even = answer(samples(noise(0.001)), catch_up)
    assert varied.replayed is not None
    assert even.replayed is not None
    assert varied.replayed.margin == even.replayed.margin
    assert varied.replayed.saving_mean > 0.97 * even.replayed.saving_mean


def test_variation_within_the_iteration_takes_a_larger_margin_and_is_kept_to_on_other_iterations() -> None:
    made = answer(samples(noise(0.03)), catch_up=False)
    assert made.replayed is not None
    assert made.replayed.margin > 0.03
    assert made_again(request(None), made) == made.plan
    assert made.replayed.time_ratio_mean <= 1.002
    assert made.replayed.time_ratio_quantile <= 1.005
    assert made.replayed.saving_mean > 0.01
    assert made.plan is not None
    others = replay_of(PROBLEM, samples(noise(0.03, seed=7, iterations=60)))
    clocks = np.zeros(len(GRAPH), dtype=np.int64)
    for stage in made.plan.stages:
        for p in stage:
            clocks[GRAPH.node_of[p.instruction]] = p.frequency_mhz
    assert others.under(clocks).time_s.sum() <= 1.004 * others.at_full_clocks.time_s.sum()


def test_catching_up_saves_where_a_static_plan_cannot() -> None:
    """Microbatches of very different lengths, each as long in both stages, of which one is much the longer."""
    long = bundled_profile(2)
    profile = long.scaled({key: 1.0 if key[0] else 0.6 for key in long.table})
    streams = one_f_one_b(2, MICROBATCHES)
    length = np.exp(0.12 * np.random.default_rng(3).standard_normal((12, 8, MICROBATCHES)))
    durations = tuple(
        tuple(
            tuple(
                tuple(profile.table[stage, op.kind][0].time_s * replica[op.microbatch] for op in stream)
                for stage, stream in enumerate([[op for op in s if isinstance(op, Compute)] for s in streams])
            )
            for replica in iteration
        )
        for iteration in length.tolist()
    )
    wanted = PlanRequest("1F1B", streams, {}, profile, [BLOCKING_W] * 2, margin=0.01, samples=Samples(durations))
    static, caught = answer_to(wanted), answer_to(replace(wanted, catch_up=True))
    assert static.replayed is not None
    assert caught.replayed is not None
    assert caught.replayed.catch_up
    assert caught.replayed.saving_mean > static.replayed.saving_mean + 0.01
    assert caught.replayed.time_ratio_mean <= 1.002


def test_where_nothing_can_be_promised_the_plan_is_full_clocks_and_says_why() -> None:
    factors = noise(0.6)
    forwards = [n for n, i in enumerate(GRAPH.instructions) if i is not None and (i.stage, i.kind) == (1, "forward")]
    factors[:, :, forwards] = np.exp(1.2 * np.random.default_rng(5).standard_normal((12, 1, len(forwards))))
    made = answer(samples(factors))
    assert made.plan is not None
    assert {clock for stage in range(STAGES) for clock in made.plan.clocks_mhz(stage)} == {1400}
    assert made.plan.saving == 0
    assert made.replayed is not None
    assert made.replayed.time_ratio_mean == 1.0
    assert "forward of stage 1 varies by" in made.replayed.obstacle
    assert "in one of 10 iterations" in made.replayed.obstacle
    assert made.catch_up == ()


def stalled(iteration: int = 3, stage: int = 0, by: float = 1.0) -> FloatArray:
    """Iterations that vary little, but for one in which an instruction off the critical path takes twice as long."""
    factors = noise(0.001)
    nodes = [node for node in GRAPH.stage_nodes[stage].tolist() if GRAPH.instructions[node] is not None]
    factors[iteration, 0, nodes[len(nodes) // 2]] += by
    return factors


@pytest.mark.parametrize("catch_up", [False, True])
def test_one_stall_among_the_iterations_is_said_to_decide_and_even_ones_are_not(catch_up: bool) -> None:
    even, one = answer(samples(noise(0.001)), catch_up), answer(samples(stalled()), catch_up)
    assert even.replayed is not None
    assert one.replayed is not None
    assert not even.replayed.hinges
    assert one.replayed.hinges == (one.replayed.saving_mean < even.replayed.saving_mean - 0.01)
    if not catch_up:
        assert one.replayed.hinges
    if one.replayed.obstacle:
        assert "without one of these iterations there would be a plan" in one.replayed.obstacle
    kept = replace(samples(stalled()), durations_s=samples(stalled()).durations_s[4:])
    others = answer(replace(kept, as_run_s=kept.durations_s, starts_s=kept.starts_s[4:]), catch_up)
    assert others.replayed is not None
    assert not others.replayed.hinges, "the stall is not among these"
    assert others.replayed.saving_mean == pytest.approx(even.replayed.saving_mean, abs=0.01)


def test_stalls_in_several_iterations_are_what_this_job_is_like() -> None:
    factors = noise(0.001)
    for iteration in range(0, 12, 3):
        factors[iteration] = stalled(iteration)[iteration]
    made = answer(samples(factors), catch_up=False)
    assert made.replayed is not None
    assert not made.replayed.hinges


@pytest.mark.parametrize("catch_up", [False, True])
@pytest.mark.parametrize("stage", range(STAGES))
def test_one_interruption_among_the_iterations_costs_no_saving(catch_up: bool, stage: int) -> None:
    even = answer(samples(noise(0.001)), catch_up).replayed
    one = answer(samples(stalled(stage=stage, by=20.0)), catch_up).replayed
    assert even is not None
    assert one is not None
    assert one.kept
    assert not one.obstacle
    assert one.iterations == even.iterations - 1
    assert one.saving_mean == pytest.approx(even.saving_mean, abs=0.01)


def test_an_interruption_counts_as_an_iteration_that_is_longer_than_allowed() -> None:
    """Of twelve one may be: beside an interruption no other, and of two interruptions neither is left out."""
    both = stalled()
    both[7] = stalled(7, by=20.0)[7]
    made = answer(samples(both), catch_up=False).replayed
    alone = answer(samples(stalled()), catch_up=False).replayed
    assert made is not None
    assert alone is not None
    assert made.iterations == 11
    assert made.saving_mean <= alone.saving_mean + 1e-9, "the other stall decides as it does without the interruption"
    twice = stalled(3, by=20.0)
    twice[7] = stalled(7, stage=1, by=30.0)[7]
    made = answer(samples(twice), catch_up=False).replayed
    assert made is not None
    assert made.iterations == 12


@given(size=st.floats(0.2, 8.0), sigma=st.floats(0.0, 0.1), iterations=st.integers(1, 24), replicas=st.integers(1, 2))
@settings(max_examples=20, deadline=None)
def test_larger_steps_and_usual_variation_are_no_interruptions(
    size: float, sigma: float, iterations: int, replicas: int
) -> None:
    factors = noise(sigma, iterations=iterations, replicas=replicas)
    factors[iterations // 2] *= size
    replay = Replay(PROBLEM, PROBLEM.full_clock_s * factors)
    assert not replay.interrupted.any()


def test_more_effort_is_spent_on_the_margin_that_was_chosen() -> None:
    made = samples(noise(0.01))
    quick, normal = answer(made), answer(made, effort="normal")
    assert quick.replayed is not None
    assert normal.replayed is not None
    assert normal.replayed.kept
    assert normal.replayed.saving_mean >= quick.replayed.saving_mean - 1e-9


def test_an_allowed_slowdown_is_used_and_kept_to() -> None:
    made, even = answer(samples(noise(0.01)), slowdown=0.1), answer(samples(noise(0.01)))
    assert made.replayed is not None
    assert even.replayed is not None
    assert 1.02 < made.replayed.time_ratio_mean <= 1.102
    assert made.replayed.saving_mean > even.replayed.saving_mean


def test_without_samples_a_plan_is_made_as_ever_and_ranks_may_catch_up() -> None:
    made = answer(None)
    assert made.replayed is None
    assert len(made.catch_up) == STAGES
    assert answer(None, catch_up=False).catch_up == ()


def test_what_a_rank_is_told_fits_its_stage() -> None:
    made = answer(samples(noise(0.05), delay_s=0.02))
    assert made.plan is not None
    assert made.replayed is not None
    assert made.replayed.catch_up
    assert len(made.catch_up) == STAGES
    for stage, told in enumerate(made.catch_up):
        assert len(told.latest_starts_s) == len(told.usual_delays_s) == len(told.kinds) == 2 * MICROBATCHES
        assert told.usual_delays_s == pytest.approx([0.02] * (2 * MICROBATCHES))
        planned = [p.instruction.kind for p in made.plan.stages[stage]]
        assert list(told.kinds) == planned
        for options in told.options.values():
            times = [time_s for _, time_s, _ in options]
            assert times == sorted(times)
            assert options[0][0] == 1400


def test_usual_delays_are_against_what_the_graph_says_of_the_same_durations() -> None:
    made = samples(noise(0.2, iterations=3), delay_s=0.015)
    instructions = PROBLEM.instruction_nodes
    assert usual_delays(PROBLEM, made)[instructions] == pytest.approx(0.015)
    assert not usual_delays(PROBLEM, Samples(made.durations_s)).any()
    assert not usual_delays(PROBLEM, None).any()


def test_gaps_are_what_instructions_begin_late_by_whenever_ranks_begin() -> None:
    draw, instructions = np.random.default_rng(1), PROBLEM.instruction_nodes
    factors, begins_s = noise(0.1, iterations=40), draw.uniform(0.0, 0.03, (40, STAGES))
    injected_s = np.zeros((len(GRAPH), 40))
    injected_s[instructions] = 0.02 * (draw.uniform(size=(len(instructions), 40)) < 0.1)
    starts = []
    for column in range(40):
        took_s = GRAPH.durations(PROBLEM.full_clock_s * factors[column, 0])
        begun_s = finishes(GRAPH, (took_s + injected_s[:, column])[:, None])[:, 0] - took_s
        for nodes, begin_s in zip(GRAPH.stage_nodes, begins_s[column], strict=True):
            begun_s[nodes] -= begin_s
        starts.append((per_stage(begun_s),))
    found = gaps_of(PROBLEM, replace(samples(factors), starts_s=tuple(starts)))
    assert found is not None
    off_s = np.abs(found.gaps_s - injected_s)[instructions]
    assert np.median(off_s) < 0.001
    assert found.gaps_s.sum() == pytest.approx(injected_s.sum(), rel=0.1)
    assert np.corrcoef(found.gaps_s[instructions].ravel(), injected_s[instructions].ravel())[0, 1] > 0.9
    assert found.usual_s.max() > 0
    assert gaps_of(PROBLEM, Samples(samples(factors).durations_s)) is None


def test_an_answer_passes_through_json() -> None:
    made = answer(samples(noise(0.02)))
    assert PlanAnswer.from_dict(made.to_dict(), made.planning_time_s) == made


# Power budgets.


@pytest.mark.parametrize("sigma", [0.0, 0.03])
@pytest.mark.parametrize("share", [0.8, 0.6])
def test_within_a_power_budget_power_is_kept_over_iterations_as_they_vary(share: float, sigma: float) -> None:
    replicas = 2
    ran = samples(noise(sigma, replicas=replicas))
    wanted = PlanRequest(
        schedule="1F1B",
        streams=STREAMS,
        constant_time_s=CONSTANTS,
        profile=PROFILE,
        blocking_power_w=[BLOCKING_W] * STAGES,
        samples=ran,
        margin=0.01,
    )
    full_w = plan_for(replace(wanted, target=Target.full())).power_w
    budget = PowerBudget(replicas * share * full_w).placed(list(range(STAGES)) * replicas)
    made = answer_to(replace(wanted, target=Target.power_budget(budget)))
    assert made.plan is not None
    assert made_again(replace(wanted, target=Target.power_budget(budget)), made) == made.plan
    assert made.replayed is not None
    assert made.replayed.kept
    assert made.replayed.obstacle == ""
    outcome = replay_of(PROBLEM, ran).under(clocks_of(made.plan, GRAPH), None, made.plan.wait_clocks_mhz)
    drawn_w = float(outcome.energy_j.sum() / outcome.time_s.sum())
    assert drawn_w <= replicas * share * full_w * 1.002
    assert drawn_w >= 0.9 * replicas * share * full_w, "it is as fast as the budget allows"
    held = InForce(
        tuple(tuple(made.plan.clocks_mhz(stage)) for stage in range(STAGES)),
        (),
        made.replayed.margin,
        made.overheads.transfer_s,
        made.plan.wait_clocks_mhz,
    )
    again = answer_to(replace(wanted, target=Target.power_budget(budget), in_force=held))
    assert again.plan is None, "what keeps the budget stays in force"
    tighter = replace(budget, job_w=0.8 * replicas * share * full_w)
    anew = answer_to(replace(wanted, target=Target.power_budget(tighter), in_force=held))
    assert anew.held is not None
    assert not anew.held.kept

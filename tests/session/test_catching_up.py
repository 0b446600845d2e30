"""From measured iterations to ranks that catch up: planner, plan parts and controllers of a whole pipeline together.

The pipeline runs on a graph that the planner does not know: transfers take time, and every rank's iteration begins at
another time. Ranks see nothing but when their own instructions begin and end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from perseus_plugin.control.controller import Controller
from perseus_plugin.exchange.messages import CatchUpPart
from perseus_plugin.iteration.graph import FloatArray, build_graph
from perseus_plugin.iteration.replayed import InForce, Overheads, Samples
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.process import answer_to
from perseus_plugin.planning.request import PlanAnswer, PlanRequest
from perseus_plugin.planning.targets import Target
from perseus_plugin.profiling.profile import Profile
from tests.planning.jobs import bundled_profile

STAGES, MICROBATCHES, BLOCKING_W = 2, 8, 80.0
STREAMS = one_f_one_b(STAGES, MICROBATCHES)
KNOWN = build_graph(STREAMS)


def profile() -> Profile:
    """The second stage takes 1.5 times as long."""
    even = bundled_profile(STAGES)
    return Profile(
        {
            (stage, kind): tuple(m.scaled(size) for m in even.table[0, kind])
            for stage, size in enumerate((1.0, 1.5))
            for kind in ("forward", "backward")
        }
    )


PROFILE = profile()
TIME_S = {(stage, kind, m.frequency_mhz): m.time_s for stage, kind, m in PROFILE.rows()}
TOP_MHZ = 1400
FULL_S = np.array([TIME_S[i.stage, i.kind, TOP_MHZ] for i in KNOWN.instructions if i is not None])


class NoRequests:
    """A GPU that changes its clock at once; what is asked for is what `begin` returns."""

    def request(self, frequency_mhz: int | None, apply_at_s: float = 0.0) -> None:
        pass


@dataclass
class Ran:
    """An iteration. Starts are since each rank's own begin."""

    time_s: float
    as_run_s: FloatArray
    starts_s: FloatArray
    raised: int


class Pipeline:
    """One replica.

    Args:
        transfer_s: how long a transfer takes.
        offsets_s: of each rank's begin of an iteration.
        end_s: what an iteration takes after its last instruction.
    """

    def __init__(
        self, transfer_s: float = 0.0, offsets_s: tuple[float, float] = (0.010, -0.020), end_s: float = 0.0
    ) -> None:
        self._offsets_s, self._end_s = offsets_s, end_s
        self.graph = build_graph(STREAMS, latency_s=transfer_s)
        self.controllers = [Controller(NoRequests()) for _ in range(STAGES)]
        self.clocks_mhz = [[TOP_MHZ] * 2 * MICROBATCHES for _ in range(STAGES)]
        self._now_s = 1000.0

    def follow(self, answer: PlanAnswer) -> None:
        assert answer.plan is not None
        for stage, controller in enumerate(self.controllers):
            clocks = self.clocks_mhz[stage] = answer.plan.clocks_mhz(stage)
            planned = answer.plan.stages[stage]
            times_s = [TIME_S[stage, p.instruction.kind, p.frequency_mhz] for p in planned]
            told = answer.catch_up[stage] if answer.catch_up else None
            controller.follow(
                clocks, times_s, None if told is None else CatchUpPart.model_validate(told, from_attributes=True)
            )

    def run(self, full_s: FloatArray) -> Ran:
        """An iteration whose instructions take so long at full clocks, by node of `KNOWN`."""
        graph, zero_s = self.graph, self._now_s
        begins_s = [zero_s + offset_s for offset_s in self._offsets_s]
        for controller, begin_s in zip(self.controllers, begins_s, strict=True):
            controller.start(begin_s)
        positions, raised = [0] * STAGES, 0
        finish, as_run, starts = np.zeros(len(graph)), np.zeros(len(graph)), np.zeros(len(graph))
        for node, one in enumerate(graph.instructions):
            assert one is not None
            into = [(int(graph.edge_source[e]), float(graph.edge_latency_s[e])) for e in graph.edges_into(node)]
            start_s = max((finish[source] + latency for source, latency in into), default=zero_s)
            faster = self.controllers[one.stage].begin(positions[one.stage], start_s)
            clock = faster or self.clocks_mhz[one.stage][positions[one.stage]]
            raised += faster is not None
            known = KNOWN.node_of[one]
            as_run[known] = full_s[known] * TIME_S[one.stage, one.kind, clock] / TIME_S[one.stage, one.kind, TOP_MHZ]
            starts[known] = start_s - begins_s[one.stage]
            finish[node] = start_s + as_run[known]
            self.controllers[one.stage].end(finish[node])
            positions[one.stage] += 1
        end_s = float(finish.max()) + self._end_s
        self._now_s = end_s + 0.1
        return Ran(end_s - zero_s, as_run, starts, raised)


def per_stage(by_node: FloatArray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(by_node[nodes].tolist()) for nodes in KNOWN.stage_nodes)


def lengths(spread: float, count: int, seed: int) -> list[FloatArray]:
    """Full-clock durations of iterations whose microbatches differ in length, alike in both stages."""
    rng = np.random.default_rng(seed)
    of_node = [0 if one is None else one.microbatch for one in KNOWN.instructions]
    return [FULL_S * np.exp(spread * rng.standard_normal(MICROBATCHES))[of_node] for _ in range(count)]


def request(pipeline: Pipeline, iterations: list[FloatArray], in_force: InForce | None = None) -> PlanRequest:
    """What the planner is asked after these iterations."""
    ran = [pipeline.run(one) for one in iterations]
    samples = Samples(
        tuple((per_stage(one),) for one in iterations),
        tuple((per_stage(one.as_run_s),) for one in ran),
        tuple((per_stage(one.starts_s),) for one in ran),
        tuple((one.time_s,) for one in ran),
    )
    return PlanRequest(
        "1F1B",
        STREAMS,
        {},
        PROFILE,
        [BLOCKING_W] * STAGES,
        margin=0.01,
        samples=samples,
        catch_up=True,
        in_force=in_force,
    )


def total_s(pipeline: Pipeline, iterations: list[FloatArray]) -> tuple[float, int]:
    ran = [pipeline.run(one) for one in iterations]
    return sum(one.time_s for one in ran), sum(one.raised for one in ran)


@pytest.mark.parametrize("transfer_s", [0.0, 0.003])
def test_on_even_iterations_nobody_is_late_whatever_the_graph_does_not_know(transfer_s: float) -> None:
    pipeline = Pipeline(transfer_s)
    seen = request(pipeline, [FULL_S] * 4)
    means = replace(seen, samples=None)
    static = answer_to(means)
    # The plan of the means, with delays that were seen.
    delays = answer_to(replace(seen, in_force=in_force_of(static))).catch_up or static.catch_up
    pipeline.follow(replace(static, catch_up=delays))
    _, raised = total_s(pipeline, [FULL_S] * 3)
    assert raised == 0


def in_force_of(answer: PlanAnswer) -> InForce:
    assert answer.plan is not None
    return InForce(tuple(tuple(answer.plan.clocks_mhz(s)) for s in range(STAGES)), answer.catch_up, 0.01)


def test_without_the_usual_delays_ranks_would_always_be_late() -> None:
    pipeline = Pipeline(0.02)
    static = answer_to(replace(request(pipeline, [FULL_S] * 4), samples=None))
    pipeline.follow(static)
    _, raised = total_s(pipeline, [FULL_S])
    assert raised > 0


def test_a_zero_that_moves_while_the_plan_is_followed_is_learnt_anew() -> None:
    """A rank's iterations begin to begin earlier, so that all of it is late: a loader has become faster, say."""
    static = answer_to(replace(request(Pipeline(), [FULL_S] * 4), samples=None))
    now = Pipeline(offsets_s=(-0.2, -0.020))
    now.follow(static)
    _, late = total_s(now, [FULL_S] * 2)
    assert late > 0
    review = answer_to(request(now, [FULL_S] * 4, in_force_of(static)))
    assert review.plan is None, "the plan stays"
    told = replace(static, catch_up=review.catch_up)
    now.follow(told)
    _, raised = total_s(now, [FULL_S] * 2)
    assert raised == 0
    again = answer_to(request(now, [FULL_S] * 4, in_force_of(told)))
    assert again.plan is None
    assert again.catch_up == (), "nothing has moved since"


def test_transfers_that_take_longer_than_they_did_are_planned_for() -> None:
    static = answer_to(replace(request(Pipeline(), [FULL_S] * 4), samples=None))
    now = Pipeline(0.02)
    now.follow(static)
    full_s, _ = total_s(Pipeline(0.02), [FULL_S] * 4)
    review = answer_to(request(now, [FULL_S] * 4, in_force_of(static)))
    assert review.plan is not None, "the one in force makes iterations longer now"
    now.follow(review)
    planned_s, _ = total_s(now, [FULL_S] * 4)
    assert planned_s <= 1.001 * full_s


@pytest.mark.parametrize("transfer_s", [0.0, 0.004, 0.02])
@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_the_time_of_transfers_is_known_from_measured_starts(transfer_s: float, spread: float) -> None:
    answer = answer_to(request(Pipeline(transfer_s), lengths(spread, 6, seed=5)))
    assert answer.overheads.transfer_s == pytest.approx(transfer_s, abs=1e-4)


def test_where_starts_do_not_tell_transfers_take_no_time() -> None:
    wanted = request(Pipeline(0.02), [FULL_S] * 4)
    assert wanted.samples is not None
    rng = np.random.default_rng(6)
    scattered = tuple(
        tuple(tuple(tuple(rng.uniform(0, 2, len(stage)).tolist()) for stage in replica) for replica in one)
        for one in wanted.samples.starts_s
    )
    assert answer_to(replace(wanted, samples=replace(wanted.samples, starts_s=scattered))).overheads.transfer_s == 0
    assert answer_to(replace(wanted, samples=Samples(wanted.samples.durations_s))).overheads.transfer_s == 0
    given = Overheads(transfer_s=0.003)
    assert answer_to(replace(wanted, overheads=given)).overheads == given


@pytest.mark.parametrize("end_s", [0.0, 0.3])
def test_a_plan_slows_nothing_that_transfers_make_critical(end_s: float) -> None:
    """With transfers in the graph, plan and replay are those of the real pipeline, to the digit."""
    pipeline = Pipeline(0.02, end_s=end_s)
    answer = answer_to(request(pipeline, [FULL_S] * 4))
    assert answer.overheads.end_s == pytest.approx(end_s, abs=2e-3)
    full_s, _ = total_s(pipeline, [FULL_S])
    pipeline.follow(answer)
    planned_s, _ = total_s(pipeline, [FULL_S])
    assert planned_s <= full_s * 1.0005
    assert answer.plan is not None
    assert answer.plan.baseline_time_s == pytest.approx(full_s, rel=1e-3)


def test_a_slowdown_is_one_of_the_whole_iteration() -> None:
    pipeline = Pipeline(0.004, end_s=0.3)
    answer = answer_to(replace(request(pipeline, [FULL_S] * 4), target=Target.slowdown(0.1)))
    full_s, _ = total_s(pipeline, [FULL_S])
    pipeline.follow(answer)
    planned_s, _ = total_s(pipeline, [FULL_S])
    assert answer.plan is not None
    assert answer.plan.deadline_s == pytest.approx(1.1 * full_s, rel=1e-3)
    assert 1.08 * full_s < planned_s <= 1.1005 * full_s


@pytest.mark.parametrize("transfer_s", [0.0, 0.003])
def test_with_microbatches_of_varying_length_iterations_keep_to_their_time_and_save(transfer_s: float) -> None:
    pipeline = Pipeline(transfer_s)
    answer = answer_to(request(pipeline, lengths(0.05, 12, seed=1)))
    assert answer.replayed is not None
    assert answer.replayed.saving_mean > 0.02
    others = lengths(0.05, 60, seed=2)
    full_s, _ = total_s(Pipeline(transfer_s), others)
    pipeline.follow(answer)
    planned_s, _ = total_s(pipeline, others)
    assert planned_s <= 1.005 * full_s


def test_catching_up_is_what_keeps_a_bold_plan_to_its_time() -> None:
    pipeline = Pipeline(0.004)
    seen = request(pipeline, lengths(0.2, 12, seed=3))
    bold = answer_to(replace(seen, samples=None))
    delays = answer_to(replace(seen, in_force=in_force_of(bold))).catch_up
    others = lengths(0.2, 40, seed=4)
    full_s, _ = total_s(Pipeline(0.004), others)
    static, catching = Pipeline(0.004), Pipeline(0.004)
    static.follow(replace(bold, catch_up=()))
    catching.follow(replace(bold, catch_up=delays or bold.catch_up))
    lost_s, without = total_s(static, others)
    kept_s, raised = total_s(catching, others)
    assert without == 0
    assert raised > 0
    assert lost_s - full_s > 3 * (kept_s - full_s)

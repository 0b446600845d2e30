"""A plan that holds for iterations as they vary: margin and catching up are chosen by replaying measured iterations.

Margins are tried from the least one upwards, each with a few ways of catching up. Of those under which the replayed
iterations keep to their time, the best one is chosen; where none keeps to it, full clocks. Where that is the
doing of one iteration it is said: a single stall tells nothing of how often there is one, and newer iterations will.

Under a power budget it is power that has to be kept, and iterations are as long as they have to be; see `within_power`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import FloatArray, IntArray, PipelineGraph
from perseus_plugin.iteration.replayed import InForce, PerStage, Replayed, Samples, StageCatchUp
from perseus_plugin.planning.options import PlanningProblem
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.replay import CatchUp, Outcome, Replay, by_node, clocks_of, finishes, latest_starts

MARGINS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
_GRACES = (0.0, 0.01)  # how far behind a rank may fall before it catches up, as a share of the iteration
_SIZE_WEIGHTS = (0.5, 2.0, 8.0)
_USUAL_WEIGHT = 2.0
TIME_WORTH = 10.0  # a percent of time is worth so many percents of energy: hardware costs more than electricity
_ERRORS = 2.0  # standard errors by which the mean has to keep within its tolerance
_DELAYS_MOVED = 0.005  # share of an iteration by which usual delays may be off before ranks are told
WORTH_CHANGING = 0.005  # share of energy by which another plan has to be better than one that holds
_TIGHTER = 5  # times that less power is tried
_POWER_TOLERANCE = 0.002  # share of a power budget within which a replay keeps it
_LEAST_SAVING = 0.001  # less is not worth changing clocks for
_HINGES = 0.01  # share of energy that must not depend on a single iteration


@dataclass(frozen=True)
class Promise:
    """What the replayed iterations have to keep to, against full clocks.

    Attributes:
        slowdown: that the plan is allowed, as a share.
        quantile: share of iterations that must keep to it.
        tolerance: how much longer than that these may take, as a share of the iteration at full clocks.
        mean_tolerance: the same for the mean of all iterations.
        power_w: most that all replayed pipelines together may draw on average, instead of all this; None: no limit.
    """

    slowdown: float = 0.0
    quantile: float = 0.9
    tolerance: float = 0.005
    mean_tolerance: float = 0.002
    power_w: float | None = None


@dataclass(frozen=True, eq=False)
class RobustPlan:
    """What was chosen.

    Attributes:
        plan: the plan; full clocks where nothing keeps the promise. It counts as cut short if one that was tried was.
        catch_up: what late ranks do under it; None: nothing.
        replayed: what the replay said of it.
        but_for_one: what it said without the iteration that the plan makes longest; None: not looked at.
        sort: which of the plans that were tried it is.
        drawn: share of a power budget that it is planned to draw.
    """

    plan: Plan
    catch_up: CatchUp | None
    replayed: Replayed
    but_for_one: Replayed | None = None
    sort: Literal["rounded", "refined", "only waits", "full clocks"] = "rounded"
    drawn: float = 1.0


def margins_from(least: float) -> tuple[float, ...]:
    """The margins to try: the least one, and those above it."""
    return (least, *(margin for margin in MARGINS if margin > least * (1 + 1e-9)))


def choose(
    plan_with: Callable[[float], Plan],
    full_clocks: Plan,
    replay: Replay,
    promise: Promise,
    margins: Iterable[float],
    *,
    catches_up: bool,
    latency_s: float = 0.0,
    refined: Callable[[float], Plan] | None = None,
    only_waits: Plan | None = None,
) -> RobustPlan:
    """Try the margins and choose.

    Args:
        plan_with: makes the plan of a margin, quickly.
        full_clocks: the plan to fall back to.
        replay: of the iterations that were measured.
        promise: what has to be kept.
        margins: to try.
        catches_up: whether ranks may catch up.
        latency_s: how long a clock change takes.
        refined: makes the plan of the margin that was chosen, with more effort.
        only_waits: full clocks but for waits, to be tried too; None: no wait is spent at a lower clock.

    Raises:
        PlanError: there is no plan at any margin.
    """
    seen: list[RobustPlan] = []
    failure: PlanError | None = None
    for margin in margins:
        try:
            plan = plan_with(margin)
        except PlanError as error:  # few clock changes may not do at every margin
            failure = error
            continue
        seen += _candidates(plan, margin, replay, promise, catches_up, latency_s)
    if not seen and failure is not None:
        raise failure
    cut_short = any(one.plan.cut_short for one in seen)
    at_least = [] if only_waits is None else _candidates(only_waits, 0.0, replay, promise, False, latency_s)
    at_least = [replace(one, sort="only waits") for one in at_least]
    kept = [one for one in [*seen, *at_least] if _saves(one.replayed)]
    others = [one.but_for_one for one in seen if one.but_for_one is not None]
    without_one = max((_worth(one, promise) for one in others if _saves(one)), default=0.0)
    if not kept:
        nearest = min(seen, key=lambda one: (one.replayed.kept, one.replayed.time_ratio_mean)).replayed
        at_full = judge(clocks_of(full_clocks, replay.graph), (), replay, promise, None, 0.0)
        hinges, obstacle = without_one > _HINGES, _obstacle(replay, promise, nearest)
        if hinges:
            obstacle += "; without one of these iterations there would be a plan, and newer ones are looked at soon"
        replayed = replace(at_full, obstacle=obstacle, hinges=hinges)
        return RobustPlan(replace(full_clocks, cut_short=cut_short), None, replayed, sort="full clocks")
    best = max(kept, key=lambda one: _worth(one.replayed, promise))
    if refined is not None and best not in at_least:
        margin = best.replayed.margin
        more = _candidates(refined(margin), margin, replay, promise, catches_up, latency_s)
        more = [replace(one, sort="refined") for one in more]
        cut_short = cut_short or any(one.plan.cut_short for one in more)
        best = max([best, *(one for one in more if one.replayed.kept)], key=lambda one: _worth(one.replayed, promise))
    hinges = without_one > _worth(best.replayed, promise) + _HINGES
    return replace(best, plan=replace(best.plan, cut_short=cut_short), replayed=replace(best.replayed, hinges=hinges))


def _saves(replayed: Replayed) -> bool:
    return replayed.kept and replayed.saving_mean > _LEAST_SAVING


def within_power(plan_at: Callable[[float], Plan], replay: Replay, promise: Promise) -> RobustPlan:
    """The plan whose replay keeps the power that is promised, nobody catching up.

    A replay knows of clock changes that take time and of iterations that vary, and may draw more than was planned.

    Args:
        plan_at: makes the plan that is planned to draw so many times the power that is allowed.
        replay: of the iterations that were measured.
        promise: what has to be kept, with its power.

    Raises:
        PlanError: there is no plan even for all the power that is allowed.
    """
    assert promise.power_w is not None  # the caller looked
    share, found = 1.0, None
    for _ in range(_TIGHTER):
        try:
            plan = plan_at(share)
        except PlanError:  # so little may not be possible
            if found is None:
                raise
            break
        clocks, waits = clocks_of(plan, replay.graph), plan.wait_clocks_mhz
        outcome = replay.under(clocks, None, waits)
        replayed = judged(outcome, replay.at_full_clocks, replay.interrupted, promise, False, 0.0)
        found = RobustPlan(plan, None, replayed, drawn=share)
        if found.replayed.kept:
            break
        drawn_w = float(outcome.energy_j.sum() / outcome.time_s.sum())
        share *= min(promise.power_w / drawn_w, 1 - _POWER_TOLERANCE)  # interrupted iterations draw less
    assert found is not None
    return found


def _candidates(
    plan: Plan, margin: float, replay: Replay, promise: Promise, catches_up: bool, latency_s: float
) -> list[RobustPlan]:
    """A plan without catching up and, if that is allowed, with each of the ways to do it."""
    ways = ways_to_catch_up(replay.problem, plan, latency_s) if catches_up else []
    clocks, waits, found = clocks_of(plan, replay.graph), plan.wait_clocks_mhz, []
    for way in (None, *ways):
        outcome, full = replay.under(clocks, way, waits), replay.at_full_clocks
        interrupted = replay.interrupted
        replayed = judged(outcome, full, interrupted, promise, way is not None, margin)
        others = np.arange(len(full.time_s)) != np.argmax(outcome.time_s / full.time_s)
        but_for_one = None
        if others.any():
            but_for_one = judged(
                outcome.of(others), full.of(others), interrupted[others], promise, way is not None, margin
            )
        found.append(RobustPlan(plan, way, replayed, but_for_one))
    return found


def ways_to_catch_up(problem: PlanningProblem, plan: Plan, latency_s: float) -> list[CatchUp]:
    """Ways to catch up under a plan, by how soon ranks begin to and what they make of the step's size."""
    planned_s = problem.planned_s(clocks_of(plan, problem.graph))
    deadline_s = max(plan.deadline_s, problem.graph.iteration_time_s(planned_s))
    return [
        CatchUp(latest_starts(problem.graph, planned_s, deadline_s * (1 + grace)), latency_s, weight)
        for grace in _GRACES
        for weight in _SIZE_WEIGHTS
    ]


def usual_way_to_catch_up(problem: PlanningProblem, plan: Plan, latency_s: float) -> CatchUp:
    """Where no iterations have been measured that could say which way is best."""
    ways = ways_to_catch_up(problem, plan, latency_s)
    return next(way for way in ways if way.size_weight == _USUAL_WEIGHT)


def judge(
    clocks_mhz: IntArray,
    wait_clocks_mhz: Sequence[Sequence[tuple[int, int]]],
    replay: Replay,
    promise: Promise,
    catch_up: CatchUp | None,
    margin: float,
    errors: float = _ERRORS,
) -> Replayed:
    """Whether a plan would have kept the promise over the measured iterations.

    Args:
        clocks_mhz: the plan's, by node.
        wait_clocks_mhz: of its waits; see `Plan.wait_clocks_mhz`.
        replay: of the iterations.
        promise: what has to be kept.
        catch_up: what late ranks do; None: nothing.
        margin: the plan's.
        errors: standard errors by which the mean has to keep within its tolerance.

    Raises:
        PlanError: the plan is not for the replay's profile.
    """
    outcome = replay.under(clocks_mhz, catch_up, wait_clocks_mhz)
    return judged(outcome, replay.at_full_clocks, replay.interrupted, promise, catch_up is not None, margin, errors)


def judged(
    outcome: Outcome,
    full: Outcome,
    interrupted: npt.NDArray[np.bool_],
    promise: Promise,
    catches_up: bool,
    margin: float,
    errors: float = _ERRORS,
) -> Replayed:
    """What a replay says. Interrupted iterations count as longer than allowed, and for nothing else.

    Where there are more of them than may be, they are what this job is like, and count as all others do.
    """
    count = len(full.time_s)
    place = math.ceil(promise.quantile * (count - 1))  # of the quantile among iterations by rising length
    if interrupted.sum() <= count - 1 - place:
        outcome, full = outcome.of(~interrupted), full.of(~interrupted)
    ratio = outcome.time_s / full.time_s
    mean = float(outcome.time_s.sum() / full.time_s.sum())
    at_quantile = float(np.sort(ratio)[place])
    allowed = 1 + promise.slowdown
    mean_error = float(np.std(ratio) / math.sqrt(len(ratio)))
    if promise.power_w is None:
        kept = mean + errors * mean_error <= allowed + promise.mean_tolerance
        kept = kept and at_quantile <= allowed + promise.tolerance
    else:
        kept = float(outcome.energy_j.sum() / outcome.time_s.sum()) <= promise.power_w * (1 + _POWER_TOLERANCE)
    saving, low, high = saving_of(outcome, full)
    return Replayed(
        iterations=len(ratio),
        margin=margin,
        catch_up=catches_up,
        time_ratio_mean=mean,
        time_ratio_quantile=at_quantile,
        saving_mean=saving,
        saving_interval=(low, high),
        raised=outcome.raised,
        kept=kept,
    )


def is_much_better(replayed: Replayed, held: Replayed, promise: Promise, least: float = WORTH_CHANGING) -> bool:
    """Whether another plan is so much better than the one in force that it is worth going over to it.

    Args:
        replayed: the other plan.
        held: the one in force.
        promise: what has to be kept.
        least: share of energy by which it has to be better.
    """
    return not replayed.obstacle and _worth(replayed, promise) > _worth(held, promise) + least


def _worth(replayed: Replayed, promise: Promise) -> float:
    """Of plans that keep the promise, one that takes a little more energy is better if it keeps it so much better.

    Within a power budget every second counts.
    """
    if promise.power_w is not None:
        return replayed.saving_mean - TIME_WORTH * (replayed.time_ratio_mean - 1)
    return replayed.saving_mean - TIME_WORTH * max(0.0, replayed.time_ratio_mean - 1 - promise.slowdown)


def saving_of(outcome: Outcome, full: Outcome) -> tuple[float, float, float]:
    """Share of energy saved over all iterations, and the interval in which it would be over many more such ones."""
    share = 1 - float(outcome.energy_j.sum() / full.energy_j.sum())
    weight = full.energy_j / full.energy_j.mean()
    error = error_of_mean(weight * (1 - outcome.energy_j / full.energy_j - share))
    return share, share - error, share + error


def error_of_mean(values: npt.NDArray[np.float64]) -> float:
    """How far from the mean of these that of many more such values would be at most, to 95 %; 0 for a single one."""
    count = len(values)
    if count < 2:
        return 0.0
    # Close to Student's 97.5 % point.
    return (1.96 + 2.4 / (count - 1) + 2.4 / (count - 1) ** 2) * float(np.std(values, ddof=1)) / math.sqrt(count)


def _obstacle(replay: Replay, promise: Promise, nearest: Replayed) -> str:
    """What stands in the way of saving."""
    if nearest.kept:
        return "slower clocks save next to nothing within the time that is allowed"
    (stage, kind), spread = largest_spread_within(replay)
    return (
        f"replayed over {nearest.iterations} measured iterations, the nearest plan takes "
        f"{100 * (nearest.time_ratio_mean - 1):.2f} % longer than full clocks, and "
        f"{100 * (nearest.time_ratio_quantile - 1):.2f} % longer in one of {_one_of(promise.quantile)} iterations; "
        f"{kind} of stage {stage} varies by {100 * spread:.0f} % within an iteration"
    )


def _one_of(quantile: float) -> str:
    return f"{1 / (1 - quantile):.3g}"


def largest_spread_within(replay: Replay) -> tuple[tuple[int, str], float]:
    """The (stage, kind) whose durations vary most about their iteration's mean, and by what share."""
    problem = replay.problem
    spreads = {
        key: _relative_deviation(replay.full_s[np.flatnonzero(problem.class_of == k)])
        for k, key in enumerate(problem.keys)
    }
    key = max(spreads, key=lambda one: spreads[one])
    return key, spreads[key]


def _relative_deviation(durations_s: FloatArray) -> float:
    means = durations_s.mean(axis=0)
    return float(np.sqrt(np.mean((durations_s / np.maximum(means, 1e-12) - 1) ** 2)))


# From and to what is told per stage.


def replay_of(problem: PlanningProblem, samples: Samples, latency_s: float = 0.0) -> Replay:
    """A replay of the iterations that were measured; `latency_s` is how long a clock change takes.

    Raises:
        PlanError: the samples do not fit the graph.
    """
    durations_s = [[by_node(problem.graph, replica) for replica in one] for one in samples.durations_s]
    later_s = _begun_later_s(problem, samples)
    if later_s is not None:
        later_s = later_s - np.median(later_s, axis=1, keepdims=True)
    return Replay(problem, np.array(durations_s), later_s, latency_s)


def usual_delays(problem: PlanningProblem, samples: Samples | None) -> FloatArray:
    """How much later than in the graph each instruction usually begins, seen from its own rank; shape (nodes,).

    The graph knows nothing of ranks whose iterations do not begin at the same time, nor of much else. Each iteration is
    compared with the graph's times for its own durations, so that their variation does not count as delay.

    Raises:
        PlanError: the samples do not fit the graph.
    """
    later_s = None if samples is None else _begun_later_s(problem, samples)
    if later_s is None:
        return np.zeros(len(problem.graph))
    usual: FloatArray = np.median(later_s, axis=1)
    return usual


def _begun_later_s(problem: PlanningProblem, samples: Samples) -> FloatArray | None:
    """How much later than the graph says each node began, in each iteration of each replica; None: not known."""
    if not samples.starts_s:
        return None
    graph = problem.graph
    starts_s, as_run_s = _by_column(graph, samples.starts_s), _by_column(graph, samples.as_run_s)
    durations_s = np.where(graph.is_constant[:, None], graph.constant_s[:, None], as_run_s)
    later_s: FloatArray = starts_s - (finishes(graph, durations_s) - durations_s)
    later_s[graph.is_constant] = 0.0
    return later_s


@dataclass(frozen=True, eq=False)
class Gaps:
    """How much longer than usual after the end of all that it waits for each instruction began.

    That is what a host does late, and transfers that take longer than others. What is usual the graph knows.

    Attributes:
        gaps_s: shape (nodes, iterations times replicas), from 0.
        usual_s: shape (nodes,), how much later an instruction usually begins for all gaps before it: what ranks that
            look for lateness do not count.
    """

    gaps_s: FloatArray
    usual_s: FloatArray


def gaps_of(problem: PlanningProblem, samples: Samples | None) -> Gaps | None:
    """Those of iterations that were measured; None: not known.

    Raises:
        PlanError: the samples do not fit the graph.
    """
    if samples is None or not samples.starts_s:
        return None
    graph = problem.graph
    starts_s, as_run_s = _by_column(graph, samples.starts_s), _by_column(graph, samples.as_run_s)
    starts_s += _begins_s(graph, starts_s, as_run_s)[graph.stage]
    ready_s, ends_s = np.zeros_like(starts_s), starts_s + as_run_s
    for low, high, sources, latency_s, offsets in graph.forward_steps:
        ready_s[low:high] = np.maximum.reduceat(ends_s[sources] + latency_s[:, None], offsets, axis=0)
        constant = low + np.flatnonzero(graph.is_constant[low:high])
        ends_s[constant] = ready_s[constant] + graph.constant_s[constant, None]
    later_s = starts_s - ready_s
    gaps_s: FloatArray = np.maximum(0.0, later_s - np.median(later_s, axis=1, keepdims=True))
    gaps_s[graph.is_constant] = 0.0
    durations_s = np.where(graph.is_constant[:, None], graph.constant_s[:, None], as_run_s)
    moved_s = finishes(graph, durations_s + gaps_s) - finishes(graph, durations_s)
    return Gaps(gaps_s, np.median(moved_s, axis=1))


def _begins_s(graph: PipelineGraph, starts_s: FloatArray, as_run_s: FloatArray) -> FloatArray:
    """When the ranks of each stage begin, against the first: shape (stages, iterations times replicas).

    Of the transfers from a stage to the next there is one that the receiver has waited for, and one of those back: what
    the quickest ones seem to take differs by the ranks' begins alone.
    """
    source, target = graph.edge_source, graph.edge_target
    known = ~(graph.is_constant[source] | graph.is_constant[target])

    def quickest_s(here: int, there: int) -> FloatArray | None:
        edges = np.flatnonzero(known & (graph.stage[source] == here) & (graph.stage[target] == there))
        if not len(edges):
            return None
        taken_s: FloatArray = starts_s[target[edges]] - starts_s[source[edges]] - as_run_s[source[edges]]
        return (taken_s - graph.edge_latency_s[edges, None]).min(axis=0)  # type: ignore[no-any-return]

    begins_s = np.zeros((graph.stages, starts_s.shape[1]))
    for stage in range(1, graph.stages):
        there_s, back_s = quickest_s(stage - 1, stage), quickest_s(stage, stage - 1)
        begins_s[stage] = begins_s[stage - 1]
        if there_s is not None and back_s is not None:
            begins_s[stage] += (back_s - there_s) / 2
    return begins_s


def _by_column(graph: PipelineGraph, iterations: Sequence[Sequence[PerStage]]) -> FloatArray:
    """Shape (nodes, iterations times replicas)."""
    columns: FloatArray = np.array([by_node(graph, replica) for one in iterations for replica in one]).T
    return columns


def held_against(
    in_force: InForce, replay: Replay, promise: Promise, latency_s: float, later_s: FloatArray
) -> Replayed:
    """What newer iterations say of the plan that is followed. It is to be given up only if they speak against it.

    Args:
        in_force: the plan.
        replay: of the newer iterations.
        promise: what has to be kept.
        latency_s: how long a clock change takes.
        later_s: shape (nodes,), how much later instructions begin in the replay's graph than in the plan's.

    Raises:
        PlanError: the plan is not for the replay's graph and profile.
    """
    graph = replay.graph
    clocks = by_node(graph, in_force.clocks_mhz).astype(np.int64)
    catch_up = None
    if in_force.catch_up:
        latest = by_node(graph, [stage.latest_starts_s for stage in in_force.catch_up])
        catch_up = CatchUp(latest + later_s, latency_s, in_force.catch_up[0].size_weight)
    return judge(clocks, in_force.wait_clocks_mhz, replay, promise, catch_up, in_force.margin, errors=0.0)


def with_delays(in_force: InForce, problem: PlanningProblem, delays_s: FloatArray) -> tuple[StageCatchUp, ...]:
    """What ranks have to be told anew, as instructions usually begin at other times than they did; else nothing."""
    if not in_force.catch_up:
        return ()
    graph = problem.graph
    before_s = by_node(graph, [stage.usual_delays_s for stage in in_force.catch_up])
    moved_s = np.abs(delays_s - before_s)[problem.instruction_nodes].max()
    if moved_s <= _DELAYS_MOVED * problem.full_clock_time_s:
        return ()
    return tuple(
        replace(
            stage,
            usual_delays_s=tuple(float(delays_s[node]) for node in nodes.tolist() if problem.class_of[node] >= 0),
        )
        for stage, nodes in zip(in_force.catch_up, graph.stage_nodes, strict=True)
    )


def catch_up_by_stage(problem: PlanningProblem, catch_up: CatchUp, delays_s: FloatArray) -> tuple[StageCatchUp, ...]:
    """What each stage's ranks have to know."""
    stages = []
    for nodes in problem.graph.stage_nodes:
        own = [node for node in nodes.tolist() if problem.class_of[node] >= 0]
        classes = {problem.keys[k][1]: problem.classes[k] for k in {int(problem.class_of[node]) for node in own}}
        stages.append(
            StageCatchUp(
                latest_starts_s=tuple(catch_up.latest_start_s[own].tolist()),
                usual_delays_s=tuple(delays_s[own].tolist()),
                kinds=tuple(problem.keys[int(problem.class_of[node])][1] for node in own),
                options={
                    kind: tuple(
                        zip(
                            options.frequency_mhz.tolist(),
                            options.time_s.tolist(),
                            (options.energy_j / options.time_s).tolist(),
                            strict=True,
                        )
                    )
                    for kind, options in classes.items()
                },
                size_weight=catch_up.size_weight,
            )
        )
    return tuple(stages)

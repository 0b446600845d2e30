"""Plans for single iterations, each for its own batch: how long every instruction takes is known before it runs.

The step's pace is that of its slowest replica at full clocks; every replica is planned to be done by then
(`Target.straggler`). Clocks are only rounded, which takes milliseconds. How far predicted times can be trusted is in
the margin, which is chosen by replaying iterations that were measured; where no margin keeps to the time, there are no
such plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import FloatArray
from perseus_plugin.iteration.replayed import Replayed
from perseus_plugin.planning.options import ClockOptions, PlanningProblem
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.planner import Planner
from perseus_plugin.planning.replay import CatchUp, Outcome, Replay, clocks_of, latest_starts
from perseus_plugin.planning.robust import Gaps, Promise, judged
from perseus_plugin.planning.targets import ChangeLimits, Target
from perseus_plugin.profiling.work_model import TimeByWork

MARGINS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
_SMALLEST = 1e-3  # of the profile's time: what an instruction takes at least
_REPLAYED, _FEWEST = 96, 4  # pipelines' iterations that a margin is replayed over, and steps at least


def of_batch(problem: PlanningProblem, sizes: FloatArray) -> PlanningProblem:
    """The problem with every instruction an option class of its own, in which it takes `sizes` times as long.

    Args:
        problem: for usual batches.
        sizes: shape (nodes,), above 0; entries of constant-time nodes are ignored.
    """
    nodes, graph = problem.instruction_nodes, problem.graph
    class_of = np.full(len(graph), -1, dtype=np.int64)
    class_of[nodes] = np.arange(len(nodes))
    before = problem.class_of[nodes]
    factors = np.maximum(sizes[nodes], _SMALLEST)
    pairs = list(zip(before.tolist(), factors.tolist(), strict=True))
    return replace(
        problem,
        classes=tuple(_longer(problem.classes[k], factor) for k, factor in pairs),
        keys=tuple(problem.keys[k] for k, _ in pairs),
        class_of=class_of,
        full_clock=problem.full_clock[before] * factors[:, None],
        full_clock_mhz=problem.full_clock_mhz[before],
        measured=tuple(
            {clock: (time_s * factor, energy_j * factor) for clock, (time_s, energy_j) in problem.measured[k].items()}
            for k, factor in pairs
        ),
    )


def _longer(options: ClockOptions, factor: float) -> ClockOptions:
    return replace(options, time_s=options.time_s * factor, energy_j=options.energy_j * factor)


def sizes_of(
    problem: PlanningProblem, model: Mapping[tuple[int, str], TimeByWork], works: Sequence[float]
) -> FloatArray:
    """How many times as long as in the profile each instruction takes, for `of_batch`.

    Args:
        problem: for usual batches.
        model: of every stage and kind.
        works: of each microbatch.

    Raises:
        PlanError: the works are not those of the graph's microbatches, or a kind is not in the model.
    """
    if len(works) != problem.graph.microbatches:
        raise PlanError(f"works: got {len(works)}; allowed: one for each of {problem.graph.microbatches} microbatches")
    missing = next((key for key in problem.keys if key not in model), None)
    if missing is not None:
        raise PlanError(f"works: the model lacks {missing[1]!r} of stage {missing[0]}; allowed: one of all kinds")
    of_class = [model[key].at(works) / problem.full_clock[k, 0] for k, key in enumerate(problem.keys)]
    sizes = np.ones(len(problem.graph))
    for node in problem.instruction_nodes.tolist():
        one = problem.graph.instructions[node]
        assert one is not None  # it is an instruction
        sizes[node] = of_class[int(problem.class_of[node])][one.microbatch]
    return sizes


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """One replica's plan for one iteration.

    Attributes:
        plan: the plan.
        problem: in which every instruction takes what its microbatch makes it take.
        catch_up: what late ranks do; None: nothing.
    """

    plan: Plan
    problem: PlanningProblem
    catch_up: CatchUp | None


class BatchPlanner:
    """Plans the iterations of one job, each for its own batch.

    Args:
        problem: graph and options for usual batches.
        with_margin: the same with everything below the highest clock taking longer by a margin.
        slowdown: allowed against full clocks, as a share.
        limits: on clock changes.
        schedule: name to put into plans.
        latency_s: how long a clock change takes; None: unknown, and clocks are not lowered in waits.
        catches_up: whether late ranks may catch up.
        lower_while_waiting: whether waits may get lower clocks.
    """

    def __init__(
        self,
        problem: PlanningProblem,
        with_margin: PlanningProblem,
        *,
        slowdown: float = 0.0,
        limits: ChangeLimits | None = None,
        schedule: str = "custom",
        latency_s: float | None = None,
        catches_up: bool = True,
        lower_while_waiting: bool = True,
    ) -> None:
        self.problem, self._with_margin = problem, with_margin
        self._slowdown, self._limits, self._schedule = slowdown, limits or ChangeLimits(), schedule
        self._latency_s, self.catches_up = latency_s, catches_up
        self._wait_latency_s = latency_s if lower_while_waiting else None

    def step(self, sizes: Sequence[FloatArray]) -> list[BatchPlan]:
        """Plans of one step, for the pace of its slowest replica.

        Args:
            sizes: of each replica, see `of_batch`.

        Raises:
            PlanError: clocks may change too rarely.
        """
        problems = [of_batch(self.problem, of_replica) for of_replica in sizes]
        pace_s = (1 + self._slowdown) * max(problem.full_clock_time_s for problem in problems)
        return [self._plan(*pair, pace_s) for pair in zip(problems, sizes, strict=True)]

    def _plan(self, problem: PlanningProblem, sizes: FloatArray, pace_s: float) -> BatchPlan:
        planner = Planner.of(of_batch(self._with_margin, sizes), self._schedule, self._wait_latency_s)
        plan = planner.to_plan(planner.solve(Target.straggler(pace_s), self._limits, search=False))
        if not self.catches_up:
            return BatchPlan(plan, problem, None)
        planned_s = problem.planned_s(clocks_of(plan, problem.graph))
        latest_s = latest_starts(problem.graph, planned_s, pace_s)
        return BatchPlan(plan, problem, CatchUp(latest_s, self._latency_s or 0.0))


def outcome_of(
    plans: Sequence[BatchPlan], durations_s: FloatArray, latency_s: float = 0.0, gaps: Gaps | None = None
) -> tuple[Outcome, Outcome]:
    """One step of all replicas under its plans, and at full clocks.

    Args:
        plans: of each replica.
        durations_s: shape (replicas, nodes), what instructions really take at full clocks.
        latency_s: how long a clock change takes.
        gaps: of this step; None: there are none.
    """
    under, full = [], []
    for replica, (plan, took_s) in enumerate(zip(plans, durations_s, strict=True)):
        began: dict[str, FloatArray] = {}
        if gaps is not None:
            began = {"seen_later_s": -gaps.usual_s[:, None], "gaps_s": gaps.gaps_s[:, replica, None]}
        replay = Replay(plan.problem, took_s[None, None], latency_s=latency_s, **began)
        clocks = clocks_of(plan.plan, plan.problem.graph)
        under.append(replay.under(clocks, plan.catch_up, plan.plan.wait_clocks_mhz))
        full.append(replay.at_full_clocks)
    costs = plans[0].problem.waiting_costs
    waiting_w = sum(power.at_w(mhz) for power, mhz in zip(costs.power, costs.full_mhz.tolist(), strict=True))
    return _together(under, waiting_w), _together(full, waiting_w)


def _together(outcomes: Sequence[Outcome], waiting_w: float) -> Outcome:
    """Replicas that wait for each other at full clocks."""
    time_s = np.max([one.time_s for one in outcomes], axis=0)
    energy_j = np.sum([one.energy_j + waiting_w * (time_s - one.time_s) for one in outcomes], axis=0)
    return Outcome(time_s, energy_j, float(np.mean([one.raised for one in outcomes])))


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """Steps one after the other."""
    return Outcome(
        np.concatenate([one.time_s for one in outcomes]),
        np.concatenate([one.energy_j for one in outcomes]),
        float(np.mean([one.raised for one in outcomes])),
    )


@dataclass(frozen=True, eq=False)
class Chosen:
    """What is planned with, from now on.

    Attributes:
        planner: with the margin that was chosen; None: no margin keeps to the time.
        replayed: what the replay said of it, or of the largest margin.
    """

    planner: BatchPlanner | None
    replayed: Replayed


def choose(
    planner_with: Callable[[float], BatchPlanner],
    sizes: Sequence[Sequence[FloatArray]],
    durations_s: Sequence[FloatArray],
    promise: Promise,
    latency_s: float = 0.0,
    margins: Sequence[float] = MARGINS,
    gaps: Gaps | None = None,
) -> Chosen:
    """Choose the least margin under which iterations that were measured keep to their time.

    Args:
        planner_with: of a margin.
        sizes: per step and replica what is predicted, see `of_batch`; at least one step.
        durations_s: per step, shape (replicas, nodes): what instructions took, at full clocks.
        promise: what has to be kept.
        latency_s: how long a clock change takes.
        margins: to try, rising.
        gaps: of these steps; None: there are none.
    """
    replicas = len(durations_s[0])
    count = min(len(durations_s), max(_FEWEST, _REPLAYED // replicas))
    steps = np.unique(np.linspace(0, len(durations_s) - 1, count).astype(int)).tolist()

    def of_step(step: int) -> Gaps | None:
        return None if gaps is None else replace(gaps, gaps_s=gaps.gaps_s[:, replicas * step : replicas * (step + 1)])

    replayed: Replayed | None = None
    interrupted: npt.NDArray[np.bool_] | None = None
    for margin in margins:
        planner = planner_with(margin)
        if interrupted is None:  # against what was predicted, as microbatches differ
            against = [durations_s[step] / np.maximum(np.stack(list(sizes[step])), _SMALLEST) for step in steps]
            interrupted = Replay(planner.problem, np.array(against)).interrupted
        ran = [outcome_of(planner.step(sizes[step]), durations_s[step], latency_s, of_step(step)) for step in steps]
        under, full = joined([one for one, _ in ran]), joined([one for _, one in ran])
        replayed = judged(under, full, interrupted, promise, planner.catches_up, margin)
        if replayed.kept:
            return Chosen(planner, replayed)
    assert replayed is not None  # there are margins
    return Chosen(None, replayed)

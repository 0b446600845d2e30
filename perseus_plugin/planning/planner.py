"""From a graph and a profile to a plan."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from perseus_plugin.errors import PlanError
from perseus_plugin.pipeline import IntArray, PipelineGraph
from perseus_plugin.planning.options import PlanningProblem, build_problem
from perseus_plugin.planning.plan import Plan, PlannedInstruction
from perseus_plugin.planning.relaxation import Relaxation, Relaxed
from perseus_plugin.planning.rounding import round_to_deadline, use_up_slack
from perseus_plugin.profiling.profile import Profile

Effort: TypeAlias = Literal["quick", "normal", "thorough"]


@dataclass(frozen=True, slots=True)
class Target:
    """What to plan for; make one with `slowdown`, `deadline`, `cheapest` or `energy_budget`.

    Attributes:
        kind: which of the four.
        value: slowdown as a share (0.1: a tenth longer than at full clocks), seconds, nothing, or joules.
    """

    kind: Literal["slowdown", "deadline", "cheapest", "energy_budget"]
    value: float = 0.0

    @classmethod
    def slowdown(cls, share: float = 0.0) -> Target:
        """Least energy at an iteration at most `share` longer than with every instruction at full clock."""
        _check_number("slowdown", share, allow_zero=True)
        return cls("slowdown", share)

    @classmethod
    def deadline(cls, seconds: float) -> Target:
        """Least energy at an iteration of at most `seconds`."""
        _check_number("deadline", seconds)
        return cls("deadline", seconds)

    @classmethod
    def cheapest(cls) -> Target:
        """Least energy at any iteration time (the iteration time T* beyond which time costs energy again)."""
        return cls("cheapest")

    @classmethod
    def energy_budget(cls, joules: float) -> Target:
        """Shortest iteration whose energy, one GPU per stage, blocking included, is at most `joules`."""
        _check_number("energy budget", joules)
        return cls("energy_budget", joules)


def _check_number(name: str, value: float, allow_zero: bool = False) -> None:
    if not (math.isfinite(value) and (value > 0 or (allow_zero and value == 0))):
        raise PlanError(f"{name}: got {value}; allowed: a finite number {'from' if allow_zero else 'above'} 0")


@dataclass(frozen=True, slots=True)
class ChangeLimits:
    """Limits on clock changes.

    Attributes:
        max_changes: most clock changes per stage and iteration (from the last instruction back to the first counts),
            None: any number.
        min_dwell_s: shortest time to stay at a clock before the next change.
    """

    max_changes: int | None = None
    min_dwell_s: float = 0.0

    def __post_init__(self) -> None:
        if self.max_changes is not None and self.max_changes < 0:
            raise PlanError(f"max changes: got {self.max_changes}; allowed: a whole number from 0")
        _check_number("min dwell", self.min_dwell_s, allow_zero=True)


def make_plan(
    graph: PipelineGraph,
    profile: Profile,
    *,
    blocking_power_w: float | Sequence[float],
    target: Target,
    limits: ChangeLimits | None = None,
    effort: Effort = "quick",
    full_clock_only: Collection[tuple[int, str]] = (),
    schedule: str = "custom",
) -> Plan:
    """Choose a clock for every instruction.

    The baseline is every instruction at the profile's highest clock. The plan is never worse than it. While a
    constant-time node runs, its GPU counts as blocking.

    Args:
        graph: from `build_graph`.
        profile: must cover every (stage, kind) of the graph.
        blocking_power_w: power of a GPU that waits, for all stages or one each.
        target: slowdown, deadline, cheapest or energy budget.
        limits: on clock changes.
        effort: how much time to spend on coming closer to the lower bound.
        full_clock_only: (stage, kind) pairs that stay at the profile's highest clock.
        schedule: name to put into the plan.

    Raises:
        PlanError: the target cannot be met (the message says what can), or the profile does not fit the graph.
    """
    problem = build_problem(graph, profile, blocking_power_w, full_clock_only)
    relaxation = Relaxation(problem)
    deadline_s = _deadline(problem, relaxation, target)
    relaxed = relaxation.solve(deadline_s)
    choice = _discretise(problem, relaxed)
    return assemble_plan(problem, choice, relaxed, schedule)


def _deadline(problem: PlanningProblem, relaxation: Relaxation, target: Target) -> float:
    if target.kind == "slowdown":
        return problem.full_clock_time_s * (1 + target.value)
    if target.kind == "deadline":
        return target.value
    raise PlanError(f"target {target.kind} is not there yet")


def _discretise(problem: PlanningProblem, relaxed: Relaxed) -> IntArray:
    best: tuple[float, IntArray] | None = None
    for share in (0.0, 0.5, 1.0):
        aim = relaxed.earliest_finish_s * (1 - share) + relaxed.latest_finish_s * share
        choice = use_up_slack(
            problem, round_to_deadline(problem, aim, relaxed.deadline_s), relaxed.deadline_s
        )
        energy = problem.effective_energy_j(choice)
        if best is None or energy < best[0]:
            best = energy, choice
    assert best is not None  # three were tried
    return best[1]


def assemble_plan(problem: PlanningProblem, choice: IntArray, relaxed: Relaxed, schedule: str) -> Plan:
    """Evaluate `choice` and put it into a plan; the baseline instead if that is no worse."""
    graph = problem.graph
    frequency = np.zeros(len(graph), dtype=np.int64)
    for k, options in enumerate(problem.classes):
        nodes = problem.class_of == k
        frequency[nodes] = options.frequency_mhz[choice[nodes]]
    start, finish = graph.times(problem.durations(choice))
    iteration_time_s = float(finish.max())
    energy_j = problem.energy_j(choice, iteration_time_s)
    if energy_j > problem.full_clock_energy_j and problem.full_clock_time_s <= relaxed.deadline_s:
        frequency = problem.per_node(problem.full_clock_mhz).astype(np.int64)
        start, finish = graph.times(problem.full_clock_s)
        iteration_time_s, energy_j = problem.full_clock_time_s, problem.full_clock_energy_j
    clocks, starts, finishes = frequency.tolist(), start.tolist(), finish.tolist()
    stages = []
    for nodes in graph.stage_nodes:
        planned = []
        for node in nodes.tolist():
            instruction = graph.instructions[node]
            if instruction is not None:
                planned.append(
                    PlannedInstruction(instruction, clocks[node], starts[node], finishes[node])
                )
        stages.append(tuple(planned))
    return Plan(
        schedule=schedule,
        microbatches=graph.microbatches,
        deadline_s=relaxed.deadline_s,
        iteration_time_s=iteration_time_s,
        energy_j=energy_j,
        energy_lower_bound_j=min(relaxed.bound_j, energy_j),
        baseline_time_s=problem.full_clock_time_s,
        baseline_energy_j=problem.full_clock_energy_j,
        stages=tuple(stages),
    )

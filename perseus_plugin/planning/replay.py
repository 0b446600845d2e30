"""What iterations would have taken under a plan, had their instructions taken what they really took.

A plan is made for the means. Real instructions vary, and where several stages are about equally far from the deadline
the iteration ends with whichever is late this time. A replay puts the durations that were measured into the graph, each
stretched by its clock, and follows them along: time and energy of that iteration under the plan, and at full clocks.

It also follows the rule by which ranks catch up within the iteration (`CatchUp`). All iterations go through at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import FloatArray, IntArray, PipelineGraph
from perseus_plugin.iteration.replayed import LATE_BY
from perseus_plugin.planning.options import PlanningProblem
from perseus_plugin.planning.plan import Plan

_HELD_UP = 3.0  # times the longest of all other iterations: more than sizes and clocks do


@dataclass(frozen=True, eq=False)
class CatchUp:
    """What ranks do that are late: an instruction begun after its latest start runs faster than planned.

    It runs at the slowest clock at which it would end, going by the profile, when it was planned to end at the latest;
    at the fastest clock where none does.

    Attributes:
        latest_start_s: shape (nodes,), since the iteration's begin.
        latency_s: how long a clock change takes to have effect.
        size_weight: how many times the mean of what it has run so far a rank must have seen for its own estimate of the
            step's size to count half; 0: latest starts are not scaled by the step's size.
    """

    latest_start_s: FloatArray
    latency_s: float = 0.0
    size_weight: float = 0.0


@dataclass(frozen=True, eq=False)
class Outcome:
    """Iterations as they would have been.

    Attributes:
        time_s: shape (iterations,), that of the slowest replica.
        energy_j: shape (iterations,), of all replicas, waiting for the slowest included.
        raised: share of instructions that ran faster than planned.
    """

    time_s: FloatArray
    energy_j: FloatArray
    raised: float = 0.0

    def of(self, which: npt.NDArray[np.bool_]) -> Outcome:
        """Some of the iterations; the share that was raised stays that of all."""
        return Outcome(self.time_s[which], self.energy_j[which], self.raised)


class Replay:
    """Replays iterations of one job.

    Args:
        problem: graph of one replica, and what clocks do to the time and power of its instructions.
        durations_s: shape (iterations, replicas, nodes), at the profile's highest clocks; entries of constant-time
            nodes are ignored.
        latency_s: how long a clock change takes to have effect: when the clock goes down, the instruction begins at the
            clock of the one before it.
        seen_later_s: shape (nodes, iterations times replicas), how much later than the graph says each instruction
            began in these iterations for a rank that looks for lateness, usual delays apart; None: as the graph says.
        gaps_s: of the same shape, how long after the end of all that it waits for each instruction began, beyond what
            the graph says; None: at once. Whatever the clocks, it does so again.

    Attributes:
        full_s: shape (nodes, iterations times replicas), the durations.

    Raises:
        PlanError: the durations do not fit the graph, or are no durations.
    """

    def __init__(
        self,
        problem: PlanningProblem,
        durations_s: npt.ArrayLike,
        seen_later_s: FloatArray | None = None,
        latency_s: float = 0.0,
        gaps_s: FloatArray | None = None,
    ) -> None:
        graph = problem.graph
        given = np.asarray(durations_s, dtype=np.float64)
        if given.ndim != 3 or given.shape[2] != len(graph) or not given.size:
            raise PlanError(f"durations: got shape {given.shape}; allowed: (iterations, replicas, {len(graph)})")
        full_s = np.where(graph.is_constant, graph.constant_s, given).reshape(-1, len(graph)).T
        if not (np.isfinite(full_s).all() and (full_s >= 0).all()):
            raise PlanError("durations: got some that are negative or not finite; allowed: finite numbers from 0")
        self.problem, self.graph = problem, graph
        self._shape = given.shape[:2]
        self.full_s = np.ascontiguousarray(full_s)  # by node: what a level needs lies together
        self._top_s = problem.full_clock_s
        self._seen_later_s = np.zeros_like(self.full_s) if seen_later_s is None else seen_later_s
        self._gaps_s = np.zeros_like(self.full_s) if gaps_s is None else gaps_s
        self._before = _own_predecessors(graph)
        self._latency_s = latency_s

    @cached_property
    def at_full_clocks(self) -> Outcome:
        """The same iterations with every instruction at the profile's highest clock."""
        return self.under(self.problem.full_clocks.frequency_mhz)

    @cached_property
    def interrupted(self) -> npt.NDArray[np.bool_]:
        """Shape (iterations,): in which one something that no clock changes held an instruction up.

        That is where an instruction took over three times as long as in any other iteration, the iteration's size (the
        median of its instructions against their own medians) apart.
        """
        found = np.zeros(self._shape[0], dtype=bool)
        nodes = self.problem.instruction_nodes
        if self._shape[0] < 3 or not len(nodes):
            return found
        full_s = self.full_s[nodes].reshape(len(nodes), *self._shape)
        usual_s = np.median(full_s, axis=1, keepdims=True)
        relative = full_s / np.where(usual_s > 0, usual_s, np.inf)
        relative /= np.maximum(np.median(relative, axis=0, keepdims=True), 1e-9)
        longest, second = -np.sort(-relative, axis=1)[:, :2].transpose(1, 0, 2)
        where = np.argmax(relative, axis=1)[longest > _HELD_UP * second]
        found[where] = True
        return found

    def under(
        self,
        frequency_mhz: IntArray,
        catch_up: CatchUp | None = None,
        wait_clocks_mhz: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> Outcome:
        """The iterations under a plan.

        Args:
            frequency_mhz: shape (nodes,), the plan's clocks; see `clocks_of`.
            catch_up: what late ranks do; None: nothing.
            wait_clocks_mhz: see `Plan.wait_clocks_mhz`. A rank that waits is back from such a clock by the end of the
                shortest such wait.

        Raises:
            PlanError: a clock is not in the profile.
        """
        planned_s, watts = self.problem.at_clocks(frequency_mhz)
        waits_mhz = self.problem.waiting_costs.by_span(wait_clocks_mhz)
        ratio = self._ratio(planned_s)
        duration, power = self._stretched(frequency_mhz, waits_mhz, ratio, watts)
        if catch_up is None:
            finish = finishes(self.graph, self._gaps_s + duration)
            effective_j, raised = (duration * power).sum(axis=0), 0.0
        else:
            finish, duration, effective_j, raised = self._event_driven(
                planned_s, ratio, watts, duration, power, catch_up
            )
        return self._outcome(frequency_mhz, waits_mhz, finish, duration, effective_j, raised)

    def _ratio(self, planned_s: FloatArray) -> FloatArray:
        """Time of every node at its clock over that at full clocks, 1 for constant-time nodes."""
        ratio = np.divide(planned_s, self._top_s, out=np.ones_like(planned_s), where=self._top_s > 0)
        return np.where(self.graph.is_constant, 1.0, ratio)

    def _stretched(
        self, frequency_mhz: IntArray, waits_mhz: IntArray, ratio: FloatArray, watts: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Durations at the plan's clocks and the mean power meanwhile, both of shape (nodes, samples)."""
        duration = self.full_s * ratio[:, None]
        held_mhz = self._held_mhz(frequency_mhz, waits_mhz)
        falls = np.flatnonzero(held_mhz != frequency_mhz) if self._latency_s > 0 else np.empty(0, dtype=np.int64)
        power = np.broadcast_to(watts[:, None], duration.shape)
        if not len(falls):
            return duration, power
        held_s, held_w = self.problem.at_clocks(held_mhz)
        held_ratio = self._ratio(held_s)[falls, None]
        first_s = np.minimum(self._latency_s, self.full_s[falls] * held_ratio)
        rest_s = (self.full_s[falls] - first_s / held_ratio) * ratio[falls, None]
        duration[falls] = first_s + rest_s
        power = power.copy()
        joules = first_s * held_w[falls, None] + rest_s * watts[falls, None]
        power[falls] = joules / np.maximum(duration[falls], 1e-12)
        return duration, power

    def _held_mhz(self, frequency_mhz: IntArray, waits_mhz: IntArray) -> IntArray:
        """Shape (nodes,): the clock that an instruction begins at, that of the one before it where that is higher.

        After a wait with a clock of its own it begins at its own clock.
        """
        problem, graph, spans = self.problem, self.graph, self.problem.waiting_costs.spans
        held: IntArray = frequency_mhz.copy()
        after_low = set(spans.after[np.flatnonzero(waits_mhz)].tolist())
        for nodes in graph.stage_nodes:
            before: int | None = None  # full clocks, from the end of the last iteration
            for node in nodes.tolist():
                if graph.is_constant[node]:
                    continue
                k, own = int(problem.class_of[node]), int(frequency_mhz[node])
                top = int(problem.full_clock_mhz[k])
                known = top if before is None else before
                if known > own and node not in after_low and (known == top or known in problem.measured[k]):
                    held[node] = known
                before = own
        return held

    def _outcome(
        self,
        frequency_mhz: IntArray,
        waits_mhz: IntArray,
        finish: FloatArray,
        duration: FloatArray,
        effective_j: FloatArray,
        raised: float,
    ) -> Outcome:
        costs, replicas = self.problem.waiting_costs, self._shape[1]
        time_s = finish.max(axis=0).reshape(self._shape).max(axis=1)
        if not costs.is_constant:
            times = costs.spans.times(finish - duration, finish, np.repeat(time_s, replicas))
            shortest_s = times.wait_s.reshape(-1, *self._shape).min(axis=1, keepdims=True)
            shortest_s = np.broadcast_to(shortest_s, (len(shortest_s), *self._shape)).reshape(len(shortest_s), -1)
            effective_j = effective_j + costs.extra_j(frequency_mhz, waits_mhz, times, self._latency_s, shortest_s)
        effective = effective_j.reshape(self._shape).sum(axis=1)
        waiting_j = self.problem.total_blocking_w * time_s * replicas
        return Outcome(time_s, effective + waiting_j, raised)

    def _event_driven(
        self,
        planned_s: FloatArray,
        ratio: FloatArray,
        watts: FloatArray,
        stretched_s: FloatArray,
        stretched_w: FloatArray,
        catch_up: CatchUp,
    ) -> tuple[FloatArray, FloatArray, FloatArray, float]:
        """Level by level, as what an instruction runs at depends on when it begins.

        Returns:
            Finish and duration of every node, the instructions' energy, and the share of them that ran faster.
        """
        graph, problem = self.graph, self.problem
        option_s, option_j = problem.option_table
        usable = np.isfinite(option_s) & (option_s > 0)
        option_w = np.divide(option_j, option_s, out=np.zeros_like(option_s), where=usable)
        samples = self.full_s.shape[1]
        # One more row, for "no instruction before".
        finish = np.zeros((len(graph) + 1, samples))
        durations = np.empty((len(graph), samples))
        raised = np.zeros((len(graph) + 1, samples), dtype=bool)
        done_s = np.zeros((len(graph) + 1, samples))
        expected_s = np.zeros((len(graph) + 1, samples))
        effective_j = np.zeros(samples)
        incoming = {low: (sources, latency, offsets) for low, _, sources, latency, offsets in graph.forward_steps}
        for low, high in zip(graph.level_start[:-1].tolist(), graph.level_start[1:].tolist(), strict=True):
            start = np.zeros((high - low, samples))
            if low:
                sources, latency, offsets = incoming[low]
                start = np.maximum.reduceat(finish[sources] + latency[:, None], offsets, axis=0)
            start += self._gaps_s[low:high]
            full_s, before = self.full_s[low:high], self._before[low:high]
            plan_s, plan_w = planned_s[low:high, None], watts[low:high, None]
            plan_ratio = ratio[low:high, None]
            latest = catch_up.latest_start_s[low:high, None]
            size = np.ones((high - low, samples))
            if catch_up.size_weight:
                prior_s = catch_up.size_weight * self._top_s[low:high, None]
                size = (done_s[before] + prior_s) / np.maximum(expected_s[before] + prior_s, 1e-12)
            seen = start + self._seen_later_s[low:high]
            late = (seen > latest * size + LATE_BY * plan_s) & ~graph.is_constant[low:high, None]
            duration, power = stretched_s[low:high].copy(), stretched_w[low:high].copy()
            if late.any():
                rows, columns = np.nonzero(late)
                classes = problem.class_of[low:high][rows]
                scale = size[rows, columns]
                left = (latest[:, 0][rows] + plan_s[:, 0][rows]) * scale - seen[rows, columns]
                option = np.maximum((option_s[classes] * scale[:, None] <= left[:, None]).sum(axis=1) - 1, 0)
                faster_ratio = option_s[classes, option] / self._top_s[low:high][rows]
                here = full_s[rows, columns]
                # The clock rises only after the latency, unless it was raised already.
                slow_s = np.where(raised[before[rows], columns], 0.0, catch_up.latency_s)
                at_plan = here * plan_ratio[:, 0][rows]
                slow_s = np.minimum(slow_s, at_plan)
                fast_s = (here - slow_s / plan_ratio[:, 0][rows]) * faster_ratio
                faster = slow_s + fast_s < at_plan
                rows, columns, slow_s, fast_s = rows[faster], columns[faster], slow_s[faster], fast_s[faster]
                duration[rows, columns] = slow_s + fast_s
                joules = slow_s * plan_w[:, 0][rows] + fast_s * option_w[classes[faster], option[faster]]
                power[rows, columns] = joules / np.maximum(slow_s + fast_s, 1e-12)
                raised[low + rows, columns] = True
            finish[low:high] = start + duration
            durations[low:high] = duration
            effective_j += (duration * power).sum(axis=0)
            done_s[low:high] = done_s[before] + np.where(graph.is_constant[low:high, None], 0.0, full_s)
            expected_s[low:high] = (
                expected_s[before] + np.where(graph.is_constant[low:high], 0.0, self._top_s[low:high])[:, None]
            )
        instructions = problem.instruction_nodes
        return finish[:-1], durations, effective_j, float(raised[instructions].mean())


def finishes(graph: PipelineGraph, durations_s: FloatArray) -> FloatArray:
    """Finish of every node in many iterations at once; durations and result have shape (nodes, iterations)."""
    finish: FloatArray = durations_s.copy()
    for low, high, sources, latency, offsets in graph.forward_steps:
        finish[low:high] += np.maximum.reduceat(finish[sources] + latency[:, None], offsets, axis=0)
    return finish


def clocks_of(plan: Plan, graph: PipelineGraph) -> IntArray:
    """A plan's clocks by node, 0 for constant-time nodes.

    Raises:
        PlanError: the plan is not for this graph.
    """
    clocks = np.zeros(len(graph), dtype=np.int64)
    for stage, nodes in enumerate(graph.stage_nodes):
        own = [node for node in nodes.tolist() if graph.instructions[node] is not None]
        planned = plan.stages[stage]
        if [graph.instructions[node] for node in own] != [p.instruction for p in planned]:
            raise PlanError(f"plan: got other instructions in stage {stage}; allowed: those of the schedule")
        clocks[own] = [p.frequency_mhz for p in planned]
    return clocks


def latest_starts(graph: PipelineGraph, durations_s: FloatArray, deadline_s: float) -> FloatArray:
    """Latest start of every node with which the iteration still ends at the deadline, shape (nodes,)."""
    return graph.latest_finish(durations_s, deadline_s) - graph.durations(durations_s)


def by_node(graph: PipelineGraph, stages: Sequence[Sequence[float]]) -> FloatArray:
    """Values of every stage's instructions in program order, by node; 0 for constant-time nodes.

    Raises:
        PlanError: a stage has another number of instructions.
    """
    values = np.zeros(len(graph))
    for stage, nodes in enumerate(graph.stage_nodes):
        own = [node for node in nodes.tolist() if graph.instructions[node] is not None]
        if stage >= len(stages) or len(stages[stage]) != len(own):
            got = len(stages[stage]) if stage < len(stages) else 0
            raise PlanError(
                f"durations: got {got} in stage {stage}; allowed: one for each of its {len(own)} instructions"
            )
        values[own] = stages[stage]
    return values


def _own_predecessors(graph: PipelineGraph) -> IntArray:
    """Shape (nodes,): the node before it in its own stage; the number of nodes where there is none."""
    before = np.full(len(graph), len(graph), dtype=np.int64)
    for nodes in graph.stage_nodes:
        before[nodes[1:]] = nodes[:-1]
    return before

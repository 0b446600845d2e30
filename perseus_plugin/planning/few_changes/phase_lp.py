"""The clocks of given phases, as a linear program over mixtures of clocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from perseus_plugin.iteration.graph import FloatArray
from perseus_plugin.planning.few_changes.phases import Phases, StageClocks
from perseus_plugin.planning.options import PlanningProblem
from perseus_plugin.planning.solvers import interruptible
from perseus_plugin.planning.work import Work

if TYPE_CHECKING:
    from ortools.linear_solver import pywraplp

# Building, per precedence; a step of the simplex method, by itself and per row.
_PRECEDENCE = 2e-5
_STEP, _STEP_ROW = 1e-5, 2e-8
_MIXED = 4e-6  # per precedence and clock of its instruction, where all clocks are mixed


@dataclass(frozen=True, eq=False)
class PhaseMix:
    """Optimum of the linear program.

    Attributes:
        phases: every phase at the slowest clock that makes no instruction longer than the mixture does.
        energy_j: effective energy of the mixture.
        price_w: shape (nodes,), energy that a second less of that node would save.
        edge_price_w: shape (edges,), of that what each precedence would save.
        sink_price_w: shape (nodes,), what the end of the iteration would.
    """

    phases: Phases
    energy_j: float
    price_w: FloatArray
    edge_price_w: FloatArray
    sink_price_w: FloatArray


def solve_phases(
    problem: PlanningProblem,
    stages: tuple[StageClocks, ...],
    phases: Phases,
    deadline_s: float,
    work: Work,
    until: float,
    *,
    every: bool = False,
) -> PhaseMix | None:
    """Mixtures of clocks for the phases with the least energy by the deadline; None if none are found.

    Args:
        problem, stages, phases, deadline_s: what to solve.
        work: what is done is added to it.
        until: when to stop, in units of work.
        every: mix all clocks, also those that are in no good mixture where a phase's instructions are alike.
    """
    return _PhaseProgram(problem, stages, phases, deadline_s, every).solve(work, until)


class _PhaseProgram:
    """Variables: start times, and per phase the shares of its clocks; first and last phase may share theirs."""

    def __init__(
        self,
        problem: PlanningProblem,
        stages: tuple[StageClocks, ...],
        phases: Phases,
        deadline_s: float,
        every: bool = False,
    ) -> None:
        from ortools.linear_solver import pywraplp  # a tenth of a small plan's time, which has no such limits

        self.problem = problem
        self.every = every
        self.stages = stages
        self.phases = phases
        self.solver = pywraplp.Solver.CreateSolver("GLOP")
        self.infinity = self.solver.infinity()
        # Starts count from here in units of the mean duration, so that the numbers are near one.
        self.unit_s = float(problem.fastest_s[problem.instruction_nodes].mean())
        self.unit_j = problem.mean_energy_j
        self.deadline = deadline_s / self.unit_s
        self.starts = [self.solver.NumVar(0.0, self.deadline, "") for _ in range(len(problem.graph))]
        self.shares: list[list[dict[int, pywraplp.Variable]]] = []
        self.subtracted: list[list[list[float]]] = [(-stage.time_s / self.unit_s).tolist() for stage in stages]
        self.phase_of: dict[int, tuple[int, int, int]] = {}
        for stage in range(len(stages)):
            self._add_stage(stage)
        self.rows: list[tuple[int, pywraplp.Constraint]] = []
        self._add_precedence()

    def _add_stage(self, stage: int) -> None:
        table, begins = self.stages[stage], self.phases.begins[stage]
        clocks = self.phases.clocks[stage]
        ends = (*begins[1:], len(table.nodes))
        shares: list[dict[int, pywraplp.Variable]] = []
        objective = self.solver.Objective()
        for phase, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            for position in range(begin, end):
                self.phase_of[int(table.nodes[position])] = (stage, phase, position)
            energy = table.energy_j[begin:end].sum(axis=0)
            if 0 < phase == len(begins) - 1 and clocks[0] == clocks[-1]:
                shares.append(shares[0])
            else:
                usable = _hull(table.time_s[begin:end].sum(axis=0), energy, table.forbidden_j)
                if self.every:
                    usable = list(range(len(energy)))
                shares.append({f: self.solver.NumVar(0.0, 1.0, "") for f in usable})
                one = self.solver.Constraint(1.0, 1.0)
                for share in shares[-1].values():
                    one.SetCoefficient(share, 1.0)
            for f, share in list(shares[-1].items()):
                if energy[f] >= table.forbidden_j:
                    share.SetUb(0.0)
                    continue
                before = objective.GetCoefficient(share)
                objective.SetCoefficient(share, before + float(energy[f]) / self.unit_j)
        self.shares.append(shares)
        objective.SetMinimization()

    def _add_precedence(self) -> None:
        graph = self.problem.graph
        edges = zip(graph.edge_source.tolist(), graph.edge_target.tolist(), graph.edge_latency_s.tolist(), strict=True)
        for source, target, latency in edges:
            row = self.solver.Constraint(self._constant(source) + latency / self.unit_s, self.infinity)
            row.SetCoefficient(self.starts[target], 1.0)
            row.SetCoefficient(self.starts[source], -1.0)
            self._subtract_duration(row, source)
            self.rows.append((source, row))
        sinks = np.setdiff1d(np.arange(len(graph)), graph.edge_source)
        for source in sinks.tolist():
            row = self.solver.Constraint(self._constant(source) - self.deadline, self.infinity)
            row.SetCoefficient(self.starts[source], -1.0)
            self._subtract_duration(row, source)
            self.rows.append((source, row))

    def _constant(self, node: int) -> float:
        return float(self.problem.graph.constant_s[node]) / self.unit_s

    def _subtract_duration(self, row: pywraplp.Constraint, node: int) -> None:
        place = self.phase_of.get(node)
        if place is not None:
            stage, phase, position = place
            durations = self.subtracted[stage][position]
            for f, share in self.shares[stage][phase].items():
                row.SetCoefficient(share, durations[f])

    def solve(self, work: Work, until: float) -> PhaseMix | None:
        """The optimum, with all phases rounded to clocks that are fast enough; None if it is not found by `until`."""
        work.done += _PRECEDENCE * len(self.rows)
        if self.every:
            counts = [max(map(len, shares)) for shares in self.shares]
            work.done += _MIXED * sum(counts[self.phase_of[node][0]] for node, _ in self.rows if node in self.phase_of)
        step = _STEP + _STEP_ROW * self.solver.NumConstraints()
        most = max(1, int((until - work.done) / step))
        self.solver.SetSolverSpecificParametersAsString(f"max_number_of_iterations: {most}")
        self.solver.SetTimeLimit(int(1000 * work.solver_limit_s))
        status = interruptible(self.solver.Solve, self.solver.InterruptSolve)
        work.done += step * self.solver.iterations()
        if status != self.solver.OPTIMAL:
            work.brake_acts()
            return None
        clocks = []
        for stage, shares in enumerate(self.shares):
            clocks.append(tuple(self._fast_enough(stage, phase) for phase in range(len(shares))))
        graph = self.problem.graph
        each = np.array([max(0.0, row.dual_value()) for _, row in self.rows]) * self.unit_j / self.unit_s
        nodes = np.array([node for node, _ in self.rows])
        price, sinks = (
            np.bincount(nodes[which], weights=each[which], minlength=len(graph)).astype(np.float64)
            for which in (slice(None), slice(len(graph.edge_source), None))
        )
        energy = self.solver.Objective().Value() * self.unit_j
        phases = Phases(self.phases.begins, _tie(self.phases, tuple(clocks)))
        return PhaseMix(phases, energy, price, each[: len(graph.edge_source)], sinks)

    def _fast_enough(self, stage: int, phase: int) -> int:
        table, begins = self.stages[stage], self.phases.begins[stage]
        end = begins[phase + 1] if phase + 1 < len(begins) else len(table.nodes)
        rows = slice(begins[phase], end)
        mixed = sum(table.time_s[rows, f] * share.solution_value() for f, share in self.shares[stage][phase].items())
        allowed = (table.energy_j[rows] < table.forbidden_j).all(axis=0)
        fits = allowed & (table.time_s[rows] <= np.asarray(mixed)[:, None] * (1 + 1e-7)).all(axis=0)
        energy = np.where(fits, table.energy_j[rows].sum(axis=0), np.inf)
        return int(energy.argmin()) if fits.any() else 0


def _tie(before: Phases, clocks: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Give the first and the last phase, where they share a clock, the faster of the two found for them."""
    tied = []
    for old, new in zip(before.clocks, clocks, strict=True):
        if len(old) > 1 and old[0] == old[-1]:
            fast = min(new[0], new[-1])
            new = (fast, *new[1:-1], fast)
        tied.append(new)
    return tuple(tied)


def _hull(time_s: FloatArray, energy_j: FloatArray, forbidden_j: float) -> list[int]:
    """Clocks on the lower convex hull of a phase's total time and energy, and the fastest one."""
    usable = [f for f in np.argsort(time_s, kind="stable").tolist() if energy_j[f] < forbidden_j]
    hull: list[int] = []
    for f in usable:
        if hull and energy_j[f] >= energy_j[hull[-1]]:
            continue
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            turn = (time_s[b] - time_s[a]) * (energy_j[f] - energy_j[a])
            if turn - (energy_j[b] - energy_j[a]) * (time_s[f] - time_s[a]) > 0:
                break
            hull.pop()
        hull.append(f)
    return hull

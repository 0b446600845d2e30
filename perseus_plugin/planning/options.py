"""What a (stage, kind) can be run at: its Pareto-optimal clocks, and the convex lower hull of time and energy."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import FloatArray, IntArray, PipelineGraph
from perseus_plugin.planning.waiting import WaitingCosts
from perseus_plugin.profiling.profile import Measurement, Profile
from perseus_plugin.profiling.waiting import WaitingPower


@dataclass(frozen=True, eq=False)
class ClockOptions:
    """The clocks worth running one (stage, kind) at, fastest first.

    Each instruction counts with its *effective* energy, its energy less the least blocking power over its duration,
    since the GPU would draw that much in that time anyway.

    Attributes:
        frequency_mhz: shape (options,).
        time_s: shape (options,), rising.
        energy_j: shape (options,), effective energy, falling.
        hull: ids of the options on the lower convex hull, fastest first.
    """

    frequency_mhz: IntArray
    time_s: FloatArray
    energy_j: FloatArray
    hull: IntArray

    @cached_property
    def slope_w(self) -> FloatArray:
        """Shape (hull - 1,): effective energy saved per second along the hull's segments, falling."""
        energy, time = self.energy_j[self.hull], self.time_s[self.hull]
        slope: FloatArray = -np.diff(energy) / np.diff(time)
        return slope


@dataclass(frozen=True, eq=False)
class Assignment:
    """A clock for every instruction.

    Attributes:
        frequency_mhz: shape (nodes,), 0 for constant-time nodes.
        duration_s: shape (nodes,).
        energy_j: effective energy of all instructions together.
    """

    frequency_mhz: IntArray
    duration_s: FloatArray
    energy_j: float


@dataclass(frozen=True, eq=False)
class PlanningProblem:
    """A graph with the options of every instruction.

    Instructions of one (stage, kind) share their options, so all per-option work is done once per *class*.

    Attributes:
        graph: the precedence graph.
        classes: the options of every (stage, kind) that occurs.
        keys: the (stage, kind) of every class.
        class_of: shape (nodes,), class of every instruction, -1 for constant-time nodes.
        blocking_power_w: shape (stages,), the least that a waiting GPU draws, at whatever clock.
        waiting: per stage, what it draws by its clock.
        full_clock: per class, time and effective energy at the profile's highest clock, shape (classes, 2).
        full_clock_mhz: per class, the profile's highest clock.
        measured: per class, time and effective energy at every clock that is allowed, by clock.
    """

    graph: PipelineGraph
    classes: tuple[ClockOptions, ...]
    keys: tuple[tuple[int, str], ...]
    class_of: IntArray
    blocking_power_w: FloatArray
    waiting: tuple[WaitingPower, ...]
    full_clock: FloatArray
    full_clock_mhz: IntArray
    measured: tuple[dict[int, tuple[float, float]], ...]

    @cached_property
    def instruction_nodes(self) -> IntArray:
        """Ids of the nodes that are instructions."""
        return np.flatnonzero(self.class_of >= 0)

    @cached_property
    def total_blocking_w(self) -> float:
        """The least blocking power of all stages together."""
        return float(self.blocking_power_w.sum())

    @cached_property
    def waiting_costs(self) -> WaitingCosts:
        """What waiting takes."""
        full = np.zeros(self.graph.stages, dtype=np.int64)
        np.maximum.at(full, [stage for stage, _ in self.keys], self.full_clock_mhz)
        return WaitingCosts(self.graph, self.waiting, full)

    def per_node(self, per_class: npt.ArrayLike) -> FloatArray:
        """Shape (nodes,): every instruction's class value, 0 for constant-time nodes."""
        values = np.append(np.asarray(per_class, dtype=np.float64), 0.0)
        return values[self.class_of]

    @cached_property
    def fastest_s(self) -> FloatArray:
        """Shape (nodes,): the shortest duration of every node."""
        return self.per_node([c.time_s[0] for c in self.classes]) + self.graph.constant_s

    @cached_property
    def slowest_s(self) -> FloatArray:
        """Shape (nodes,): the duration of every node at its least effective energy."""
        return self.per_node([c.time_s[-1] for c in self.classes]) + self.graph.constant_s

    @cached_property
    def full_clock_s(self) -> FloatArray:
        """Shape (nodes,): the duration of every node at the profile's highest clock."""
        return self.per_node(self.full_clock[:, 0]) + self.graph.constant_s

    @cached_property
    def shortest_s(self) -> float:
        """The shortest possible iteration."""
        return self.graph.iteration_time_s(self.fastest_s)

    @cached_property
    def longest_s(self) -> float:
        """The iteration with every instruction at its least effective energy; nothing is gained beyond."""
        return self.graph.iteration_time_s(self.slowest_s)

    @cached_property
    def full_clock_time_s(self) -> float:
        """Iteration time with every instruction at the profile's highest clock."""
        return self.graph.iteration_time_s(self.full_clock_s)

    @cached_property
    def full_clock_energy_j(self) -> float:
        """Energy of that iteration, one GPU per stage, blocking included."""
        return self.full_clock_energy_until_j(self.full_clock_time_s)

    def full_clock_energy_until_j(self, end_s: float) -> float:
        """The same with blocking power until `end_s`; every wait is spent at full clocks."""
        full = self.full_clocks
        start_s, finish_s = self.graph.times(full.duration_s)
        waits = self.waiting_costs.left_alone(full.frequency_mhz, start_s, finish_s, end_s)
        return full.energy_j + self.total_blocking_w * end_s + waits.extra_j

    @cached_property
    def option_table(self) -> tuple[FloatArray, FloatArray]:
        """Times and effective energies of all classes, shape (classes + 1, most options), padded with inf.

        The last row is that of constant-time nodes: one option that takes no energy.
        """
        width = max(len(c.time_s) for c in self.classes)
        times = np.full((len(self.classes) + 1, width), np.inf)
        energies = np.full((len(self.classes) + 1, width), np.inf)
        for k, c in enumerate(self.classes):
            times[k, : len(c.time_s)] = c.time_s
            energies[k, : len(c.time_s)] = c.energy_j
        times[-1, 0] = energies[-1, 0] = 0.0
        return times, energies

    @cached_property
    def mean_energy_j(self) -> float:
        """Mean size of an instruction's effective energy at its fastest, to measure differences by."""
        sizes = np.abs(self.per_node([c.energy_j[0] for c in self.classes]))
        return float(sizes[self.instruction_nodes].mean()) or 1.0

    def durations(self, choice: IntArray) -> FloatArray:
        """Duration of every node when instruction v runs at option `choice[v]` of its class."""
        return self.option_table[0][self.class_of, choice] + self.graph.constant_s

    def effective_energy_j(self, choice: IntArray) -> float:
        """Sum of the instructions' effective energies."""
        return float(self.option_table[1][self.class_of, choice].sum())

    def choice(self, assignment: Assignment) -> IntArray:
        """For every instruction the option that takes no longer, and no more energy, than an assignment's clock."""
        choice = np.zeros(len(self.graph), dtype=np.int64)
        for k, options in enumerate(self.classes):
            nodes = self.class_of == k
            latest = np.searchsorted(options.time_s, assignment.duration_s[nodes], side="right") - 1
            choice[nodes] = np.maximum(latest, 0)
        return choice

    def assignment(self, choice: IntArray) -> Assignment:
        """The clocks behind `choice`."""
        frequency = np.zeros(len(self.graph), dtype=np.int64)
        for k, options in enumerate(self.classes):
            nodes = self.class_of == k
            frequency[nodes] = options.frequency_mhz[choice[nodes]]
        return Assignment(frequency, self.durations(choice), self.effective_energy_j(choice))

    def at_clocks(self, frequency_mhz: IntArray) -> tuple[FloatArray, FloatArray]:
        """Time of every node at these clocks, and its power above that of waiting; constant-time nodes wait.

        Args:
            frequency_mhz: shape (nodes,); entries of constant-time nodes are ignored.

        Raises:
            PlanError: a clock is not in the profile, or not allowed.
        """
        time_s, watts = self.graph.constant_s.copy(), np.zeros(len(self.graph))
        for node in self.instruction_nodes.tolist():
            k, clock = int(self.class_of[node]), int(frequency_mhz[node])
            if clock == self.full_clock_mhz[k]:
                seconds, joules = self.full_clock[k].tolist()
            elif clock in self.measured[k]:
                seconds, joules = self.measured[k][clock]
            else:
                raise PlanError(f"clocks: {clock} MHz in stage {self.keys[k][0]} is not in the profile")
            time_s[node], watts[node] = seconds, joules / seconds
        return time_s, watts

    def planned_s(self, frequency_mhz: IntArray) -> FloatArray:
        """Shape (nodes,): the duration of every node at these clocks; see `at_clocks`."""
        return self.at_clocks(frequency_mhz)[0]

    @cached_property
    def full_clocks(self) -> Assignment:
        """Every instruction at the profile's highest clock."""
        return Assignment(
            self.per_node(self.full_clock_mhz).astype(np.int64),
            self.full_clock_s,
            float(self.per_node(self.full_clock[:, 1]).sum()),
        )


def build_problem(
    graph: PipelineGraph,
    profile: Profile,
    blocking_power_w: float | Sequence[float],
    full_clock_only: Collection[tuple[int, str]] = (),
) -> PlanningProblem:
    """Join graph and profile.

    Args:
        graph: the precedence graph.
        profile: must have rows for every (stage, kind) of the graph.
        blocking_power_w: what a GPU draws while it waits, where the profile's rows do not say; one for all stages or
            one each.
        full_clock_only: (stage, kind) pairs that stay at the profile's highest clock.

    Raises:
        PlanError: the profile lacks a (stage, kind), the blocking power is not finite, is negative, or does not come
            once or once per stage.
    """
    given_w = _blocking_power(blocking_power_w, graph.stages)
    waiting = tuple(profile.waiting_power(stage, watts) for stage, watts in enumerate(given_w.tolist()))
    power = np.array([one.lowest_w for one in waiting])
    ids: dict[tuple[int, str], int] = {}
    class_of = np.full(len(graph), -1, dtype=np.int64)
    for node, instruction in enumerate(graph.instructions):
        if instruction is not None:
            class_of[node] = ids.setdefault((instruction.stage, instruction.kind), len(ids))
    classes = []
    measured = []
    full_clock = np.empty((len(ids), 2))
    for (stage, kind), k in ids.items():
        rows = profile.table.get((stage, kind))
        if rows is None:
            raise PlanError(f"the schedule runs {kind!r} in stage {stage}; the profile has no rows for it")
        full_clock[k] = rows[0].time_s, rows[0].energy_j - power[stage] * rows[0].time_s
        usable = rows[:1] if (stage, kind) in full_clock_only else rows
        classes.append(clock_options(usable, float(power[stage])))
        measured.append({m.frequency_mhz: (m.time_s, m.energy_j - power[stage] * m.time_s) for m in usable})
    return PlanningProblem(
        graph=graph,
        classes=tuple(classes),
        keys=tuple(ids),
        class_of=class_of,
        blocking_power_w=power,
        waiting=waiting,
        full_clock=full_clock,
        full_clock_mhz=np.array([profile.table[key][0].frequency_mhz for key in ids], dtype=np.int64),
        measured=tuple(measured),
    )


def _blocking_power(given: float | Sequence[float], stages: int) -> FloatArray:
    power = np.atleast_1d(np.asarray(given, dtype=np.float64))
    if power.shape not in ((1,), (stages,)):
        raise PlanError(f"blocking power: got {power.size} values; allowed: 1, or one for each of {stages} stages")
    if not (np.isfinite(power).all() and (power >= 0).all()):
        raise PlanError(f"blocking power: got {power.tolist()} W; allowed: finite numbers from 0")
    return np.full(stages, power[0]) if power.size == 1 else power


def clock_options(rows: Sequence[Measurement], blocking_power_w: float) -> ClockOptions:
    """Pareto-optimal options of one (stage, kind) in (time, effective energy), and their convex hull."""
    return _pareto((m.time_s, m.energy_j - blocking_power_w * m.time_s, m.frequency_mhz) for m in rows)


def _pareto(points: Iterable[tuple[float, float, int]]) -> ClockOptions:
    """Of points of time, effective energy and clock."""
    kept: list[tuple[float, float, int]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return ClockOptions(
        frequency_mhz=np.array([p[2] for p in kept], dtype=np.int64),
        time_s=np.array([p[0] for p in kept]),
        energy_j=np.array([p[1] for p in kept]),
        hull=np.array(_lower_hull([p[:2] for p in kept]), dtype=np.int64),
    )


def _lower_hull(points: Sequence[tuple[float, float]]) -> list[int]:
    """Ids of the lower convex hull of points with rising x and falling y (Andrew's monotone chain)."""
    hull: list[int] = []
    for i, (x, y) in enumerate(points):
        while len(hull) >= 2:
            (x0, y0), (x1, y1) = points[hull[-2]], points[hull[-1]]
            if (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) > 0:
                break
            hull.pop()
        hull.append(i)
    return hull


def weighted(problem: PlanningProblem, weights: FloatArray) -> PlanningProblem:
    """The problem with the energies of each stage times its weight, from 0: what a group of GPUs takes, or is worth."""
    per_class = weights[[stage for stage, _ in problem.keys]]
    full_clock = problem.full_clock.copy()
    full_clock[:, 1] *= per_class
    return replace(
        problem,
        classes=tuple(
            replace(options, energy_j=options.energy_j * weight)
            for options, weight in zip(problem.classes, per_class.tolist(), strict=True)
        ),
        blocking_power_w=problem.blocking_power_w * weights,
        waiting=tuple(
            WaitingPower(one.clocks_mhz, tuple(weight * watts for watts in one.power_w))
            for one, weight in zip(problem.waiting, weights.tolist(), strict=True)
        ),
        full_clock=full_clock,
        measured=tuple(
            {clock: (seconds, weight * joules) for clock, (seconds, joules) in rows.items()}
            for rows, weight in zip(problem.measured, per_class.tolist(), strict=True)
        ),
    )


def capped(problem: PlanningProblem, most_w: float) -> PlanningProblem:
    """The problem without the clocks at which an instruction draws more; each keeps that at which it draws least."""
    classes, measured = [], []
    for (stage, _), rows in zip(problem.keys, problem.measured, strict=True):
        waiting_w = float(problem.blocking_power_w[stage])
        power_w = {clock: joules / seconds + waiting_w for clock, (seconds, joules) in rows.items()}
        allowed = max(most_w, min(power_w.values()))
        kept = {clock: row for clock, row in rows.items() if power_w[clock] <= allowed}
        measured.append(kept)
        classes.append(_pareto((seconds, joules, clock) for clock, (seconds, joules) in kept.items()))
    return replace(problem, classes=tuple(classes), measured=tuple(measured))

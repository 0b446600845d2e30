"""Phases: runs of a stage's instructions at one clock; moves on them that keep the deadline and save energy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from perseus_plugin.iteration.graph import FloatArray, IntArray
from perseus_plugin.planning.options import Assignment, PlanningProblem
from perseus_plugin.planning.work import Work

_CUT_SHIFTS = (-8, -5, -3, -2, -1, 1, 2, 3, 5, 8)
# Timing an iteration: by itself, per stage, per level and per node of the graph. A gain: by itself and per phase of its
# stages. Looking at a pair of moves.
_TIMING, _TIMING_STAGE, _TIMING_LEVEL, _TIMING_NODE = 15e-6, 5e-6, 2.2e-6, 5e-8
_GAIN, _GAIN_PHASE = 6e-6, 5e-7
_PAIR = 2e-7


@dataclass(frozen=True, eq=False)
class StageClocks:
    """What every instruction of a stage takes at every clock worth running the stage at.

    Attributes:
        nodes: shape (instructions,), node ids in execution order.
        frequency_mhz: shape (clocks,), falling.
        time_s, energy_j: shape (instructions, clocks); the (effective) energy is `forbidden_j`, more than any plan
            takes, where a clock is not allowed.
        forbidden_j: that energy; finite, because energies are summed and subtracted.
    """

    nodes: IntArray
    frequency_mhz: IntArray
    time_s: FloatArray
    energy_j: FloatArray
    forbidden_j: float


@dataclass(frozen=True, slots=True)
class Phases:
    """Per stage, where its phases begin (the first at 0) and the id of each one's clock."""

    begins: tuple[tuple[int, ...], ...]
    clocks: tuple[tuple[int, ...], ...]

    def changes(self, stage: int) -> int:
        """Clock changes of a stage per iteration, the way back to the first clock included."""
        clocks = self.clocks[stage]
        return sum(a != b for a, b in zip(clocks, (*clocks[1:], clocks[0]), strict=True))

    def with_clock(self, stage: int, phase: int, clock: int) -> Phases:
        """With another clock for one phase; for both the first and the last if they share theirs."""
        clocks = list(self.clocks[stage])
        last = len(clocks) - 1
        together = {0, last} if phase in (0, last) and clocks[0] == clocks[last] else {phase}
        for one in together:
            clocks[one] = clock
        return replace(self, clocks=(*self.clocks[:stage], tuple(clocks), *self.clocks[stage + 1 :]))

    def with_begin(self, stage: int, phase: int, begin: int) -> Phases:
        """With one phase beginning elsewhere."""
        begins = list(self.begins[stage])
        begins[phase] = begin
        return replace(self, begins=(*self.begins[:stage], tuple(begins), *self.begins[stage + 1 :]))

    def merged(self, stage: int, phase: int, clock: int) -> Phases:
        """With one phase joined to the one before it, both at `clock`."""
        begins, clocks = list(self.begins[stage]), list(self.clocks[stage])
        del begins[phase], clocks[phase]
        clocks[phase - 1] = clock
        return Phases(
            (*self.begins[:stage], tuple(begins), *self.begins[stage + 1 :]),
            (*self.clocks[:stage], tuple(clocks), *self.clocks[stage + 1 :]),
        )


def stage_clocks(problem: PlanningProblem, *, every: bool = False) -> tuple[StageClocks, ...]:
    """The tables of all stages, with the clocks that some of their instructions are worth running at, or all."""
    stages = []
    for nodes in problem.graph.stage_nodes:
        own = nodes[problem.class_of[nodes] >= 0]
        classes = sorted(set(problem.class_of[own].tolist()))
        found = {int(f) for k in classes for f in problem.classes[k].frequency_mhz}
        if every:
            found = {f for k in classes for f in (*problem.measured[k], int(problem.full_clock_mhz[k]))}
        useful = sorted(found, reverse=True)
        forbidden = 1e3 * problem.mean_energy_j * (1 + len(problem.graph))
        times, energies = np.zeros((len(own), len(useful))), np.full((len(own), len(useful)), forbidden)
        for k in classes:
            rows = problem.class_of[own] == k
            times[rows] = problem.full_clock[k, 0]
            for column, frequency in enumerate(useful):
                if frequency in problem.measured[k]:
                    times[rows, column], energies[rows, column] = problem.measured[k][frequency]
        stages.append(StageClocks(own, np.array(useful, dtype=np.int64), times, energies, forbidden))
    return tuple(stages)


def clock_of_instructions(stage: StageClocks, begins: tuple[int, ...], clocks: tuple[int, ...]) -> IntArray:
    """Clock id of every instruction of a stage."""
    lengths = np.diff([*begins, len(stage.nodes)])
    return np.repeat(np.array(clocks, dtype=np.int64), lengths)


def assign(problem: PlanningProblem, stages: tuple[StageClocks, ...], phases: Phases) -> Assignment:
    """Clocks, durations and energy of all instructions."""
    frequency = np.zeros(len(problem.graph), dtype=np.int64)
    duration = problem.graph.constant_s.copy()
    energy = 0.0
    for stage, begins, clocks in zip(stages, phases.begins, phases.clocks, strict=True):
        if not len(stage.nodes):
            continue
        ids = clock_of_instructions(stage, begins, clocks)
        at = np.arange(len(ids))
        frequency[stage.nodes] = stage.frequency_mhz[ids]
        duration[stage.nodes] = stage.time_s[at, ids]
        energy += float(stage.energy_j[at, ids].sum())
    return Assignment(frequency, duration, energy)


class PhaseSearch:
    """Improves phases by moves, each of which keeps the deadline and saves energy.

    Args:
        deadline_s: to meet.
        work: what is done is added to it.
        until: when to stop, in units of work.
    """

    def __init__(
        self,
        problem: PlanningProblem,
        stages: tuple[StageClocks, ...],
        deadline_s: float,
        work: Work,
        until: float,
    ) -> None:
        self.problem = problem
        self.stages = stages
        self.deadline_s = deadline_s
        self.work, self.until = work, until
        graph = problem.graph
        levels = len(graph.level_start)
        self.timing = _TIMING + _TIMING_STAGE * len(stages) + _TIMING_LEVEL * levels + _TIMING_NODE * len(graph)
        self.prefix_j = [np.vstack([np.zeros(s.energy_j.shape[1]), np.cumsum(s.energy_j, axis=0)]) for s in stages]

    def run(self, phases: Phases) -> Phases:
        """Moves of all sorts until none helps."""
        while not self.expired():
            better = self._slow_down(phases)
            better = self._first(better, self._cut_moves(better))
            if better is phases:
                better = self._first(phases, self._pair_moves(phases))
            if better is phases:
                better = self._first(phases, self._trade_moves(phases))
            if better is phases:
                better = self._compound(phases)
            if better is phases:
                return phases
            phases = better
        return phases

    def expired(self) -> bool:
        """Whether enough is done."""
        return self.work.over(self.until)

    def energy_j(self, phases: Phases, stage: int) -> float:
        """Effective energy of one stage."""
        begins, clocks, prefix = phases.begins[stage], phases.clocks[stage], self.prefix_j[stage]
        ends = (*begins[1:], len(prefix) - 1)
        return float(sum(prefix[b, f] - prefix[a, f] for a, b, f in zip(begins, ends, clocks, strict=True)))

    def in_time(self, phases: Phases) -> bool:
        """Whether the deadline is met."""
        self.work.done += self.timing
        duration = assign(self.problem, self.stages, phases).duration_s
        return self.problem.graph.iteration_time_s(duration) <= self.deadline_s

    def _gain(self, before: Phases, after: Phases, stages: set[int]) -> float:
        self.work.done += _GAIN + _GAIN_PHASE * sum(len(before.clocks[s]) for s in stages)
        return sum(self.energy_j(before, s) - self.energy_j(after, s) for s in stages)

    def _units(self, phases: Phases) -> Iterator[tuple[int, int]]:
        for stage, clocks in enumerate(phases.clocks):
            for phase in range(len(clocks)):
                yield stage, phase

    def _slow_down(self, phases: Phases) -> Phases:
        """Slow single phases, the largest gain first, until none can be."""
        while not self.expired():
            moves: list[tuple[float, int, Phases]] = []
            for stage, phase in self._units(phases):
                clock = phases.clocks[stage][phase]
                for slower in range(clock + 1, min(clock + 4, len(self.stages[stage].frequency_mhz))):
                    moved = phases.with_clock(stage, phase, slower)
                    gain = self._gain(phases, moved, {stage})
                    if gain > 1e-9:
                        moves.append((gain, len(moves), moved))
            found = self._first(phases, (moved for _, _, moved in sorted(moves, reverse=True)))
            if found is phases:
                return phases
            phases = found
        return phases

    def _first(self, phases: Phases, moves: Iterator[Phases]) -> Phases:
        """The first move that is in time, the present phases without one."""
        for moved in moves:
            if self.expired():
                break
            if self.in_time(moved):
                return moved
        return phases

    def _trade_moves(self, phases: Phases) -> Iterator[Phases]:
        """One phase at a neighbouring clock with one of its cuts moved to make up for it, the largest gains first.

        Clocks are coarse steps for a whole phase; a cut moved by an instruction or two is a fine one.
        """
        moves: list[tuple[float, int, Phases]] = []
        for stage, phase in self._units(phases):
            for step in (-1, 1, 2):
                clock = phases.clocks[stage][phase] + step
                if not 0 <= clock < len(self.stages[stage].frequency_mhz):
                    continue
                turned = phases.with_clock(stage, phase, clock)
                for cut in {phase, phase + 1} - {0, len(phases.begins[stage])}:
                    for moved in self._shifts(turned, stage, cut):
                        gain = self._gain(phases, moved, {stage})
                        if gain > 1e-9:
                            moves.append((gain, len(moves), moved))
        for _, _, moved in sorted(moves, reverse=True):
            yield moved

    def _shifts(self, phases: Phases, stage: int, cut: int) -> Iterator[Phases]:
        """One cut moved to where its two phases still have an instruction each."""
        begins = phases.begins[stage]
        low = begins[cut - 1] + 1
        high = begins[cut + 1] if cut + 1 < len(begins) else len(self.stages[stage].nodes)
        for shift in _CUT_SHIFTS:
            if low <= begins[cut] + shift < high:
                yield phases.with_begin(stage, cut, begins[cut] + shift)

    def _compound(self, phases: Phases) -> Phases:
        """Move a cut even at a loss and let the phases slow down again; the first that pays in the end."""
        for moved in self._cut_moves(phases, least_gain=-math.inf):
            if self.expired():
                break
            if self.in_time(moved):
                slowed = self._slow_down(moved)
                if self._gain(phases, slowed, set(range(len(self.stages)))) > 1e-9:
                    return slowed
        return phases

    def _cut_moves(self, phases: Phases, least_gain: float = 1e-9) -> Iterator[Phases]:
        for stage, begins in enumerate(phases.begins):
            for cut in range(1, len(begins)):
                for moved in self._shifts(phases, stage, cut):
                    if self._gain(phases, moved, {stage}) > least_gain:
                        yield moved

    def _pair_moves(self, phases: Phases) -> Iterator[Phases]:
        """One phase a clock faster, another one up to three slower, the largest gains first."""
        units = list(self._units(phases))
        faster, slower = [], []
        for stage, phase in units:
            clock = phases.clocks[stage][phase]
            if clock > 0:
                moved = phases.with_clock(stage, phase, clock - 1)
                faster.append((self._gain(phases, moved, {stage}), stage, phase))
            for down in range(clock + 1, min(clock + 4, len(self.stages[stage].frequency_mhz))):
                moved = phases.with_clock(stage, phase, down)
                slower.append((self._gain(phases, moved, {stage}), stage, phase, down))
        self.work.done += _PAIR * len(faster) * len(slower)
        pairs = [
            (loss + gain, a, b)
            for a, (loss, *_) in enumerate(faster)
            for b, (gain, *_) in enumerate(slower)
            if loss + gain > 1e-9 and faster[a][1:3] != slower[b][1:3]
        ]
        for _, a, b in sorted(pairs, reverse=True)[:2000]:
            _, stage, phase = faster[a]
            moved = phases.with_clock(stage, phase, phases.clocks[stage][phase] - 1)
            _, other, other_phase, down = slower[b]
            moved = moved.with_clock(other, other_phase, down)
            if self._gain(phases, moved, {stage, other}) > 1e-9:
                yield moved

"""Phases: runs of a stage's instructions at one clock."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perseus_plugin.iteration.graph import FloatArray, IntArray
from perseus_plugin.planning.options import Assignment, PlanningProblem


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

    @property
    def program(self) -> tuple[object, ...]:
        """All of it that the linear program of its clocks depends on: phases alike in that have the same one."""
        return self.begins, tuple(clocks[:1] == clocks[-1:] for clocks in self.clocks)

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
